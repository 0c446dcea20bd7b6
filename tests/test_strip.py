"""Finding the brain: what is stripped already, what a mask must be, and how one is tidied."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from cadiff_cli.config import Config, StripConfig, StripMethod
from cadiff_cli.errors import DataError, MissingInputError
from cadiff_cli.io.images import given_mask, load_scan, save_volume
from cadiff_cli.notes import NoteCode, codes_of, texts
from cadiff_cli.pipeline import prepare, strip_scan
from cadiff_cli.products import Scan
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.stages.masks import tidy
from cadiff_cli.stages.strip import (
    LARGE_LITRES,
    SPECK,
    foreground,
    on_scan,
    stripped_brain,
)


@pytest.fixture(autouse=True)
def _even_brightness(monkeypatch):
    """N4, which has tests of its own, finds nothing: it takes the phantom's dark shell for bias."""
    nothing = lambda image, _: np.zeros(image.data.shape, dtype=np.float32)  # noqa: E731
    monkeypatch.setattr("cadiff_cli.stages.bias.n4", nothing)


@pytest.fixture
def head_of(phantom):
    """A whole head: scalp and noisy air around the phantom's brain."""

    def make(air=2.0):
        brain = phantom("RAS", 2.0)
        rng = np.random.default_rng(0)
        ijk = np.indices(brain.t1.grid.shape) - np.reshape(brain.t1.grid.shape, (3, 1, 1, 1)) / 2
        scalp = ((ijk / np.reshape([40, 48, 41], (3, 1, 1, 1))) ** 2).sum(0) < 1
        noise = abs(air * rng.standard_normal(brain.t1.data.shape))
        data = np.where(brain.codes > 0, brain.t1.data, np.where(scalp, 40, 0) + noise)
        return Volume(data.astype(np.float32), brain.t1.grid)

    return make


def test_a_stripped_scan_is_recognised(phantom, orientation):
    assert stripped_brain(phantom(orientation, 2.0).t1)


@pytest.mark.parametrize("value", [-1000.0, 7.0])
def test_the_background_may_have_any_value(phantom, value):
    head = phantom("RAS", 2.0)
    assert stripped_brain(Volume(np.where(head.codes > 0, head.t1.data, value), head.t1.grid))


def test_a_head_is_recognised(head_of):
    assert not stripped_brain(head_of(air=2.0))


def test_a_head_in_zeroed_air_is_recognised_by_its_size(head_of):
    """A scanner that writes 0 outside the head does not make it a brain."""
    assert not stripped_brain(head_of(air=0.0))


def in_a_skull(t1, bone, scalp_mm=8.0):
    """A brain in a head: 8 mm of ``bone`` around it, and ``scalp_mm`` of skin and fat."""
    brain = np.pad(t1.data, pad := 12)
    away = ndimage.distance_transform_edt(brain == 0, sampling=t1.grid.spacing_mm)
    head = np.where((brain == 0) & (away <= 8), bone, brain)
    head[(away > 8) & (away <= 8 + scalp_mm)] = brain.max()
    grid = t1.grid.crop((-pad,) * 3, tuple(n + 2 * pad for n in t1.data.shape))
    return Volume(head.astype(np.float32), grid)


@pytest.mark.parametrize("air", [0, 2, 20])
@pytest.mark.parametrize("axcodes", ["RAS", "LIA"])
def test_a_large_brain_is_told_from_a_head_of_its_size(phantom, axcodes, air):
    """However much air of 0 is around them; bone may have been set to 0, too."""
    large = phantom(axcodes, 3.0, scale=1.13).t1
    heads = [
        in_a_skull(phantom(axcodes, 3.0, scale=scale).t1, bone)
        for scale, bone in ((0.9, 1.0), (0.98, 0.0))
    ]
    for t1, stripped in ((large, True), (heads[0], False), (heads[1], False)):
        assert LARGE_LITRES < foreground(t1).litres < 2.3
        grid = t1.grid.crop((-air,) * 3, tuple(n + 2 * air for n in t1.data.shape))
        assert (stripped_brain(Volume(np.pad(t1.data, air), grid)) is not None) is stripped


