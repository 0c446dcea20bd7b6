"""``cadiff atlas evaluate``: atlases against people that they were not trained on."""

from collections.abc import Sequence
from pathlib import Path

import click

from cadiff_cli.cli.options import PATH, filled, show_times

GIVEN = {"age": "age_years", "sex": "sex", "ventricles": "ventricles_percent"}


@click.command(name="evaluate")
@click.argument("model", metavar="MODEL", callback=filled)
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
    from dataclasses import replace

    from cadiff_cli.errors import DataError, UsageError
    from cadiff_cli.io import models
    from cadiff_cli.io.files import check_writable, refuse_existing, write_tsv
    from cadiff_cli.nets.models import AtlasModel
    from cadiff_cli.training.atlas import scores
    from cadiff_cli.training.atlas.data import known_to, prepare_people
    from cadiff_cli.training.atlas.regression import ATLAS, KernelRegression, sources_of
    from cadiff_cli.training.atlas.run import brain_weight
    from cadiff_cli.training.templates import load_training_template

    show_times()
    words = [word.strip() for word in given.split(",") if word.strip()]
    if unknown := [word for word in words if word not in GIVEN]:
        raise UsageError(f"--given names {unknown}", f"use {', '.join(GIVEN)}")
    tables = [out / "atlas_groups.tsv", out / "atlas_ages.tsv"]
    refuse_existing(*tables, overwrite=overwrite)
    check_writable(out)
    trained = models.load(AtlasModel, model)
    base = replace(load_training_template(trained.base), labels=trained.labels)
    spacing = float(trained.grid.spacing_mm[0])
    prepared = prepare_people(people, base, spacing, cache or out / "cache")
    learnt = [p for p in prepared if p.label in trained.seen]
    unseen = [p for p in prepared if p.label not in trained.seen]
    groups = scores.groups_of(known_to(trained.space, unseen))
    if not groups:
        raise DataError(
            f"the model was trained on all {len(learnt)} people of known age",
            "give people that it has not seen",
        )
    names = [GIVEN[word] for word in words]
    regression = KernelRegression.of(learnt, trained.space) if learnt else None
    sources = sources_of(trained, regression)
    import torch

    brain = torch.from_numpy(brain_weight(base, trained.grid))
    rows = []
    for group, members in groups.items():
        for source, make in sources.items():
            score = scores.score_group(group, members, source, make, trained.grid, brain, names)
            if register:
                score = scores.register_some(
                    score, members, make, base, trained.grid, names, register
                )
            if source == ATLAS:
                spread = scores.spread_of(members, trained, brain, names)
                score = replace(score, spread_mm=spread)
            rows.append(score)
    low, high = trained.space.age_years
    ages = [age for age in range(0, 130, 10) if low <= age <= high]
    curves = scores.score_ages(prepared, sources, base, trained.grid, ages)
    for path, (header, lines) in zip(
        tables, (scores.table_of_groups(rows), scores.table_of_ages(curves)), strict=True
    ):
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
    console(soft_wrap=True).print(table)
