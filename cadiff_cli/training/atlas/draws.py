"""Random people and neighbourhoods: a draw is a function of its number.

The paper rounds conditions to tenths; here they get noise, which says the same to a network: who is
near in condition counts.  Each number is hidden at times, so that any may be missing later.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cadiff_cli.nets.condition import ConditionSpace
from cadiff_cli.spatial.deformation import exponential
from cadiff_cli.training.atlas.config import PeopleConfig
from cadiff_cli.training.atlas.data import Sitter
from cadiff_cli.training.batch import Batch, generator_of

FAR = 1.0
"""Distance of two conditions that differ in sex, or of which one is unknown."""


@dataclass(frozen=True, eq=False)
class PeopleBatch(Batch):
    """People, and neighbourhoods for an atlas.

    ``velocity`` (B, 3, X, Y, Z) in mm of people with ``condition`` (B, 3); for an atlas of the
    condition ``wanted`` (B, 3), ``neighbours`` (B, 3, X, Y, Z) is the mean displacement in mm from
    the base to people near it.
    """

    velocity: Tensor
    condition: Tensor
    wanted: Tensor
    neighbours: Tensor


class PeopleDraws(Dataset[PeopleBatch]):
    """Draw ``i`` of an endless series: a function of ``seed`` and ``i`` alone."""

    def __init__(
        self,
        people: Sequence[Sitter],
        space: ConditionSpace,
        zooms_mm: Sequence[float],
        config: PeopleConfig,
    ) -> None:
        self.conditions = torch.from_numpy(np.stack([space.scaled(p.condition) for p in people]))
        self.velocities = torch.from_numpy(np.stack([p.velocity_mm for p in people]))
        self.displacements = torch.cat(
            [exponential(v[None].float(), zooms_mm).half() for v in self.velocities]
        )
        self.config = config

    def __getitem__(self, index: int) -> PeopleBatch:
        """Draw a person, a condition and its neighbourhood."""
        generator = generator_of(self.config.seed, index)
        person, other = torch.randint(len(self.conditions), (2,), generator=generator).tolist()
        wanted = self.blurred(other, generator)
        near = self.near(wanted)
        chosen = near[torch.randperm(len(near), generator=generator)[: self.config.neighbours]]
        return PeopleBatch(
            self.velocities[person][None].float(),
            self.blurred(person, generator)[None],
            wanted[None],
            self.displacements[chosen].float().mean(dim=0, keepdim=True),
        )

    def blurred(self, person: int, generator: torch.Generator) -> Tensor:
        """(3,): a person's condition with noise, some numbers hidden."""
        noise = self.config.jitter * torch.randn(3, generator=generator)
        noise[1] = 0.0  # nobody is between the sexes
        hidden = torch.rand(3, generator=generator) < self.config.hidden
        blurred = (self.conditions[person] + noise).clamp(0, 1)
        return blurred.masked_fill(hidden, torch.nan)

    def near(self, wanted: Tensor) -> Tensor:
        """Indices of the people near a condition (3,), at least as many as neighbours are drawn."""
        known = wanted.isfinite()
        if not known.any():
            return torch.arange(len(self.conditions))
        apart = (self.conditions[:, known] - wanted[known]).abs().nan_to_num(FAR)
        distance = apart.max(dim=1).values
        enough = min(self.config.neighbours, len(distance))
        # The distance widens step by step until there are enough.
        needed = float(distance.sort().values[enough - 1])
        steps = max(1, int(np.ceil(needed / self.config.near - 1e-6)))
        return (distance <= steps * self.config.near + 1e-6).nonzero()[:, 0]
