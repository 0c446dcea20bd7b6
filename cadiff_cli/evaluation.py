"""Score label maps: against references, and against a later scan of the same person.

Background is never scored.  A structure missing on one side counts Dice 0 and NSD 0 and is
``missed``; missing on both sides it is ``absent`` and left out of every mean.
"""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cadiff_cli.errors import DataError, MissingInputError, UsageError
from cadiff_cli.io.bids.names import source_entities
from cadiff_cli.io.bids.tables import named_parcellation, parcellation_of
from cadiff_cli.io.files import write_tsv
from cadiff_cli.io.formats import IMAGE_SUFFIXES, stem
from cadiff_cli.io.images import load_volume
from cadiff_cli.io.label_maps import load_classes, say_once
from cadiff_cli.labels.parcellation import BASE, Parcellation, load_parcellation
from cadiff_cli.metrics.overlap import dice
from cadiff_cli.metrics.surface import hausdorff95_mm, surface_dice
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import check_same_grid, resample_labels
from cadiff_cli.stages.register import rigid

OURS = re.compile(r"_seg-[A-Za-z0-9]+_dseg\.")
"""What marks a label map in a file name; cadiff drew it if ``seg-`` names a known parcellation."""


@dataclass(frozen=True)
class Score:
    """Agreement on one structure of one scan.

    ``dice`` and ``nsd`` are NaN where it is absent on both sides; ``hd95_mm`` is also infinite
    where it is missing on one.
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
        """The same without its sign."""
        return abs(self.volume_error_percent)

    @property
    def volume_difference_percent(self) -> float:
        """Unsigned, in per cent of the mean of both volumes."""
        both = self.volume_mm3 + self.reference_mm3
        return 200 * abs(self.volume_mm3 - self.reference_mm3) / both if both else math.nan


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation of every measure over ``n`` scores; absent ones are left out.

    ``missed`` of the ``n`` have no finite distance and are not in the mean of ``hd95_mm``.
    """

    name: str
    n: int
    missed: int
    absent: int
    mean: Mapping[str, float]
    sd: Mapping[str, float]


@dataclass(frozen=True)
class Pairs:
    """(prediction, reference) files, and the scans that are on one side only."""

    files: tuple[tuple[Path, Path], ...]
    without_reference: tuple[str, ...] = ()
    without_prediction: tuple[str, ...] = ()


def score_pair(
    prediction: Path,
    reference: Path,
    parcellation: Parcellation,
    subset: str,
    reference_mapping: Mapping[int, int],
    tolerance_mm: float = 1.0,
) -> list[Score]:
    """Score one label map of cadiff's against a reference on the same grid.

    ``parcellation`` has the classes that are compared (``scored_in``), ``reference_mapping`` leads
    to them; a finer prediction is coarsened.  Structures that no id of the reference means are not
    scored, which is said.  Raises ``DataError`` for unknown codes in the prediction, a reference
    without any known id, or grids that differ.
    """
    p = load_own(prediction, parcellation)
    r = load_classes(reference, parcellation, reference_mapping, option="--reference-labels")
    check_same_grid(prediction.name, p.grid, reference.name, r.grid)
    scores = score_classes(
        scan_of(reference), p, r, parcellation, subset, tolerance_mm, reference.name
    )
    known = {parcellation.structures[k - 1].name for k in parcellation.reached(reference_mapping)}
    if not any(s.structure in known for s in scores):
        raise DataError(
            f"no id of the references means one of the structures of --labels {subset}",
            "use --labels all, or other --reference-labels",
        )
    if unknown := [s.structure for s in scores if s.structure not in known]:
        say_once(f"not scored, as no id of the references means them: {', '.join(unknown)}")
    return [s for s in scores if s.structure in known]


def scored_in(label_maps: Iterable[Path], subset: str) -> Parcellation:
    """The parcellation that has ``subset``: that of all ``label_maps``, or else ``BASE``.

    Raises ``UsageError`` if neither has it.
    """
    found = {parcellation.name: parcellation for parcellation in map(parcellation_of, label_maps)}
    base = load_parcellation(BASE)
    (own,) = found.values() if len(found) == 1 else (base,)
    chosen = base if subset in base.subsets and subset not in own.subsets else own
    chosen.subset(subset)
    return chosen


def load_own(path: Path, parcellation: Parcellation) -> Volume:
    """Classes of ``parcellation`` from a label map of cadiff's, which may be of a finer one."""
    return load_classes(path, parcellation, parcellation_of(path).mapping_to(parcellation))


