"""A conditional atlas model that obeys a law: ventricles grow about their centres with age."""

from dataclasses import dataclass, replace

import numpy as np

from cadiff_cli.errors import UsageError
from cadiff_cli.products import Condition
from cadiff_cli.spatial.grid import Grid, Volume

SCALE, SHIFT_MM = 0.4, np.array([12.0, -9.0, 7.0])
CENTRES_MM = SCALE * np.array([[-13.0, -12, 24], [13, -12, 24]]) + SHIFT_MM
RADII_MM = SCALE * np.array([8.0, 28, 10])
OLDEST = 90


def rate(condition, seed=None):
    """Growth (1 per unit time) at the ventricles' centres; a person differs from the centre."""
    years = 45 if condition.age_years is None else condition.age_years
    return (years - 45) / 200 + (0 if seed is None else 0.02 * np.sin(1 + seed))


def velocity_at(points_mm, condition, seed=None):
    """(..., 3) mm per unit time at (..., 3) points: away from the nearer ventricle's centre.

    A small drift to the front tells an age by the AC as well.
    """
    found = np.zeros(points_mm.shape)
    for centre in CENTRES_MM:
        away = points_mm - centre
        near = np.exp(-((away / (1.5 * RADII_MM)) ** 2).sum(axis=-1, keepdims=True))
        found += rate(condition, seed) * near * away
    return found + rate(condition, seed) * np.array([0.0, 4.0, -2.0])


@dataclass(frozen=True)
class Growing:
    """``base`` is a template's folder, as ``load_template`` takes it."""

    base: str
    grid: Grid
    labels: Volume
    name: str = "growing-law"
    sha256: str = "ab" * 32

    def check(self, condition: Condition) -> None:
        if condition.age_years is not None and condition.age_years > OLDEST:
            raise UsageError(f"age {condition.age_years:g} lies outside 20 to {OLDEST}", "use less")

    def velocity(self, condition, seed=None):
        world = self.grid.to_world(np.moveaxis(np.indices(self.grid.shape), 0, -1))
        field = velocity_at(world, condition, seed)
        return np.moveaxis(field, -1, 0).astype(np.float32)


def make_base(make_phantom, template, folder, write):
    """The phantom as a template's folder, and its labels: (template, model)."""
    head = make_phantom("RAS", 1.0, SCALE, SHIFT_MM)
    labels = Volume(head.codes, head.t1.grid)
    base = replace(template(SCALE, SHIFT_MM, 1.0), labels=labels)
    write(folder, base)
    return base, Growing(str(folder), head.t1.grid.working(2.0), labels)
