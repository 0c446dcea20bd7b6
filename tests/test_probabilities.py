"""Class probabilities: the best class, their entropy, and their way onto another grid."""

import math

import numpy as np
import pytest
import torch
from conftest import dense, probabilities_of

from cadiff_cli.spatial.grid import Grid
from cadiff_cli.spatial.probabilities import Probabilities, on_native


def random_p(shape, sharpness=1.0, seed=0):
    """Probabilities of 4 classes that are smooth enough to be sure in places."""
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(4, *shape, generator=generator)).softmax(dim=0)


def some_of(p, seed=0):
    """The probabilities of a random half of the voxels, in any order."""
    whole = probabilities_of(p)
    order = torch.randperm(len(whole.voxels), generator=torch.Generator().manual_seed(seed))
    chosen = order[: len(order) // 2]
    return Probabilities(whole.values[chosen], whole.voxels[chosen], whole.shape)


def test_the_most_probable_is_the_argmax():
    p = random_p((9, 8, 7))
    best = probabilities_of(p).most_probable()
    np.testing.assert_array_equal(best, p.argmax(dim=0).numpy())


def test_voxels_that_are_left_out_are_background():
    p = random_p((9, 8, 7))
    some = some_of(p)
    kept = np.zeros(p[0].numel(), bool)
    kept[some.voxels.numpy()] = True
    kept = kept.reshape(p.shape[1:])
    whole = dense(some).numpy()
    np.testing.assert_array_equal(whole[:, kept], p.numpy()[:, kept])
    assert (whole[0, ~kept] == 1).all()
    assert (whole[1:, ~kept] == 0).all()
    np.testing.assert_array_equal(some.most_probable(), whole.argmax(axis=0))
    assert (some.uncertainty()[~kept] == 0).all()
    assert (some.uncertainty()[kept] > 0).all()


def test_uncertainty_is_0_for_certainty_and_1_for_ignorance():
    certain = torch.zeros(41, 2, 3, 4)
    certain[7] = 1
    assert (probabilities_of(certain).uncertainty() == 0).all()
    np.testing.assert_allclose(
        probabilities_of(torch.full((41, 2, 3, 4), 1 / 41)).uncertainty(), 1, atol=1e-5
    )
    torn = torch.zeros(41, 2, 3, 4)
    torn[3:5] = 0.5
    np.testing.assert_allclose(
        probabilities_of(torn).uncertainty(), math.log(2) / math.log(41), atol=1e-6
    )


def native_posteriors(p, grid, native):
    """All probabilities at every voxel of another grid."""
    everywhere = np.ones(native.shape, bool)
    return on_native(p, grid, native, everywhere, posteriors=True).posteriors


def moved(grid, shape, linear, shift):
    """A grid whose voxel ``ijk`` lies at ``linear @ ijk + shift`` of ``grid``'s."""
    to_voxel = np.eye(4)
    to_voxel[:3, :3], to_voxel[:3, 3] = linear, shift
    return Grid(shape, grid.affine @ to_voxel)


@pytest.fixture
def crop():
    return Grid((9, 8, 7), np.diag([-1.0, 1.5, 1.0, 1.0]))


def test_whole_voxels_are_copied(crop):
    """A shift by whole voxels and a flip: values stay, and outside is background."""
    p = random_p(crop.shape)
    native = moved(crop, (9, 8, 9), np.diag([1, -1, 1]), (0, 7, -1))
    found = native_posteriors(probabilities_of(p), crop, native).astype(np.float32)
    np.testing.assert_allclose(found[..., 1:-1], p.flip(2).numpy(), atol=1e-3)
    for outside in (found[..., 0], found[..., -1]):
        assert (outside[0] == 1).all()
        assert (outside[1:] == 0).all()
    everywhere = np.ones(native.shape, bool)
    np.testing.assert_array_equal(
        on_native(probabilities_of(p), crop, native, everywhere).classes[..., 1:-1],
        p.flip(2).argmax(dim=0).numpy(),
    )


def test_probabilities_between_voxels_sum_to_one(crop):
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1.3]])
    found = native_posteriors(
        probabilities_of(random_p(crop.shape)),
        crop,
        moved(crop, (12, 12, 8), turn, (2, -3, -1)),
    )
    np.testing.assert_allclose(found.astype(np.float32).sum(axis=0), 1, atol=3e-3)
    assert (found[0] < 1).any()


def test_labels_sums_and_probabilities_come_from_the_same_points(crop):
    """Within a mask; outside of it, and where nothing is known, there is background."""
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1.3]])
    native = moved(crop, (12, 12, 8), turn, (2, -3, -1))
    inside = np.random.default_rng(0).random(native.shape) > 0.5
    p = some_of(random_p(crop.shape))
    found = on_native(p, crop, native, inside, [(1, 3), (2,)], posteriors=True)
    everywhere = native_posteriors(p, crop, native)
    np.testing.assert_array_equal(found.posteriors[:, inside], everywhere[:, inside])
    assert (found.posteriors[0, ~inside] == 1).all()
    assert not found.posteriors[1:, ~inside].any()
    wide = found.posteriors.astype(np.float32)
    chosen = np.take_along_axis(wide, found.classes[None].astype(int), axis=0)[0]
    np.testing.assert_allclose(chosen, wide.max(axis=0), atol=2e-3)
    np.testing.assert_allclose(found.sums[0], (wide[1] + wide[3]) * inside, atol=2e-3)
    np.testing.assert_allclose(found.sums[1], wide[2] * inside, atol=2e-3)


def test_a_large_voxel_is_the_mean_of_the_small_ones_in_it(crop):
    p = random_p((8, 8, 6))
    grid = Grid((8, 8, 6), crop.affine)
    found = native_posteriors(
        probabilities_of(p), grid, moved(grid, (4, 4, 3), 2 * np.eye(3), (0.5, 0.5, 0.5))
    )
    blocks = p.reshape(4, 4, 2, 4, 2, 3, 2).mean(dim=(2, 4, 6))
    np.testing.assert_allclose(found, blocks.numpy(), atol=1e-3)


def test_groups_of_classes_are_summed():
    """A voxel that was left out is background, and in no group."""
    p = random_p((3, 4, 5))
    both, none = probabilities_of(p).sums([(1, 3), ()])
    np.testing.assert_allclose(both, (p[1] + p[3]).numpy(), rtol=1e-6)
    assert not none.any()
    some = some_of(p)
    (rest,) = some.sums([(1, 2, 3)])
    np.testing.assert_allclose(rest, 1 - dense(some)[0].numpy(), atol=1e-6)