def test_a_large_brain_is_told(phantom, tmp_path):
    scan = Scan(phantom("RAS", 3.0, scale=1.13).t1, tmp_path / "sub-01_T1w.nii.gz")
    notes = strip_scan(scan, None, Config(), tmp_path).notes
    assert NoteCode.LARGE_BRAIN in {note.code for note in notes}


def test_a_stripped_scan_is_left_alone(phantom, toy_template, scan_of, tmp_path, orientation):
    head = phantom(orientation, 2.0)
    stripped = strip_scan(scan_of(head), toy_template(spacing=8.0), Config(StripConfig()), tmp_path)
    assert stripped.method is StripMethod.AS_IS
    assert not stripped.notes
    assert stripped.intracranial is None
    assert "skull-stripped" in stripped.no_intracranial
    litres = np.count_nonzero(stripped.mask.data) * stripped.mask.grid.voxel_volume_mm3 / 1e6
    truth = np.count_nonzero(head.codes) * head.t1.grid.voxel_volume_mm3 / 1e6
    assert litres == pytest.approx(truth, rel=0.02)
    assert (stripped.t1.data[~stripped.mask.data] == 0).all()
    # The mask is a brain's, not its field of view's.
    assert stripped.t1.data[stripped.mask.data].mean() == pytest.approx(
        head.t1.data[head.codes > 0].mean(), rel=0.02
    )


def test_a_template_with_a_skull_is_stripped_by(
    toy_template, scan_of, head_of, phantom, monkeypatch
):
    """Whichever of the templates it is; the first where none has one, for the error to name."""
    asked = []

    def witness(_scan, template, _config, _work):
        asked.append(template.name)
        raise DataError("stop", "")

    monkeypatch.setattr("cadiff_cli.pipeline.strip_scan", witness)
    bare = toy_template(spacing=8.0)
    whole = replace(bare, name="whole", head=head_of(), mask=bare.brain)
    for templates, expected in (
        ([bare, whole], "whole"),
        ([whole, replace(whole, name="later")], "whole"),
        ([bare, replace(bare, name="later")], "toy"),
    ):
        with pytest.raises(DataError, match="stop"):
            prepare(scan_of(phantom("RAS", 8.0)), templates, Config(), Path())
        assert asked.pop() == expected


def test_a_dark_background_does_not_lift_the_brain(phantom, toy_template, scan_of, tmp_path):
    """Background below 0 is subtracted: brain minus background is what counts."""
    head = phantom("RAS", 2.0, scale=0.8)
    lowered = np.where(head.codes > 0, head.t1.data - 50, -50).astype(np.float32)
    dark = type(head)(Volume(lowered, head.t1.grid), head.codes, 0.8, head.shift_mm)
    plain, moved = (
        strip_scan(scan_of(h), toy_template(spacing=8.0), Config(StripConfig("none")), tmp_path)
        for h in (head, dark)
    )
    np.testing.assert_array_equal(plain.mask.data, moved.mask.data)
    np.testing.assert_allclose(plain.t1.data, moved.t1.data, atol=1e-2)


def test_a_brain_below_its_background_is_lifted(phantom, toy_template, scan_of, tmp_path):
    """As z-scored scans and MP2RAGE's are: outside is 0, and so would half of the brain be."""
    head = phantom("RAS", 2.0, scale=0.8)
    inside = head.codes > 0
    scored = np.where(inside, (head.t1.data - head.t1.data[inside].mean()) / 20, 0)
    moved = type(head)(Volume(scored.astype(np.float32), head.t1.grid), head.codes, 0.8, (0, 0, 0))
    stripped = strip_scan(
        scan_of(moved), toy_template(spacing=8.0), Config(StripConfig()), tmp_path
    )
    assert stripped.method is StripMethod.AS_IS
    assert stripped.t1.data.min() == 0
    plain = strip_scan(scan_of(head), toy_template(spacing=8.0), Config(StripConfig()), tmp_path)
    both = stripped.mask.data & plain.mask.data
    assert np.corrcoef(plain.t1.data[both], stripped.t1.data[both])[0, 1] > 0.995


