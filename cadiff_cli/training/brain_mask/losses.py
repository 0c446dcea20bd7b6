"""The loss of a signed distance."""

from dataclasses import dataclass

from torch import Tensor

from cadiff_cli.nets.brain_mask import REACH_MM
from cadiff_cli.training.batch import Parts


@dataclass(frozen=True, eq=False)
class MaskLosses(Parts):
    """Losses of the two parts of the cascade."""

    coarse: Tensor
    fine: Tensor


def distance_loss(estimate: Tensor, truth: Tensor) -> Tensor:
    """L1 of a distance (in units of the reach) and soft Dice of its sigmoid (1 mm wide)."""
    # At the end of the reach, any larger distance on the same side is correct.
    far = (truth.abs() >= REACH_MM) & (estimate * truth.sign() > REACH_MM)
    error = (estimate - truth).abs().masked_fill(far, 0)
    p, q = estimate.sigmoid(), (truth > 0).float()
    dice = (2 * (p * q).sum() + 1) / (p.sum() + q.sum() + 1)
    return error.mean() / REACH_MM + 0.5 * (1 - dice)
