"""The distance field and the registration that carries it: signs, origins and extents."""

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from cadiff_cli.config import Config, RegisterConfig, StripMethod
from cadiff_cli.errors import DataError, DiskError, UsageError
from cadiff_cli.notes import NoteCode, codes_of, texts
from cadiff_cli.pipeline import prepare
from cadiff_cli.products import Stripped
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.stages.condition import MARGIN_VOXELS, brain_crop, deep, normalise
from cadiff_cli.stages.field import coordinate_field, mean_field, template_coordinates
from cadiff_cli.stages.register import register, register_template, settings, similarity, warp
from cadiff_cli.stages.strip import on_scan

ONE_MM = np.ones(3)


def world_of(grid):
    return grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))


def closed_form(template, world):
    """(3, ...) coordinates of world positions in the template's frame."""
    frame = template.frame
    ac, low, high = (np.array(v) for v in (frame.ac_mm, frame.low_mm, frame.high_mm))
    return np.moveaxis((world - ac - low) / (high - low), -1, 0)


def with_ac(template, ac_mm):
    """``template`` under another idea of where its AC lies."""
    return replace(template, frame=replace(template.frame, ac_mm=ac_mm))


def test_template_coordinates_have_a_closed_form(toy_template):
    template = toy_template(shift_mm=(3, -4, 5), spacing=8.0)
    channels = template_coordinates(template)
    expected = closed_form(template, world_of(channels[0].grid))
    np.testing.assert_allclose([c.data for c in channels], expected, atol=1e-5)


def test_template_coordinates_are_centred_on_the_ac(toy_template, identity):
    """0.5 on the AC's sagittal plane, less on the left, and 0 to 1 between the extents."""
    template = toy_template(shift_mm=(3, -4, 5), spacing=8.0)
    at_ac = Grid((3, 1, 1), np.diag([10.0, 1, 1, 1])).crop((0, 0, 0), (3, 1, 1))
    affine = at_ac.affine.copy()
    affine[:3, 3] = np.array(template.frame.ac_mm) - (10, 0, 0)
    left, middle, right = coordinate_field(identity(template), Grid((3, 1, 1), affine)).data[0]
    assert middle.item() == pytest.approx(0.5, abs=1e-5)
    assert left.item() < 0.5 < right.item()


def test_field_under_the_identity_is_the_closed_form(toy_template, identity, grid_of, orientation):
    """In any orientation, and clipped outside the extents."""
    template = toy_template(shift_mm=(3, -4, 5), spacing=8.0)
    grid = grid_of(orientation, (6.0, 7.0, 8.0), scale=1.25)
    field = coordinate_field(identity(template), grid)
    expected = closed_form(template, world_of(grid))
    assert expected.min() < 0
    assert expected.max() > 1
    np.testing.assert_allclose(field.data, np.clip(expected, 0, 1), atol=1e-4)


def test_a_tilted_gantry_does_not_bend_the_field(toy_template, identity, grid_of):
    """ITK knows no sheared grids: taken for an orthogonal one it is off by centimetres."""
    template = toy_template(spacing=8.0)
    straight = grid_of("LPS", (6.0, 6.0, 6.0))
    tilt = np.eye(4)
    tilt[1, 2] = np.tan(np.radians(15))
    grid = Grid(straight.shape, tilt @ straight.affine)
    assert grid.is_sheared
    field = coordinate_field(identity(template), grid)
    expected = np.clip(closed_form(template, world_of(grid)), 0, 1)
    # Linear interpolation rounds the corner at which coordinates are clipped.
    np.testing.assert_allclose(field.data, expected, atol=0.01)
    inner = (expected > 0.05) & (expected < 0.95)
    np.testing.assert_allclose(field.data[inner], expected[inner], atol=1e-3)


def test_the_mean_field_leaves_out_what_looks_wrong(toy_template, identity, grid_of):
    """Errors of opposite sign cancel; a suspicious registration counts only if all are."""
    grid = grid_of("RAS", 8.0)
    template = toy_template(spacing=8.0)
    left, right, far = (identity(with_ac(template, (x, 0, 0))) for x in (-4, 4, 20))
    truth = coordinate_field(identity(template), grid).data
    far = replace(far, transform=replace(far.transform, trusted=False))
    inside = ((truth > 0.1) & (truth < 0.9)).all(axis=0)
    for several in ((left, right), (left, far, right)):
        field = mean_field(several, grid).data
        np.testing.assert_allclose(field[:, inside], truth[:, inside], atol=1e-5)
    alone = mean_field([far], grid).data
    np.testing.assert_array_equal(alone, coordinate_field(far, grid).data)


