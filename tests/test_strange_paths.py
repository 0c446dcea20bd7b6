"""ANTs builds ``[A,B]`` of paths and looks for its files by patterns: any folder must do."""

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest

from cadiff_cli.config import RegisterConfig
from cadiff_cli.errors import OutputError
from cadiff_cli.io.bids.layout import Derivatives
from cadiff_cli.stages import register as module
from cadiff_cli.stages.register import joint_vote, plainly, register, rigid, warp

NAMES = (
    "1234[5].server",
    "a, b",
    'it\'s "quoted"',
    "größe 脳 🧠",
    "100% *?{x}",
    "new\nline",
    "-t",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_has_a_plain_name(tmp_path, name):
    """What is written there arrives, and the name is gone afterwards."""
    folder = tmp_path / name
    folder.mkdir()
    with plainly(folder) as plain:
        assert re.fullmatch(r"[\w./@+-]+", str(plain), re.ASCII)
        (plain / "x").write_text("here")
    assert (folder / "x").read_text() == "here"
    assert plain == folder or not plain.parent.exists()


def test_a_plain_folder_is_used_as_it_is(tmp_path):
    with plainly(tmp_path) as plain:
        assert plain == tmp_path


def test_where_no_link_can_be_made_it_is_said(tmp_path, monkeypatch):
    folder = tmp_path / "1234[5]"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(module, "PLAIN_PLACES", ("/nonexistent",))
    with pytest.raises(OutputError, match="set TMPDIR") as caught, plainly(folder):
        pass
    assert "1234[5]" in str(caught.value)


def test_a_template_is_registered_in_any_folder(phantom, stripped_of, toy_template, tmp_path):
    """With the same result, which resamples images from there."""
    stripped = stripped_of(phantom("RAS", 3.0, scale=0.4))
    template, affine = toy_template(scale=0.4, shift_mm=(2, -1, 1)), RegisterConfig("affine")
    plain, *strange = (
        register(stripped.t1, template.brain, affine, tmp_path / name)
        for name in ("plain", NAMES[0], NAMES[4])
    )
    for transform in strange:
        assert transform.to_fixed.parent.parent == tmp_path
        assert transform.score == plain.score
        for back, volume in ((False, template.brain), (True, stripped.t1)):
            a, b = (warp(volume, x, stripped.t1.grid, inverse=back) for x in (plain, transform))
            np.testing.assert_array_equal(a.data, b.data)
            assert a.data.any()


@pytest.fixture
def in_an_array_job(tmp_path, monkeypatch):
    """The temporary folder is one of a batch system's array."""
    folder = tmp_path / "1234[5].server, problem"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_two_scans_are_aligned_in_an_array_job(phantom, in_an_array_job):
    first = phantom("RAS", 3.0, scale=0.4).t1
    motion = rigid(first, first)
    np.testing.assert_allclose(motion, np.eye(4), atol=0.05)
    assert not any(in_an_array_job.iterdir())


def test_atlases_vote_in_an_array_job(in_an_array_job):
    truth = np.zeros((24, 24, 24), dtype=np.uint8)
    truth[6:18, 6:18, 6:18], truth[9:15, 9:15, 9:15] = 1, 2
    noise = np.random.default_rng(0).normal(0, 0.02, truth.shape)
    image = (0.2 + 0.3 * truth + noise).astype(np.float32)
    voted = joint_vote(
        image,
        np.ones(truth.shape, dtype=bool),
        [image, image],
        [truth, truth],
        radius=1,
        search=1,
        beta=2.0,
    )
    np.testing.assert_array_equal(voted[4:-4, 4:-4, 4:-4], truth[4:-4, 4:-4, 4:-4])
    assert not any(Path(in_an_array_job).iterdir())


def test_patterns_find_only_their_own_files(tmp_path):
    """A scan's name may hold glob's own signs: it is found, and no other for it."""
    strange, plain = (
        Derivatives(tmp_path, Path(f"sub-01_{key}-1_T1w.nii.gz")) for key in ("[a]", "a")
    )
    strange.folder.mkdir(parents=True)
    for place in (strange, plain):
        place.path("desc-brain_mask.nii.gz").touch()
    assert strange.existing() == [strange.path("desc-brain_mask.nii.gz")]
    strange.clear()
    assert plain.existing() == [plain.path("desc-brain_mask.nii.gz")]


def test_only_files_that_a_run_writes_are_ever_removed(tmp_path):
    """Not what people or other programs keep beside them, under names alike."""
    place = Derivatives(tmp_path, Path("sub-01_T1w.nii.gz"))
    place.folder.mkdir(parents=True)
    ours = {
        *("desc-preproc_T1w.nii.gz", "desc-icv_mask.json", "dseg.nii.gz", "label-GM_probseg.json"),
        *("seg-cadiff_desc-structures_dseg.json", "seg-nmm138_desc-structures_dseg.nii.gz"),
        *("seg-cadiff_desc-freesurfer_dseg.nii.gz", "seg-cadiff_probseg.nii.gz"),
        *("seg-cadiff_desc-uncertainty_probseg.nii.gz", "desc-totals_morph.tsv"),
        *("from-T1w_to-MNIInfant+2_mode-image_xfm.h5", "from-MNIColin27_to-T1w_mode-image_xfm.h5"),
        "space-MNIInfant_cohort-2_seg-cadiff_res-1_desc-structures_dseg.nii.gz",
        *("space-MNIColin27_res-2_desc-brain_mask.nii.gz", "space-MNIColin27_desc-brain_T1w.json"),
        *("seg-cadiff_dseg.nii.gz", "space-MNIColin27_desc-preproc_T1w.nii.gz"),  # revision 8
    }
    theirs = {
        *("seg-cadiff_desc-edited_dseg.nii.gz", "label-lesion_probseg.nii.gz", "desc-brain_mask"),
        *("from-T1w_to-fsnative_mode-image_xfm.txt", "from-a_to-b_mode-image_xfm.h5"),
        *("seg-cadiff_desc-jlf_dseg.nii.gz", "seg-cadiff_desc-structures_dseg.nii.gz.bak"),
        *("seg-DKT+aseg_dseg.nii.gz", "seg-a+b_desc-structures_dseg.json"),
        *("seg-aparc_dseg.nii.gz", "space-MNIColin27_seg-cadiff_desc-edited_dseg.nii.gz"),
    }
    begun = {".sub-01_desc-brain_mask.nii.gz.a1b2c3d_.nii.gz"}
    for name in ours | theirs:
        place.path(name).touch()
    foreign = {".sub-01_dseg.nii.gz", ".sub-01_dseg.nii.gz.swp"}
    for name in begun | foreign:
        (place.folder / name).touch()
    assert {path.name.removeprefix("sub-01_") for path in place.existing()} == ours
    kept = place.path("desc-icv_mask.json")
    place.clear(keep=[kept])
    assert {path.name.removeprefix("sub-01_") for path in place.folder.iterdir()} == {
        *theirs,
        *foreign,
        "desc-icv_mask.json",
    }
