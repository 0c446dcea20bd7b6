"""Losses of parcels at points of a cortex."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.training.batch import Parts


@dataclass(frozen=True, eq=False)
class ParcelLosses(Parts):
    """Cross-entropy, and soft Dice with its weight."""

    entropy: Tensor
    dice: Tensor


def parcel_losses(logits: Tensor, truth: Tensor, dice_weight: float) -> ParcelLosses:
    """Losses of ``logits`` (n, parcels) where ``truth`` (n,) are the parcels.

    Dice is the mean over the parcels that are there, so that small ones count as much.
    """
    p = logits.softmax(dim=1)
    own = F.one_hot(truth, logits.shape[1]).to(p.dtype)
    size, overlap = own.sum(dim=0), (p * own).sum(dim=0)
    dice = 2 * overlap / (p.sum(dim=0) + size).clamp(min=1)
    return ParcelLosses(
        F.cross_entropy(logits, truth), dice_weight * (1 - torch.mean(dice[size > 0]))
    )
