"""Random patches of whole heads: image and distance move together.

Everything is drawn from one ``torch.Generator``, so a patch is a function of its seed.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import monai.transforms as mt
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset

from cadiff_cli.nets.brain_mask import REACH_MM, SPACING_MM, HeadTissue
from cadiff_cli.stages.brain_mask import normalise_head
from cadiff_cli.training.batch import Batch, generator_of
from cadiff_cli.training.brain_mask.config import HeadConfig
from cadiff_cli.training.brain_mask.data import Head, half
from cadiff_cli.training.brain_mask.target import FAR_MM
from cadiff_cli.training.transforms import (
    chance,
    lattice,
    low_resolution,
    read,
    rotation,
    smooth_noise,
    thicken,
    uniform,
    uniforms,
)


@dataclass(frozen=True, eq=False)
class HeadPatch(Batch):
    """``image`` (B, 1, N, N, N) in [0, 1]; ``distance`` (B, 1, N, N, N) in mm, within the reach.

    Voxels have 2 mm, or the 4 mm of the network that locates the brain.
    """

    image: Tensor
    distance: Tensor


class HeadDraws(Dataset[HeadPatch]):
    """Patch ``i`` of an endless series: a function of ``seed`` and ``i`` alone.

    A source is drawn in proportion to the square root of its number of heads, so that neither large
    nor small sources dominate.  With ``halved`` a patch covers as much, in voxels of 4 mm: it costs
    an eighth.
    """

    def __init__(self, heads: Sequence[Head], config: HeadConfig, *, halved: bool = False) -> None:
        self.spacing_mm = (2 if halved else 1) * SPACING_MM
        chosen = [half(h) for h in heads] if halved else heads
        self.real = [h for h in chosen if h.image is not None]
        self.drawn = [h for h in chosen if h.labels is not None]
        self.config = config

    def __getitem__(self, index: int) -> HeadPatch:
        """Draw a source, one of its heads and a patch, or a patch without a head."""
        generator = generator_of(self.config.seed, index)
        if chance(generator, self.config.empty):
            return draw_nothing(self.config, generator, self.spacing_mm)
        use_real = chance(generator, self.config.real)
        pool = (self.real if use_real else self.drawn) or self.real or self.drawn
        of_source = Counter(h.source for h in pool)
        weights = torch.tensor([of_source[h.source] ** -0.5 for h in pool])
        head = pool[int(torch.multinomial(weights, 1, generator=generator))]
        return draw_head(head, self.config, generator, self.spacing_mm)


def draw_head(
    head: Head, config: HeadConfig, generator: torch.Generator, spacing_mm: float = SPACING_MM
) -> HeadPatch:
    """Rotate, scale and bend a head; add contrast, artefacts and a field of view.

    ``spacing_mm`` is that of the head's voxels, and of the patch's.
    """
    n = _side(config, spacing_mm)
    centre = (
        torch.from_numpy(head.centre)
        + uniforms(generator, -1, 1, 3) * config.off_centre_mm / spacing_mm
    )
    zoom = 1 + config.scale * uniform(generator, -1, 1)
    if chance(generator, config.small):
        zoom /= uniform(generator, config.smallest, 1)
    widest = config.rotation_deg if chance(generator, config.tilted) else config.rotation_deg / 4
    matrix = rotation(uniforms(generator, -1, 1, 3) * math.radians(widest)) * zoom
    if chance(generator, config.turned):
        matrix = matrix @ rotation(torch.randint(4, (3,), generator=generator) * math.pi / 2)
    offsets = lattice(n) - (n - 1) / 2
    bend = smooth_noise(config.elastic_mm / spacing_mm, 40.0 / spacing_mm, n, n, generator)
    points = torch.einsum("ab,bxyz->axyz", matrix, offsets) + bend + centre[:, None, None, None]
    if chance(generator, 0.5):
        points = points.flip(1)

    stored = torch.from_numpy(head.distance.astype(np.float32))[None] + FAR_MM
    distance = (read(stored, points)[0] - FAR_MM) / zoom
    rim = torch.zeros_like(distance)
    if chance(generator, config.shrunken):
        points, distance, rim = shrink(points, distance, config.shrink_mm, generator, spacing_mm)
    if head.image is not None:
        image = read(torch.from_numpy(head.image)[None].float() / 255, points)[0]
    else:
        contrast = draw_contrast(head, config, generator)
        image = painted(head, points, contrast, generator, spacing_mm)
        if rim.any() and head.fluid is not None:
            noise = contrast.spread[head.fluid] * torch.randn(image.shape, generator=generator)
            image = image + rim * (contrast.mean[head.fluid] + noise - image)
            rim = torch.zeros_like(rim)
    if rim.any():
        # Dark in a real scan, like its own ventricles; of any brightness without labels of fluid.
        share = uniform(generator) * (0.1 if head.image is not None else 1.0)
        level = float(image[distance > 0].quantile(share)) if (distance > 0).any() else 0.0
        speckle = 0.03 * torch.randn(image.shape, generator=generator)
        image = image + rim * (level + speckle - image)
    if chance(generator, config.bright_scalp):
        image = _spin_echo(image, distance, generator)
    image = artefacts(image, config, generator, spacing_mm)
    if chance(generator, config.stripped):
        # Programs strip more or less widely: the mask follows their border.
        distance = distance - uniform(generator, -6, 1)
        image = image * (distance > 0)
    elif chance(generator, config.zeroed_air):
        image = image * (image > uniform(generator, 0.02, 0.12))
    elif chance(generator, config.noisy_air):
        noise = uniform(generator, 0.3, 1) * torch.rand(image.shape, generator=generator)
        image = torch.where(F.avg_pool3d(image[None], 3, 1, 1)[0] < 0.08, noise, image)
    if chance(generator, config.deface):
        image = _deface(image, distance, generator)
    if chance(generator, config.cut):
        image, distance = _cut(image, distance, generator, spacing_mm)
    return HeadPatch(image[None, None], distance.clamp(-REACH_MM, REACH_MM)[None, None])


def _side(config: HeadConfig, spacing_mm: float) -> int:
    """Voxels along a side of a patch."""
    return round(config.patch * SPACING_MM / spacing_mm)


def shrink(
    points: Tensor,
    distance: Tensor,
    widest_mm: float,
    generator: torch.Generator,
    spacing_mm: float = SPACING_MM,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shrink a brain at its border by 0 to ``widest_mm`` mm, different in each region (atrophy).

    ``points`` (3, N, N, N) are the positions at which the patch's voxels are read, ``distance``
    (N, N, N) is that to the border in mm.  Returns the new points and distance, and the share (0 to
    1) of each voxel in the gap between the old and the new border.  Near the border the image moves
    by the whole width, deep inside not at all.
    """
    n = distance.shape[-1]
    wave = smooth_noise(1.0, 40.0 / spacing_mm, n, n, generator)[0]
    wave = (1.5 * wave / wave.std().clamp(min=1e-6)).sigmoid()
    width = widest_mm * torch.rand(1, generator=generator) * wave
    move = width * ((FAR_MM - distance) / (FAR_MM - width)).clamp(0, 1)
    move = torch.where(distance < 0, 0, move)
    # A voxel that the old border cuts stays: otherwise a shell of skull would mark the border.
    shift = torch.where(distance < spacing_mm / 2, 0, move)
    points = moved_inwards(points, distance, -shift / spacing_mm, least=1e-3)
    new = torch.where(distance < 0, distance - width, distance - move)
    before, after = ((0.5 + d / spacing_mm).clamp(0, 1) for d in (distance, new))
    return points, new, before - after


