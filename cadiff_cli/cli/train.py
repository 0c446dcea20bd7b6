"""``cadiff train``: from a folder of labelled scans to weights."""

from pathlib import Path

import click


@click.command(name="train", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option(
    "-o", "--run", type=click.Path(path_type=Path), required=True, help="Folder of this run."
)
@click.option(
    "--labels",
    default="neuromorphometrics",
    show_default=True,
    help="neuromorphometrics, cadiff, or a TSV with columns source and index.",
)
@click.option("--cache", type=click.Path(path_type=Path), help="Prepared scans [RUN/cache].")
@click.option(
    "--atlas",
    multiple=True,
    default=("MNIColin27", "MNI152NLin2009aSym"),
    show_default=True,
    help="Templates whose fields are trained on (repeatable).",
)
@click.option("--hold-out", multiple=True, help="Subject label left out (repeatable).")
@click.option("--steps", type=click.IntRange(1), default=3000, show_default=True)
@click.option(
    "--decay",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Last steps, rate to 0.",
)
@click.option("--rate", type=float, default=1e-3, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--max-minutes", type=float, default=float("inf"), help="Stop (and export) after this."
)
def command(
    dataset: Path,
    run: Path,
    labels: str,
    cache: Path | None,
    atlas: tuple[str, ...],
    hold_out: tuple[str, ...],
    steps: int,
    decay: int,
    rate: float,
    seed: int,
    max_minutes: float,
) -> None:
    """Train on DATASET, a BIDS-like folder of T1w images with dseg label maps.

    Scans are prepared once by the same code that inference runs.  The same command continues after
    a kill, and goes on further with more --steps.
    """
    import logging

    from cadiff_cli.labels import load_table
    from cadiff_cli.training.loop import TrainConfig
    from cadiff_cli.training.run import label_mapping, prepare_dataset, train

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    samples = prepare_dataset(
        dataset, label_mapping(labels, load_table()), atlas, cache or run / "cache"
    )
    config = TrainConfig(steps=steps, decay=decay, rate=rate, seed=seed)
    click.echo(train(samples, run, config, hold_out=hold_out, max_minutes=max_minutes))
