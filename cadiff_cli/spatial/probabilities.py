"""Class probabilities (classes, X, Y, Z) float32: most probable class, entropy, resampling."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.labels.parcellation import class_dtype
from cadiff_cli.spatial.grid import Grid


@dataclass(frozen=True, eq=False)
class Probabilities:
    """Class probabilities of the voxels in and near a brain; everywhere else is background.

    ``values`` (n, classes) float32, background first; ``voxels`` (n,) are the flat indices of
    these voxels in a volume of ``shape``.
    """

    values: Tensor
    voxels: Tensor
    shape: tuple[int, int, int]

    @staticmethod
    def of_all(p: Tensor) -> "Probabilities":
        """Those of a whole volume (classes, X, Y, Z)."""
        x, y, z = p.shape[1:]
        return Probabilities(p.flatten(1).T.contiguous(), torch.arange(x * y * z), (x, y, z))

    @property
    def n_classes(self) -> int:
        """Structures and the background."""
        return int(self.values.shape[1])

    def most_probable(self) -> np.ndarray:
        """(X, Y, Z) of ``class_dtype``: the class with the highest probability."""
        best = self.values.argmax(dim=1).numpy()
        return self._spread(torch.from_numpy(best.astype(class_dtype(self.n_classes))))

    def uncertainty(self) -> np.ndarray:
        """(X, Y, Z) float32 entropy of the probabilities: 0 to 1, 1 if all are equal."""
        entropy = torch.special.entr(self.values).sum(dim=1)
        return self._spread(entropy.div_(math.log(self.n_classes)).clamp_(0, 1))

    def summed(self, groups: Sequence[Sequence[int]]) -> "Probabilities":
        """Those of groups of classes; all others are background."""
        group_of = torch.zeros(self.n_classes, len(groups) + 1)
        group_of[:, 0] = 1
        for k, group in enumerate(groups, start=1):
            group_of[list(group)] = F.one_hot(torch.tensor(k), len(groups) + 1).float()
        return Probabilities(self.values @ group_of, self.voxels, self.shape)

    def dense(self) -> Tensor:
        """(classes, X, Y, Z) float32: the whole volume, for interpolation."""
        p = torch.zeros(self.n_classes, math.prod(self.shape))
        p[0] = 1
        for p_k, values in zip(p, self.values.T, strict=True):
            p_k[self.voxels] = values
        return p.reshape(-1, *self.shape)

    def _spread(self, values: Tensor) -> np.ndarray:
        """(X, Y, Z) with ``values`` (n,) in their places, and 0 elsewhere."""
        out = torch.zeros(math.prod(self.shape), dtype=values.dtype)
        out[self.voxels] = values
        return np.asarray(out.reshape(self.shape).numpy())


def native_classes(p: Probabilities, grid: Grid, native: Grid) -> np.ndarray:
    """Most probable class at each native voxel: probabilities are interpolated, not labels."""
    out = np.zeros(native.shape, class_dtype(p.n_classes))
    for index, slab in _slabs(p.dense(), grid, native):
        out[index] = slab.argmax(dim=0).numpy()
    return out


def native_posteriors(p: Probabilities, grid: Grid, native: Grid) -> np.ndarray:
    """Probabilities at each native voxel, (classes, X, Y, Z) float16; background outside."""
    out = np.zeros((p.n_classes, *native.shape), dtype=np.float16)
    out[0] = 1
    for index, slab in _slabs(p.dense(), grid, native):
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
