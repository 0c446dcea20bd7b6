"""Patches: what moves together, what each change may touch, and that a seed decides it all."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import NO_CHANGE, seeded
from scipy import ndimage
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from cadiff_cli.training.batch import stack
from cadiff_cli.training.segmenter.data import sample_field
from cadiff_cli.training.segmenter.patches import (
    AugmentConfig,
    Draws,
    draw_patch,
    keep_mean,
    low_resolution,
    recolour,
    spoil_mask,
    thicken,
)
from cadiff_cli.training.segmenter.synthesis import SynthesisConfig, resynthesise

PLAIN = NO_CHANGE
PARTS = ("image", "classes", "field")
DEPTH = 3


def assert_same(a, b):
    for part in PARTS:
        torch.testing.assert_close(getattr(a, part), getattr(b, part), rtol=0, atol=0)


def test_a_seed_decides_a_patch(toy_sample, mirror):
    a, b, c = (draw_patch(toy_sample, 32, mirror, AugmentConfig(), seeded(s)) for s in (3, 3, 4))
    assert_same(a, b)
    for part in PARTS:
        assert not torch.equal(getattr(a, part), getattr(c, part))
    assert a.image.shape == (1, 1, 32, 32, 32)
    assert a.classes.shape == (1, 32, 32, 32)
    assert a.field.shape == (1, 3, 16, 16, 16)
    assert 0 <= a.image.min() <= a.image.max() <= 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # with one core
@pytest.mark.parametrize("workers", [0, 2])
def test_the_series_is_the_same_in_any_process(toy_sample, ramp, mirror, workers):
    """Batches are the single draws, in their order, whoever draws them."""
    draws = Draws([toy_sample, ramp], 32, mirror, AugmentConfig(), seed=5)
    loader = DataLoader(
        draws, batch_size=2, sampler=range(3, 9), num_workers=workers, collate_fn=stack
    )
    batches = list(loader)
    assert len(batches) == 3
    for index, batch in enumerate(batches):
        first = 3 + 2 * index
        assert_same(batch, stack([draws[first], draws[first + 1]]))


def test_the_series_visits_every_scan(toy_sample, ramp, mirror):
    """The ramp has no darkness between its voxels, the head is mostly empty."""
    draws = Draws([toy_sample, ramp], 16, mirror, PLAIN, seed=0)
    found = [bool((draws[i].image > 0).float().mean() > 0.99) for i in range(16)]
    assert 2 < sum(found) < 14
    other = Draws([toy_sample, ramp], 16, mirror, PLAIN, seed=1)
    assert not torch.equal(other[0].image, draws[0].image)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_scans_trusted_less_get_their_share(toy_sample, ramp, mirror, monkeypatch, share):
    drawn = []
    monkeypatch.setattr(
        "cadiff_cli.training.segmenter.patches.draw_patch",
        lambda sample, *_: drawn.append(sample.name),
    )
    draws = Draws([toy_sample], 16, mirror, PLAIN, seed=2, also=[ramp], also_share=share)
    for index in range(400):
        draws[index]
    assert drawn.count(ramp.name) == pytest.approx(400 * share, abs=40 if 0 < share < 1 else 0)


@pytest.mark.parametrize("seed", range(3))
def test_without_augmentation_a_patch_is_a_piece_of_the_scan(ramp, mirror, seed):
    """Voxel by voxel, at the place that the field tells."""
    patch = draw_patch(ramp, 16, mirror, PLAIN, seeded(seed))
    # Cell 4 of the half-size field is the centre of voxels 8 and 9.
    start = patch.field[0, :, 4, 4, 4].numpy() * ramp.classes.shape - 8.5
    np.testing.assert_allclose(start, start.round(), atol=1e-3)
    i, j, k = (slice(int(n), int(n) + 16) for n in start.round())
    np.testing.assert_allclose(patch.image[0, 0], ramp.image[i, j, k] / 255, atol=1e-3)
    np.testing.assert_array_equal(patch.classes[0], ramp.classes[i, j, k])


def test_what_lies_outside_the_mask_has_no_label(ramp, mirror):
    """A mask that cuts into the brain is how inference meets it: black, and no label."""
    ramp = replace(ramp, image=np.full_like(ramp.image, 200))
    cut = ramp.mask.copy()
    cut[ramp.mask.shape[0] // 2 :] = False
    lost = 0
    for seed in range(6):
        whole = draw_patch(ramp, 16, mirror, PLAIN, seeded(seed))
        patch = draw_patch(replace(ramp, mask=cut), 16, mirror, PLAIN, seeded(seed))
        gone = patch.image[0] == 0
        lost += int((whole.classes[gone] > 0).sum())
        assert not patch.classes[gone].any()
        assert (patch.classes[~gone] == whole.classes[~gone]).all()
    assert lost


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        ({"flip": 1}, PARTS),
        ({"deform": 1}, PARTS),
        ({"field_error_mm": 2.0}, ("field",)),
        ({"thick_slices": 1}, ("image",)),
        ({"bad_mask": 1}, ("image", "classes")),
        ({"intensity": 1.0}, ("image",)),
        ({"synthesis": SynthesisConfig(share=1)}, ("image",)),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_each_change_touches_only_its_own(toy_sample, mirror, change, touched):
    plain = draw_patch(toy_sample, 32, mirror, PLAIN, seeded(1))
    changed = draw_patch(toy_sample, 32, mirror, replace(PLAIN, **change), seeded(1))
    found = tuple(p for p in PARTS if not torch.equal(getattr(plain, p), getattr(changed, p)))
    assert found == touched


def test_the_mean_field_is_seen_as_often_as_wanted(toy_sample, mirror):
    """Always or never; else it is the field of one template, as it is."""

    def field(fields, together, seed):
        config = replace(PLAIN, together=together)
        return draw_patch(
            replace(toy_sample, fields=fields), 32, mirror, config, seeded(seed)
        ).field

    both = toy_sample.fields
    mean = sample_field(toy_sample)
    np.testing.assert_allclose(mean, np.mean(list(both.values()), axis=0, dtype=np.float32))
    met = set()
    for seed in range(8):
        assert torch.equal(field(both, 1, seed), field({"mean": mean}, 0, seed))
        found = field(both, 0, seed)
        (name,) = (n for n, x in both.items() if torch.equal(found, field({n: x}, 0, seed)))
        met.add(name)
    assert met == set(both)


def flips(sample, mirror, seed):
    """The same patch straight and flipped."""
    return (
        draw_patch(sample, 32, mirror, replace(PLAIN, flip=chance), seeded(seed))
        for chance in (0.0, 1.0)
    )


def test_flipping_moves_image_classes_and_field_together(ramp, mirror):
    straight, flipped = flips(ramp, mirror, 5)
    torch.testing.assert_close(flipped.image, straight.image.flip(2))
    torch.testing.assert_close(flipped.classes, mirror[straight.classes.flip(1)])
    back = flipped.field.flip(2)
    torch.testing.assert_close(1 - back[:, 0], straight.field[:, 0])
    torch.testing.assert_close(back[:, 1:], straight.field[:, 1:])
    # D_x still grows from left to right.
    assert (flipped.field[0, 0].diff(dim=0)[4:-4] > 0).all()


def test_the_field_moves_with_the_image(toy_sample, mirror):
    """However a patch is turned, the phantom's own prior still finds its labels."""
    config = replace(PLAIN, flip=0.5, deform=1.0, rotation_deg=25.0, scale=0.1, elastic_mm=0)
    for seed in range(4):
        patch = draw_patch(toy_sample, 32, mirror, config, seeded(seed))
        left = torch.isin(patch.classes, torch.tensor([1, 2, 3, 7, 9]))
        right = torch.isin(patch.classes, mirror[torch.tensor([1, 2, 3, 7, 9])])
        x = F.interpolate(patch.field[:, :1], scale_factor=2, mode="trilinear")
        assert (x[0][left] < 0.515).all()
        assert (x[0][right] > 0.485).all()


