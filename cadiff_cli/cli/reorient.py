"""``cadiff reorient``: the same voxels under a header with the correct orientation."""

from pathlib import Path

import click

from cadiff_cli.cli.options import PATH, show_warnings


@click.command(name="reorient")
@click.argument("t1", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="File to write (NIfTI).")
@click.option("--mask", type=PATH, help="Your own brain mask (T1's grid).")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
def command(t1: Path, out: Path, mask: Path | None, overwrite: bool) -> None:
    """Correct the orientation in a scan's header.

    Compares the brain with a template in all 24 rotations, and writes a copy with the same voxels
    and a correct header. An image does not show left and right: if the array was mirrored, and not
    only rotated, they stay exchanged. Check them by a marker, or with the scanner's own files.
    With --mask, OUT_mask.nii.gz is the mask under the new header.

    Writes nothing if the header is correct already.
    """
    from cadiff_cli.runner.reorient import reorient_file
    from cadiff_cli.stages.orientation import reoriented

    show_warnings()
    best, grid, written = reorient_file(t1, out, mask, overwrite=overwrite)
    if not written:
        click.echo(f"cadiff: {t1.name} lies as its header says ({grid.axes})", err=True)
        return
    click.echo(
        f"cadiff: turned by {best.turn}, {grid.axes} -> {reoriented(grid, best.rotation).axes};"
        " left and right cannot be seen: check them",
        err=True,
    )
    for path in written:
        click.echo(path)
