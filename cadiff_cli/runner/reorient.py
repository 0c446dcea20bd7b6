"""Correct the orientation in a scan's header, and in that of its mask."""

from pathlib import Path

from cadiff_cli.config import Config, StripConfig
from cadiff_cli.errors import DataError, OutputError, UsageError
from cadiff_cli.io.files import check_writable, is_among, refuse_existing
from cadiff_cli.io.formats import stem
from cadiff_cli.io.images import given_mask, load_scan, load_volume, save_volume
from cadiff_cli.io.templates import EMBEDDED, load_template
from cadiff_cli.machine import work_folder
from cadiff_cli.pipeline import strip_scan
from cadiff_cli.spatial.grid import Grid
from cadiff_cli.stages.orientation import Orientation, orientation, reoriented


def reorient_file(
    t1: Path, out: Path, mask: Path | None = None, *, overwrite: bool = False
) -> tuple[Orientation, Grid, list[Path]]:
    """Write a copy of a scan whose header says how its brain lies.

    With the user's ``mask`` a copy of it is written too, ``OUT_mask.nii.gz``.  Returns what was
    found, the scan's grid as its header says, and the files: none if the header is right.  Raises
    ``DataError`` if the orientation is unclear, ``UsageError`` or ``OutputError`` for ``out``.
    """
    if not (out.name.endswith((".nii", ".nii.gz")) and stem(out)):
        raise UsageError(f"{out.name} is no NIfTI name", "write NAME.nii or NAME.nii.gz")
    scan, template = load_scan(t1), load_template(EMBEDDED)
    turned_mask = out.with_name(f"{stem(out)}_mask.nii.gz") if mask else None
    written = [path for path in (out, turned_mask) if path]
    if inputs := [path for path in written if is_among(path, (t1, mask))]:
        raise OutputError(f"{inputs[0]} is an input", "choose another name for --out")
    refuse_existing(*written, overwrite=overwrite)
    check_writable(out.parent)
    with work_folder() as work:
        brain = strip_scan(scan, template, Config(strip=StripConfig(mask=mask)), Path(work)).t1
    best = orientation(brain, template.brain)
    grid = reoriented(scan.t1.grid, best.rotation)
    if not best.is_clear:
        raise DataError(
            f"the orientation of {t1.name} is unclear: {grid.axes} fits best"
            f" ({best.score:.3f}), another rotation nearly as well ({best.next_best:.3f})",
            "set the header by hand, for instance with nibabel or fslorient",
        )
    if best.is_upright:
        return best, scan.t1.grid, []
    save_volume(out, load_volume(t1).data, grid)
    if mask and turned_mask:
        save_volume(turned_mask, given_mask(mask, scan).data, grid)
    return best, scan.t1.grid, written
