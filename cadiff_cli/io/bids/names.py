"""File names: read the entities of a name, and build the names of a result's files."""

import re
from functools import lru_cache
from pathlib import Path

from cadiff_cli.io.formats import stem

HEAD, BRAIN, WORKING = "desc-preproc_T1w", "desc-brain_T1w", "res-1_desc-brain_T1w"
"""The evened head, and the brain cut out of the scan, on the scan's own grid; the brain on the
working grid.  Other programs take all files without ``space-`` and ``res-`` to lie on one grid.
"""
MASK, SKULL_MASK, FIELD = "desc-brain_mask", "desc-icv_mask", "desc-distance_field"
MORPH, TOTALS_MORPH = "desc-volumetric_morph", "desc-totals_morph"
DSEG = "seg-{}_desc-structures_dseg"
FREESURFER = "seg-{}_desc-freesurfer_dseg"
PROBSEG, UNCERTAINTY = "seg-{}_probseg", "seg-{}_desc-uncertainty_probseg"
FINER_MORPH, CONFIDENCE = "seg-{}_desc-volumetric_morph", "seg-{}_desc-confidence_probseg"
"""To be formatted with ``Parcellation.segmentation``."""
TISSUES, TISSUE = "dseg", "label-{}_probseg"
"""Tissue classes and their probabilities.  sMRIPrep takes a ``dseg`` without ``desc-`` for such."""
JOURNAL = "logs/journal"
"""Folder of the state of each scan, in an output folder."""
_LABEL = "[A-Za-z0-9]+"
LABEL_MAP = re.compile(rf"_seg-{_LABEL}(_desc-structures)?_dseg(?=\.)")
"""How the name of a label map on the scan's grid ends; without ``desc-`` up to revision 8."""
_TEMPLATE = "[A-Za-z0-9+]+"  # MNIInfant+2
_SPACE = rf"space-{_LABEL}(_cohort-{_LABEL})?"
_NAMES = (
    *(HEAD, BRAIN, WORKING, MASK, SKULL_MASK, FIELD, MORPH, TOTALS_MORPH, TISSUES),
    *(x.format(_LABEL) for x in (DSEG, FREESURFER, PROBSEG, UNCERTAINTY, FINER_MORPH, CONFIDENCE)),
    TISSUE.format("(GM|WM|CSF)"),
    rf"{_SPACE}(_res-{_LABEL})?_({BRAIN}|{MASK})",
    rf"{_SPACE}_seg-{_LABEL}(_res-{_LABEL})?(_desc-structures)?_dseg",
    rf"from-({_TEMPLATE}_to-T1w|T1w_to-{_TEMPLATE})_mode-image_xfm",
    # Up to revision 8.
    rf"seg-{_LABEL}_dseg",
    rf"{_SPACE}(_res-{_LABEL})?_{HEAD}",
)
OURS = re.compile(rf"({'|'.join(_NAMES)})\.(nii\.gz|json|tsv|h5)")
"""Output names, after the source's entities: no others are ever replaced or removed.

Add new ones to ``_NAMES``.  ``seg-`` must name one of the dataset's parcellations
(``tables.is_ours``).
"""


DERIVED = ("desc", "space", "cohort", "res")
"""Entities of derivatives, which no raw image has."""


def source_entities(path: Path) -> str:
    """A name's entities, without suffix: ``sub-01_ses-a_desc-brain_T1w`` -> ``sub-01_ses-a``.

    Entities of derivatives alone (``DERIVED``) are dropped: cadiff's replace them.  A name that is
    not BIDS becomes a subject label of letters and digits: ``my scan.nii`` becomes ``sub-myscan``.
    """
    return _entities(stem(path))


def scan_of(path: Path) -> str:
    """Entities of a scan, from its image or its label map: ``sub-1_seg-x_dseg`` -> ``sub-1``.

    ``run-01`` and ``run-1`` are the same.
    """
    image = path.with_name(stem(path).removesuffix("_dseg") + ".nii")
    parts = (part.split("-", 1) for part in source_entities(image).split("_"))
    return "_".join(
        f"run-{int(part[1])}" if part[0] == "run" and part[1].isdigit() else "-".join(part)
        for part in parts
        if part[0] not in ("seg", "atlas", "label")
    )


@lru_cache(maxsize=100_000)  # a plan asks for each several times
def _entities(name: str) -> str:
    parts = name.split("_")
    if parts[0].startswith("sub-") and all("-" in p for p in parts[:-1]):
        entities = parts if "-" in parts[-1] else parts[:-1]
        keys = [p.split("-", 1)[0] for p in entities]
        kept = [p for key, p in zip(keys, entities, strict=True) if key not in DERIVED]
        if len({*keys}) == len(keys) and all(is_label(p.split("-", 1)[1]) for p in kept):
            return "_".join(kept)
    label = "".join(c for c in name if c.isalnum() and c.isascii())
    return f"sub-{label or 'unnamed'}"


def standard_name(name: str, template: str, resolution: str = "") -> str:
    """``name`` in a template's space, with entities in BIDS' order.

    >>> standard_name("seg-cadiff_desc-structures_dseg", "MNIColin27", "2")
    'space-MNIColin27_seg-cadiff_res-2_desc-structures_dseg'
    >>> standard_name("desc-brain_mask", "MNIColin27", "2")
    'space-MNIColin27_res-2_desc-brain_mask'
    >>> standard_name("desc-brain_mask", "MNIInfant:cohort-2")
    'space-MNIInfant_cohort-2_desc-brain_mask'
    """
    parts = [f"space-{template.replace(':', '_')}", *name.split("_")]
    if resolution:
        parts.insert(2 if parts[1].startswith("seg-") else 1, f"res-{resolution}")
    return "_".join(parts)


def xfm_name(start: str, end: str) -> str:
    """Name of the transform that resamples ``start`` images onto ``end``.

    A template is named by its ``label``, with its cohort as in fMRIPrep's outputs.

    >>> xfm_name("MNIInfant+2", "T1w")
    'from-MNIInfant+2_to-T1w_mode-image_xfm.h5'
    """
    return f"from-{start}_to-{end}_mode-image_xfm.h5"


def page_path(out: Path, entities: str) -> Path:
    """Path of a scan's page, as in other BIDS apps."""
    return out / f"{entities}.html"


def is_label(text: str) -> bool:
    """Whether a text may be an entity's value."""
    return bool(text) and text.isascii() and text.replace("+", "").isalnum()
