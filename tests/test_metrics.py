"""Agreement of label maps with closed-form answers."""

import itertools
import math

import numpy as np
import pytest

from cadiff_cli.errors import UsageError
from cadiff_cli.evaluation.scores import score_classes
from cadiff_cli.metrics.overlap import dice
from cadiff_cli.metrics.surface import hausdorff95_mm, surface_dice
from cadiff_cli.spatial.grid import Grid, Volume

EDGE = 12
SPACINGS = [(1.0, 1.0, 1.0), (2.0, 1.0, 0.5)]


def cube(shift=0, label=1, size=40):
    """A cube of ``EDGE`` voxels, ``shift`` voxels along x."""
    data = np.zeros((size, size, size), dtype=np.uint8)
    data[8 + shift : 8 + shift + EDGE, 10 : 10 + EDGE, 12 : 12 + EDGE] = label
    return data


def sphere(radius_mm, spacing_mm, fov_mm=40.0):
    """A ball in the middle of a cubic field of view."""
    axes = [np.arange(0, fov_mm, s) - fov_mm / 2 for s in spacing_mm]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return (x**2 + y**2 + z**2 < radius_mm**2).astype(np.uint8)


@pytest.mark.parametrize("shift", [0, 1, 5, EDGE, 16])
def test_dice_of_shifted_cubes(shift):
    assert dice(cube(shift), cube(), [1])[0] == pytest.approx(max(0, 1 - shift / EDGE))


def test_dice_is_symmetric_and_per_class():
    a, b = cube(3) + cube(16, 2), cube() + cube(16, 2)
    np.testing.assert_allclose(dice(a, b, [1, 2, 3]), [0.75, 1, np.nan])
    np.testing.assert_allclose(dice(b, a, [2, 1]), [1, 0.75])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_surface_dice_turns_at_the_tolerance(shift, spacing):
    distance = shift * spacing[0]
    at, below = (
        surface_dice(cube(shift), cube(), [1], spacing, tolerance)[0]
        for tolerance in (distance + 1e-3, distance - 1e-3)
    )
    assert at == pytest.approx(1)
    # Only the two faces across x are off; four of six are not (but for a rim).
    assert 0.4 < below < 0.95


@pytest.mark.parametrize("tolerance", [-1, math.nan, math.inf])
def test_impossible_tolerances_are_refused(tolerance):
    with pytest.raises(UsageError, match="tolerance"):
        surface_dice(cube(), cube(), [1], (1, 1, 1), tolerance)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("shift", [0, 1, 4, EDGE])
def test_hd95_of_a_shifted_cube_is_the_shift(shift, spacing):
    """A fifth of the border voxels is on the leading face, and all of it is off by the shift."""
    for a, b in ((cube(shift), cube()), (cube(), cube(shift))):
        assert hausdorff95_mm(a, b, [1], spacing)[0] == pytest.approx(shift * spacing[0])


def test_hd95_forgives_a_speck():
    """One far voxel is less than 5 % of a surface (the maximum would be 20 mm)."""
    speck = cube()
    speck[39, 15, 18] = 1
    assert hausdorff95_mm(speck, cube(), [1], (1, 1, 1))[0] == 0


@pytest.mark.parametrize("spacing", SPACINGS)
def test_concentric_spheres(spacing):
    """Distances are millimetres on any grid; a voxel is the error that is left."""
    small, large = sphere(10, spacing), sphere(14, spacing)
    voxel = np.linalg.norm(spacing)
    assert hausdorff95_mm(small, large, [1], spacing)[0] == pytest.approx(4, abs=voxel / 2)
    assert surface_dice(small, large, [1], spacing, 4 + voxel)[0] == pytest.approx(1)
    assert surface_dice(small, large, [1], spacing, 4 - voxel)[0] == pytest.approx(0, abs=0.01)
    assert dice(small, large, [1])[0] == pytest.approx(2 * 10**3 / (10**3 + 14**3), rel=0.02)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_orientation_does_not_matter(order):
    """Axes in another order, one of them reversed, with their spacing."""
    spacing = (2.0, 1.0, 0.5)
    turned = [spacing[axis] for axis in order]
    a, b = cube(2), cube() | np.roll(cube(), (3, 1, 0), (0, 1, 2))
    p, r = (np.flip(m.transpose(order), axis=order[0]) for m in (a, b))
    assert dice(p, r, [1]) == pytest.approx(dice(a, b, [1]))
    for measure in (surface_dice, hausdorff95_mm):
        expected = measure(a, b, [1], spacing)
        np.testing.assert_allclose(measure(p, r, [1], turned), expected, rtol=1e-5)


def test_distances_on_a_sheared_grid_are_millimetres(parcellation):
    """Gantry tilt: the spacing alone does not tell how far two voxels are from each other."""
    affine = np.eye(4)
    affine[1, 2] = 0.8
    grid = Grid((24, 60, 24), affine)
    maps = []
    for j, k in ((30, 4), (20, 16)):
        classes = np.zeros(grid.shape, dtype=np.uint8)
        classes[8:12, j : j + 4, k : k + 2] = 1
        maps.append(Volume(classes, grid))
    scores = score_classes("sub-a", *maps, parcellation, "all")
    distance = np.linalg.norm(affine[:3, :3] @ (0, -10, 12))  # 12 mm; without the tilt 18
    assert scores[0].hd95_mm == pytest.approx(distance, abs=1.0)


@pytest.mark.parametrize("measure", [surface_dice, hausdorff95_mm])
def test_what_is_far_away_is_ignored(measure):
    """Cropping to the structure must not change its score, nor must the image's border."""
    wide = measure(cube(2, size=80), cube(size=80), [1], (1, 1, 1))
    np.testing.assert_allclose(measure(cube(2), cube(), [1], (1, 1, 1)), wide)
    cut = (slice(8, None), slice(10, 22), slice(12, 24))
    np.testing.assert_allclose(measure(cube(2)[cut], cube()[cut], [1], (1, 1, 1)), wide)


@pytest.mark.parametrize(
    ("measure", "one_sided"),
    [
        (dice, 0),
        (lambda p, r, k: surface_dice(p, r, k, (1.0, 1.0, 1.0)), 0),
        (lambda p, r, k: hausdorff95_mm(p, r, k, (1.0, 1.0, 1.0)), math.inf),
    ],
    ids=["dice", "nsd", "hd95"],
)
def test_missing_structures(measure, one_sided):
    """On one side the worst score, whichever side it is; on both sides not a number."""
    both = measure(cube() + cube(16, 3), cube(), [1, 2, 3])
    assert np.isfinite(both[0])
    assert np.isnan(both[1])
    assert both[2] == one_sided
    assert measure(0 * cube(), cube(), [1])[0] == one_sided
    assert np.isnan(measure(0 * cube(), 0 * cube(), [1])[0])
