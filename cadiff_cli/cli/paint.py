"""``cadiff paint``: make scans for training from label maps alone."""

from pathlib import Path

import click

from cadiff_cli.cli.options import PATH, SEED


@click.command(name="paint")
@click.argument("label_maps", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="New folder of the scans.")
@click.option("--seed", type=SEED, default=0, show_default=True)
def command(label_maps: Path, out: Path, seed: int) -> None:
    """Paint a T1-weighted brain for every label map in the folder LABEL_MAPS.

    Label maps hold FreeSurfer's codes, and optionally 500 to 999 for tissue around the brain.
    Train on OUT with `cadiff train synth OUT --labels synthseg`.
    """
    from cadiff_cli.training.paint import paint_dataset

    for path in paint_dataset(label_maps, out, seed):
        click.echo(path)