def test_recolouring_stays_in_range_and_in_the_brain():
    mask = (torch.arange(24) > 8).expand(24, 24, 24)
    image = torch.rand(24, 24, 24, generator=seeded()) * mask
    changed = 0
    for seed in range(6):
        out = recolour(image, mask, 1.0, seeded(seed))
        assert 0 <= out.min() <= out.max() <= 1
        assert (out[~mask] == 0).all()
        torch.testing.assert_close(out, recolour(image, mask, 1.0, seeded(seed)), rtol=0, atol=0)
        changed += not torch.equal(out, image)
    assert changed > 3
    assert torch.equal(recolour(image, mask, 0.0, seeded()), image)


def test_bias_fields_favour_no_corner():
    """Each pair of opposite corners is as often brighter at one end as at the other."""
    image, mask = torch.full((24, 24, 24), 0.3), torch.ones(24, 24, 24, dtype=torch.bool)
    image = image + 0.01 * torch.rand(24, 24, 24, generator=seeded())
    gains = []
    for seed in range(120):
        out = recolour(image, mask, 1.0, seeded(seed))
        ends = [
            (out[x, y, z].mean(), out.flip(0, 1, 2)[x, y, z].mean())
            for x in (slice(6), slice(-6, None))
            for y in (slice(6), slice(-6, None))
            for z in (slice(6),)
        ]
        gains.append([float((a / b).log()) for a, b in ends])
    gains = np.array(gains)
    assert (gains.std(axis=0) > 0.1).all()
    assert (np.abs(gains.mean(axis=0)) < 3 * gains.std(axis=0) / len(gains) ** 0.5).all()


