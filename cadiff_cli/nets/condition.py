"""Which people a conditional atlas was made from, and their conditions as numbers from 0 to 1."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadiff_cli.errors import DataError, UsageError
from cadiff_cli.products import Condition

MARGIN_YEARS = 5.0
"""So far beyond the people's ages an atlas is that of the youngest or the oldest..."""
MARGIN_FACTOR = 1.25
"""...and so far beyond their ventricles that of the smallest or the largest; then it is refused."""
FAR_SD = 4.0
"""Ventricles that lie so far from those of the age contradict it."""
NAMES = ("age_years", "sex", "ventricles_percent")
SEXES = ("F", "M")
FAR = 1.0
"""Distance in a number that is asked for, of a person of whom it is not known."""


def kernel_weights(
    people: Tensor, asked: Tensor, widths: Tensor, without: Tensor | None = None
) -> Tensor:
    """Weights (B, n) of n people for B conditions, of sum 1: a Gaussian kernel of their distance.

    ``people`` (n, 3) and ``asked`` (B, 3) are scaled conditions, NaN where unknown; ``widths`` (3,)
    are the kernel's.  Numbers that are not asked for do not count.  ``without`` (B,) are indices of
    people who get no weight.
    """
    apart = (people - asked[:, None]).abs().nan_to_num(FAR) / widths
    squared = (apart.square() * asked[:, None].isfinite()).sum(dim=2)
    if without is not None:
        squared = squared.scatter(1, without[:, None], torch.inf)
    return torch.softmax(-squared / 2, dim=1)


@dataclass(frozen=True)
class ConditionSpace:
    """What is known of the people that a network learnt from.

    ``age_years`` and ``ventricles_percent`` are the least and the greatest value.  The logarithm of
    the ventricles lies around ``line`` (intercept, slope, curvature over the scaled age) with
    standard deviation ``line_sd``.
    """

    age_years: tuple[float, float]
    ventricles_percent: tuple[float, float]
    line: tuple[float, float, float]
    line_sd: float

    @staticmethod
    def of(conditions: Sequence[Condition]) -> "ConditionSpace":
        """The space of people; raises ``DataError`` where age or ventricles do not vary."""
        ages, ventricles = (
            [float(value) for c in conditions if (value := getattr(c, name)) is not None]
            for name in ("age_years", "ventricles_percent")
        )
        for name, values in (("age", ages), ("ventricle volume", ventricles)):
            if len(set(values)) < 2:
                raise DataError(
                    f"{len(conditions)} people have {len(set(values))} different values of {name}",
                    "give people of several ages, with participants.tsv",
                )
        ends = (min(ages), max(ages)), (min(ventricles), max(ventricles))
        space = ConditionSpace(*ends, line=(0.0, 0.0, 0.0), line_sd=1.0)
        both = [c for c in conditions if c.age_years is not None and c.ventricles_percent]
        if len(both) < 2:
            raise DataError(
                f"age and ventricle volume are known of {len(both)} people",
                "give at least 2 people of known age whose ventricles are labelled",
            )
        x = np.array([space.scaled(c)[0] for c in both])
        y = np.log(np.array([c.ventricles_percent for c in both], dtype=float))
        degree = min(2, len(set(x.tolist())) - 1)
        line = np.zeros(3)
        line[: degree + 1] = np.polynomial.polynomial.polyfit(x, y, degree)
        off = y - np.polynomial.polynomial.polyval(x, line)
        sd = max(float(np.sqrt((off**2).sum() / max(len(y) - degree - 1, 1))), 0.05)
        a, b, c = (float(value) for value in line)
        return replace(space, line=(a, b, c), line_sd=sd)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "ConditionSpace":
        """Read back what ``config.as_dict`` made."""
        pairs = {key: tuple(values[key]) for key in ("age_years", "ventricles_percent", "line")}
        return ConditionSpace(**pairs, line_sd=values["line_sd"])

    def scaled(self, condition: Condition) -> np.ndarray:
        """(3,) float32: age, sex and the logarithm of the ventricles in [0, 1]; NaN is unknown."""
        values = np.full(3, np.nan, dtype=np.float32)
        if condition.age_years is not None:
            low, high = self.age_years
            values[0] = (condition.age_years - low) / (high - low)
        if condition.sex is not None:
            values[1] = SEXES.index(condition.sex)
        if condition.ventricles_percent is not None:
            low, high = map(math.log, self.ventricles_percent)
            values[2] = (math.log(max(condition.ventricles_percent, 1e-6)) - low) / (high - low)
        return np.clip(values, 0, 1)

    def usual_ventricles(self, age_years: float) -> tuple[float, float, float]:
        """Per cent of the brain at an age: the least that does not contradict it, middle, most."""
        x = float(self.scaled(Condition(age_years=age_years))[0])
        middle = float(np.polynomial.polynomial.polyval(x, self.line))
        low, centre, high = (math.exp(middle + k * self.line_sd) for k in (-FAR_SD, 0.0, FAR_SD))
        return low, centre, high

    def check(self, condition: Condition) -> None:
        """Raise ``UsageError`` for a condition of which the people tell nothing."""
        age, ventricles = condition.age_years, condition.ventricles_percent
        low, high = self.age_years
        if age is not None and not low - MARGIN_YEARS <= age <= high + MARGIN_YEARS:
            raise UsageError(
                f"age {age:g} lies outside the people that the atlas was made from:"
                f" {low:.0f} to {high:.0f} years",
                f"use an age of {low - MARGIN_YEARS:.0f} to {high + MARGIN_YEARS:.0f}, or none",
            )
        least, most = self.ventricles_percent
        if ventricles is None:
            return
        if not least / MARGIN_FACTOR <= ventricles <= most * MARGIN_FACTOR:
            raise UsageError(
                f"ventricles of {ventricles:g} % of the brain lie outside the people that the atlas"
                f" was made from: {least:.2g} to {most:.2g} %",
                f"use {least / MARGIN_FACTOR:.2g} to {most * MARGIN_FACTOR:.2g}, or none",
            )
        if age is not None:
            small, _, large = self.usual_ventricles(age)
            if not small <= ventricles <= large:
                raise UsageError(
                    f"ventricles of {ventricles:g} % of the brain contradict age {age:g}, where"
                    f" they have {small:.2g} to {large:.2g} %",
                    "leave out the age or the ventricles",
                )
