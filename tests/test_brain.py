"""The learned brain mask: what is learnt, from what it is drawn, and how a mask is judged."""

import itertools
from dataclasses import replace

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import seeded
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy import ndimage
from synthetic_head import stored

from cadiff_cli.cli.train_mask import command
from cadiff_cli.errors import DataError, UsageError
from cadiff_cli.io import models
from cadiff_cli.io.images import save_volume
from cadiff_cli.nets.brain_mask import (
    REACH_MM,
    BrainConfig,
    BrainNet,
    HeadTissue,
)
from cadiff_cli.nets.models import BrainModel, Model
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.stages.brain_mask import (
    find_brain_in_head,
    find_skull,
    network_image,
    normalise_head,
    predict_distance,
)
from cadiff_cli.training import store
from cadiff_cli.training.brain_mask import patches, skull
from cadiff_cli.training.brain_mask.config import HeadConfig
from cadiff_cli.training.brain_mask.data import (
    Head,
    arrays,
    from_labels,
    from_scan,
    half,
    load,
    prepare_heads,
    tissue_of,
)
from cadiff_cli.training.brain_mask.losses import distance_loss
from cadiff_cli.training.brain_mask.objective import MaskObjective, locating_objective
from cadiff_cli.training.brain_mask.patches import (
    Contrast,
    HeadDraws,
    HeadPatch,
    draw_head,
    draw_nothing,
    painted,
    random_contrast,
    shrink,
    t1_contrast,
)
from cadiff_cli.training.brain_mask.run import held_out_dice, train_mask
from cadiff_cli.training.brain_mask.skull import (
    SkullDraws,
    draw_cube,
    move_skull,
    skull_losses,
)
from cadiff_cli.training.brain_mask.target import (
    FAR_MM,
    closed,
    intracranial,
    is_brain,
    signed_distance,
)
from cadiff_cli.training.loop import series
from cadiff_cli.training.session import Session

TINY = BrainConfig((8, 8), (8, 8))
SPACING = np.array([2.0, 2.0, 2.0])

ORDINARY = dict.fromkeys(
    (
        *("turned", "small", "bright_scalp", "strong_bias"),
        *("stripped", "zeroed_air", "noisy_air"),
    ),
    0.0,
)
"""Heads as most scanners make them."""


def ball(radius_mm, size=40, spacing=2.0, centre=None):
    ijk = np.indices((size,) * 3) * spacing
    middle = np.full(3, (size - 1) / 2 * spacing) if centre is None else np.asarray(centre)
    return np.linalg.norm(ijk - middle.reshape(3, 1, 1, 1), axis=0) < radius_mm


def on_grid(data, spacing=2.0):
    return Volume(data, Grid(data.shape, np.diag([spacing, spacing, spacing, 1.0])))


# --- the mask to learn ----------------------------------------------------------------------------


def test_closing_adds_and_repeats_nothing():
    rng = np.random.default_rng(0)
    brain = ball(30) & (rng.random((40,) * 3) > 0.3)
    once = closed(brain, SPACING)
    assert (once >= brain).all()
    assert np.array_equal(closed(once, SPACING), once)


def test_closing_fills_sulci_and_leaves_what_is_wide():
    brain = ball(30)
    sulcus, fissure = brain.copy(), brain.copy()
    sulcus[18:21, 20:] = False  # 6 mm
    fissure[13:27, 20:] = False  # 28 mm
    assert (closed(sulcus, SPACING) ^ brain).sum() < 0.01 * brain.sum()
    assert not closed(fissure, SPACING)[20, 30, 20]


def test_closing_does_not_depend_on_the_field_of_view():
    brain = ball(30)
    brain[18:21, 20:] = False
    inner = np.ix_(*[np.arange(4, 36)] * 3)
    assert np.array_equal(closed(brain, SPACING)[inner], closed(brain[inner], SPACING))


def test_the_distance_of_a_ball_is_known():
    distance = signed_distance(ball(30, 64), SPACING)
    ijk = np.indices((64,) * 3) * 2.0 - 63.0
    wanted = np.clip(30 - np.linalg.norm(ijk, axis=0), -FAR_MM, FAR_MM)
    # A border made of voxels lies within a voxel's half diagonal of the true one.
    assert abs(distance - wanted).max() < 1.8
    assert abs((distance - wanted)[abs(wanted) < 2].mean()) < 0.15


def test_an_empty_brain_is_refused():
    with pytest.raises(DataError, match="empty"):
        signed_distance(np.zeros((8, 8, 8), dtype=bool), SPACING)


# --- heads ----------------------------------------------------------------------------------------


@pytest.fixture
def label_map():
    """A 3 mm head: scalp 511, outer CSF 24, white matter left and right."""
    codes = np.zeros((60, 60, 60), dtype=np.int16)
    codes[ball(80, 60, 3.0)] = 511
    codes[ball(66, 60, 3.0)] = 24
    brain = ball(60, 60, 3.0)
    codes[brain] = 2
    codes[brain & (np.arange(60) >= 30)[:, None, None]] = 41
    return on_grid(codes, 3.0)


@pytest.fixture
def drawn_head(label_map):
    return from_labels("drawn", "toys", label_map)


@pytest.fixture
def real_head(label_map):
    codes = np.asarray(label_map.data)
    image = np.select([np.isin(codes, (2, 41)), codes == 24, codes > 0], [100.0, 20.0, 60.0], 0.0)
    brain = on_grid(np.isin(codes, (2, 41)).astype(np.uint8), 3.0)
    t1 = on_grid(image.astype(np.float32), 3.0)
    return from_scan("real", "scanner", t1, brain, close=True)


def test_outer_csf_and_scalp_are_not_brain(drawn_head):
    litres = (drawn_head.distance > 0).sum() * 8 / 1e6
    assert litres == pytest.approx(4 / 3 * np.pi * 0.6**3, rel=0.03)


def held_in(label_map):
    return intracranial(np.asarray(label_map.data), label_map.grid)


def test_the_skull_holds_fluid_down_to_the_end_of_the_brain(label_map):
    """A ball of 66 mm, less what lies below the brain's lowest point."""
    held = on_grid(held_in(label_map), 3.0)
    cap = np.pi * 6**2 * (3 * 66 - 6) / 3
    assert held.litres == pytest.approx((4 / 3 * np.pi * 66**3 - cap) / 1e6, rel=0.02)
    assert held.data[np.isin(label_map.data, (2, 41))].all()


def test_fluid_outside_the_cranium_is_not_held(label_map):
    """That around an optic nerve, and a vessel of the face, lead out of it."""
    codes = np.asarray(label_map.data).copy()
    codes[30, 53:, 30], codes[30, 30, 53:56] = 24, 514
    before, after = held_in(label_map), held_in(on_grid(codes, 3.0))
    assert not after[30, 54:, 30].any()
    assert np.count_nonzero(after ^ before) < 30


