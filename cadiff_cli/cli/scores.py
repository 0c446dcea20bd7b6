"""Print and write scores, for evaluate, retest and crossval."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cadiff_cli.evaluation.scores import Score

FILE_COLUMNS = 250
"""Wide enough for every table that does not go to a screen."""


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
    import click
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
    columns: Mapping[str, tuple[str, str]],
    tolerance_mm: float = 1.0,
) -> None:
    """Print the headline and the means of structures and scans; write the tables into ``out``.

    ``columns`` are the title and number format of each measure.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from cadiff_cli.evaluation.tables import overall, summarise, write_scores, write_summaries

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
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_COLUMNS)
    console.print(shown)
