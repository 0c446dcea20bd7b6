"""Teach the network of the inner skull: cubes of label maps at 1 mm, painted like heads.

Real heads do not tell where their skull is; label maps with fluid and bone around a brain do.  A
network that knows the skull can draw it in real heads, and another one learns to draw the same in
scans of them with larger voxels.
Everything is drawn from one ``torch.Generator``, so a cube is a function of its seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from cadiff_cli.training.transforms import lattice, nearest, read, rotation, smooth_noise

NEAR_MM = (-12.0, 10.0)
"""Cubes lie around a voxel so near to the brain's border, inside positive."""
HINT_MM = 1.5
"""How far the brain mask that guides the network is off from place to place; as a whole, half."""
ZOOMS_MM = (0.8, 2.2)
"""Voxel sizes of the scans that cubes are parts of (``HeadConfig.large_voxels``)."""
STILL: Mapping[str, Any] = {"scale": 0.0, "rotation_deg": 0.0, "elastic_mm": 0.0}
"""Settings with which a part of a head is neither turned nor scaled nor bent."""
BORDER_VOXELS = 5
"""Side of the cube around a voxel in which the border makes it count more."""


@dataclass(frozen=True, eq=False)
class SkullPatch(Batch):
    """``image`` (B, 1, N, N, N) in [0, 1], ``tissue`` (B, N, N, N) int64, as ``HeadTissue``.

    Where the ``named`` (B,) bool is False, only the inner skull is known: all within is called
    fluid, all outside bone.

    ``distance`` (B, 1, N, N, N) is that to the brain's border (mm, inside positive), as a brain
    mask tells it.  ``zooms`` (B, 3) float32 are the voxel sizes of the scan (mm) that was made of
    the head; the image is what interpolation at 1 mm leaves of it.
    """

    image: Tensor
    distance: Tensor
    zooms: Tensor
    tissue: Tensor
    named: Tensor


class SkullDraws(Dataset[SkullPatch]):
    """Cube ``i`` of an endless series: a function of ``seed`` and ``i`` alone."""

    def __init__(self, heads: Sequence[Head], config: HeadConfig) -> None:
        self.real = [head for head in heads if head.scan is not None]
        self.drawn = [head for head in heads if head.labels is not None]
        self.config = config

    def __getitem__(self, index: int) -> SkullPatch:
        """Draw a head and a cube of it."""
        generator = generator_of(self.config.seed, index)
        use_real = bool(self.real) and _uniform(generator) < self.config.real
        pool = self.real if use_real or not self.drawn else self.drawn
        head = pool[int(torch.randint(len(pool), (1,), generator=generator))]
        draw = draw_cube if head.scan is None else draw_scan
        return draw(head, self.config, generator)


def draw_cube(head: Head, config: HeadConfig, generator: torch.Generator) -> SkullPatch:
    """Turn, scale and bend a part of a label map, move its skull, and paint it at 1 mm."""
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
    if known and _uniform(generator) < config.shrunken:
        points, brain, gap = shrink(points, brain, config.shrink_mm, generator, spacing_mm=1.0)
    if known and _uniform(generator) < config.moved_skull:
        points, skull = move_skull(points, skull, brain, config.moved_mm, generator)
        within = skull > 0

    label, was_within = _at(points, head.labels, head.held)
    if fluid is not None and bone is not None:
        label[within & ((gap > 0.5) | (was_within == 0))] = fluid
        label[~within & (was_within > 0)] = bone
    tissue = torch.from_numpy(head.tissue).long()[label]
    tissue[within & (tissue != HeadTissue.BRAIN)] = HeadTissue.FLUID

    painted = _painted(label, tissue, head, config, generator)
    return _patch(painted, brain, tissue, config, generator)


