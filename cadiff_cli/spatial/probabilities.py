"""Class probabilities (classes, X, Y, Z) float32: most probable class, entropy, resampling."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.labels.parcellation import class_dtype
from cadiff_cli.spatial.grid import Grid


def fractions(classes: Tensor, n_classes: int, stride: int = 1) -> Tensor:
    """Class fractions per block: (B, X, Y, Z) int64 -> (B, n_classes, X/s, Y/s, Z/s) float32."""
    b, x, y, z = classes.shape
    s = stride
    blocks = classes.reshape(b, x // s, s, y // s, s, z // s, s).permute(0, 2, 4, 6, 1, 3, 5)
    members = blocks.reshape(b, s**3, x // s, y // s, z // s)
    out = torch.zeros(b, n_classes, *members.shape[2:], device=classes.device)
    share = torch.full(members.shape, 1 / s**3, device=classes.device)
    return out.scatter_add_(1, members, share)


@dataclass(frozen=True, eq=False)
class Probabilities:
    """Class probabilities of the voxels in and near a brain; everywhere else is background.

    ``values`` (n, classes) float32, background first; ``voxels`` (n,) are the flat indices of
    these voxels in a volume of ``shape``.
    """

    values: Tensor
    voxels: Tensor
    shape: tuple[int, int, int]

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

    def sums(self, groups: Sequence[Sequence[int]]) -> tuple[np.ndarray, ...]:
        """(X, Y, Z) float32 for each group of classes: the probability of any of them."""
        return tuple(map(self._spread, (self.values @ self.membership(groups)).T[1:]))

    def membership(self, groups: Sequence[Sequence[int]]) -> Tensor:
        """(classes, groups + 1): 1 where a class is in a group, the first one being the others."""
        group_of = torch.zeros(self.n_classes, len(groups) + 1)
        group_of[:, 0] = 1
        for k, group in enumerate(groups, start=1):
            group_of[list(group)] = F.one_hot(torch.tensor(k), len(groups) + 1).float()
        return group_of

    def _spread(self, values: Tensor) -> np.ndarray:
        """(X, Y, Z) with ``values`` (n,) in their places, and 0 elsewhere."""
        out = torch.zeros(math.prod(self.shape), dtype=values.dtype)
        out[self.voxels] = values
        return np.asarray(out.reshape(self.shape).numpy())


@dataclass(frozen=True, eq=False)
class Native:
    """Probabilities on another grid: ``classes`` (X, Y, Z) are the most probable ones.

    ``sums`` (X, Y, Z) float16 are those of groups of classes; ``posteriors`` (classes, X, Y, Z)
    float16 are all, background first, if they were asked for.
    """

    classes: np.ndarray
    sums: tuple[np.ndarray, ...]
    posteriors: np.ndarray | None


def on_native(
    p: Probabilities,
    grid: Grid,
    native: Grid,
    inside: np.ndarray,
    groups: Sequence[Sequence[int]] = (),
    *,
    posteriors: bool = False,
) -> Native:
    """Interpolate probabilities, not labels, at the voxels ``inside`` (X, Y, Z) a ``native`` grid.

    All other voxels are background.
    """
    membership = p.membership(groups)
    classes = np.zeros(native.shape, class_dtype(p.n_classes))
    sums = tuple(np.zeros(native.shape, np.float16) for _ in groups)
    whole = None
    if posteriors:
        whole = np.zeros((p.n_classes, *native.shape), dtype=np.float16)
        whole[0] = 1
    for x, values in _slices(p, grid, native, inside):
        where = inside[x]
        classes[x][where] = values.argmax(dim=1).numpy()
        for out, total in zip(sums, (values @ membership).T[1:].numpy(), strict=True):
            out[x][where] = total
        if whole is not None:
            whole[:, x][:, where] = values.T.numpy()
    return Native(classes, sums, whole)


def _slices(
    p: Probabilities, grid: Grid, native: Grid, inside: np.ndarray
) -> Iterator[tuple[int, Tensor]]:
    """Yield (native x index, (n, classes) probabilities) of the n voxels ``inside`` each slice.

    A native voxel is the mean of as many points along each axis as crop voxels fit into it.
    """
    to_crop = grid.voxel_map(native)
    rows = torch.full((math.prod(p.shape),), -1, dtype=torch.int32)
    rows[p.voxels] = torch.arange(len(p.voxels), dtype=torch.int32)
    row_of = rows.numpy().reshape(p.shape)
    ratio = np.linalg.norm(to_crop[:3, :3], axis=0)
    inner = [(np.arange(n) + 0.5) / n - 0.5 for n in np.maximum(np.rint(ratio), 1).astype(int)]
    shifts = np.stack(np.meshgrid(*inner, indexing="ij"), axis=-1).reshape(-1, 3)
    for x in np.flatnonzero(inside.any(axis=(1, 2))):
        y, z = np.nonzero(inside[x])
        voxels = np.stack([np.full_like(y, x), y, z], axis=-1)
        total = torch.zeros(len(voxels), p.n_classes)
        for shift in shifts:
            ijk = (voxels + shift) @ to_crop[:3, :3].T + to_crop[:3, 3]
            at, weights = _corners(ijk, row_of)
            total += F.embedding_bag(at, p.values, per_sample_weights=weights, mode="sum")
        total /= len(shifts)
        total[:, 0] += 1 - total.sum(dim=1)
        yield int(x), total


def _corners(ijk: np.ndarray, row_of: np.ndarray) -> tuple[Tensor, Tensor]:
    """Rows and weights (n, 8) of the voxels around points (n, 3); weight 0 for one without a row.

    ``row_of`` (X, Y, Z) is -1 where there is none.
    """
    low = np.floor(ijk).astype(int)
    rows, weights = (np.zeros((len(ijk), 8), kind) for kind in (np.int32, np.float32))
    for k, corner in enumerate(product((0, 1), repeat=3)):
        at = low + corner
        within = ((at >= 0) & (at < row_of.shape)).all(axis=1)
        row = np.full(len(at), -1, np.int32)
        row[within] = row_of[tuple(at[within].T)]
        rows[:, k] = np.maximum(row, 0)
        weights[:, k] = np.where(row >= 0, abs(1 - np.array(corner) - (ijk - low)).prod(axis=1), 0)
    return torch.from_numpy(rows), torch.from_numpy(weights)
