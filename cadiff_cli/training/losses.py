"""Losses of the paper's eq. 4: Dice and cross-entropy for the labels, MSE for the field."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.nets.unet import STRIDE, Coarse


@dataclass(frozen=True, eq=False)
class Losses:
    """The parts of a step's loss (scalars); ``total`` is what is minimised."""

    label: Tensor
    coarse: Tensor
    field: Tensor

    COARSE_WEIGHT = 0.5

    @property
    def total(self) -> Tensor:
        """Eq. 4, plus the label loss at 2 mm that intermediate sampling steps rely on."""
        return self.label + self.COARSE_WEIGHT * self.coarse + self.field


def fractions(classes: Tensor, n_classes: int, stride: int = 1) -> Tensor:
    """Class fractions per block: (B, X, Y, Z) int64 -> (B, n_classes, X/s, Y/s, Z/s) float32."""
    b, x, y, z = classes.shape
    s = stride
    blocks = classes.reshape(b, x // s, s, y // s, s, z // s, s).permute(0, 2, 4, 6, 1, 3, 5)
    members = blocks.reshape(b, s**3, x // s, y // s, z // s)
    out = torch.zeros(b, n_classes, *members.shape[2:])
    share = torch.full(members.shape, 1 / s**3)
    return out.scatter_add_(1, members, share)


def dice_ce(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss over the foreground classes present in ``target``, plus cross-entropy.

    ``logits`` and ``target`` (class fractions) are (B, classes, X, Y, Z).  Classes absent from the
    patch have no Dice of their own; cross-entropy pushes them down.
    """
    log_p = logits.float().log_softmax(dim=1)
    cross_entropy = -(target * log_p).sum(dim=1).mean()
    p = log_p.exp()
    space = (2, 3, 4)
    overlap = (p * target).sum(dim=space)
    size = p.sum(dim=space) + target.sum(dim=space)
    present = target.sum(dim=space) > 0
    present[:, 0] = False
    dice = (2 * overlap / size)[present]
    return cross_entropy + (1 - dice).mean() if len(dice) else cross_entropy


def field_mse(estimate: Tensor, field: Tensor) -> Tensor:
    """MSE of the field in [0, 1] units; ``estimate`` is a state in [-1, 1]."""
    return F.mse_loss((estimate + 1) / 2, field)


def central(tensor: Tensor, start: tuple[int, ...], size: int) -> Tensor:
    """The cube of ``size`` voxels at ``start`` of (B, C, X, Y, Z)."""
    x, y, z = start
    return tensor[:, :, x : x + size, y : y + size, z : z + size]


def crop_coarse(coarse: Coarse, start: tuple[int, ...], size: int) -> Coarse:
    """``coarse`` over the cube that begins at fine voxel ``start``, with ``size`` fine voxels."""
    corner = tuple(n // STRIDE for n in start)
    features, field, logits = (
        central(t, corner, size // STRIDE) for t in (coarse.features, coarse.field, coarse.logits)
    )
    return Coarse(features, field, logits)
