"""Print and write scores, for evaluate, retest and crossval."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cadiff_cli.cli.options import PATH, F, not_empty, stacked
from cadiff_cli.config import TOLERANCE_MM

if TYPE_CHECKING:
    from cadiff_cli.evaluation.scores import Score

EVALUATION, RETEST = "evaluation", "retest"
"""Names of the tables."""
COLUMNS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    EVALUATION: {
        "dice": ("Dice", ".4f"),
        "nsd": ("NSD", ".4f"),
        "hd95_mm": ("HD95 mm", ".2f"),
        "volume_error_percent": ("volume error %", ".2f"),
        "abs_volume_error_percent": ("without sign", ".2f"),
    },
    RETEST: {
        "volume_difference_percent": ("volume difference %", ".2f"),
        "dice": ("Dice", ".4f"),
        "nsd": ("NSD", ".4f"),
        "hd95_mm": ("HD95 mm", ".2f"),
    },
}
"""Title and number format of each measure, by the name of the tables."""


def score_options(name: str) -> Callable[[F], F]:
    """Options of a command that writes the tables called ``name``."""
    return stacked(
        click.option(
            "--labels",
            callback=not_empty,
            help="Structures to compare: all, or a subset of the label maps' parcellation or of"
            " cadiff40 [malc27; all where no structure has a parent in cadiff40]; nmm138 or"
            " parcels: the label maps of --parcellation nmm138.",
        ),
        click.option(
            "--tolerance", default=TOLERANCE_MM, show_default=True, help="NSD tolerance in mm."
        ),
        click.option(
            "-o",
            "--out",
            type=PATH,
            help=f"Also write {name}.tsv (a row per scan and structure), {name}_structures.tsv and"
            f" {name}_scans.tsv (mean and SD) into this folder.",
        ),
        click.option("--overwrite", is_flag=True, help="Replace these tables if they are there."),
    )


def tables(out: Path, name: str) -> list[Path]:
    """Paths of the tables of scores, of structures' means and of scans' means."""
    return [out / f"{name}{part}.tsv" for part in ("", "_structures", "_scans")]


def check_tables(out: Path | None, name: str, *, overwrite: bool) -> None:
    """Check before the long work that the tables can be written without losing any."""
    from cadiff_cli.errors import OutputError
    from cadiff_cli.io.files import check_writable, refuse_existing

    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file", "give a folder with -o")
    refuse_existing(*tables(out, name), overwrite=overwrite)
    check_writable(out)


def scores_of(
    pairs: Sequence[tuple[Path, Path]], score: "Callable[[Path, Path], Iterable[Score]]"
) -> "tuple[list[Score], int]":
    """Score all pairs; return the scores, and the exit code: 1 if some cannot be scored.

    A warning names each of these.  Raises the first error if none can be scored.  A terminal shows
    a progress bar.
    """
    from rich.console import Console
    from rich.progress import track

    from cadiff_cli.errors import DataError, MissingInputError
    from cadiff_cli.runner.logs import warning

    console = Console(stderr=True)
    found, failed = list["Score"](), list[DataError | MissingInputError]()
    for pair in track(pairs, console=console, transient=True, disable=not console.is_terminal):
        try:
            found += score(*pair)
        except (DataError, MissingInputError) as error:
            failed.append(error)
            if len(pairs) > 1:
                click.echo(warning(f"not scored: {error}"), err=True)
    if not found and failed:
        raise failed[0]
    return found, 1 if failed else 0


def report(
    scores: "Sequence[Score]",
    out: Path | None,
    name: str,
    tolerance_mm: float = TOLERANCE_MM,
) -> None:
    """Print the headline and the means of structures and scans; write the tables into ``out``."""
    from rich import box
    from rich.table import Table

    from cadiff_cli.cli.console import console
    from cadiff_cli.evaluation.tables import overall, summarise, write_scores, write_summaries

    columns = COLUMNS[name]
    structures, scans = (summarise(scores, key, list(columns)) for key in ("structure", "scan"))
    headline = overall(scans)
    if out:
        paths = tables(out, name)
        write_scores(paths[0], scores, list(columns))
        write_summaries(paths[1], "structure", structures)
        write_summaries(paths[2], "scan", scans)
    caption = f"NSD at {tolerance_mm:g} mm"
    if headline.absent:
        caption += f"; left out: {headline.absent} pairs of scan and structure, on neither side"
    shown = Table(box=box.SIMPLE, padding=0, show_edge=False, caption=caption)
    # Numbers are always whole: on a narrow screen names are folded, a file has no width.
    shown.add_column(overflow="fold")
    for title in (*(title for title, _ in columns.values()), "n", "missed"):
        shown.add_column(title, justify="right", no_wrap=True)
    for rows in ([headline], structures, scans):
        for row in rows:
            cells = (
                "n/a" if math.isnan(row.mean[m]) else f"{row.mean[m]:{form}}"
                for m, (_, form) in columns.items()
            )
            shown.add_row(row.name, *cells, str(row.n), str(row.missed))
        shown.add_section()
    console().print(shown)
