"""Score one label map against another: a reference, or a later scan of the same person.

Background is never scored.  A structure missing on one side counts Dice 0 and NSD 0 and is
``missed``; missing on both sides it is ``absent`` and left out of every mean.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cadiff_cli.config import TOLERANCE_MM
from cadiff_cli.errors import DataError
from cadiff_cli.evaluation.pairing import brain_beside
from cadiff_cli.io.bids.names import scan_of
from cadiff_cli.io.bids.tables import parcellation_of
from cadiff_cli.io.images import load_volume
from cadiff_cli.io.label_maps import load_classes, say_once
from cadiff_cli.labels.parcellation import BASE, Parcellation, load_parcellation, shipped_names
from cadiff_cli.metrics.overlap import dice
from cadiff_cli.metrics.surface import hausdorff95_mm, surface_dice
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import check_same_grid, resample_labels
from cadiff_cli.stages.register import rigid


@dataclass(frozen=True)
class Score:
    """Agreement on one structure of one scan.

    ``dice``, ``nsd`` and ``hd95_mm`` are NaN if the structure is absent on both sides; if it is
    missing on one, ``hd95_mm`` is infinite.
    """

    scan: str
    reference: str
    structure: str
    dice: float
    nsd: float
    hd95_mm: float
    volume_mm3: float
    reference_mm3: float

    @property
    def missed(self) -> bool:
        """Whether only one side has the structure."""
        return math.isinf(self.hd95_mm)

    @property
    def absent(self) -> bool:
        """Whether neither side has the structure."""
        return math.isnan(self.dice)

    @property
    def volume_error_percent(self) -> float:
        """Signed, in per cent of the reference; NaN where the reference has no such structure."""
        if not self.reference_mm3:
            return math.nan
        return 100 * (self.volume_mm3 - self.reference_mm3) / self.reference_mm3

    @property
    def abs_volume_error_percent(self) -> float:
        """The absolute volume error, in per cent of the reference."""
        return abs(self.volume_error_percent)

    @property
    def volume_difference_percent(self) -> float:
        """Unsigned, in per cent of the mean of both volumes."""
        both = self.volume_mm3 + self.reference_mm3
        return 200 * abs(self.volume_mm3 - self.reference_mm3) / both if both else math.nan


def score_pair(
    prediction: Path,
    reference: Path,
    parcellation: Parcellation,
    subset: str,
    reference_mapping: Mapping[int, int],
    tolerance_mm: float = TOLERANCE_MM,
) -> list[Score]:
    """Score one label map of cadiff's against a reference on the same grid.

    ``parcellation`` (``scored_in``) has the compared classes, ``reference_mapping`` maps the
    reference's ids to them; a finer prediction is coarsened.  Structures without an id in the
    mapping are not scored; a warning names them.  Raises ``DataError`` for unknown codes in the
    prediction, a reference without any known id, or grids that differ.
    """
    p = load_own(prediction, parcellation)
    r = load_classes(reference, parcellation, reference_mapping, option="--reference-labels")
    check_same_grid(prediction.name, p.grid, reference.name, r.grid)
    scores = score_classes(
        scan_of(reference), p, r, parcellation, subset, tolerance_mm, reference.name
    )
    names = {parcellation.structures[k - 1].name for k in parcellation.reached(reference_mapping)}
    if not any(s.structure in names for s in scores):
        raise DataError(
            f"the references' ids include no structure of --labels {subset}",
            "use --labels all, or other --reference-labels",
        )
    if unknown := [s.structure for s in scores if s.structure not in names]:
        say_once(f"not scored, as the references have no ids for them: {', '.join(unknown)}")
    return [s for s in scores if s.structure in names]


def chosen_maps(labels: str | None) -> tuple[str, str | None]:
    """What ``--labels`` means: the finer parcellation whose label maps to take, and a subset.

    A shipped parcellation's name stands for all of its structures, and a subset that it alone has
    for this parcellation; the first is empty for every other name.
    """
    base = load_parcellation(BASE)
    for name in shipped_names():
        if name != BASE and labels == name:
            return name, "all"
        if name != BASE and labels in set(load_parcellation(name).subsets) - set(base.subsets):
            return name, labels
    return "", labels


def scored_in(label_maps: Iterable[Path], subset: str | None) -> tuple[Parcellation, str]:
    """Choose the parcellation to compare in, and its subset of structures.

    The parcellation is that of all ``label_maps`` if it has ``subset``, else ``BASE`` if its
    structures have parents there.  Without a ``subset``, the paper's is used, or all structures if
    neither parcellation has it.  Raises ``UsageError`` for a subset that neither has.
    """
    by_name = {each.name: each for each in map(parcellation_of, label_maps)}
    base = load_parcellation(BASE)
    (own,) = by_name.values() if len(by_name) == 1 else (base,)
    subset = subset or (base if own.has_parents else own).headline
    coarser = own.has_parents and subset in base.subsets and subset not in own.subsets
    chosen = base if coarser else own
    chosen.subset(subset)
    return chosen, subset


def load_own(path: Path, parcellation: Parcellation) -> Volume:
    """Read classes of ``parcellation`` from a label map of cadiff's, which may be finer."""
    return load_classes(path, parcellation, parcellation_of(path).mapping_to(parcellation))


