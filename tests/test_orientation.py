"""How a brain lies is seen in the image; a header that says otherwise is refused and mended."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from nibabel import load

from cadiff_cli.cli.reorient import command
from cadiff_cli.config import Config
from cadiff_cli.errors import DataError, OutputError
from cadiff_cli.io import templates
from cadiff_cli.io.images import given_mask, load_scan
from cadiff_cli.pipeline import prepare
from cadiff_cli.products import Scan
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.stages.orientation import (
    Orientation,
    orientation,
    reoriented,
    rotations,
    verified,
)

QUARTER_ABOUT_X = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])


def with_cerebellum(t1):
    """The phantom is nearly the same upside down; below and behind it hangs what tells."""
    x, y, z = np.moveaxis(t1.grid.to_world(np.moveaxis(np.indices(t1.grid.shape), 0, -1)), -1, 0)
    inside = (x / 45) ** 2 + ((y + 60) / 28) ** 2 + ((z + 45) / 25) ** 2 < 1
    return Volume(np.where((t1.data == 0) & inside, 70, t1.data).astype(np.float32), t1.grid)


@pytest.fixture(scope="module")
def brain(phantom):
    return with_cerebellum(phantom("RAS", 2.0).t1)


@pytest.fixture(scope="module")
def atlas(toy_template):
    template = toy_template(spacing=2.0)
    return replace(template, brain=with_cerebellum(template.brain))


def turned(volume, rotation):
    """The same voxels under a header that says they lie otherwise."""
    return Volume(volume.data, reoriented(volume.grid, rotation))


def test_every_rotation_maps_axes_to_axes_and_keeps_handedness():
    found = np.array(rotations())
    assert len({r.tobytes() for r in found + 0.0}) == 24
    assert (found[0] == np.eye(3)).all()
    assert np.allclose(np.linalg.det(found), 1)
    assert np.allclose(abs(found).sum(axis=1), 1)


def test_reorienting_keeps_the_centre_and_is_undone_by_the_inverse(grid_of):
    grid = grid_of("oblique")
    middle = (np.array(grid.shape) - 1) / 2
    there = reoriented(grid, QUARTER_ABOUT_X)
    assert np.allclose(there.to_world(middle), grid.to_world(middle))
    assert np.allclose(reoriented(there, QUARTER_ABOUT_X.T).affine, grid.affine)


def test_an_upright_brain_is_upright_in_any_order_of_its_axes(phantom, atlas, orientation_of_axes):
    lies = orientation(with_cerebellum(phantom(orientation_of_axes, 2.0).t1), atlas.brain)
    assert lies.is_upright
    assert lies.is_clear


@pytest.fixture(params=["RAS", "LPS", "oblique"])
def orientation_of_axes(request):
    return request.param


@pytest.mark.parametrize("index", [1, 5, 9, 13, 17, 21, 23])
def test_the_rotation_found_undoes_that_of_the_header(brain, atlas, index):
    wrong = rotations()[index]
    lies = orientation(turned(brain, wrong), atlas.brain)
    assert np.allclose(lies.rotation @ wrong, np.eye(3))
    assert lies.is_clear


def test_a_small_brain_is_told_as_well(brain, atlas):
    grid = Grid(brain.grid.shape, np.diag([0.5, 0.5, 0.5, 1]) @ brain.grid.affine)
    small = Volume(brain.data, grid)
    assert orientation(small, atlas.brain).is_upright
    assert not orientation(turned(small, QUARTER_ABOUT_X), atlas.brain).is_upright


def test_a_turned_scan_is_refused_with_how_it_is_turned(brain, atlas, tmp_path):
    scan = Scan(turned(brain, QUARTER_ABOUT_X), tmp_path / "sub-01_T1w.nii.gz")
    with pytest.raises(DataError, match=r"turned by 90 degrees about x") as caught:
        prepare(scan, [atlas], Config(), tmp_path)
    assert f"header says {scan.t1.grid.axes}, its image looks like RAS" in caught.value.message
    assert "cadiff reorient sub-01_T1w.nii.gz" in caught.value.remedy


def test_half_a_brain_is_doubted_not_refused(brain, atlas, stripped_of, phantom, monkeypatch):
    """Its shape fits other rotations better; nothing says that its header is wrong."""
    lies = Orientation(QUARTER_ABOUT_X, 1.3, 1.1, 1.1)
    monkeypatch.setattr("cadiff_cli.stages.orientation.orientation", lambda *_: lies)
    whole = stripped_of(phantom("RAS", 2.0))
    half = whole.mask.data & (np.arange(whole.mask.data.shape[0]) < 80)[:, None, None]
    scan = Scan(brain, Path("sub-01_T1w.nii.gz"))
    checked = verified(scan, replace(whole, mask=Volume(half, whole.mask.grid)), atlas)
    assert "cannot tell" in checked.notes[-1].text
    with pytest.raises(DataError):
        verified(scan, whole, atlas)


@pytest.mark.parametrize(("score", "upright"), [(1.20, 1.19), (1.20, 1.20)])
def test_where_rotations_fit_alike_the_scan_is_doubted_not_refused(
    brain, atlas, stripped_of, phantom, monkeypatch, score, upright
):
    lies = Orientation(np.eye(3) if score == upright else QUARTER_ABOUT_X, score, upright, 1.196)
    monkeypatch.setattr("cadiff_cli.stages.orientation.orientation", lambda *_: lies)
    stripped = stripped_of(phantom("RAS", 2.0))
    checked = verified(Scan(brain, Path("sub-01_T1w.nii.gz")), stripped, atlas)
    assert "cannot tell" in checked.notes[-1].text


def test_reorient_mends_the_header_and_nothing_else(
    brain, atlas, write_image, tmp_path, monkeypatch
):
    """The embedded template is a real brain; the phantom's stands in for it."""
    monkeypatch.setattr(templates, "load_template", lambda name: atlas)
    wrong = turned(brain, QUARTER_ABOUT_X)
    path = write_image(brain.data, wrong.grid.affine)
    inside = (brain.data > 0).astype(np.uint8)
    mask = write_image(inside, wrong.grid.affine, "wrong_mask.nii.gz")
    out = tmp_path / "mended.nii.gz"

    def reorient(*arguments):
        return CliRunner().invoke(command, [*map(str, arguments)], catch_exceptions=False)

    done = reorient(path, "-o", out, "--mask", mask)
    assert done.exit_code == 0
    assert "left and right cannot be seen" in done.stderr
    mended = load(out)
    assert np.array_equal(np.asarray(mended.dataobj), brain.data)
    assert np.allclose(mended.affine, brain.grid.affine, atol=1e-3)
    # The mask is turned with it, so that the mended scan can be segmented with it.
    turned_mask = tmp_path / "mended_mask.nii.gz"
    assert done.stdout.splitlines() == [str(out), str(turned_mask)]
    assert np.array_equal(given_mask(turned_mask, load_scan(out)).data, inside > 0)
    # Neither of both is ever written over.
    for given in (out, turned_mask):
        before = given.read_bytes()
        with pytest.raises(OutputError, match="is an input"):
            reorient(out, "-o", given, "--mask", turned_mask, "--overwrite")
        assert given.read_bytes() == before
    with pytest.raises(OutputError, match="is there already"):
        reorient(path, "-o", out)
    again = tmp_path / "again.nii.gz"
    done = reorient(out, "-o", again, "--mask", write_image(inside, brain.grid.affine, "m.nii.gz"))
    assert "lies as its header says" in done.stderr
    assert not again.exists()
