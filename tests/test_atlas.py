"""Conditional atlases: from a velocity that obeys a law to a folder that serves as a template."""

import base64
import hashlib
import io
import json
import re
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from atlas_model import CENTRES_MM, SHIFT_MM, Growing, make_base, velocity_at
from PIL import Image
from scipy import ndimage

from cadiff_cli.atlas import atlas_name, cause, deform, make_atlas, sample_volumes, warped
from cadiff_cli.cli.atlas_make import parse_ages
from cadiff_cli.errors import DataError, OutputError, UsageError
from cadiff_cli.io.images import save_volume
from cadiff_cli.io.templates import load_template, load_templates, own_contents
from cadiff_cli.products import Condition
from cadiff_cli.runner.atlases import make_atlases
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.stages.field import template_coordinates

OLD = Condition(85, "F")
ABOUT = {"Frame": {"OriginMm": [12, -9, 7], "LowMm": [-36, -48, -32], "HighMm": [36, 36, 40]}}


def write_base(folder, base):
    folder.mkdir(parents=True)
    save_volume(folder / "tpl-toybase_T1w.nii.gz", base.brain.data, base.brain.grid)
    (folder / "template_description.json").write_text(json.dumps(ABOUT))


@pytest.fixture(scope="module")
def model(phantom, toy_template, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tpl-toybase"
    return make_base(phantom, toy_template, folder, write_base)[1]


@pytest.fixture(scope="module")
def base(model):
    return load_template(model.base)


@pytest.fixture(scope="module")
def atlas(model, base):
    return make_atlas(model, base, OLD)


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """A single atlas with samples, and a range: (folder, paths of the first, of the others)."""
    out = tmp_path_factory.mktemp("made") / "templates"
    one = list(make_atlases(model, [OLD], out, samples=3))
    ages = [Condition(age_years=age) for age in (25, 55, 85)]
    return out, one, list(make_atlases(model, ages, out))


def flow(points, condition, steps=200):
    """Where the velocity takes points in unit time, by Runge-Kutta: another way than squaring."""
    h = 1 / steps
    for _ in range(steps):
        a = velocity_at(points, condition)
        b = velocity_at(points + h / 2 * a, condition)
        c = velocity_at(points + h / 2 * b, condition)
        d = velocity_at(points + h * c, condition)
        points = points + h / 6 * (a + 2 * b + 2 * c + d)
    return points


def nodes(field, grid, points):
    """Displacements (n, 3) of a field at the voxels nearest to points, and these voxels' points."""
    voxels = np.rint(np.linalg.solve(grid.affine, np.c_[points, np.ones(len(points))].T))[:3]
    i, j, k = voxels.astype(int)
    return field[:, i, j, k].T, grid.to_world(voxels.T)


def test_points_go_where_the_velocity_takes_them(atlas):
    grid, deformation = atlas.deformation.grid, atlas.deformation
    around = CENTRES_MM[0] + np.random.default_rng(0).uniform(-6, 6, (40, 3))
    moved, start = nodes(deformation.forward_mm, grid, around)
    arrived = flow(start, OLD)
    assert abs(arrived - start).max() > 0.8
    np.testing.assert_allclose(start + moved, arrived, atol=0.1)
    back, end = nodes(deformation.backward_mm, grid, around)
    np.testing.assert_allclose(flow(end + back, OLD), end, atol=0.12)


def test_the_ac_moves_with_the_anatomy(atlas, base):
    expected = flow(SHIFT_MM[None], OLD)[0]
    assert np.linalg.norm(expected - SHIFT_MM) > 0.5
    np.testing.assert_allclose(atlas.template.frame.ac_mm, expected, atol=0.05)


def coordinates_at(template, points):
    """(n, 3): the field at points (n, 3) of the template's world."""
    return np.stack(
        [
            ndimage.map_coordinates(
                each.data, np.linalg.inv(each.grid.affine)[:3] @ np.c_[points, one].T, order=1
            )
            for each in template_coordinates(template)
            for one in [np.ones(len(points))]
        ],
        axis=-1,
    )


def test_anatomy_has_the_coordinates_that_it_has_in_the_base(atlas, base):
    """Where the ventricles are larger, too; far outside the brain coordinates go on."""
    rng = np.random.default_rng(0)
    points = CENTRES_MM[0] + rng.uniform(-8, 8, (60, 3))
    there = flow(points, OLD)
    wanted = coordinates_at(base, points)
    np.testing.assert_allclose(coordinates_at(atlas.template, there), wanted, atol=0.003)
    own = coordinates_at(replace(atlas.template, from_base=None), there)
    assert abs(own - wanted).max() > 0.01
    corner = atlas.deformation.grid.to_world(np.array([-8.0, -8, -8]))[None]
    assert (coordinates_at(atlas.template, corner) < 0.2).all()


def test_a_folder_keeps_the_coordinates_of_the_base(made, atlas, base, tmp_path):
    folder = made[1][0]
    read = load_template(str(folder))
    for ours, theirs in zip(
        template_coordinates(read), template_coordinates(atlas.template), strict=True
    ):
        np.testing.assert_allclose(ours.data, theirs.data, atol=1e-5)
    assert read.from_base.frame == base.frame
    assert read.sha256 == json.loads((folder / "template_description.json").read_text())["SHA256"]
    copy = tmp_path / "tpl-growinglaw" / folder.name
    shutil.copytree(folder, copy)
    transforms_of(copy)[0].unlink()
    with pytest.raises(DataError, match="from-toybase") as caught:
        load_template(str(copy))
    assert "whole folder" in caught.value.remedy


def test_a_frame_grows_with_the_brain_and_follows_a_shift(base, model):
    grid = model.grid
    world = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    labelled = replace(base, labels=model.labels)
    bigger = warped(labelled, np.moveaxis(0.1 * (world - SHIFT_MM), -1, 0), grid, "big")
    np.testing.assert_allclose(bigger.frame.ac_mm, SHIFT_MM, atol=0.02)
    np.testing.assert_allclose(bigger.frame.high_mm, np.exp(0.1) * np.array([36, 36, 40]), atol=0.3)
    assert bigger.frame.low_mm[0] == -bigger.frame.high_mm[0]
    shift = np.broadcast_to(np.reshape([2.0, -4, 6], (3, 1, 1, 1)), (3, *grid.shape))
    moved = warped(labelled, shift, grid, "moved")
    np.testing.assert_allclose(moved.frame.ac_mm, SHIFT_MM + np.array([2, -4, 6]), atol=0.01)
    np.testing.assert_allclose(moved.frame.high_mm, [36, 36, 40], atol=0.05)
    # What lies at p in the base lies at p + shift in the atlas: +2 voxels in x, and so on.
    inner = (slice(8, -8),) * 3
    there = np.roll(base.brain.data, (2, -4, 6), axis=(0, 1, 2))
    np.testing.assert_allclose(moved.brain.data[inner], there[inner], atol=0.02)
    np.testing.assert_array_equal(
        moved.labels.data[inner], np.roll(model.labels.data, (2, -4, 6), axis=(0, 1, 2))[inner]
    )


def test_no_deformation_changes_nothing(base, model):
    nothing = np.zeros((3, *model.grid.shape), np.float32)
    same = warped(replace(base, labels=model.labels), nothing, model.grid, "same")
    np.testing.assert_allclose(same.brain.data, base.brain.data, atol=0.01)
    np.testing.assert_array_equal(same.labels.data, model.labels.data * base.mask.data)
    np.testing.assert_array_equal(same.mask.data, base.mask.data)
    assert same.frame == base.frame


def test_intensities_are_never_made(atlas, base):
    inside = atlas.template.mask.data
    values = atlas.template.brain.data
    assert values.min() >= 0
    assert values.max() <= base.brain.data.max()
    assert not values[~inside].any()
    assert abs(values[inside].mean() - base.brain.data[base.mask.data].mean()) < 2


def test_the_jacobian_is_that_of_the_law(atlas):
    """Determinants of the flow by differences, at places of the base that reach the atlas there."""
    start = CENTRES_MM[0] + np.array([[0, 0, 0], [1, 4, 0], [-2, 0, 2], [8, 0, 3]])
    larger = atlas.log_jacobian
    found, there = nodes(larger.data[None], larger.grid, flow(start, OLD))
    origin = flow(there, replace(OLD, age_years=5))  # the rate of age 5 is the opposite of 85's
    h = 0.05
    slopes = [(flow(origin + h * e, OLD) - flow(origin - h * e, OLD)) / (2 * h) for e in np.eye(3)]
    expected = np.log(np.linalg.det(np.stack(slopes, axis=-1)))
    assert expected[0] > 0.4
    np.testing.assert_allclose(found[:, 0], expected, atol=0.06)


def test_volumes_of_labels_follow_the_jacobian(atlas, model):
    voxel = model.labels.grid.voxel_volume_mm3
    for code, wanted in atlas.volumes_mm3.items():
        counted = np.count_nonzero(atlas.template.labels.data == code) * voxel
        assert atlas.base_volumes_mm3[code] == np.count_nonzero(model.labels.data == code) * voxel
        assert abs(counted - wanted) < 0.03 * wanted + 40, code
    for ventricle in (4, 43):
        assert atlas.volumes_mm3[ventricle] > 1.3 * atlas.base_volumes_mm3[ventricle]


def test_samples_differ_and_surround_the_centre(atlas, base, model):
    drawn = sample_volumes(model, base, OLD, range(6))
    values = [sample[4] for sample in drawn]
    assert len(set(values)) == 6
    assert min(values) < atlas.volumes_mm3[4] < max(values)


def test_labels_on_another_grid_are_refused(base, model):
    other = Growing(
        model.base, model.grid, Volume(np.ones((8, 8, 8), np.int16), Grid((8, 8, 8), np.eye(4)))
    )
    with pytest.raises(DataError, match="knows the labels of"):
        make_atlas(other, base, OLD)


@pytest.mark.parametrize(
    ("condition", "seed", "cohort"),
    [
        (Condition(72), None, "age72"),
        (Condition(72.5, "F"), None, "age72p5F"),
        (Condition(None, "M", 3.1), 4, "Mventricles3p1seed4"),
    ],
)
def test_names_are_those_of_templates(condition, seed, cohort):
    assert atlas_name("my_atlas.safetensors", condition, seed) == f"myatlas:cohort-{cohort}"


def test_a_cause_knows_everything_that_decides():
    others = [("b", OLD), ("a", Condition(85)), ("a", OLD, 0), ("a", OLD, 1)]
    assert len({cause("a", OLD), *(cause(*other) for other in others)}) == 5
    assert cause("a", OLD) == cause("a", Condition(85, "F"))


def test_a_run_knows_a_template_of_its_own_by_the_cause(atlas):
    assert own_contents([atlas.template]) == ((atlas.template.name, cause("ab" * 32, OLD)),)


# The folder


def test_a_template_made_is_a_template(made, atlas):
    out, paths, _ = made
    assert paths[0] == out / "tpl-growinglaw" / "cohort-age85F"
    (template,) = load_templates(str(paths[0]), offline=True)
    assert template.name == "growinglaw:cohort-age85F"
    assert template.frame == atlas.template.frame
    np.testing.assert_array_equal(template.brain.data, atlas.template.brain.data)
    np.testing.assert_array_equal(template.mask.data, atlas.template.mask.data)
    np.testing.assert_array_equal(template.labels.data, atlas.template.labels.data)
    assert template.citation.authors[0] == "Starck S"
    assert not template.notes


def test_the_description_tells_what_made_it(made, atlas):
    folder = made[1][0]
    told = json.loads((folder / "template_description.json").read_text())
    assert told["Condition"] == {"age_years": 85, "sex": "F"}
    assert told["Model"] == {"Name": "growing-law", "WeightsSHA256": "ab" * 32}
    assert told["Base"]["Name"] == "toybase"
    assert told["Frame"]["OriginMm"] == list(atlas.template.frame.ac_mm)
    assert told["SHA256"] == load_template(str(folder)).sha256
    assert "women of 85 years" in told["Description"]
    table = (folder / "tpl-growinglaw_cohort-age85F_seg-cadiff_dseg.tsv").read_text().splitlines()
    assert table[0].startswith("index\tname")


def rows_of(path):
    header, *lines = [line.split("\t") for line in path.read_text().splitlines()]
    return {row[1]: dict(zip(header, row, strict=True)) for row in lines}


def test_the_volume_table_holds_samples_and_their_spread(made, atlas):
    folder = made[1][0]
    row = rows_of(next(folder.glob("*_morph.tsv")))["Left-Lateral-Ventricle"]
    assert float(row["volume_mm3"]) == pytest.approx(atlas.volumes_mm3[4], abs=0.1)
    drawn = [float(row[f"sample_{k}_mm3"]) for k in (1, 2, 3)]
    assert float(row["samples_mean_mm3"]) == pytest.approx(np.mean(drawn), abs=0.1)
    assert float(row["samples_sd_mm3"]) == pytest.approx(np.std(drawn, ddof=1), abs=0.1)


def test_ventricles_of_a_range_grow(made):
    _, _, paths = made
    folders = paths[:-1]
    assert [folder.name for folder in folders] == ["cohort-age25", "cohort-age55", "cohort-age85"]
    rows = [
        rows_of(next(folder.glob("*_morph.tsv")))["Left-Lateral-Ventricle"] for folder in folders
    ]
    values = [float(row["volume_mm3"]) for row in rows]
    assert values == sorted(values)
    assert "samples_mean_mm3" not in rows[0]


def transforms_of(folder):
    (there,) = folder.glob("*_from-toybase_to-*_xfm.nii.gz")
    (back,) = folder.glob("*_to-toybase_mode-image_xfm.nii.gz")
    return there, back


def test_ants_reads_the_transforms(made, base, atlas):
    """ANTs makes the atlas of the base, and both ways compose to the identity."""
    import ants

    folder = made[1][0]
    there, back = map(str, transforms_of(folder))
    image = ants.image_read(f"{made[1][0]}/tpl-growinglaw_cohort-age85F_T1w.nii.gz")
    source = ants.image_read(f"{base.source}/tpl-toybase_T1w.nii.gz")
    moved = ants.apply_transforms(image, source, [there]).numpy()
    inside = atlas.template.mask.data
    error = abs(moved - image.numpy())[inside]
    unmoved = abs(source.numpy() - image.numpy())[inside]
    assert error.mean() < unmoved.mean() / 5
    points = CENTRES_MM[0] + np.random.default_rng(1).uniform(-8, 8, (50, 3))
    lps = points * (-1, -1, 1)
    import pandas

    table = pandas.DataFrame(lps, columns=["x", "y", "z"])
    # Points go the other way than images.
    forth = ants.apply_transforms_to_points(3, table, [there])[["x", "y", "z"]].to_numpy()
    round_trip = ants.apply_transforms_to_points(
        3, pandas.DataFrame(forth, columns=["x", "y", "z"]), [back]
    )[["x", "y", "z"]].to_numpy()
    assert np.linalg.norm(forth - lps, axis=1).max() > 0.8
    np.testing.assert_allclose(round_trip, lps, atol=0.05)
    np.testing.assert_allclose(flow(forth * (-1, -1, 1), OLD), points, atol=0.12)


def test_nitransforms_reads_the_transforms(made, base, atlas):
    nitransforms = pytest.importorskip("nitransforms", reason="comes with cadiff[test]")
    from nitransforms.io.itk import ITKDisplacementsField
    from nitransforms.nonlinear import DenseFieldTransform

    there, back = transforms_of(made[1][0])
    forth, home = (
        DenseFieldTransform(ITKDisplacementsField.from_filename(path)) for path in (there, back)
    )
    assert nitransforms.__version__
    points = CENTRES_MM[0] + np.random.default_rng(1).uniform(-8, 8, (50, 3))
    moved = forth.map(points)
    np.testing.assert_allclose(flow(moved, OLD), points, atol=0.15)
    np.testing.assert_allclose(home.map(moved), points, atol=0.1)


def test_the_same_atlas_is_the_same_file(made, model, tmp_path):
    again = next(make_atlases(model, [OLD], tmp_path, samples=3, report=False))
    names = sorted(path.name for path in again.iterdir())
    assert len(names) == 9
    for name in names:
        one, other = (
            hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for folder in (made[1][0], again)
        )
        assert one == other, name


def test_the_map_of_changes_lies_where_the_transform_does(made):
    folder = made[1][0]
    change = nib.load(next(folder.glob("*_desc-logjacobian_map.nii.gz")))
    field = nib.load(transforms_of(folder)[0])
    assert field.shape == (*change.shape, 1, 3)
    np.testing.assert_allclose(field.affine, change.affine)
    assert field.header.get_intent()[0] == "vector"


# The page


def test_the_page_of_one_atlas(made):
    path = made[1][1]
    assert path == made[0] / "tpl-growinglaw_cohort-age85F.html"
    text = path.read_text()
    pictures = re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", text)
    # Base; atlas with the base behind it, change and grid.
    assert len(pictures) == 6 * (1 + 2 + 1 + 1)
    for picture in pictures:
        assert min(Image.open(io.BytesIO(base64.b64decode(picture))).size) > 30
    assert "women of 85 years" in text.lower()
    assert 'type="range"' not in text
    assert text.count('class="panel"') == 1
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    # Outlines of structures, and lines of the grid in two of three colours a slice.
    assert text.count("<title>Left-Lateral-Ventricle</title>") >= 4
    assert text.count("<title>x</title>") == text.count("<title>z</title>") == 4
    assert "&plusmn;" in text


def test_the_page_of_a_range_has_a_slider_and_curves(made):
    path = made[2][-1]
    assert path == made[0] / "tpl-growinglaw_cohort-age25_to-age85.html"
    text = path.read_text()
    assert 'id="age" min="0" max="2"' in text
    assert text.count('class="panel"') == 3
    assert text.count('class="curve"') >= 2
    assert re.search(r"<title>85 years: [\d.]+ ml</title>", text)


# Errors


def test_files_that_are_there_are_never_lost(model, tmp_path):
    folder = next(make_atlases(model, [OLD], tmp_path, report=False))
    own = folder / "notes.txt"
    own.write_text("mine")
    with pytest.raises(OutputError, match="holds an atlas already"):
        next(make_atlases(model, [OLD], tmp_path, report=False))
    before = (folder / "template_description.json").read_bytes()
    next(make_atlases(model, [OLD], tmp_path, report=False, overwrite=True))
    assert own.read_text() == "mine"
    assert (folder / "template_description.json").read_bytes() == before
    foreign = tmp_path / "tpl-growinglaw" / "cohort-age60"
    foreign.mkdir()
    (foreign / "tpl-growinglaw_cohort-age60_T1w.nii.gz").write_text("mine")
    ages = [Condition(50), Condition(60)]
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="which cadiff did not write"):
            list(make_atlases(model, ages, tmp_path, report=False, overwrite=overwrite))
    # The first of the range is not made either.
    assert not (tmp_path / "tpl-growinglaw" / "cohort-age50").exists()


