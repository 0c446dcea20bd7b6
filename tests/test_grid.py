"""Laws of grids: worlds are kept, and 1 mm scans are never interpolated."""

import numpy as np
import pytest

from cadiff_cli.errors import DataError
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import resample

ISOTROPIC_AND_NOT = (1.0, (1.0, 1.2, 0.9), (0.8, 0.8, 1.6))


def corners(grid):
    """(8, 3) world positions of the outer corners of the field of view."""
    ends = [(-0.5, n - 0.5) for n in grid.shape]
    return grid.to_world(np.stack(np.meshgrid(*ends, indexing="ij"), -1).reshape(-1, 3))


def test_working_grid_keeps_one_mm_scans_exactly(phantom, orientation):
    t1 = phantom(orientation, 1.0, scale=0.5).t1
    working = resample(t1, t1.grid.working(), order=3)
    assert working.data.sum() == pytest.approx(t1.data.sum(), rel=1e-6)
    np.testing.assert_array_equal(resample(working, t1.grid, order=3).data, t1.data)


@pytest.mark.parametrize("axes", ["PIR", "SLA", "LIP"])
def test_working_grid_undoes_permutations(phantom, axes):
    t1 = phantom(axes, 1.0, scale=0.5).t1
    reference = phantom("RAS", 1.0, scale=0.5, noise=0.0).t1
    working = resample(phantom(axes, 1.0, scale=0.5, noise=0.0).t1, t1.grid.working(), order=3)
    np.testing.assert_allclose(working.grid.affine, reference.grid.affine, atol=1e-9)
    np.testing.assert_allclose(working.data, reference.data, atol=1e-4)


@pytest.mark.parametrize("spacing", ISOTROPIC_AND_NOT)
def test_working_grid_is_ras_and_one_mm(grid_of, orientation, spacing):
    working = grid_of(orientation, spacing).working()
    np.testing.assert_allclose(working.spacing_mm, 1, atol=0.011)
    # Nearest to RAS: the diagonal dominates and is positive.
    directions = working.affine[:3, :3] / working.spacing_mm
    assert (abs(directions).argmax(axis=0) == np.arange(3)).all()
    assert (np.diag(directions) > 0.9).all()


@pytest.mark.parametrize("spacing", ISOTROPIC_AND_NOT)
def test_working_grid_covers_the_field_of_view_about_its_centre(grid_of, orientation, spacing):
    native = grid_of(orientation, spacing)
    working = native.working()
    inside = np.linalg.inv(working.affine)
    ijk = corners(native) @ inside[:3, :3].T + inside[:3, 3]
    slack = 1e-6
    assert (ijk > -0.5 - slack).all()
    assert (ijk < np.array(working.shape) - 0.5 + slack).all()
    assert (np.ptp(ijk, axis=0) > np.array(working.shape) - 1).all()
    np.testing.assert_allclose(corners(native).mean(0), corners(working).mean(0), atol=1e-6)


def test_spacing_within_tolerance_is_left_alone(grid_of):
    assert grid_of("RAS", (1.005, 1.0, 0.995)).working().spacing_mm == pytest.approx(
        [1.005, 1.0, 0.995]
    )


def test_voxel_volume_is_the_determinant(grid_of, orientation):
    assert grid_of(orientation, (0.5, 1.0, 3.0)).voxel_volume_mm3 == pytest.approx(1.5)
    shear = np.eye(4)
    shear[0, 1] = 0.7
    assert Grid((9, 9, 9), shear).voxel_volume_mm3 == pytest.approx(1)


def test_crop_keeps_world_positions(grid_of, orientation):
    grid = grid_of(orientation, 2.0)
    start, ijk = np.array([3, -4, 5]), np.array([[0, 0, 0], [2, 9, 4]])
    cropped = grid.crop(tuple(start), (10, 11, 12))
    assert cropped.shape == (10, 11, 12)
    np.testing.assert_allclose(cropped.to_world(ijk), grid.to_world(ijk + start))


def test_coarsen_keeps_block_centres_and_composes(grid_of, orientation):
    grid = grid_of(orientation, 1.0).crop((0, 0, 0), (32, 48, 64))
    coarse = grid.coarsen(2)
    np.testing.assert_allclose(
        coarse.to_world(np.array([3, 0, 7])), grid.to_world([6.5, 0.5, 14.5])
    )
    np.testing.assert_allclose(coarse.coarsen(2).affine, grid.coarsen(4).affine)
    assert coarse.voxel_volume_mm3 == pytest.approx(8 * grid.voxel_volume_mm3)
    np.testing.assert_allclose(corners(coarse), corners(grid))


def test_voxel_map_is_the_way_through_the_world(grid_of):
    here, there = grid_of("oblique", (1.0, 1.1, 0.9)), grid_of("LPS", 2.0)
    ijk, matrix = np.array([3.0, 40.0, 7.0]), here.voxel_map(there)
    np.testing.assert_allclose(
        here.to_world(matrix[:3, :3] @ ijk + matrix[:3, 3]), there.to_world(ijk)
    )


@pytest.mark.parametrize(
    "affine",
    [
        np.zeros((4, 4)),
        np.diag([1.0, 1, 0, 1]),
        np.diag([1.0, 1, np.nan, 1]),
        np.diag([1.0, np.inf, 1, 1]),
        np.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        np.array([[1.0, 1, 0, 0], [1, 1.0001, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        np.eye(3),
    ],
    ids=["zero", "flat", "nan", "inf", "collapsed", "nearly parallel", "3x3"],
)
def test_affines_that_span_no_volume_are_refused(affine):
    with pytest.raises(DataError) as caught:
        Grid((8, 8, 8), affine)
    assert caught.value.remedy


def test_volumes_are_read_only_and_fit_their_grid(grid_of):
    data = np.zeros((8, 8, 8))
    volume = Volume(data, Grid((8, 8, 8), np.eye(4)))
    with pytest.raises(ValueError, match="read-only"):
        volume.data[0, 0, 0] = 1
    data[0, 0, 0] = 1  # the caller's array stays the caller's
    with pytest.raises(ValueError, match="read-only"):
        volume.grid.affine[0, 0] = 2
    with pytest.raises(DataError, match="grid of shape"):
        Volume(data, Grid((8, 8, 9), np.eye(4)))


def test_a_sheared_grid_is_worked_on_without_shear():
    """ITK knows only orthogonal axes; the field of view keeps its centre and spacing."""
    affine = np.eye(4)
    affine[1, 2] = 0.05
    grid = Grid((100, 120, 90), affine)
    working = grid.working()
    directions = working.affine[:3, :3] / working.spacing_mm
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-9)
    middle = (np.array(grid.shape) - 1) / 2
    np.testing.assert_allclose(
        working.to_world((np.array(working.shape) - 1) / 2), grid.to_world(middle), atol=1e-9
    )
