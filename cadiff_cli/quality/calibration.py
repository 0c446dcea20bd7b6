"""Calibrate the expected Dice: from the one of raw probabilities to the one that was reached.

A network's probabilities are rarely right.  ``data/calibration`` holds a file for weights that were
measured (by ``tools/measure_quality.py``): which Dice was reached where one was expected.  Weights
know their parcellation, so a calibration belongs to weights.
"""

import json
from dataclasses import replace
from functools import cache

import numpy as np
from scipy.optimize import isotonic_regression

from cadiff_cli.config import Config
from cadiff_cli.data import shipped
from cadiff_cli.products import Calibration

KNOTS = 16
"""Points of a fitted map: each is the mean of as many measurements as any other."""


def calibration(config: Config, weights_sha256: str) -> Calibration | None:
    """What turns expected into true Dice for these weights and settings, if it was measured.

    It was with a network that is given the field: the prior alone (``--steps 0``) and a field that
    the network has to find (``--registration none``) have probabilities of another kind.
    """
    alike = config.sample.steps and config.register.wanted
    return load_calibration(weights_sha256) if alike else None


@cache
def load_calibration(weights_sha256: str) -> Calibration | None:
    """The map that was measured with these weights; None if the package has none."""
    for path in shipped("calibration").iterdir():
        found = Calibration.from_dict(json.loads(path.read_text(encoding="utf-8")))
        if found.weights_sha256 == weights_sha256:
            return found
    return None


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
