"""``cadiff seg`` and ``cadiff-seg``: one scan to labels, volumes and provenance."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cadiff_cli import __version__
from cadiff_cli.cli import HELP_OPTIONS
from cadiff_cli.cli.options import PATH, Age, SexOption, check, made, not_empty, options_of
from cadiff_cli.config import Request

if TYPE_CHECKING:
    from cadiff_cli.products import Person, Sex


@click.command(name="seg", context_settings=HELP_OPTIONS)
@click.argument("t1", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="Output folder.")
@click.option(
    "--age",
    type=Age(),
    help="Age of the person, in years: for percentiles and --template conditional.",
)
@click.option("--sex", type=SexOption(), help="Sex of the person, for the same.")
@options_of(Request)
@click.option("--series", type=int, help="Of a DICOM folder: number of the series.")
@click.option(
    "--subject", callback=not_empty, help="Of a DICOM folder: label for its files [default: 01]."
)
@click.option("-v", "--verbose", count=True, help="More messages.")
@click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors.")
@click.version_option(__version__, prog_name="cadiff")
def command(
    t1: Path,
    out: Path,
    age: float | None,
    sex: "Sex | None",
    series: int | None,
    subject: str | None,
    verbose: int,
    quiet: bool,
    **options: Any,
) -> None:
    """Segment the brain of a T1-weighted scan: NIfTI, MGH, or a folder of DICOM files.

    Writes labels on the scan's own grid, a volume table, brain mask, transforms and provenance
    into OUT as BIDS derivatives, and a page to judge them by.

    Exit codes: 0 done, 1 failure, 64 usage, 65 bad data, 66 input, template or weights missing,
    73 output cannot be created, 74 disk error, 130 interrupted, 143 terminated.
    """
    from cadiff_cli.io.formats import is_folder
    from cadiff_cli.products import Person

    request, person = made(Request, options), Person(age, sex)
    check(request.config)
    if is_folder(t1):
        label = (subject or "01").removeprefix("sub-")
        t1 = _from_dicom(t1, out, series, label, request, person, quiet=quiet)
    elif series is not None or subject is not None:
        raise click.UsageError("--series and --subject are for a folder of DICOM files")
    from cadiff_cli.cli.console import ScanConsole
    from cadiff_cli.runner.execute import segment_file

    console = ScanConsole(t1, out, verbosity=-1 if quiet else verbose)
    console.done(segment_file(t1, out, request, console, person))


def _from_dicom(
    folder: Path,
    out: Path,
    series: int | None,
    subject: str,
    request: Request,
    person: "Person",
    *,
    quiet: bool,
) -> Path:
    """The scan of a DICOM folder as a file in OUT, without the names and dates of the files.

    It is written once it is known that all is there to segment it.
    """
    from cadiff_cli.io.bids.description import refuse_foreign
    from cadiff_cli.io.bids.layout import Derivatives
    from cadiff_cli.io.bids.names import is_label
    from cadiff_cli.io.dicom import convert
    from cadiff_cli.runner.execute import checked, planned

    def check(image: Path) -> None:
        checked(image, Derivatives(out, path), request, person)
        planned(request, out, person)

    if not is_label(subject):
        raise click.BadParameter(f"{subject!r}: use letters and digits", param_hint="--subject")
    refuse_foreign(out)
    path = out / "sourcedata" / f"sub-{subject}" / "anat" / f"sub-{subject}_T1w.nii.gz"
    title = convert(folder, series, path, overwrite=request.overwrite, check=check)
    if not quiet:
        click.echo(f"cadiff: {title} is {path}", err=True)
    return path
