"""Laws of deformations: closed forms, inverses, direction, volumes."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from cadiff_cli.errors import DataError
from cadiff_cli.spatial.deformation import (
    carried_labels,
    compose,
    exponential,
    jacobian,
    log_jacobian,
    on_grid,
    warp,
)
from cadiff_cli.spatial.grid import Grid

ZOOMS = (4.0, 3.0, 5.0)
SHAPE = (20, 24, 16)
INNER = (..., *(slice(5, -5),) * 3)


def points():
    """(1, 3, X, Y, Z): mm from the grid's centre."""
    indices = np.moveaxis(np.indices(SHAPE), 0, -1) - (np.array(SHAPE) - 1) / 2
    return torch.tensor(np.moveaxis(indices * ZOOMS, -1, 0))[None]


def smooth_velocity(size_mm, seed=0):
    """A random field of the given largest length, smooth over some voxels, 0 at the border."""
    rng = np.random.default_rng(seed)
    fade = ndimage.gaussian_filter(np.pad(np.ones([n - 8 for n in SHAPE]), 4), 1.5)
    noise = [ndimage.gaussian_filter(rng.standard_normal(SHAPE), 2.5) * fade for _ in range(3)]
    velocity = torch.tensor(np.stack(noise))[None]
    return velocity * size_mm / velocity.norm(dim=1).max()


def test_a_constant_velocity_is_a_translation():
    velocity = torch.tensor([6.0, -9.0, 2.5]).reshape(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
    torch.testing.assert_close(exponential(velocity, ZOOMS), velocity.contiguous())


def test_a_linear_velocity_is_a_scaling_in_closed_form():
    """dx/dt = r x arrives at e^r x: volumes change by e^(sum of the rates)."""
    rates = torch.tensor([0.15, -0.1, 0.2], dtype=torch.float64).reshape(1, 3, 1, 1, 1)
    moved = exponential(rates * points(), ZOOMS)
    expected = (rates.exp() - 1) * points()
    torch.testing.assert_close(moved[INNER], expected[INNER], rtol=2e-3, atol=1e-6)
    volumes = log_jacobian(moved, ZOOMS)[INNER]
    torch.testing.assert_close(
        volumes, torch.full_like(volumes, float(rates.sum())), atol=2e-3, rtol=0
    )


def test_the_jacobian_knows_rows_from_columns():
    """A shear and a rotation keep volumes; a linear map has the determinant of its matrix."""
    matrix = torch.tensor([[0.9, 0.4, 0.0], [-0.2, 1.3, 0.1], [0.3, 0.0, 0.8]], dtype=torch.float64)
    moved = torch.einsum("ij,bjxyz->bixyz", matrix - torch.eye(3, dtype=torch.float64), points())
    found = jacobian(moved, ZOOMS)
    torch.testing.assert_close(found, torch.full_like(found, float(torch.linalg.det(matrix))))


@pytest.mark.parametrize("seed", range(3))
def test_the_negative_velocity_undoes_the_map(seed):
    velocity = smooth_velocity(6, seed)
    there, back = exponential(velocity, ZOOMS), exponential(-velocity, ZOOMS)
    assert there.norm(dim=1).max() > 4
    for outer, inner in ((there, back), (back, there)):
        error = compose(outer, inner, ZOOMS).norm(dim=1).max()
        # What remains is the interpolation between voxels of 3 to 5 mm.
        assert error < 0.45
        assert error < compose(-inner, inner, ZOOMS).norm(dim=1).max() / 3


def test_a_velocity_never_folds_where_its_displacement_would():
    velocity = smooth_velocity(40)
    assert (jacobian(velocity, ZOOMS) <= 0).any()
    assert (jacobian(exponential(velocity, ZOOMS), ZOOMS) > 0).all()


def test_an_atlas_reads_the_base_by_the_inverse():
    """Points of the base move by +8 mm along x, and so does what is seen there."""
    base = torch.zeros(1, 1, *SHAPE)
    base[..., 8, 12, 8] = 1
    velocity = torch.tensor([8.0, 0, 0]).reshape(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
    atlas = warp(base, exponential(-velocity, ZOOMS), ZOOMS)
    assert np.unravel_index(int(atlas.argmax()), atlas.shape)[2:] == (10, 12, 8)


def test_compose_applies_the_inner_map_first():
    shift = (
        torch.tensor([4.0, 0, 0], dtype=torch.float64).reshape(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
    )
    double = points()
    both = compose(double, shift, ZOOMS)
    expected = 2 * (points() + shift) - points()
    torch.testing.assert_close(both[INNER], expected[INNER])


def test_velocities_learn():
    velocity = smooth_velocity(5).requires_grad_()
    exponential(velocity, ZOOMS).square().mean().backward()
    assert velocity.grad is not None
    assert velocity.grad.abs().max() > 0


def test_fields_between_grids_are_smooth_splines():
    """On its own points a field keeps its values; between them a cubic stays a cubic."""
    coarse = Grid((12, 14, 10), np.diag([4.0, 3, 5, 1]))
    fine = Grid((21, 25, 17), np.diag([2.0, 1.5, 2.5, 1]))
    x, y, z = np.moveaxis(coarse.to_world(np.moveaxis(np.indices(coarse.shape), 0, -1)), -1, 0)
    field = np.stack([x**2 / 50, y - z, np.sin(x / 12) * np.cos(y / 9)]).astype(np.float32)
    found = on_grid(field, coarse, fine)
    np.testing.assert_allclose(found[:, ::2, ::2, ::2], field[:, :11, :13, :9], atol=1e-4)
    a, b, c = np.moveaxis(fine.to_world(np.moveaxis(np.indices(fine.shape), 0, -1)), -1, 0)
    true = np.stack([a**2 / 50, b - c, np.sin(a / 12) * np.cos(b / 9)])
    middle = (slice(None), *(slice(6, -6),) * 3)
    np.testing.assert_allclose(found[middle], true[middle], atol=0.02)


def test_fields_on_other_axes_are_refused(grid_of):
    with pytest.raises(DataError, match="axes must be R, A and S"):
        on_grid(np.zeros((3, 8, 8, 8), np.float32), grid_of("LPS"), grid_of("RAS"))


def test_carried_labels_are_those_of_interpolated_masks():
    rng = np.random.default_rng(0)
    labels = ndimage.zoom(rng.integers(0, 6, (4, 5, 4)), 3, order=0).astype(np.int16)
    places = rng.uniform(-1, 12, (3, 500))
    shares = np.stack(
        [
            ndimage.map_coordinates((labels == k) * 1.0, places, order=1, mode="nearest")
            for k in range(6)
        ]
    )
    found = carried_labels(labels, places)
    assert found.dtype == labels.dtype
    np.testing.assert_allclose(shares[found, np.arange(500)], shares.max(axis=0), atol=1e-4)
    whole = np.argwhere(labels >= 0).T
    np.testing.assert_array_equal(carried_labels(labels, whole), labels.ravel())
