"""The baseline of every atlas: kernel regression of log-velocities over conditions.

With few people a weighted mean of those near in condition is strong, and simple.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cadiff_cli.nets.condition import ConditionSpace, kernel_weights
from cadiff_cli.nets.models import AtlasModel
from cadiff_cli.products import Condition
from cadiff_cli.training.atlas.data import PreparedPerson

log = logging.getLogger(__name__)

WIDTHS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
"""Widths of the kernel over age and ventricles, as shares of their ranges."""
SEX_WIDTHS = (0.5, 1.0, 4.0)
Source = Callable[[Condition], np.ndarray]
"""Makes a velocity (3, X, Y, Z) in mm of a condition."""
ATLAS = "atlas"


@dataclass(frozen=True, eq=False)
class KernelRegression:
    """Nadaraya-Watson regression with a Gaussian kernel.

    ``conditions`` (n, 3) are scaled by ``space``, ``velocities`` (n, 3, X, Y, Z) in mm; ``widths``
    (3,) are the kernel's over age, sex and ventricles.
    """

    space: ConditionSpace
    conditions: np.ndarray
    velocities: np.ndarray
    widths: tuple[float, float, float]

    @classmethod
    def of(cls, people: Sequence[PreparedPerson], space: ConditionSpace) -> "KernelRegression":
        """The regression whose widths predict each person best from all others.

        Age and ventricles are used alone and with the others: widths must serve missing conditions
        as well.
        """
        conditions = np.stack([space.scaled(p.condition) for p in people])
        velocities = np.stack([p.velocity_mm for p in people]).astype(np.float32)
        flat = velocities.reshape(len(people), -1)
        gram = (flat @ flat.T).astype(np.float64)

        def error(widths: tuple[float, float, float]) -> float:
            total = 0.0
            for shown in ([0], [2], [0, 1], [0, 1, 2]):
                asked = np.full_like(conditions, np.nan)
                asked[:, shown] = conditions[:, shown]
                w = _weights(conditions, asked, widths, without=np.arange(len(people)))
                total += float(
                    (np.diag(gram) - 2 * (w * gram).sum(1) + ((w @ gram) * w).sum(1)).sum()
                )
            return total

        widths = min(itertools.product(WIDTHS, SEX_WIDTHS, WIDTHS), key=error)
        return cls(space, conditions, velocities, widths)

    def velocity(self, condition: Condition) -> np.ndarray:
        """(3, X, Y, Z) float32 in mm; raises ``UsageError`` as the network's does."""
        self.space.check(condition)
        (w,) = _weights(self.conditions, self.space.scaled(condition)[None], self.widths)
        return np.tensordot(w.astype(np.float32), self.velocities, 1)


def _weights(
    conditions: np.ndarray,
    asked: np.ndarray,
    widths: Sequence[float],
    without: np.ndarray | None = None,
) -> np.ndarray:
    """(B, n) float64: weights of n people for B conditions (``kernel_weights``)."""
    people, wanted = (torch.from_numpy(each).double() for each in (conditions, asked))
    left_out = None if without is None else torch.from_numpy(without)
    return kernel_weights(people, wanted, people.new_tensor(widths), left_out).numpy()


def sources_of(model: AtlasModel, regression: KernelRegression | None) -> dict[str, Source]:
    """The base itself, kernel regression over the people that the model learnt from, the model."""
    still = np.zeros((3, *model.grid.shape), dtype=np.float32)
    sources: dict[str, Source] = {"base": lambda _condition: still}
    if regression:
        log.info("kernel regression has widths %s (age, sex, ventricles)", regression.widths)
        sources["regression"] = regression.velocity
    return {**sources, ATLAS: model.velocity}
