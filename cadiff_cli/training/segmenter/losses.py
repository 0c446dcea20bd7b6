"""Losses of the paper: eq. 4 (Dice, cross-entropy, field MSE) and eqs. 5-8 (consistency)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.errors import UsageError
from cadiff_cli.nets.segmenter import FIELD_STD, STRIDE, Coarse
from cadiff_cli.training.batch import Parts


@dataclass(frozen=True, eq=False)
class Losses(Parts):
    """The parts of a step's loss (scalars), weighted; ``total`` is what is minimised (eq. 8)."""

    label: Tensor
    coarse: Tensor
    field: Tensor
    consistency: Tensor


def dice_ce(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss over the foreground classes present in ``target``, plus cross-entropy.

    ``logits`` and ``target`` (class fractions) are (B, classes, X, Y, Z).  Classes absent from the
    patch have no Dice of their own; cross-entropy pushes them down.
    """
    log_p = logits.float().log_softmax(dim=1)
    cross_entropy = -(target * log_p).sum(dim=1).mean()
    p = log_p.exp()
    space = (2, 3, 4)
    return cross_entropy + _dice((p * target).sum(space), p.sum(space), target.sum(space))


def dice_ce_of_classes(logits: Tensor, classes: Tensor) -> Tensor:
    """``dice_ce`` where each voxel is of one class, (B, X, Y, Z) int64: half of its time.

    No one-hot tensors are made: overlaps are sums of the probability of the voxel's own class.
    The logits of a voxel lie together in ``channels_last_3d`` memory, where softmax is fast.
    """
    n = logits.shape[1]
    log_p = logits.permute(0, 2, 3, 4, 1).flatten(1, 3).float().log_softmax(dim=2)
    drawn = classes.flatten(1)
    own = log_p.gather(2, drawn[..., None])[..., 0]
    nothing = own.new_zeros(len(own), n)
    overlap = nothing.scatter_add(1, drawn, own.exp())
    counts = nothing.scatter_add(1, drawn, torch.ones_like(own))
    return -own.mean() + _dice(overlap, log_p.exp().sum(dim=1), counts)


def _dice(overlap: Tensor, expected: Tensor, drawn: Tensor) -> Tensor:
    """Soft Dice loss of (B, classes) sums over space, where a foreground class is drawn."""
    present = drawn > 0
    present[:, 0] = False
    dice = (2 * overlap / (expected + drawn))[present]
    return (1 - dice).mean() if len(dice) else dice.sum()


def field_mse(estimate: Tensor, field: Tensor) -> Tensor:
    """MSE of the field, in units of its variance over a brain.

    ``estimate`` is a state in [-1, 1], ``field`` in [0, 1].  Knowing nothing but the mean scores
    about 1, as large as a Dice loss: in the field's own units the term would be lost beside it.
    """
    return F.mse_loss(estimate, 2 * field - 1) / FIELD_STD**2


def cosine_similarity(p: Tensor, q: Tensor) -> Tensor:
    """Eq. 6: mean over voxels of the cosine between class probabilities (B, K, ...) -> (B,).

    torch's own divides every class by the norm; here each voxel has one division.
    """
    sizes = p.square().sum(dim=1) * q.square().sum(dim=1)
    return ((p * q).sum(dim=1) / sizes.sqrt()).flatten(1).mean(dim=1)


def dice_similarity(p: Tensor, q: Tensor) -> Tensor:
    """The alternative of Table IV: soft Dice over the foreground classes, (B, K, ...) -> (B,)."""
    p, q = p[:, 1:].flatten(2), q[:, 1:].flatten(2)
    overlap, size = (p * q).sum(dim=(1, 2)), (p.square() + q.square()).sum(dim=(1, 2))
    return 2 * overlap / size.clamp(min=1e-6)


SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine_similarity,
    "dice": dice_similarity,
}


@dataclass(frozen=True)
class Consistency:
    """The spatial-anatomical consistency loss, eqs. 5-8, at 2 mm.

    Where the paper is silent: its "predicted logits" are our class probabilities, whose cosine
    lies in [0, 1] as a cross-entropy needs (that of raw logits can be negative); both similarities
    are kept 1e-3 away from 0 and 1; the gradient flows through both.  A pair of patches is a pair
    of octants of the patches in the batch, matched by a random rotation of their list, so pairs
    come from one person or from two, as the batch has it.
    """

    similarity: str = "cosine"
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Raise ``UsageError`` for a similarity that is not known."""
        if self.similarity not in SIMILARITIES:
            raise UsageError(
                f"similarity is {self.similarity!r}", f"use {' or '.join(SIMILARITIES)}"
            )

    def __call__(self, coarse: Coarse, shift: int) -> Tensor:
        """Weighted loss; octant i is compared with octant i + ``shift`` (of 8 B)."""
        field = octants((coarse.field + 1) / 2)
        p = octants(coarse.logits.float().softmax(dim=1))
        distance = (field - field.roll(shift, 0)).square().mean(dim=1)
        sim_d = 1 - (distance + 1e-8).sqrt().flatten(1).mean(dim=1)
        sim_m = SIMILARITIES[self.similarity](p, p.roll(shift, 0))
        sim_d, sim_m = (s.clamp(1e-3, 1 - 1e-3) for s in (sim_d, sim_m))
        # binary_cross_entropy gives no gradient to its target; eq. 7 as it stands does.
        loss = -(sim_m * sim_d.log() + (1 - sim_m) * (1 - sim_d).log())
        return self.weight * loss.mean()


def octants(volume: Tensor) -> Tensor:
    """(B, C, X, Y, Z) -> (8 B, C, X/2, Y/2, Z/2)."""
    b, c, *size = volume.shape
    x, y, z = (n // 2 for n in size)
    parts = volume.reshape(b, c, 2, x, 2, y, 2, z).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return parts.reshape(8 * b, c, x, y, z)


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
