"""The page of a group: a sortable table, every structure's distribution, outliers, failures."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from cadiff_cli.errors import OutputError, in_a_line
from cadiff_cli.io.bids.names import page_path
from cadiff_cli.io.files import write_text
from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.quality.group import FAR, FEWEST, Group, outliers, robust_z, shares
from cadiff_cli.quality.judgement import Judgement
from cadiff_cli.quality.ranges import Ranges, load_ranges
from cadiff_cli.report.page import refuse_foreign_page, remove
from cadiff_cli.report.render import render_page

GROUP_PAGE = "group.html"


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


def strips(
    judged: Mapping[str, Judgement], parcellation: Parcellation, ranges: Ranges
) -> list[Strip]:
    """Distribution of every structure but vessels."""
    lines = []
    for s in parcellation.structures:
        values = shares(judged, s.name) if s.is_tissue else {}
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
        lines.append(Strip(s.name, s.color, low, middle, high, place(middle), points))
    return lines


def report_group(out: Path, group: Group, *, wanted: bool = True) -> str:
    """Write ``group.html`` from the group table; return the error's text, or an empty text.

    If writing fails, or without ``wanted``, the table is kept and an outdated page is deleted.
    """
    try:
        if wanted:
            write_group_page(out, group)
        else:
            remove(out / GROUP_PAGE)
        return ""
    except Exception as error:
        with suppress(OutputError, OSError):
            remove(out / GROUP_PAGE)
        return f"no group page was written ({in_a_line(error)})"


def write_group_page(out: Path, group: Group) -> Path:
    """Write ``group.html``: rows of the group table, and missing scans with their errors."""
    path = out / GROUP_PAGE
    refuse_foreign_page(path)
    ranges = load_ranges(group.parcellation)
    judged = group.judged
    far = outliers(judged, ranges)
    text = render_page(
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
        strips=strips(judged, group.parcellation, ranges),
        missing=group.missing,
        enough=len(judged) >= FEWEST,
        fewest=FEWEST,
        far=FAR,
    )
    write_text(path, text)
    return path
