"""``cadiff example``: write a scan to try cadiff with, without internet."""

from pathlib import Path

import click

from cadiff_cli.cli.options import PATH


@click.command(name="example")
@click.option("-o", "--out", type=PATH, required=True, help="Folder.")
@click.option("--overwrite", is_flag=True, help="Replace another file of this name.")
def command(out: Path, overwrite: bool) -> None:
    """Write sub-MNI152_T1w.nii.gz, the MNI152 brain of the nilearn package."""
    import numpy as np

    from cadiff_cli.errors import CadiffError
    from cadiff_cli.io.files import refuse_existing
    from cadiff_cli.io.images import load_volume, save_volume
    from cadiff_cli.io.templates import EMBEDDED, load_template

    brain = load_template(EMBEDDED, offline=True).brain
    path = out / "sub-MNI152_T1w.nii.gz"
    data = np.round(brain.data * 255).astype(np.uint8)

    def is_there() -> bool:
        try:
            return path.exists() and np.array_equal(load_volume(path).data, data)
        except CadiffError:
            return False

    if not is_there():
        refuse_existing(path, overwrite=overwrite)
        save_volume(path, data, brain.grid)
    click.echo(path)
