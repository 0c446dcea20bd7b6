"""Names in and names out."""

import re
from pathlib import Path

import numpy as np
import pytest

from cadiff_cli.errors import DataError, MissingInputError, OutputError
from cadiff_cli.io.bids import labelled_scans, source_entities
from cadiff_cli.io.derivatives import Derivatives
from cadiff_cli.io.nifti import save_volume
from cadiff_cli.spatial.grid import Grid

NAMES = {
    "sub-01_T1w.nii.gz": "sub-01",
    "sub-01_ses-a_run-2_T1w.nii.gz": "sub-01_ses-a_run-2",
    "sub-01_ses-a_acq-mprage_T1w.nii": "sub-01_ses-a_acq-mprage",
    "sub-01_desc-brain_T1w.nii.gz": "sub-01",
    "sub-01_space-MNI_res-2_desc-preproc_T1w.mgz": "sub-01",
    "sub-01.nii.gz": "sub-01",
    "sub-01_ses-a.nii": "sub-01_ses-a",
    "my scan (1).nii": "sub-myscan1",
    "T1.mgz": "sub-T1",
    "brain.final.v2.nii.gz": "sub-brainfinalv2",
    "Müller_T1.nii.gz": "sub-MllerT1",
    "脑.nii.gz": "sub-unnamed",
    "sub-_T1w.nii.gz": "sub-subT1w",
    "sub-a b_T1w.nii.gz": "sub-subabT1w",
    "sub-01_extra_T1w.nii.gz": "sub-sub01extraT1w",
    "----.nii": "sub-unnamed",
}


@pytest.mark.parametrize("name", NAMES)
def test_entities_of_a_name(name):
    assert source_entities(Path("/somewhere/sub-99/anat") / name) == NAMES[name]


@pytest.mark.parametrize("name", NAMES)
def test_entities_are_safe_and_settle(name):
    """Whatever the input is called, output names are valid BIDS and stay what they are."""
    entities = source_entities(Path(name))
    assert re.fullmatch(r"sub-[A-Za-z0-9+]+(_[a-z]+-[A-Za-z0-9+]+)*", entities)
    assert source_entities(Path(f"{entities}_T1w.nii.gz")) == entities


def test_results_lie_in_subject_and_session_folders(tmp_path):
    place = Derivatives(tmp_path, Path("sub-01_ses-a_run-2_T1w.nii.gz"))
    assert place.folder == tmp_path / "sub-01" / "ses-a" / "anat"
    path = place.path("desc-brain_mask.nii.gz")
    assert path.name == "sub-01_ses-a_run-2_desc-brain_mask.nii.gz"
    assert Derivatives(tmp_path, Path("x.nii")).folder == tmp_path / "sub-x" / "anat"


def test_claim_makes_room_and_leaves_no_trace(tmp_path):
    place = Derivatives(tmp_path / "new" / "out", Path("sub-01_T1w.nii"))
    place.claim(overwrite=False)
    assert list(place.folder.iterdir()) == []


def test_claim_refuses_to_lose_results(tmp_path):
    place = Derivatives(tmp_path, Path("sub-01_T1w.nii"))
    place.claim(overwrite=False)
    place.path("seg-cadiff_dseg.nii.gz").write_text("precious")
    with pytest.raises(OutputError) as caught:
        place.claim(overwrite=False)
    assert "--overwrite" in caught.value.remedy
    assert place.path("seg-cadiff_dseg.nii.gz").read_text() == "precious"
    place.claim(overwrite=True)


@pytest.mark.parametrize("name", ["desc-preproc_T1w.nii.gz", "desc-brain_mask.nii.gz"])
def test_no_run_overwrites_its_input(tmp_path, name):
    """Segmenting a derivative into its own dataset, or with its own mask."""
    place = Derivatives(tmp_path, Path("sub-01_desc-preproc_T1w.nii.gz"))
    place.claim(overwrite=False)
    source = place.path(name)
    source.write_text("precious")
    with pytest.raises(OutputError, match="is an input"):
        place.claim(None, source, overwrite=True)
    assert source.read_text() == "precious"


def test_clear_removes_our_results_only(tmp_path):
    place = Derivatives(tmp_path, Path("sub-01_T1w.nii"))
    place.claim(overwrite=False)
    ours = [place.path("seg-cadiff_dseg.json"), place.path("from-X_to-T1w_mode-image_xfm.h5")]
    others = [place.path("seg-other_dseg.json"), place.folder / "sub-01_run-2_seg-cadiff_dseg.json"]
    for path in (*ours, *others):
        path.write_text("")
    place.clear()
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in others)


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_claim_refuses_a_file_in_the_way(tmp_path, below):
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        Derivatives(tmp_path / "out" / below, Path("x.nii")).claim(overwrite=True)


@pytest.fixture
def dataset(tmp_path):
    """Touch the images of a dataset; their contents do not matter here."""

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            save_volume(path, np.ones((2, 2, 2), np.uint8), Grid((2, 2, 2), np.eye(4)))
        return tmp_path

    return make


def test_scans_are_paired_by_subject_session_and_run(dataset):
    found = labelled_scans(
        dataset(
            "sub-1/ses-1/anat/sub-1_ses-1_T1w.nii.gz",
            "sub-1/ses-2/anat/sub-1_ses-2_T1w.nii.gz",
            "sub-1/ses-1/anat/sub-1_ses-1_desc-manual_dseg.nii.gz",
            "sub-1/ses-2/anat/sub-1_ses-2_dseg.nii.gz",
            "sub-2/anat/sub-2_T1w.nii.gz",
        )
    )
    assert [(s.name, s.subject) for s in found] == [("sub-1_ses-1", "1"), ("sub-1_ses-2", "1")]
    assert [s.dseg.name for s in found] == [
        "sub-1_ses-1_desc-manual_dseg.nii.gz",
        "sub-1_ses-2_dseg.nii.gz",
    ]


def test_a_dataset_without_pairs_is_an_error(dataset, tmp_path):
    with pytest.raises(DataError, match="1 T1w and 0 dseg"):
        labelled_scans(dataset("sub-1/anat/sub-1_T1w.nii.gz"))
    with pytest.raises(MissingInputError):
        labelled_scans(tmp_path / "gone")
