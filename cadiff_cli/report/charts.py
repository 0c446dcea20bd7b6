"""Curves of age: where a person stands among people of the same sex, as SVG paths."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cadiff_cli.io.volumes import BRAIN, Row
from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.products import Percentile
from cadiff_cli.quality.age_ranges import VENTRICLES, AgeRanges, sizes_in
from cadiff_cli.quality.judgement import Judgement

SHOWN = (
    *(BRAIN, "Cerebral-Cortex", "Cerebral-White-Matter", VENTRICLES),
    *("Hippocampus", "Amygdala", "Thalamus", "Cerebellum-Cortex"),
)
"""Sizes that a page shows, where they have a curve."""
LINES = (5.0, 25.0, 50.0, 75.0, 95.0)
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 240.0, 150.0, 34.0, 18.0, 6.0
POINTS = 60
MM3_PER_LITRE = 1e6


@dataclass(frozen=True)
class Chart:
    """One size over age: ``outer`` and ``inner`` bands (5 to 95, 25 to 75 %) and the ``middle``.

    Paths and the person's point (``x``, ``y``) are in a box of ``WIDTH`` by ``HEIGHT``.  ``ticks``
    are (place, text) on the vertical axis, ``years`` on the horizontal one.
    """

    name: str
    unit: str
    value: float
    percentile: Percentile
    outer: str
    inner: str
    middle: str
    x: float
    y: float
    ticks: tuple[tuple[float, str], ...]
    years: tuple[tuple[float, str], ...]


def charts(
    judgement: Judgement, ranges: AgeRanges, rows: Sequence[Row], parcellation: Parcellation
) -> list[Chart]:
    """A chart of each size in ``SHOWN`` that has a percentile."""
    shown = [name for name in SHOWN if name in judgement.percentiles]
    if not shown:  # then some structure may have no volume, and the others no share of the brain
        return []
    volumes = {row.name: row.mm3 for row in rows if row.code is not None and row.mm3 is not None}
    measured = sizes_in(ranges, volumes, parcellation)
    return [
        _chart(name, measured[name], judgement.percentiles[name], judgement, ranges)
        for name in shown
    ]


def _chart(
    name: str, size: float, percentile: Percentile, judgement: Judgement, ranges: AgeRanges
) -> Chart:
    scale, unit = (MM3_PER_LITRE, "l") if name == BRAIN else (1.0, "% of brain")
    ages = np.linspace(*ranges.ages, POINTS)
    lines = ranges.lines(name, ages, judgement.person, LINES) / scale
    value = size / scale
    low, high = min(lines.min(), value), max(lines.max(), value)
    low, high = max(low - 0.05 * (high - low), 0.0), high + 0.05 * (high - low)

    def across(age: float) -> float:
        first, last = ranges.ages
        return float(round(LEFT + (WIDTH - LEFT - 6) * (age - first) / (last - first), 1))

    def up(y: float) -> float:
        return float(round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (y - low) / (high - low), 1))

    def path(line: np.ndarray, back: np.ndarray | None = None) -> str:
        points = [f"{across(a)} {up(y)}" for a, y in zip(ages, line, strict=True)]
        if back is not None:
            points += [f"{across(a)} {up(y)}" for a, y in zip(ages[::-1], back[::-1], strict=True)]
        return f"M{'L'.join(points)}" + ("Z" if back is not None else "")

    return Chart(
        name.replace("-", " "),
        unit,
        value,
        percentile,
        path(lines[0], lines[4]),
        path(lines[1], lines[3]),
        path(lines[2]),
        across(judgement.person.age_years or 0.0),
        up(value),
        tuple((up(y), f"{y:.3g}") for y in _ticks(low, high, 4)),
        tuple((across(a), f"{a:g}") for a in _ticks(*ranges.ages, 5)),
    )


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two others, at most ``most``.

    >>> _ticks(18, 95, 5)
    [20.0, 40.0, 60.0, 80.0]
    """
    rough = (high - low) / most
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
    ticks = step * np.arange(np.ceil(low / step), np.floor(high / step) + 1)
    return [float(round(x, 10)) for x in ticks]
