"""Settings of a training of the segmenter, by method."""

from dataclasses import dataclass, field, replace
from typing import Any

from cadiff_cli.errors import UsageError
from cadiff_cli.nets.unet import NetConfig
from cadiff_cli.training.loop import Schedule
from cadiff_cli.training.segmenter.objective import METHODS, Objective
from cadiff_cli.training.segmenter.patches import AugmentConfig


@dataclass(frozen=True)
class TrainConfig(Schedule):
    """How to train CA-Diff: the schedule, the objective and what patches go through.

    Patches have ``patch`` voxels a side; a share ``also_share`` of them is from scans whose labels
    are trusted less (a machine's, of other scanners), if there are any.  The label prior is counted
    over ``prior_scans`` of the others, drawn by the seed, or over all of them (None); over none, it
    says nothing.
    """

    patch: int = 96
    also_share: float = 0.3
    prior_scans: int | None = None
    objective: Objective = field(default_factory=Objective)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch < 64 or self.patch % 32:
            # Below 64 the deepest level is 2 voxels wide, where torch's bfloat16 gradients fail.
            raise UsageError(f"patch is {self.patch}", "use 64 or more, a multiple of 32")


def recipe(
    method: str = "cadiff",
    synthetic: float | None = None,
    steps: int = TrainConfig.steps,
    decay: int | None = None,
    **settings: Any,
) -> tuple[NetConfig, TrainConfig]:
    """Network and training settings of a named method; ``settings`` are ``TrainConfig``'s own.

    ``synthetic`` is the share of patches with resampled contrast, if not the method's own.
    The rate falls over the last third of a run that is shorter than three usual ``decay``s.
    """
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}", f"choose from {', '.join(METHODS)}")
    chosen = METHODS[method]
    augment = chosen.augment
    if synthetic is not None:
        augment = replace(augment, synthesis=replace(augment.synthesis, share=synthetic))
    return chosen.net, TrainConfig(
        objective=chosen.objective,
        steps=steps,
        decay=decay or max(1, min(TrainConfig.decay, steps // 3)),
        prior_scans=chosen.prior_scans,
        augment=augment,
        **settings,
    )