def test_t1_contrast_keeps_the_order_of_tissues(drawn_head):
    """Of the toy's labels 0, 2, 24 and 511, white matter is the brightest, air and fluid dark."""
    air, white, fluid, scalp = t1_contrast(torch.from_numpy(drawn_head.t1), seeded(1)).mean
    assert air < fluid < scalp < white


def test_a_painted_voxel_is_the_mean_of_its_labels(drawn_head):
    """Where no noise is: the mean of eight labels, anywhere in the head, and air beyond it."""
    uniform = replace(drawn_head, tissue=None)
    n = len(drawn_head.t1)
    contrast = Contrast(torch.linspace(0.1, 0.9, n), torch.zeros(n))
    index = torch.from_numpy(np.indices(drawn_head.distance.shape)).float()
    x, y, z = drawn_head.distance.shape
    eighths = contrast.mean.numpy()[drawn_head.labels].reshape(x, 2, y, 2, z, 2)
    wanted = torch.from_numpy(eighths.mean(axis=(1, 3, 5)))
    part = (slice(None), slice(9, 29), slice(30, 48), slice(-3, None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patches.ndimage, "gaussian_filter", lambda image, _: image)
        for points, at in ((index, wanted), (index[part], wanted[part[1:]])):
            torch.testing.assert_close(
                painted(uniform, points, contrast, seeded()), at, atol=1e-4, rtol=0
            )
        away = painted(uniform, index + 500, contrast, seeded())
    torch.testing.assert_close(away, torch.full_like(away, 0.1))


def test_left_and_right_share_a_label(drawn_head):
    assert len(np.unique(drawn_head.labels)) == 4


def test_real_and_drawn_heads_agree_on_the_brain(drawn_head, real_head):
    assert np.array_equal(drawn_head.distance, real_head.distance)
    assert real_head.image.max() == 255


def test_heads_are_read_back(drawn_head, real_head, tmp_path):
    for head in (drawn_head, real_head):
        again = load(store.once(tmp_path / head.name, head.name, lambda head=head: arrays(head)))
        assert (again.name, again.source) == (head.name, head.source)
        assert np.array_equal(again.distance, head.distance)
        parts = ("image", "labels", "t1", "tissue", "held", "skull")
        for mine, theirs in ((getattr(x, part) for x in (again, head)) for part in parts):
            assert (mine is None) == (theirs is None)
            assert mine is None or np.array_equal(mine, theirs)


def test_each_label_has_an_intensity_of_its_own():
    labels = np.zeros((24, 24, 24), np.uint8)
    labels[8:16] = 1
    head = Head("slab", "slabs", np.zeros((12, 12, 12), np.float16), labels=labels)
    points = torch.from_numpy(np.indices((12, 12, 12))).float()
    image = painted(head, points, random_contrast(2, seeded(2)), seeded(2))
    inner = [image[1:3], image[5:7]]
    assert max(float(part.std()) for part in inner) < 0.1
    assert image.min() >= 0
    assert image.max() <= 1


def test_a_number_decides_a_head(drawn_head, real_head):
    config = HeadConfig(patch=32, steps=4)
    draws = HeadDraws([drawn_head, real_head], config)
    for a, b in zip(
        series(draws, config, 0, 1, torch.device("cpu")),
        (draws[i] for i in range(4)),
        strict=True,
    ):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.distance, b.distance)


def test_distances_stay_within_the_reach_and_images_in_range(drawn_head, real_head):
    config = HeadConfig(patch=32)
    for index in range(12):
        patch = draw_head((drawn_head, real_head)[index % 2], config, seeded(index))
        assert patch.distance.abs().max() <= REACH_MM
        assert patch.image.min() >= 0
        assert patch.image.max() <= 1


def test_what_is_cut_off_is_not_brain(drawn_head):
    """A slab without any image holds no mask."""
    config = HeadConfig(patch=64, cut=1.0, deface=0.0, off_centre_mm=0.0, **ORDINARY)
    cuts = 0
    for index in range(8):
        patch = draw_head(drawn_head, config, seeded(index))
        for axis in (2, 3, 4):
            rest = tuple(a for a in range(5) if a != axis)
            empty = ~(patch.image > 0).any(dim=rest)
            cuts += bool(empty.any())
            assert not (patch.distance > 0).transpose(0, axis)[empty].any()
    assert cuts > 4


def test_a_face_may_go_but_not_the_brain(drawn_head):
    plain = HeadConfig(patch=64, cut=0.0, deface=0.0, **ORDINARY)
    gone = 0
    for index in range(6):
        defaced = draw_head(drawn_head, replace(plain, deface=1.0), seeded(index))
        whole = draw_head(drawn_head, plain, seeded(index))
        inside = whole.distance > 0
        assert torch.equal(defaced.image[inside], whole.image[inside])
        gone += not torch.equal(defaced.image, whole.image)
    assert gone


def sphere(radius_mm, size=48, spacing=2.0):
    """Where a patch's voxels are read (3, N, N, N), and their distance to a sphere's surface."""
    index = torch.from_numpy(np.indices((size,) * 3)).float()
    radius = spacing * (index - (size - 1) / 2).norm(dim=0)
    return index, (radius_mm - radius).clamp(-FAR_MM, FAR_MM)


def test_a_brain_may_shrink_and_fluid_fills_the_gap():
    points, distance = sphere(36)
    for index in range(6):
        moved, new, rim = shrink(points, distance, 6.0, seeded(index))
        lost = distance - new
        assert lost.min() >= 0
        assert lost.max() <= 6.0
        assert torch.equal(new[distance >= FAR_MM], distance[distance >= FAR_MM])
        assert rim.min() >= 0
        assert rim.max() <= 1
        # The gap holds what the brain has lost, in voxels, to the width of the border's blur.
        before, after = ((0.5 + d / 2).clamp(0, 1).sum() for d in (distance, new))
        assert float(rim.sum()) == pytest.approx(float(before - after), rel=1e-3)
        assert not rim[distance < -2].any()
        # What lies at the new border lay at the old one: tissue moves, it is not cut off.
        at_border = new.abs() < 0.7
        came_from = 2 * (moved - (points.shape[-1] - 1) / 2).norm(dim=0)[at_border]
        assert (came_from - 36).abs().max() < 2.0


@pytest.mark.parametrize("index", range(3))
def test_a_stripped_head_is_nothing_but_its_mask(real_head, index):
    config = HeadConfig(patch=64, cut=0, deface=0, **ORDINARY | {"stripped": 1.0})
    patch = draw_head(real_head, config, seeded(index))
    assert (patch.image[patch.distance <= 0] == 0).all()
    assert (patch.image[patch.distance > 0] > 0).float().mean() > 0.5


def test_noisy_air_is_as_bright_as_brain_and_zeroed_air_is_dark(real_head):
    dark = HeadConfig(patch=64, cut=0, deface=0, **ORDINARY | {"zeroed_air": 1.0})
    noisy = replace(dark, zeroed_air=0.0, noisy_air=1.0)
    for index in range(3):
        air, noise = (draw_head(real_head, config, seeded(index)).image for config in (dark, noisy))
        assert (air == 0).float().mean() > 0.05
        assert noise.mean() > air.mean()


