"""Random people and neighbourhoods: a draw is a function of its number.

The paper rounds conditions to tenths; here they get noise, which says the same to a network: who is
near in condition counts.  Each number is hidden at times, so that any may be missing later.
Neighbours are drawn by the weights of kernel regression: one law says who is near.  Conditions of
atlases are spread evenly over those of the people, or the oldest would hardly count.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cadiff_cli.nets.condition import kernel_weights
from cadiff_cli.spatial.deformation import exponential
from cadiff_cli.training.atlas.config import PeopleConfig
from cadiff_cli.training.atlas.data import PreparedPerson
from cadiff_cli.training.atlas.regression import KernelRegression
from cadiff_cli.training.batch import Batch, generator_of


@dataclass(frozen=True, eq=False)
class PeopleBatch(Batch):
    """People, and neighbourhoods for an atlas.

    ``velocity`` (B, 3, X, Y, Z) in mm of people with ``condition`` (B, 3), whose indices are
    ``person`` (B,).  For an atlas of the condition ``wanted`` (B, 3), ``neighbours``
    (B, 3, X, Y, Z) is the mean displacement in mm from the base to people drawn near it, and
    ``log_shares`` (B, K) is the weighted mean over all people, NaN where all lack a structure.
    """

    person: Tensor
    velocity: Tensor
    condition: Tensor
    wanted: Tensor
    neighbours: Tensor
    log_shares: Tensor


class PeopleDraws(Dataset[PeopleBatch]):
    """Draw ``i`` of an endless series: a function of ``seed`` and ``i`` alone."""

    def __init__(
        self,
        people: Sequence[PreparedPerson],
        regression: KernelRegression,
        zooms_mm: Sequence[float],
        config: PeopleConfig,
    ) -> None:
        self.conditions = torch.from_numpy(regression.conditions)
        self.widths = self.conditions.new_tensor(regression.widths)
        self.velocities = torch.from_numpy(np.stack([p.velocity_mm for p in people]))
        self.log_shares = torch.from_numpy(np.stack([p.log_shares for p in people])).float()
        self.displacements = torch.cat(
            [exponential(v[None].float(), zooms_mm).half() for v in self.velocities]
        )
        # A person's weight for its own condition: few are near those of whom it is large.
        self.rare = kernel_weights(self.conditions, self.conditions, self.widths).diagonal()
        self.config = config

    def __getitem__(self, index: int) -> PeopleBatch:
        """Draw a person, a condition and its neighbourhood."""
        generator = generator_of(self.config.seed, index)
        person = int(torch.randint(len(self.conditions), (1,), generator=generator))
        wanted = self.blurred(int(torch.multinomial(self.rare, 1, generator=generator)), generator)
        weights = kernel_weights(self.conditions, wanted[None], self.widths)[0]
        near = torch.multinomial(weights, self.config.neighbours, True, generator=generator)
        return PeopleBatch(
            torch.tensor([person]),
            self.velocities[person][None].float(),
            self.blurred(person, generator)[None],
            wanted[None],
            self.displacements[near].float().mean(dim=0, keepdim=True),
            mean_known(self.log_shares, weights)[None],
        )

    def blurred(self, person: int, generator: torch.Generator) -> Tensor:
        """(3,): a person's condition with noise, some numbers hidden."""
        noise = self.config.jitter * torch.randn(3, generator=generator)
        noise[1] = 0.0  # nobody is between the sexes
        hidden = torch.rand(3, generator=generator) < self.config.hidden
        blurred = (self.conditions[person] + noise).clamp(0, 1)
        return blurred.masked_fill(hidden, torch.nan)


def mean_known(values: Tensor, weights: Tensor) -> Tensor:
    """(K,): the mean of ``values`` (n, K) with ``weights`` (n,) over those that are no NaN."""
    known = weights[:, None] * values.isfinite()
    return (known * values.nan_to_num()).sum(dim=0) / known.sum(dim=0)
