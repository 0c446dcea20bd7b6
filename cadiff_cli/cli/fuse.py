"""``cadiff fuse``: the classical baseline, labels by the vote of registered people's scans."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cadiff_cli.cli.options import PATH

if TYPE_CHECKING:
    from cadiff_cli.config import Config
    from cadiff_cli.fusion import Fused
    from cadiff_cli.labels.parcellation import Parcellation
    from cadiff_cli.products import Stripped

SEGMENTATIONS = {"joint": "jlf", "majority": "majority"}
"""A vote's name in file names."""


@click.command(name="fuse")
@click.argument("t1", type=PATH)
@click.option(
    "--atlases",
    type=PATH,
    required=True,
    help="BIDS-like folder of skull-stripped T1w images with dseg label maps.",
)
@click.option("-o", "--out", type=PATH, required=True, help="Output folder.")
@click.option("--exclude", multiple=True, help="Subject label that may not vote (repeatable).")
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
    type=click.Choice(list(SEGMENTATIONS)),
    default="joint",
    show_default=True,
    help="joint: joint label fusion (slow).  majority: every person counts the same.",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 2), default=0, show_default=True)
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
    import logging
    import tempfile

    from cadiff_cli.config import Config, RegisterConfig, StripConfig
    from cadiff_cli.fusion import choose_atlases, fuse
    from cadiff_cli.io.bids.description import save_dataset_files
    from cadiff_cli.io.bids.layout import Derivatives
    from cadiff_cli.io.bids.tables import save_table
    from cadiff_cli.io.images import load_scan
    from cadiff_cli.io.templates import EMBEDDED, load_template
    from cadiff_cli.labels.parcellation import load_parcellation
    from cadiff_cli.labels.schemes import load_scheme
    from cadiff_cli.pipeline import strip_scan

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    scan, parcellation = load_scan(t1), load_parcellation(drawn)
    mapping = load_scheme(labels, parcellation)
    people = choose_atlases(atlases, t1, exclude)
    path = Derivatives(out, t1).path(f"{_name(vote, parcellation)}.nii.gz")
    _claim(out, path, overwrite)
    config = Config(StripConfig(mask=mask), RegisterConfig(registration, seed))
    with tempfile.TemporaryDirectory(prefix="cadiff-", ignore_cleanup_errors=True) as work:
        stripped = strip_scan(scan, load_template(EMBEDDED), config, Path(work))
    fused = fuse(scan, stripped, people, parcellation, mapping, config.register, vote, jobs)
    save_dataset_files(out)
    save_table(out, parcellation)
    _save(path, t1, fused, stripped, config, parcellation)
    click.echo(path)


def _name(vote: str, parcellation: "Parcellation") -> str:
    """Name of the label map; its ``seg-`` leads ``parcellation_of`` to the parcellation."""
    return f"seg-{parcellation.segmentation}_desc-{SEGMENTATIONS[vote]}_dseg"


def _claim(out: Path, path: Path, overwrite: bool) -> None:
    """Check before the long work that ``path`` can be written without losing a file."""
    from cadiff_cli.io.bids.description import refuse_foreign
    from cadiff_cli.io.files import check_writable, refuse_existing

    refuse_foreign(out)
    refuse_existing(path, overwrite=overwrite)
    check_writable(path.parent)


def _save(
    path: Path,
    t1: Path,
    fused: "Fused",
    stripped: "Stripped",
    config: "Config",
    parcellation: "Parcellation",
) -> None:
    """Write the label map, and last its sidecar."""
    import cadiff_cli
    from cadiff_cli.config import as_dict
    from cadiff_cli.fusion import BETA, RADIUS, SEARCH
    from cadiff_cli.io.bids.tables import table_name
    from cadiff_cli.io.files import write_json
    from cadiff_cli.io.images import save_volume
    from cadiff_cli.io.provenance import software, told

    sidecar = path.with_name(path.name.replace(".nii.gz", ".json"))
    sidecar.unlink(missing_ok=True)
    save_volume(path, fused.labels.data, fused.labels.grid, like=t1, labels=True)
    joint = {"Radius": RADIUS, "Search": SEARCH, "Beta": BETA} if fused.vote == "joint" else {}
    about = {
        "Description": "Brain structures by multi-atlas label fusion; codes in "
        + table_name(parcellation),
        "Parcellation": parcellation.name,
        "Manual": False,
        "Sources": [t1.name],
        "SpatialReference": t1.name,
        "GeneratedBy": [{"Name": "cadiff", "Version": cadiff_cli.__version__}],
        "Packages": software(),
        "Vote": {"Name": fused.vote, **joint},
        "Atlases": [
            {"Name": name, "Registration": kind, "Score": score}
            for name, (kind, score) in fused.atlases.items()
        ],
        "Registration": as_dict(config.register),
        "SkullStripping": stripped.method,
        "Seconds": dict(fused.seconds),
        **told(fused.notes),
    }
    write_json(sidecar, about)
