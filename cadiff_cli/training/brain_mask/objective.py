"""The objective of the brain mask's training: the brain's border, in a cascade."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.nets.brain_mask import BrainNet
from cadiff_cli.training.brain_mask.losses import MaskLosses, distance_loss
from cadiff_cli.training.brain_mask.patches import HeadPatch

Cube = Callable[[Tensor, int], Tensor]
"""Cuts the same cube from volumes of either resolution: the scale is 1 at 4 mm, 2 at 2 mm."""


@dataclass(frozen=True)
class MaskObjective:
    """Train the first network on whole heads, the second on a random cube of ``fine`` voxels."""

    fine: int

    def __call__(
        self, net: BrainNet, patch: HeadPatch, generator: torch.Generator, _progress: float = 1.0
    ) -> MaskLosses:
        """Losses of one batch of heads; the cube lies around a random voxel of a brain."""
        located = net.locate(patch.image)
        coarse = distance_loss(located, F.avg_pool3d(patch.distance, 2))
        cube = _cube(patch, self.fine, generator)
        estimate = net.refine(cube(patch.image, 2), cube(located.detach(), 1))
        return MaskLosses(coarse, distance_loss(estimate, cube(patch.distance, 2)))


def locating_objective(
    net: BrainNet, patch: HeadPatch, _generator: torch.Generator, _progress: float = 1.0, /
) -> MaskLosses:
    """Train the first network alone, on heads with voxels of 4 mm: its output guides the second."""
    coarse = distance_loss(net.locate_at_4mm(patch.image), patch.distance)
    return MaskLosses(coarse, torch.zeros_like(coarse))


def _cube(patch: HeadPatch, voxels: int, generator: torch.Generator) -> Cube:
    """Choose a cube of 2 mm ``voxels`` around a random voxel of a brain, or anywhere without one.

    Its corner is even: both resolutions share it.
    """
    size = min(voxels, patch.image.shape[-1])
    inside = torch.nonzero(patch.distance[:, 0] > 0)[:, 1:]
    if not len(inside):
        inside = torch.nonzero(patch.distance[0, 0] > -torch.inf)
    pick = torch.randint(len(inside), (1,), generator=generator, device=generator.device)
    corner = (inside[pick][0] - size // 2).clamp(0, patch.image.shape[-1] - size) // 2

    def cut(volume: Tensor, scale: int) -> Tensor:
        for axis, start in enumerate(corner.tolist(), 2):
            volume = volume.narrow(axis, start * scale, size // 2 * scale)
        return volume

    return cut
