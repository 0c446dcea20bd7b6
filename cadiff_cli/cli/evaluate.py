"""``cadiff evaluate``: Dice, surface Dice, HD95 and volumes against references."""

from collections.abc import Mapping
from pathlib import Path

import click

from cadiff_cli.cli.options import PATH, filled, show_warnings

COLUMNS = {
    "dice": ("Dice", ".4f"),
    "nsd": ("NSD", ".4f"),
    "hd95_mm": ("HD95 mm", ".2f"),
    "volume_error_percent": ("volume error %", ".2f"),
    "abs_volume_error_percent": ("without sign", ".2f"),
}
"""Title and number format of each measure."""


@click.command(name="evaluate")
@click.argument("prediction", type=PATH)
@click.argument("reference", type=PATH)
@click.option(
    "--labels",
    callback=filled,
    help="Structures to score: all, or a subset of the predictions' parcellation or of cadiff40"
    " [malc27; all where no structure has a parent in cadiff40]; nmm138 or parcels: the label maps"
    " of --parcellation nmm138.",
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
    type=PATH,
    help="Also write evaluation.tsv (a row per scan and structure), evaluation_structures.tsv and"
    " evaluation_scans.tsv (mean and SD) into this folder.",
)
@click.option("--overwrite", is_flag=True, help="Replace these tables if they are there.")
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
    from cadiff_cli.cli.scores import check_tables, report, scores_of
    from cadiff_cli.errors import first_few
    from cadiff_cli.evaluation.pairing import pair_up
    from cadiff_cli.evaluation.scores import chosen_maps, score_pair, scored_in
    from cadiff_cli.io.bids.tables import parcellation_of
    from cadiff_cli.labels.schemes import OWN, load_scheme
    from cadiff_cli.runner.logs import warning

    show_warnings()
    finer, wanted = chosen_maps(labels)
    pairs = pair_up(prediction, reference, finer)
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
    check_tables(out, "evaluation", overwrite=overwrite)
    scores, code = scores_of(
        pairs.files, lambda p, r: score_pair(p, r, parcellation, subset, mapping(r), tolerance)
    )
    report(scores, out, "evaluation", COLUMNS, tolerance)
    return code
