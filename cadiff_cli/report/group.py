"""The page of a group: a sortable table, every structure's distribution, outliers, failures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cadiff_cli.io.layout import Finished, page_path
from cadiff_cli.io.text import write_text
from cadiff_cli.labels import LabelTable
from cadiff_cli.report.case import mask_quality, read_rows
from cadiff_cli.report.page import claim, render
from cadiff_cli.report.qc import FAR, FEWEST, Judgement, judge, robust_z
from cadiff_cli.report.ranges import load_ranges

PATH = "group.html"


@dataclass(frozen=True)
class Point:
    """One scan's share of one structure; ``at`` is its place on the strip, 0 to 100."""

    name: str
    percent: float
    at: float
    odd: bool


@dataclass(frozen=True)
class Strip:
    """One structure over all scans, in per cent of the brain."""

    name: str
    color: str
    low: float
    middle: float
    high: float
    middle_at: float
    points: tuple[Point, ...]


def judgement(result: Finished, table: LabelTable) -> Judgement:
    """What can be said of a scan by itself."""
    return judge(result, read_rows(result), mask_quality(result), table, load_ranges())


def outliers(judged: Mapping[str, Judgement]) -> dict[str, list[str]]:
    """Why a scan stands out from the group; scans that do not are absent.

    Shares of the brain, mask volume and registration score, by median and median absolute
    deviation; groups of fewer than five scans have no outliers.
    """
    found: dict[str, list[str]] = {}
    if len(judged) < FEWEST:
        return found
    names = next(iter(judged.values())).percent_brain
    measures = [
        (name, "%", {scan: j.percent_brain[name] for scan, j in judged.items()}) for name in names
    ]
    measures.append(("brain mask", "l", {scan: j.mask_litres for scan, j in judged.items()}))
    scores = {s: j.registration_score for s, j in judged.items() if j.registration_score}
    measures.append(("registration score", "", scores))
    for what, unit, values in measures:
        if len(values) < FEWEST:
            continue
        middle = median(values.values())
        for (scan, value), z in zip(values.items(), robust_z(list(values.values())), strict=True):
            if abs(z) > FAR and not (what == "registration score" and z > 0):
                text = f"{what} {value:.3g} {unit}, median {middle:.3g}".replace(" ,", ",")
                found.setdefault(scan, []).append(f"{text} ({z:+.1f} SD)")
    return found


def strips(judged: Mapping[str, Judgement], table: LabelTable) -> list[Strip]:
    """Distribution of every structure but vessels."""
    found = []
    for s in table.structures:
        if not s.is_tissue or not judged:
            continue
        values = [j.percent_brain[s.name] for j in judged.values()]
        low, high = min(values), max(values)

        def place(value: float, low: float = low, high: float = high) -> float:
            return 50.0 if high == low else 3 + 94 * (value - low) / (high - low)

        points = tuple(
            Point(name, value, place(value), abs(z) > FAR)
            for name, value, z in zip(judged, values, robust_z(values), strict=True)
        )
        middle = median(values)
        found.append(Strip(s.name, s.color, low, middle, high, place(middle), points))
    return found


def write_group_page(
    out: Path,
    rows: Sequence[Mapping[str, Any]],
    judged: Mapping[str, Judgement],
    missing: Mapping[str, str],
    table: LabelTable,
) -> Path:
    """``group.html``: ``rows`` of the group table, and ``missing`` scans with their errors."""
    path = out / PATH
    claim(path)
    far = outliers(judged)
    text = render(
        "group.html.j2",
        title="Group",
        rows=[
            {
                **row,
                "page": page_path(out, row["scan"]).name
                if page_path(out, row["scan"]).exists()
                else "",
                "judged": judged[row["scan"]],
                "far": far.get(row["scan"], []),
            }
            for row in rows
        ],
        strips=strips(judged, table),
        missing=dict(missing),
        enough=len(judged) >= FEWEST,
        fewest=FEWEST,
        far=FAR,
    )
    write_text(path, text)
    return path
