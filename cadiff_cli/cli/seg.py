"""``cadiff seg`` and ``cadiff-seg``: one scan to labels, volumes and provenance."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cadiff_cli import __version__
from cadiff_cli.cli.options import Age, SexOption, check, made, options_of
from cadiff_cli.config import Request

if TYPE_CHECKING:
    from cadiff_cli.products import Sex


@click.command(name="seg", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("t1", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Output folder.")
@click.option("--age", type=Age(), help="Of the person: percentiles among people of this age.")
@click.option("--sex", type=SexOption(), help="Of the person: percentiles among people of it.")
@options_of(Request)
@click.option("-v", "--verbose", count=True, help="More messages.")
@click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors.")
@click.version_option(__version__, prog_name="cadiff")
def command(
    t1: Path,
    out: Path,
    age: float | None,
    sex: "Sex | None",
    verbose: int,
    quiet: bool,
    **options: Any,
) -> None:
    """Segment the brain of a T1-weighted scan (NIfTI or MGH).

    Writes labels on the scan's own grid, a volume table, brain mask, transforms and provenance
    into OUT as BIDS derivatives, and a page to judge them by.

    Exit codes: 0 done, 1 failure, 64 usage, 65 bad data, 66 input, template or weights missing,
    73 output cannot be created, 74 disk error, 130 interrupted.
    """
    request = made(Request, options)
    check(request.config)
    from cadiff_cli.cli.console import ScanConsole
    from cadiff_cli.products import Person
    from cadiff_cli.runner.execute import segment_file

    console = ScanConsole(t1, out, verbosity=-1 if quiet else verbose)
    console.done(segment_file(t1, out, request, console, Person(age, sex)))
