"""File names: read the entities of a name, and build the names of a result's files."""

from pathlib import Path

from cadiff_cli.io.formats import stem

T1W, MASK, FIELD = "desc-preproc_T1w", "desc-brain_mask", "desc-distance_field"
BRAIN = "desc-brain_T1w"
MORPH = "desc-volumetric_morph"
DSEG, PROBSEG, UNCERTAINTY = "seg-{}_dseg", "seg-{}_probseg", "seg-{}_desc-uncertainty_probseg"
"""To be formatted with ``Parcellation.segmentation``."""
OURS = (
    *(f"{name}.*" for name in (T1W, BRAIN, MASK, FIELD, MORPH)),
    *(f"{name}.*".format("*") for name in (DSEG, PROBSEG, UNCERTAINTY)),
    *(f"space-*_{name}.*".format("*") for name in (T1W, MASK, DSEG)),
    "space-*_seg-*_res-*_dseg.*",
    "from-*_mode-image_xfm.*",
)
"""Patterns of output names, after the source's entities.

``seg-`` must name one of the dataset's parcellations (``tables.is_ours``).
"""


def source_entities(path: Path) -> str:
    """A name's entities, without suffix: ``sub-01_ses-a_desc-brain_T1w`` -> ``sub-01_ses-a``.

    Derivative entities (``desc``, ``space``, ``res``) are dropped: cadiff's replace them.  A name
    that is not BIDS becomes a subject label of letters and digits: ``my scan.nii`` becomes
    ``sub-myscan``.
    """
    name = stem(path)
    parts = name.split("_")
    if parts[0].startswith("sub-") and all("-" in p for p in parts[:-1]):
        entities = parts if "-" in parts[-1] else parts[:-1]
        kept = [p for p in entities if p.split("-", 1)[0] not in ("desc", "space", "res")]
        if all(_is_label(p.split("-", 1)[1]) for p in kept):
            return "_".join(kept)
    label = "".join(c for c in name if c.isalnum() and c.isascii())
    return f"sub-{label or 'unnamed'}"


def standard_name(name: str, template: str, resolution: str = "") -> str:
    """``name`` in a template's space, with entities in BIDS' order.

    >>> standard_name("seg-cadiff_dseg", "MNIColin27", "2")
    'space-MNIColin27_seg-cadiff_res-2_dseg'
    >>> standard_name("desc-brain_mask", "MNIColin27", "2")
    'space-MNIColin27_res-2_desc-brain_mask'
    >>> standard_name("desc-brain_mask", "MNIInfant:cohort-2")
    'space-MNIInfant_cohort-2_desc-brain_mask'
    """
    entity, suffix = name.split("_")
    res = [f"res-{resolution}"] if resolution else []
    middle = [entity, *res] if entity.startswith("seg-") else [*res, entity]
    return "_".join([f"space-{template.replace(':', '_')}", *middle, suffix])


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


def _is_label(text: str) -> bool:
    return bool(text) and text.isascii() and text.replace("+", "").isalnum()
