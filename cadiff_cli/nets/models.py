"""Networks ready to run, and where they came from.  ``io/models`` reads and writes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.nets.atlas import AtlasNet
from cadiff_cli.nets.brain_mask import BrainNet
from cadiff_cli.nets.condition import ConditionSpace
from cadiff_cli.nets.parcels import ParcelNet
from cadiff_cli.nets.segmenter import CADiffNet
from cadiff_cli.products import Condition, ModelInfo
from cadiff_cli.spatial.grid import Grid, Volume

N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Trained(Generic[N]):
    """A network of one kind.

    ``training`` describes how it was trained (a run's ``config.json``); ``sha256`` is the checksum
    of its file, empty for a network that was not read from one.
    """

    net: N
    name: str = "training"
    sha256: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seen(self) -> set[str]:
        """All people (or sources of heads) that it, or a model it began with, was trained on."""
        kinds = ("trained_on", "also_on", "seen_by_init")
        return {name for kind in kinds for name in self.training.get(kind, ())}


@dataclass(frozen=True, eq=False)
class Model(Trained[CADiffNet]):
    """A network that segments, and the parcellation that it draws."""

    parcellation: Parcellation = field(kw_only=True)

    @property
    def structures(self) -> frozenset[int]:
        """Codes that its training labels held; it was taught never to draw the others."""
        return frozenset(self.training.get("structures") or self.parcellation.codes[1:].tolist())

    @property
    def info(self) -> ModelInfo:
        """The description that its results carry."""
        return ModelInfo(self.name, self.sha256, self.structures)


@dataclass(frozen=True, eq=False)
class BrainModel(Trained[BrainNet]):
    """A network that finds the brain in a whole head."""


@dataclass(frozen=True, eq=False)
class AtlasModel(Trained[AtlasNet]):
    """A network that deforms a base brain into the atlas of a condition.

    ``base`` names the template, ``grid`` is the velocity's grid in its world; ``space`` describes
    the people that it was trained on.  ``labels`` are the base's structures, as codes (int16) on
    its brain's grid.
    """

    base: str = field(kw_only=True)
    grid: Grid = field(kw_only=True)
    space: ConditionSpace = field(kw_only=True)
    labels: Volume = field(kw_only=True)

    def check(self, condition: Condition) -> None:
        """Raise ``UsageError`` for a condition of which the people tell nothing."""
        self.space.check(condition)

    @torch.no_grad()
    def velocity(self, condition: Condition, seed: int | None = None) -> np.ndarray:
        """(3, X, Y, Z) float32 in mm on ``grid``: its exponential takes points of the base there.

        Without a ``seed`` it is the atlas, in the middle of the condition's people.  A seed draws
        the shape of one possible person.  Raises what ``check`` raises.
        """
        self.check(condition)
        conditions = torch.from_numpy(self.space.scaled(condition))[None]
        space = self.net.latent.space
        noise = torch.zeros(1, *space)
        if seed is not None:
            noise = torch.randn(1, *space, generator=torch.Generator().manual_seed(seed))
        return np.asarray(self.net(noise, conditions)[0])


@dataclass(frozen=True, eq=False)
class ParcelModel(Trained[ParcelNet]):
    """A network that names the parcels of the cortex, and the parcellation that has them."""

    parcellation: Parcellation = field(kw_only=True)

    @property
    def info(self) -> ModelInfo:
        """The description that its results carry."""
        return ModelInfo(self.name, self.sha256, frozenset(self.parcellation.codes[1:].tolist()))
