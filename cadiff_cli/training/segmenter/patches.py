"""Random patches of a prepared scan: image, classes and field move together.

Everything is drawn from one ``torch.Generator``, so a patch is a function of its seed; ``Draws`` is
the endless series of them that training reads.  Intensity changes are MONAI's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import monai.transforms as mt
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset

from cadiff_cli.training.batch import Batch, generator_of
from cadiff_cli.training.segmenter.data import STORED_STRIDE, Sample, sample_field
from cadiff_cli.training.segmenter.synthesis import SynthesisConfig, resynthesise
from cadiff_cli.training.transforms import (
    chance,
    lattice,
    low_resolution,
    nearest,
    read,
    rotation,
    smooth_noise,
    thicken,
    uniform,
    uniforms,
)

FIELD_EXTENT_MM = 190.0
"""Length of a field axis, near enough to turn a displacement in mm into field units."""


@dataclass(frozen=True)
class AugmentConfig:
    """How far a patch may stray from its scan; all zero gives plain patches.

    ``deform`` is the share of patches that are rotated, scaled and bent; the others are copied
    voxel by voxel, as sharp as what inference sees.  ``thick_slices`` is the share that is sampled
    in slices of 2 to ``slice_mm`` mm, ``bad_mask`` the share whose brain mask is cut up to
    ``mask_error_mm`` deep or leaves bits of the head up to twice as far.  ``together`` is the
    share that sees the mean of all templates' fields, as inference does; the others see that of
    one.  ``field_error_mm`` is the largest standard deviation of a smooth error of the
    registration.  ``intensity`` scales bias fields, noise and brightness, and how often
    histograms are bent; gamma, blur and low resolution stay as they are unless it is 0.
    """

    flip: float = 0.5
    deform: float = 0.5
    rotation_deg: float = 12.0
    scale: float = 0.1
    elastic_mm: float = 2.0
    elastic_spacing_mm: float = 24.0
    together: float = 0.6
    field_error_mm: float = 1.0
    thick_slices: float = 0.1
    slice_mm: float = 5.0
    bad_mask: float = 0.2
    mask_error_mm: int = 3
    intensity: float = 1.0
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)


@dataclass(frozen=True, eq=False)
class Patch(Batch):
    """Image (B, 1, N, N, N) in [0, 1], classes (B, N, N, N) int64, field (B, 3, N/2, N/2, N/2)."""

    image: Tensor
    classes: Tensor
    field: Tensor


class Draws(Dataset[Patch]):
    """Patch ``i`` of an endless series: a function of ``seed`` and ``i`` alone, in any process.

    A share ``also_share`` of the patches comes from the scans ``also``, if there are any.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: int,
        mirror: Tensor,
        config: AugmentConfig,
        seed: int,
        also: Sequence[Sample] = (),
        also_share: float = 0.0,
    ) -> None:
        self.samples, self.size, self.mirror = samples, size, mirror
        self.config, self.seed = config, seed
        self.also, self.also_share = also, also_share

    def __getitem__(self, index: int) -> Patch:
        """Draw a scan, then a patch of it."""
        generator = generator_of(self.seed, index)
        pool = self.samples
        if self.also and chance(generator, self.also_share):
            pool = self.also
        pick = int(torch.randint(len(pool), (1,), generator=generator))
        return draw_patch(pool[pick], self.size, self.mirror, self.config, generator)


