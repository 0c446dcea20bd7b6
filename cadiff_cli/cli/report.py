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
    from cadiff_cli.io.bids.description import people_of, refuse_foreign
    from cadiff_cli.io.cohorts import GROUP_TABLE
    from cadiff_cli.io.files import check_writable
    from cadiff_cli.report.group import PATH, write_group_page
    from cadiff_cli.report.page import remove
    from cadiff_cli.runner.group import collect, known_scans
    from cadiff_cli.runner.participants import scan_pages, tell

    out = out.absolute()
    refuse_foreign(out)
    if out.is_dir():
        check_writable(out)
    people, console = people_of(out, scans), RunConsole()
    tell(people, console)
    code = scan_pages(out, scans, console, people=people)
    names = known_scans(out)
    if len(names) > 1 or (out / GROUP_TABLE).exists():
        group = collect(out, names, people)
        click.echo(write_group_page(out, group))
    else:
        remove(out / PATH)
    return code
