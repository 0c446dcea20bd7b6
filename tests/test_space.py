"""Results in a template's space."""

from dataclasses import replace

import numpy as np
import pytest

from cadiff_cli.config import Config
from cadiff_cli.errors import UsageError
from cadiff_cli.io.templates import parse_space
from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.products import Prepared, Registered, Result, Segmentation, Transform
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.stages.space import standard_grid, to_space

OWN, POOR = (Note(NoteCode.POOR_SCORE, text) for text in ("own", "poor"))


@pytest.fixture
def result_of(scan_of, stripped_of, conditions_of, parcellation, tiny_model):
    """What a perfect run on a phantom gives, with a registration of our own."""

    def make(head, registered):
        scan = scan_of(head)
        prepared = Prepared(
            scan, stripped_of(head), (registered,), conditions_of(head), (registered.template,)
        )
        mask = Volume(head.codes > 0, head.t1.grid)
        labels = Segmentation(Volume(head.codes, head.t1.grid), parcellation, 1, 0)
        return Result(prepared, mask, labels, {}, tiny_model.info, Config())

    return make


def test_under_the_identity_a_result_is_the_head_seen_on_the_templates_grid(
    phantom, toy_template, identity, result_of, tmp_path, orientation
):
    """In any orientation; one voxel of tolerance at the borders of structures."""
    template = toy_template(spacing=3.0)
    head = phantom(orientation, 2.0, noise=0.0)
    carried = to_space(result_of(head, identity(template)), template, "", tmp_path)
    expected = phantom("RAS", 3.0, noise=0.0)
    assert carried.labels.grid.shape == expected.codes.shape
    assert (carried.labels.data == expected.codes).mean() > 0.98
    assert (carried.mask.data == (expected.codes > 0)).mean() > 0.98
    centres = [np.argwhere(m).mean(axis=0) for m in (carried.mask.data, expected.codes > 0)]
    np.testing.assert_allclose(*centres, atol=0.05)  # voxels of 3 mm
    inside = carried.mask.data & (expected.codes > 0)
    assert np.corrcoef(carried.t1.data[inside], expected.t1.data[inside])[0, 1] > 0.9
    assert not carried.labels.data[~carried.mask.data].any()


def test_a_shift_is_undone(phantom, toy_template, result_of, tmp_path):
    """The registration's inverse is used, not the registration: a wrong one would double it."""
    import ants

    template = toy_template(spacing=4.0)
    head = phantom("RAS", 2.0, shift_mm=(10, 0, 0), noise=0.0)
    paths = {}
    # ITK maps points of the output to the input, in LPS: the scan lies 10 mm to the right.
    for name, x in (("from", 10.0), ("to", -10.0)):
        transform = ants.new_ants_transform(transform_type="AffineTransform", dimension=3)
        transform.set_parameters([1, 0, 0, 0, 1, 0, 0, 0, 1, x, 0, 0])
        paths[name] = tmp_path / f"{name}.mat"
        ants.write_transform(transform, str(paths[name]))
    registered = Registered(template, Transform(paths["from"], paths["to"], "affine", 2.0))
    carried = to_space(result_of(head, registered), template, "", tmp_path)
    expected = phantom("RAS", 4.0, noise=0.0).codes
    assert (carried.labels.data == expected).mean() > 0.97
    assert (np.roll(carried.labels.data, 5, axis=0) == expected).mean() < 0.9


def test_resolutions():
    """1 and 2 are MNI152NLin2009cAsym's, from its template_description.json; 3 goes on alike."""
    affine = np.eye(4)
    affine[:3, 3] = (-96, -132, -78)
    one = Grid((193, 229, 193), affine)
    for factor, shape, origin in (
        (1, (193, 229, 193), (-96, -132, -78)),
        (2, (97, 115, 97), (-96.5, -132.5, -78.5)),
        (3, (65, 77, 65), (-97, -133, -79)),
    ):
        grid = standard_grid(one, factor)
        assert grid.shape == shape
        np.testing.assert_allclose(grid.affine[:3, 3], origin)
        np.testing.assert_allclose(grid.spacing_mm, factor)


@pytest.mark.parametrize("text", ["", "Talairach", "MNIColin27:res-9", "MNIColin27:2", "../x"])
def test_unknown_spaces_are_named(text):
    with pytest.raises(UsageError, match="output space") as caught:
        parse_space(text)
    assert "MNIColin27" in caught.value.remedy


def test_a_poor_registration_to_a_space_is_said_once(
    phantom, toy_template, identity, result_of, tmp_path
):
    """Whatever its resolutions; that of the labels has been said already."""
    own = identity(toy_template(spacing=8.0))
    own = replace(own, transform=replace(own.transform, notes=(OWN,)))
    result = result_of(phantom("RAS", 8.0), own)
    carried = to_space(result, own.template, "", tmp_path)
    assert replace(result, spaces=(carried,)).notes == (OWN,)
    other = Registered(replace(own.template, name="other"), replace(own.transform, notes=(POOR,)))
    spaces = tuple(replace(carried, registered=replace(other), resolution=x) for x in "12")
    of_space = POOR.coded(NoteCode.SPACE_REGISTRATION)
    assert replace(result, spaces=(carried, *spaces)).notes == (OWN, of_space)


def test_names_say_which(toy_template, identity, result_of, phantom, tmp_path):
    template = replace(toy_template(spacing=4.0), name="MNIColin27")
    result = result_of(phantom("RAS", 4.0), identity(template))
    carried = to_space(result, template, "2", tmp_path)
    assert parse_space(carried.name) == ("MNIColin27", "2")
    assert carried.labels.grid.spacing_mm == pytest.approx(8)
