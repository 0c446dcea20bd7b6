"""``cadiff mask``: the brain mask alone, and the stripped image."""

from pathlib import Path
from typing import Any

import click

from cadiff_cli.cli.options import PATH, made, options_of, show_warnings
from cadiff_cli.config import StripConfig


@click.command(name="mask")
@click.argument("t1", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="Output folder.")
@options_of(StripConfig, without=("mask",))
@click.option("--offline", is_flag=True, help="Never try to download a template.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier mask.")
def command(t1: Path, out: Path, offline: bool, overwrite: bool, **settings: Any) -> None:
    """Find the brain in a T1-weighted head.

    Writes the mask and the stripped image on the scan's own grid, with a sidecar on the quality of
    the mask, and prints the mask's path. The method is reported on standard error.
    """
    from cadiff_cli.io.images import load_scan
    from cadiff_cli.runner.logs import warning
    from cadiff_cli.runner.mask import mask_file

    show_warnings()
    scan = load_scan(t1)
    for note in scan.notes:
        click.echo(warning(note.text), err=True)
    config = made(StripConfig, settings)
    path, stripped = mask_file(scan, out, config, offline=offline, overwrite=overwrite)
    click.echo(f"cadiff: {stripped.summary}", err=True)
    click.echo(path)
