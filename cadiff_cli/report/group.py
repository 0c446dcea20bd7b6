"""The page of a group: a sortable table, every structure's distribution, outliers, failures."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from cadiff_cli.errors import OutputError, in_a_line
from cadiff_cli.io.bids.names import page_path
from cadiff_cli.io.files import write_text
from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.report.page import claim, remove, render
from cadiff_cli.report.qc import (
    FAR,
    FEWEST,
    MASK_LOG_SD,
    SCORE_LOG_SD,
    Judgement,
    robust_z,
)
from cadiff_cli.report.ranges import Ranges, load_ranges

if TYPE_CHECKING:
    from cadiff_cli.runner.group import Group

PATH = "group.html"
SCORE = "registration score"


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


def outliers(judged: Mapping[str, Judgement], ranges: Ranges) -> dict[str, list[str]]:
    """Why a scan stands out from the group; scans that do not are absent.

    Shares of the brain, mask volume and registration score (``robust_z``); a group's spread counts
    as no smaller than that of known people.  Fewer than five scans have no outliers.
    """
    found: dict[str, list[str]] = {}
    for what, unit, values, least in _measures(judged, ranges):
        for scan, z in robust_z(values, least).items():
            if abs(z) > FAR and not (what == SCORE and z > 0):
                middle = median(value for value in values.values() if value)
                text = f"{what} {values[scan]:.3g}{unit}, median {middle:.3g}"
                found.setdefault(scan, []).append(f"{text} ({z:+.1f} SD)")
    return found


def _measures(
    judged: Mapping[str, Judgement], ranges: Ranges
) -> Iterator[tuple[str, str, dict[str, float], float]]:
    """What a group is compared by: name, unit, value by scan, least standard deviation (log)."""
    for name in dict.fromkeys(name for j in judged.values() for name in j.percent_brain):
        yield name, " %", _shares(judged, name), ranges.log_sd(name)
    yield "brain mask", " l", {scan: j.mask_litres for scan, j in judged.items()}, MASK_LOG_SD
    scores = {scan: j.registration_score or 0.0 for scan, j in judged.items()}
    yield SCORE, "", scores, SCORE_LOG_SD


def _shares(judged: Mapping[str, Judgement], name: str) -> dict[str, float]:
    return {scan: j.percent_brain[name] for scan, j in judged.items() if name in j.percent_brain}


def strips(
    judged: Mapping[str, Judgement], parcellation: Parcellation, ranges: Ranges
) -> list[Strip]:
    """Distribution of every structure but vessels."""
    found = []
    for s in parcellation.structures:
        values = _shares(judged, s.name) if s.is_tissue else {}
        if not values:
            continue
        low, high = min(values.values()), max(values.values())
        z = robust_z(values, ranges.log_sd(s.name))

        def place(value: float, low: float = low, high: float = high) -> float:
            return 50.0 if high == low else 3 + 94 * (value - low) / (high - low)

        points = tuple(
            Point(scan, value, place(value), abs(z.get(scan, 0.0)) > FAR)
            for scan, value in values.items()
        )
        middle = median(values.values())
        found.append(Strip(s.name, s.color, low, middle, high, place(middle), points))
    return found


def report_group(
    out: Path, group: "Group", parcellation: Parcellation, *, wanted: bool = True
) -> str:
    """``group.html`` of what the group table holds; returns what went wrong, if anything.

    It is for looking at: whatever happens to it, the table stands.  If none is ``wanted``, an
    earlier one, which shows other results, goes.
    """
    try:
        if wanted:
            write_group_page(out, group, parcellation)
        else:
            remove(out / PATH)
        return ""
    except Exception as error:
        with suppress(OutputError, OSError):
            remove(out / PATH)
        return f"no group page was written ({in_a_line(error)})"


def write_group_page(out: Path, group: "Group", parcellation: Parcellation) -> Path:
    """``group.html``: rows of the group table, and missing scans with their errors."""
    path = out / PATH
    claim(path)
    ranges = load_ranges()
    judged = group.judged
    far = outliers(judged, ranges)
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
            for row in group.rows
        ],
        strips=strips(judged, parcellation, ranges),
        missing=group.missing,
        enough=len(judged) >= FEWEST,
        fewest=FEWEST,
        far=FAR,
    )
    write_text(path, text)
    return path