def test_a_turned_head_is_the_head_turned(real_head):
    config = HeadConfig(patch=64, cut=0, deface=0, off_centre_mm=0.0, **ORDINARY | {"turned": 1.0})
    turned = draw_head(real_head, config, seeded(0)).distance
    plain = draw_head(real_head, replace(config, turned=0.0), seeded(0)).distance
    # The brain keeps its volume, whichever way it lies.
    assert float((turned > 0).sum() / (plain > 0).sum()) == pytest.approx(1, abs=0.1)


def test_a_shrunken_brain_swims_in_fluid(real_head):
    """No shell of skull shows where the border was: between the two borders all is dark."""
    config = HeadConfig(
        patch=64, cut=0, deface=0, tilted=0, shrunken=1.0, shrink_mm=12.0, **ORDINARY
    )
    bare = replace(real_head, image=np.where(real_head.distance > 0, 120, 255).astype(np.uint8))
    # Ventricles, the darkest part of a brain, are what the fluid's brightness is taken from.
    bare.image[real_head.distance > 0.7 * float(real_head.distance.max())] = 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patches, "artefacts", lambda image, *_: image)
        for index in range(5):
            shrunken = draw_head(bare, config, seeded(index))
            whole = draw_head(bare, replace(config, shrunken=0.0), seeded(index))
            gap = (shrunken.distance < -1) & (whole.distance > 0.3)
            assert (whole.distance > 0).sum() - (shrunken.distance > 0).sum() >= gap.sum() > 0
            assert float(shrunken.image[gap].max()) < 0.45


def test_the_gap_of_a_painted_head_is_fluid_like_that_around_the_brain(drawn_head):
    label = drawn_head.fluid
    config = HeadConfig(patch=64, shrunken=1.0, cut=0, deface=0, tilted=0, t1=1.0, **ORDINARY)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patches, "artefacts", lambda image, *_: image)
        lit = torch.eye(len(drawn_head.t1))[label]
        patch.setattr(patches, "t1_contrast", lambda *_: Contrast(lit, 0 * lit))
        for index in range(3):
            shrunken = draw_head(drawn_head, config, seeded(index))
            whole = draw_head(drawn_head, replace(config, shrunken=0.0), seeded(index))
            gap = (shrunken.distance < -1) & (whole.distance > 1)
            seen.append(gap.sum())
            assert (shrunken.image[gap] > 0.99).all()
    assert max(seen) > 0


def test_labels_around_a_brain_are_of_one_tissue(drawn_head):
    dry = replace(drawn_head, labels=np.where(drawn_head.labels == 2, 3, drawn_head.labels))
    assert drawn_head.fluid == 2
    assert dry.fluid is None
    assert replace(drawn_head, t1=None).fluid is None
    assert drawn_head.bone is None


def test_a_brain_that_shrinks_by_nothing_stays():
    points, distance = sphere(30)
    moved, new, rim = shrink(points, distance, 0.0, seeded(1))
    torch.testing.assert_close(moved, points, atol=1e-3, rtol=0)
    assert torch.equal(new, distance)
    assert not rim.any()


def test_where_there_is_no_head_there_is_no_brain():
    config = HeadConfig(patch=32)
    images = []
    for index in range(12):
        patch = draw_nothing(config, seeded(index))
        assert (patch.distance == -REACH_MM).all()
        assert patch.image.min() >= 0
        assert patch.image.max() <= 1
        assert torch.equal(patch.image, draw_nothing(config, seeded(index)).image)
        images.append(patch.image)
    assert min(float(image.std()) for image in images) > 0


def test_empty_images_are_drawn_as_often_as_asked(drawn_head):
    config = HeadConfig(patch=32, empty=0.25, cut=0.0)
    draws = HeadDraws([drawn_head], config)
    empty = sum(not (draws[i].distance > 0).any() for i in range(80))
    assert 8 <= empty <= 34


def test_a_small_source_is_drawn_by_the_root_of_its_size(real_head, monkeypatch):
    """Sixteen heads of one source, one of another: four to one."""
    heads = [replace(real_head, name=f"large{i}", source="large") for i in range(16)]
    heads.append(replace(real_head, name="small", source="small"))
    drawn = []
    monkeypatch.setattr(
        "cadiff_cli.training.brain_mask.patches.draw_head",
        lambda head, *_: drawn.append(head.source),
    )
    draws = HeadDraws(heads, HeadConfig(real=1.0, empty=0.0))
    for i in range(500):
        draws[i]
    assert 65 < drawn.count("small") < 140


# --- network and stage ----------------------------------------------------------------------------


def test_any_size_is_padded_and_given_back():
    net = BrainNet(TINY).requires_grad_(False)
    head = np.random.default_rng(0).random((17, 22, 9), dtype=np.float32)
    distance = predict_distance(net, head)
    assert distance.shape == head.shape
    assert abs(distance).max() <= REACH_MM


def test_only_the_box_around_the_brain_is_refined():
    """Far from it the first network's word stands, in it the second one's."""
    boxes = []

    class Watched(Oracle):
        def refine(self, head, located):
            if located is not None:
                boxes.append(tuple(head.shape[2:]))
                assert tuple(2 * n for n in located.shape[2:]) == boxes[-1]
            return super().refine(head, located)

    inside = ball(20, 64, centre=(40, 60, 80))
    distance = predict_distance(Watched(), inside.astype(np.float32))
    wanted = np.clip(signed_distance(inside, SPACING), -REACH_MM, REACH_MM)
    assert np.array_equal(distance > 0, inside)
    assert abs(distance - wanted).max() < 3
    (box,) = boxes
    assert max(box) <= 36
    assert (predict_distance(Watched(), np.zeros((16, 16, 16), np.float32)) <= 0).all()


def test_intensities_do_not_depend_on_units():
    image = np.random.default_rng(0).gamma(1.0, size=(20, 20, 20)).astype(np.float32)
    image[:5] = 0
    for unit in (1e-8, 1000):
        assert np.allclose(normalise_head(image), normalise_head(unit * image), atol=1e-5)
    assert np.allclose(normalise_head(image), normalise_head(image - 50), atol=1e-4)


class Oracle(BrainNet):
    """Answers with the distance of whatever is brighter than a half.

    With ``beyond_mm`` it takes the skull to lie so far outside.
    """

    def __init__(self, beyond_mm=None):
        super().__init__(replace(TINY, skull=beyond_mm is not None))
        self.beyond_mm = beyond_mm

    def locate(self, head):
        return torch.nn.functional.avg_pool3d(self.refine(head, None), 2)

    def refine(self, head, _located):
        mask = head[0, 0].numpy() > 0.5
        if not mask.any():
            return torch.full(head.shape, -FAR_MM)
        return torch.from_numpy(signed_distance(mask, SPACING))[None, None]

    def enclose(self, head, distance):
        assert head.shape == distance.shape
        return (finer(distance) + self.beyond_mm > 0)[:, 0].float()


