"""``cadiff retest``: how much labels and volumes change between scans of one person."""

from pathlib import Path

import click

from cadiff_cli.cli.options import PATH, show_warnings
from cadiff_cli.cli.scores import RETEST, check_tables, report, score_options, scores_of


@click.command(name="retest")
@click.argument("derivatives", type=PATH)
@score_options(RETEST)
def command(
    derivatives: Path, labels: str | None, tolerance: float, out: Path | None, overwrite: bool
) -> int:
    """Measure test-retest reproducibility in a folder DERIVATIVES that cadiff wrote.

    Uses every subject with two or more scans whose names differ in ses and run alone: each later T1
    image, in the order of names and numbers, is registered rigidly to the first, and its labels are
    carried with it.

    The volume difference is unsigned, in per cent of the mean of both volumes on
    the scans' own grids; Dice, NSD and HD95 are measured after registration, and its interpolation
    lowers them a little.  The headline is the mean over structures (without background), then over
    scans.  Pairs that cannot be scored are named and left out; the exit code is then 1.
    """
    from cadiff_cli.evaluation.pairing import retest_pairs
    from cadiff_cli.evaluation.scores import chosen_maps, retest_pair, scored_in

    show_warnings()

    finer, wanted = chosen_maps(labels)
    pairs = retest_pairs(derivatives, finer)
    parcellation, subset = scored_in((path for pair in pairs for path in pair), wanted)
    check_tables(out, RETEST, overwrite=overwrite)
    scores, code = scores_of(
        pairs, lambda first, later: retest_pair(first, later, parcellation, subset, tolerance)
    )
    report(scores, out, RETEST, tolerance)
    return code