def test_the_mean_can_be_kept():
    mask = torch.rand(8, 8, 8, generator=seeded()) > 0.5
    before, after = torch.rand(2, 8, 8, 8, generator=seeded(1))
    kept = keep_mean(before, 5 * after, mask)
    torch.testing.assert_close(kept[mask].mean(), before[mask].mean())
    torch.testing.assert_close(kept / after, (kept / after)[0, 0, 0].expand(8, 8, 8))


def test_low_resolution_moves_nothing():
    """Against its labels, which stay: a ramp is itself again, but for its ends."""
    x, y, z = torch.meshgrid(*[torch.arange(48.0)] * 3, indexing="ij")
    blurred = 0
    for axis in (x, y, z):
        change = low_resolution(1.0)
        for seed in range(6):
            out = change.set_random_state(seed)(axis[None])[0]
            inner = (out - axis)[8:-8, 8:-8, 8:-8]
            assert float(inner.mean().abs()) < 0.05  # voxels
            blurred += float(inner.abs().max()) > 0
    assert blurred > 3


@pytest.mark.parametrize("voxels", [1.0, 2.0, 3.7, 5.0])
def test_thick_slices_keep_constants_and_the_range(voxels):
    constant = torch.full((32, 32, 32), 0.4)
    torch.testing.assert_close(thicken(constant, voxels, seeded()), constant)
    image = torch.rand(32, 32, 32, generator=seeded(1))
    thick = thicken(image, voxels, seeded())
    assert image.min() <= thick.min() <= thick.max() <= image.max()
    assert torch.equal(thick, image) == (voxels == 1)


def test_thick_slices_blur_one_axis_alone():
    """What varies along another axis is not touched; every axis has its turn."""
    line = 0.1 + 0.9 * torch.rand(32, generator=seeded())
    turns = set()
    for seed in range(8):
        blurred = []
        for axis in range(3):
            image = line.reshape([32 if a == axis else 1 for a in range(3)]).expand(32, 32, 32)
            thick = thicken(image, 4.0, seeded(seed))
            if not torch.allclose(thick, image, atol=1e-6):
                blurred.append(axis)
                steps, before = (v.diff(dim=axis).abs().mean() for v in (thick, image))
                assert steps < 0.5 * before
        (axis,) = blurred
        turns.add(axis)
    assert turns == {0, 1, 2}


