"""Carry a volume from one grid to another."""

import numpy as np
from scipy import ndimage

from cadiff_cli.spatial.grid import Grid, Volume


def same_lattice(to_source: np.ndarray, atol: float = 1e-3) -> bool:
    """Whether a voxel map (4, 4) only flips, permutes and shifts by whole voxels."""
    whole = np.allclose(to_source, np.round(to_source), atol=atol)
    return bool(whole and abs(abs(np.linalg.det(to_source[:3, :3])) - 1) < atol)


def resample(volume: Volume, grid: Grid, order: int = 1, fill: float = 0.0) -> Volume:
    """``volume`` on ``grid``: spline interpolation of ``order``; ``fill`` outside.

    Grids that differ by whole voxels (flips, permutations, crops) are copied without
    interpolation.  Linear resampling to voxels more than 1.5 times larger smooths first, so that
    fine detail does not alias.
    """
    to_source = volume.grid.voxel_map(grid)
    data = volume.data
    if same_lattice(to_source):
        to_source, order = np.round(to_source), 0
        start = to_source[:3, 3].astype(int)
        inside = (start >= 0).all() and (start + grid.shape <= volume.grid.shape).all()
        if inside and (to_source[:3, :3] == np.eye(3)).all():
            part = tuple(slice(a, a + n) for a, n in zip(start, grid.shape, strict=True))
            return Volume(data[part].copy(), grid)
    elif order > 0:
        data = data.astype(np.float32)
        ratio = np.linalg.norm(to_source[:3, :3], axis=1)
        if ratio.max() > 1.5:
            # A Gaussian whose full width at half maximum joins the two voxel sizes.
            sigma = np.sqrt(np.maximum(ratio**2 - 1, 0)) / 2.355
            data = ndimage.gaussian_filter(data, sigma)
    moved = ndimage.affine_transform(
        data,
        to_source[:3, :3],
        to_source[:3, 3],
        output_shape=grid.shape,
        order=order,
        mode="grid-constant",
        cval=fill,
    )
    return Volume(moved, grid)
