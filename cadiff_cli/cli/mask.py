"""``cadiff mask``: the brain mask alone, and the stripped image."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cadiff_cli.cli.options import PATH, options_of
from cadiff_cli.config import StripConfig

if TYPE_CHECKING:
    from cadiff_cli.products import Scan, Template


@click.command(name="mask")
@click.argument("t1", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="Output folder.")
@options_of(StripConfig, without=("mask",))
@click.option("--offline", is_flag=True, help="Never try to download a template.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier mask.")
def command(t1: Path, out: Path, skull_strip: str, offline: bool, overwrite: bool) -> None:
    """Find the brain in a T1-weighted head.

    Writes the mask and the stripped image on the scan's own grid, with a sidecar on the quality of
    the mask, and prints the mask's path. The method is reported on standard error.
    """
    import logging
    from tempfile import TemporaryDirectory

    from cadiff_cli.config import Config
    from cadiff_cli.errors import OutputError
    from cadiff_cli.io.bids.derivatives import save_mask
    from cadiff_cli.io.bids.layout import Derivatives
    from cadiff_cli.io.images import load_scan
    from cadiff_cli.pipeline import strip_scan
    from cadiff_cli.runner.journal import Journal, alone
    from cadiff_cli.runner.logs import ON_SCREEN, warning
    from cadiff_cli.stages.strip import intracranial_on_scan, on_scan

    logging.basicConfig(level=logging.WARNING, format=ON_SCREEN)
    scan = load_scan(t1)
    for note in scan.notes:
        click.echo(warning(note.text), err=True)
    place, journal = Derivatives(out, t1), Journal(out)

    def check_free() -> None:
        if place.sidecars:
            raise OutputError(
                f"{place.folder} holds a segmentation and the mask it was made with",
                "choose another output folder",
            )
        journal.make_room(place, t1, overwrite=overwrite)

    check_free()
    method = StripConfig(skull_strip)
    template = _template(scan, method, offline)
    with (
        alone(out, place.stem),
        TemporaryDirectory(prefix="cadiff-", ignore_cleanup_errors=True) as work,
    ):
        check_free()  # again: another process may have finished meanwhile
        stripped = strip_scan(scan, template, Config(strip=method), Path(work))
        click.echo(f"cadiff: {stripped.summary}", err=True)
        mask = on_scan(stripped, scan)
        if journal.interrupted(place.stem):
            place.clear()
        with journal.writing(place.stem):
            held = intracranial_on_scan(stripped, scan)
            click.echo(save_mask(scan, stripped, mask, out, held))


def _template(scan: "Scan", method: "StripConfig", offline: bool) -> "Template | None":
    """The template that strips the scan; None for other methods."""
    from cadiff_cli.io.releases import strip_weights_sha256
    from cadiff_cli.io.templates import PREFERRED, load_template
    from cadiff_cli.stages.strip import stripped_brain, winsorized

    unaided = method.method == "auto" and (
        strip_weights_sha256(method) or stripped_brain(winsorized(scan.t1)) is not None
    )
    if unaided or method.method not in ("auto", "template"):
        return None
    return load_template(PREFERRED, offline=offline)
