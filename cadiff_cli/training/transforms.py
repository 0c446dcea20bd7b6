"""Random changes of images that all kinds of patches share.

Each draws from a ``torch.Generator``; coordinates are in voxels.
"""

import monai.transforms as mt
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    """A number from ``low`` to ``high``."""
    return low + (high - low) * float(torch.rand(1, generator=generator))


def uniforms(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Numbers from ``low`` to ``high``."""
    return low + (high - low) * torch.rand(*shape, generator=generator)


def chance(generator: torch.Generator, share: float) -> bool:
    """True in a ``share`` of the draws."""
    return uniform(generator) < share


def rotation(angles: Tensor) -> Tensor:
    """(3, 3) product of rotations about x, y and z by ``angles`` (3,) in radians."""
    matrix = Rotation.from_euler("XYZ", angles.numpy()).as_matrix()
    return torch.from_numpy(matrix).float()


def smooth_noise(
    amplitude: float, spacing: float, extent: int, size: int, generator: torch.Generator
) -> Tensor:
    """(3, size, size, size) random displacement: knots every ``spacing`` voxels of ``extent``."""
    knots = max(2, round(extent / spacing) + 1)
    strength = amplitude * torch.rand(1, generator=generator)
    coarse = strength * torch.randn(1, 3, knots, knots, knots, generator=generator)
    return F.interpolate(coarse, size=(size,) * 3, mode="trilinear", align_corners=True)[0]


def lattice(size: int) -> Tensor:
    """(3, size, size, size) float32: the voxel coordinates of a cube."""
    axis = torch.arange(size, dtype=torch.float32)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))


def nearest(points: Tensor, shape: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices of the voxels nearest to ``points`` (3, ...), and which lie outside."""
    index = points.round().long()
    size = shape[:, None, None, None]
    outside = ((index < 0) | (index >= size)).any(dim=0)
    index = torch.minimum(index.clamp(min=0), size - 1)
    return (index[0] * shape[1] + index[1]) * shape[2] + index[2], outside


def read(volume: Tensor, points: Tensor, padding: str = "zeros") -> Tensor:
    """Trilinear values of ``volume`` (C, X, Y, Z) at voxel coordinates ``points`` (3, ...)."""
    size = torch.tensor(volume.shape[1:])[:, None, None, None]
    scaled = 2 * points / (size - 1) - 1
    grid = scaled.permute(1, 2, 3, 0).flip(-1)[None]
    return F.grid_sample(volume[None], grid, padding_mode=padding, align_corners=True)[0]


def thicken(image: Tensor, voxels: float, generator: torch.Generator) -> Tensor:
    """``image`` (X, Y, Z) as if acquired in slices of so many ``voxels``, interpolated back."""
    axis = int(torch.randint(3, (1,), generator=generator))
    size = list(image.shape)
    size[axis] = max(1, round(size[axis] / voxels))
    slices = F.interpolate(image[None, None], size=size, mode="area")
    return F.interpolate(slices, size=image.shape, mode="trilinear", align_corners=False)[0, 0]


def low_resolution(share: float) -> mt.RandSimulateLowResolution:
    """Larger voxels, interpolated back.

    They are means: the nearest of the small ones would shift the image against its labels.
    """
    return mt.RandSimulateLowResolution(
        prob=share, downsample_mode="area", zoom_range=(0.4, 0.9), align_corners=False
    )