def moved_inwards(points: Tensor, distance: Tensor, voxels: Tensor, least: float) -> Tensor:
    """``points`` (3, N, N, N) of a cube, each read so many ``voxels`` farther inside a border.

    ``voxels`` and the signed ``distance`` to the border are (N, N, N).  The way is shorter where
    the distance rises by less than ``least`` a voxel.
    """
    smooth = F.avg_pool3d(distance[None], 3, 1, 1, count_include_pad=False)[0]
    inwards = torch.stack(torch.gradient(smooth))
    inwards = inwards / inwards.square().sum(dim=0).sqrt().clamp(min=least)
    return read(points, lattice(distance.shape[-1]) + voxels * inwards, padding="border")


def behind_end(size: int, axis: int, spacing_mm: float, missing: int, *, last: bool) -> Tensor:
    """How far (mm) voxels lie behind an end of the field of view, to broadcast over (N, N, N).

    ``missing`` voxels are cut off at the first end of an ``axis``, or at the ``last``.
    """
    inside_mm = spacing_mm * (torch.arange(size) - missing + 0.5)
    view = [1, 1, 1]
    view[axis] = -1
    return (inside_mm.flip(0) if last else inside_mm).reshape(view)


def draw_nothing(
    config: HeadConfig, generator: torch.Generator, spacing_mm: float = SPACING_MM
) -> HeadPatch:
    """Draw an image without a brain: noise or texture in an ellipsoid, everywhere, or along a ramp.

    A network that was trained without such images finds a litre of brain in noise.
    """
    n = _side(config, spacing_mm)

    image = torch.zeros(n, n, n)
    pure = chance(generator, 0.3)
    for amount in (1.0, uniform(generator)):
        side = n if pure else round(2 ** uniform(generator, 1, math.log2(n)))
        coarse = torch.rand(1, 1, side, side, side, generator=generator)
        image += amount * F.interpolate(coarse, size=(n, n, n), mode="trilinear")[0, 0]
    image = uniform(generator) + uniform(generator) * image
    axis = torch.linspace(-1, 1, n)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    view = (3, 1, 1, 1)
    kind = uniform(generator)
    if kind < 0.6:
        centre, radii = uniforms(generator, -0.3, 0.3, 3), uniforms(generator, 0.2, 1.0, 3)
        inside = ((points - centre.view(view)) / radii.view(view)).square().sum(dim=0) < 1
        image = torch.where(inside, image, 0.05 * torch.rand(n, n, n, generator=generator))
    elif kind < 0.8:
        image = image * (1 + (points * uniforms(generator, -1, 1, 3).view(view)).sum(dim=0))
    image = artefacts((image / image.max()).clamp(0, 1), config, generator, spacing_mm)
    nowhere = torch.full((1, 1, n, n, n), -REACH_MM)
    return HeadPatch(image[None, None], nowhere)