def test_one_wrapped_voxel_does_not_flatten_the_brain(phantom, toy_template, scan_of, tmp_path):
    head = phantom("RAS", 2.0, scale=0.8)
    wrapped = head.t1.data.copy()
    wrapped[tuple(np.argwhere(head.codes > 0)[100])] = -32768
    moved = type(head)(Volume(wrapped, head.t1.grid), head.codes, 0.8, (0, 0, 0))
    config = Config(StripConfig())
    plain, spoilt = (
        strip_scan(scan_of(h), toy_template(spacing=8.0), config, tmp_path) for h in (head, moved)
    )
    top = np.percentile(plain.t1.data, 99)
    assert np.percentile(spoilt.t1.data, 99) == pytest.approx(top, rel=0.05)
    both = plain.mask.data & spoilt.mask.data
    assert np.mean(abs(plain.t1.data - spoilt.t1.data)[both] < 0.05 * top) > 0.99


def test_a_mask_half_a_voxel_off_at_a_corner_is_refused(phantom, scan_of, tmp_path):
    """Though no element of its affine differs by more than 0.01."""
    head = phantom("RAS", 2.0)
    turned = head.t1.grid.affine.copy()
    turned[0, 1] += 0.009
    path = tmp_path / "mask.nii.gz"
    save_volume(path, head.codes > 0, Grid(head.codes.shape, turned))
    with pytest.raises(DataError, match="lies on"):
        strip_scan(scan_of(head), None, Config(StripConfig(mask=path)), tmp_path)


def test_a_given_mask_lies_on_the_scans_grid_to_the_bit(phantom, scan_of, tmp_path):
    """A header that rounds the same grid otherwise is accepted."""
    head = phantom("oblique", 2.0)
    near = head.t1.grid.affine.copy()
    near[:3, 3] += 0.05
    save_volume(tmp_path / "m.nii.gz", head.codes > 0, Grid(head.codes.shape, near))
    mask = given_mask(tmp_path / "m.nii.gz", scan_of(head))
    assert np.array_equal(mask.grid.affine, head.t1.grid.affine)


def test_a_given_mask_is_used(phantom, toy_template, scan_of, tmp_path):
    head = phantom("oblique", 2.0)
    only_right = (head.codes > 0) & (head.codes >= 40)
    path = tmp_path / "mask.nii.gz"
    save_volume(path, only_right, head.t1.grid)
    stripped = strip_scan(
        scan_of(head), toy_template(spacing=8.0), Config(StripConfig(mask=path)), tmp_path
    )
    assert stripped.method is StripMethod.MASK_FILE
    ijk = np.argwhere(stripped.mask.data)
    assert np.median(stripped.mask.grid.to_world(ijk)[:, 0]) > 15
    litres = len(ijk) * stripped.mask.grid.voxel_volume_mm3 / 1e6
    assert litres == pytest.approx(np.count_nonzero(only_right) * 8e-6, rel=0.03)


@pytest.mark.parametrize("spacing", [0.5, 0.7])
def test_a_mask_that_was_drawn_stays_as_it_was_drawn(phantom, scan_of, tmp_path, spacing):
    """On the scan's own grid voxel by voxel, and on the working grid in the same place."""
    head = phantom("LAS", spacing, scale=0.4)
    drawn = head.codes > 0
    path = tmp_path / "mask.nii.gz"
    save_volume(path, drawn, head.t1.grid)
    scan, centre = scan_of(head), head.t1.grid.to_world(np.argwhere(drawn)).mean(axis=0)
    for chosen in (StripConfig("none"), StripConfig(mask=path)):
        stripped = strip_scan(scan, None, Config(chosen), tmp_path)
        np.testing.assert_array_equal(on_scan(stripped, scan).data, tidy(drawn, SPECK))
        ijk = np.argwhere(stripped.mask.data)
        assert stripped.mask.grid.to_world(ijk).mean(axis=0) == pytest.approx(centre, abs=0.05)


