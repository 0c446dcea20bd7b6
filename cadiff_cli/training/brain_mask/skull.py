"""Teach the network of the inner skull: cubes of label maps, painted like heads.

Labels have 1 mm, the images that the network sees 2 mm, as those of all heads.

Real heads do not tell where their skull is; label maps with fluid and bone around a brain do.
Everything is drawn from one ``torch.Generator``, so a cube is a function of its seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset

from cadiff_cli.nets.brain_mask import REACH_MM, SPACING_MM, BrainNet, HeadTissue
from cadiff_cli.training.batch import Batch, Parts, generator_of
from cadiff_cli.training.brain_mask.config import HeadConfig
from cadiff_cli.training.brain_mask.data import Head
from cadiff_cli.training.brain_mask.patches import (
    artefacts,
    behind_end,
    draw_contrast,
    moved_inwards,
    shrink,
)
from cadiff_cli.training.brain_mask.target import FAR_MM
from cadiff_cli.training.transforms import (
    chance,
    lattice,
    nearest,
    read,
    rotation,
    smooth_noise,
    uniform,
)

NEAR_MM = (-12.0, 10.0)
"""Cubes lie around a voxel so near to the brain's border, inside positive."""
HINT_MM = 1.5
"""How far the brain mask that guides the network is off from place to place; as a whole, half."""
BLUR_MM = 2.0
"""Largest full width at half maximum of the blur before means of 2 mm are made: a scan with smaller
voxels is blurred against aliasing, one with voxels of 2 mm is not."""
BORDER_VOXELS = 5
"""Side of the cube around a voxel in which the border makes it count more."""


@dataclass(frozen=True, eq=False)
class SkullPatch(Batch):
    """``image`` (B, 1, n, n, n) in [0, 1] at 2 mm, ``tissue`` (B, 2n, 2n, 2n) int64 at 1 mm.

    ``tissue`` is a ``HeadTissue``.  ``distance`` (B, 1, n, n, n) is that to the brain's border (mm,
    inside positive), as a brain mask tells it.
    """

    image: Tensor
    distance: Tensor
    tissue: Tensor


class SkullDraws(Dataset[SkullPatch]):
    """Cube ``i`` of an endless series: a function of ``seed`` and ``i`` alone."""

    def __init__(self, heads: Sequence[Head], config: HeadConfig) -> None:
        self.heads = heads
        self.config = config

    def __getitem__(self, index: int) -> SkullPatch:
        """Draw a head and a cube of it."""
        generator = generator_of(self.config.seed, index)
        head = self.heads[int(torch.randint(len(self.heads), (1,), generator=generator))]
        return draw_cube(head, self.config, generator)


def draw_cube(head: Head, config: HeadConfig, generator: torch.Generator) -> SkullPatch:
    """Turn, scale and bend a part of a label map, move its skull, and paint it."""
    assert head.labels is not None
    assert head.tissue is not None
    assert head.held is not None
    assert head.skull is not None

    points, zoom = _place(head, config, generator)
    at_2mm = (points - 0.5) / SPACING_MM
    stored = np.stack([head.distance, head.skull]).astype(np.float32)
    brain, skull = (read(torch.from_numpy(stored) + FAR_MM, at_2mm) - FAR_MM) / zoom
    # A brain shrinks, its skull does not.
    within = _at(points, head.held)[0] > 0
    gap = torch.zeros_like(brain)
    fluid, bone = head.fluid, head.bone
    known = fluid is not None and bone is not None
    if known and chance(generator, config.shrunken):
        points, brain, gap = shrink(points, brain, config.shrink_mm, generator, spacing_mm=1.0)
    if known and chance(generator, config.moved_skull):
        points, skull = move_skull(points, skull, brain, config.moved_mm, generator)
        within = skull > 0

    label, was_within = _at(points, head.labels, head.held)
    if fluid is not None and bone is not None:
        label[within & ((gap > 0.5) | (was_within == 0))] = fluid
        label[~within & (was_within > 0)] = bone
    tissue = torch.from_numpy(head.tissue).long()[label]
    tissue[within & (tissue != HeadTissue.BRAIN)] = HeadTissue.FLUID

    image = _painted(label, tissue, head, config, generator)
    if chance(generator, config.zeroed_air):
        image = image * (image > uniform(generator, 0.01, 0.06))
    hint = _at_2mm(_hint(brain, config, generator).clamp(-REACH_MM, REACH_MM))
    return SkullPatch(image[None, None], hint[None, None], tissue[None])


def _at_2mm(volume: Tensor) -> Tensor:
    """Means (n, n, n) of eight voxels each."""
    return F.avg_pool3d(volume[None], 2)[0]


def _hint(brain: Tensor, config: HeadConfig, generator: torch.Generator) -> Tensor:
    """The distance to the brain's border (N, N, N) as the brain mask's network tells it.

    It is a little wrong, and falls to 0 at an end of the field of view, as that network has learnt.
    """
    n = len(brain)
    hint = brain + smooth_noise(HINT_MM, 24.0, n, n, generator)[0]
    hint = hint + HINT_MM / 2 * torch.randn(1, generator=generator)
    if chance(generator, config.cut):
        axis = int(torch.randint(3, (1,), generator=generator))
        last = uniform(generator) >= 0.5
        hint = torch.minimum(hint, behind_end(n, axis, 1.0, 0, last=last))
    return hint


