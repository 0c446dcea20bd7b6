"""Names in and names out."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from cadiff_cli.errors import (
    DataError,
    InvalidDatasetError,
    MissingInputError,
    OutputError,
    SelectionError,
    UsageError,
)
from cadiff_cli.io.bids.derivatives import place_from
from cadiff_cli.io.bids.description import refuse_other_source, save_dataset_files
from cadiff_cli.io.bids.index import entities_of, known_entities
from cadiff_cli.io.bids.labelled import labelled_scans
from cadiff_cli.io.bids.layout import Derivatives
from cadiff_cli.io.bids.names import source_entities
from cadiff_cli.io.bids.raw import Dataset
from cadiff_cli.io.bids.selection import Selection, entity_labels, read_filters, select
from cadiff_cli.io.images import save_volume
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
    "sub-01_ses-a_ses-b_T1w.nii.gz": "sub-sub01sesasesbT1w",
    "sub-01_space-MNIInfant_cohort-2_res-1_desc-brain_T1w.nii.gz": "sub-01",
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


def test_check_free_makes_room_and_leaves_no_trace(tmp_path):
    place = Derivatives(tmp_path / "new" / "out", Path("sub-01_T1w.nii"))
    place.check_free(overwrite=False)
    assert list(place.folder.iterdir()) == []


def test_check_free_refuses_to_lose_results(tmp_path):
    place = Derivatives(tmp_path, Path("sub-01_T1w.nii"))
    place.check_free(overwrite=False)
    place.path("seg-cadiff_dseg.nii.gz").write_text("precious")
    with pytest.raises(OutputError) as caught:
        place.check_free(overwrite=False)
    assert "--overwrite" in caught.value.remedy
    assert place.path("seg-cadiff_dseg.nii.gz").read_text() == "precious"
    place.check_free(overwrite=True)


@pytest.mark.parametrize("name", ["desc-preproc_T1w.nii.gz", "desc-brain_mask.nii.gz"])
def test_no_run_overwrites_its_input(tmp_path, name):
    """Segmenting a derivative into its own dataset, or with its own mask."""
    place = Derivatives(tmp_path, Path("sub-01_desc-preproc_T1w.nii.gz"))
    place.check_free(overwrite=False)
    source = place.path(name)
    source.write_text("precious")
    with pytest.raises(OutputError, match="is an input"):
        place.check_free(None, source, overwrite=True)
    assert source.read_text() == "precious"


def test_clear_removes_our_results_only(tmp_path):
    place = Derivatives(tmp_path, Path("sub-01_T1w.nii"))
    place.check_free(overwrite=False)
    ours = [place.path("seg-cadiff_dseg.json"), place.path("from-X_to-T1w_mode-image_xfm.h5")]
    others = [place.path("seg-other_dseg.json"), place.folder / "sub-01_run-2_seg-cadiff_dseg.json"]
    for path in (*ours, *others):
        path.write_text("")
    place.clear()
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in others)


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_check_free_refuses_a_file_in_the_way(tmp_path, below):
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        Derivatives(tmp_path / "out" / below, Path("x.nii")).check_free(overwrite=True)


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


@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_acq-x_ce-gd_rec-y_run-02_part-mag_T1w.nii",
        "sub-01/anat/sub-01_seg-cadiff_desc-structures_dseg.nii.gz",
        "sub-01/anat/notes.txt",
    ],
)
def test_entities_are_those_that_pybids_reads(tmp_path, name, derived):
    from bids.layout import parse_file_entities

    wanted = [*known_entities(derived=derived).values()]
    expected = parse_file_entities(f"/{name}", entities=wanted)
    assert entities_of(tmp_path / name, tmp_path, derived=derived) == expected


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


def test_scans_without_a_partner_are_named(tmp_path, dataset, caplog):
    """Nor does a folder above count, and run-01 is run-1."""
    here = "study/sub-9/bids"
    found = labelled_scans(
        dataset(
            f"{here}/sub-1/anat/sub-1_run-01_T1w.nii.gz",
            f"{here}/sub-1/anat/sub-1_run-1_dseg.nii.gz",
            f"{here}/sub-2/anat/sub-2_acq-a_T1w.nii.gz",
            f"{here}/sub-2/anat/sub-2_dseg.nii.gz",
            f"{here}/sub-3/anat/sub-3_T1w.nii.gz",
            f"{here}/sub-3/anat/sub-3_dseg.nii.gz",
        )
        / here
    )
    assert [s.subject for s in found] == ["1", "3"]
    said = caplog.text
    assert "sub-2_acq-a_T1w.nii.gz" in said
    assert "sub-2_dseg.nii.gz" in said
    assert "sub-3" not in said


def test_a_dataset_without_pairs_is_an_error(dataset, tmp_path):
    with pytest.raises(DataError, match="1 T1w and 0 dseg"):
        labelled_scans(dataset("sub-1/anat/sub-1_T1w.nii.gz"))
    with pytest.raises(MissingInputError):
        labelled_scans(tmp_path / "gone")


@pytest.fixture
def raw(dataset):
    """A dataset with sessions, runs, acquisitions, another modality and two odd names."""
    root = dataset(
        "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_acq-mprage_run-1_T1w.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_acq-mprage_run-2_T1w.nii",
        "sub-01/ses-b/anat/sub-01_ses-b_T2w.nii.gz",
        "sub-02/anat/sub-02_T1w.nii.gz",
        "sub-02/anat/sub-02_T1w_copy.nii.gz",
        "sub-10/func/sub-10_task-rest_bold.nii.gz",
        "derivatives/other/sub-02/anat/sub-02_desc-preproc_T1w.nii.gz",
        "sourcedata/sub-02/anat/sub-02_T1w.nii.gz",
    )
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    return Dataset(root)


def names(found):
    return [path.name.split(".")[0].removesuffix("_T1w") for path in found]


def test_other_images_that_are_called_after_a_t1w_are_none(dataset):
    """A valid name of another image is no odd name; of many odd ones a few are named."""
    root = dataset(
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_mod-T1w_defacemask.nii.gz",
        "sub-01/anat/sub-01_acq-T1wlike_T2w.nii.gz",
        *(f"sub-01/anat/sub-01_T1w_{k}.nii.gz" for k in range(8)),
    )
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    notes = select(Dataset(root)).notes
    assert [note.split()[0].rsplit("/")[-1] for note in notes[:5]] == [
        f"sub-01_T1w_{k}.nii.gz" for k in range(5)
    ]
    assert notes[5:] == ("images without a BIDS name that are ignored, not named here: 3",)


def test_an_index_of_a_dataset_that_was_moved_is_refused(dataset, tmp_path_factory):
    root = dataset("sub-01/anat/sub-01_T1w.nii.gz")
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    database = tmp_path_factory.mktemp("index")
    select(Dataset(root), Selection(), database)
    moved = root.rename(root.with_name(f"{root.name}-moved"))
    with pytest.raises(DataError, match="of a dataset that is not here now"):
        select(Dataset(moved), Selection(), database)


def test_every_t1w_is_found_once(raw):
    found = select(raw)
    assert names(found.images) == [
        *("sub-01_ses-a", "sub-01_ses-b_acq-mprage_run-1", "sub-01_ses-b_acq-mprage_run-2"),
        "sub-02",
    ]
    assert all(path.is_relative_to(raw.root / path.name[:6]) for path in found.images)
    assert found.notes == (
        "sub-02/anat/sub-02_T1w_copy.nii.gz has no BIDS name: ignored",
        "sub-10 has no T1w image that fits",
        "sub-01 ses-b has 2 T1w images: sub-01_ses-b_acq-mprage_run-1_T1w,"
        " sub-01_ses-b_acq-mprage_run-2_T1w; all are segmented, choose with --bids-filter-file",
    )


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"participants": ("02",)}, ["sub-02"]),
        ({"participants": ("01", "02"), "sessions": ("a",)}, ["sub-01_ses-a"]),
        ({"filters": {"run": 2}}, ["sub-01_ses-b_acq-mprage_run-2"]),
        ({"filters": {"run": "02"}}, ["sub-01_ses-b_acq-mprage_run-2"]),
        ({"filters": {"session": "ses-a"}}, ["sub-01_ses-a"]),
        ({"filters": {"session": "ses-b", "run": ["run-1"]}}, ["sub-01_ses-b_acq-mprage_run-1"]),
        ({"filters": {"t1w": None}}, None),
    ],
)
def test_a_selection_narrows(raw, selection, expected):
    if expected is None:
        with pytest.raises(UsageError, match="filter-file"):
            select(raw, Selection(**selection))
    else:
        assert names(select(raw, Selection(**selection)).images) == expected


def test_filters_ask_for_absence_and_presence(raw, tmp_path):
    """``null`` and ``"*"``, as fMRIPrep has it."""
    file = tmp_path / "filters.json"
    file.write_text('{"t1w": {"acquisition": null, "session": "*"}, "bold": {"task": "rest"}}')
    assert names(select(raw, Selection(filters=read_filters(file))).images) == ["sub-01_ses-a"]
    for text in ("[1]", "{", '{"t1w": 3}'):
        file.write_text(text)
        with pytest.raises(UsageError, match="not a filter file"):
            read_filters(file)
    file.write_text('{"T1w": {"session": "a"}}')
    with pytest.raises(UsageError, match="nothing of t1w"):
        read_filters(file)


def test_absent_participants_are_named(raw):
    with pytest.raises(SelectionError, match="sub-03, sub-77"):
        select(raw, Selection(participants=("01", "77", "03")))
    with pytest.raises(SelectionError, match="no T1w"):
        select(raw, Selection(participants=("10",)))


def test_files_that_are_no_raw_scans_are_named(raw):
    anat = raw.root / "sub-10" / "anat"
    anat.mkdir(parents=True, exist_ok=True)
    (anat / "sub-10_desc-brain_T1w.nii.gz").touch()
    with pytest.raises(SelectionError, match="sub-10_desc-brain_T1w") as caught:
        select(raw, Selection(participants=("10",)))
    assert "cadiff-seg" in caught.value.remedy


def test_the_index_can_be_kept(raw, tmp_path):
    """The second time it is read, whichever participants the first time asked for."""
    database = tmp_path / "database"
    assert names(select(raw, Selection(participants=("02",)), database).images) == ["sub-02"]
    assert list(database.iterdir())
    assert len(select(raw, Selection(), database).images) == 4


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "has no dataset_description"),
        ("{", "JSON"),
        ("[]", "lacks"),
        ('{"Name": 1}', "lacks"),
    ],
)
def test_a_dataset_describes_itself(tmp_path, text, why):
    if text is not None:
        (tmp_path / "dataset_description.json").write_text(text)
    with pytest.raises(InvalidDatasetError, match=why):
        _ = Dataset(tmp_path).description


def test_the_validator_tells_of_files_and_refuses_datasets(raw):
    pytest.importorskip("bids_validator_deno")
    assert any("T1w_copy" in line for line in raw.violations())
    description = {"Name": "x", "BIDSVersion": "1.10.0", "Authors": "not a list"}
    (raw.root / "dataset_description.json").write_text(json.dumps(description))
    with pytest.raises(InvalidDatasetError, match="Authors"):
        raw.violations()


@pytest.mark.parametrize(
    ("out", "doi", "link"),
    [
        ("home/me/bids/derivatives/cadiff", "", "../.."),
        ("home/me/out", "", "../bids"),
        ("scratch/out", "", "urn:x-bids:bids"),
        (
            "scratch/out",
            "doi:10.18112/openneuro.ds1.v1",
            "https://doi.org/10.18112/openneuro.ds1.v1",
        ),
    ],
)
def test_links_do_not_tell_where_somebody_lives(tmp_path, out, doi, link):
    root = tmp_path / "home" / "me" / "bids"
    root.mkdir(parents=True)
    description = {"Name": "x", "BIDSVersion": "1.10.0", "DatasetDOI": doi}
    (root / "dataset_description.json").write_text(json.dumps(description))
    assert Dataset(root).link(tmp_path / out) == link


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00"])
def test_a_list_of_nobody_does_not_ask_for_all(tmp_path, content):
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"labels\.txt"):
        entity_labels([str(path)], "sub-", ["01"])


@pytest.mark.parametrize("exists", [True, False])
def test_an_index_that_was_not_finished_is_not_believed(raw, tmp_path, monkeypatch, exists):
    """It appears when it is complete, be the folder there or not."""
    from bids.layout import BIDSLayoutIndexer

    database = tmp_path / "index"
    if exists:
        database.mkdir()
    with monkeypatch.context() as broken:
        broken.setattr(BIDSLayoutIndexer, "__call__", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            select(raw, Selection(), database)
    assert not [path for path in database.rglob("*") if path.is_file()]
    wanted = select(raw).images
    assert select(raw, Selection(), database).images == wanted
    assert [path.name for path in database.iterdir()] == ["layout_index.sqlite"]
    with monkeypatch.context() as broken:
        broken.setattr(BIDSLayoutIndexer, "__call__", lambda *_: 1 / 0)
        assert select(raw, Selection(), database).images == wanted


def test_an_index_serves_one_dataset(raw, tmp_path):
    database, other = tmp_path / "index", tmp_path / "other"
    select(raw, Selection(), database)
    shutil.copytree(raw.root / "sub-01", other / "sub-01")
    shutil.copyfile(raw.root / "dataset_description.json", other / "dataset_description.json")
    with pytest.raises(DataError, match="is the index of"):
        select(Dataset(other), Selection(), database)
    link = tmp_path / "mount"
    link.symlink_to(raw.root)
    found = select(Dataset(link), Selection(), database).images
    assert found
    assert all(path.is_relative_to(link) for path in found)
    (database / "layout_index.sqlite").write_bytes(b"something else")
    with pytest.raises(DataError, match="is not an index"):
        select(raw, Selection(), database)


def test_links_that_lead_in_circles_cost_no_scan(raw):
    wanted = select(raw, Selection()).images
    assert len(wanted) > 1
    for folder in (raw.root, *raw.root.glob("sub-*"), *raw.root.glob("sub-*/**/anat")):
        for name in ("sub-a0", "ses-a0", "anat-a0"):
            (folder / name).symlink_to(name)
    assert select(Dataset(raw.root), Selection()).images == wanted


def test_labels_come_with_or_without_prefix_or_from_a_file(tmp_path, monkeypatch):
    file = tmp_path / "participants.txt"
    file.write_text("sub-03\n04\n")
    assert entity_labels(["sub-01", "02\r", "01", str(file)], "sub-", []) == (
        "01",
        "02",
        "03",
        "04",
    )
    table = tmp_path / "participants.tsv"
    table.write_text("\ufeffparticipant_id\tage\r\nsub-05\t23\r\nsub-06\t\r\n", encoding="utf-8")
    assert entity_labels([str(table)], "sub-", []) == ("05", "06")
    # A list may be called todo, as in the manual; but a participant is never taken for a file.
    monkeypatch.chdir(tmp_path)
    for name in ("todo", "01", "sub-02"):
        (tmp_path / name).write_text("\ufeffsub-07\n", encoding="utf-8")
    assert entity_labels(["todo"], "sub-", ["01"]) == ("07",)
    assert entity_labels(["01", "sub-02"], "sub-", ["01", "02"]) == ("01", "02")


ANATOMY = (
    "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz",
    "sub-01/ses-1/anat/sub-01_ses-1_part-phase_T1w.nii.gz",
    "sub-01/ses-1/anat/sub-01_ses-1_part-mag_T1w.nii.gz",
    "sub-01/ses-1/anat/sub-01_ses-1_ce-gd_run-02_T1w.nii",
    "sub-02/anat/sub-02_UNIT1.nii.gz",
    "sub-03/anat/sub-03_T1w.nii.gz",
    "sub-03/anat/sub-03_UNIT1.nii",
)


@pytest.fixture
def varied(dataset):
    """Magnitude and phase, contrast, MP2RAGE; below folders that are called like entities."""
    here = "sub-pilot/ses-2/anat/bids"
    root = dataset(*(f"{here}/{name}" for name in ANATOMY)) / here
    text = '\ufeff{"Name": "x", "BIDSVersion": "1.10.0"}'
    (root / "dataset_description.json").write_text(text, encoding="utf-8")
    return Dataset(root)


@pytest.mark.parametrize("kept", [True, False])
def test_folders_above_a_dataset_are_no_entities_of_its_images(varied, tmp_path, kept):
    assert varied.description["Name"] == "x"
    database = tmp_path / "index" if kept else None
    for _ in range(2):
        chosen = select(varied, Selection(participants=("03",)), database)
        assert names(chosen.images) == ["sub-03"]
        chosen = select(varied, Selection(sessions=("1",)), database)
        assert {path.name[:12] for path in chosen.images} == {"sub-01_ses-1"}
        chosen = select(varied, Selection(filters={"datatype": "anat"}), database)
        assert len(chosen.images) == 4


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"suffix": "UNIT1"}, ["sub-02_UNIT1.nii.gz", "sub-03_UNIT1.nii"]),
        ({"suffix": "*", "subject": "03"}, ["sub-03_T1w.nii.gz", "sub-03_UNIT1.nii"]),
        ({"suffix": ["T1w", "UNIT1"], "extension": ".nii", "session": None}, ["sub-03_UNIT1.nii"]),
        ({"extension": "nii"}, ["sub-01_ses-1_ce-gd_run-02_T1w.nii"]),
        ({"ceagent": "gd", "run": 2}, ["sub-01_ses-1_ce-gd_run-02_T1w.nii"]),
        ({"run": "2"}, ["sub-01_ses-1_ce-gd_run-02_T1w.nii"]),
        ({"run": "3"}, []),
        ({"part": "mag"}, ["sub-01_ses-1_part-mag_T1w.nii.gz"]),
        (
            {"part": ["mag", None], "ceagent": None, "session": ["1", "2"]},
            ["sub-01_ses-1_T1w.nii.gz", "sub-01_ses-1_part-mag_T1w.nii.gz"],
        ),
    ],
)
def test_a_filter_is_honoured(varied, filters, expected):
    if expected:
        assert [p.name for p in select(varied, Selection(filters=filters)).images] == expected
    else:
        with pytest.raises(SelectionError):
            select(varied, Selection(filters=filters))


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        ({"suffix": "T2w"}, 'asks for suffix "T2w"'),
        ({"suffix": None}, "asks for suffix null"),
        ({"suffix": []}, r"suffix is \[\]"),
        ({"extension": [".nii.gz", ".mgz"]}, 'asks for extension ".mgz"'),
        ({"datatype": "func"}, 'asks for datatype "func"'),
        ({"part": "phase"}, 'asks for part "phase"'),
        ({"acquistion": None}, "'acquistion' is no entity"),
        ({"run": {"a": 1}}, 'run is {"a": 1}'),
        ({"run": 1.5}, "run is 1.5"),
    ],
)
def test_a_filter_that_cannot_be_honoured_is_refused(varied, filters, said):
    with pytest.raises(UsageError, match=said) as caught:
        select(varied, Selection(filters=filters))
    assert "--bids-filter-file" in caught.value.message
    assert caught.value.remedy


def test_what_is_left_out_or_may_surprise_is_told(varied):
    assert select(varied).notes == (
        "sub-02 has no T1w image that fits",
        "1 T1w image left out as no magnitude: sub-01_ses-1_part-phase_T1w.nii.gz",
        "sub-02 has a UNIT1 (MP2RAGE) image: ask for it with a --bids-filter-file of"
        ' {"t1w": {"suffix": "UNIT1"}}',
        "sub-01 ses-1 has 3 T1w images: sub-01_ses-1_T1w, sub-01_ses-1_ce-gd_run-02_T1w,"
        " sub-01_ses-1_part-mag_T1w; all are segmented, choose with --bids-filter-file",
    )
    with pytest.raises(SelectionError, match=r"no T1w image .* sub-02 has a UNIT1 .*: ask for it"):
        select(varied, Selection(participants=("02",)))


def test_many_sessions_of_several_images_do_not_fill_the_screen(dataset):
    root = dataset(*(f"sub-{n}/anat/sub-{n}_run-{k}_T1w.nii" for n in range(9) for k in (1, 2)))
    notes = select(Dataset(root)).notes
    assert len(notes) == 6
    assert notes[-1] == "4 more sessions have several T1w images"


@pytest.mark.parametrize(
    ("lines", "left"),
    [
        ("\ufeffsub-03/\r\n", {"sub-01"}),
        ("**/*_ce-*\n!sub-03/**\n# a comment\n", {"sub-01", "sub-03"}),
        ("sub-*/**\n", set()),
        ("/anat\nT1w\n", {"sub-01", "sub-03"}),
    ],
)
def test_bidsignore_is_honoured(varied, lines, left):
    """People who have withdrawn are not run."""
    everything = select(varied).images
    (varied.root / ".bidsignore").write_text(lines, encoding="utf-8", newline="")
    if not left:
        with pytest.raises(SelectionError, match=r"5 T1w images left out by \.bidsignore: sub-01"):
            select(varied)
        return
    found = select(varied)
    assert {path.name[:6] for path in found.images} == left
    n = len(everything) - len(found.images)
    assert [f"{n} T1w image left out by .bidsignore" in note for note in found.notes].count(
        True
    ) == n


def test_labels_of_a_scan_must_be_one_map(tmp_path):
    anat = tmp_path / "sub-1" / "anat"
    anat.mkdir(parents=True)
    names = ("sub-1_T1w", "sub-1_dseg", "sub-1_space-MNI152NLin2009cAsym_dseg")
    for name in (*names, "._sub-1_T1w"):  # the last as macOS leaves them
        (anat / f"{name}.nii.gz").touch()
    (pair,) = labelled_scans(tmp_path)
    assert pair.dseg.name == "sub-1_dseg.nii.gz"
    for second in ("sub-1_seg-other_dseg", "sub-1_desc-preproc_T1w"):
        path = anat / f"{second}.nii.gz"
        path.touch()
        with pytest.raises(DataError, match=f"two .* of one scan.*{second}"):
            labelled_scans(tmp_path)
        path.unlink()


def test_reconstructions_are_scans_of_their_own(tmp_path):
    """All entities tell scans apart, not sub, ses, acq and run alone; run-01 is run-1."""
    anat = tmp_path / "sub-1" / "anat"
    anat.mkdir(parents=True)
    for scan in ("sub-1_rec-a_run-{}", "sub-1_rec-b_run-{}", "sub-1_ce-gd_run-{}"):
        (anat / f"{scan.format('01')}_T1w.nii.gz").touch()
        (anat / f"{scan.format('1')}_seg-x_dseg.nii.gz").touch()
    pairs = labelled_scans(tmp_path)
    assert {pair.subject for pair in pairs} == {"1"}
    for pair in pairs:
        assert pair.dseg.name.split("_")[1] == pair.t1.name.split("_")[1]
    assert len(pairs) == 3


@pytest.mark.parametrize(
    ("folders", "stem"),
    [(("sub-1/ses-a", "sub-1/ses-b"), "sub-1"), (("sub-1", "sub-2"), "brain")],
)
def test_folders_tell_scans_of_one_name_apart(tmp_path, folders, stem):
    for folder in folders:
        for ending in ("T1w", "dseg"):
            path = tmp_path / folder / "anat" / f"{stem}_{ending}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    pairs = labelled_scans(tmp_path)
    assert len(pairs) == 2
    assert all(pair.t1.parent == pair.dseg.parent for pair in pairs)


RAW = {"Name": "x", "BIDSVersion": "1.8.0"}
THEIRS = {**RAW, "DatasetType": "derivative", "GeneratedBy": [{"Name": "fMRIPrep"}]}


@pytest.mark.parametrize("text", [json.dumps(RAW), json.dumps(THEIRS), "\ufeff{}", "{"])
def test_nobody_elses_dataset_is_written_into(text, tmp_path):
    """Neither by a check nor by the files at its root; what is there stays as it is."""
    path = tmp_path / "dataset_description.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(OutputError, match=r"raw dataset|fMRIPrep|not readable"):
        Derivatives(tmp_path, Path("sub-01_T1w.nii")).check_free(overwrite=True)
    with pytest.raises(OutputError, match=r"raw dataset|fMRIPrep|not readable"):
        save_dataset_files(tmp_path)
    assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_only_neighbours_are_told_by_their_path(tmp_path):
    """Whatever lies elsewhere tells of somebody's machine; git-annex keeps files in ``.git``."""
    out = tmp_path / "study" / "out"
    (tmp_path / "study" / ".git").mkdir(parents=True)
    (tmp_path / "study" / ".git" / "key.nii").touch()
    (tmp_path / "study" / "linked.nii").symlink_to(".git/key.nii")
    for scan, told in (
        ("study/scan.nii", "../scan.nii"),
        ("study/linked.nii", "../linked.nii"),
        ("study/out/a/scan.nii", "a/scan.nii"),
        ("study/scans/scan.nii", "../scans/scan.nii"),
        ("scan.nii", "scan.nii"),
    ):
        assert place_from(out, tmp_path / scan) == told
    assert place_from(Path("/out"), Path("/home/alice/scan.nii")) == "scan.nii"


def test_a_link_that_is_given_replaces_an_earlier_one(raw, tmp_path):
    for given, kept in ((None, None), ("doi:10.1/x", "doi:10.1/x"), (None, "doi:10.1/x")):
        save_dataset_files(tmp_path / "out", raw, given)
        text = (tmp_path / "out" / "dataset_description.json").read_text()
        assert json.loads(text)["DatasetLinks"]["raw"] == (kept or raw.link(tmp_path / "out"))


def test_a_description_of_ours_is_kept_but_for_missing_links(raw, tmp_path):
    path = tmp_path / "dataset_description.json"
    mine = {**RAW, "DatasetType": "derivative", "GeneratedBy": [{"Name": "cadiff"}], "Funding": "y"}
    path.write_text(json.dumps({**mine, "DatasetLinks": [1]}))
    save_dataset_files(tmp_path)
    assert json.loads(path.read_text()) == {**mine, "DatasetLinks": [1]}
    refuse_other_source(tmp_path, raw)
    save_dataset_files(tmp_path, raw)
    found = json.loads(path.read_text())
    assert set(found.pop("DatasetLinks")) == {"raw", "templateflow"}
    assert found == mine