def test_thick_slices_keep_gradients():
    """The mean of a slice is its middle, and lines go through the middles: a ramp stays."""
    x, y, z = torch.meshgrid(*[torch.linspace(0.1, 0.3, 32)] * 3, indexing="ij")
    ramp = x + y + z
    for seed in range(3):
        thick = thicken(ramp, 4.0, seeded(seed))
        torch.testing.assert_close(thick[2:-2, 2:-2, 2:-2], ramp[2:-2, 2:-2, 2:-2])


@pytest.fixture(scope="module")
def ball():
    """A brain of radius 18 in a cube of 48, dark in its middle: image, classes, depth.

    The depth counts steps from the surface inwards, also diagonal ones; outside it is negative.
    """
    inside = ((np.indices((48, 48, 48)) - 23.5) ** 2).sum(axis=0) < 18**2
    depth = ndimage.distance_transform_cdt(inside) - ndimage.distance_transform_cdt(~inside)
    bright = torch.from_numpy(inside & (depth <= depth.max() - 4))
    image = (0.2 + 0.8 * torch.rand(48, 48, 48, generator=seeded())) * bright
    classes = torch.randint(1, 41, (48, 48, 48), generator=seeded()) * torch.from_numpy(inside)
    return image, classes, torch.from_numpy(depth)


def test_a_bad_mask_is_wrong_near_its_border_alone(ball):
    image, classes, depth = ball
    anything_cut = anything_left = False
    for seed in range(8):
        spoilt, labels = spoil_mask(image, depth > 0, classes, DEPTH, seeded(seed))
        cut, left = (image > 0) & (spoilt == 0), (image == 0) & (spoilt > 0)
        assert (depth[cut] <= DEPTH).all()
        # Darkness inside the brain, such as a black ventricle, is not its border.
        assert ((depth[left] >= -2 * DEPTH) & (depth[left] <= 0)).all()
        # Inference writes no labels outside the mask, and the head has none.
        assert (labels[cut] == 0).all()
        assert (labels[left] == 0).all()
        assert torch.equal(spoilt[~cut & ~left], image[~cut & ~left])
        assert torch.equal(labels[~cut], classes[~cut])
        assert spoilt.max() <= 1
        anything_cut |= bool(cut.any())
        anything_left |= bool(left.any())
    assert anything_cut
    assert anything_left


@pytest.fixture(scope="module")
def bricks(mirror):
    """A brain of six bricks: three structures on the left, their partners on the right.

    Image (constant in a brick, the same on both sides), classes, and the inside of each brick.
    """
    left = torch.arange(41)[torch.arange(41) < mirror][:3]
    classes = torch.zeros(28, 34, 14, dtype=torch.long)
    image = torch.zeros(28, 34, 14)
    parts = {}
    for n, k in enumerate(left.tolist()):
        y = slice(2 + 10 * n, 12 + 10 * n)
        for x, label in ((slice(2, 14), k), (slice(14, 26), int(mirror[k]))):
            classes[x, y, 2:12] = label
            image[x, y, 2:12] = 0.3 + 0.2 * n
            parts[label] = tuple(slice(s.start + 1, s.stop - 1) for s in (x, y, slice(2, 12)))
    return image, classes, parts


def means(image, parts):
    return {k: float(image[part].mean()) for k, part in parts.items()}


ONLY_MEANS = SynthesisConfig(share=1, random=0, contrast=0.1, texture=1, noise=0)


def test_new_contrasts_keep_the_outside_and_the_range(bricks, mirror):
    image, classes, _ = bricks
    config = SynthesisConfig(share=1, random=0.5, contrast=0.3, noise=0.2)
    for seed in range(6):
        out = resynthesise(image, classes > 0, classes, mirror, config, seeded(seed))
        assert (out[classes == 0] == 0).all()
        assert 0 <= out.min() <= out.max() <= 1
        assert not torch.equal(out, image)