def draw_patch(
    sample: Sample, size: int, mirror: Tensor, config: AugmentConfig, generator: torch.Generator
) -> Patch:
    """A cube of ``size`` voxels around a random brain voxel, deformed, flipped and recoloured."""
    shape = torch.tensor(sample.classes.shape)
    inside = np.flatnonzero(sample.classes)
    pick = int(torch.randint(len(inside), (1,), generator=generator))
    centre = torch.tensor(np.unravel_index(int(inside[pick]), sample.classes.shape)).float()
    margin = size // 2 - 8
    centre = torch.minimum(torch.maximum(centre, torch.tensor(margin)), shape - 1.0 - margin)
    centre = centre - 0.5  # the middle of an even number of voxels lies between two

    offsets = lattice(size) - (size - 1) / 2
    if chance(generator, config.deform):
        matrix = rotation(uniforms(generator, -1, 1, 3) * math.radians(config.rotation_deg)) * (
            1 + config.scale * uniform(generator, -1, 1)
        )
        offsets = torch.einsum("ab,bxyz->axyz", matrix, offsets) + smooth_noise(
            config.elastic_mm, config.elastic_spacing_mm, size, size, generator
        )
    points = offsets + centre[:, None, None, None]

    image = read(torch.from_numpy(sample.image)[None].float() / 255, points)[0]
    flat, outside = nearest(points, shape)
    classes = torch.from_numpy(sample.classes).reshape(-1)[flat].long()
    classes[outside] = 0
    mask = torch.from_numpy(sample.mask).reshape(-1)[flat] & ~outside
    image = image * mask
    classes[~mask] = 0  # as inference writes no labels outside the mask

    names = sorted(sample.fields)
    pick = int(torch.randint(len(names), (1,), generator=generator))
    together = chance(generator, config.together)
    field = sample_field(sample) if together else sample.fields[names[pick]].astype(np.float32)
    stored = torch.from_numpy(field)
    half = F.avg_pool3d(points[None], 2)[0]
    # Centres of stored cells lie (stride - 1) / 2 voxels inside.
    cells = (half - (STORED_STRIDE - 1) / 2) / STORED_STRIDE
    position = read(stored, cells, padding="border")
    error = smooth_noise(config.field_error_mm, 40.0, size, size // 2, generator)
    position = (position + error / FIELD_EXTENT_MM).clamp(0, 1)

    if chance(generator, config.flip):
        image, mask = image.flip(0), mask.flip(0)
        classes, position = mirror[classes.flip(0)], position.flip(1)
        position = torch.cat([1 - position[:1], position[1:]])
    if chance(generator, config.synthesis.share):
        image = resynthesise(image, mask, classes, mirror, config.synthesis, generator)
    image = recolour(image, mask, config.intensity, generator)
    if chance(generator, config.thick_slices):
        image = thicken(image, uniform(generator, 2, config.slice_mm), generator) * mask
    if chance(generator, config.bad_mask):
        image, classes = spoil_mask(image, mask, classes, config.mask_error_mm, generator)
    return Patch(image[None, None], classes[None], position[None])


def recolour(image: Tensor, mask: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Bias field, contrast, blur, low resolution, noise: (X, Y, Z), 0 outside ``mask``."""
    if strength <= 0:
        return image

    def seeded(change: mt.Randomizable) -> mt.Randomizable:
        return change.set_random_state(int(torch.randint(2**31 - 1, (1,), generator=generator)))

    # Both signs: MONAI's own default only ever brightens one corner of the image.
    reach = 0.2 * strength
    bias = seeded(mt.RandBiasField(prob=0.5, coeff_range=(-reach, reach)))
    image = keep_mean(image, bias(image[None]).as_subclass(Tensor)[0], mask)
    chain = mt.Compose(
        [
            mt.RandAdjustContrast(prob=0.5, gamma=(0.6, 1.7)),
            mt.RandHistogramShift(num_control_points=(6, 10), prob=0.1 * min(strength, 1)),
            low_resolution(0.2),
            mt.RandGaussianSmooth(
                prob=0.1, sigma_x=(0.3, 0.8), sigma_y=(0.3, 0.8), sigma_z=(0.3, 0.8)
            ),
            mt.RandGaussianNoise(prob=0.4, std=0.06 * strength),
            mt.RandScaleIntensity(factors=0.15 * strength, prob=0.5),
            mt.RandShiftIntensity(offsets=0.05 * strength, prob=0.5),
        ]
    )
    out: Tensor = seeded(chain)(image[None]).as_subclass(Tensor)[0]
    return out.clamp(0, 1) * mask


def keep_mean(before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """``after`` scaled to the mean that ``before`` has inside ``mask``; all (X, Y, Z)."""
    return after * ((before * mask).sum() / (after * mask).sum().clamp(min=1e-6))


def spoil_mask(
    image: Tensor, mask: Tensor, classes: Tensor, depth: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Cut the brain mask in some places and leave bits of the head outside it in others.

    What is cut loses its label too.
    """
    brain = mask.float()[None, None]
    where = smooth_noise(1.0, 20.0, image.shape[0], image.shape[0], generator)
    where = where / where.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
    reach = int(torch.randint(1, depth + 1, (1,), generator=generator))
    cut = (_dilate(1 - brain, reach) * brain > 0)[0, 0] & (where[0] > 1)
    left = (_dilate(brain, 2 * reach) - brain > 0)[0, 0] & (where[1] > 1)
    texture = (0.5 + 0.3 * where[2]).clamp(0.05, 1) * torch.rand(1, generator=generator)
    image = torch.where(left, texture, torch.where(cut, 0, image))
    return image, torch.where(cut, 0, classes)


def _dilate(mask: Tensor, reach: int) -> Tensor:
    """Grow (1, 1, X, Y, Z) by a cube of ``reach`` voxels to each side, one axis at a time."""
    for axis in range(3):
        size, padding = [1, 1, 1], [0, 0, 0]
        size[axis], padding[axis] = 2 * reach + 1, reach
        mask = F.max_pool3d(mask, size, 1, padding)
    return mask