def score_classes(
    scan: str,
    prediction: Volume,
    reference: Volume,
    parcellation: Parcellation,
    subset: str,
    tolerance_mm: float = 1.0,
    reference_name: str = "",
) -> list[Score]:
    """Score one class map against another on the same grid."""
    p, r, classes = prediction.data, reference.data, parcellation.subset(subset)
    spacing_mm = reference.grid.spacing_mm.tolist()
    numbers = zip(
        dice(p, r, classes),
        surface_dice(p, r, classes, spacing_mm, tolerance_mm),
        hausdorff95_mm(p, r, classes, spacing_mm),
        _volumes_mm3(prediction, classes),
        _volumes_mm3(reference, classes),
        strict=True,
    )
    return [
        Score(scan, reference_name, parcellation.structures[k - 1].name, *map(float, row))
        for k, row in zip(classes, numbers, strict=True)
    ]


def retest_pair(
    first: Path, later: Path, parcellation: Parcellation, subset: str, tolerance_mm: float = 1.0
) -> list[Score]:
    """Compare the label maps of two scans of one person, both written by cadiff.

    The later brain (``desc-preproc_T1w``) is registered rigidly to the first and its labels are
    carried along.  Volumes are those on the scans' own grids.
    """
    r, p = (load_own(path, parcellation) for path in (first, later))
    motion = rigid(load_volume(_preprocessed(first)), load_volume(_preprocessed(later)))
    moved = Volume(carry(p, motion, r.grid), r.grid)
    scores = score_classes(
        scan_of(later), moved, r, parcellation, subset, tolerance_mm, scan_of(first)
    )
    volumes = _volumes_mm3(p, parcellation.subset(subset)).tolist()
    return [replace(s, volume_mm3=mm3) for s, mm3 in zip(scores, volumes, strict=True)]


def carry(labels: Volume, motion: np.ndarray, grid: Grid) -> np.ndarray:
    """Class map ``labels`` on ``grid``, whose points ``motion`` (4, 4; RAS mm) takes to theirs."""
    here = Grid(labels.grid.shape, np.linalg.solve(motion, labels.grid.affine))
    return resample_labels(Volume(labels.data, here), grid).data


def pair_up(prediction: Path, reference: Path) -> Pairs:
    """Two files, or the dseg images of two folders whose names share sub, ses, run, acq...

    Raises ``MissingInputError`` if nothing is shared, ``DataError`` for two references of a scan.
    """
    for path in (prediction, reference):
        if not path.exists():
            raise MissingInputError(f"no such file or folder: {path}", "check the path")
    if prediction.is_dir() != reference.is_dir():
        file, folder = sorted((prediction, reference), key=Path.is_dir)
        raise UsageError(f"{file} is a file, {folder} a folder", "give two files or two folders")
    if prediction.is_file():
        return Pairs(((prediction, reference),))
    ours = label_maps(prediction, apart_from=reference, prefer_ours=True)
    theirs = label_maps(reference, apart_from=prediction)
    shared = [scan for scan in ours if scan in theirs]
    if not shared:
        raise MissingInputError(
            f"no dseg of {prediction} ({listed(ours)}) has a partner in {reference}"
            f" ({listed(theirs)})",
            "names must share sub, ses, run, acq",
        )
    return Pairs(
        tuple((ours[scan], theirs[scan]) for scan in shared),
        tuple(scan for scan in ours if scan not in theirs),
        tuple(scan for scan in theirs if scan not in ours),
    )


def retest_pairs(derivatives: Path) -> list[tuple[Path, Path]]:
    """(first, later) label maps of each subject with two or more scans: all against the first.

    Raises ``MissingInputError`` if there are none.
    """
    if not derivatives.is_dir():
        raise MissingInputError(f"no folder {derivatives}", "give a folder written by cadiff")
    subjects: dict[str, list[Path]] = {}
    for scan, path in label_maps(derivatives, prefer_ours=True).items():
        if _is_own(path):
            subjects.setdefault(scan.split("_")[0], []).append(path)
    pairs = [(first, later) for first, *others in subjects.values() for later in others]
    if not pairs:
        raise MissingInputError(
            f"{len(subjects)} subjects with label maps of cadiff's in {derivatives}, none with two"
            " scans",
            "segment two sessions of a person into one folder",
        )
    return pairs


