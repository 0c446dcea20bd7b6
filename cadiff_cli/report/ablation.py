"""Tables of an ablation in Markdown, ours beside the paper's, and Dice over sampling steps."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cadiff_cli.evaluation.scores import Score
from cadiff_cli.evaluation.tables import overall, summarise
from cadiff_cli.io.files import write_text
from cadiff_cli.report.render import render
from cadiff_cli.training.ablation import ALSO, DATASET, MEASURES, NetworkScores, Plan, Row, Table

GROUPS = {DATASET: "Held-out people", ALSO: "Held-out people of --also"}
SCALES = {"dice": 100.0, "nsd": 100.0, "hd95_mm": 1.0, "missed": 1.0}
"""Factors of the figures in tables: per cent, millimetres, structures."""
WIDTH, HEIGHT, MARGIN = 480, 320, 56
COLOURS = ("#1c7ed6", "#e8590c", "#2b8a3e", "#862e9c", "#495057")


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds (NaN for a single one) of one figure."""

    mean: float
    sd: float

    @staticmethod
    def over(values: Sequence[float]) -> "Spread":
        """Of the finite ``values``."""
        finite = [value for value in values if math.isfinite(value)]
        mean = statistics.fmean(finite) if finite else math.nan
        return Spread(mean, statistics.stdev(finite) if len(finite) > 1 else math.nan)

    def __str__(self) -> str:
        """``89.62 ± 0.10``, without the deviation of a single seed."""
        if math.isnan(self.mean):
            return "n/a"
        return f"{self.mean:.2f}" + ("" if math.isnan(self.sd) else f" ± {self.sd:.2f}")


@dataclass(frozen=True)
class Line:
    """A line of a table: a row with so many sampling steps, over ``seeds`` finished trainings."""

    title: str
    steps: int
    seeds: int
    spreads: Mapping[str, Spread]
    paper: tuple[float, float] | None


@dataclass(frozen=True)
class StepsLine:
    """Dice over sampling steps as SVG: ``points`` of a polyline, ``bars`` of one SD (x, y1, y2)."""

    title: str
    colour: str
    points: Sequence[tuple[float, float]]
    bars: Sequence[tuple[float, float, float]]


def write_tables(
    run: Path, plan: Plan, results: Sequence[NetworkScores], budget: int
) -> list[Path]:
    """Write ``table-NAME.md`` for each table, and ``figure-NAME.svg`` where steps are compared.

    ``budget`` is the number of training steps of every row.  Rows without a finished seed (all
    folds of it) are ``n/a``.
    """
    paths = []
    for name, table in plan.tables.items():
        every = {title: lines(plan, table, results, kind) for kind, title in GROUPS.items()}
        groups = {title: ls for title, ls in every.items() if any(line.seeds for line in ls)}
        scans = {
            title: len({s.scan for r in results for s in r.scores if s.reference == kind})
            for kind, title in GROUPS.items()
        }
        figure = f"figure-{name}.svg" if len(table.steps) > 1 else ""
        text = render(
            "ablation.md.j2",
            name=name,
            table=table,
            groups=groups,
            scans=scans,
            figure=figure,
            plan=plan,
            budget=budget,
            measures=list(SCALES),
        )
        paths.append(run / f"table-{name}.md")
        write_text(paths[-1], text)
        if figure and (drawn := curves(table, next(iter(groups.values()), []))):
            paths.append(run / figure)
            write_text(paths[-1], drawn)
    return paths


def lines(plan: Plan, table: Table, results: Sequence[NetworkScores], kind: str) -> list[Line]:
    """The lines of a table for the scans of one kind (``DATASET`` or ``ALSO``)."""
    found = {
        (r.network, r.steps): scores
        for r in results
        if (scores := [s for s in r.scores if s.reference == kind])
    }

    def figures(row: Row, steps: int, seed: int) -> dict[str, float] | None:
        keys = [(plan.network(row, seed, fold), steps) for fold in range(len(plan.splits))]
        if not all(key in found for key in keys):
            return None
        return _figures([score for key in keys for score in found[key]])

    out = []
    for row in table.rows:
        for steps in table.steps:
            done = [f for seed in plan.seeds if (f := figures(row, steps, seed))]
            spreads = {name: Spread.over([f[name] for f in done]) for name in SCALES}
            out.append(Line(row.title, steps, len(done), spreads, row.paper))
    return out


def _figures(scores: Sequence[Score]) -> dict[str, float]:
    """Means over scans of the means over structures; the number of missed structures."""
    mean = overall(summarise(scores, "scan", MEASURES))
    values = {**mean.mean, "missed": float(mean.missed)}
    return {name: SCALES[name] * value for name, value in values.items()}


def curves(table: Table, found: Sequence[Line]) -> str:
    """An SVG of Dice over sampling steps, a curve for each row; empty without figures."""
    dice = [line.spreads["dice"] for line in found if line.seeds]
    if not dice:
        return ""
    ends = [d.mean + sign * (0 if math.isnan(d.sd) else d.sd) for d in dice for sign in (-1, 1)]
    room = max(max(ends) - min(ends), 0.1) / 10
    low, high = min(ends) - room, max(ends) + room
    most = max(table.steps)

    def x(steps: int) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * (steps - 1) / max(most - 1, 1)

    def y(value: float) -> float:
        return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - low) / (high - low)

    drawn = []
    for number, row in enumerate(table.rows):
        mine = [line for line in found if line.title == row.title and line.seeds]
        spreads = [(x(line.steps), line.spreads["dice"]) for line in mine]
        drawn.append(
            StepsLine(
                row.title,
                COLOURS[number % len(COLOURS)],
                [(at, y(d.mean)) for at, d in spreads],
                [
                    (at, y(d.mean - d.sd), y(d.mean + d.sd))
                    for at, d in spreads
                    if not math.isnan(d.sd)
                ],
            )
        )
    ticks = [low + (high - low) * k / 4 for k in range(5)]
    return render(
        "steps.svg.j2",
        width=WIDTH,
        height=HEIGHT,
        margin=MARGIN,
        title=table.title,
        curves=drawn,
        columns=[(x(steps), steps) for steps in table.steps],
        rows=[(y(tick), f"{tick:.2f}") for tick in ticks],
    )
