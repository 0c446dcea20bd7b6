"""``cadiff evaluate``: Dice, surface Dice, HD95 and volumes against references."""

from collections.abc import Mapping
from pathlib import Path

import click

from cadiff_cli.cli.options import PATH, show_warnings
from cadiff_cli.cli.scores import EVALUATION, check_tables, report, score_options, scores_of


@click.command(name="evaluate")
@click.argument("prediction", type=PATH)
@click.argument("reference", type=PATH)
@click.option(
    "--reference-labels",
    default="neuromorphometrics",
    show_default=True,
    help="Ids of REFERENCE: neuromorphometrics, freesurfer, dlmuse, synthseg, cadiff, or a TSV.",
)
@score_options(EVALUATION)
def command(
    prediction: Path,
    reference: Path,
    labels: str | None,
    reference_labels: str,
    tolerance: float,
    out: Path | None,
    overwrite: bool,
) -> int:
    """Score PREDICTION against REFERENCE: two label maps, or two folders of them.

    In folders (cadiff's output against a BIDS-like tree), *_dseg images are paired by sub, ses,
    run, acq...  Both must have the same grid.

    The headline is the foreground mean: over structures (without background), then over scans.  A
    structure missing on one side counts Dice 0 and NSD 0, and is left out of the mean HD95.  Left
    out of all means are structures missing on both sides, and structures without an id in the
    references' scheme.

    Pairs that cannot be scored are named and left out; the exit code is then 1.
    """
    from cadiff_cli.errors import first_few
    from cadiff_cli.evaluation.pairing import pair_up
    from cadiff_cli.evaluation.scores import chosen_maps, score_pair, scored_in
    from cadiff_cli.io.bids.tables import parcellation_of
    from cadiff_cli.labels.schemes import OWN, load_scheme
    from cadiff_cli.runner.logs import warning

    show_warnings()
    finer, wanted = chosen_maps(labels)
    pairs = pair_up(prediction, reference, finer, both_ours=reference_labels == OWN)
    parcellation, subset = scored_in((p for p, _ in pairs.files), wanted)
    scheme = load_scheme(reference_labels, parcellation)

    def mapping(path: Path) -> Mapping[int, int]:
        """Map a reference's ids; one that cadiff wrote may have a finer parcellation."""
        if reference_labels == OWN:
            return parcellation_of(path).mapping_to(parcellation)
        return scheme

    for names, place in (
        (pairs.without_reference, reference),
        (pairs.without_prediction, prediction),
    ):
        if names:
            share = f"{len(names)} of {len(names) + len(pairs.files)} scans"
            text = f"{share} have no label map in {place}: {first_few([*names], 20)}"
            click.echo(warning(text), err=True)
    check_tables(out, EVALUATION, overwrite=overwrite)
    scores, code = scores_of(
        pairs.files, lambda p, r: score_pair(p, r, parcellation, subset, mapping(r), tolerance)
    )
    report(scores, out, EVALUATION, tolerance)
    return code
