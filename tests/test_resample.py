"""Resampling: exact where no interpolation is needed, and linear where it is."""

import numpy as np
import pytest

from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import resample


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
