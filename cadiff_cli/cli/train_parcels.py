"""``cadiff train-parcels``: from labelled scans to a network that names parcels."""

from pathlib import Path
from typing import Any

import click

from cadiff_cli.cli.options import PATH
from cadiff_cli.cli.train import run_options


@click.command(name="train-parcels")
@click.argument("config", metavar="CONFIG")
@click.argument("dataset", type=PATH)
@click.option("--hold-out", multiple=True, help="Subject label left out (repeatable).")
@click.option("--init", metavar="MODEL", help="Begin with these weights (nmm138, or a file).")
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
    import logging

    from cadiff_cli.device import pick_device
    from cadiff_cli.io import models
    from cadiff_cli.io.bids.labelled import labelled_scans
    from cadiff_cli.io.files import check_writable
    from cadiff_cli.labels.parcellation import load_parcellation
    from cadiff_cli.labels.schemes import load_scheme
    from cadiff_cli.nets.models import ParcelModel
    from cadiff_cli.training.parcels.config import load
    from cadiff_cli.training.parcels.run import check_people, train_parcels
    from cadiff_cli.training.segmenter.data import prepare_scans

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    # Whatever is wrong with a name is said before hours of preparation, not after.
    pick_device(device)
    training = load(config, **options)
    model = models.load(ParcelModel, init) if init else None
    parcellation = load_parcellation(training.parcellation)
    mapping = load_scheme(training.labels, parcellation)
    scans = labelled_scans(dataset)
    held = tuple(name.removeprefix("sub-") for name in hold_out)
    check_people({scan.subject for scan in scans}, held, model, parcellation)
    for folder in (run, cache or run):
        check_writable(folder)
    samples = prepare_scans(
        scans, training.templates, parcellation, mapping, cache or run / "cache"
    )
    path = train_parcels(
        samples,
        run,
        training.train,
        parcellation,
        init=model,
        net_config=training.net,
        hold_out=held,
        device=device,
        workers=workers,
        max_minutes=max_minutes,
    )
    click.echo(path)
