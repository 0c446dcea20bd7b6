"""``cadiff report``: pages from finished results, with neither network nor torch."""

from collections.abc import Collection
from pathlib import Path

import click


@click.command(name="report", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--scans",
    type=click.Path(path_type=Path, exists=True),
    help="The scan, or a folder that holds the scans [where OUT's dataset_description.json says].",
)
def command(out: Path, scans: Path | None) -> int:
    """Rebuild the page of every finished result in OUT, and group.html where there are several.

    Pages show the scan itself where it is found (known by its SHA-256), else only its brain.
    """
    from cadiff_cli.labels import load_table
    from cadiff_cli.report.group import PATH, write_group_page
    from cadiff_cli.report.page import remove
    from cadiff_cli.runner.group import collect, known_scans

    out = out.absolute()
    code = scan_pages(out, scans)
    known = known_scans(out)
    if len(known) > 1:
        group = collect(out, known, table := load_table())
        click.echo(write_group_page(out, group, table))
    else:
        remove(out / PATH)
    return code


def scan_pages(out: Path, scans: Path | None, only: Collection[str] | None = None) -> int:
    """Pages of all finished results, or of ``only`` those with these entities; the exit code."""
    from cadiff_cli.errors import MissingInputError, in_a_line
    from cadiff_cli.io.bids.layout import finished
    from cadiff_cli.report.page import write_page
    from cadiff_cli.runner.journal import alone
    from cadiff_cli.runner.logs import warning

    results = [r for r in finished(out) if only is None or r.entities in only]
    if not results:
        whose = "" if only is None else " of the scans that were named"
        raise MissingInputError(f"{out} holds no finished result{whose}", "segment a scan first")
    code = 0
    for result in results:
        try:
            with alone(out, result.entities):
                click.echo(write_page(out, result, scans))
        except Exception as error:  # whatever is wrong with one result, the others have pages
            click.echo(warning(f"{result.entities}: {in_a_line(error)}"), err=True)
            code = 1
    return code