@pytest.mark.parametrize("method", ["none", "auto"])
@pytest.mark.parametrize("least", [-np.inf, 0.0])
def test_a_stripped_scan_that_rings_is_recognised(
    phantom, scan_of, tmp_path, method, least, all_threads
):
    """Spline interpolation after stripping leaves few voxels of background alike.

    Where negative values are cut off, half of the background is 0 again.
    """
    head = phantom("RAS", 2.0)
    moved = ndimage.shift(head.t1.data.astype(np.float32), (0.3, 0.4, 0.2), order=3).clip(least)
    scan = scan_of(replace(head, t1=Volume(moved, head.t1.grid)))
    assert foreground(scan.t1).litres > 2 * Volume(head.codes > 0, head.t1.grid).litres
    stripped = strip_scan(scan, None, Config(StripConfig(method)), tmp_path)
    assert stripped.method is StripMethod.AS_IS
    assert stripped.mask.litres == pytest.approx(
        Volume(head.codes > 0, head.t1.grid).litres, rel=0.1
    )


def test_an_object_in_dark_air_is_not_stripped(phantom):
    """However dark: noise does not die away from the object as a spline's ringing does."""
    head = phantom("RAS", 2.0)
    rng = np.random.default_rng(0)
    shape = head.t1.data.shape
    real, imaginary = rng.normal(0, 0.2, (2, *shape))
    noisy = np.hypot(head.t1.data + real, imaginary).astype(np.float32)
    assert not stripped_brain(Volume(noisy, head.t1.grid))


def test_a_given_mask_keeps_its_parts(phantom, toy_template, scan_of, tmp_path):
    """Whoever drew it meant both; that it is in pieces is said."""
    head = phantom("RAS", 2.0)
    parts = (head.codes > 0) & (abs(np.arange(head.codes.shape[0]) - 44) > 6)[:, None, None]
    path = tmp_path / "mask.nii.gz"
    save_volume(path, parts, head.t1.grid)
    stripped = strip_scan(
        scan_of(head), toy_template(spacing=8.0), Config(StripConfig(mask=path)), tmp_path
    )
    litres = np.count_nonzero(stripped.mask.data) * stripped.mask.grid.voxel_volume_mm3 / 1e6
    assert litres == pytest.approx(np.count_nonzero(parts) * 8e-6, rel=0.02)
    assert NoteCode.MASK_PIECES in codes_of(stripped.notes)


def test_no_unit_of_brightness_is_too_small(phantom, scan_of, tmp_path):
    head = phantom("RAS", 2.0)
    dim = Volume((head.t1.data * 1e-8).astype(np.float32), head.t1.grid)
    stripped = strip_scan(
        scan_of(type(head)(dim, head.codes, 1.0, head.shift_mm)), None, Config(), tmp_path
    )
    assert stripped.method is StripMethod.AS_IS


@pytest.mark.parametrize("value", [0.0, -1000.0])
def test_a_body_of_one_brightness_is_no_brain(phantom, scan_of, tmp_path, value):
    head = phantom("RAS", 2.0)
    noise = np.random.default_rng(0).normal(0, 5, head.codes.shape)
    ball = np.where(head.codes > 0, 80 + noise, value).astype(np.float32)
    phantom_scan = type(head)(Volume(ball, head.t1.grid), head.codes, 1.0, head.shift_mm)
    with pytest.raises(DataError, match="no brain found"):
        strip_scan(scan_of(phantom_scan), None, Config(StripConfig()), tmp_path)


def test_a_mask_on_another_grid_is_refused(phantom, toy_template, scan_of, tmp_path):
    head, other = phantom("RAS", 2.0, scale=0.5), phantom("RAS", 2.0, 0.5, shift_mm=(2, 0, 0))
    path = tmp_path / "mask.nii.gz"
    save_volume(path, other.codes > 0, other.t1.grid)
    with pytest.raises(DataError, match="mask") as caught:
        strip_scan(
            scan_of(head), toy_template(spacing=8.0), Config(StripConfig(mask=path)), tmp_path
        )
    assert caught.value.remedy