@pytest.mark.parametrize("random", [0.0, 1.0])
def test_left_and_right_get_the_same_brightness(bricks, mirror, random):
    image, classes, parts = bricks
    out = resynthesise(
        image, classes > 0, classes, mirror, replace(ONLY_MEANS, random=random), seeded(1)
    )
    found = means(out, parts)
    for k, value in found.items():
        assert value == pytest.approx(found[int(mirror[k])], abs=1e-5)
    shifts = {round(found[k] - value, 3) for k, value in means(image, parts).items()}
    assert len(shifts) == 3


def test_what_was_black_may_turn_bright(bricks, mirror):
    """Zero is a brightness like the others, inside the mask."""
    image, classes, parts = bricks
    dark = min(parts)
    black = torch.where((classes == dark) | (classes == mirror[dark]), 0, image)
    config = replace(ONLY_MEANS, random=1)
    found = [
        means(resynthesise(black, classes > 0, classes, mirror, config, seeded(s)), parts)[dark]
        for s in range(8)
    ]
    assert max(found) > 0.3


def test_without_new_means_constant_structures_stay(bricks, mirror):
    """There is no texture to scale, so nothing is left to change."""
    image, classes, _ = bricks
    for texture in (0.5, 1.0, 1.5):
        config = replace(ONLY_MEANS, contrast=0, texture=texture)
        out = resynthesise(image, classes > 0, classes, mirror, config, seeded())
        torch.testing.assert_close(out, image, atol=1e-6, rtol=0)


def test_texture_is_scaled_about_the_mean(bricks, mirror):
    """A slope within each structure becomes steeper or flatter, within the bounds."""
    image, classes, parts = bricks
    slope = 0.004 * (torch.arange(14) - 6.5) * (image > 0)
    config = replace(ONLY_MEANS, contrast=0, texture=1.5)
    ratios = []
    for seed in range(4):
        out = resynthesise(image + slope, classes > 0, classes, mirror, config, seeded(seed))
        for part in parts.values():
            steps = out[part].diff(dim=2) / 0.004
            torch.testing.assert_close(steps, steps.mean().expand_as(steps), atol=2e-3, rtol=0)
            ratios.append(float(steps.mean()))
        after, before = means(out, parts), means(image + slope, parts)
        assert after == pytest.approx(before, abs=1e-4)
    assert 0.49 < min(ratios) < 0.8
    assert 1.2 < max(ratios) < 1.51


def test_random_means_forget_what_was_brighter(bricks, mirror):
    image, classes, parts = bricks

    def orders(config):
        for seed in range(12):
            found = means(
                resynthesise(image, classes > 0, classes, mirror, config, seeded(seed)), parts
            )
            yield tuple(sorted((k for k in found if k < mirror[k]), key=found.__getitem__))

    known = tuple(sorted(k for k in parts if k < mirror[k]))
    assert set(orders(replace(ONLY_MEANS, contrast=0.01))) == {known}
    assert len(set(orders(replace(ONLY_MEANS, random=1)))) > 3


def test_a_curve_keeps_structures_of_one_tissue_alike(bricks, mirror):
    """What is as bright in the scan is as bright on the curve; the order may turn around."""
    image, classes, parts = bricks
    first, second, third = sorted(k for k in parts if k < mirror[k])
    alike = image.clone()
    alike[image == image[parts[second]].mean()] = float(image[parts[third]].mean())
    config = replace(ONLY_MEANS, curve=1.0, contrast=0.0)
    turned = 0
    for seed in range(10):
        out = resynthesise(alike, classes > 0, classes, mirror, config, seeded(seed))
        found = means(out, parts)
        assert found[second] == pytest.approx(found[third], abs=1e-5)
        assert 0 <= min(found.values()) <= max(found.values()) <= 1
        turned += found[first] > found[second]
    assert 0 < turned < 10