def finer(volume):
    """At 1 mm in place of 2 mm."""
    return torch.nn.functional.interpolate(volume, scale_factor=2, mode="trilinear")


@pytest.fixture
def oracle():
    return BrainModel(Oracle(), "oracle")


@pytest.mark.parametrize("spacing", [1.0, 2.0, 3.0])
def test_the_mask_is_smooth_and_in_its_place(oracle, spacing):
    size = round(132 / spacing)
    inside = ball(50, size, spacing)
    t1 = on_grid(np.where(inside, 100.0, 10.0).astype(np.float32), spacing)
    mask, _ = find_brain_in_head(network_image(t1), t1.grid.working(), oracle)
    wanted = ball(50, mask.data.shape[0], 1.0)
    overlap = 2 * (mask.data & wanted).sum() / (mask.data.sum() + wanted.sum())
    assert overlap > 0.96


def ellipsoid(radii_mm, centre_mm, grid):
    """The inside (bool) of an ellipsoid along the world's axes, on any grid."""
    world = np.tensordot(grid.affine[:3, :3], np.indices(grid.shape), 1).T + grid.affine[:3, 3]
    return ((((world - centre_mm) / radii_mm) ** 2).sum(axis=-1) < 1).T


class Seer(Oracle):
    """Takes the brain for what is brighter than a half, the skull's content for what is not air."""

    def enclose(self, head, distance):
        assert head.shape == distance.shape
        assert all(n % self.config.skull_multiple == 0 for n in head.shape[2:])
        return (finer(head)[:, 0] > 0.15).float()


@pytest.mark.parametrize("axes", ["RAS", "LIP"])
@pytest.mark.parametrize("spacing", [1.0, 2.0, 3.0])
def test_the_skull_is_where_the_image_shows_it(spacing, axes):
    """Off the centre, on any grid: at 1 mm, in its place to a fraction of a voxel.

    Whether the voxels of the scan have 1 or 2 mm changes its volume by less than 1 %.
    """
    shape = tuple(round(n / spacing) for n in (150, 170, 160))
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes))
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = (-60, -80, -70)
    grid = Grid(shape, affine @ inv_ornt_aff(turn, shape))
    centre, inner = np.array((12.0, -1.0, 6.0)), np.array((45.0, 60.0, 50.0))
    image = np.where(ellipsoid(inner + 6, centre, grid), 30.0, 0.0)
    image[ellipsoid(inner, centre, grid)] = 100.0
    t1 = Volume(image.astype(np.float32), grid)
    working, model = grid.working(), BrainModel(Seer(beyond_mm=0.0), "seer")
    head = network_image(t1)
    brain, distance = find_brain_in_head(head, working, model)
    held = find_skull(head, distance, working, model)
    for found, radii in ((brain, inner), (held, inner + 6)):
        wanted = ellipsoid(radii, centre, found.grid)
        assert 2 * (found.data & wanted).sum() / (found.data.sum() + wanted.sum()) > 0.96
        shift = np.argwhere(found.data).mean(axis=0) - np.argwhere(wanted).mean(axis=0)
        assert abs(shift).max() < 0.35
    assert held.litres == pytest.approx(
        4 / 3e6 * np.pi * np.prod(inner + 6), rel=0.01 if spacing < 3 else 0.03
    )
    assert find_skull(head, distance, working, BrainModel(Oracle(), "blind")) is None


@pytest.mark.parametrize("beyond_mm", [6.0, -9.0])
def test_deep_in_the_brain_all_is_held_whatever_the_network_says(beyond_mm):
    inside = ball(50, 66)
    t1 = on_grid(np.where(inside, 100.0, 10.0).astype(np.float32))
    working, model = t1.grid.working(), BrainModel(Oracle(beyond_mm), "oracle")
    head = network_image(t1)
    held = find_skull(head, find_brain_in_head(head, working, model)[1], working, model)
    radius = 50 + max(beyond_mm, -6.0)  # deep is 6 mm
    assert held.litres == pytest.approx(4 / 3 * np.pi * radius**3 / 1e6, rel=0.04)


def test_orientation_does_not_matter(oracle, phantom, orientation):
    head = phantom(orientation, 3.0)
    t1 = Volume(np.where(head.codes > 0, 100.0, 5.0).astype(np.float32), head.t1.grid)
    brain, _ = find_brain_in_head(network_image(t1), t1.grid.working(), oracle)
    assert brain.litres * 1e6 == pytest.approx((head.codes > 0).sum() * 27, rel=0.03)


def test_the_network_sees_the_same_however_a_head_is_stored(phantom):
    """All 48 orders and directions of the axes."""
    t1 = phantom("RAS", 3.0).t1
    seen = [
        network_image(stored(t1.data, t1.grid, order, signs))
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
    ]
    assert len(seen) == 48
    for image in seen[1:]:
        np.testing.assert_allclose(image.grid.affine, seen[0].grid.affine, atol=1e-9)
        np.testing.assert_allclose(image.data, seen[0].data, atol=1e-3)  # of a range of 1


def test_nothing_is_found_in_noise(oracle):
    noise = np.random.default_rng(0).random((40, 40, 40)).astype(np.float32)
    t1 = on_grid(noise)
    with pytest.raises(DataError, match="no brain found"):
        find_brain_in_head(network_image(t1), t1.grid.working(), oracle)


# --- training -------------------------------------------------------------------------------------


def test_the_loss_is_zero_at_the_truth():
    truth = torch.from_numpy(signed_distance(ball(30), SPACING)).clamp(-REACH_MM, REACH_MM)
    # Farther than the reach is as right as the reach itself.
    estimate = torch.where(truth.abs() >= REACH_MM, 3 * truth, truth)
    assert float(distance_loss(estimate, truth)) < 0.04
    assert float(distance_loss(estimate + 2, truth)) > 0.1


def test_both_parts_of_the_cascade_see_the_same_place(drawn_head):
    """Whatever cube is drawn, a network that is right everywhere has no loss."""
    patch = draw_head(drawn_head, HeadConfig(patch=64, off_centre_mm=20.0), seeded(3))
    coded = HeadPatch(patch.distance, patch.distance)

    class Truth(torch.nn.Module):
        def locate(self, head):
            return torch.nn.functional.avg_pool3d(head, 2)

        def refine(self, head, located):
            coarse = torch.nn.functional.avg_pool3d(head, 2)
            assert torch.equal(located, coarse)
            return head

    for index in range(6):
        losses = MaskObjective(fine=32)(Truth(), coded, seeded(index))
        assert float(losses.coarse) < 0.05
        assert float(losses.fine) < 0.05


def test_a_head_is_located_alike_at_both_spacings():
    """The first network sees 4 mm, whether heads are drawn there or not."""
    net = BrainNet(TINY).requires_grad_(False)
    image = torch.rand(1, 1, 32, 32, 32, generator=seeded())
    halved = torch.nn.functional.avg_pool3d(image, 2)
    assert torch.equal(net.locate(image), net.locate_at_4mm(halved))
    patch = HeadPatch(halved, torch.full_like(halved, -REACH_MM))
    losses = locating_objective(net, patch, seeded())
    assert float(losses.coarse) == float(distance_loss(net.locate(image), patch.distance))
    assert float(losses.fine) == 0


