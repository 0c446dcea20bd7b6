"""``cadiff atlas train``: from people with ages to the weights of conditional atlases."""

from pathlib import Path
from typing import Any

import click

from cadiff_cli.cli.options import PATH
from cadiff_cli.cli.train import run_options


@click.command(name="train")
@click.argument("people", nargs=-1, required=True, metavar="PEOPLE...", type=PATH)
@click.argument("config", metavar="CONFIG")
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
    participants.tsv (age, sex). CONFIG is a TOML file or atlas, which is shipped; options override
    it.

    One scan of each person is prepared once by the same code that inference runs. Its structures
    are those of a label map beside it, sub-X_seg-SCHEME_dseg.nii.gz, where SCHEME is a known one
    (dlmuse, freesurfer, neuromorphometrics ...), or of the released network. A share of the
    people is left out, and compared with the base template, kernel regression and the atlas at the
    end. The same command continues after a kill.
    """
    import logging
    from dataclasses import replace

    from cadiff_cli.device import pick_device
    from cadiff_cli.errors import UsageError
    from cadiff_cli.io.files import check_writable
    from cadiff_cli.io.templates import NAME
    from cadiff_cli.training.atlas.config import load
    from cadiff_cli.training.atlas.data import (
        base_grid,
        base_labels,
        labeller,
        prepare_people,
    )
    from cadiff_cli.training.atlas.run import check_steps, train_atlas
    from cadiff_cli.training.templates import load_training_template

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    pick_device(device)
    training = load(config, **options)
    check_steps(training)
    if not NAME.fullmatch(training.base):
        raise UsageError(
            f"base is {training.base!r}", "name a template: weights are used with that of the name"
        )
    base = load_training_template(training.base)
    for folder in (run, cache or run):
        check_writable(folder)
    base = replace(base, labels=base.labels or base_labels(base, labeller()))
    prepared = prepare_people(people, base, training.spacing_mm, cache or run / "cache")
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