def draw_scan(head: Head, config: HeadConfig, generator: torch.Generator) -> SkullPatch:
    """Turn, scale and bend a part of a real head whose inner skull is drawn, and scan it anew.

    Half of the parts are copied voxel by voxel, as sharp as they were.
    """
    assert head.scan is not None
    assert head.held is not None
    assert head.zooms is not None
    still = _uniform(generator) < 0.5
    points, zoom = _place(head, replace(config, **STILL) if still else config, generator)
    stored = torch.from_numpy(head.distance.astype(np.float32))[None] + FAR_MM
    brain = (read(stored, (points - 0.5) / SPACING_MM)[0] - FAR_MM) / zoom
    held = _at(points, head.held)[0] > 0
    tissue = torch.where(held, int(HeadTissue.FLUID), int(HeadTissue.BONE))
    image = read(torch.from_numpy(head.scan)[None].float() / 255, points)[0]
    return _patch(image, brain, tissue, config, generator, scan=head.zooms)


def _patch(
    image: Tensor,
    brain: Tensor,
    tissue: Tensor,
    config: HeadConfig,
    generator: torch.Generator,
    scan: np.ndarray | None = None,
) -> SkullPatch:
    """The patch of an image (N, N, N) and of what is known of it: painted, or of a real ``scan``.

    ``scan`` (3,) are the voxel sizes of that (mm).
    """
    image, zooms = scanned(image, config, generator)
    if scan is not None:
        zooms = torch.maximum(zooms, torch.from_numpy(scan))
    # The brightest of a head, by which it is normalised, may be brighter or darker than 1.
    image = (_uniform(generator, 0.9, 1.15) * image).clamp(0, 1)
    image = artefacts(image, config, generator, spacing_mm=1.0, whole=False)
    if _uniform(generator) < config.zeroed_air:
        image = image * (image > _uniform(generator, 0.01, 0.06))
    hint = _hint(brain, config, generator).clamp(-REACH_MM, REACH_MM)
    named = torch.tensor([scan is None])
    return SkullPatch(image[None, None], hint[None, None], zooms[None], tissue[None], named)


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand(1, generator=generator))


def _hint(brain: Tensor, config: HeadConfig, generator: torch.Generator) -> Tensor:
    """The distance to the brain's border (N, N, N) as the brain mask's network tells it.

    It is a little wrong, and falls to 0 at an end of the field of view, as that network has learnt.
    """
    n = len(brain)
    hint = brain + smooth_noise(HINT_MM, 24.0, n, n, generator)[0]
    hint = hint + HINT_MM / 2 * torch.randn(1, generator=generator)
    if _uniform(generator) < config.cut:
        axis = int(torch.randint(3, (1,), generator=generator))
        last = _uniform(generator) >= 0.5
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
    zoom = 1 + config.scale * _uniform(generator, -1, 1)
    widest = config.rotation_deg * (1 if _uniform(generator) < config.tilted else 0.25)
    angles = torch.tensor([_uniform(generator, -1, 1) for _ in range(3)])
    matrix = rotation(angles * math.radians(widest)) * zoom
    offsets = lattice(n) - (n - 1) / 2
    bend = smooth_noise(config.elastic_mm, 40.0, n, n, generator)
    points = torch.einsum("ab,bxyz->axyz", matrix, offsets) + bend + centre[:, None, None, None]
    return (points.flip(1) if _uniform(generator) < 0.5 else points), zoom


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
    sign = 1 if float(torch.rand(1, generator=generator)) < 0.5 else -1
    move = sign * whole + smooth_noise(float(part), 50.0, n, n, generator)[0]
    new = torch.maximum(skull + move.clamp(-widest_mm, widest_mm), torch.minimum(skull, brain))
    shift = torch.where(new > 0, 0, (new - skull) * ((FAR_MM + skull) / FAR_MM).clamp(0, 1))
    return moved_inwards(points, skull, shift, least=0.3), new


def _painted(
    label: Tensor, tissue: Tensor, head: Head, config: HeadConfig, generator: torch.Generator
) -> Tensor:
    """An image (N, N, N) of labels: contrast, mixed soft tissue, blur and noise."""
    n = config.cube
    contrast = draw_contrast(head, config, generator)
    image = contrast.mean[label]
    if _uniform(generator) < 0.7:
        # Fat and muscle share a label, and so do fat and red marrow.
        wave = smooth_noise(0.25, _uniform(generator, 6, 20), n, n, generator)[0]
        mixed = (tissue == HeadTissue.SOFT) | (tissue == HeadTissue.MARROW)
        image = image + wave * mixed * image.clamp(0, 1).sqrt()
    image = torch.from_numpy(ndimage.gaussian_filter(image.numpy(), _uniform(generator, 0.35, 0.8)))
    # In the border's blur, voxels of the image are less noisy than the labels' own.
    image = image + 0.6 * contrast.spread[label] * torch.randn(image.shape, generator=generator)
    return image.clamp(0, 1)


