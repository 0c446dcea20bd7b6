"""``cadiff atlas evaluate`` as one function: atlases against people, in two tables."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cadiff_cli.errors import DataError
from cadiff_cli.nets.models import AtlasModel
from cadiff_cli.training.atlas import scores
from cadiff_cli.training.atlas.data import known_to, prepare_people
from cadiff_cli.training.atlas.regression import ATLAS, KernelRegression, sources_of
from cadiff_cli.training.atlas.run import brain_weight
from cadiff_cli.training.templates import load_training_template

Rows = tuple[Sequence[str], Sequence[Sequence[object]]]
"""Header and lines of a table."""


def evaluate_atlas(
    trained: AtlasModel,
    people: Sequence[Path],
    cache: Path,
    given: Sequence[str],
    register: int = 0,
) -> tuple[Rows, Rows]:
    """Compare atlases, kernel regression and the base template by groups and by ages.

    ``people`` are folders as for training: those that were trained on make the regression, the
    others are compared.  ``given`` names the parts of a ``Condition`` that are told of each person.
    Atlases are registered to so many people of each group (``register``), for Dice.  Raises
    ``DataError`` if nobody is left to compare with.
    """
    base = replace(load_training_template(trained.base), labels=trained.labels)
    prepared = prepare_people(people, base, float(trained.grid.spacing_mm[0]), cache)
    learnt = [p for p in prepared if p.label in trained.seen]
    unseen = [p for p in prepared if p.label not in trained.seen]
    groups = scores.groups_of(known_to(trained.space, unseen))
    if not groups:
        raise DataError(
            f"the model was trained on all {len(learnt)} people of known age",
            "give people that it has not seen",
        )
    regression = KernelRegression.of(learnt, trained.space) if learnt else None
    sources = sources_of(trained, regression)
    brain, grid = torch.from_numpy(brain_weight(base, trained.grid)), trained.grid
    rows = []
    for group, members in groups.items():
        for source, make in sources.items():
            score = scores.score_group(group, members, source, make, grid, brain, given)
            if register:
                score = scores.register_some(score, members, make, base, grid, given, register)
            if source == ATLAS:
                spread = scores.spread_of(members, trained, brain, given)
                score = replace(score, spread_mm=spread)
            rows.append(score)
    low, high = trained.space.age_years
    ages = [age for age in range(0, 130, 10) if low <= age <= high]
    curves = scores.score_ages(prepared, sources, base, grid, ages)
    return scores.table_of_groups(rows), scores.table_of_ages(curves)
