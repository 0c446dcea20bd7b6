"""``cadiff atlas train``: from people with ages to the weights of conditional atlases."""

from pathlib import Path
from typing import Any

import click

from cadiff_cli.cli.options import PATH, not_empty, show_times
from cadiff_cli.cli.train import prepared_in, run_options


@click.command(name="train")
@click.argument("people", nargs=-1, required=True, metavar="PEOPLE...", type=PATH)
@click.argument("config", metavar="CONFIG", callback=not_empty)
@run_options
def command(
    people: tuple[Path, ...],
    config: str,
    run: Path,
    cache: Path | None,
    device: str,
    workers: int,
    max_minutes: float,
    **options: Any,
) -> None:
    """Train a conditional atlas on PEOPLE as CONFIG says.

    PEOPLE are BIDS-like folders of T1w scans, whole heads or stripped brains, with a
    participants.tsv (age, sex). CONFIG is a TOML file or the name of a shipped one: atlas, or
    atlas-autoencoder, which the paper compares with. Options override it.

    One scan of each person is prepared once by the same code that inference runs. Its structures
    are those of a label map beside it, sub-X_seg-SCHEME_dseg.nii.gz, where SCHEME is a known one
    (dlmuse, freesurfer, neuromorphometrics ...), or of the released network. A share of the
    people is left out, and compared with the base template, kernel regression and the atlas at the
    end. The same command continues after a kill.
    """
    from dataclasses import replace

    from cadiff_cli.device import pick_device
    from cadiff_cli.errors import UsageError
    from cadiff_cli.io.templates import NAME
    from cadiff_cli.training.atlas.config import Training
    from cadiff_cli.training.atlas.data import (
        base_grid,
        base_labels,
        labeller,
        prepare_people,
    )
    from cadiff_cli.training.atlas.run import check_steps, train_atlas
    from cadiff_cli.training.settings import load
    from cadiff_cli.training.templates import load_training_template

    show_times()
    pick_device(device)
    training = load(config, Training(), **options)
    check_steps(training)
    if not NAME.fullmatch(training.base):
        raise UsageError(
            f"base is {training.base!r}", "name a template: weights are used with that of the name"
        )
    base = load_training_template(training.base)
    folder = prepared_in(run, cache)
    base = replace(base, labels=base.labels or base_labels(base, labeller(), device))
    prepared = prepare_people(people, base, training.spacing_mm, folder, device)
    path = train_atlas(
        prepared,
        base,
        base_grid(base, training.spacing_mm),
        run,
        training,
        device=device,
        workers=workers,
        max_minutes=max_minutes,
    )
    click.echo(path)
