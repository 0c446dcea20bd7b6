"""``cadiff evaluate``: Dice and surface Dice of segmentations against references."""

from pathlib import Path

import click


@click.command(name="evaluate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("prediction", type=click.Path(path_type=Path))
@click.argument("reference", type=click.Path(path_type=Path))
@click.option(
    "--labels",
    type=click.Choice(["malc27", "all"]),
    default="malc27",
    show_default=True,
    help="Structures to score.",
)
@click.option(
    "--reference-labels",
    default="neuromorphometrics",
    show_default=True,
    help="Ids of REFERENCE: neuromorphometrics, cadiff, or a TSV with source and index.",
)
@click.option("--tolerance", default=1.0, show_default=True, help="NSD tolerance in mm.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Also write this TSV.")
def command(
    prediction: Path,
    reference: Path,
    labels: str,
    reference_labels: str,
    tolerance: float,
    out: Path | None,
) -> None:
    """Score PREDICTION (a dseg or a folder of them) against REFERENCE.

    The mean is over foreground structures only.  A structure missing on one side counts 0; missing
    on both sides, it is left out.
    """
    from rich.console import Console
    from rich.table import Table

    from cadiff_cli.evaluation import mean_over, pair_up, score_pair, write_scores
    from cadiff_cli.labels import load_table
    from cadiff_cli.training.run import label_mapping

    table = load_table()
    mapping = label_mapping(reference_labels, table)
    scores = [
        score
        for p, r in pair_up(prediction, reference)
        for score in score_pair(p, r, table, labels, mapping, tolerance)
    ]
    if out:
        write_scores(out, scores)
    shown = Table("", "Dice", f"NSD@{tolerance:g} mm")
    for key in ("structure", "scan"):
        dice, nsd = (mean_over(scores, key, measure) for measure in ("dice", "nsd"))
        for name in dice:
            shown.add_row(name, f"{dice[name]:.4f}", f"{nsd[name]:.4f}")
        shown.add_section()
    shown.add_row("mean over scans", *(f"{sum(m.values()) / len(m):.4f}" for m in (dice, nsd)))
    Console().print(shown)