def test_an_image_is_warped_in_any_orientation(phantom, toy_template, identity, grid_of):
    """Both directions of the identity put an image where world coordinates say."""
    head, grid = phantom("oblique", 2.0, noise=0.0), grid_of("LPS", 3.0)
    expected = phantom("LPS", 3.0, noise=0.0).t1.data
    for inverse in (False, True):
        nothing = identity(toy_template(spacing=8.0)).transform
        moved = warp(head.t1, nothing, grid, inverse=inverse).data
        assert np.corrcoef(moved.ravel(), expected.ravel())[0, 1] > 0.97


@pytest.fixture(scope="module")
def moved_template(toy_template, tmp_path_factory):
    """A scan that is the template's brain, 10 mm to the right of it, registered by ANTs."""
    template = toy_template(spacing=2.0)
    affine = template.brain.grid.affine.copy()
    affine[0, 3] += 10
    t1 = Volume(template.brain.data, Grid(template.brain.grid.shape, affine))
    stripped = Stripped(t1, Volume(t1.data > 0, t1.grid), StripMethod.AS_IS, bare=True)
    work = tmp_path_factory.mktemp("moved")
    return stripped, register_template(stripped, template, RegisterConfig("affine"), work)


def test_the_field_goes_from_the_scan_to_the_template(moved_template):
    """The scan's point p is the template's point p - 10 mm: fixes the direction for ever."""
    stripped, registered = moved_template
    template, grid, inside = registered.template, stripped.t1.grid, stripped.mask.data
    field = coordinate_field(registered, grid).data[:, inside]
    expected = closed_form(template, world_of(grid)[inside] - (10, 0, 0))
    extent = np.subtract(template.frame.high_mm, template.frame.low_mm)
    error_mm = abs(field - expected) * extent[:, None]
    assert error_mm.max() < 1.5


def test_transforms_invert_each_other(moved_template):
    stripped, registered = moved_template
    brain, grid = registered.template.brain, stripped.t1.grid
    there = warp(brain, registered.transform, grid)
    np.testing.assert_allclose(there.data[stripped.mask.data].mean(), 75, atol=15)
    assert np.corrcoef(there.data.ravel(), stripped.t1.data.ravel())[0, 1] > 0.98
    back = warp(there, registered.transform, brain.grid, inverse=True)
    assert np.corrcoef(back.data.ravel(), brain.data.ravel())[0, 1] > 0.97


def test_a_seed_makes_registration_repeatable(moved_template, tmp_path):
    stripped, first = moved_template
    again = register_template(stripped, first.template, RegisterConfig("affine"), tmp_path)
    a, b = (coordinate_field(r, stripped.t1.grid).data for r in (first, again))
    np.testing.assert_array_equal(a, b)


