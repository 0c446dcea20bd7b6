"""``cadiff crossval``: the paper's protocol, k-fold cross-validation over people."""

from pathlib import Path
from typing import Any

import click

from cadiff_cli.cli.options import PATH, Number, not_empty, show_times
from cadiff_cli.cli.scores import EVALUATION, report
from cadiff_cli.cli.train import FOLDS_OPTION, prepared_in, training_options


@click.command(name="crossval")
@click.argument("config", metavar="CONFIG", callback=not_empty)
@click.argument("dataset", type=PATH)
@FOLDS_OPTION
@click.option("--fold", multiple=True, type=int, help="Run only this fold, from 1 (repeatable).")
@click.option(
    "--fraction",
    type=Number(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of steps and decay, to try the protocol out.",
)
@training_options
def command(
    config: str,
    dataset: Path,
    folds: int,
    fold: tuple[int, ...],
    fraction: float,
    run: Path,
    cache: Path | None,
    device: str,
    workers: int,
    max_minutes: float,
    **settings: Any,
) -> None:
    """Cross-validate CONFIG on DATASET: train on some people, score the others, in turn.

    CONFIG is what `cadiff train` takes.

    Repeat scans stay with their person.  RUN gets a folder per fold and the tables of `cadiff
    evaluate`; with --fold the tables lie in the fold's own folder, and the command without it
    makes the joint ones.  The same command continues after a kill, or after --max-minutes, which
    end it with exit code 1: a fold that is not trained to its end is not scored.
    """
    import time

    from cadiff_cli.device import pick_device
    from cadiff_cli.io.bids.labelled import labelled_scans
    from cadiff_cli.labels.parcellation import load_parcellation
    from cadiff_cli.labels.schemes import load_scheme
    from cadiff_cli.training.crossval import check_folds, cross_validate, shortened
    from cadiff_cli.training.crossval import folds as split
    from cadiff_cli.training.segmenter.config import load
    from cadiff_cli.training.segmenter.data import prepare_scans

    show_times()
    training = load(config, **settings)
    # Whatever is wrong with a name is said before hours of preparation, not after.
    parcellation = load_parcellation(training.parcellation)
    mapping, scans = load_scheme(training.labels, parcellation), labelled_scans(dataset)
    split([scan.subject for scan in scans], folds)
    check_folds(fold, folds)
    pick_device(device)
    folder = prepared_in(run, cache)
    samples = prepare_scans(scans, training.templates, parcellation, mapping, folder)
    until = time.monotonic() + 60 * max_minutes
    for only in [[k] for k in fold] or [[]]:
        scores = cross_validate(
            samples,
            run,
            shortened(training.train, fraction),
            parcellation=parcellation,
            n_folds=folds,
            only=only,
            net_config=training.net,
            device=device,
            workers=workers,
            max_minutes=(until - time.monotonic()) / 60,
        )
        report(scores, run.joinpath(*(f"fold-{k}" for k in only)), EVALUATION)
