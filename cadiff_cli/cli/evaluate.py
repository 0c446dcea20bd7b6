"""``cadiff evaluate``: Dice, surface Dice, HD95 and volumes against references."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from cadiff_cli.evaluation import Score

COLUMNS = {
    "dice": ("Dice", ".4f"),
    "nsd": ("NSD", ".4f"),
    "hd95_mm": ("HD95 mm", ".2f"),
    "volume_error_percent": ("volume error %", ".2f"),
    "abs_volume_error_percent": ("without sign", ".2f"),
}
"""Title and number format of each measure."""


@click.command(name="evaluate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("prediction", type=click.Path(path_type=Path))
@click.argument("reference", type=click.Path(path_type=Path))
@click.option(
    "--labels",
    default="malc27",
    show_default=True,
    help="Structures to score: all, or a subset of the predictions' parcellation or of cadiff40.",
)
@click.option(
    "--reference-labels",
    default="neuromorphometrics",
    show_default=True,
    help="Ids of REFERENCE: neuromorphometrics, freesurfer, dlmuse, synthseg, cadiff, or a TSV.",
)
@click.option("--tolerance", default=1.0, show_default=True, help="NSD tolerance in mm.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Also write evaluation.tsv (a row per scan and structure), evaluation_structures.tsv and"
    " evaluation_scans.tsv (mean and SD) into this folder.",
)
@click.option("--overwrite", is_flag=True, help="Replace these tables if they are there.")
def command(
    prediction: Path,
    reference: Path,
    labels: str,
    reference_labels: str,
    tolerance: float,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Score PREDICTION against REFERENCE: two label maps, or two folders of them.

    In folders (cadiff's output against a BIDS-like tree), *_dseg images are paired by sub, ses,
    run, acq...  Both must lie on one grid.

    The headline is the foreground mean: over structures (background is not included), then over
    scans.  A structure missing on one side counts Dice 0 and NSD 0, and is left out of the mean
    HD95; missing on both sides, it is left out altogether, and so is what no id of the references
    means.
    """
    import logging

    from cadiff_cli.evaluation import listed, pair_up, score_pair, scored_in
    from cadiff_cli.io.bids.tables import parcellation_of
    from cadiff_cli.labels.schemes import OWN, load_scheme
    from cadiff_cli.runner.logs import ON_SCREEN, warning

    logging.basicConfig(level=logging.WARNING, format=ON_SCREEN)
    pairs = pair_up(prediction, reference)
    parcellation = scored_in((p for p, _ in pairs.files), labels)
    scheme = load_scheme(reference_labels, parcellation)

    def mapping(path: Path) -> Mapping[int, int]:
        """Ids of a reference; one that cadiff wrote may be of a finer parcellation."""
        if reference_labels == OWN:
            return parcellation_of(path).mapping_to(parcellation)
        return scheme

    for names, place in (
        (pairs.without_reference, reference),
        (pairs.without_prediction, prediction),
    ):
        if names:
            share = f"{len(names)} of {len(names) + len(pairs.files)} scans"
            text = f"{share} have no label map in {place}: {listed(names)}"
            click.echo(warning(text), err=True)
    claim(out, "evaluation", overwrite=overwrite)
    scores = [
        score
        for p, r in progress(pairs.files)
        for score in score_pair(p, r, parcellation, labels, mapping(r), tolerance)
    ]
    report(scores, out, tolerance_mm=tolerance)


def tables(out: Path, name: str) -> list[Path]:
    """Where scores and the means of structures and scans are written."""
    return [out / f"{name}{part}.tsv" for part in ("", "_structures", "_scans")]


def claim(out: Path | None, name: str, *, overwrite: bool) -> None:
    """Make sure, before anything costly, that the tables can be written and nothing is lost."""
    from cadiff_cli.errors import OutputError
    from cadiff_cli.io.files import check_writable

    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file", "give a folder with -o")
    if not overwrite and (there := [path for path in tables(out, name) if path.exists()]):
        raise OutputError(f"{there[0]} is there already", "use --overwrite, or another folder")
    check_writable(out)


def progress(pairs: Sequence[tuple[Path, Path]]) -> Iterable[tuple[Path, Path]]:
    """The pairs, with a bar if someone is watching."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(pairs, console=console, transient=True, disable=not console.is_terminal)


def report(
    scores: "Sequence[Score]",
    out: Path | None,
    *,
    name: str = "evaluation",
    columns: Mapping[str, tuple[str, str]] = COLUMNS,
    tolerance_mm: float = 1.0,
) -> None:
    """Print the headline and the means of structures and scans; write the tables into ``out``."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from cadiff_cli.evaluation import overall, summarise, write_scores, write_summaries

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
    shown.add_column(no_wrap=True)
    for title in (*(title for title, _ in columns.values()), "n", "missed"):
        shown.add_column(title, justify="right")
    for rows in ([headline], structures, scans):
        for row in rows:
            numbers = (f"{row.mean[m]:{form}}" for m, (_, form) in columns.items())
            cells = ("n/a" if number == "nan" else number for number in numbers)
            shown.add_row(row.name, *cells, str(row.n), str(row.missed))
        shown.add_section()
    Console().print(shown)
