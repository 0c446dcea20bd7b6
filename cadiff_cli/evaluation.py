"""Score label maps against references: one row per scan and structure."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cadiff_cli.errors import DataError, MissingInputError
from cadiff_cli.io.bids import source_entities
from cadiff_cli.io.nifti import IMAGE_SUFFIXES, load_volume, replacing
from cadiff_cli.labels import LabelTable
from cadiff_cli.metrics.overlap import dice, surface_dice


@dataclass(frozen=True)
class Score:
    """Agreement on one structure of one scan; NaN where it is absent on both sides."""

    scan: str
    structure: str
    dice: float
    nsd: float
    volume_mm3: float
    reference_mm3: float


def score_pair(
    prediction: Path,
    reference: Path,
    table: LabelTable,
    subset: str,
    reference_mapping: dict[int, int],
    tolerance_mm: float = 1.0,
) -> list[Score]:
    """Score one label map (our codes) against a reference on the same grid."""
    maps = []
    for path, mapping in (
        (prediction, table.identity_mapping()),
        (reference, reference_mapping),
    ):
        volume = load_volume(path)
        codes = np.asarray(volume.data)
        found = {int(c) for c in np.unique(codes)} - {0}
        if path == prediction and (unknown := sorted(found - set(mapping))):
            raise DataError(
                f"{path.name} holds codes {unknown[:5]} that are not in the label table",
                "give a dseg written by cadiff",
            )
        maps.append((table.encode(codes, mapping), volume.grid))
    (p, grid), (r, other) = maps
    if grid.shape != other.shape or not np.allclose(grid.affine, other.affine, atol=1e-2):
        raise DataError(
            f"{prediction.name} lies on {grid!r}, {reference.name} on {other!r}",
            "both must share a grid",
        )
    classes = table.subset(subset)
    voxel = grid.voxel_volume_mm3
    scores = zip(
        classes,
        dice(p, r, classes),
        surface_dice(p, r, classes, grid.spacing_mm.tolist(), tolerance_mm),
        strict=True,
    )
    return [
        Score(
            source_entities(reference),
            table.structures[k - 1].name,
            float(d),
            float(n),
            float(np.count_nonzero(p == k) * voxel),
            float(np.count_nonzero(r == k) * voxel),
        )
        for k, d, n in scores
    ]


def pair_up(prediction: Path, reference: Path) -> list[tuple[Path, Path]]:
    """(prediction, reference) files: two files, or two folders whose dseg names share entities."""
    if prediction.is_file() and reference.is_file():
        return [(prediction, reference)]
    for path in (prediction, reference):
        if not path.exists():
            raise MissingInputError(f"no such file or folder: {path}", "check the path")
    if not (prediction.is_dir() and reference.is_dir()):
        raise MissingInputError(
            f"{prediction} and {reference} differ", "give two files or two folders"
        )
    references = {source_entities_of_dseg(p): p for p in _dsegs(reference)}
    pairs = [
        (p, references[source_entities_of_dseg(p)])
        for p in _dsegs(prediction)
        if source_entities_of_dseg(p) in references
    ]
    if not pairs:
        raise MissingInputError(
            f"no dseg of {prediction} has a partner in {reference}", "names must share sub and ses"
        )
    return pairs


def source_entities_of_dseg(path: Path) -> str:
    """Entities of the scan that a dseg was drawn on."""
    parts = source_entities(path).split("_")
    return "_".join(p for p in parts if not p.startswith("seg-"))


def write_scores(path: Path, scores: Iterable[Score]) -> None:
    """One row per scan and structure."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(("scan", "structure", "dice", "nsd", "volume_mm3", "reference_mm3"))
        for s in scores:
            numbers = (s.dice, s.nsd, s.volume_mm3, s.reference_mm3)
            cells = ("n/a" if np.isnan(n) else f"{n:.4f}" for n in numbers)
            writer.writerow((s.scan, s.structure, *cells))


def mean_over(scores: Sequence[Score], key: str, measure: str) -> dict[str, float]:
    """Mean of ``measure`` grouped by ``key`` (``scan`` or ``structure``); NaN rows are left out."""
    groups: dict[str, list[float]] = {}
    for s in scores:
        groups.setdefault(getattr(s, key), []).append(getattr(s, measure))
    known = {name: [v for v in values if not np.isnan(v)] for name, values in groups.items()}
    return {name: sum(v) / len(v) if v else float("nan") for name, v in known.items()}


def _dsegs(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.rglob("*_dseg.*") if p.name.endswith(IMAGE_SUFFIXES) and p.is_file()
    )
