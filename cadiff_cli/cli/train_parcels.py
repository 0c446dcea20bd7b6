"""``cadiff train-parcels``: from labelled scans to a network that names parcels."""

from pathlib import Path
from typing import Any

import click

from cadiff_cli.cli.options import PATH, not_empty, show_times
from cadiff_cli.cli.train import HOLD_OUT, INIT, prepared_in, run_options


@click.command(name="train-parcels")
@click.argument("config", metavar="CONFIG", callback=not_empty)
@click.argument("dataset", type=PATH)
@HOLD_OUT
@INIT
@run_options
def command(
    config: str,
    dataset: Path,
    hold_out: tuple[str, ...],
    init: str | None,
    run: Path,
    cache: Path | None,
    device: str,
    workers: int,
    max_minutes: float,
    **options: Any,
) -> None:
    """Train the network that names the parcels of the cortex, as CONFIG says.

    CONFIG is a TOML file or parcels, which is shipped; options override it.  DATASET is as for
    cadiff train; its labels hold parcels.  The network sees structures and the distance field,
    never an image.  The same command continues after a kill.
    """
    from cadiff_cli.device import pick_device
    from cadiff_cli.io import models
    from cadiff_cli.io.bids.labelled import labelled_scans
    from cadiff_cli.labels.parcellation import load_parcellation
    from cadiff_cli.labels.schemes import load_scheme
    from cadiff_cli.nets.models import ParcelModel
    from cadiff_cli.training.parcels.config import Training
    from cadiff_cli.training.parcels.run import check_people, train_parcels
    from cadiff_cli.training.segmenter.data import prepare_scans
    from cadiff_cli.training.settings import load

    show_times()
    # Whatever is wrong with a name is said before hours of preparation, not after.
    pick_device(device)
    training = load(config, Training(), **options)
    model = models.load(ParcelModel, init) if init else None
    parcellation = load_parcellation(training.parcellation)
    mapping = load_scheme(training.labels, parcellation)
    scans = labelled_scans(dataset)
    check_people({scan.subject for scan in scans}, hold_out, model, parcellation)
    folder = prepared_in(run, cache)
    samples = prepare_scans(scans, training.templates, parcellation, mapping, folder)
    path = train_parcels(
        samples,
        run,
        training.train,
        parcellation,
        init=model,
        net_config=training.net,
        hold_out=hold_out,
        device=device,
        workers=workers,
        max_minutes=max_minutes,
    )
    click.echo(path)
