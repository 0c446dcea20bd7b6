"""``cadiff seg`` and ``cadiff-seg``: one scan to labels, volumes and provenance."""

from pathlib import Path

import click


@click.command(name="seg", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("t1", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Output folder.")
@click.option(
    "--skull-strip",
    type=click.Choice(["auto", "net", "template", "none"]),
    default="auto",
    show_default=True,
    help="auto leaves a stripped scan alone and finds the brain of a whole head with a network.",
)
@click.option("--mask", type=click.Path(path_type=Path), help="Your own brain mask (T1's grid).")
@click.option(
    "--atlas",
    default="auto",
    show_default=True,
    help="MNIColin27, MNI152NLin2009cAsym (both TemplateFlow), MNI152NLin2009aSym (embedded)."
    " auto: Colin27 if it can be had, else the embedded one.",
)
@click.option(
    "--registration",
    type=click.Choice(["fast", "affine", "none"]),
    default="fast",
    show_default=True,
    help="fast: affine and SyN at 2 mm. none: the network finds the field"
    " together with the labels.",
)
@click.option("--offline", is_flag=True, help="Never try to download a template.")
@click.option("--model", default="cadiff-malc", show_default=True, help="Released name or file.")
@click.option(
    "--steps",
    type=click.IntRange(0, 1000),
    default=5,
    show_default=True,
    help="Diffusion steps. 0 skips the network: labels from the registered prior alone.",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 2), default=0, show_default=True)
@click.option("--flip/--no-flip", default=True, help="Average with the mirrored brain [on].")
@click.option("--tile", type=click.IntRange(32), help="Tile edge in mm (default: whole volume).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1...")
@click.option("--threads", type=click.IntRange(1), help="CPU threads for the network.")
@click.option("--posteriors", is_flag=True, help="Also write the 4-D probseg.")
@click.option("--save-field", is_flag=True, help="Also write the distance field.")
@click.option("--overwrite", is_flag=True, help="Replace the results of an earlier run.")
@click.option("-v", "--verbose", count=True, help="More messages.")
@click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors.")
def command(
    t1: Path,
    out: Path,
    skull_strip: str,
    mask: Path | None,
    atlas: str,
    registration: str,
    offline: bool,
    model: str,
    steps: int,
    seed: int,
    flip: bool,
    tile: int | None,
    device: str,
    threads: int | None,
    posteriors: bool,
    save_field: bool,
    overwrite: bool,
    verbose: int,
    quiet: bool,
) -> None:
    r"""Segment the brain of a T1-weighted scan (NIfTI or MGH).

    Writes labels on the scan's own grid, a volume table, brain mask, transforms and provenance
    into OUT as BIDS derivatives.

    \b
    Exit codes: 0 done, 1 failure, 64 usage, 65 bad data, 66 input, template or weights missing,
    73 output cannot be created, 74 disk error, 130 interrupted.
    """
    from cadiff_cli.cli.session import segment_file
    from cadiff_cli.config import Config, RegisterConfig, SampleConfig, StripConfig

    if tile is not None and tile % 32:
        raise click.BadParameter(f"{tile} is not a multiple of 32", param_hint="--tile")
    if registration == "none" and (save_field or not steps):
        raise click.UsageError("--save-field and --steps 0 need a registration")
    config = Config(
        strip=StripConfig(skull_strip, mask),
        register=RegisterConfig(registration, seed),
        sample=SampleConfig(steps, seed, flip, tile, device, posteriors),
    )
    segment_file(
        t1,
        out,
        config,
        atlas=atlas,
        model=model,
        offline=offline,
        save_field=save_field,
        overwrite=overwrite,
        threads=threads,
        verbosity=-1 if quiet else verbose,
    )
