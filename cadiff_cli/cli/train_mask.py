"""``cadiff train-mask``: from label maps and heads to a brain-mask network."""

from pathlib import Path
from typing import Any

import click

from cadiff_cli.cli.options import PATH, not_empty, show_times
from cadiff_cli.cli.train import INIT, prepared_in, run_options


@click.command(name="train-mask")
@click.argument("config", metavar="CONFIG", callback=not_empty)
@click.option(
    "--label-maps",
    multiple=True,
    type=PATH,
    help="Folder of whole-head label maps (FreeSurfer codes, 5xx around the brain; repeatable).",
)
@click.option(
    "--heads",
    multiple=True,
    type=PATH,
    help="BIDS-like folder of whole heads with a brain mask or dseg (repeatable).",
)
@click.option(
    "--hold-out-source",
    multiple=True,
    help="Name of a --heads folder not to train on (repeatable).",
)
@INIT
@run_options
def command(
    config: str,
    run: Path,
    label_maps: tuple[Path, ...],
    heads: tuple[Path, ...],
    hold_out_source: tuple[str, ...],
    init: str | None,
    cache: Path | None,
    device: str,
    workers: int,
    max_minutes: float,
    **options: Any,
) -> None:
    """Train the network that finds the brain in a whole head, as CONFIG says.

    CONFIG is a TOML file or brain-mask, which is shipped; options override it.

    Label maps become images of every contrast; real heads join them.  The same command continues
    after a kill.  Held-out sources are scored at the end.
    """
    from cadiff_cli.device import pick_device
    from cadiff_cli.io import models
    from cadiff_cli.nets.models import BrainModel
    from cadiff_cli.training.brain_mask.config import Training
    from cadiff_cli.training.brain_mask.data import prepare_heads
    from cadiff_cli.training.brain_mask.run import check_settings, check_sources, train_mask
    from cadiff_cli.training.settings import load

    show_times()
    if not (label_maps or heads):
        raise click.UsageError("give --label-maps, --heads, or both")
    # Whatever is wrong with a name is said before hours of preparation, not after.
    pick_device(device)
    training = load(config, Training(), **options)
    model = models.load(BrainModel, init) if init else None
    check_sources([path.name for path in (*label_maps, *heads)], hold_out_source, model)
    check_settings(training.train, training.net, model)
    folder = prepared_in(run, cache)
    prepared = prepare_heads(label_maps, heads, folder)
    path = train_mask(
        prepared,
        run,
        training.train,
        init=model,
        net_config=training.net,
        hold_out=hold_out_source,
        device=device,
        workers=workers,
        max_minutes=max_minutes,
    )
    click.echo(path)