@pytest.mark.parametrize("kind", ["drawn", "real"])
def test_patches_of_either_spacing_show_the_same_head(drawn_head, real_head, kind):
    """A number draws the same place of the same head; only voxels differ."""
    heads = [drawn_head if kind == "drawn" else real_head]
    config = HeadConfig(patch=64, cut=0.0, deface=0.0, empty=0.0, **ORDINARY)
    whole, halved = HeadDraws(heads, config), HeadDraws(heads, config, halved=True)
    for index in range(4):
        fine, coarse = whole[index].distance, halved[index].distance
        assert coarse.shape == (1, 1, 32, 32, 32)
        wanted = torch.nn.functional.avg_pool3d(fine, 2)
        near = (wanted.abs() < 8) & (coarse.abs() < 8)
        assert float((coarse - wanted)[near].abs().mean()) < 1
        assert abs(float((coarse - wanted)[near].mean())) < 0.4


def test_half_a_head_keeps_its_places(drawn_head, real_head):
    """Labels, image and distance do not move against each other when voxels double."""

    def middle(volume, spacing_mm):
        return (np.argwhere(volume).mean(axis=0) + 0.5) * spacing_mm

    for head in (drawn_head, real_head):
        halved = half(head)
        assert all(np.array(halved.distance.shape) == np.array(head.distance.shape) // 2)
        inside = middle(head.distance > 0, 2.0)
        assert np.allclose(middle(halved.distance > 0, 4.0), inside, atol=0.4)
    halved = half(drawn_head)
    assert all(np.array(halved.labels.shape) == 2 * np.array(halved.distance.shape))
    for label in np.unique(drawn_head.labels):
        before, after = middle(drawn_head.labels == label, 1.0), middle(halved.labels == label, 2.0)
        assert np.allclose(before, after, atol=0.3)
    before = real_head.image.mean(dtype=float)
    assert abs(half(real_head).image.mean(dtype=float) - before) < 0.05 * before + 1


def test_soft_tissue_is_no_uniform_mass(drawn_head, monkeypatch):
    """Fat and muscle share a label: its brightness varies in most heads, that of brain does not."""
    head = drawn_head
    x, y, z = head.distance.shape
    points = torch.from_numpy(np.indices((min(x, y, z),) * 3).astype(np.float32))
    n = len(head.t1)
    flat = Contrast(torch.full((n,), 0.5), torch.zeros(n))
    soft = np.isin(head.labels, np.flatnonzero(head.tissue == HeadTissue.SOFT))
    soft = soft.reshape(x, 2, y, 2, z, 2).mean(axis=(1, 3, 5))[(slice(len(points[0])),) * 3]
    varied = 0
    for index in range(12):
        image = painted(head, points, flat, seeded(index)).numpy()
        assert image[ndimage.uniform_filter(soft, 5) == 0].std() < 1e-3
        varied += image[soft == 1].std() > 0.02
    assert 6 <= varied <= 11


def test_a_run_learns_exports_and_scores(drawn_head, real_head, tmp_path):
    held = Head("held", "elsewhere", real_head.distance, image=real_head.image)
    heads = {"toys": [drawn_head], "scanner": [real_head], "elsewhere": [held]}
    config = HeadConfig(steps=3, warmup=1, decay=1, patch=128, coarse_steps=1)
    path = train_mask(heads, tmp_path, config, hold_out=["elsewhere"])
    model = models.load(BrainModel, str(path))
    assert model.training["trained_on"] == {"toys": 1, "scanner": 1}
    assert 0 <= held_out_dice(model.net, held) <= 1
    assert (tmp_path / "held_out.tsv").read_text().startswith("source\thead\tdice\nelsewhere\theld")
    with pytest.raises(DataError, match="format"):
        models.load(Model, str(path))
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert stored["step"] == 3
    with pytest.raises(UsageError, match="trained_on"):
        train_mask(heads, tmp_path, config)
    with pytest.raises(UsageError, match="nowhere"):
        train_mask(heads, tmp_path, config, hold_out=["nowhere"])


@pytest.mark.parametrize("sizes", [{"patch": 80}, {"patch": 0}, {"cube": 60}])
def test_sizes_that_a_network_cannot_halve_are_refused(drawn_head, tmp_path, sizes):
    with pytest.raises(UsageError, match=r"(patch|cube) is"):
        train_mask({"toys": [drawn_head]}, tmp_path, HeadConfig(steps=2, coarse_steps=1, **sizes))


def test_what_locates_learns_first(drawn_head, tmp_path, monkeypatch):
    """Until ``coarse_steps`` the second network keeps its first weights; then both move."""
    fit = Session.fit

    def trained(coarse_steps):
        run = tmp_path / f"{coarse_steps}-{Session.fit is fit}"
        config = HeadConfig(steps=3, warmup=1, decay=1, patch=128, coarse_steps=coarse_steps)
        train_mask({"toys": [drawn_head]}, run, config)
        return torch.load(run / "checkpoint.pt", weights_only=True)["net"]

    three = trained(2)
    monkeypatch.setattr(Session, "fit", lambda *args, **kwargs: fit(*args, **kwargs) and False)
    one, two = trained(1), trained(2)  # the first part alone
    for name in one:
        if name.startswith("fine."):
            assert torch.equal(one[name], two[name]), name
    assert not torch.equal(one["coarse.out.weight"], two["coarse.out.weight"])
    assert not torch.equal(two["fine.out.weight"], three["fine.out.weight"])


def test_too_few_steps_for_both_networks_are_refused(drawn_head, tmp_path):
    """The second one would be exported as it was drawn."""
    for steps in (1, 2):
        config = HeadConfig(steps=steps, warmup=1, decay=1, patch=128, coarse_steps=2)
        with pytest.raises(UsageError, match=f"steps is {steps}, and in the first 2"):
            train_mask({"toys": [drawn_head]}, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_sizes_that_the_weights_do_not_have_are_refused(tmp_path, drawn_head):
    init = BrainModel(BrainNet(TINY), "begun")
    wider = replace(TINY, fine=tuple(2 * n for n in TINY.fine))
    config = HeadConfig(steps=1, warmup=1, decay=1, patch=64)
    with pytest.raises(UsageError, match="another network"):
        train_mask({"toys": [drawn_head]}, tmp_path, config, init=init, net_config=wider)


def test_a_run_may_begin_with_weights(drawn_head, tmp_path):
    """Nothing has to be located anew: without a step they are what they were."""
    heads = {"toys": [drawn_head]}
    config = HeadConfig(steps=2, warmup=1, decay=1, patch=128)
    first = models.load(
        BrainModel, str(train_mask(heads, tmp_path / "a", replace(config, coarse_steps=1)))
    )
    same, further = (
        models.load(
            BrainModel, str(train_mask(heads, tmp_path / name, config, init=first, **limits))
        )
        for name, limits in (("b", {"max_minutes": 0}), ("c", {}))
    )
    before, after, learnt = (m.net.state_dict() for m in (first, same, further))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert further.training["init"] == first.sha256
    assert further.training["train"]["coarse_steps"] == 0
    assert not torch.equal(before["fine.out.weight"], learnt["fine.out.weight"])
    # Unless it is wanted: then the second network stays.
    again = replace(config, coarse_steps=2)
    located = models.load(BrainModel, str(train_mask(heads, tmp_path / "d", again, init=first)))
    learnt = located.net.state_dict()
    assert torch.equal(before["fine.out.weight"], learnt["fine.out.weight"])
    assert not torch.equal(before["coarse.out.weight"], learnt["coarse.out.weight"])
    with pytest.raises(UsageError, match="init"):
        train_mask(heads, tmp_path / "c", replace(config, coarse_steps=1))
    with pytest.raises(UsageError, match="trained on toys, and --hold-out-source"):
        train_mask(
            {**heads, "more": [drawn_head]}, tmp_path, config, init=further, hold_out=["toys"]
        )


def test_folders_become_heads_once(label_map, tmp_path):
    maps, scans = tmp_path / "maps", tmp_path / "scans"
    save_volume(maps / "one.nii.gz", label_map.data.astype(np.int16), label_map.grid)
    anat = scans / "sub-01" / "anat"
    image = np.where(label_map.data > 0, 50, 0).astype(np.float32)
    save_volume(anat / "sub-01_T1w.nii.gz", image, label_map.grid)
    brain = np.isin(label_map.data, (2, 41)).astype(np.uint8)
    save_volume(anat / "sub-01_seg-x_dseg.nii.gz", brain, label_map.grid)
    heads = prepare_heads([maps], [scans], tmp_path / "cache")
    assert [len(heads[name]) for name in ("maps", "scans")] == [1, 1]
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    prepare_heads([maps], [scans], tmp_path / "cache")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == kept
    with pytest.raises(UsageError, match="two folders"):
        prepare_heads([maps], [scans, scans], tmp_path / "cache")


def test_a_head_takes_the_brain_of_its_own_run(label_map, tmp_path):
    anat = tmp_path / "scans" / "sub-01" / "anat"
    image = np.where(label_map.data > 0, 50, 0).astype(np.float32)
    brain = np.isin(label_map.data, (2, 41)).astype(np.uint8)
    for run in ("", "_run-1", "_run-10"):
        save_volume(anat / f"sub-01{run}_T1w.nii.gz", image, label_map.grid)
        lowest = np.arange(60) < {"": 60, "_run-1": 20, "_run-10": 40}[run]
        inside = brain * lowest[:, None, None].astype(np.uint8)
        save_volume(anat / f"sub-01{run}_desc-brain_mask.nii.gz", inside, label_map.grid)
    heads = prepare_heads([], [tmp_path / "scans"], tmp_path / "cache")["scans"]
    sizes = {head.name: (head.distance > 0).sum() for head in heads}
    assert sizes["sub-01_run-1"] < sizes["sub-01_run-10"] < sizes["sub-01"]
    save_volume(anat / "sub-01_label-lesion_mask.nii.gz", brain, label_map.grid)
    assert len(prepare_heads([], [tmp_path / "scans"], tmp_path / "cache")["scans"]) == 3
    save_volume(anat / "sub-01_label-brain_mask.nii.gz", brain, label_map.grid)
    with pytest.raises(DataError, match="has 2 brains"):
        prepare_heads([], [tmp_path / "scans"], tmp_path / "cache")


def test_what_is_no_label_map_or_no_brain_is_refused(label_map, tmp_path):
    rng = np.random.default_rng(0)
    image = rng.normal(100, 30, label_map.data.shape).astype(np.float32)
    many = rng.integers(1, 400, label_map.data.shape).astype(np.int16)
    speck = np.zeros(label_map.data.shape, np.uint8)
    speck[30, 30, 30] = 1
    for number, (data, said) in enumerate(((image, "no label id"), (many, "different labels"))):
        folder = tmp_path / f"maps{number}"
        save_volume(folder / "one.nii.gz", data, label_map.grid)
        with pytest.raises(DataError, match=f"one.nii.gz.* {said}"):
            prepare_heads([folder], [], tmp_path / "cache")
    anat = tmp_path / "scans" / "sub-01" / "anat"
    save_volume(anat / "sub-01_T1w.nii.gz", abs(image), label_map.grid)
    save_volume(anat / "sub-01_mask.nii.gz", speck, label_map.grid)
    with pytest.raises(DataError, match=r"sub-01_T1w.nii.gz: the brain mask holds 0.000 l"):
        prepare_heads([], [tmp_path / "scans"], tmp_path / "cache")


def test_the_skull_is_learnt_and_the_brain_kept_to_the_bit(drawn_head, tmp_path):
    """Only the third network moves; a later training goes on where it is, and needs its sizes."""
    init = BrainModel(BrainNet(TINY), "begun")
    settings = replace(TINY, skull=True, skull_channels=(4, 8))
    config = HeadConfig(steps=2, warmup=1, decay=1, cube=32, rate=0.01, ema=0.1)
    heads, learnt = {"toys": [drawn_head]}, init
    for run in (tmp_path / "first", tmp_path / "second"):
        path = train_mask(heads, run, config, init=learnt, net_config=settings)
        before, learnt = learnt.net.state_dict(), models.load(BrainModel, str(path))
        for name, weight in learnt.net.state_dict().items():
            moves = name.startswith("skull.")
            if name in before:
                assert torch.equal(weight, before[name].half().float()) is not moves, name
                assert torch.allclose(weight, before[name], atol=0.1)
    with pytest.raises(UsageError, match=r"give \[net\] its sizes"):
        train_mask(heads, tmp_path, config, init=learnt, net_config=replace(TINY, skull=True))


def test_the_skull_needs_a_network_and_label_maps(drawn_head, real_head, tmp_path):
    settings, config = replace(TINY, skull=True), HeadConfig(steps=1)
    with pytest.raises(UsageError, match="after the brain"):
        train_mask({"toys": [drawn_head]}, tmp_path, config, net_config=settings)
    init = BrainModel(BrainNet(TINY), "begun")
    with pytest.raises(UsageError, match="real heads"):
        train_mask({"mri": [real_head]}, tmp_path, config, init=init, net_config=settings)


def test_freesurfers_codes_of_the_brain():
    codes = np.array([0, 2, 24, 77, 253, 258, 500, 530, 629, 630, 632, 633, 999, 1000, 2035, 12175])
    brain = [2, 77, 253, 630, 632, 1000, 2035, 12175]
    assert codes[is_brain(codes)].tolist() == brain


def test_label_0_is_air_even_without_a_voxel_of_it():
    """Air may have a code of its own: white matter, the lowest code, must not be painted as air."""
    codes = np.full((48, 48, 48), 517, np.int16)
    codes[12:36, 12:36, 12:36] = 2
    head = from_labels("air", "airs", Volume(codes, Grid(codes.shape, np.diag([4.0, 4, 4, 1]))))
    assert head.labels[tuple(n // 2 for n in head.labels.shape)] > 0
    np.testing.assert_array_equal(head.t1[0], 0)


@pytest.mark.parametrize("axes", ["RAS", "LIA"])
def test_drawn_labels_lie_where_the_distance_says(axes):
    """Halving the voxels of an even number leaves nothing half a voxel off."""
    ijk = np.indices((96, 96, 96)) - 47.5
    codes = np.where((ijk**2).sum(axis=0) < 36**2, 2, 0).astype(np.int16)
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes))
    affine = inv_ornt_aff(turn, codes.shape)
    head = from_labels("ball", "balls", Volume(codes, Grid(codes.shape, affine)))
    inside = (np.argwhere(head.labels > 0).mean(axis=0) - 0.5) / 2
    depth = np.argwhere(head.distance > 0).mean(axis=0)
    np.testing.assert_allclose(inside, depth, atol=0.02)


def test_a_brain_on_another_grid_is_refused(label_map, tmp_path):
    """Else the image would be black where the brain is."""
    anat = tmp_path / "scans" / "sub-01" / "anat"
    image = np.where(label_map.data > 0, 50, 0).astype(np.float32)
    save_volume(anat / "sub-01_T1w.nii.gz", image, label_map.grid)
    mirrored = Grid(label_map.grid.shape, np.diag([-1.0, 1, 1, 1]) @ label_map.grid.affine)
    brain = np.isin(label_map.data, (2, 41)).astype(np.uint8)
    save_volume(anat / "sub-01_desc-brain_mask.nii.gz", brain, mirrored)
    with pytest.raises(DataError, match="share a grid"):
        prepare_heads([], [tmp_path / "scans"], tmp_path / "cache")


def test_the_command_trains_on_folders(label_map, tmp_path, monkeypatch):
    """Options reach the run; names that are wrong are said before anything is prepared."""
    maps, trained = tmp_path / "maps", {}
    save_volume(maps / "one.nii.gz", label_map.data.astype(np.int16), label_map.grid)

    def fake_train(heads, run, config, **options):
        trained.update(heads=heads, config=config, **options)
        return run / "model.safetensors"

    monkeypatch.setattr("cadiff_cli.training.brain_mask.run.train_mask", fake_train)
    run = tmp_path / "run"

    def call(*options):
        return CliRunner().invoke(
            command, ["brain-mask", "-o", str(run), *options], standalone_mode=False
        )

    done = call("--label-maps", str(maps), "--steps", "701", "--rate", "1e-4", "--max-minutes", "3")
    assert done.exception is None
    assert done.stdout.strip() == str(run / "model.safetensors")
    assert [head.name for head in trained["heads"]["maps"]] == ["one"]
    assert (trained["config"].steps, trained["config"].rate) == (701, 1e-4)
    assert trained["max_minutes"] == 3
    trained.clear()
    assert isinstance(call().exception, click.UsageError)
    for wrong in (["--hold-out-source", "nowhere"], ["--device", "abacus"]):
        assert isinstance(call("--label-maps", str(maps), *wrong).exception, UsageError)
    assert not trained


def test_label_maps_cannot_be_held_out(label_map, drawn_head, real_head, tmp_path):
    heads = {"drawn": [drawn_head], "real": [real_head]}
    with pytest.raises(UsageError, match="label maps"):
        train_mask(heads, tmp_path, HeadConfig(steps=1, coarse_steps=0), hold_out=["drawn"])
    assert not list(tmp_path.iterdir())


def test_a_repaired_brain_is_prepared_again(label_map, tmp_path):
    anat, cache = tmp_path / "scans" / "sub-01" / "anat", tmp_path / "cache"
    image = np.where(label_map.data > 0, 50, 0).astype(np.float32)
    save_volume(anat / "sub-01_T1w.nii.gz", image, label_map.grid)

    def litres(inside):
        save_volume(anat / "sub-01_desc-brain_mask.nii.gz", inside, label_map.grid)
        (head,) = prepare_heads([], [tmp_path / "scans"], cache)["scans"]
        return (head.distance > 0).sum()

    brain = np.isin(label_map.data, (2, 41)).astype(np.uint8)
    half = brain * (np.arange(60) < 30)[:, None, None].astype(np.uint8)
    assert litres(half) < 0.6 * litres(brain)


# --- the inner skull ------------------------------------------------------------------------------

CUBE = HeadConfig(
    cube=48, tilted=0.0, scale=0.0, elastic_mm=0.0, shrunken=0.0, t1=1.0, zeroed_air=0
)
STILL = replace(CUBE, moved_skull=0.0)


@pytest.fixture
def bony_head(label_map):
    """As ``drawn_head``, with 6 mm of bone around the fluid."""
    codes = np.asarray(label_map.data).copy()
    codes[(codes == 511) & ball(72, 60, 3.0)] = 515
    return from_labels("bony", "toys", on_grid(codes, 3.0))


@pytest.fixture
def plain(monkeypatch):
    """No artefacts and no noise, and each tissue of one brightness."""
    monkeypatch.setattr(skull, "artefacts", lambda image, *_, **__: image)
    monkeypatch.setattr(skull.ndimage, "gaussian_filter", lambda image, _: image)

    def even(head, *_):
        mean = torch.from_numpy(head.t1[:, 0])
        return Contrast(mean, 0 * mean)

    monkeypatch.setattr(skull, "draw_contrast", even)


def held(patch):
    return (patch.tissue == HeadTissue.BRAIN) | (patch.tissue == HeadTissue.FLUID)


def whole_voxels(where):
    """Voxels of 2 mm of which all is meant."""
    return torch.nn.functional.avg_pool3d(where.float(), 2) == 1


def brightness(patch, where):
    """Mean of the image where ``whole_voxels`` are meant, in units of the mean of the brain's."""
    brain = patch.image[:, 0][whole_voxels(patch.tissue == HeadTissue.BRAIN)].mean()
    return float(patch.image[:, 0][whole_voxels(where)].mean() / brain)


def test_codes_are_tissues():
    named = {0: HeadTissue.AIR, 3: HeadTissue.BRAIN, 515: HeadTissue.BONE, 516: HeadTissue.MARROW}
    named |= dict.fromkeys((24, 507), HeadTissue.SOFT)
    assert {code: tissue_of(code) for code in named} == named


def test_a_cube_is_a_function_of_its_seed(bony_head):
    draws = SkullDraws([bony_head], replace(CUBE, seed=3, moved_skull=0.5))
    one, same, other = draws[5], draws[5], draws[6]
    for name in ("image", "distance", "tissue"):
        assert torch.equal(getattr(one, name), getattr(same, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))
    assert one.image.shape == one.distance.shape == (1, 1, 24, 24, 24)
    assert one.tissue.shape == (1, 48, 48, 48)
    assert float(one.image.min()) >= 0
    assert float(one.image.max()) <= 1


def test_what_the_skull_holds_is_brain_and_fluid(bony_head, plain):
    """In a cube as it is, bone is outside, fluid inside, and the hint tells the brain's border."""
    compared = 0
    white = bony_head.t1[1:, 0].max()
    for index in range(6):
        patch = draw_cube(bony_head, replace(STILL, cut=0.0), seeded(index))
        depth = finer(patch.distance)[:, 0]
        assert (patch.tissue[depth > 6] == HeadTissue.BRAIN).all()
        assert not (patch.tissue[depth < -8] == HeadTissue.BRAIN).any()
        for tissue, label in (
            (HeadTissue.FLUID, bony_head.fluid),
            (HeadTissue.BONE, bony_head.bone),
        ):
            parts = (patch.tissue == tissue, patch.tissue == HeadTissue.BRAIN)
            if all(whole_voxels(part).any() for part in parts):
                wanted = bony_head.t1[label, 0] / white
                assert brightness(patch, patch.tissue == tissue) == pytest.approx(wanted, rel=0.02)
                compared += 1
    assert compared > 4


def test_at_an_end_of_the_field_of_view_the_hint_ends(bony_head):
    """The brain's border is there, as the network of the brain mask has learnt."""
    at_faces = 0
    for index in range(6):
        patch = draw_cube(bony_head, replace(STILL, cut=1.0), seeded(index))
        whole = draw_cube(bony_head, replace(STILL, cut=0.0), seeded(index))
        assert torch.equal(patch.tissue, whole.tissue)
        assert torch.equal(patch.image, whole.image)
        assert (patch.distance <= whole.distance).all()
        ends, inside = (
            [d[0], d[-1], d[:, 0], d[:, -1], d[:, :, 0], d[:, :, -1]]
            for d in (patch.distance[0, 0], whole.distance[0, 0])
        )
        # The middle of the last voxel is 1 mm from the end.
        at_faces += any(end.max() <= 1 < x.max() for end, x in zip(ends, inside, strict=True))
    assert at_faces > 2


def test_a_skull_may_move_but_never_into_the_brain():
    n = 64
    index = torch.from_numpy(np.indices((n, n, n))).float()
    radius = (index - (n - 1) / 2).square().sum(dim=0).sqrt()
    outer, brain = 22 - radius, 20 - radius
    wider = []
    for seed in range(8):
        points, new = move_skull(index, outer, brain, 5.0, seeded(seed))
        assert (new - outer).abs().max() <= 5.0
        assert (new >= brain - 1e-4).all()
        # Inside nothing moves; outside each voxel is read as far from the old border as the new.
        torch.testing.assert_close(points[:, new > 0], index[:, new > 0], atol=1e-3, rtol=0)
        near = (new < -1) & (outer > -6)
        read_at = 22 - (points - (n - 1) / 2).square().sum(dim=0).sqrt()
        wanted = outer + (new - outer) * (FAR_MM + outer) / FAR_MM
        assert float((read_at - wanted)[near].abs().mean()) < 0.5
        wider.append(bool((new > 0).sum() > (outer > 0).sum()))
    assert any(wider)
    assert not all(wider)
    still, same = move_skull(index, outer, brain, 0.0, seeded(1))
    assert torch.equal(same, outer)
    torch.testing.assert_close(still, index, atol=1e-3, rtol=0)


def test_where_the_skull_has_moved_the_image_follows(bony_head, plain):
    """What it gains is fluid and what it loses is bone, in the image as in the target."""
    moved = replace(STILL, moved_skull=1.0, moved_mm=5.0)
    white = bony_head.t1[1:, 0].max()
    fluid, bone = (bony_head.t1[k, 0] / white for k in (bony_head.fluid, bony_head.bone))
    seen = {HeadTissue.FLUID: 0, HeadTissue.BONE: 0}
    for index in range(8):
        new, old = (draw_cube(bony_head, config, seeded(index)) for config in (moved, STILL))
        gained, lost = held(new) & ~held(old), held(old) & ~held(new)
        for where, tissue, wanted in (
            (gained, HeadTissue.FLUID, fluid),
            (lost, HeadTissue.BONE, bone),
        ):
            if whole_voxels(where).sum() > 5 and (new.tissue == HeadTissue.BRAIN).any():
                assert (new.tissue[where] == tissue).float().mean() > 0.95
                assert brightness(new, where) == pytest.approx(wanted, abs=0.05)
                seen[tissue] += 1
    assert min(seen.values()) > 0


def test_without_bone_a_skull_stays(drawn_head):
    """What it would lose could not be painted."""
    assert drawn_head.bone is None
    moved = replace(CUBE, moved_skull=1.0, shrunken=1.0)
    new, old = (draw_cube(drawn_head, config, seeded(1)) for config in (moved, STILL))
    assert torch.equal(new.tissue, old.tissue)


def test_a_shrunken_brain_leaves_its_skull(bony_head, plain):
    less = 0
    for index in range(4):
        whole = draw_cube(bony_head, STILL, seeded(index))
        small = draw_cube(bony_head, replace(STILL, shrunken=1.0, shrink_mm=8.0), seeded(index))
        assert torch.equal(held(small), held(whole))
        less += int(
            (whole.tissue == HeadTissue.BRAIN).sum() - (small.tissue == HeadTissue.BRAIN).sum()
        )
    assert less > 100


def test_a_voxel_of_the_head_has_eight_tissues():
    """Probabilities at 1 mm of an image at 2 mm; brain and fluid are held."""
    torch.manual_seed(0)
    net = BrainNet(replace(TINY, skull=True, skull_channels=(4, 8))).requires_grad_(False)
    head, distance = torch.rand(2, 1, 1, 12, 8, 4)
    logits = net.tell_tissues(head, 10 * distance)
    assert logits.shape == (1, len(HeadTissue), 24, 16, 8)
    p = logits.softmax(dim=1)
    wanted = p[:, HeadTissue.BRAIN] + p[:, HeadTissue.FLUID]
    torch.testing.assert_close(net.enclose(head, 10 * distance), wanted)


def test_the_truth_has_no_loss_and_borders_count_most():
    """A face of a cube is no border."""
    tissue = torch.zeros(1, 24, 24, 24, dtype=torch.int64)
    tissue[:, :20, 4:20, 4:20] = HeadTissue.FLUID
    tissue[:, :16, 8:16, 8:16] = HeadTissue.BRAIN
    logits = 40.0 * torch.nn.functional.one_hot(tissue, len(HeadTissue)).movedim(-1, 1)
    assert float(skull_losses(logits, tissue).total) < 1e-3
    losses = []
    for x in (10, 0):  # at the border of fluid and air, and inside the brain at a face of the cube
        y = 4 if x else 11
        wrong = logits.clone()
        wrong[:, :, x, y, 11] = 0
        wrong[:, HeadTissue.SOFT, x, y, 11] = 40
        losses.append(float(skull_losses(wrong, tissue).tissue))
    at_border, at_face = losses
    # Weights: 1, 1 for fluid, and 3 at the border.
    assert at_border == pytest.approx(5 * at_face, rel=0.01)