def score_classes(
    scan: str,
    prediction: Volume,
    reference: Volume,
    parcellation: Parcellation,
    subset: str,
    tolerance_mm: float = TOLERANCE_MM,
    reference_name: str = "",
) -> list[Score]:
    """Score one class map against another on the same grid."""
    p, r, classes = prediction.data, reference.data, parcellation.subset(subset)
    straight = prediction, reference
    if reference.grid.is_sheared:  # distances are measured along axes at right angles
        grid = reference.grid.working(min(1.0, float(reference.grid.spacing_mm.min())))
        straight = resample_labels(prediction, grid), resample_labels(reference, grid)
    spacing_mm = straight[1].grid.spacing_mm.tolist()
    surfaces = straight[0].data, straight[1].data, classes, spacing_mm
    numbers = zip(
        dice(p, r, classes),
        surface_dice(*surfaces, tolerance_mm),
        hausdorff95_mm(*surfaces),
        _volumes_mm3(prediction, classes),
        _volumes_mm3(reference, classes),
        strict=True,
    )
    return [
        Score(scan, reference_name, parcellation.structures[k - 1].name, *map(float, row))
        for k, row in zip(classes, numbers, strict=True)
    ]


def retest_pair(
    first: Path,
    later: Path,
    parcellation: Parcellation,
    subset: str,
    tolerance_mm: float = TOLERANCE_MM,
) -> list[Score]:
    """Compare the label maps of two scans of one person, both written by cadiff.

    The later brain is registered rigidly to the first, and its labels are carried with it.  Volumes
    are measured on the scans' own grids.
    """
    r, p = (load_own(path, parcellation) for path in (first, later))
    motion = rigid(load_volume(brain_beside(first)), load_volume(brain_beside(later)))
    moved = Volume(moved_labels(p, motion, r.grid), r.grid)
    scores = score_classes(
        scan_of(later), moved, r, parcellation, subset, tolerance_mm, scan_of(first)
    )
    volumes = _volumes_mm3(p, parcellation.subset(subset)).tolist()
    return [replace(s, volume_mm3=mm3) for s, mm3 in zip(scores, volumes, strict=True)]


def moved_labels(labels: Volume, motion: np.ndarray, grid: Grid) -> np.ndarray:
    """Carry a class map to ``grid``; ``motion`` (4, 4; RAS mm) maps points of ``grid`` to it."""
    here = Grid(labels.grid.shape, np.linalg.solve(motion, labels.grid.affine))
    return resample_labels(Volume(labels.data, here), grid).data


def _volumes_mm3(labels: Volume, classes: Sequence[int]) -> np.ndarray:
    """(len(classes),) voxel counts times voxel volume."""
    counts = np.bincount(labels.data.ravel(), minlength=max(classes) + 1)
    return counts[list(classes)] * labels.grid.voxel_volume_mm3
