"""``cadiff retest``: how much labels and volumes change between scans of one person."""

from pathlib import Path

import click

from cadiff_cli.cli.options import PATH, filled, show_warnings

COLUMNS = {
    "volume_difference_percent": ("volume difference %", ".2f"),
    "dice": ("Dice", ".4f"),
    "nsd": ("NSD", ".4f"),
    "hd95_mm": ("HD95 mm", ".2f"),
}
"""Title and number format of each measure."""


@click.command(name="retest")
@click.argument("derivatives", type=PATH)
@click.option(
    "--labels",
    callback=filled,
    help="Structures to compare: all, or a subset of the label maps' parcellation or of cadiff40"
    " [malc27; all where no structure has a parent in cadiff40]; nmm138 or parcels: the label maps"
    " of --parcellation nmm138.",
)
@click.option("--tolerance", default=1.0, show_default=True, help="NSD tolerance in mm.")
@click.option(
    "-o",
    "--out",
    type=PATH,
    help="Also write retest.tsv (a row per later scan and structure), retest_structures.tsv and"
    " retest_scans.tsv (mean and SD) into this folder.",
)
@click.option("--overwrite", is_flag=True, help="Replace these tables if they are there.")
def command(
    derivatives: Path, labels: str | None, tolerance: float, out: Path | None, overwrite: bool
) -> int:
    """Measure test-retest reproducibility in a folder DERIVATIVES that cadiff wrote.

    Uses every subject with two or more scans (sessions or runs): each later T1 image, in the order
    of names and numbers, is registered rigidly to the first, and its labels are carried with it.

    The volume difference is unsigned, in per cent of the mean of both volumes on
    the scans' own grids; Dice, NSD and HD95 are measured after registration, and its interpolation
    lowers them a little.  The headline is the mean over structures (without background), then over
    scans.  Pairs that cannot be scored are named and left out; the exit code is then 1.
    """
    from cadiff_cli.cli.scores import check_tables, report, scores_of
    from cadiff_cli.evaluation.pairing import retest_pairs
    from cadiff_cli.evaluation.scores import chosen_maps, retest_pair, scored_in

    show_warnings()

    finer, wanted = chosen_maps(labels)
    pairs = retest_pairs(derivatives, finer)
    parcellation, subset = scored_in((path for pair in pairs for path in pair), wanted)
    check_tables(out, "retest", overwrite=overwrite)
    scores, code = scores_of(
        pairs, lambda first, later: retest_pair(first, later, parcellation, subset, tolerance)
    )
    report(scores, out, "retest", COLUMNS, tolerance)
    return code