def _at(points: Tensor, *volumes: np.ndarray) -> list[Tensor]:
    """The values (int64) of volumes (X, Y, Z) at the voxels nearest to ``points``; 0 beyond."""
    index, outside = nearest(points, torch.tensor(volumes[0].shape))
    flat = (torch.from_numpy(volume.reshape(-1)) for volume in volumes)
    return [values[index].masked_fill(outside, 0).long() for values in flat]


def _place(head: Head, config: HeadConfig, generator: torch.Generator) -> tuple[Tensor, float]:
    """The voxels of 1 mm at which a cube is read (3, N, N, N), and how large its voxels are."""
    n = config.cube
    near = np.argwhere((head.distance > NEAR_MM[0]) & (head.distance < NEAR_MM[1]))
    chosen = near[int(torch.randint(len(near), (1,), generator=generator))]
    centre = torch.from_numpy(chosen).float() * SPACING_MM + 0.5
    zoom = 1 + config.scale * uniform(generator, -1, 1)
    widest = config.rotation_deg * (1 if chance(generator, config.tilted) else 0.25)
    angles = torch.tensor([uniform(generator, -1, 1) for _ in range(3)])
    matrix = rotation(angles * math.radians(widest)) * zoom
    offsets = lattice(n) - (n - 1) / 2
    bend = smooth_noise(config.elastic_mm, 40.0, n, n, generator)
    points = torch.einsum("ab,bxyz->axyz", matrix, offsets) + bend + centre[:, None, None, None]
    return (points.flip(1) if chance(generator, 0.5) else points), zoom


def move_skull(
    points: Tensor, skull: Tensor, brain: Tensor, widest_mm: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Move the inner skull out or in by 0 to ``widest_mm`` mm, another way in each region.

    How wide the fluid around a brain is then says nothing of the person: only the image tells.
    What is outside moves along, the less, the farther it is.  ``points`` (3, N, N, N) are the
    positions at which the voxels of 1 mm are read, ``skull`` and ``brain`` (N, N, N) distances in
    mm; the skull never cuts the brain.  Returns the new points, and the new distance.
    """
    n = skull.shape[-1]
    whole, part = widest_mm * torch.rand(2, generator=generator)
    sign = 1 if chance(generator, 0.5) else -1
    move = sign * whole + smooth_noise(float(part), 50.0, n, n, generator)[0]
    new = torch.maximum(skull + move.clamp(-widest_mm, widest_mm), torch.minimum(skull, brain))
    shift = torch.where(new > 0, 0, (new - skull) * ((FAR_MM + skull) / FAR_MM).clamp(0, 1))
    return moved_inwards(points, skull, shift, least=0.3), new


def _painted(
    label: Tensor, tissue: Tensor, head: Head, config: HeadConfig, generator: torch.Generator
) -> Tensor:
    """An image at 2 mm of labels at 1 mm: contrast, mixed soft tissue, blur, noise, artefacts."""
    n = config.cube
    contrast = draw_contrast(head, config, generator)
    image = contrast.mean[label]
    if chance(generator, 0.7):
        # Fat and muscle share a label, and so do fat and red marrow.
        wave = smooth_noise(0.25, uniform(generator, 6, 20), n, n, generator)[0]
        mixed = (tissue == HeadTissue.SOFT) | (tissue == HeadTissue.MARROW)
        image = image + wave * mixed * image.clamp(0, 1).sqrt()
    image = image + contrast.spread[label] * torch.randn(image.shape, generator=generator)
    sigma = uniform(generator, 0, BLUR_MM) / 2.355
    image = _at_2mm(torch.from_numpy(ndimage.gaussian_filter(image.numpy(), sigma)).clamp(0, 1))
    # The brightest of a head, by which it is normalised, may be brighter or darker than 1.
    image = (uniform(generator, 0.9, 1.15) * image).clamp(0, 1)
    return artefacts(image, config, generator, whole=False)


@dataclass(frozen=True, eq=False)
class SkullLosses(Parts):
    """Losses of the tissues, and of what the inner skull holds."""

    tissue: Tensor
    held: Tensor


def skull_losses(logits: Tensor, tissue: Tensor) -> SkullLosses:
    """Cross entropy of the tissues, and one less the soft Dice of what the inner skull holds.

    ``logits`` are (B, tissues, N, N, N), ``tissue`` (B, N, N, N).  Fluid, bone, and voxels near the
    border count more.
    """
    log_p = F.log_softmax(logits, dim=1)
    p = log_p[:, HeadTissue.BRAIN].exp() + log_p[:, HeadTissue.FLUID].exp()
    held = ((tissue == HeadTissue.BRAIN) | (tissue == HeadTissue.FLUID)).float()
    around = F.avg_pool3d(
        held[:, None], BORDER_VOXELS, 1, BORDER_VOXELS // 2, count_include_pad=False
    )[:, 0]
    weight = 1 + 3 * ((around > 0.02) & (around < 0.98)).float()
    weight = weight + (tissue == HeadTissue.FLUID) + (tissue == HeadTissue.BONE)
    entropy = weight * F.nll_loss(log_p, tissue, reduction="none")
    overlap = (2 * (p * held).sum() + 1) / (p.square().sum() + held.sum() + 1)
    return SkullLosses(entropy.sum() / weight.sum(), 1 - overlap)


def skull_objective(
    net: BrainNet, patch: SkullPatch, _generator: torch.Generator, _progress: float = 1.0, /
) -> SkullLosses:
    """Losses of one batch of cubes: the network of the inner skull learns alone."""
    return skull_losses(net.tell_tissues(patch.image, patch.distance), patch.tissue)
