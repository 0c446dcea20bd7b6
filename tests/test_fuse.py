"""Label fusion: who votes, how votes are counted, and labels that beat those of one atlas."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from test_cli import CODES

from cadiff_cli.cli import guarded
from cadiff_cli.config import RegisterConfig, StripMethod
from cadiff_cli.errors import DataError, MissingInputError, UsageError
from cadiff_cli.fusion import SEARCH, choose_atlases, fuse, joint, majority, registered_voter
from cadiff_cli.io.bids.tables import parcellation_of
from cadiff_cli.io.images import load_scan, save_volume
from cadiff_cli.metrics.overlap import dice
from cadiff_cli.notes import NoteCode
from cadiff_cli.products import Stripped
from cadiff_cli.spatial.grid import Grid, Volume

SMALL = 0.35
"""Scale of the heads here; the smallest that a scan may be is 60 mm."""
PEOPLE = {
    # subject: orientation, scale, shift in mm
    "sub-1_ses-1": ("LPS", SMALL, (0, 0, 0)),
    "sub-1_ses-2": ("RAS", SMALL, (1, 0, 0)),
    "sub-2_ses-1": ("RAS", 1.06 * SMALL, (3, -2, 1)),
    "sub-3": ("oblique", 1.02 * SMALL, (-4, 1, 2)),
    "sub-4": ("RAS", 1.1 * SMALL, (0, 5, -3)),
}


def image_of(dataset, name, suffix):
    folder = dataset.joinpath(*(p for p in name.split("_") if p.startswith(("sub-", "ses-"))))
    return folder / "anat" / f"{name}_{suffix}.nii.gz"


@pytest.fixture(scope="module")
def dataset(phantom, tmp_path_factory):
    """Four people, one of them twice; they differ in size, place and orientation of the scan."""
    folder = tmp_path_factory.mktemp("people")
    for name, (orientation, scale, shift) in PEOPLE.items():
        head = phantom(orientation, 1.0, scale, shift, noise=4.0)
        save_volume(image_of(folder, name, "T1w"), head.t1.data, head.t1.grid)
        save_volume(image_of(folder, name, "dseg"), head.codes, head.t1.grid)
        save_volume(image_of(folder, name, "mask"), head.codes > 0, head.t1.grid)
    return folder


@pytest.fixture(scope="module")
def crowd():
    """A ball in a ball in an unlabelled rim, and five atlases with their own noise and places."""

    def person(shift, seed):
        ijk = np.indices((36, 34, 40)) - np.reshape([18, 17, 20], (3, 1, 1, 1))
        r = np.sqrt(((ijk - np.reshape(shift, (3, 1, 1, 1))) ** 2).sum(axis=0))
        classes = np.select([r < 8, r < 11], [3, 2], 0).astype(np.uint8)
        brain = np.select([r < 8, r < 11, r < 13], [0.9, 0.5, 0.15], 0.0)
        noise = 0.03 * np.random.default_rng(seed).standard_normal(r.shape)
        return np.where(brain > 0, brain + noise, 0).astype(np.float32), classes

    shifts = [(1.5, 0, 0), (-1, 1, 0), (0, -1.5, 1), (0.5, 0.5, -1.5), (0, 1, 1.5)]
    image, truth = person((0, 0, 0), 0)
    images, votes = zip(*(person(s, seed) for seed, s in enumerate(shifts, start=1)), strict=True)
    return image, image > 0, truth, images, votes


@pytest.fixture(scope="module")
def fused(crowd):
    image, mask, _, images, votes = crowd
    return joint(image, mask, images, votes)


def mean_dice(classes, truth, which=(2, 3)):
    return float(np.nanmean(dice(classes, truth, which)))


def test_joint_fusion_beats_every_atlas_and_majority(crowd, fused):
    _, mask, truth, _, votes = crowd
    singles = [mean_dice(v, truth) for v in votes]
    assert mean_dice(fused, truth) > mean_dice(majority(votes), truth) > np.mean(singles)
    assert mean_dice(fused, truth) > max(singles)
    assert not fused[~mask].any()


def test_background_may_win(crowd, fused):
    """The rim inside the mask that nobody labels stays unlabelled."""
    _, mask, truth, _, _ = crowd
    rim = mask & (truth == 0)
    assert (fused[rim] == 0).mean() > 0.9


def test_joint_fusion_follows_a_unanimous_vote(crowd, fused):
    """Where all atlases agree as far as the search reaches, there is nothing to weigh."""
    _, mask, _, _, votes = crowd
    size = 2 * SEARCH + 1
    low = np.min([ndimage.minimum_filter(v, size) for v in votes], axis=0)
    high = np.max([ndimage.maximum_filter(v, size) for v in votes], axis=0)
    agreed = mask & (low == high)
    assert agreed.any()
    np.testing.assert_array_equal(fused[agreed], low[agreed])


def test_slabs_do_not_matter(crowd, fused):
    image, mask, _, images, votes = crowd
    np.testing.assert_array_equal(joint(image, mask, images, votes, slabs=3), fused)


def test_majority_is_the_mode_and_forgets_order():
    rng = np.random.default_rng(0)
    votes = rng.integers(0, 5, (7, 6, 5, 4)).astype(np.uint8)
    counts = np.apply_along_axis(np.bincount, 0, votes, minlength=5)
    expected = counts.argmax(axis=0)
    np.testing.assert_array_equal(majority(list(votes)), expected)
    np.testing.assert_array_equal(majority(list(votes[::-1])), expected)
    np.testing.assert_array_equal(majority([votes[0]]), votes[0])


def test_a_person_never_labels_herself(dataset):
    """Known by the name of the scan, in whatever session, or by the file."""

    def voters(t1, *exclude):
        return [scan.name for scan in choose_atlases(dataset, t1, exclude)]

    others = ["sub-2_ses-1", "sub-3", "sub-4"]
    assert voters(image_of(dataset, "sub-1_ses-2", "T1w")) == others
    assert voters(dataset / "elsewhere" / "sub-1_run-7_T1w.nii") == others
    link = dataset / "anonymous.nii.gz"
    link.symlink_to(image_of(dataset, "sub-1_ses-2", "T1w"))
    assert voters(link) == others
    assert voters(dataset / "sub-9_T1w.nii") == ["sub-1_ses-1", *others]
    assert voters(dataset / "sub-9_T1w.nii", "1", "3") == ["sub-2_ses-1", "sub-4"]


def test_wrong_atlases_are_errors_with_a_remedy(dataset, tmp_path):
    t1 = image_of(dataset, "sub-1_ses-1", "T1w")
    with pytest.raises(MissingInputError, match="no dataset"):
        choose_atlases(tmp_path / "gone", t1)
    with pytest.raises(DataError, match="no pairs"):
        choose_atlases(tmp_path, t1)
    with pytest.raises(UsageError, match="7") as caught:
        choose_atlases(dataset, t1, ["7"])
    assert "1, 2, 3, 4" in caught.value.remedy
    with pytest.raises(UsageError, match="nobody"):
        choose_atlases(dataset, t1, ["2", "3", "4"])


@pytest.fixture(scope="module")
def target(dataset):
    """The first person as a scan and as what is registered to."""
    scan = load_scan(image_of(dataset, "sub-1_ses-1", "T1w"))
    mask = Volume(scan.t1.data > 0, scan.t1.grid)
    return scan, Stripped(scan.t1, mask, StripMethod.AS_IS, bare=True)


def test_labels_must_be_known_and_on_the_image(dataset, target, parcellation, tmp_path):
    _, stripped = target
    (atlas, *_) = choose_atlases(dataset, image_of(dataset, "sub-1_ses-1", "T1w"))
    with pytest.raises(DataError, match="no known label id") as caught:
        registered_voter(atlas, stripped.t1, parcellation, {1000: 1}, RegisterConfig("affine"))
    assert "--labels" in caught.value.remedy
    other = tmp_path / "other_dseg.nii.gz"
    save_volume(other, np.ones((5, 5, 5), np.uint8), Grid((5, 5, 5), np.eye(4)))
    elsewhere = replace(atlas, dseg=other)
    with pytest.raises(DataError, match="other_dseg"):
        registered_voter(elsewhere, stripped.t1, parcellation, {1: 1}, RegisterConfig("affine"))


def test_one_person_cannot_vote_jointly(dataset, target, parcellation):
    scan, stripped = target
    (atlas, *_) = choose_atlases(dataset, scan.path)
    with pytest.raises(UsageError, match="two people"):
        fuse(scan, stripped, [atlas], parcellation, parcellation.class_of, RegisterConfig())
    with pytest.raises(UsageError, match="unknown registration"):
        fuse(
            *(scan, stripped, [atlas], parcellation, parcellation.class_of),
            *(RegisterConfig("magic"), "majority"),
        )


def run_fuse(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "cadiff_cli", "fuse", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """The command on the first person, labelled by two of the others in two processes."""
    out = tmp_path_factory.mktemp("out")
    done = run_fuse(
        *(image_of(dataset, "sub-1_ses-1", "T1w"), "--atlases", dataset, "-o", out),
        *("--mask", image_of(dataset, "sub-1_ses-1", "mask"), "--labels", "cadiff"),
        *("--registration", "affine", "--exclude", "3", "--jobs", "2"),
    )
    assert done.returncode == 0, done.stderr
    return out, image_of(out, "sub-1_ses-1", "seg-cadiff_desc-jlf_dseg")


def test_the_labels_lie_on_the_scan_and_beat_one_atlas(dataset, run, target, parcellation):
    _, path = run
    reference = image_of(dataset, "sub-1_ses-1", "dseg")
    image, truth = nib.load(path), nib.load(reference)
    np.testing.assert_array_equal(image.affine, truth.affine)
    codes, expected = (np.asarray(i.dataobj) for i in (image, truth))
    assert codes.dtype == np.int16
    assert codes.shape == expected.shape
    _, stripped = target
    mapping = parcellation.class_of
    truth_classes = parcellation.encode(expected, mapping)
    drawn = tuple(int(k) for k in np.unique(truth_classes) if k)
    singles = []
    for atlas in choose_atlases(dataset, reference, ["3"]):
        carried = registered_voter(
            atlas, stripped.t1, parcellation, mapping, RegisterConfig("affine")
        )
        singles.append(mean_dice(carried.classes, truth_classes, drawn))
    assert (
        mean_dice(parcellation.encode(codes, mapping), truth_classes, drawn)
        > np.mean(singles)
        > 0.8
    )


def test_ids_that_become_background_are_told(dataset, target, parcellation, caplog):
    """Also those that a child process meets."""
    scan, stripped = target
    mapping = {code: k for code, k in parcellation.class_of.items() if code not in (2, 41)}
    people = choose_atlases(dataset, image_of(dataset, "sub-1_ses-1", "T1w"))[:1]
    config = RegisterConfig("affine")
    fused = fuse(scan, stripped, people, parcellation, mapping, config, "majority", 1)
    (note,) = (note for note in fused.notes if note.code is NoteCode.UNKNOWN_IDS)
    assert "ids 2, 41 of" in note.text
    assert note.text in caplog.text


def test_evaluate_reads_the_results(dataset, run, capsys, monkeypatch):
    from cadiff_cli.cli.evaluate import command

    monkeypatch.setenv("COLUMNS", "200")
    arguments = [str(run[0]), str(dataset), "--reference-labels", "cadiff"]
    assert guarded(lambda: command.main(arguments, standalone_mode=False)) == 0
    assert "sub-1_ses-1" in capsys.readouterr().out


def test_the_sidecar_names_the_voters(run):
    out, path = run
    about = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
    assert [a["Name"] for a in about["Atlases"]] == ["sub-2_ses-1", "sub-4"]
    assert all(1 < a["Score"] <= 2 for a in about["Atlases"])
    assert about["Vote"] == {"Name": "joint", "Radius": 2, "Search": 2, "Beta": 2.0}
    assert about["Registration"] == {"name": "affine", "seed": 0}
    assert set(about["Seconds"]) == {"register", "fuse"}
    found = {p.name for p in out.rglob("*") if p.is_file()}
    assert found == {
        *("dataset_description.json", ".bidsignore", "README.md"),
        *(path.name, path.name.replace(".nii.gz", ".json")),
        *(Path(name).name for name in CODES),
    }


def test_another_parcellation_names_the_labels_that_are_in_it(dataset, lobes, tmp_path):
    """Its table lies beside, so that the label map is read by it."""
    table, ids = tmp_path / "lobes.tsv", tmp_path / "ids.tsv"
    table.write_text(lobes.as_tsv())
    rows = ((2, 1001), (3, 1002), (41, 2001), (42, 2002), (16, 16))
    ids.write_text("source\tindex\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    out = tmp_path / "out"
    done = run_fuse(
        *(image_of(dataset, "sub-1_ses-1", "T1w"), "--atlases", dataset, "-o", out),
        *("--mask", image_of(dataset, "sub-1_ses-1", "mask"), "--labels", ids),
        *("--parcellation", table, "--vote", "majority", "--registration", "affine"),
        *("--exclude", "3", "--exclude", "4"),
    )
    assert done.returncode == 0, done.stderr
    path = image_of(out, "sub-1_ses-1", "seg-lobes_desc-majority_dseg")
    assert parcellation_of(path) == lobes
    found = np.asarray(nib.load(path).dataobj)
    assert {*np.unique(found)} == {0, *lobes.class_of}
    truth = np.asarray(nib.load(image_of(dataset, "sub-1_ses-1", "dseg")).dataobj)
    inside = np.isin(truth, [3, 42])
    assert (found[inside] == np.where(truth == 3, 1002, 2002)[inside]).mean() > 0.8
    about = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
    assert about["Parcellation"] == "lobes"
    assert about["Description"].endswith("seg-lobes_dseg.tsv")


def test_results_are_not_lost(dataset, run, capsys):
    from cadiff_cli.cli.fuse import command

    out, path = run
    before = path.read_bytes()
    t1 = str(image_of(dataset, "sub-1_ses-1", "T1w"))
    arguments = [t1, "--atlases", str(dataset), "-o", str(out), "--labels", "cadiff"]
    assert guarded(lambda: command.main(arguments, standalone_mode=False)) == 73
    assert "--overwrite" in capsys.readouterr().err
    assert path.read_bytes() == before
    # Nor is a sidecar whose map is gone.
    path.rename(path.with_name("elsewhere"))
    assert guarded(lambda: command.main(arguments, standalone_mode=False)) == 73
    assert ".json is there already" in capsys.readouterr().err
    path.with_name("elsewhere").rename(path)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (["--atlases", "/nonexistent"], 66),
        (["--exclude", "7"], 64),
        (["--exclude", "2", "--exclude", "3", "--exclude", "4"], 64),
        (["--labels", "aparc"], 66),
        (["--parcellation", "aparc"], 66),
        (["--vote", "magic"], 64),
        (["--jobs", "0"], 64),
        (["-o", "ATLASES"], 73),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else None,
)
def test_errors_come_before_work_and_leave_nothing(dataset, tmp_path, capsys, change, code):
    from cadiff_cli.cli.fuse import command

    t1 = str(image_of(dataset, "sub-1_ses-1", "T1w"))
    change = [str(dataset) if word == "ATLASES" else word for word in change]
    arguments = [t1, "--atlases", str(dataset), "-o", str(tmp_path / "out"), *change]
    assert guarded(lambda: command.main(arguments, standalone_mode=False)) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cadiff: error: ")
    assert not (tmp_path / "out").exists()
