"""From a registration's field to the velocity that makes a person of the base brain.

The field tells each voxel of a person its place in the base template: the map person -> base, phi.
Its affine part is removed, because pose and size of a head are no property of an age, and every
registration begins with an affine transform anyway.  What is left is the exponential of a
stationary velocity: phi = exp(-v), and exp(v) makes the person's shape of the base brain.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from cadiff_cli.products import Frame
from cadiff_cli.spatial.deformation import compose, exponential, jacobian
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import bounding_box

MARGIN_MM = 10.0
"""A velocity grid is so much larger than the base brain, for larger ones."""
ITERATIONS = 12
FADE_VOXELS = 2.0
"""Beyond the brain a displacement is that of the brain nearby, and fades over a few voxels."""


def velocity_grid(mask: Volume, spacing_mm: float, multiple: int) -> Grid:
    """The grid of velocities around a base brain ``mask``, along its world's axes."""
    box = bounding_box(mask.data > 0.5)
    ends = np.array([[s.start, s.stop - 1] for s in box], dtype=float).T
    low, high = np.sort(mask.grid.to_world(ends), axis=0)
    size = np.ceil((high - low + 2 * MARGIN_MM) / spacing_mm / multiple) * multiple
    affine = np.diag([*[spacing_mm] * 3, 1.0])
    affine[:3, 3] = (low + high) / 2 - affine[:3, :3] @ ((size - 1) / 2)
    x, y, z = (int(n) for n in size)
    return Grid((x, y, z), affine)


@dataclass(frozen=True, eq=False)
class Fit:
    """A velocity (3, X, Y, Z) in mm, and how well it fits the field that it stands for.

    ``affine`` (4, 4) is the part that was removed: the person's mm -> the base's.  ``residual_mm``
    is the root mean square, over the brain, of the distance between exp(-v) and the field's map.
    """

    velocity_mm: np.ndarray
    affine: np.ndarray
    residual_mm: float


def fit_velocity(field: np.ndarray, mask: np.ndarray, grid: Grid, frame: Frame, to: Grid) -> Fit:
    """Fit a velocity on the grid ``to`` to a distance ``field`` (3, X, Y, Z) in [0, 1].

    ``mask`` (X, Y, Z) is the brain on the field's ``grid``; ``frame`` is the base template's.
    """
    ac, low, high = (np.array(v) for v in (frame.ac_mm, frame.low_mm, frame.high_mm))
    base = (ac + low).reshape(3, 1, 1, 1) + field * (high - low).reshape(3, 1, 1, 1)
    person = np.moveaxis(grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1)), -1, 0)
    inside = mask & (field > 0).all(axis=0) & (field < 1).all(axis=0)
    affine = fitted_affine(person[:, inside].T, base[:, inside].T)
    aligned = np.tensordot(affine[:3, :3], person, 1) + affine[:3, 3].reshape(3, 1, 1, 1)
    moved = spread(np.where(inside, base - aligned, 0), inside)
    # On the base's own grid: voxel -> base mm -> person mm -> voxel of the field.
    to_field = np.linalg.inv(grid.affine) @ np.linalg.inv(affine) @ to.affine
    ijk = np.tensordot(to_field[:3, :3], np.indices(to.shape), 1) + to_field[:3, 3].reshape(
        3, 1, 1, 1
    )
    phi = torch.from_numpy(
        np.stack([ndimage.map_coordinates(each, ijk, order=1) for each in moved])
    ).float()[None]
    weight = ndimage.map_coordinates(inside.astype(np.float32), ijk, order=1) > 0.5
    velocity = logarithm(phi, to.spacing_mm.tolist())
    residual = exponential(-velocity, to.spacing_mm.tolist()) - phi
    distance = residual.square().sum(dim=1)[0].numpy()[weight]
    return Fit(velocity[0].numpy(), affine, float(np.sqrt(distance.mean())))


def fitted_affine(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(4, 4): the affine map that takes ``points`` (n, 3) nearest to ``targets`` (n, 3)."""
    ones = np.ones((len(points), 1))
    solution, *_ = np.linalg.lstsq(np.hstack([points, ones]), targets, rcond=None)
    affine = np.eye(4)
    affine[:3] = solution.T
    return affine


def spread(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """``values`` (3, X, Y, Z), continued beyond ``inside`` by weighted means that fade to 0."""
    weight = ndimage.gaussian_filter(inside.astype(np.float32), FADE_VOXELS)
    around = np.stack([ndimage.gaussian_filter(each, FADE_VOXELS) for each in values * inside])
    near = np.clip(weight / 0.05, 0, 1)
    return np.where(inside, values, near * around / np.maximum(weight, 1e-6))


def logarithm(phi_mm: Tensor, zooms_mm: list[float], iterations: int = ITERATIONS) -> Tensor:
    """The velocity v with exp(-v) = ``phi`` (1, 3, X, Y, Z) as nearly as there is one.

    What is left of phi after exp(v) is the error of -v, to first order of the Baker-Campbell-
    Hausdorff formula (Bossa and Olmos, 2008).
    """
    velocity = -phi_mm
    for _ in range(iterations):
        velocity = velocity - compose(phi_mm, exponential(velocity, zooms_mm), zooms_mm)
    return velocity


def folded(velocity_mm: Tensor, zooms_mm: list[float]) -> int:
    """Voxels at which exp(v) of (1, 3, X, Y, Z) does not keep orientation."""
    return int((jacobian(exponential(velocity_mm, zooms_mm), zooms_mm) <= 0).sum())