def test_empty_space_around_a_brain_does_not_matter(moved_template, tmp_path):
    """A scan cut close and one with a wide field of view get the same transform, to the bit."""
    stripped, first = moved_template
    t1, width = stripped.t1, 14
    start, shape = (-width,) * 3, tuple(n + 2 * width for n in t1.grid.shape)
    wide = Volume(np.pad(t1.data, width), t1.grid.crop(start, shape))
    transform = register(wide, first.template.brain, RegisterConfig("affine"), tmp_path)
    a, b = (coordinate_field(r, t1.grid).data for r in (first, replace(first, transform=transform)))
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_deformable_registration_finds_an_oblique_head(
    phantom, toy_template, scan_of, tmp_path, monkeypatch
):
    """The whole way to the network's input, where the truth is known at every voxel."""
    head = phantom("oblique", (1.6, 2.0, 2.4), scale=0.75)
    template = toy_template(scale=0.75, shift_mm=(4, -6, 5))
    # N4 takes the phantom's dark shell for a bias.
    monkeypatch.setattr("cadiff_cli.stages.bias.NATURAL", np.inf)
    scan = scan_of(head)
    prepared = prepare(scan, [template], Config(register=RegisterConfig("fast")), tmp_path)
    conditions = prepared.conditions

    (registered,) = prepared.registrations
    assert registered.transform.kind == "fast"
    assert registered.transform.score > 1.2
    assert registered.transform.trusted
    assert not registered.transform.notes
    field = conditions.field
    inside = conditions.mask.data[::2, ::2, ::2]
    extent = np.subtract(template.frame.high_mm, template.frame.low_mm)
    error_mm = (abs(field.data - head.field(field.grid))[:, inside] * extent[:, None]).max(0)
    assert np.median(error_mm) < 1
    assert np.percentile(error_mm, 95) < 3

    grid = conditions.image.grid
    assert all(n % 16 == 0 for n in grid.shape)
    assert field.grid.shape == tuple(n // 2 for n in grid.shape)
    assert field.data.dtype == np.float32
    assert (conditions.image.data[~conditions.mask.data] == 0).all()
    agreement = on_scan(prepared.stripped, prepared.scan).data == (head.codes > 0)
    assert agreement.mean() > 0.995


def test_a_failed_deformation_falls_back_to_affine(
    phantom, toy_template, stripped_of, identity, monkeypatch, tmp_path
):
    template = toy_template(spacing=4.0)
    found = identity(template).transform

    def run(fixed, moving, wanted, seed, work_dir):
        if wanted == settings("fast"):
            raise RuntimeError("ITK gave up\nwith a long story")
        return found.to_fixed, found.to_moving

    monkeypatch.setattr("cadiff_cli.stages.register._run", run)
    t1 = stripped_of(phantom("RAS", 4.0)).t1
    transform = register(t1, template.brain, RegisterConfig("fast"), tmp_path)
    assert transform.kind == "affine"
    assert not transform.trusted
    assert any("ITK gave up" in text for text in texts(transform.notes))


def test_a_full_work_folder_is_no_fault_of_the_scan(
    phantom, toy_template, stripped_of, monkeypatch, tmp_path
):
    """ANTs says only that it failed, and the next scans would fail as well."""

    def run(*_):
        raise RuntimeError("Registration failed with error code 1")

    monkeypatch.setattr("cadiff_cli.stages.register._run", run)
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    monkeypatch.setattr("cadiff_cli.stages.register.shutil.disk_usage", lambda _: usage)
    t1, brain = stripped_of(phantom("RAS", 4.0)).t1, toy_template(spacing=4.0).brain
    with pytest.raises(DiskError, match="3 MB left"):
        register(t1, brain, RegisterConfig("fast"), tmp_path)


def test_unknown_settings_name_the_known_ones():
    with pytest.raises(UsageError, match=r"fast") as caught:
        settings("perfect")
    assert caught.value.exit_code == 64


def test_similarity_is_two_for_equal_images_and_one_for_unrelated():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(1, 2, (2, 40, 40, 40))
    assert similarity(a, a) == pytest.approx(2)
    assert similarity(a, b) < 1.02
    assert similarity(a, b) == pytest.approx(similarity(b, a))
    # Mutual information cares about relations, not about brightness.
    assert similarity(a, 5 * a) == pytest.approx(2)
    assert similarity(np.zeros(8), np.zeros(8)) == 1


def test_crop_holds_the_brain_with_a_margin(phantom, stripped_of):
    mask = stripped_of(phantom("oblique", 2.0, scale=0.5)).mask
    grid = brain_crop(mask)
    assert all(n % 16 == 0 for n in grid.shape)
    offset = np.linalg.inv(mask.grid.affine) @ [*grid.affine[:3, 3], 1]
    start = np.round(offset[:3]).astype(int)
    np.testing.assert_allclose(offset[:3], start, atol=1e-6)
    inside = np.argwhere(mask.data)
    assert (inside.min(0) - start >= MARGIN_VOXELS).all()
    assert (start + grid.shape - 1 - inside.max(0) >= MARGIN_VOXELS).all()


def test_normalised_intensities_do_not_depend_on_units():
    rng = np.random.default_rng(0)
    image, mask = rng.uniform(50, 60, (20, 20, 20)), rng.random((20, 20, 20)) > 0.5
    scaled = normalise(image, mask, ONE_MM)
    assert scaled.min() == 0
    assert scaled.max() == 1
    assert (scaled[~mask] == 0).all()
    np.testing.assert_allclose(normalise(image * 1000 - 7, mask, ONE_MM), scaled, atol=1e-6)


def test_bright_and_dark_bits_at_the_border_change_no_contrast():
    """A mask with some fat and dura in it, and a neat one: the brain looks the same."""
    rng = np.random.default_rng(0)
    ijk = np.indices((48,) * 3) - 23.5
    radius = np.linalg.norm(ijk, axis=0)
    mask, image = radius < 22, rng.uniform(50, 60, (48,) * 3)
    dirty = np.where(radius > 19, rng.choice([0.0, 200.0], (48,) * 3), image)
    inside = radius < 18
    np.testing.assert_allclose(
        normalise(dirty, mask, ONE_MM)[inside], normalise(image, mask, ONE_MM)[inside]
    )


@pytest.mark.parametrize("spacing", [(1, 1, 1), (2, 2, 2), (1, 1, 4)])
def test_contrast_does_not_depend_on_the_spacing(spacing):
    """The border is as many millimetres wide in every direction: half of it bright, and unseen."""
    spacing = np.array(spacing, dtype=float)
    shape = np.ceil(72 / spacing).astype(int)
    mm = (np.indices(shape) + 0.5) * spacing.reshape(3, 1, 1, 1) - 36
    radius = np.linalg.norm(mm, axis=0)
    image = np.where(radius > 27, 500.0, 100 + radius)
    scaled = normalise(image, radius < 30, spacing)
    low, high = (float(scaled[near].mean()) for near in (radius < 6, (radius > 20) & (radius < 24)))
    assert low < 0.3
    assert 0.7 < high < 1


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1.2, 0.9, 3.0)])
def test_deep_is_what_a_distance_transform_calls_deep(spacing):
    rng = np.random.default_rng(3)
    mask = ndimage.gaussian_filter(rng.standard_normal((30, 28, 26)), 2) > -0.05
    distance = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=spacing)
    found = deep(mask, 3.0, np.array(spacing, dtype=float))
    assert found.any()
    np.testing.assert_array_equal(found, distance[1:-1, 1:-1, 1:-1] > 3)


