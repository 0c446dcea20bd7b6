"""Find the brain of one scan, and write its mask and the stripped image."""

from pathlib import Path

from cadiff_cli.config import Config, StripConfig
from cadiff_cli.errors import OutputError
from cadiff_cli.io.bids.derivatives import save_mask
from cadiff_cli.io.bids.layout import Derivatives
from cadiff_cli.io.releases import strip_weights_sha256
from cadiff_cli.io.templates import PREFERRED, load_template
from cadiff_cli.machine import work_folder
from cadiff_cli.pipeline import strip_scan
from cadiff_cli.products import Scan, Stripped, Template
from cadiff_cli.runner.journal import Journal, alone
from cadiff_cli.stages.strip import intracranial_on_scan, on_scan, stripped_brain, winsorized


def mask_file(
    scan: Scan, out: Path, config: StripConfig, *, offline: bool = False, overwrite: bool = False
) -> tuple[Path, Stripped]:
    """Write the brain mask of ``scan`` below ``out``; returns its path and the brain.

    Raises ``OutputError`` where a segmentation or an earlier mask would be lost.
    """
    place, journal = Derivatives(out, scan.path), Journal(out)

    def check_free() -> None:
        if place.sidecars:
            raise OutputError(
                f"{place.folder} holds a segmentation and the mask it was made with",
                "choose another output folder",
            )
        journal.make_room(place, scan.path, overwrite=overwrite)

    check_free()
    template = _template(scan, config, offline)
    with (
        alone(out, place.stem),
        work_folder() as work,
    ):
        check_free()  # again: another process may have finished meanwhile
        stripped = strip_scan(scan, template, Config(strip=config), Path(work))
        mask, held = on_scan(stripped, scan), intracranial_on_scan(stripped, scan)
        with journal.writing(place.stem):
            return save_mask(scan, stripped, mask, out, config, held), stripped


def _template(scan: Scan, config: StripConfig, offline: bool) -> Template | None:
    """The template that strips the scan; None for other methods."""
    unaided = config.method == "auto" and (
        strip_weights_sha256(config) or stripped_brain(winsorized(scan.t1)) is not None
    )
    if unaided or config.method not in ("auto", "template"):
        return None
    return load_template(PREFERRED, offline=offline)
