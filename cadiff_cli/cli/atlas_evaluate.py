"""``cadiff atlas evaluate``: atlases against people that they were not trained on."""

from collections.abc import Sequence
from pathlib import Path

import click

from cadiff_cli.cli.options import PATH, not_empty, show_times

GIVEN = {"age": "age_years", "sex": "sex", "ventricles": "ventricles_percent"}


@click.command(name="evaluate")
@click.argument("model", metavar="MODEL", callback=not_empty)
@click.argument("people", nargs=-1, required=True, metavar="PEOPLE...", type=PATH)
@click.option("-o", "--out", required=True, type=PATH, help="Folder of the tables.")
@click.option("--cache", type=PATH, help="Prepared people [default: OUT/cache].")
@click.option(
    "--given",
    default="age,sex",
    show_default=True,
    help="What is told of each person, joined by commas: age, sex, ventricles.",
)
@click.option(
    "--register",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="People of each group to whom atlases are registered, for Dice; 10 s each.",
)
@click.option("--overwrite", is_flag=True, help="Replace tables that are there.")
def command(
    model: str,
    people: tuple[Path, ...],
    out: Path,
    cache: Path | None,
    given: str,
    register: int,
    overwrite: bool,
) -> None:
    """Compare atlases of MODEL, kernel regression and the base template on PEOPLE.

    MODEL is a released name or a .safetensors file; PEOPLE are folders as for atlas train. Those
    that it was trained on make the kernel regression; the others are compared, by age group:
    folded voxels, centrality, roughness, Dice (atlas_groups.tsv), and volumes against age
    (atlas_ages.tsv).
    """
    from cadiff_cli.errors import UsageError
    from cadiff_cli.io import models
    from cadiff_cli.io.files import check_writable, refuse_existing, write_tsv
    from cadiff_cli.nets.models import AtlasModel
    from cadiff_cli.training.atlas.evaluate import evaluate_atlas

    show_times()
    words = [word.strip() for word in given.split(",") if word.strip()]
    if unknown := [word for word in words if word not in GIVEN]:
        raise UsageError(f"--given names {unknown}", f"use {', '.join(GIVEN)}")
    tables = [out / "atlas_groups.tsv", out / "atlas_ages.tsv"]
    refuse_existing(*tables, overwrite=overwrite)
    check_writable(out)
    names = [GIVEN[word] for word in words]
    trained = models.load(AtlasModel, model)
    made = evaluate_atlas(trained, people, cache or out / "cache", names, register)
    for path, (header, lines) in zip(tables, made, strict=True):
        write_tsv(path, header, lines)
        show(header, lines)
    click.echo(out)


def show(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table."""
    from rich import box
    from rich.table import Table

    from cadiff_cli.cli.console import console

    table = Table(*header, box=box.SIMPLE)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console(width=200, soft_wrap=True).print(table)
