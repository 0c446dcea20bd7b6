"""How well atlases stand for people: the measures of Diff-Def, on people left out.

Every measure is taken of several sources of shapes: the base template, kernel regression and the
network.  All of them make a velocity of a condition, and are judged by the same code.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cadiff_cli.atlas import deform, structure_volumes, warped
from cadiff_cli.config import RegisterConfig
from cadiff_cli.labels.parcellation import BASE, load_parcellation
from cadiff_cli.machine import work_folder
from cadiff_cli.metrics.overlap import dice
from cadiff_cli.nets.models import AtlasModel
from cadiff_cli.products import Condition, Template
from cadiff_cli.quality.ranges import AGE_GROUPS
from cadiff_cli.spatial.deformation import exponential, jacobian
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.stages.register import register, warp
from cadiff_cli.training.atlas.data import STRUCTURES, PreparedPerson, share_of
from cadiff_cli.training.atlas.losses import mean_square
from cadiff_cli.training.atlas.regression import Source
from cadiff_cli.training.atlas.run import displacement
from cadiff_cli.training.atlas.velocity import folded

log = logging.getLogger(__name__)

FINE = 2
"""Folds are looked for on a grid that is so much finer than that of velocities."""
BAND_SD = 1.96
LEAST_PERCENT = 1e-6
"""A structure that somebody lacks has no logarithm."""


LENGTH = (8 / (3 * np.pi)) ** 0.5
"""Mean length of a normal vector in three dimensions, over the root of its mean square."""


@dataclass(frozen=True)
class GroupScore:
    """One source of atlases against one group of people.

    ``centrality_mm`` is the length of the mean displacement from each person's atlas to the person,
    a mean over the brain; ``chance_mm`` is what so few people would leave of it if the atlas were
    exactly their population's mean.  ``distance_mm`` is the root mean square distance to one
    person.  ``roughness`` is the mean of ``|grad J|`` per mm.  ``dice`` is that of carried labels
    after registration, over ``registered`` people.  ``spread_mm`` is the root mean square distance
    of samples from the atlas; ``distance_mm`` is what it should be.
    """

    group: str
    source: str
    people: int
    folded: int
    centrality_mm: float
    chance_mm: float
    distance_mm: float
    roughness: float
    dice: float | None = None
    registered: int = 0
    spread_mm: float | None = None


@dataclass(frozen=True)
class AgeScore:
    """Volume of a structure, in per cent of the brain, at an age.

    ``people`` is the regression over people, with the 95 % band of the curve (``low``, ``high``)
    and of single people (``least``, ``most``); the sources' values are in ``atlases``.
    """

    structure: str
    age: float
    people: float
    low: float
    high: float
    least: float
    most: float
    atlases: Mapping[str, float]


def groups_of(people: Sequence[PreparedPerson]) -> dict[str, list[PreparedPerson]]:
    """People by age group; groups without people are left out."""
    return {
        name: members
        for name, (low, high) in AGE_GROUPS.items()
        if (members := [p for p in people if p.age_years is not None and low <= p.age_years < high])
    }


def score_group(
    name: str,
    people: Sequence[PreparedPerson],
    source: str,
    make: Source,
    grid: Grid,
    brain: Tensor,
    given: Sequence[str],
) -> GroupScore:
    """All measures but Dice; ``given`` names the numbers of a condition that atlases are made of.

    ``brain`` (X, Y, Z) weighs the base brain on the velocity ``grid``.
    """
    zooms = grid.spacing_mm.tolist()

    def mean(values: Tensor) -> float:
        return float((values * brain).sum() / brain.sum())

    gaps, roughness, folds = list[Tensor](), list[float](), 0
    for velocity, members in _by_condition(people, make, given):
        moved = exponential(velocity, zooms)
        slopes = torch.gradient(jacobian(moved, zooms)[0], spacing=zooms)
        roughness += [mean(torch.stack(slopes).norm(dim=0))] * len(members)
        folds += count_folds(velocity, zooms)
        for person in members:
            gaps.append(displacement(person.velocity_mm, grid) - moved[0])
    apart = torch.stack(gaps)
    n = len(apart)
    chance = (
        apart.var(dim=0).sum(dim=0).div(n).sqrt() if n > 1 else torch.full_like(brain, torch.nan)
    )
    return GroupScore(
        name,
        source,
        n,
        folds,
        round(mean(apart.mean(dim=0).norm(dim=0)), 4),
        round(LENGTH * mean(chance), 4),
        round(float(np.mean([mean(gap.square().sum(dim=0)) ** 0.5 for gap in apart])), 4),
        round(float(np.mean(roughness)), 5),
    )


def spread_of(
    people: Sequence[PreparedPerson], model: AtlasModel, brain: Tensor, given: Sequence[str]
) -> float:
    """Root mean square distance in mm between one sample for each person and the atlas."""
    zooms = model.grid.spacing_mm.tolist()
    squares = []
    for seed, person in enumerate(people):
        condition = Condition(**{name: getattr(person.condition, name) for name in given})
        sample, atlas = (
            exponential(torch.from_numpy(model.velocity(condition, s))[None], zooms)
            for s in (seed, None)
        )
        squares.append(mean_square(sample - atlas, brain))
    return round(float(torch.stack(squares).sqrt().mean()), 4)


def _by_condition(
    people: Sequence[PreparedPerson], make: Source, given: Sequence[str]
) -> "list[tuple[Tensor, list[PreparedPerson]]]":
    """Velocities (1, 3, X, Y, Z) of the people's conditions, each made once, and whose they are."""
    members = dict[Condition, list[PreparedPerson]]()
    for person in people:
        shown = {name: getattr(person.condition, name) for name in given}
        members.setdefault(Condition(**shown), []).append(person)
    return [(torch.from_numpy(make(c))[None].float(), whose) for c, whose in members.items()]