@dataclass(frozen=True, eq=False)
class Contrast:
    """Of each label (n,): the mean of its brightness, and the standard deviation of its voxels."""

    mean: Tensor
    spread: Tensor


def draw_contrast(head: Head, config: HeadConfig, generator: torch.Generator) -> Contrast:
    """Draw the contrast of a head with labels: like T1 in a share ``t1`` of them, else random."""
    assert head.labels is not None
    like_t1 = chance(generator, config.t1)
    if like_t1 and head.t1 is not None:
        return t1_contrast(torch.from_numpy(head.t1), generator, config.t1_spread)
    return random_contrast(int(head.labels.max()) + 1, generator)


def random_contrast(n: int, generator: torch.Generator) -> Contrast:
    """Draw a random mean and texture for each of ``n`` labels; 0 is air.

    In some images labels share a few tissues, so that borders within the brain vanish as in real
    images.
    """
    means = torch.rand(n, generator=generator)
    if chance(generator, 0.5):
        tissues = torch.rand(5, generator=generator)
        means = tissues[torch.randint(5, (n,), generator=generator)]
    spread = 0.08 * torch.rand(n, generator=generator)
    if chance(generator, 0.8):
        means[0], spread[0] = 0.0, 0.02 * spread[0]
    return Contrast(means, spread)


def t1_contrast(t1: Tensor, generator: torch.Generator, spread: float = 1.0) -> Contrast:
    """Draw a contrast with the usual order of a T1-weighted scan.

    ``t1`` (n, 2) is the mean and the spread between people of each label's brightness; 0 is air.
    ``spread`` scales the second.
    """
    mean, between = t1[:, 0], spread * t1[:, 1]
    means = (mean + between * torch.randn(len(t1), generator=generator)).clamp(0, 1)
    # Fat and muscle share a label, so what varies between people varies within a head, too.
    within = (0.02 + 0.6 * between) * torch.rand(len(t1), generator=generator)
    within[0] *= 0.1
    return Contrast(means, within)


def painted(
    head: Head,
    points: Tensor,
    contrast: Contrast,
    generator: torch.Generator,
    spacing_mm: float = SPACING_MM,
) -> Tensor:
    """Paint a head with labels at ``points`` (3, N, N, N), a little blurred.

    A voxel is the mean of its eight labels' brightness, as tissues share voxels in a scan; larger
    ones are less noisy.
    """
    assert head.labels is not None
    # Only a box around the points is painted.
    box = []
    for axis, size in zip(points, head.distance.shape, strict=True):
        low = min(max(int(axis.min()) - 1, 0), size - 2)
        box.append(slice(low, max(low + 2, min(int(axis.max()) + 3, size))))
    part = head.labels[tuple(slice(2 * s.start, 2 * s.stop) for s in box)]
    of_labels = [contrast.mean.numpy(), contrast.spread.numpy()]
    if head.tissue is not None:
        of_labels.append((head.tissue == HeadTissue.SOFT).astype(np.float32))
    mean, *others = (
        F.avg_pool3d(torch.from_numpy(of_label[part])[None], 2) for of_label in of_labels
    )
    at = points - torch.tensor([s.start for s in box])[:, None, None, None]
    air = contrast.mean[0]
    noise = torch.randn(points.shape[1:], generator=generator)
    mean, spread, *softness = read(torch.cat([mean - air, *others]), at)
    for soft in softness:
        mean = mean + soft * _mixture(points.shape[-1], spacing_mm, generator)
    image = mean + air + (SPACING_MM / spacing_mm) ** 1.5 * spread * noise
    width = 0.6 * uniform(generator)
    smooth = ndimage.gaussian_filter(image.numpy(), width)
    return torch.from_numpy(smooth).clamp(0, 1)