def label_maps(
    folder: Path, *, apart_from: Path | None = None, prefer_ours: bool = False
) -> dict[str, Path]:
    """The ``*_dseg`` image of each scan in ``folder``, but for a folder ``apart_from`` within it.

    Where a scan has several, ``prefer_ours`` takes cadiff's on the scan's own grid.  Raises
    ``DataError`` if more than one is left.
    """
    skipped = [p for p in (apart_from,) if p and folder.resolve() in p.resolve().parents]
    found: dict[str, list[Path]] = {}
    pattern = "[!.]*_dseg.*"
    # ``**`` passes links to folders by: people may be linked into a folder of their own.
    for path in sorted({*folder.rglob(pattern), *folder.glob(f"*/**/{pattern}")}):
        within = any(path.resolve().is_relative_to(p.resolve()) for p in skipped)
        if path.name.endswith(IMAGE_SUFFIXES) and path.is_file() and not within:
            found.setdefault(scan_of(path), []).append(path)
    for scan, paths in found.items():
        if prefer_ours:
            own = [p for p in paths if _is_own(p) and "_space-" not in p.name]
            found[scan] = paths = own or paths
        if len(paths) > 1:
            raise DataError(
                f"{folder} has {len(paths)} label maps of {scan}:"
                f" {listed(str(p.relative_to(folder)) for p in paths)}",
                "leave one, or give two files",
            )
    return {scan: path for scan, (path,) in found.items()}


def scan_of(path: Path) -> str:
    """Entities of the scan that a dseg was drawn on: ``sub-1_seg-x_dseg.nii.gz`` -> ``sub-1``.

    ``run-01`` and ``run-1`` are one.
    """
    image = path.with_name(stem(path).removesuffix("_dseg") + ".nii")
    parts = (part.split("-", 1) for part in source_entities(image).split("_"))
    return "_".join(
        f"run-{int(part[1])}" if part[0] == "run" and part[1].isdigit() else "-".join(part)
        for part in parts
        if part[0] not in ("seg", "atlas", "label")
    )


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names in one line, the first ``most`` of them in full."""
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return (", ".join(every[:most]) or "none") + more


def summarise(scores: Iterable[Score], key: str, measures: Sequence[str]) -> list[Summary]:
    """One ``Summary`` for each ``key`` (``scan`` or ``structure``), in the order of the scores."""
    groups: dict[str, list[Score]] = {}
    for score in scores:
        groups.setdefault(getattr(score, key), []).append(score)
    return [
        Summary(
            name,
            sum(not s.absent for s in group),
            sum(s.missed for s in group),
            sum(s.absent for s in group),
            {m: _mean(getattr(s, m) for s in group) for m in measures},
            {m: _sd(getattr(s, m) for s in group) for m in measures},
        )
        for name, group in groups.items()
    ]


def overall(scans: Sequence[Summary]) -> Summary:
    """The headline: mean and standard deviation over scans of each scan's foreground mean."""
    return Summary(
        "foreground mean",
        len(scans),
        sum(s.missed for s in scans),
        sum(s.absent for s in scans),
        {m: _mean(s.mean[m] for s in scans) for m in scans[0].mean},
        {m: _sd(s.mean[m] for s in scans) for m in scans[0].mean},
    )


def write_scores(path: Path, scores: Iterable[Score], measures: Sequence[str]) -> None:
    """TSV with one row per scan and structure."""
    columns = ("scan", "reference", "structure", "volume_mm3", "reference_mm3", *measures)
    write_tsv(path, columns, (_rounded(getattr(s, c) for c in columns) for s in scores))


def write_summaries(path: Path, key: str, summaries: Sequence[Summary]) -> None:
    """TSV with one row per summary: counts, then mean and SD of each measure."""
    measures = list(summaries[0].mean)
    spread = [f"{m}_{kind}" for m in measures for kind in ("mean", "sd")]
    rows = (
        [s.name, s.n, s.missed, s.absent, *(x for m in measures for x in (s.mean[m], s.sd[m]))]
        for s in summaries
    )
    write_tsv(path, (key, "n", "missed", "absent", *spread), map(_rounded, rows))


def _volumes_mm3(labels: Volume, classes: Sequence[int]) -> np.ndarray:
    """(len(classes),) voxel counts times voxel volume."""
    counts = np.bincount(labels.data.ravel(), minlength=max(classes) + 1)
    return counts[list(classes)] * labels.grid.voxel_volume_mm3


def _is_own(path: Path) -> bool:
    """Whether cadiff drew a label map, by its name."""
    return bool(OURS.search(path.name)) and named_parcellation(path) is not None


def _preprocessed(dseg: Path) -> Path:
    return dseg.with_name(OURS.sub("_desc-preproc_T1w.", dseg.name))


def _finite(values: Iterable[float]) -> list[float]:
    return [v for v in values if math.isfinite(v)]


def _mean(values: Iterable[float]) -> float:
    known = _finite(values)
    return statistics.fmean(known) if known else math.nan


def _sd(values: Iterable[float]) -> float:
    known = _finite(values)
    return statistics.stdev(known) if len(known) > 1 else math.nan


def _rounded(row: Iterable[object]) -> list[object]:
    return [f"{x:.4f}" if isinstance(x, float) and math.isfinite(x) else x for x in row]
