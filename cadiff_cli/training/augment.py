"""Random patches of a prepared scan: image, classes and field move together.

Everything is drawn from one ``torch.Generator``, so a step's patch is a function of its seed.
Intensity changes are MONAI's.
"""

import math
from dataclasses import dataclass

import monai.transforms as mt
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.training.cache import FIELD_STRIDE, Sample

FIELD_EXTENT_MM = 190.0
"""Length of a field axis, near enough to turn a displacement in mm into field units."""


@dataclass(frozen=True)
class AugmentConfig:
    """How far a patch may stray from its scan; all zero gives plain patches.

    ``deform`` is the share of patches that are rotated, scaled and bent; the others are copied
    voxel by voxel, as sharp as what inference sees.
    """

    flip: float = 0.5
    deform: float = 0.5
    rotation_deg: float = 12.0
    scale: float = 0.1
    elastic_mm: float = 2.0
    elastic_spacing_mm: float = 24.0
    field_error_mm: float = 1.5
    intensity: float = 1.0


@dataclass(frozen=True, eq=False)
class Patch:
    """Image (1, 1, N, N, N) in [0, 1], classes (1, N, N, N) int64, field (1, 3, N/2, N/2, N/2)."""

    image: Tensor
    classes: Tensor
    field: Tensor


def draw_patch(
    sample: Sample, size: int, mirror: Tensor, config: AugmentConfig, generator: torch.Generator
) -> Patch:
    """A cube of ``size`` voxels around a random brain voxel, deformed, flipped and recoloured."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    shape = torch.tensor(sample.classes.shape)
    inside = np.flatnonzero(sample.classes)
    pick = int(torch.randint(len(inside), (1,), generator=generator))
    centre = torch.tensor(np.unravel_index(int(inside[pick]), sample.classes.shape)).float()
    margin = size // 2 - 8
    centre = torch.minimum(torch.maximum(centre, torch.tensor(margin)), shape - 1.0 - margin)
    centre = centre - 0.5  # the middle of an even number of voxels lies between two

    axis = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    offsets = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    if float(uniform(0, 1, 1)) < config.deform:
        matrix = _rotation(uniform(-1, 1, 3) * math.radians(config.rotation_deg)) * (
            1 + config.scale * uniform(-1, 1, 1)
        )
        offsets = torch.einsum("ab,bxyz->axyz", matrix, offsets) + _smooth_noise(
            config.elastic_mm, config.elastic_spacing_mm, size, size, generator
        )
    points = offsets + centre[:, None, None, None]

    image = _read(torch.from_numpy(sample.image)[None].float() / 255, points, shape)[0]
    nearest = points.round().long()
    outside = ((nearest < 0) | (nearest >= shape[:, None, None, None])).any(dim=0)
    nearest = torch.minimum(nearest.clamp(min=0), shape[:, None, None, None] - 1)
    flat = (nearest[0] * shape[1] + nearest[1]) * shape[2] + nearest[2]
    classes = torch.from_numpy(sample.classes).reshape(-1)[flat].long()
    classes[outside] = 0

    names = sorted(sample.fields)
    name = names[int(torch.randint(len(names), (1,), generator=generator))]
    stored = torch.from_numpy(sample.fields[name].astype(np.float32))
    half = F.avg_pool3d(points[None], 2)[0]
    # Centres of stored cells lie (stride - 1) / 2 voxels inside.
    cells = (half - (FIELD_STRIDE - 1) / 2) / FIELD_STRIDE
    field = _read(stored, cells, torch.tensor(stored.shape[1:]), padding="border")
    error = _smooth_noise(config.field_error_mm, 40.0, size, size // 2, generator)
    field = (field + error / FIELD_EXTENT_MM).clamp(0, 1)

    if float(uniform(0, 1, 1)) < config.flip:
        image, classes, field = image.flip(0), mirror[classes.flip(0)], field.flip(1)
        field = torch.cat([1 - field[:1], field[1:]])
    image = recolour(image, config.intensity, generator)
    return Patch(image[None, None], classes[None], field[None])


def recolour(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Bias field, contrast, blur, low resolution, noise inside the brain; (X, Y, Z) in [0, 1]."""
    if strength <= 0:
        return image
    chain = mt.Compose(
        [
            mt.RandBiasField(prob=0.5, coeff_range=(0.0, 0.12 * strength)),
            mt.RandAdjustContrast(prob=0.5, gamma=(0.7, 1.5)),
            mt.RandSimulateLowResolution(prob=0.1, zoom_range=(0.4, 0.9)),
            mt.RandGaussianSmooth(
                prob=0.1, sigma_x=(0.3, 0.8), sigma_y=(0.3, 0.8), sigma_z=(0.3, 0.8)
            ),
            mt.RandGaussianNoise(prob=0.4, std=0.05 * strength),
            mt.RandScaleIntensity(factors=0.15 * strength, prob=0.5),
            mt.RandShiftIntensity(offsets=0.05 * strength, prob=0.5),
        ]
    )
    chain.set_random_state(seed=int(torch.randint(2**31 - 1, (1,), generator=generator)))
    recoloured: Tensor = chain(image[None])
    out = recoloured.as_subclass(Tensor)[0]
    return out.clamp(0, 1) * (image > 0)


def _rotation(angles: Tensor) -> Tensor:
    """(3, 3) product of rotations about x, y and z."""
    x, y, z = (float(a) for a in angles)
    cx, sx, cy, sy, cz, sz = (f(a) for a in (x, y, z) for f in (math.cos, math.sin))
    rx = torch.tensor([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    ry = torch.tensor([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rz = torch.tensor([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1.0]])
    return rx @ ry @ rz


def _smooth_noise(
    amplitude: float, spacing: float, extent: int, size: int, generator: torch.Generator
) -> Tensor:
    """(3, size, size, size) random displacement: knots every ``spacing`` voxels of ``extent``."""
    knots = max(2, round(extent / spacing) + 1)
    strength = amplitude * torch.rand(1, generator=generator)
    coarse = strength * torch.randn(1, 3, knots, knots, knots, generator=generator)
    return F.interpolate(coarse, size=(size,) * 3, mode="trilinear", align_corners=True)[0]


def _read(volume: Tensor, points: Tensor, shape: Tensor, padding: str = "zeros") -> Tensor:
    """Trilinear values of ``volume`` (C, X, Y, Z) at voxel coordinates ``points`` (3, ...)."""
    scaled = 2 * points / (shape[:, None, None, None] - 1) - 1
    grid = scaled.permute(1, 2, 3, 0).flip(-1)[None]
    return F.grid_sample(volume[None], grid, padding_mode=padding, align_corners=True)[0]
