"""Deformations of space: velocities, displacements, what they do to images and to volumes.

Fields are tensors (B, 3, X, Y, Z): for each voxel of a grid whose axes are R, A and S, the velocity
or displacement of its point in RAS mm.  ``zooms_mm`` are the edges of that grid's voxels.  A
displacement ``u`` stands for the map ``x -> x + u(x)`` of points.

The exponential of a velocity field is a map that can be undone, and its inverse is the exponential
of the negative field (Arsigny et al., 2006).  By convention ``exponential(v)`` takes a point of a
base brain to the same point of the anatomy that ``v`` stands for; the *image* of that anatomy is
therefore ``warp(base, exponential(-v))``.  Beyond the grid a field has the values of its border.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from monai.networks.blocks import DVF2DDF, Warp
from scipy import ndimage
from torch import Tensor

from cadiff_cli.errors import DataError
from cadiff_cli.spatial.grid import Grid

Zooms = Sequence[float] | np.ndarray
SQUARINGS = 7
"""A velocity is divided by 2^7: a step of a 20 mm displacement is then 0.16 mm."""


def exponential(velocity_mm: Tensor, zooms_mm: Zooms, squarings: int = SQUARINGS) -> Tensor:
    """The displacement (B, 3, X, Y, Z) in mm at which a stationary velocity arrives in unit time.

    Scaling and squaring (Arsigny et al., 2006), differentiable; fewer ``squarings`` are faster.
    """
    with _silent():
        integrate = DVF2DDF(squarings, padding_mode="border")
    zooms = _column(zooms_mm, velocity_mm)
    return torch.as_tensor(integrate(velocity_mm / zooms) * zooms)


def compose(outer_mm: Tensor, inner_mm: Tensor, zooms_mm: Zooms) -> Tensor:
    """The displacement of ``x -> outer(inner(x))``."""
    return inner_mm + warp(outer_mm, inner_mm, zooms_mm)


def warp(image: Tensor, displacement_mm: Tensor, zooms_mm: Zooms, mode: str = "bilinear") -> Tensor:
    """An ``image`` (B, C, X, Y, Z) read at ``x + u(x)``; ``mode`` as ``grid_sample`` spells it.

    Images of classes are warped as probabilities, one channel a class, or by ``"nearest"``.
    """
    with _silent():
        read = Warp(mode, padding_mode="border")
    return torch.as_tensor(read(image, displacement_mm / _column(zooms_mm, displacement_mm)))


def jacobian(displacement_mm: Tensor, zooms_mm: Zooms) -> Tensor:
    """(B, X, Y, Z): the factor by which ``x -> x + u(x)`` changes volumes; 0 or less is a fold."""
    # Rows are components of the displacement, columns are directions of the derivative.
    slopes = torch.gradient(displacement_mm, spacing=list(map(float, zooms_mm)), dim=(2, 3, 4))
    (a, b, c), (d, e, f), (g, h, i) = (
        [slope[:, row] + (row == column) for column, slope in enumerate(slopes)] for row in range(3)
    )
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def log_jacobian(displacement_mm: Tensor, zooms_mm: Zooms) -> Tensor:
    """(B, X, Y, Z): the logarithm of ``jacobian``; 0 keeps volumes, NaN or -inf is a fold."""
    return jacobian(displacement_mm, zooms_mm).log()


def on_grid(field: np.ndarray, source: Grid, grid: Grid) -> np.ndarray:
    """A field (C, X, Y, Z) float32 on another grid, by cubic splines.

    Raises what ``splines_between`` raises.
    """
    for axis, splines in enumerate(splines_between(source, grid)):
        field = np.moveaxis(np.tensordot(splines, field, (1, axis + 1)), 0, axis + 1)
    return np.ascontiguousarray(field, dtype=np.float32)


def splines_between(source: Grid, grid: Grid) -> list[np.ndarray]:
    """For each axis (n of ``grid``, n of ``source``) float32: cubic splines, as a matrix.

    The axes of both grids are R, A and S, so one axis is interpolated after the other.  Raises
    ``DataError`` for other axes.
    """
    to_source = source.voxel_map(grid)
    for one in (source, grid):
        if not np.allclose(one.affine[:3, :3], np.diag(one.spacing_mm), atol=1e-6):
            raise DataError(
                f"a deformation is given on {one!r}",
                "its axes must be R, A and S: use another base",
            )
    return [
        _splines(n, to_source[axis, axis] * np.arange(grid.shape[axis]) + to_source[axis, 3])
        for axis, n in enumerate(source.shape)
    ]


def _splines(n: int, places: np.ndarray) -> np.ndarray:
    """(places, n) float32: what each of ``n`` samples adds to a cubic spline at each place."""
    samples = np.eye(n)
    rows = [ndimage.map_coordinates(row, [places], order=3, mode="nearest") for row in samples]
    return np.stack(rows, axis=1).astype(np.float32)


def carried_labels(labels: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The label that weighs most at each place, by linear interpolation of every label's mask.

    ``labels`` (X, Y, Z); ``places`` (3, n) in voxels, beyond the image those of its border.
    """
    size = np.array(labels.shape)[:, None]
    places = np.clip(places, 0, size - 1)
    low = np.minimum(places.astype(np.int32), np.maximum(size - 2, 0))
    share = (places - low).astype(np.float32)
    corners = [np.array(corner)[:, None] for corner in np.ndindex(2, 2, 2)]
    found = [labels[tuple(np.minimum(low + corner, size - 1))] for corner in corners]
    weights = [np.where(corner, share, 1 - share).prod(axis=0) for corner in corners]
    best, most = found[0].copy(), np.full(places.shape[1], -1, dtype=np.float32)
    for label in found:
        weight = sum(w * (other == label) for other, w in zip(found, weights, strict=True))
        # Rounding errors must not decide between equals.
        wins = weight > most + 1e-5
        best[wins], most[wins] = label[wins], weight[wins]
    return np.asarray(best)


def _column(zooms_mm: Zooms, like: Tensor) -> Tensor:
    return like.new_tensor(tuple(map(float, zooms_mm))).reshape(1, 3, 1, 1, 1)


def _silent() -> "warnings.catch_warnings[None]":
    """MONAI warns that its optional C++ extension is not compiled."""
    return warnings.catch_warnings(action="ignore")
