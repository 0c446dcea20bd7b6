"""``cadiff seg`` and ``cadiff-seg``: one scan to labels, volumes and provenance."""

from pathlib import Path
from typing import Any

import click

from cadiff_cli import __version__
from cadiff_cli.cli.options import make_config, segmentation_options


@click.command(name="seg", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("t1", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Output folder.")
@click.option("--mask", type=click.Path(path_type=Path), help="Your own brain mask (T1's grid).")
@segmentation_options
@click.option("--threads", type=click.IntRange(1), help="CPU threads for the network.")
@click.option("--report/--no-report", default=True, help="Write OUT/SCAN.html to look at [on].")
@click.option("--overwrite", is_flag=True, help="Replace the results of an earlier run.")
@click.option("-v", "--verbose", count=True, help="More messages.")
@click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors.")
@click.version_option(__version__, prog_name="cadiff")
def command(
    t1: Path,
    out: Path,
    template: str,
    model: str,
    offline: bool,
    save_field: bool,
    threads: int | None,
    report: bool,
    overwrite: bool,
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
    from cadiff_cli.cli.session import segment_file

    segment_file(
        t1,
        out,
        make_config(**options, save_field=save_field),
        template=template,
        model=model,
        offline=offline,
        save_field=save_field,
        report=report,
        overwrite=overwrite,
        threads=threads,
        verbosity=-1 if quiet else verbose,
    )
