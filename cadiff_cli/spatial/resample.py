"""Carry a volume from one grid to another."""

from functools import partial

import numpy as np
from scipy import ndimage

from cadiff_cli.errors import DataError
from cadiff_cli.spatial.grid import Grid, Volume

REACH_VOXELS = 12
"""Beyond this distance, voxels change a cubic spline's value by less than 1e-6."""
MAX_OFFSET_VOXELS = 0.1
"""Largest distance of corners of one grid from those of the same grid in a rounded header."""
STRAIGHT_VOXELS = 1e-3
"""An axis that leaves a straight line by less than this over its length is straight."""
LEAST_WEIGHT = 1e-7
"""Smaller weights of voxels are nothing in single precision."""
AROUND_VOXELS = 2
"""Background around a structure whose mask is interpolated, so that its surface closes."""


def same_lattice(to_source: np.ndarray, atol: float = 1e-3) -> bool:
    """Whether a voxel map (4, 4) only flips, permutes and shifts by whole voxels."""
    whole = np.allclose(to_source, np.round(to_source), atol=atol)
    return bool(whole and abs(abs(np.linalg.det(to_source[:3, :3])) - 1) < atol)


def same_grid(a: Grid, b: Grid) -> bool:
    """Whether the voxels of two grids coincide, by their corners."""
    if a.shape != b.shape:
        return False
    box = all_voxels(a.shape)
    moved, own = corners(box, a.voxel_map(b)), corners(box, np.eye(4))
    return bool(abs(moved - own).max() <= MAX_OFFSET_VOXELS)


def check_same_grid(name: str, grid: Grid, other_name: str, other: Grid) -> None:
    """Raise ``DataError`` unless the voxels of two images coincide."""
    if not same_grid(grid, other):
        ours, theirs = (
            f"{g!r} with affine {np.round(g.affine[:3], 4).tolist()}" for g in (grid, other)
        )
        raise DataError(
            f"{name} lies on {ours}, {other_name} on {theirs}",
            "they must share a grid: the same shape and affine",
        )


def resample(volume: Volume, grid: Grid, order: int = 1, fill: float = 0.0) -> Volume:
    """``volume`` on ``grid``: spline interpolation of ``order`` 0, 1 or 3; ``fill`` outside.

    An image reaches half a voxel beyond the centres of its outermost voxels, and has their values
    there.  Between grids that differ by whole voxels (flips, permutations, crops) values are copied
    without interpolation.  If voxels become more than 1.5 times larger, the image is smoothed first
    against aliasing.
    """
    to_source = volume.grid.voxel_map(grid)
    data = volume.data
    if same_lattice(to_source):
        to_source, order = np.round(to_source), 0
        if _is_straight(to_source, grid.shape):
            return Volume(_copied(data, to_source.astype(int), grid.shape, fill), grid)
    if order > 0:
        data = data.astype(np.float32, copy=False)
        ratio = np.linalg.norm(to_source[:3, :3], axis=1)
        # The squared full width at half maximum is the difference of the squared voxel sizes.
        wide = np.sqrt(np.maximum(ratio**2 - 1, 0)) / 2.355
        sigma = wide if ratio.max() > 1.5 else np.zeros(3)
        if _is_straight(to_source, grid.shape):
            return Volume(_by_axes(data, to_source, grid.shape, sigma, order, fill), grid)
        if sigma.any():
            data = ndimage.gaussian_filter(data, sigma)
    # A cubic spline is fitted to whole axes: leave out the parts that reach no voxel.
    part = mapped_box(all_voxels(grid.shape), to_source, data.shape, REACH_VOXELS)
    move = partial(
        ndimage.affine_transform,
        matrix=to_source[:3, :3],
        offset=to_source[:3, 3] - [s.start for s in part],
        output_shape=grid.shape,
    )
    moved = np.asarray(move(data[part], order=order, mode="nearest"))
    ends = corners(all_voxels(grid.shape), to_source).T
    if ends.min() < -0.5 or (ends > np.array(data.shape) - 0.5).any():
        covered = move(np.ones(data[part].shape, np.uint8), order=0, mode="grid-constant")
        moved[covered == 0] = fill
    return Volume(moved, grid)


