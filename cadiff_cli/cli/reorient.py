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
    from cadiff_cli.config import Config, StripConfig
    from cadiff_cli.errors import DataError, OutputError, UsageError
    from cadiff_cli.io.files import check_writable, is_among, refuse_existing
    from cadiff_cli.io.formats import stem
    from cadiff_cli.io.images import given_mask, load_scan, load_volume, save_volume
    from cadiff_cli.io.templates import EMBEDDED, load_template
    from cadiff_cli.machine import work_folder
    from cadiff_cli.pipeline import strip_scan
    from cadiff_cli.stages.orientation import orientation, reoriented

    show_warnings()

    if not (out.name.endswith((".nii", ".nii.gz")) and stem(out)):
        raise UsageError(f"{out.name} is no NIfTI name", "write NAME.nii or NAME.nii.gz")
    scan, template = load_scan(t1), load_template(EMBEDDED)
    turned_mask = out.with_name(f"{stem(out)}_mask.nii.gz") if mask else None
    written = [path for path in (out, turned_mask) if path]
    if inputs := [path for path in written if is_among(path, (t1, mask))]:
        raise OutputError(f"{inputs[0]} is an input", "choose another name for --out")
    refuse_existing(*written, overwrite=overwrite)
    check_writable(out.parent)
    config = Config(strip=StripConfig(mask=mask))
    with work_folder() as work:
        brain = strip_scan(scan, template, config, Path(work)).t1
    best = orientation(brain, template.brain)
    grid = reoriented(scan.t1.grid, best.rotation)
    if not best.is_clear:
        raise DataError(
            f"the orientation of {t1.name} is unclear: {grid.axes} fits best"
            f" ({best.score:.3f}), another rotation nearly as well ({best.next_best:.3f})",
            "set the header by hand, for instance with nibabel or fslorient",
        )
    if best.is_upright:
        click.echo(f"cadiff: {t1.name} lies as its header says ({grid.axes})", err=True)
        return
    save_volume(out, load_volume(t1).data, grid)
    if mask and turned_mask:
        save_volume(turned_mask, given_mask(mask, scan).data, grid)
    click.echo(
        f"cadiff: turned by {best.turn}, {scan.t1.grid.axes} -> {grid.axes};"
        " left and right cannot be seen: check them",
        err=True,
    )
    for path in written:
        click.echo(path)
