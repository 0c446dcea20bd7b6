"""``cadiff example``: write a scan to try cadiff with, without internet."""

from pathlib import Path

import click


@click.command(name="example")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder.")
def command(out: Path) -> None:
    """Write sub-MNI152_T1w.nii.gz, the MNI152 brain of the nilearn package."""
    import numpy as np

    from cadiff_cli.io.images import save_volume
    from cadiff_cli.io.templates import EMBEDDED, load_template

    brain = load_template(EMBEDDED, offline=True).brain
    path = out / "sub-MNI152_T1w.nii.gz"
    save_volume(path, np.round(brain.data * 255).astype(np.uint8), brain.grid)
    click.echo(path)
