"""What is minimised: closed forms, symmetries, and what a gradient reaches."""

import itertools
import math

import pytest
import torch
from conftest import seeded
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.nets.segmenter import FIELD_STD, Coarse
from cadiff_cli.spatial.probabilities import fractions
from cadiff_cli.training.segmenter.losses import (
    SIMILARITIES,
    Consistency,
    Losses,
    central,
    cosine_similarity,
    crop_coarse,
    dice_ce,
    dice_ce_of_classes,
    dice_similarity,
    field_mse,
    octants,
)

MOST = 1 - 1e-3
"""Similarities are kept this close to 1."""


def one_hot(classes, k):
    return F.one_hot(classes, k).permute(0, 4, 1, 2, 3).float()


def test_fractions_sum_to_one_and_count():
    classes = torch.randint(0, 5, (2, 8, 4, 6), generator=seeded())
    for stride in (1, 2):
        share = fractions(classes, 5, stride)
        torch.testing.assert_close(
            share.sum(1), torch.ones(2, 8 // stride, 4 // stride, 6 // stride)
        )
    torch.testing.assert_close(fractions(classes, 5), one_hot(classes, 5))
    torch.testing.assert_close(fractions(classes, 5, 2), F.avg_pool3d(one_hot(classes, 5), 2))


def test_fractions_of_a_mirrored_brain_are_mirrored(mirror):
    classes = torch.randint(0, 41, (1, 8, 4, 6), generator=seeded())
    there = fractions(mirror[classes.flip(1)], 41, 2)
    torch.testing.assert_close(there, fractions(classes, 41, 2)[:, mirror].flip(2))


def test_the_loss_falls_on_the_way_to_the_truth():
    target = fractions(torch.randint(0, 5, (1, 8, 8, 8), generator=seeded()), 5)
    wrong = torch.randn(target.shape, generator=seeded(1))
    right = 30 * target
    values = [float(dice_ce((1 - w) * wrong + w * right, target)) for w in (0, 0.1, 0.3, 1)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 1e-3


@pytest.mark.parametrize("present", [5, 3, 1], ids=["all", "some", "background"])
def test_whole_voxels_have_the_loss_of_their_fractions(present):
    """Value and gradient; also where classes, or all structures, are absent from a patch."""
    classes = torch.randint(0, present, (2, 6, 4, 5), generator=seeded())
    logits = torch.randn(2, 5, 6, 4, 5, generator=seeded(1))
    one, other = (logits.clone().requires_grad_(True) for _ in range(2))
    expected = dice_ce(one, fractions(classes, 5))
    found = dice_ce_of_classes(other, classes)
    torch.testing.assert_close(found, expected)
    expected.backward()
    found.backward()
    torch.testing.assert_close(other.grad, one.grad)


def test_the_loss_at_ignorance_has_a_closed_form():
    """Equal logits over K classes: cross-entropy log K, Dice 2 s / (1 + K s), s the share."""
    target = torch.zeros(1, 4, 4, 4, 4)
    target[:, 1, :2], target[:, 0, 2:] = 1, 1
    expected = math.log(4) + 1 - 2 * 0.5 * 0.25 / (0.25 + 0.5)
    assert float(dice_ce(torch.zeros_like(target), target)) == pytest.approx(expected, abs=1e-5)


def test_background_alone_has_no_dice():
    target = torch.zeros(1, 3, 4, 4, 4)
    target[:, 0] = 1
    assert float(dice_ce(torch.zeros_like(target), target)) == pytest.approx(math.log(3))


def test_field_loss_is_in_units_of_the_fields_variance():
    field = torch.rand(1, 3, 4, 4, 4, generator=seeded())
    assert float(field_mse(2 * field - 1, field)) == pytest.approx(0, abs=1e-12)
    expected = 0.2**2 / FIELD_STD**2
    assert float(field_mse(2 * (field + 0.1) - 1, field)) == pytest.approx(expected, rel=1e-4)


def test_knowing_only_the_mean_of_the_field_costs_one():
    state = 0.2 + FIELD_STD * torch.randn(1, 3, 32, 32, 32, generator=seeded())
    ignorance = torch.full_like(state, 0.2)
    assert float(field_mse(ignorance, (state + 1) / 2)) == pytest.approx(1, rel=0.02)


def test_the_spread_of_a_brains_field_is_about_the_constant(toy_sample):
    """The phantom is a brain in this respect: the assumed spread is that of its own field."""
    field = torch.from_numpy(toy_sample.fields["toy"]).float()
    inside = F.max_pool3d(torch.from_numpy(toy_sample.classes).float()[None], 4)[0] > 0
    spread = (2 * field - 1)[:, inside].std(dim=1)
    assert 0.6 * FIELD_STD < spread.mean() < 1.6 * FIELD_STD


def test_coarse_crops_follow_fine_ones():
    image = torch.randn(1, 1, 16, 16, 16, generator=seeded())
    pooled = F.avg_pool3d(image, 2)
    part = crop_coarse(Coarse(pooled, pooled, pooled), (4, 0, 8), 8)
    fine = central(image, (4, 0, 8), 8)
    for cropped in (part.features, part.field, part.logits):
        torch.testing.assert_close(cropped, F.avg_pool3d(fine, 2))


def test_the_total_is_the_sum_of_its_parts():
    parts = [torch.tensor(x) for x in (1.0, 2.0, 4.0, 8.0)]
    assert float(Losses(*parts).total) == 15


def test_octants_are_the_eight_corners_of_each_patch():
    volume = torch.randn(2, 3, 4, 6, 8, generator=seeded())
    parts = octants(volume)
    assert parts.shape == (16, 3, 2, 3, 4)
    corners = itertools.product(range(2), (0, 2), (0, 3), (0, 4))
    for part, (b, x, y, z) in zip(parts, corners, strict=True):
        assert torch.equal(part, volume[b, :, x : x + 2, y : y + 3, z : z + 4])
    # Nothing is lost: put side by side they are the volume again.
    rows = [torch.cat([*parts[i : i + 2]], dim=3) for i in range(0, 16, 2)]
    slabs = [torch.cat(rows[i : i + 2], dim=2) for i in range(0, 8, 2)]
    back = torch.stack([torch.cat(slabs[i : i + 2], dim=1) for i in range(0, 4, 2)])
    assert torch.equal(back, volume)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_similarity_is_one_for_equals_and_zero_for_strangers(name):
    similarity = SIMILARITIES[name]
    classes = torch.randint(1, 5, (3, 4, 4, 4), generator=seeded())
    p, q = one_hot(classes, 5), one_hot(classes % 4 + 1, 5)
    torch.testing.assert_close(similarity(p, p), torch.ones(3))
    torch.testing.assert_close(similarity(p, q), torch.zeros(3))
    a, b = (torch.randn(3, 5, 4, 4, 4, generator=seeded(s)).softmax(dim=1) for s in (1, 2))
    torch.testing.assert_close(similarity(a, b), similarity(b, a))
    assert ((similarity(a, b) > 0) & (similarity(a, b) < 1)).all()


def test_half_of_the_voxels_alike_is_half_similar():
    classes = torch.ones(1, 4, 4, 4, dtype=torch.long)
    other = classes.clone()
    other[:, 2:] = 2
    p, q = one_hot(classes, 3), one_hot(other, 3)
    assert float(cosine_similarity(p, q)) == pytest.approx(0.5)
    assert float(dice_similarity(p, q)) == pytest.approx(0.5)


def test_background_counts_for_the_cosine_not_for_dice():
    p = one_hot(torch.zeros(1, 4, 4, 4, dtype=torch.long), 3)
    q = p.clone()
    p[:, :, :1], q[:, :, :1] = torch.tensor([0, 1.0, 0])[:, None, None, None], 0
    q[:, 2, :1] = 1
    assert float(cosine_similarity(p, q)) == pytest.approx(0.75)
    assert float(dice_similarity(p, q)) == 0


def entropy(sim_m, sim_d):
    """Eq. 7."""
    return -(sim_m * math.log(sim_d) + (1 - sim_m) * math.log(1 - sim_d))


def coarse_of(field, logits):
    """``field`` in [0, 1], as a network's answer."""
    return Coarse(torch.zeros_like(field), 2 * field - 1, logits)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_octants_that_agree_in_all_cost_next_to_nothing(name):
    logits = 9 * one_hot(torch.ones(2, 8, 8, 8, dtype=torch.long), 4)
    coarse = coarse_of(torch.full((2, 3, 8, 8, 8), 0.3), logits)
    for shift in (1, 5, 15):
        loss = float(Consistency(name)(coarse, shift))
        assert loss == pytest.approx(entropy(MOST, MOST), rel=1e-4)
        assert loss < 0.01


def test_the_distance_of_a_linear_field_is_known():
    """Octants one step apart in x: D_x differs by the slope times half of the patch."""
    field = torch.zeros(1, 3, 8, 8, 8)
    field[:, 0] = (0.02 * torch.arange(8.0))[:, None, None]
    same = 9 * one_hot(torch.ones(1, 8, 8, 8, dtype=torch.long), 4)
    sim_d = 1 - 0.02 * 4 / math.sqrt(3)  # root mean square over three axes
    loss = float(Consistency(weight=0.5)(coarse_of(field, same), 4))
    assert loss == pytest.approx(0.5 * entropy(MOST, sim_d), rel=1e-3)
    # Neighbours in z have the same D_x.
    along_z = coarse_of(field.transpose(2, 4), same)
    assert float(Consistency()(along_z, 4)) == pytest.approx(entropy(MOST, MOST), rel=1e-4)


def test_alike_labels_ask_for_near_fields_and_strange_ones_for_far():
    """The target decides in which direction the loss falls."""
    near, far = (torch.zeros(1, 3, 8, 8, 8) for _ in range(2))
    near[:, :, 4:], far[:, :, 4:] = 0.1, 0.9
    alike = torch.ones(1, 8, 8, 8, dtype=torch.long)
    strange = alike.clone()
    strange[:, 4:] = 2
    loss = {
        (place, labels): float(Consistency()(coarse_of(field, 30 * one_hot(classes, 4)), 4))
        for place, field in (("near", near), ("far", far))
        for labels, classes in (("alike", alike), ("strange", strange))
    }
    assert loss["near", "alike"] < loss["far", "alike"]
    assert loss["far", "strange"] < loss["near", "strange"]


@pytest.mark.parametrize("name", SIMILARITIES)
def test_the_gradient_reaches_field_and_labels(name):
    field = torch.rand(1, 3, 8, 8, 8, generator=seeded()).requires_grad_()
    logits = torch.randn(1, 5, 8, 8, 8, generator=seeded(1)).requires_grad_()
    Consistency(name)(coarse_of(field, logits), 3).backward()
    for tensor in (field, logits):
        assert tensor.grad.isfinite().all()
        assert (tensor.grad != 0).float().mean() > 0.9


def test_the_gradient_is_finite_where_octants_are_equal():
    """The root of a distance of zero has no slope of its own."""
    field = torch.full((1, 3, 8, 8, 8), 0.5, requires_grad=True)
    logits = torch.zeros(1, 5, 8, 8, 8, requires_grad=True)
    Consistency()(coarse_of(field, logits), 1).backward()
    assert field.grad.isfinite().all()
    assert logits.grad.isfinite().all()