def test_an_empty_mask_is_refused(phantom, toy_template, scan_of, tmp_path):
    head = phantom("RAS", 2.0, scale=0.5)
    path = tmp_path / "mask.nii.gz"
    save_volume(path, np.zeros(head.t1.grid.shape, dtype=np.uint8), head.t1.grid)
    with pytest.raises(DataError, match="empty"):
        strip_scan(
            scan_of(head), toy_template(spacing=8.0), Config(StripConfig(mask=path)), tmp_path
        )


def test_implausible_brains_are_reported(phantom, toy_template, scan_of, tmp_path):
    small = phantom("RAS", 2.0, scale=0.75)
    stripped = strip_scan(
        scan_of(small), toy_template(spacing=8.0), Config(StripConfig()), tmp_path
    )
    assert any("look at it" in text for text in texts(stripped.notes))


def test_a_head_left_unstripped_is_reported(phantom, head_of, toy_template, scan_of, tmp_path):
    brain = phantom("RAS", 2.0)
    head = type(brain)(head_of(), brain.codes, 1.0, brain.shift_mm)
    stripped = strip_scan(
        scan_of(head), toy_template(spacing=8.0), Config(StripConfig("none")), tmp_path
    )
    assert any("does not look skull-stripped" in text for text in texts(stripped.notes))


def test_a_template_without_a_skull_cannot_strip(phantom, head_of, toy_template, scan_of, tmp_path):
    brain = phantom("RAS", 2.0)
    head = type(brain)(head_of(), brain.codes, 1.0, brain.shift_mm)
    with pytest.raises(MissingInputError, match="no skull") as caught:
        strip_scan(
            scan_of(head), toy_template(spacing=8.0), Config(StripConfig("template")), tmp_path
        )
    assert "--mask" in caught.value.remedy


def test_tidy_keeps_the_largest_part_and_fills_it():
    mask = np.zeros((20, 20, 20), dtype=bool)
    mask[2:12, 2:12, 2:12] = True
    solid = mask.copy()
    mask[5:7, 5:7, 5:7] = False
    mask[15:18, 15:18, 15:18] = True
    both = solid | mask
    np.testing.assert_array_equal(tidy(mask, 0.02), both)
    np.testing.assert_array_equal(tidy(mask, 0.05), solid)
    np.testing.assert_array_equal(tidy(mask), solid)
    np.testing.assert_array_equal(tidy(tidy(mask)), solid)
    assert not tidy(np.zeros_like(mask)).any()


@pytest.mark.parametrize("stripped_before", [True, False])
def test_a_mask_that_leaves_the_head_is_reported(
    phantom, head_of, scan_of, tmp_path, stripped_before
):
    """As one of another person or with a wrong header does."""
    brain = phantom("RAS", 2.0)
    t1 = brain.t1 if stripped_before else head_of()
    head = type(brain)(t1, brain.codes, 1.0, brain.shift_mm)
    path = tmp_path / "mask.nii.gz"
    for shift, said in ((0, False), (16, True)):
        moved = np.roll(brain.codes > 0, shift, axis=2)
        save_volume(path, moved, t1.grid)
        stripped = strip_scan(scan_of(head), None, Config(StripConfig(mask=path)), tmp_path)
        assert (NoteCode.MASK_IN_AIR in codes_of(stripped.notes)) is said
        assert (stripped.quality.in_air > 0.01) == said


REAL = {"malc": True, "bids/ds002748": True, "heads": False}
STRIPPED_HEADS = ("sub-baby", "sub-child6y")


@pytest.mark.parametrize("folder", REAL)
def test_real_scans_are_recognised(shared, folder):
    """MALC, ds002748 and two children come without their skulls, the others with them."""
    scans = sorted(shared(folder).rglob("*_T1w.nii.gz"))
    assert scans

    def wanted(path):
        return REAL[folder] or path.name.startswith(STRIPPED_HEADS)

    wrong = [p.name for p in scans if (stripped_brain(load_scan(p).t1) is None) is wanted(p)]
    assert not wrong