def _is_straight(to_source: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether every axis of a grid runs along one of the source's, by a voxel map (4, 4)."""
    moved = abs(to_source[:3, :3]) * shape  # voxels of the source, over the whole length
    along = moved.argmax(axis=0)
    return len(set(along)) == 3 and bool(moved.sum() - moved.max(axis=0).sum() < STRAIGHT_VOXELS)


def _copied(
    data: np.ndarray, to_source: np.ndarray, shape: tuple[int, ...], fill: float
) -> np.ndarray:
    """Copy voxels by a straight voxel map of whole numbers; ``fill`` outside."""
    out = np.full(shape, fill, dtype=data.dtype)
    along = abs(to_source[:3, :3]).argmax(axis=0)
    data = data.transpose(along)
    here, there = [], []
    for axis, n in enumerate(shape):
        start, size = to_source[along[axis], 3], data.shape[axis]
        if to_source[along[axis], axis] < 0:
            data, start = np.flip(data, axis), size - 1 - start
        begin = np.clip(-start, 0, n)
        end = np.clip(size - start, begin, n)
        here.append(slice(begin, end))
        there.append(slice(begin + start, end + start))
    out[tuple(here)] = data[tuple(there)]
    return out


def _by_axes(
    data: np.ndarray,
    to_source: np.ndarray,
    shape: tuple[int, ...],
    sigma: np.ndarray,
    order: int,
    fill: float,
) -> np.ndarray:
    """Smooth and interpolate by a straight voxel map, one axis after the other.

    Both are linear: a sparse matrix does the two along an axis, whose columns are what becomes of
    single bright voxels.
    """
    from scipy.sparse import csr_array

    along = abs(to_source[:3, :3]).argmax(axis=0)
    outside: list[np.ndarray] = [np.array([])] * 3
    for source in range(3):
        target = int(np.flatnonzero(along == source)[0])
        step, start = to_source[source, target], to_source[source, 3]
        n, size = shape[target], data.shape[0]
        points = np.eye(size)
        if sigma[source] > 0:
            points = ndimage.gaussian_filter1d(points, sigma[source], axis=0)
        matrix = ndimage.affine_transform(
            points, np.diag([step, 1]), [start, 0], (n, size), order=order, mode="nearest"
        )
        matrix[abs(matrix) < LEAST_WEIGHT] = 0
        used = bounding_box(matrix != 0)[1]
        weights = csr_array(matrix[:, used].astype(np.float32))
        moved = weights @ data[used].reshape(used.stop - used.start, -1)
        # The next axis comes first: after three turns, all are where they were.
        data = np.moveaxis(moved.reshape(n, *data.shape[1:]), 0, -1)
        position = start + step * np.arange(n)
        outside[target] = (position < -0.5) | (position >= size - 0.5)
    out = np.ascontiguousarray(data.transpose(along))
    for axis, beyond in enumerate(outside):
        np.moveaxis(out, axis, 0)[beyond] = fill
    return out


def resample_in(
    box: tuple[slice, ...], volume: Volume, grid: Grid, order: int = 1, fill: float = 0.0
) -> Volume:
    """``resample`` within a box of ``grid``'s voxels; the rest is ``fill``, without computation."""
    inside = resample(volume, grid.within(box), order, fill).data
    out = np.full(grid.shape, fill, dtype=inside.dtype)
    out[box] = inside
    return Volume(out, grid)


def resample_mask(mask: Volume, grid: Grid) -> Volume:
    """A bool mask on another grid: where its linear interpolation is above a half."""
    share = resample(Volume(mask.data.astype(np.float32), mask.grid), grid)
    return Volume(share.data > 0.5, grid)


def resample_labels(labels: Volume, grid: Grid) -> Volume:
    """A class map on another grid: each class is interpolated as a mask, the largest wins."""
    if same_lattice(labels.grid.voxel_map(grid)):
        return resample(labels, grid, order=0)
    classes = np.zeros(grid.shape, dtype=labels.data.dtype)
    largest, total = (np.zeros(grid.shape, dtype=np.float32) for _ in range(2))
    for k, box in enumerate(ndimage.find_objects(labels.data), start=1):
        if box is None:
            continue
        mask = np.pad(labels.data[box] == k, AROUND_VOXELS)
        source = labels.grid.crop(tuple(s.start - AROUND_VOXELS for s in box), mask.shape)
        window = mapped_box(all_voxels(mask.shape), grid.voxel_map(source), grid.shape)
        part = grid.crop(tuple(s.start for s in window), classes[window].shape)
        share = resample(Volume(mask.astype(np.float32), source), part).data
        wins = share > largest[window]
        classes[window][wins] = k
        largest[window][wins] = share[wins]
        total[window] += share
    classes[1 - total > largest] = 0
    return Volume(classes, grid)


def all_voxels(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The box of all voxels."""
    return tuple(slice(0, n) for n in shape)


def bounding_box(mask: np.ndarray, margin: np.ndarray | int = 0) -> tuple[slice, ...]:
    """The smallest box that holds all of a bool array, wider by ``margin`` voxels a side.

    The margin is one number or one for each axis, and ends with the array.  The box is empty along
    each axis if nothing is set.
    """
    boxes = ndimage.find_objects(mask.astype(np.uint8))
    if not boxes:
        return (slice(0, 0),) * mask.ndim
    margins = np.broadcast_to(margin, mask.ndim).astype(int).tolist()
    return tuple(
        slice(max(0, side.start - m), min(n, side.stop + m))
        for side, n, m in zip(boxes[0], mask.shape, margins, strict=True)
    )


def grid_around(mask: np.ndarray, grid: Grid, margin: int = 0, multiple: int = 1) -> Grid:
    """The part of ``grid`` around a bool ``mask`` on it, which may leave it.

    The box is widened by ``margin`` voxels a side, then grown evenly to multiples of ``multiple``.
    """
    box = bounding_box(mask)
    low = np.array([side.start - margin for side in box])
    size = np.array([side.stop + margin for side in box]) - low
    shape = -(-size // multiple) * multiple
    return grid.crop(tuple(low - (shape - size) // 2), tuple(map(int, shape)))


def corners(box: tuple[slice, ...], matrix: np.ndarray) -> np.ndarray:
    """(3, 8): a box's eight outermost voxels, moved by a voxel map (4, 4)."""
    ends = np.array([(s.start, s.stop - 1) for s in box], dtype=float)
    points = np.array(np.meshgrid(*ends)).reshape(3, -1)
    return np.asarray(matrix[:3, :3] @ points + matrix[:3, 3:])


def mapped_box(
    box: tuple[slice, ...], matrix: np.ndarray, shape: tuple[int, ...], margin: int = 0
) -> tuple[slice, ...]:
    """The box of another lattice of ``shape`` that holds ``box``, by a voxel map (4, 4) to it.

    It is at least one voxel wide; for a box outside the lattice it lies at the nearest face.
    """
    ends = corners(box, matrix)
    size = np.array(shape)
    start = np.clip(np.floor(ends.min(axis=1)).astype(int) - margin, 0, size - 1)
    stop = np.clip(np.ceil(ends.max(axis=1)).astype(int) + margin + 1, start + 1, size)
    return tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))


def pool(data: np.ndarray, factor: int) -> np.ndarray:
    """Means (C, X / factor, ...) float32 over blocks of ``factor``^3 voxels of (C, X, Y, Z).

    Voxels beyond the last whole block are left out.
    """
    x, y, z = (n // factor for n in data.shape[1:])
    whole = data[:, : x * factor, : y * factor, : z * factor]
    blocks = whole.reshape(-1, x, factor, y, factor, z, factor)
    return np.asarray(blocks.mean(axis=(2, 4, 6), dtype=np.float32))
