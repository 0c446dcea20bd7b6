"""Settings for training a conditional atlas."""

from dataclasses import dataclass, field
from typing import ClassVar

from cadiff_cli.errors import UsageError
from cadiff_cli.nets.atlas import AtlasConfig
from cadiff_cli.training.loop import Schedule


@dataclass(frozen=True)
class PeopleConfig(Schedule):
    """How to learn from few people.

    With ``centred``, a linear latent space has its origin at the kernel regression of a condition.
    ``hold_out`` is the share of people left out, spread over age and source; a source with people
    in ``leave_out`` (labels ``folder/sub-X``) leaves out those alone.  Conditions get noise of
    standard deviation ``jitter`` (ages and ventricles are scaled to 0..1), and each number is
    hidden with probability ``hidden``: a network that saw exact ages would know people by theirs.

    The first ``atlases`` draws of each batch make an atlas.  Morphology is preserved over
    ``neighbours`` people, drawn with the weights of kernel regression.  ``preserve = "centre"``
    demands it of the atlas (noise of 0) alone, ``"samples"`` of every sample, as the paper does.
    ``morphology``, ``volumes`` (log shares of the brain of ``data.STRUCTURES``, as the neighbours
    have them), ``smoothness`` and ``kl`` weigh losses; the first ``autoencoder_steps`` train the
    autoencoder alone, if there is one.
    """

    steps: int = 3000
    decay: int = 1000
    rate: float = 1e-3
    batch: int = 8
    atlases: int = 1
    centred: bool = True
    hold_out: float = 0.2
    leave_out: tuple[str, ...] = ()
    jitter: float = 0.05
    hidden: float = 0.3
    neighbours: int = 15
    preserve: str = "centre"
    morphology: float = 1.0
    volumes: float = 300.0
    smoothness: float = 0.1
    kl: float = 1e-6
    autoencoder_steps: int = 0

    def __post_init__(self) -> None:
        """Raise ``UsageError`` for a share or a word that is not allowed."""
        super().__post_init__()
        if not 0 <= self.hold_out < 1:
            raise UsageError(f"hold_out is {self.hold_out}", "use 0 or more, and less than 1")
        if self.preserve not in ("centre", "samples"):
            raise UsageError(f"preserve is {self.preserve!r}", "use 'centre' or 'samples'")


@dataclass(frozen=True)
class Training:
    """A training of an atlas as a file: its base template, network and run.

    ``spacing_mm`` is that of the velocity grid; the shape in ``net`` follows from it and the base,
    and the number of people from those who are learnt from.
    """

    kind: ClassVar[str] = "atlas"
    command: ClassVar[str] = "cadiff atlas train"
    base: str = "MNI152NLin2009aSym"
    spacing_mm: float = 4.0
    net: AtlasConfig = field(default_factory=AtlasConfig)
    train: PeopleConfig = field(default_factory=PeopleConfig)
