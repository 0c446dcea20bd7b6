"""``cadiff fuse``: the classical baseline, labels by the vote of registered people's scans."""

from pathlib import Path

import click

from cadiff_cli.cli.options import PATH, SEED, show_times, without_prefix


@click.command(name="fuse")
@click.argument("t1", type=PATH)
@click.option(
    "--atlases",
    type=PATH,
    required=True,
    help="BIDS-like folder of skull-stripped T1w images with dseg label maps.",
)
@click.option("-o", "--out", type=PATH, required=True, help="Output folder.")
@click.option(
    "--exclude",
    callback=without_prefix,
    multiple=True,
    help="Subject label that may not vote (repeatable).",
)
@click.option(
    "--parcellation",
    "drawn",
    default="cadiff40",
    show_default=True,
    help="Label set to draw: cadiff40, nmm138, or a TSV.",
)
@click.option(
    "--labels",
    default="neuromorphometrics",
    show_default=True,
    help="Ids of the atlases: neuromorphometrics, freesurfer, dlmuse, synthseg, cadiff, or a TSV.",
)
@click.option("--mask", type=PATH, help="Your own brain mask (T1's grid).")
@click.option(
    "--registration",
    default="fast",
    show_default=True,
    help="Named settings of each registration, such as fast or affine.",
)
@click.option(
    "--vote",
    type=click.Choice(["joint", "majority"]),
    default="joint",
    show_default=True,
    help="joint: joint label fusion (slow).  majority: every person counts the same.",
)
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Parallel processes."
)
@click.option("--overwrite", is_flag=True, help="Replace the label map of an earlier run.")
def command(
    t1: Path,
    atlases: Path,
    out: Path,
    exclude: tuple[str, ...],
    drawn: str,
    labels: str,
    mask: Path | None,
    registration: str,
    vote: str,
    seed: int,
    jobs: int,
    overwrite: bool,
) -> None:
    """Label T1, a skull-stripped scan, by multi-atlas label fusion.

    Every person of the atlases, except T1's own subject (by label), is registered to T1 and votes
    with one scan.  Writes a dseg on T1's own grid with the parcellation's codes.
    """
    from cadiff_cli.config import Config, RegisterConfig, StripConfig
    from cadiff_cli.labels.parcellation import load_parcellation
    from cadiff_cli.runner.fuse import fuse_file

    show_times()
    config = Config(StripConfig(mask=mask), RegisterConfig(registration, seed))
    parcellation = load_parcellation(drawn)
    click.echo(
        fuse_file(
            *(t1, atlases, out, parcellation, labels, config),
            exclude=exclude,
            vote=vote,
            jobs=jobs,
            overwrite=overwrite,
        )
    )
