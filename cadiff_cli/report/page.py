"""The page of one scan: one file that loads nothing from elsewhere."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cadiff_cli.errors import OutputError, in_a_line
from cadiff_cli.io.bids.layout import Derivatives, Finished, finished_result
from cadiff_cli.io.bids.names import page_path
from cadiff_cli.io.files import write_text
from cadiff_cli.io.volumes import TOTALS, Row
from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.products import Person, Result
from cadiff_cli.quality.age_ranges import ranges_of
from cadiff_cli.quality.judgement import Judgement, fitting, judge
from cadiff_cli.quality.ranges import asymmetry, load_ranges
from cadiff_cli.report import figures
from cadiff_cli.report.case import Case, Views, read_case, read_views, views_of
from cadiff_cli.report.charts import charts
from cadiff_cli.report.methods import methods, references
from cadiff_cli.report.render import render_page
from cadiff_cli.report.viewer import viewer_data

log = logging.getLogger(__name__)

MARK = '<meta name="generator" content="cadiff '
"""The beginning of a page by which cadiff knows its own."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """What a page draws of a result: ``groups`` of slices, and the ``viewer``'s volumes.

    ``skull`` says that the inner skull is drawn, too.  ``template`` and ``registration`` name what
    the field is from; empty without a registration.
    """

    whole: bool
    skull: bool
    groups: tuple[list[figures.Plane], ...]
    viewer: Mapping[str, Any]
    template: str
    registration: str
    notes: tuple[str, ...]


def draw(views: Views, parcellation: Parcellation, finer: Parcellation | None) -> Pictures:
    """The pictures of a page; ``finer`` is the parcellation of the parcels, if there are any."""
    first = views.registered
    return Pictures(
        views.whole,
        views.intracranial is not None,
        (
            figures.structures(views, parcellation),
            figures.head(views),
            figures.registration(views),
            figures.coordinates(views),
            figures.uncertainty(views),
            figures.parcels(views, finer),
        ),
        viewer_data(views, parcellation),
        first.template.name if first else "",
        first.transform.kind if first else "",
        views.notes,
    )


def draw_result(result: Result) -> Pictures:
    """The pictures of a result that this process has made, before it has files."""
    finer = result.finer.segmentation.parcellation if result.finer else None
    return draw(views_of(result), result.segmentation.parcellation, finer)


def report_scan(
    out: Path,
    t1: Path,
    *,
    person: Person | None = None,
    wanted: bool = True,
    drawn: Callable[[], Pictures] | None = None,
) -> str:
    """Write the page of a segmented scan; return the error's text, or an empty text.

    What is known of the ``person`` now counts, else what the sidecar tells.
    ``drawn`` gives its pictures, or raises what went wrong; without it they are drawn from files.
    If writing fails, or without ``wanted``, the results are kept and an outdated page is deleted.
    """
    place = Derivatives(out, t1)
    try:
        if wanted and (result := finished_result(place)) is not None:
            now = result.of(person) if person else result
            write_page(out, now, t1, drawn() if drawn else None)
        else:
            remove(page_path(out, place.stem))
        return ""
    except Exception as error:
        text = f"no page was written ({in_a_line(error)})"
        log.warning(text)
        log.debug("the report failed", exc_info=True)
        with suppress(OutputError, OSError):
            remove(page_path(out, place.stem))
        return text


def remove(path: Path) -> None:
    """Delete an outdated page of cadiff's.  Raises ``OutputError`` for another program's page."""
    refuse_foreign_page(path)
    path.unlink(missing_ok=True)


def write_page(
    out: Path, result: Finished, scans: Path | None = None, pictures: Pictures | None = None
) -> Path:
    """Write ``OUT/sub-X[_ses-Y]....html`` from the result's files, and ``pictures`` if given.

    ``scans`` is the scan, or a folder that holds it.  Raises ``CadiffError`` if the result cannot
    be read, or if another program's page has this name.
    """
    begun = time.perf_counter()
    path, parcellation = page_path(out, result.entities), result.parcellation
    refuse_foreign_page(path)
    result.provenance.check()
    case = read_case(result)
    if pictures is None:
        finer = result.finer.parcellation if result.finer else None
        pictures = draw(read_views(out, result, scans), parcellation, finer)
    ranges = fitting(load_ranges(parcellation), case.rows)
    by_age = ranges_of(out, result.provenance.ranges, parcellation)
    judgement = judge(result, case.rows, case.quality, parcellation, ranges, by_age)
    paragraphs, cited = methods([result])
    text = render_page(
        "scan.html.j2",
        title=result.entities,
        case=case,
        judgement=judgement,
        made=result.provenance,
        pictures=pictures,
        parcels=parcel_table(case),
        volumes=volume_table(case, judgement, parcellation),
        charts=charts(judgement, by_age, case.rows, parcellation) if by_age else [],
        aggregates=[
            (row.name, row.mm3 / 1000)
            for row in case.rows
            if row.name in TOTALS and row.mm3 is not None
        ],
        measured_on=ranges.people,
        ranges_people=by_age.people if by_age else "",
        settings=plain(result.provenance.settings),
        paragraphs=paragraphs,
        references=references(cited),
    )
    write_text(path, text)
    log.info("page %s in %.1f s", path.name, time.perf_counter() - begun)
    return path


def refuse_foreign_page(path: Path) -> None:
    """Raise ``OutputError`` if ``path`` is a page that cadiff did not write."""
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise OutputError(f"{path} is another program's page", "choose another output folder")


def volume_table(
    case: Case, judgement: Judgement, parcellation: Parcellation
) -> list[dict[str, Any]]:
    """One line per structure, left and right together."""
    rows = {row.name: row for row in case.rows}
    sides = {side.left: side for side in judgement.sides}
    lines = []
    for members in parcellation.joined:
        side = sides.get(members[0].name)
        lines.append(
            {
                "name": members[0].title,
                "members": [
                    {
                        "code": one.code,
                        "name": one.name,
                        "color": one.color,
                        **_measured(rows.get(one.name)),
                        "doubtful": one.name in judgement.doubtful,
                        "percent": judgement.percent_brain.get(one.name),
                        "range": judgement.plausible.get(one.name),
                        "percentile": judgement.percentiles.get(one.name),
                        "odd": one.name in judgement.implausible or one.name in judgement.missing,
                    }
                    for one in members
                ],
                "asymmetry": side.percent if side else None,
                "odd": side is not None and not side.plausible,
            }
        )
    return lines


def parcel_table(case: Case) -> list[dict[str, Any]]:
    """One line per parcel of the cortex, left and right together; empty without parcels."""
    if (finer := case.result.finer) is None:
        return []
    rows = {row.code: _measured(row) for row in case.finer_rows}
    lines = []
    for pair in finer.parcellation.pairs:
        if not pair[0].is_part:
            continue
        left, right = (rows.get(s.code, _measured(None)) for s in pair)
        percent = asymmetry(left["ml"] or 0.0, right["ml"] or 0.0)
        lines.append(
            {
                "name": pair[0].title,
                "color": pair[0].color,
                "members": [left, right],
                "asymmetry": percent,
            }
        )
    return lines


def _measured(row: Row | None) -> dict[str, float | None]:
    """A structure's numbers in the volume table, volumes in ml."""
    if row is None:
        return {"ml": 0.0, "sd_ml": None, "dice": None}
    ml, sd_ml = (None if mm3 is None else mm3 / 1000 for mm3 in (row.mm3, row.sd_mm3))
    return {"ml": ml, "sd_ml": sd_ml, "dice": row.expected_dice}


def plain(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (dotted name, value) lines."""
    lines: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += plain(value, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", value))
    return lines