def count_folds(velocity_mm: Tensor, zooms_mm: Sequence[float]) -> int:
    """Voxels of a finer grid at which exp(v) of (1, 3, X, Y, Z) does not keep orientation."""
    finer = torch.nn.functional.interpolate(
        velocity_mm, scale_factor=FINE, mode="trilinear", align_corners=False
    )
    return folded(finer, [zoom / FINE for zoom in zooms_mm])


def carried_dice(person: PreparedPerson, atlas: Template) -> float:
    """Dice of an atlas's labels, carried by a registration, with the person's own at 2 mm."""
    assert atlas.labels is not None
    parcellation = load_parcellation(BASE)
    image = Volume(person.image.data.astype(np.float32), person.image.grid)
    with work_folder() as work:
        transform = register(image, atlas.brain, RegisterConfig(), Path(work))
        moved = warp(atlas.labels, transform, image.grid, interpolator="genericLabel")
    carried = parcellation.encode(moved.data, parcellation.class_of)
    classes = parcellation.subset(parcellation.headline)
    return float(np.nanmean(dice(carried, person.classes.data, classes)))


def register_some(
    score: GroupScore,
    people: Sequence[PreparedPerson],
    make: Source,
    base: Template,
    grid: Grid,
    given: Sequence[str],
    n: int,
) -> GroupScore:
    """``score`` with the mean Dice over ``n`` people, spread over the ages of the group."""
    order = sorted(people, key=lambda p: (p.age_years or 0.0, p.name))
    n = min(n, len(order))
    chosen = [order[int((k + 0.5) * len(order) / n)] for k in range(n)]
    values = []
    for velocity, members in _by_condition(chosen, make, given):
        atlas = warped(base, velocity[0].numpy(), grid, score.source)
        values += [carried_dice(person, atlas) for person in members]
        log.info(
            "%s, %s: Dice %.4f after %d people",
            score.group,
            score.source,
            np.mean(values),
            len(values),
        )
    return replace(score, dice=round(float(np.mean(values)), 4), registered=len(values))


@dataclass(frozen=True)
class Trend:
    """A quadratic regression of the logarithm of a share over age, with its covariance."""

    coefficients: np.ndarray
    covariance: np.ndarray
    sd: float
    centre: float
    scale: float

    @classmethod
    def of(cls, ages: Sequence[float], values: Sequence[float]) -> "Trend":
        """Least squares; needs more than three people."""
        a = np.asarray(ages, dtype=float)
        centre, scale = float(a.mean()), float(a.std() or 1.0)
        x = np.vander((a - centre) / scale, 3)
        y = np.log(np.maximum(values, LEAST_PERCENT))
        coefficients, *_ = np.linalg.lstsq(x, y, rcond=None)
        sd = float(np.sqrt(((y - x @ coefficients) ** 2).sum() / max(len(y) - 3, 1)))
        return cls(coefficients, sd**2 * np.linalg.pinv(x.T @ x), sd, centre, scale)

    def at(self, age: float) -> tuple[float, float, float, float, float]:
        """Middle, the band of the curve (low, high), and that of people (least, most)."""
        x = np.vander([(age - self.centre) / self.scale], 3)[0]
        middle = float(x @ self.coefficients)
        error = float(np.sqrt(x @ self.covariance @ x))
        wide = float(np.hypot(error, self.sd))
        steps = (0.0, -error, error, -wide, wide)
        middle, low, high, least, most = (float(np.exp(middle + BAND_SD * s)) for s in steps)
        return middle, low, high, least, most


def score_ages(
    people: Sequence[PreparedPerson],
    sources: Mapping[str, Source],
    base: Template,
    grid: Grid,
    ages: Sequence[float],
) -> list[AgeScore]:
    """Volumes of the atlases of ``ages`` (no other condition) against the people's regression.

    ``base`` has labels.
    """
    told = [p for p in people if p.age_years is not None]
    years = [float(p.age_years) for p in told if p.age_years is not None]
    volumes = {
        (name, age): structure_volumes(
            base, deform(base.brain.grid, make(Condition(age_years=age)), grid)
        )
        for name, make in sources.items()
        for age in ages
    }
    rows = []
    for structure, codes in STRUCTURES.items():
        curve = Trend.of(years, [share_of(p.volumes_mm3, codes) for p in told])
        for age in ages:
            shares = {name: share_of(volumes[name, age], codes) for name in sources}
            rows.append(AgeScore(structure, age, *curve.at(age), shares))
    return rows


def table_of_groups(scores: Sequence[GroupScore]) -> tuple[list[str], list[list[object]]]:
    """Header and rows."""
    return [f.name for f in fields(GroupScore)], [list(asdict(s).values()) for s in scores]


def table_of_ages(scores: Sequence[AgeScore]) -> tuple[list[str], list[list[object]]]:
    """Header and rows; a column for each source."""
    plain = [f.name for f in fields(AgeScore) if f.name != "atlases"]
    header = [*plain, *scores[0].atlases] if scores else plain
    rows: list[list[object]] = []
    for s in scores:
        numbers = [getattr(s, name) for name in plain[1:]]
        rows.append([s.structure, *(round(v, 4) for v in (*numbers, *s.atlases.values()))])
    return header, rows
