"""Labelled scans: T1w images with their manual segmentations."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cadiff_cli.errors import DataError, MissingInputError
from cadiff_cli.io.bids.index import entities_of
from cadiff_cli.io.bids.names import source_entities
from cadiff_cli.io.files import files_below
from cadiff_cli.io.formats import is_folder
from cadiff_cli.io.images import load_scan
from cadiff_cli.io.label_maps import load_classes
from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.products import Scan
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.spatial.resample import check_same_grid

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledScan:
    """A T1w image, its manual segmentation and its subject."""

    name: str
    subject: str
    t1: Path
    dseg: Path


def labelled_scans(dataset: Path) -> list[LabelledScan]:
    """Pair every T1w of a BIDS-like folder with the dseg of the same sub, ses, acq, run...

    Ignores images with a ``space-``; logs those without a partner.  Raises ``MissingInputError`` if
    the folder is absent, ``DataError`` if it holds no pairs, or two images of one scan.
    """
    if not is_folder(dataset):
        raise MissingInputError(
            f"no dataset at {dataset}", "give a BIDS-like folder of T1w and dseg"
        )
    images, segmentations = _by_scan(dataset, "T1w"), _by_scan(dataset, "dseg")
    pairs = [
        LabelledScan(
            source_entities(path), str(entities_of(path, dataset)["subject"]), path, labels
        )
        for scan, path in images.items()
        if (labels := segmentations.get(scan))
    ]
    if not pairs:
        raise DataError(
            f"{dataset} has {len(images)} T1w and {len(segmentations)} dseg images, no pairs",
            "name them sub-X[_ses-Y]_T1w.nii.gz and sub-X[_ses-Y]_dseg.nii.gz",
        )
    for one, other, suffix in ((images, segmentations, "dseg"), (segmentations, images, "T1w")):
        if alone := [path.name for scan, path in one.items() if scan not in other]:
            log.warning(
                "left out, having no %s with the same sub, ses, acq, run...: %s",
                suffix,
                ", ".join(alone),
            )
    return pairs


OF_MAPS = {"suffix", "extension", "segmentation", "atlas", "label", "desc", "res"}
"""What tells a scan from its label map, not from another scan."""


def _by_scan(dataset: Path, suffix: str) -> dict[frozenset[tuple[str, str]], Path]:
    """Images with this suffix on the scan's own grid, by the entities of path and name."""
    images: dict[frozenset[tuple[str, str]], Path] = {}
    for path in files_below(dataset, f"*_{suffix}.nii*", within="sub-"):
        entities = entities_of(path, dataset, derived=True)
        if "space" in entities:
            continue
        run = {"run": int(entities["run"])} if "run" in entities else {}
        told = {name: value for name, value in (entities | run).items() if name not in OF_MAPS}
        scan = frozenset((name, str(value)) for name, value in told.items())
        if scan in images:
            both = f"{images[scan].name}, {path.name}"
            raise DataError(
                f"{dataset} has two {suffix} images of one scan: {both}",
                "leave one of them, or link those to learn from into a folder of their own",
            )
        images[scan] = path
    return images


def load_labelled(
    scan: LabelledScan, parcellation: Parcellation, mapping: Mapping[int, int]
) -> tuple[Scan, Volume]:
    """Read a scan and its labels as classes (X, Y, Z), on one grid.

    Raises ``DataError`` if the grids differ, and the errors of ``load_scan`` and ``load_classes``.
    """
    loaded = load_scan(scan.t1)
    classes, grid = (
        load_classes(scan.dseg, parcellation, mapping, option="--labels"),
        loaded.t1.grid,
    )
    check_same_grid(scan.dseg.name, classes.grid, scan.t1.name, grid)
    return loaded, Volume(classes.data, grid)
