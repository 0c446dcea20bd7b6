"""Means of scores over scans and structures, and the tables that hold them."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cadiff_cli.evaluation.scores import Score
from cadiff_cli.io.files import read_tsv, write_tsv


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
    """Write a TSV with one row per scan and structure."""
    columns = ("scan", "reference", "structure", "volume_mm3", "reference_mm3", *measures)
    write_tsv(path, columns, (_rounded(getattr(s, c) for c in columns) for s in scores))


def read_scores(path: Path) -> list[Score]:
    """What ``write_scores`` wrote with all measures of a ``Score``, rounded as it is there."""

    def number(cell: str) -> float:
        return math.nan if cell == "n/a" else float(cell)

    scores = []
    names = ("dice", "nsd", "hd95_mm", "volume_mm3", "reference_mm3")
    for row in read_tsv(path):
        score = Score(
            row["scan"], row["reference"], row["structure"], *(number(row[n]) for n in names)
        )
        missed = math.isnan(score.hd95_mm) and not score.absent
        scores.append(replace(score, hd95_mm=math.inf) if missed else score)
    return scores


def write_summaries(path: Path, key: str, summaries: Sequence[Summary]) -> None:
    """Write a TSV with one row per summary: counts, then mean and SD of each measure."""
    measures = list(summaries[0].mean)
    spread = [f"{m}_{kind}" for m in measures for kind in ("mean", "sd")]
    rows = (
        [s.name, s.n, s.missed, s.absent, *(x for m in measures for x in (s.mean[m], s.sd[m]))]
        for s in summaries
    )
    write_tsv(path, (key, "n", "missed", "absent", *spread), map(_rounded, rows))


def _finite(values: Iterable[float]) -> list[float]:
    return [v for v in values if math.isfinite(v)]


def _mean(values: Iterable[float]) -> float:
    numbers = _finite(values)
    return statistics.fmean(numbers) if numbers else math.nan


def _sd(values: Iterable[float]) -> float:
    numbers = _finite(values)
    return statistics.stdev(numbers) if len(numbers) > 1 else math.nan


def _rounded(row: Iterable[object]) -> list[object]:
    return [f"{x:.4f}" if isinstance(x, float) and math.isfinite(x) else x for x in row]
