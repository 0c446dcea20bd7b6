"""``cadiff export``: volumes in the layouts of other programs."""

from pathlib import Path

import click

from cadiff_cli.cli.options import PATH

FORMATS = ("enigma", "freesurfer", "synthseg")


@click.command(name="export")
@click.argument("out", type=PATH)
@click.option(
    "--format",
    "layout",
    type=click.Choice(FORMATS),
    required=True,
    help="enigma: LandRvolumes.csv. freesurfer: as asegstats2table. synthseg: as mri_synthseg"
    " --vol.",
)
@click.option(
    "-o",
    "--out",
    "path",
    type=PATH,
    help="File to write [default: in OUT/export].",
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it is there.")
def command(out: Path, layout: str, path: Path | None, overwrite: bool) -> None:
    """Write the volumes of all finished results in OUT as another program would.

    ICV and the total intracranial volume are our Intracranial-Volume if all results have it, else
    that of the brain mask, which includes fluid in sulci.  The cerebellar cortex is without the
    vermis, which has a column of its own.
    """
    from cadiff_cli.errors import first_few
    from cadiff_cli.io.bids.description import refuse_foreign
    from cadiff_cli.io.files import refuse_existing
    from cadiff_cli.runner.export import LAYOUTS, export
    from cadiff_cli.runner.logs import warning

    if path is None:
        refuse_foreign(out)
        path = out / "export" / LAYOUTS[layout].file
    refuse_existing(path, overwrite=overwrite)
    exported = export(out, LAYOUTS[layout], path)
    if exported.missing:
        text = f"{first_few(exported.missing)} {'have' if len(exported.missing) > 1 else 'has'}"
        click.echo(warning(f"{text} no row: cadiff run says why"), err=True)
    if exported.ways > 1:
        text = f"results were made in {exported.ways} different ways (column fingerprint of group)"
        click.echo(warning(text), err=True)
    size = f"; the size of the head is our {exported.head}" if exported.head else ""
    click.echo(f"{path}: {exported.rows} rows{size}")
