"""``cadiff train``: from a folder of labelled scans to weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from cadiff_cli.cli.options import (
    PATH,
    SEED,
    Number,
    not_empty,
    show_times,
    stacked,
    without_prefix,
)

INIT = click.option(
    "--init",
    metavar="MODEL",
    callback=not_empty,
    help="Begin with these weights (released name or file).",
)
run_options = stacked(
    click.option("-o", "--run", type=PATH, required=True, help="Folder of this run."),
    click.option("--cache", type=PATH, help="Prepared images [default: RUN/cache]."),
    click.option(
        "--steps", type=click.IntRange(1), help="Number of steps, instead of the config's."
    ),
    click.option(
        "--decay",
        type=click.IntRange(1),
        help="Number of last steps in which the rate falls to 0 [default: the config's; with"
        " --steps, at most the same share].",
    ),
    click.option(
        "--rate",
        type=Number(0, min_open=True),
        help="Learning rate, instead of the config's.",
    ),
    click.option(
        "--batch", type=click.IntRange(1), help="Examples a step, instead of the config's."
    ),
    click.option("--seed", type=SEED, help="Random seed, instead of the config's."),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="auto (CUDA if present, else cpu), cpu, cuda, cuda:1...",
    ),
    click.option(
        "--workers",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Processes that draw examples, beside the main one.",
    ),
    click.option(
        "--max-minutes",
        type=Number(0),
        default=float("inf"),
        help="Stop after this many minutes; the same command goes on.",
    ),
)
"""Options that every training has."""
training_options = stacked(
    click.option(
        "--parcellation",
        help="Label set to learn, instead of the config's: cadiff40, nmm138, or a TSV.",
    ),
    click.option(
        "--labels",
        help="Ids of DATASET's label maps, instead of the config's: neuromorphometrics, freesurfer,"
        " dlmuse, synthseg, cadiff, or a TSV (source, index).",
    ),
    click.option(
        "--template",
        "--atlas",
        "templates",
        multiple=True,
        help="Templates whose fields are trained on, or a stripped scan (repeatable).",
    ),
    click.option(
        "--synthetic",
        type=Number(0, 1),
        help="Share of patches with resampled contrast, instead of the config's.",
    ),
    run_options,
)
"""Options that ``train``, ``crossval`` and ``ablate`` share."""
HOLD_OUT = click.option(
    "--hold-out",
    multiple=True,
    callback=without_prefix,
    help="Subject label left out (repeatable).",
)
also_options = stacked(
    click.option(
        "--also",
        type=(PATH, str),
        multiple=True,
        metavar="DATASET LABELS",
        help="Scans whose labels are trusted less: a share of the patches, no vote in the prior."
        " LABELS: as --labels.",
    ),
    click.option(
        "--also-share",
        type=Number(0, 1),
        help="Share of the patches that --also gets [default: 0.3].",
    ),
    INIT,
)
"""Options that ``train`` and ``ablate`` share."""
FOLDS_OPTION = click.option(
    "--folds",
    type=click.IntRange(2),
    default=3,
    show_default=True,
    help="Number of folds over the people.",
)


def also_settings(also: Sequence[Any], also_share: float | None) -> dict[str, Any]:
    """The setting that ``--also-share`` gives; ``UsageError`` if there is nothing to share with."""
    from cadiff_cli.errors import UsageError

    if also_share is None:
        return {}
    if not also:
        raise UsageError("--also-share has nothing to share with", "give --also as well")
    return {"also_share": also_share}


def prepared_in(run: Path, cache: Path | None) -> Path:
    """The folder of prepared images: ``cache``, or one in ``run``; raises if it cannot be written.

    Raises if finished weights in ``run`` would be lost, too.  Called when all names are known to be
    right: then nothing is left by a mistake.
    """
    from cadiff_cli.io.files import check_writable
    from cadiff_cli.training.session import check_room

    check_room(run)
    for folder in (run, cache or run):
        check_writable(folder)
    return cache or run / "cache"


@click.command(name="train")
@click.argument("config", metavar="CONFIG", callback=not_empty)
@click.argument("dataset", type=PATH)
@HOLD_OUT
@also_options
@click.option(
    "--recount-prior", is_flag=True, help="Count the label prior over DATASET, not --init's."
)
@click.option(
    "--validate-minutes",
    type=Number(0),
    default=15.0,
    show_default=True,
    help="How often a held-out scan is segmented.",
)
@training_options
def command(
    config: str,
    dataset: Path,
    hold_out: tuple[str, ...],
    also: tuple[tuple[Path, str], ...],
    also_share: float | None,
    init: str | None,
    recount_prior: bool,
    validate_minutes: float,
    run: Path,
    cache: Path | None,
    device: str,
    workers: int,
    max_minutes: float,
    **settings: Any,
) -> None:
    """Train as CONFIG says on DATASET, a BIDS-like folder of T1w images with dseg label maps.

    CONFIG is a TOML file or the name of a shipped one: cadiff; finish, a last part that begins from
    --init; small, for comparisons on a CPU; synth, for painted scans and any contrast; spad,
    spad-targets, spad-borders, spad-time; scaled; paper; or a row of the ablation (unet, diffusion,
    dual, label, collaborative, consistency, consistency-dice, taca).  Options override it.

    Scans are prepared once by the same code that inference runs.  The same command continues after
    a kill, and goes on further with more --steps.
    """
    from cadiff_cli.device import pick_device
    from cadiff_cli.errors import UsageError
    from cadiff_cli.io import models
    from cadiff_cli.labels.parcellation import load_parcellation
    from cadiff_cli.nets.models import Model
    from cadiff_cli.training.segmenter.config import load
    from cadiff_cli.training.segmenter.data import labelled_datasets, prepare_datasets
    from cadiff_cli.training.segmenter.run import check_people, train

    show_times()
    settings |= also_settings(also, also_share)
    if recount_prior and not init:
        raise UsageError("--recount-prior is for --init", "without it the prior is counted anyway")
    training = load(config, **settings)
    # Whatever is wrong with a name is said before hours of preparation, not after.
    model = models.load(Model, init) if init else None
    pick_device(device)
    parcellation = load_parcellation(training.parcellation)
    datasets = labelled_datasets(dataset, training.labels, also, parcellation)
    subjects, *others = ({scan.subject for scan in scans} for scans, _ in datasets)
    check_people(subjects, set().union(*others), hold_out, model, training.net, parcellation)
    folder = prepared_in(run, cache)
    samples, less_trusted = prepare_datasets(datasets, training.templates, parcellation, folder)
    path = train(
        samples,
        run,
        training.train,
        parcellation=parcellation,
        also=less_trusted,
        init=model,
        recount_prior=recount_prior,
        hold_out=hold_out,
        net_config=training.net,
        device=device,
        workers=workers,
        validate_minutes=validate_minutes,
        max_minutes=max_minutes,
    )
    click.echo(path)
