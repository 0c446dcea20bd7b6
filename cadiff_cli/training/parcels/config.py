"""Settings of a training of parcels."""

from dataclasses import dataclass, field
from typing import ClassVar

from cadiff_cli.config import PARCELS
from cadiff_cli.errors import UsageError
from cadiff_cli.nets.parcels import ParcelConfig
from cadiff_cli.training.loop import Schedule


@dataclass(frozen=True)
class ParcelTrainConfig(Schedule):
    """How to train: the schedule, and what a hemisphere goes through.

    A step sees one hemisphere and ``points`` voxels of its cortex.  A share ``moved`` of the
    hemispheres is turned by up to ``rotation_deg`` about each axis, scaled by up to ``scale``, and
    bent smoothly by ``elastic_mm``: structures, parcels and field together.  A share ``together``
    has the mean of the templates' fields, the others one of them; each has a smooth error of
    ``field_error_mm``.  ``dice_weight`` is that of the Dice loss beside the cross-entropy.
    """

    points: int = 20_000
    moved: float = 0.6
    rotation_deg: float = 10.0
    scale: float = 0.1
    elastic_mm: float = 0.0
    together: float = 0.6
    field_error_mm: float = 1.5
    dice_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch != 1:
            raise UsageError(f"batch is {self.batch}", "use 1: hemispheres have different shapes")


@dataclass(frozen=True)
class Training:
    """A training of parcels as a file: its network, its run and its data.

    ``parcellation`` must have parcels with the left and right cortex as parents; ``labels`` is a
    scheme of ids for it.
    """

    kind: ClassVar[str] = "parcels"
    command: ClassVar[str] = "cadiff train-parcels"
    net: ParcelConfig = field(default_factory=ParcelConfig)
    train: ParcelTrainConfig = field(default_factory=ParcelTrainConfig)
    templates: tuple[str, ...] = ("MNIColin27", "MNI152NLin2009aSym")
    parcellation: str = PARCELS
    labels: str = "neuromorphometrics"
