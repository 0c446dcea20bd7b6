"""Resampling: exact where no interpolation is needed, and linear where it is."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import (
    bounding_box,
    grid_around,
    mapped_box,
    pool,
    resample,
    resample_in,
    resample_labels,
)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("shift", [(0, 0, 0), (3, -2, 5), (-20, 0, 0)])
def test_whole_voxel_shifts_are_copies(order, shift):
    rng = np.random.default_rng(0)
    volume = Volume(rng.standard_normal((16, 17, 18)), Grid((16, 17, 18), np.diag([2, 2, 2, 1])))
    moved = resample(volume, volume.grid.crop(shift, volume.grid.shape), order=order, fill=-9)
    padded = np.pad(volume.data, 20, constant_values=-9)
    i, j, k = (20 + s for s in shift)
    np.testing.assert_array_equal(moved.data, padded[i : i + 16, j : j + 17, k : k + 18])


def ramp(grid):
    world = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    return world @ np.array([0.3, -0.2, 0.7]) + 4


@pytest.mark.parametrize("source", ["RAS", "LPS", "oblique"])
def test_linear_functions_survive_linear_interpolation(grid_of, orientation, source):
    here, there = grid_of(source, 4.0), grid_of(orientation, (3.0, 4.5, 5.0), scale=0.6)
    moved = resample(Volume(ramp(here).astype(np.float32), here), there)
    np.testing.assert_allclose(moved.data, ramp(there), atol=1e-2)


def test_large_voxels_average_small_ones():
    """Noise of standard deviation 1 loses most of it; a point sample would keep it."""
    rng = np.random.default_rng(0)
    volume = Volume(rng.standard_normal((60, 60, 60)), Grid((60, 60, 60), np.eye(4)))
    coarse = resample(volume, volume.grid.coarsen(3))
    assert 0.01 < coarse.data.std() < 0.4


def test_outside_is_filled():
    volume = Volume(np.ones((8, 8, 8)), Grid((8, 8, 8), np.eye(4)))
    far = resample(volume, volume.grid.crop((100, 0, 0), (4, 4, 4)), fill=7.0)
    assert (far.data == 7).all()


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_image_reaches_to_the_ends_of_its_voxels(order, axis):
    """Thick slices do not fade where they end: inside they are whole, and outside is nothing."""
    spacing = np.where(np.arange(3) == axis, 6.0, 1.0)
    grid = Grid(tuple(np.where(np.arange(3) == axis, 4, 20)), np.diag([*spacing, 1]))
    volume = Volume(np.full(grid.shape, 100, np.float32), grid)
    working = grid.working()
    wide = working.crop((-5, -5, -5), tuple(n + 10 for n in working.shape))
    found = resample(volume, wide, order, fill=-1).data
    expected = np.pad(np.full(working.shape, 100.0), 5, constant_values=-1)
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_a_box_holds_what_the_whole_image_would(grid_of, orientation, order):
    """Nothing is lost by looking only at a part, of the source as of the result."""
    rng = np.random.default_rng(1)
    here, there = grid_of("oblique", 2.0), grid_of(orientation, (1.5, 2.0, 2.2))
    volume = Volume(rng.standard_normal(here.shape).astype(np.float32), here)
    whole = resample(volume, there, order, fill=-3).data
    box = tuple(slice(n // 3, n // 3 + 6) for n in there.shape)
    part = resample_in(box, volume, there, order, fill=-3).data
    np.testing.assert_allclose(part[box], whole[box], atol=1e-4)
    outside = np.ones(there.shape, dtype=bool)
    outside[box] = False
    assert (part[outside] == -3).all()


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("spacing", [0.7, 1.3, 4.0])
@pytest.mark.parametrize("source", ["RAS", "LPS"])
def test_a_tilt_of_next_to_nothing_changes_next_to_nothing(grid_of, source, order, spacing):
    """Straight grids have a way of their own through the code."""
    rng = np.random.default_rng(2)
    here = grid_of(source, 2.0, scale=0.6)
    smooth = ndimage.gaussian_filter(rng.standard_normal(here.shape), 1.0).astype(np.float32)
    there = here.working(spacing, tolerance=0.0).crop((-2, 1, 0), (24, 20, 22))
    affine = there.affine.copy()
    affine[:3, :3] = Rotation.from_rotvec([1e-4, -1e-4, 1e-4]).as_matrix() @ affine[:3, :3]
    tilted = Grid(there.shape, affine)
    volume = Volume(smooth, here)
    straight, other = (resample(volume, grid, order).data for grid in (there, tilted))
    assert straight.std() > 0.05
    assert np.quantile(abs(straight - other), 0.99) < 0.02 * straight.std()


def test_a_mapped_box_holds_the_images_of_its_voxels(grid_of, orientation):
    here, there = grid_of("oblique", 2.0), grid_of(orientation, 3.0)
    mask = np.zeros(here.shape, dtype=bool)
    mask[3:9, 4:6, 5:11] = True
    box = bounding_box(mask)
    assert box == (slice(3, 9), slice(4, 6), slice(5, 11))
    wider = bounding_box(mask, np.array((5, 0, 1)))
    assert wider == (slice(0, min(14, mask.shape[0])), slice(4, 6), slice(4, 12))
    found = mapped_box(box, there.voxel_map(here), there.shape)
    to_there = there.voxel_map(here)
    images = np.argwhere(mask) @ to_there[:3, :3].T + to_there[:3, 3]
    for axis, side in enumerate(found):
        inside = np.clip(images[:, axis], 0, there.shape[axis] - 1)
        assert side.start <= inside.min()
        assert inside.max() <= side.stop - 1
        assert side.stop - side.start <= np.ptp(inside) + 3


def test_an_empty_mask_has_an_empty_box():
    assert bounding_box(np.zeros((4, 4, 4), dtype=bool)) == (slice(0, 0),) * 3


def test_classes_that_need_two_bytes_survive():
    """A ball of class 300 and one of class 44, its last byte, on a grid half a voxel away."""
    classes = np.zeros((20, 20, 20), dtype=np.int16)
    classes[3:9, 3:9, 3:9], classes[12:18, 12:18, 12:18] = 300, 44
    labels = Volume(classes, Grid((20, 20, 20), np.eye(4)))
    moved = resample_labels(
        labels, Grid((19, 19, 19), np.diag([1, 1, 1, 1.0]) + np.eye(4, k=3) / 2)
    )
    assert set(np.unique(moved.data)) == {0, 44, 300}
    assert (moved.data[4:8, 4:8, 4:8] == 300).all()


@pytest.mark.parametrize(("margin", "multiple"), [(0, 1), (3, 1), (2, 8)])
def test_the_grid_around_a_mask_has_its_margin_and_its_multiples(margin, multiple):
    """It is a part of the lattice, holds the mask evenly, and may leave the image."""
    grid = Grid((9, 12, 15), np.diag([2.0, 1.5, 1.0, 1.0]))
    mask = np.zeros(grid.shape, bool)
    mask[1:6, 2:4, 8:15] = True
    around = grid_around(mask, grid, margin, multiple)
    assert all(n % multiple == 0 for n in around.shape)
    inside = resample(Volume(mask.astype(np.float32), grid), around, order=0).data > 0
    assert inside.sum() == mask.sum()
    for axis, n in enumerate(around.shape):
        held = np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis})))
        before, after = held[0], n - 1 - held[-1]
        assert margin <= before <= after <= before + 1
        assert after < margin + multiple


def test_blocks_become_their_means():
    """Of any type, and what is no whole block is left out."""
    data = np.arange(2 * 5 * 4 * 6).reshape(2, 5, 4, 6)
    pooled = pool(data, 2)
    assert pooled.shape == (2, 2, 2, 3)
    assert pooled[1, 1, 0, 2] == data[1, 2:4, 0:2, 4:6].mean()
    assert np.array_equal(pool(data > 100, 2), pool((data > 100).astype(np.float32), 2))
