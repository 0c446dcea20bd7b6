"""Class probabilities (classes, X, Y, Z) float32: most probable class, entropy, resampling."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.labels.parcellation import class_dtype
from cadiff_cli.spatial.grid import Grid


def most_probable(p: Tensor) -> np.ndarray:
    """(X, Y, Z) of ``class_dtype``: the class with the highest of (classes, X, Y, Z) probabilities.

    Computed class by class: twice as fast as ``argmax`` along the axis with the largest stride.
    """
    highest = p[0].clone()
    best = torch.from_numpy(np.zeros(p.shape[1:], class_dtype(len(p))))
    for k in range(1, len(p)):
        best.masked_fill_(p[k] > highest, k)
        torch.maximum(highest, p[k], out=highest)
    return np.asarray(best.numpy())


def uncertainty(p: Tensor) -> np.ndarray:
    """(X, Y, Z) float32 entropy of (classes, X, Y, Z) probabilities: 0 to 1, 1 if all are equal.

    Computed class by class: ``p`` is too large to copy.
    """
    entropy = torch.zeros(p.shape[1:])
    for p_k in p:
        entropy.sub_(torch.xlogy(p_k, p_k))
    return np.asarray(entropy.div_(math.log(len(p))).clamp_(0, 1).numpy())


def native_classes(p: Tensor, grid: Grid, native: Grid) -> np.ndarray:
    """Most probable class at each native voxel: probabilities are interpolated, not labels."""
    out = np.zeros(native.shape, class_dtype(len(p)))
    for index, slab in _slabs(p, grid, native):
        out[index] = slab.argmax(dim=0).numpy()
    return out


def native_posteriors(p: Tensor, grid: Grid, native: Grid) -> np.ndarray:
    """Probabilities at each native voxel, (classes, X, Y, Z) float16; background outside."""
    out = np.zeros((p.shape[0], *native.shape), dtype=np.float16)
    out[0] = 1
    for index, slab in _slabs(p, grid, native):
        out[:, index] = slab.numpy()
    return out


def _slabs(p: Tensor, grid: Grid, native: Grid) -> Iterator[tuple[int, Tensor]]:
    """Yield (native x index, (classes, Y, Z) probabilities) for the slices that meet the crop.

    A native voxel is the mean of as many points along each axis as crop voxels fit into it.
    """
    to_crop = grid.voxel_map(native)
    size = torch.tensor(grid.shape, dtype=torch.float64)
    ratio = np.linalg.norm(to_crop[:3, :3], axis=0)
    inner = [(np.arange(n) + 0.5) / n - 0.5 for n in np.maximum(np.rint(ratio), 1).astype(int)]
    shifts = np.stack(np.meshgrid(*inner, indexing="ij"), axis=-1).reshape(-1, 3)
    y, z = np.indices(native.shape[1:])
    for index in range(native.shape[0]):
        voxels = np.stack([np.full_like(y, index), y, z], axis=-1)
        total = None
        for shift in shifts:
            ijk = (voxels + shift) @ to_crop[:3, :3].T + to_crop[:3, 3]
            if not ((ijk > -1) & (ijk < np.array(grid.shape))).all(axis=-1).any():
                continue
            scaled = 2 * torch.from_numpy(ijk) / (size - 1) - 1
            points = scaled.flip(-1).float()[None, None]
            slab = F.grid_sample(p[None], points, padding_mode="zeros", align_corners=True)
            part = slab[0, :, 0] / len(shifts)
            total = part if total is None else total.add_(part)
        if total is not None:
            total[0] += 1 - total.sum(dim=0)
            yield index, total
