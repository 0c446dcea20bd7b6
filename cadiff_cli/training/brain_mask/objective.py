"""The objective of the brain mask's training."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.nets.brain_mask import BrainNet
from cadiff_cli.training.brain_mask.losses import MaskLosses, distance_loss
from cadiff_cli.training.brain_mask.patches import HeadPatch


@dataclass(frozen=True)
class MaskObjective:
    """Train the first network on whole heads, the second on a random cube of ``fine`` voxels.

    With ``fine`` 0 only the first one learns: it is faster, and its output is the second's input.
    """

    fine: int = 80

    def __call__(
        self, net: BrainNet, patch: HeadPatch, generator: torch.Generator, _progress: float = 1.0
    ) -> MaskLosses:
        """Losses of one batch of heads; the cube lies around a random voxel of a brain."""
        located = net.locate(patch.image)
        coarse = distance_loss(located, F.avg_pool3d(patch.distance, 2))
        size = min(self.fine, patch.image.shape[-1])
        if not size:
            return MaskLosses(coarse, torch.zeros_like(coarse))
        # The corner is even: both resolutions share it.
        inside = torch.nonzero(patch.distance[:, 0] > 0)[:, 1:]
        if not len(inside):
            inside = torch.nonzero(patch.distance[0, 0] > -torch.inf)
        pick = torch.randint(len(inside), (1,), generator=generator, device=generator.device)
        corner = (inside[pick][0] - size // 2).clamp(0, patch.image.shape[-1] - size) // 2

        def cube(volume: Tensor, voxels: int, scale: int) -> Tensor:
            for axis, start in enumerate(corner.tolist(), 2):
                volume = volume.narrow(axis, start * scale, voxels)
            return volume

        hint = cube(located.detach(), size // 2, 1)
        estimate = net.refine(cube(patch.image, size, 2), hint)
        return MaskLosses(coarse, distance_loss(estimate, cube(patch.distance, size, 2)))
