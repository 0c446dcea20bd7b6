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

import torch
from monai.networks.blocks import DVF2DDF, Warp
from torch import Tensor

SQUARINGS = 7
"""A velocity is divided by 2^7: a step of a 20 mm displacement is then 0.16 mm."""


def exponential(velocity_mm: Tensor, zooms_mm: Sequence[float]) -> Tensor:
    """The displacement (B, 3, X, Y, Z) in mm at which a stationary velocity arrives in unit time.

    Scaling and squaring (Arsigny et al., 2006), differentiable.
    """
    with _silent():
        integrate = DVF2DDF(SQUARINGS, padding_mode="border")
    zooms = _column(zooms_mm, velocity_mm)
    return torch.as_tensor(integrate(velocity_mm / zooms) * zooms)


def compose(outer_mm: Tensor, inner_mm: Tensor, zooms_mm: Sequence[float]) -> Tensor:
    """The displacement of ``x -> outer(inner(x))``."""
    return inner_mm + warp(outer_mm, inner_mm, zooms_mm)


def warp(
    image: Tensor, displacement_mm: Tensor, zooms_mm: Sequence[float], mode: str = "bilinear"
) -> Tensor:
    """An ``image`` (B, C, X, Y, Z) read at ``x + u(x)``; ``mode`` as ``grid_sample`` spells it.

    Images of classes are warped as probabilities, one channel a class, or by ``"nearest"``.
    """
    with _silent():
        read = Warp(mode, padding_mode="border")
    return torch.as_tensor(read(image, displacement_mm / _column(zooms_mm, displacement_mm)))


def jacobian(displacement_mm: Tensor, zooms_mm: Sequence[float]) -> Tensor:
    """(B, X, Y, Z): the factor by which ``x -> x + u(x)`` changes volumes; 0 or less is a fold."""
    # Rows are components of the displacement, columns are directions of the derivative.
    slopes = torch.gradient(displacement_mm, spacing=list(map(float, zooms_mm)), dim=(2, 3, 4))
    (a, b, c), (d, e, f), (g, h, i) = (
        [slope[:, row] + (row == column) for column, slope in enumerate(slopes)] for row in range(3)
    )
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def log_jacobian(displacement_mm: Tensor, zooms_mm: Sequence[float]) -> Tensor:
    """(B, X, Y, Z): the logarithm of ``jacobian``; 0 keeps volumes, NaN or -inf is a fold."""
    return jacobian(displacement_mm, zooms_mm).log()


def _column(zooms_mm: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(tuple(map(float, zooms_mm))).reshape(1, 3, 1, 1, 1)


def _silent() -> "warnings.catch_warnings[None]":
    """MONAI warns that its optional C++ extension is not compiled."""
    return warnings.catch_warnings(action="ignore")
