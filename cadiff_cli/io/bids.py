"""BIDS names and datasets.  The only module that imports pybids, and only for datasets."""

from dataclasses import dataclass
from pathlib import Path

from cadiff_cli.errors import DataError, MissingInputError
from cadiff_cli.io.nifti import stem


@dataclass(frozen=True)
class LabelledScan:
    """A T1w image, its manual segmentation and whose brain it is."""

    name: str
    subject: str
    t1: Path
    dseg: Path


def source_entities(path: Path) -> str:
    """The name's entities without its suffix: ``sub-01_ses-a_desc-brain_T1w`` -> ``sub-01_ses-a``.

    Derivative entities (``desc``, ``space``) are dropped, as ours take their place.  A name that is
    not BIDS becomes a subject label of letters and digits: ``my scan.nii`` -> ``sub-myscan``.
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


def labelled_scans(dataset: Path) -> list[LabelledScan]:
    """Every T1w of a BIDS-like folder that has a dseg with the same subject, session and run."""
    if not dataset.is_dir():
        raise MissingInputError(
            f"no dataset at {dataset}", "give a BIDS-like folder of T1w and dseg"
        )
    from bids.layout import parse_file_entities

    def key(path: Path) -> tuple[str, ...]:
        found = parse_file_entities(str(path), config=["bids", "derivatives"])
        return tuple(str(found.get(k, "")) for k in ("subject", "session", "acquisition", "run"))

    images = sorted(dataset.glob("sub-*/**/*_T1w.nii*"))
    segmentations = {key(path): path for path in sorted(dataset.glob("sub-*/**/*_dseg.nii*"))}
    pairs = [
        LabelledScan(source_entities(path), key(path)[0], path, segmentations[key(path)])
        for path in images
        if key(path) in segmentations
    ]
    if not pairs:
        raise DataError(
            f"{dataset} has {len(images)} T1w and {len(segmentations)} dseg images, no pairs",
            "name them sub-X[_ses-Y]_T1w.nii.gz and sub-X[_ses-Y]_dseg.nii.gz",
        )
    return pairs


def _is_label(text: str) -> bool:
    return bool(text) and text.isascii() and text.replace("+", "").isalnum()
