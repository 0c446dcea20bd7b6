"""``cadiff report``: pages from finished results, without internet and torch."""

from pathlib import Path

import click

from cadiff_cli.cli.options import PATH, FilePath


@click.command(name="report")
@click.argument("out", type=PATH)
@click.option(
    "--scans",
    type=FilePath(exists=True),
    help="The scan, or a folder that holds the scans [default: where OUT's dataset_description.json"
    " says].",
)
def command(out: Path, scans: Path | None) -> int:
    """Rebuild the page of every finished result in OUT, and group.html if there are several.

    Pages show the scan itself if it is found (by its SHA-256), else its copy in OUT (or its brain).
    Ages of a participants.tsv beside the scans, or of the dataset that OUT names, count, not those
    at the time of segmentation.
    """
    from cadiff_cli.cli.console import RunConsole
    from cadiff_cli.io.bids.description import refuse_foreign
    from cadiff_cli.io.files import check_writable
    from cadiff_cli.runner.participants import folder_pages

    out = out.absolute()
    refuse_foreign(out)
    if out.is_dir():
        check_writable(out)
    return folder_pages(out, scans, RunConsole())