def test_template_position_does_not_matter(toy_template, identity, grid_of):
    """Field values are relative to the AC: moving template and grid together changes nothing."""
    here = coordinate_field(identity(toy_template(spacing=8.0)), grid_of("RAS", 8.0))
    shift = np.array([7.0, -3, 11])
    there_template = with_ac(toy_template(spacing=8.0), tuple(shift))
    there = coordinate_field(identity(there_template), grid_of("RAS", 8.0, shift_mm=shift))
    np.testing.assert_allclose(here.data, there.data, atol=1e-5)


@pytest.mark.parametrize("name", ["fast", "affine"])
@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_what_cannot_be_bent_is_registered_affinely(
    moved_template, monkeypatch, tmp_path, name, error
):
    """A full memory or disk is no property of the scan: it is not hidden behind a worse result."""
    stripped, first = moved_template
    path, images = first.transform.to_fixed, (stripped.t1, first.template.brain)
    tried = []

    def run(_fixed, _moving, wanted, _seed, _folder):
        tried.append(wanted)
        if wanted != settings("affine") or name == "affine":
            raise error("no luck")
        return path, path

    monkeypatch.setattr("cadiff_cli.stages.register._run", run)
    if error is MemoryError or name == "affine":
        with pytest.raises(MemoryError if error is MemoryError else DataError, match="no luck"):
            register(*images, RegisterConfig(name), tmp_path)
        assert len(tried) == 1
        return
    found = register(*images, RegisterConfig(name), tmp_path)
    assert (found.kind, len(tried)) == ("affine", 2)
    assert NoteCode.AFFINE_ONLY in codes_of(found.notes)


def test_ants_is_imported_without_what_draws_and_is_whole_for_others():
    code = (
        "import sys; from cadiff_cli.stages.register import import_ants as begin; begin();"
        "import ants;"
        "assert not {'matplotlib', 'sklearn', 'statsmodels'} & set(sys.modules);"
        "assert not hasattr(ants, '__wrapped__') and 'matplotlib' not in sys.modules;"
        "from ants.plotting import plot; assert ants.plot is plot and not hasattr(ants, 'plod')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
