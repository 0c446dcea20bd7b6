"""How good labels are expected to be, without the truth: from the network's own probabilities.

A network's probabilities are rarely those that they should be.  ``data/quality.json``, written by
``tools/measure_quality.py``, tells what Dice was really reached where one was expected.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

KNOTS = 16
"""Points of a fitted map: each is the mean of as many measurements as any other."""


def expected_dice(p: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """(classes - 1,) Dice to expect of ``drawn`` if the truth were drawn from ``p``.

    ``p`` (classes, X, Y, Z) are probabilities, background first; ``drawn`` (X, Y, Z) are classes.
    It is twice the expected overlap over the expected sum of both sizes.  NaN where a structure is
    not drawn and less than half a voxel of it is expected: absent on both sides.  Class by class:
    ``p`` is too large to copy.
    """
    found = np.full(len(p) - 1, np.nan)
    for k in range(1, len(p)):
        here = drawn == k
        size, mass = int(np.count_nonzero(here)), float(p[k].sum(dtype=np.float64))
        if size or mass >= 0.5:
            found[k - 1] = 2 * float(p[k][here].sum(dtype=np.float64)) / (size + mass)
    return found


@dataclass(frozen=True)
class Calibration:
    """What Dice was reached where a raw one was expected, with the weights ``weights_sha256``.

    A monotone line through the knots (``raw``, ``dice``), constant beyond them, and for each
    structure (by name) what it lies above that line, if that was found to help (``offsets``).
    ``usual`` is the Dice to expect of each structure in a good scan.  ``people`` says who was
    measured, and how.
    """

    weights_sha256: str
    people: str
    raw: tuple[float, ...]
    dice: tuple[float, ...]
    offsets: Mapping[str, float] = field(default_factory=dict)
    usual: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, name: str, raw: float) -> float:
        """The Dice of the structure ``name`` to expect, in [0, 1]."""
        line = float(np.interp(raw, self.raw, self.dice))
        return float(np.clip(line + self.offsets.get(name, 0.0), 0.0, 1.0))

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Calibration":
        """What ``as_dict`` gave."""
        knots = {key: tuple(values[key]) for key in ("raw", "dice")}
        return Calibration(**{**values, **knots})

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ``quality.json``."""
        return {
            "weights_sha256": self.weights_sha256,
            "people": self.people,
            "raw": [round(value, 4) for value in self.raw],
            "dice": [round(value, 4) for value in self.dice],
            "offsets": {name: round(value, 4) for name, value in self.offsets.items()},
            "usual": {name: round(value, 4) for name, value in self.usual.items()},
        }


@cache
def load_calibration(weights_sha256: str) -> Calibration | None:
    """The map that was measured with these weights; None if the package has none."""
    path = files("cadiff_cli").joinpath("data/quality.json")
    if not path.is_file():
        return None
    found = Calibration.from_dict(json.loads(path.read_text(encoding="utf-8")))
    return found if found.weights_sha256 == weights_sha256 else None


def fit(
    names: np.ndarray,
    raw: np.ndarray,
    dice: np.ndarray,
    good: np.ndarray,
    *,
    offsets: bool = False,
    weights_sha256: str = "",
    people: str = "",
) -> Calibration:
    """Fit a map to measurements, all (n,): structures, raw expected Dice, true Dice, ``good`` scan.

    Means of equally many measurements, made monotone by isotonic regression.  What is not there
    scores 0, so the line begins there.  ``offsets`` asks for what each structure deviates on
    average.
    """
    order = np.argsort(raw, kind="stable")
    groups = [g for g in np.array_split(order, KNOTS) if len(g)]
    heights = [dice[g].mean() for g in groups]
    monotone = isotonic_regression(heights, weights=[len(g) for g in groups]).x
    knots = (0.0, *(float(raw[g].mean()) for g in groups)), (0.0, *map(float, monotone))
    rest = dice - np.interp(raw, *knots)
    known = [str(name) for name in np.unique(names)]
    above = {name: float(rest[names == name].mean()) for name in known} if offsets else {}
    line = Calibration(weights_sha256, people, *knots, above)
    usual = {
        name: float(np.mean([line(name, value) for value in raw[rows]]))
        for name in known
        if (rows := good & (names == name)).any()
    }
    return replace(line, usual=usual)
