"""Overlap with closed-form answers, and the scoring of files."""

import csv

import numpy as np
import pytest

from cadiff_cli.errors import DataError, MissingInputError
from cadiff_cli.evaluation import mean_over, pair_up, score_pair, write_scores
from cadiff_cli.io.nifti import save_volume
from cadiff_cli.metrics.overlap import dice, surface_dice
from cadiff_cli.spatial.grid import Grid

# MONAI warns of its own call of its own function.
pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")

EDGE = 12


def cube(shift=0, label=1, size=40):
    """A cube of ``EDGE`` voxels, ``shift`` voxels along x."""
    data = np.zeros((size, size, size), dtype=np.uint8)
    data[8 + shift : 8 + shift + EDGE, 10 : 10 + EDGE, 12 : 12 + EDGE] = label
    return data


@pytest.mark.parametrize("shift", [0, 1, 5, EDGE, 16])
def test_dice_of_shifted_cubes(shift):
    assert dice(cube(shift), cube(), [1])[0] == pytest.approx(max(0, 1 - shift / EDGE))


def test_dice_is_symmetric_and_per_class():
    a, b = cube(3) + cube(16, 2), cube() + cube(16, 2)
    np.testing.assert_allclose(dice(a, b, [1, 2, 3]), [0.75, 1, np.nan])
    np.testing.assert_allclose(dice(b, a, [2, 1]), [1, 0.75])


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.5)])
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


def test_surface_dice_ignores_what_is_far_away():
    """Cropping to the structure must not change its score, also at the border."""
    wide = surface_dice(cube(2, size=80), cube(size=80), [1], (1, 1, 1))
    np.testing.assert_allclose(surface_dice(cube(2), cube(), [1], (1, 1, 1)), wide)


@pytest.mark.parametrize(
    "measure", [dice, lambda p, r, k: surface_dice(p, r, k, (1.0, 1.0, 1.0))], ids=["dice", "nsd"]
)
def test_missing_structures(measure):
    """On one side 0, whichever side it is; on both sides not a number."""
    assert measure(cube(), 0 * cube(), [1])[0] == 0
    assert measure(0 * cube(), cube(), [1])[0] == 0
    assert np.isnan(measure(0 * cube(), 0 * cube(), [1])[0])
    assert measure(cube(), cube(), [1])[0] == pytest.approx(1)


@pytest.fixture
def write(tmp_path):
    def make(name, data, spacing=1.0):
        path = tmp_path / name
        save_volume(path, data.astype(np.int16), Grid(data.shape, np.diag([spacing] * 3 + [1])))
        return path

    return make


def test_files_are_scored_in_their_own_codes(write, table):
    """Neuromorphometrics 60 and 59 are the thalami, aseg 10 and 49."""
    ours = write("sub-1_seg-cadiff_dseg.nii.gz", cube(3, 10) + cube(16, 49), spacing=2.0)
    theirs = write("sub-1_dseg.nii.gz", cube(0, 60) + cube(16, 59), spacing=2.0)
    mapping = table.neuromorphometrics_mapping()
    scores = {s.structure: s for s in score_pair(ours, theirs, table, "malc27", mapping)}
    assert len(scores) == 27
    assert scores["Left-Thalamus"].dice == pytest.approx(0.75)
    assert scores["Left-Thalamus"].scan == "sub-1"
    assert scores["Right-Thalamus"].dice == scores["Right-Thalamus"].nsd == 1
    assert scores["Right-Thalamus"].volume_mm3 == pytest.approx(EDGE**3 * 8)
    assert np.isnan(scores["Left-Putamen"].dice)


def test_means_leave_out_what_is_absent(write, table, tmp_path):
    ours = write("sub-1_seg-cadiff_dseg.nii.gz", cube(3, 10) + cube(16, 49))
    scores = score_pair(ours, ours, table, "all", table.identity_mapping())
    assert mean_over(scores, "scan", "dice") == {"sub-1_seg-cadiff": 1}
    write_scores(tmp_path / "scores.tsv", scores)
    with (tmp_path / "scores.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert len(rows) == 40
    assert {row["dice"] for row in rows} == {"1.0000", "n/a"}


def test_other_grids_and_codes_are_refused(write, table):
    mapping = table.identity_mapping()
    a, b = write("a_dseg.nii.gz", cube(0, 10)), write("b_dseg.nii.gz", cube(0, 10), spacing=2.0)
    with pytest.raises(DataError, match="lies on"):
        score_pair(a, b, table, "all", mapping)
    with pytest.raises(DataError, match="lies on"):
        score_pair(a, write("c_dseg.nii.gz", cube(0, 10)[:-1]), table, "all", mapping)
    with pytest.raises(DataError, match="1999"):
        score_pair(write("d_dseg.nii.gz", np.full((8, 8, 8), 1999)), a, table, "all", mapping)


def test_folders_are_paired_by_entities(tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for path in (
        mine / "sub-1" / "anat" / "sub-1_ses-2_seg-cadiff_dseg.nii.gz",
        mine / "sub-2" / "anat" / "sub-2_seg-cadiff_dseg.nii.gz",
        mine / "sub-1" / "anat" / "sub-1_ses-2_seg-cadiff_dseg.json",
        theirs / "sub-1" / "sub-1_ses-2_dseg.nii.gz",
        theirs / "sub-3" / "sub-3_dseg.nii.gz",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    ((p, r),) = pair_up(mine, theirs)
    assert p.name == "sub-1_ses-2_seg-cadiff_dseg.nii.gz"
    assert r.name == "sub-1_ses-2_dseg.nii.gz"
    assert pair_up(p, r) == [(p, r)]
    for wrong in ((mine, r), (mine, tmp_path / "gone"), (mine / "sub-2", theirs / "sub-3")):
        with pytest.raises(MissingInputError) as caught:
            pair_up(*wrong)
        assert caught.value.remedy