def test_a_run_killed_while_files_move_leaves_room(model, tmp_path, monkeypatch):
    def killed(*_):
        raise SystemExit(143)

    with monkeypatch.context() as patched:
        patched.setattr("cadiff_cli.io.atlases.description", killed)
        with pytest.raises(SystemExit):
            next(make_atlases(model, [OLD], tmp_path, report=False))
    (folder,) = (tmp_path / "tpl-growinglaw").glob("cohort-*")
    assert (folder / "tpl-growinglaw_cohort-age85F_T1w.nii.gz").is_file()
    assert next(make_atlases(model, [OLD], tmp_path, report=False)) == folder


def test_an_age_nobody_had_is_refused_before_anything_is_made(model, tmp_path):
    with pytest.raises(UsageError, match="outside 20 to 90"):
        list(make_atlases(model, [Condition(80), Condition(120)], tmp_path))
    assert not [*tmp_path.iterdir()]


def test_another_programs_page_stays(model, tmp_path):
    page = tmp_path / "tpl-growinglaw_cohort-age85F.html"
    page.write_text("mine")
    with pytest.raises(OutputError, match="another program's page"):
        list(make_atlases(model, [OLD], tmp_path))
    assert page.read_text() == "mine"


def test_a_grid_with_other_axes_is_refused(grid_of, model):
    with pytest.raises(DataError, match="axes must be R, A and S"):
        deform(grid_of("RAS"), np.zeros((3, 88, 104, 88), np.float32), grid_of("LPS"))


@pytest.mark.parametrize(
    "text", ["abc", "20-90", "20:90", "90:20:10", "20:90:0", "-5", "1:90:0.5", "20:90:200"]
)
def test_bad_ages_are_explained(text):
    with pytest.raises(UsageError, match="--age"):
        parse_ages(text)


def test_ages_of_ranges():
    assert parse_ages("72.5") == (72.5,)
    assert parse_ages("20:45:10") == (20, 30, 40)
    assert parse_ages("20:21:0.1")[-1] == 21