def scanned(image: Tensor, config: HeadConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The image (N, N, N) as a scan with other voxels gives it, and their sizes (3,) in mm.

    Voxels are cubes or, less often, thick slices.
    """
    if _uniform(generator) >= config.large_voxels:
        return image, torch.ones(3)
    n = len(image)
    wanted = [_uniform(generator, *ZOOMS_MM)] * 3
    if _uniform(generator) < 0.15:
        wanted = [_uniform(generator, 0.9, 1.2)] * 3
        axis = int(torch.randint(3, (1,), generator=generator))
        wanted[axis] = _uniform(generator, 1, config.slice_mm)
    size = [round(n / zoom) for zoom in wanted]
    zooms = [n / count for count in size]
    # Means of whole voxels (mode "area") would lie up to half a voxel off.
    width = _uniform(generator, 0, 1.1)  # full width at half maximum, in voxels
    sigma = [width * math.sqrt(max(zoom**2 - 1, 0)) / 2.355 for zoom in zooms]
    smooth = torch.from_numpy(ndimage.gaussian_filter(image.numpy(), sigma, mode="nearest"))
    scan = F.interpolate(smooth[None, None], size=size, mode="trilinear")
    back = F.interpolate(scan, size=(n,) * 3, mode="trilinear")[0, 0]
    return back, torch.tensor(zooms)


@dataclass(frozen=True, eq=False)
class SkullLosses(Parts):
    """Losses of the tissues, and of what the inner skull holds."""

    tissue: Tensor
    held: Tensor


def skull_losses(logits: Tensor, tissue: Tensor, named: Tensor) -> SkullLosses:
    """Cross entropy of the tissues, and one less the soft Dice of what the inner skull holds.

    ``logits`` are (B, tissues, N, N, N), ``tissue`` (B, N, N, N).  Fluid, bone, and voxels near the
    border count more.  Where tissues are not ``named`` (B,), the cross entropy is that of two:
    held or not.
    """
    log_p = F.log_softmax(logits, dim=1)
    within = log_p[:, [HeadTissue.BRAIN, HeadTissue.FLUID]].logsumexp(dim=1)
    p = within.exp()
    held = ((tissue == HeadTissue.BRAIN) | (tissue == HeadTissue.FLUID)).float()
    around = F.avg_pool3d(
        held[:, None], BORDER_VOXELS, 1, BORDER_VOXELS // 2, count_include_pad=False
    )[:, 0]
    weight = 1 + 3 * ((around > 0.02) & (around < 0.98)).float()
    known = named.reshape(-1, 1, 1, 1)
    weight = weight + known * ((tissue == HeadTissue.FLUID) | (tissue == HeadTissue.BONE))
    outside = log_p[
        :, [HeadTissue.AIR, HeadTissue.BONE, HeadTissue.MARROW, HeadTissue.SOFT]
    ].logsumexp(dim=1)
    of_two = -torch.where(held > 0, within, outside)
    entropy = weight * torch.where(known, F.nll_loss(log_p, tissue, reduction="none"), of_two)
    overlap = (2 * (p * held).sum() + 1) / (p.square().sum() + held.sum() + 1)
    return SkullLosses(entropy.sum() / weight.sum(), 1 - overlap)


def skull_objective(
    net: BrainNet, patch: SkullPatch, _generator: torch.Generator, _progress: float = 1.0, /
) -> SkullLosses:
    """Losses of one batch of cubes: the network of the inner skull learns alone."""
    logits = net.tell_tissues(patch.image, patch.distance, patch.zooms)
    return skull_losses(logits, patch.tissue, patch.named)