def _mixture(size: int, spacing_mm: float, generator: torch.Generator) -> Tensor:
    """Differences of brightness (N, N, N) between fat, muscle and vessels, which share a label.

    Two patterns, a coarse and a fine one, each smooth or sharp and of any strength, in three of
    four heads.
    """
    texture = torch.zeros(size, size, size)
    if chance(generator, 0.25):
        return texture
    for narrowest_mm, widest_mm in ((6, 16), (16, 50)):
        width, sharpness, strength = torch.rand(3, generator=generator).tolist()
        knots_mm = narrowest_mm * (widest_mm / narrowest_mm) ** width
        wave = smooth_noise(1.0, knots_mm / spacing_mm, size, size, generator)[0]
        wave = wave / wave.std().clamp(min=1e-6)
        texture += 0.25 * strength * ((1 + 5 * sharpness) * wave).tanh()
    return texture


def _spin_echo(image: Tensor, distance: Tensor, generator: torch.Generator) -> Tensor:
    """Make the scalp up to three times as bright, and lower the contrast in the brain."""
    gain, kept = (float(x) for x in torch.rand(2, generator=generator))
    brain = distance > 0
    if brain.any():
        mean = image[brain].mean()
        image = torch.where(brain, mean + (0.4 + 0.6 * kept) * (image - mean), image)
    image = torch.where(distance < -2 * SPACING_MM, (1 + 2 * gain) * image, image)
    return image / max(1.0, float(image.max()))


def artefacts(
    image: Tensor,
    config: HeadConfig,
    generator: torch.Generator,
    spacing_mm: float = SPACING_MM,
    *,
    whole: bool = True,
) -> Tensor:
    """Add a bias field, noise, thick slices or large voxels; change contrast and brightness.

    A ``whole`` head is normalised as at inference; a part of one has not the same percentiles.
    """
    widths = 0.6 / spacing_mm, 2.0 / spacing_mm
    often = config.intensity
    if chance(generator, 0.3 * often):
        thickest = config.slice_mm / spacing_mm
        voxels = 1 + (thickest - 1) * uniform(generator)
        image = thicken(image, voxels, generator)
    chain = mt.Compose(
        [
            mt.RandBiasField(prob=0.6 * often, coeff_range=(-0.25, 0.25)),
            mt.RandBiasField(prob=config.strong_bias, degree=2, coeff_range=(-0.8, 0.8)),
            mt.Lambda(
                lambda biased: torch.from_numpy(normalise_head(biased.numpy())) if whole else biased
            ),
            mt.RandAdjustContrast(prob=0.6 * often, gamma=(0.5, 2.0)),
            mt.RandHistogramShift(num_control_points=(5, 10), prob=0.2 * often),
            low_resolution(0.15 * often),
            mt.RandGaussianSmooth(
                prob=0.15 * often, sigma_x=widths, sigma_y=widths, sigma_z=widths
            ),
            mt.RandGaussianNoise(prob=0.5 * often, std=0.06 * (SPACING_MM / spacing_mm) ** 1.5),
            mt.RandScaleIntensity(factors=0.3, prob=0.6 * often),
        ]
    )
    chain.set_random_state(seed=int(torch.randint(2**31 - 1, (1,), generator=generator)))
    changed: Tensor = chain(image[None])
    return changed.as_subclass(Tensor)[0].clamp(0, 1)


def _deface(image: Tensor, distance: Tensor, generator: torch.Generator) -> Tensor:
    """Remove the image in front of and below a plane that does not touch the brain."""
    axis = torch.linspace(-1, 1, image.shape[0])
    _, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    angle = math.radians(20 + 50 * uniform(generator))
    along = y * math.sin(angle) - z * math.cos(angle)
    brain = distance > -1
    if not brain.any():
        return image
    margin = 0.02 + 0.1 * uniform(generator)
    return torch.where(along > float(along[brain].max()) + margin, 0.0, image)


def _cut(
    image: Tensor, distance: Tensor, generator: torch.Generator, spacing_mm: float
) -> tuple[Tensor, Tensor]:
    """Cut the field of view within the head: up to a quarter is missing at one or two sides.

    The mask ends at the cut, so its distance is at most that to the plane of the cut.
    """
    for _ in range(int(torch.randint(1, 3, (1,), generator=generator))):
        axis = int(torch.randint(3, (1,), generator=generator))
        size = image.shape[axis]
        amount = int(size * 0.25 * uniform(generator))
        last = chance(generator, 0.5)
        inside_mm = behind_end(size, axis, spacing_mm, amount, last=last)
        image = image * (inside_mm > 0)
        distance = torch.minimum(distance, inside_mm)
    return image, distance
