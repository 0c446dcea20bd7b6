"""Networks ready to run, and where they came from.  ``io/models`` reads and writes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import nn

from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.nets.brain_mask import BrainNet
from cadiff_cli.nets.segmenter import CADiffNet
from cadiff_cli.products import ModelInfo

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
