"""Scoring of files and folders, and test-retest, as a library and as commands."""

import csv
import math
import shutil
import statistics

import nibabel as nib
import numpy as np
import pytest

from cadiff_cli.cli import cadiff, guarded
from cadiff_cli.errors import DataError, MissingInputError, UsageError
from cadiff_cli.evaluation.pairing import Pairs, label_maps, pair_up, retest_pairs
from cadiff_cli.evaluation.scores import Score, moved_labels, retest_pair, score_pair
from cadiff_cli.evaluation.tables import overall, summarise
from cadiff_cli.io.bids.names import scan_of
from cadiff_cli.io.images import save_volume
from cadiff_cli.io.label_maps import load_classes, say_once
from cadiff_cli.labels.schemes import load_scheme
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.stages.register import rigid

LEFT_THALAMUS, RIGHT_THALAMUS = 10, 49
THEIRS = {LEFT_THALAMUS: 60, RIGHT_THALAMUS: 59}  # Neuromorphometrics' ids
EDGE = 10


def cubes(left=0, right=None, size=40):
    """Thalami as cubes of ``EDGE`` voxels, each moved along x; None leaves one out."""
    data = np.zeros((size, size - 2, size - 4), dtype=np.int16)
    for x, move, code in ((6, left, LEFT_THALAMUS), (22, right, RIGHT_THALAMUS)):
        if move is not None:
            data[x + move : x + move + EDGE, 12 : 12 + EDGE, 14 : 14 + EDGE] = code
    return data


def theirs(data):
    """The same map in a reference's ids."""
    return sum((data == ours) * foreign for ours, foreign in THEIRS.items()).astype(np.int16)


def score(prediction, reference, parcellation, **options):
    mapping = load_scheme("neuromorphometrics", parcellation)
    scores = score_pair(prediction, reference, parcellation, "malc27", mapping, **options)
    return {s.structure: s for s in scores}


def rotation(degrees, shift_mm=(0, 0, 0)):
    """A motion about z, then about x."""
    motion, (c, s) = np.eye(4), (np.cos(np.radians(degrees)), np.sin(np.radians(degrees)))
    about_z, about_x = np.eye(3), np.eye(3)
    about_z[:2, :2] = about_x[1:, 1:] = [[c, -s], [s, c]]
    motion[:3, :3], motion[:3, 3] = about_x @ about_z, shift_mm
    return motion


def rows(path):
    with path.open() as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


@pytest.fixture
def write(tmp_path):
    """Write codes as an image, its folders included."""

    def make(name, data, affine=None):
        path = tmp_path / name
        save_volume(path, data, Grid(data.shape, np.eye(4) if affine is None else affine))
        return path

    return make


def cli(*arguments):
    """Exit code of a command, run here."""
    return guarded(lambda: cadiff.main([*map(str, arguments)], standalone_mode=False))


def test_files_are_scored_in_their_own_ids(write, parcellation):
    grid = np.diag([2.0, 1.0, 1.0, 1.0])
    ours = write("sub-1_seg-cadiff_dseg.nii.gz", cubes(2, 0), grid)
    scores = score(ours, write("sub-1_dseg.nii.gz", theirs(cubes(0, 0)), grid), parcellation)
    assert len(scores) == 27
    left, right, putamen = (scores[n] for n in ("Left-Thalamus", "Right-Thalamus", "Left-Putamen"))
    assert (left.scan, left.reference) == ("sub-1", "sub-1_dseg.nii.gz")
    assert left.dice == pytest.approx(1 - 2 / EDGE)
    assert left.hd95_mm == pytest.approx(4)
    assert left.volume_mm3 == left.reference_mm3 == pytest.approx(EDGE**3 * 2)
    assert right.dice == right.nsd == 1
    assert right.hd95_mm == right.volume_error_percent == 0
    assert putamen.absent
    assert not putamen.missed
    assert math.isnan(putamen.volume_error_percent)


def test_the_tolerance_is_in_millimetres(write, parcellation):
    grid = np.diag([2.0, 1.0, 1.0, 1.0])
    pair = (write("a_dseg.nii.gz", cubes(2), grid), write("b.nii.gz", theirs(cubes(0)), grid))
    near, far = (
        score(*pair, parcellation, tolerance_mm=mm)["Left-Thalamus"].nsd for mm in (3.9, 4.1)
    )
    assert near < 0.9
    assert far == pytest.approx(1)


def test_a_missing_structure_counts_zero_and_is_counted(write, parcellation):
    """Whichever side lacks it; its distance is infinite and left out of the mean."""
    a, b = cubes(1, 0), cubes(0)
    missing, spurious = (
        score(write("x_dseg.nii", p), write("y_dseg.nii", theirs(r)), parcellation)
        for p, r in ((b, a), (a, b))
    )
    for scores in (missing, spurious):
        lost = scores["Right-Thalamus"]
        assert (lost.dice, lost.nsd, lost.missed, lost.absent) == (0, 0, True, False)
        (summary,) = summarise(scores.values(), "scan", ["dice", "nsd", "hd95_mm"])
        assert (summary.n, summary.missed, summary.absent) == (2, 1, 25)
        assert summary.mean["dice"] == pytest.approx((0 + 0.9) / 2)
        assert summary.mean["hd95_mm"] == pytest.approx(1)
    assert missing["Right-Thalamus"].volume_error_percent == -100
    assert math.isnan(spurious["Right-Thalamus"].volume_error_percent)


@pytest.mark.parametrize(("ours", "truth", "error"), [(110, 100, 10), (50, 100, -50), (0, 8, -100)])
def test_volume_errors(ours, truth, error):
    s = Score("sub-1", "x", "Left-Thalamus", 0.5, 0.5, 1.0, ours, truth)
    assert s.volume_error_percent == pytest.approx(error)
    assert s.abs_volume_error_percent == pytest.approx(abs(error))
    assert s.volume_difference_percent == pytest.approx(abs(ours - truth) / (ours + truth) * 200)


def test_means_are_over_structures_then_scans():
    """A scan with fewer structures weighs as much as any other."""
    dice = {("a", "x"): 1.0, ("a", "y"): 0.5, ("b", "x"): 0.25, ("b", "y"): math.nan}
    scores = [Score(i, "r", k, d, d, 1.0, 1.0, 1.0) for (i, k), d in dice.items()]
    scans, structures = (summarise(scores, key, ["dice"]) for key in ("scan", "structure"))
    assert {s.name: s.mean["dice"] for s in scans} == {"a": 0.75, "b": 0.25}
    assert {s.name: (s.mean["dice"], s.n, s.absent) for s in structures} == {
        "x": (0.625, 2, 0),
        "y": (0.5, 1, 1),
    }
    assert structures[0].sd["dice"] == pytest.approx(statistics.stdev([1, 0.25]))
    assert math.isnan(structures[1].sd["dice"])
    headline = overall(scans)
    assert headline.mean["dice"] == pytest.approx((0.75 + 0.25) / 2)
    assert (headline.n, headline.absent) == (2, 1)


@pytest.mark.parametrize("axes", ["LAS", "SRA", "PIL"])
def test_orientation_of_both_files_does_not_matter(write, parcellation, axes):
    affine = np.diag([2.0, 1.0, 1.5, 1.0])
    p, r = cubes(1, -2), theirs(cubes(0, 0))
    expected = score(write("p_dseg.nii", p, affine), write("r_dseg.nii", r, affine), parcellation)
    turned = []
    for name, data in (("p", p), ("r", r)):
        image = nib.Nifti1Image(data, affine)
        there = nib.orientations.axcodes2ornt(tuple(axes))
        image = image.as_reoriented(
            nib.orientations.ornt_transform(nib.io_orientation(affine), there)
        )
        turned.append(write(f"{axes}{name}_dseg.nii", np.asarray(image.dataobj), image.affine))
    for name, s in score(*turned, parcellation).items():
        e = expected[name]
        np.testing.assert_allclose(
            [s.dice, s.nsd, s.hd95_mm, s.volume_mm3, s.reference_mm3],
            [e.dice, e.nsd, e.hd95_mm, e.volume_mm3, e.reference_mm3],
            rtol=1e-5,
        )


def test_grids_must_agree_but_for_rounding(write, parcellation):
    reference = write("r_dseg.nii", theirs(cubes(0)))

    def shifted(mm):
        affine = np.eye(4)
        affine[0, 3] = mm
        return write("p_dseg.nii", cubes(0), affine)

    assert score(shifted(0.05), reference, parcellation)["Left-Thalamus"].dice == 1
    with pytest.raises(DataError, match=r"p_dseg.nii lies on .*0\.5.* r_dseg.nii on .*40x38x36"):
        score(shifted(0.5), reference, parcellation)
    # A small turn moves the far corner much.
    for affine in (rotation(1), np.diag([1.02, 1, 1, 1]), np.diag([-1, 1, 1, 1])):
        with pytest.raises(DataError, match="lies on"):
            score(write("p_dseg.nii", cubes(0), affine), reference, parcellation)
    with pytest.raises(DataError, match="39x38x36"):
        score(write("p_dseg.nii", cubes(0)[1:]), reference, parcellation)


def test_ids_must_make_sense(write, parcellation):
    good, reference = write("p_dseg.nii", cubes(0)), write("r_dseg.nii", theirs(cubes(0)))
    with pytest.raises(DataError, match="1999"):
        score(write("x_dseg.nii", cubes(0) + 1999), reference, parcellation)
    with pytest.raises(DataError, match=r"0\.5"):
        score(write("x_dseg.nii", cubes(0) + np.float32(0.5)), reference, parcellation)
    with pytest.raises(DataError, match="nan"):
        score(good, write("x_dseg.nii", cubes(0) * np.float32(np.nan)), parcellation)
    # Ids of other structures are the reference's business, unless it knows nothing of ours.
    foreign = theirs(cubes(0))
    foreign[0, 0, 0] = 1
    assert score(good, write("x_dseg.nii", foreign), parcellation)["Left-Thalamus"].dice == 1
    for nothing in (0 * foreign, 0 * foreign + 1):
        with pytest.raises(DataError, match="no known label id") as caught:
            score(good, write("x_dseg.nii", nothing), parcellation)
        assert "--reference-labels" in caught.value.remedy


def test_ids_of_another_scheme_are_not_scored_as_background(write, parcellation):
    """The scheme that fits is named; a table of one's own may know a few structures only."""
    codes = np.zeros((12, 10, 10), dtype=np.int16)
    codes[:8] = np.array([2, 3, 41, 42]).repeat(2)[:, None, None]
    codes[8, 0] = 4  # the third ventricle, by Neuromorphometrics
    path = write("x_dseg.nii", codes)
    mapping = load_scheme("neuromorphometrics", parcellation)
    with pytest.raises(DataError, match="of the scheme, cadiff, freesurfer") as caught:
        load_classes(path, parcellation, mapping, option="--labels")
    assert "--labels" in caught.value.remedy
    dlmuse = load_scheme("dlmuse", parcellation)
    half = np.zeros_like(codes)
    half[:9] = np.array([81, 82, 81, 82, *[id_ for id_ in dlmuse if id_ in mapping][1:6]])[
        :, None, None
    ]
    with pytest.raises(DataError, match="of the scheme, dlmuse would know all"):
        load_classes(write("d_dseg.nii", half), parcellation, mapping, option="--labels")
    own = load_classes(path, parcellation, parcellation.class_of, option="--labels")
    assert np.count_nonzero(own.data) == np.count_nonzero(codes)
    few = load_classes(path, parcellation, {4: parcellation.class_of[14]}, option="--labels")
    assert np.count_nonzero(few.data) == 10
    image = np.random.default_rng(0).integers(1, 4000, codes.shape).astype(np.int16)
    with pytest.raises(DataError, match="give a label map"):
        load_classes(write("y_dseg.nii", image), parcellation, mapping, option="--labels")
    head = np.where(np.arange(12)[:, None, None] < 4, mapping_key(mapping), 515) + 0 * codes
    whole = load_classes(write("z_dseg.nii", head), parcellation, mapping, option="--labels")
    assert np.count_nonzero(whole.data) == 400


def mapping_key(mapping):
    """An id of Neuromorphometrics'."""
    return next(id_ for id_, k in mapping.items() if k > 0)


def test_what_references_cannot_hold_is_not_scored(write, parcellation, caplog):
    """A rater who drew one structure says nothing of the others."""
    say_once.cache_clear()
    drawn = cubes(0)
    path, reference = write("p_dseg.nii", drawn), write("r_dseg.nii", theirs(drawn))
    ids = theirs(drawn)
    (one,) = {int(i) for i in ids[drawn == drawn.max()]}
    mapping = {one: load_scheme("neuromorphometrics", parcellation)[one]}
    (score,) = score_pair(path, reference, parcellation, "malc27", mapping)
    assert score.dice == 1
    assert "not scored" in caplog.text
    vermis = next(
        k for k in range(1, parcellation.n_classes) if k not in parcellation.subset("malc27")
    )
    with pytest.raises(DataError, match="malc27"):
        score_pair(path, reference, parcellation, "malc27", {one: vermis})


@pytest.mark.parametrize(
    ("name", "scan"),
    [
        ("sub-1_ses-2_acq-x_run-3_seg-cadiff_dseg.nii.gz", "sub-1_ses-2_acq-x_run-3"),
        ("sub-1_run-2_seg-cadiff_desc-structures_dseg.nii.gz", "sub-1_run-2"),
        ("sub-1_space-T1w_seg-manual_dseg.nii", "sub-1"),
        ("sub-1_space-MNIInfant_cohort-2_seg-cadiff_desc-structures_dseg.nii.gz", "sub-1"),
        ("sub-1_dseg.mgz", "sub-1"),
        ("sub-1_run-01_atlas-MUSE_label-GM_dseg.nii", "sub-1_run-1"),
        ("my scan_dseg.nii.gz", "sub-myscan"),
        ("my.scan.nii.gz", "sub-myscan"),
    ],
)
def test_the_scan_of_a_label_map(name, scan, tmp_path):
    assert scan_of(tmp_path / name) == scan


@pytest.fixture
def tree(tmp_path):
    """Empty files: a cadiff folder inside a dataset with manual label maps."""

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path

    return make


def test_trees_are_paired_by_entities(tree):
    ours = "data/derivatives/cadiff/sub-1/ses-{0}/anat/sub-1_ses-{0}_run-{1}_seg-cadiff_dseg.{2}"
    data = "data/sub-1/ses-{0}/anat/sub-1_ses-{0}_run-{1}_seg-manual_dseg.{2}"
    root = tree(
        *(ours.format(*k, "nii.gz") for k in ((1, 1), (1, 2), (2, 1))),
        *(data.format(*k, "nii") for k in ((1, 1), (1, 2), (3, 1))),
        ours.format(1, 1, "json"),
        data.format(1, 1, "json"),
        "data/sub-1/ses-1/anat/._sub-1_ses-1_run-1_dseg.nii",
    )
    mine, reference = root / "data" / "derivatives" / "cadiff", root / "data"
    pairs = pair_up(mine, reference)
    assert [(p.name, r.name) for p, r in pairs.files] == [
        (f"sub-1_ses-1_run-{n}_seg-cadiff_dseg.nii.gz", f"sub-1_ses-1_run-{n}_seg-manual_dseg.nii")
        for n in (1, 2)
    ]
    assert pairs.without_reference == ("sub-1_ses-2_run-1",)
    assert pairs.without_prediction == ("sub-1_ses-3_run-1",)
    ((p, r), _) = pairs.files
    assert pair_up(p, r) == Pairs(((p, r),))
    assert len(pair_up(mine, mine).files) == 3


def test_parcels_of_label_fusion_are_found(tree):
    """But those of the network come first, where both are."""
    fused, own = ("seg-nmm138_desc-jlf_dseg.nii", "seg-nmm138_desc-structures_dseg.nii")
    root = tree(
        f"out/sub-1_{fused}",
        f"out/sub-2_{fused}",
        f"out/sub-2_{own}",
        "out/sub-2_seg-cadiff_desc-structures_dseg.nii",
        f"out/sub-3_space-MNI152_{fused}",
    )
    (root / "out" / "seg-nmm138_dseg.tsv").write_text("index\tname\n")
    found = label_maps(root / "out", prefer_ours=True, finer="nmm138")
    assert {scan: path.name for scan, path in found.items()} == {
        "sub-1": f"sub-1_{fused}",
        "sub-2": f"sub-2_{own}",
    }


def test_people_may_be_linked_into_a_folder(tree):
    root = tree("data/sub-1/ses-a/anat/sub-1_ses-a_dseg.nii.gz", "chosen/sub-2_dseg.nii.gz")
    (root / "chosen" / "sub-1").symlink_to(root / "data" / "sub-1")
    assert set(label_maps(root / "chosen")) == {"sub-1_ses-a", "sub-2"}


def test_what_cannot_be_paired(tree):
    root = tree(
        "a/sub-1_seg-cadiff_dseg.nii",
        "b/sub-2_dseg.nii",
        "c/sub-1_seg-x_dseg.nii",
        "c/sub-1_seg-y_dseg.nii",
        "d/sub-1_T1w.nii",
    )
    a = root / "a"
    with pytest.raises(MissingInputError, match=r"sub-1.*sub-2"):
        pair_up(a, root / "b")
    with pytest.raises(MissingInputError, match="none"):
        pair_up(a, root / "d")
    with pytest.raises(MissingInputError, match="gone"):
        pair_up(a, root / "gone")
    with pytest.raises(UsageError, match="is a file"):
        pair_up(a, root / "b" / "sub-2_dseg.nii")
    with pytest.raises(DataError, match=r"2 label maps of sub-1.*seg-x.*seg-y"):
        pair_up(a, root / "c")


def test_cadiffs_own_label_map_is_taken_of_several(tree):
    """Among predictions; among references nobody can know which one is meant."""
    root = tree("a/sub-1_seg-cadiff_dseg.nii", "a/sub-1_seg-x_dseg.nii", "b/sub-1_dseg.nii")
    ((p, _),) = pair_up(root / "a", root / "b").files
    assert p.name == "sub-1_seg-cadiff_dseg.nii"
    with pytest.raises(DataError, match="2 label maps"):
        pair_up(root / "b", root / "a")
    ((_, r),) = pair_up(root / "b", root / "a", both_ours=True).files
    assert r.name == "sub-1_seg-cadiff_dseg.nii"


def test_parcels_are_compared_with_parcels(tree):
    """Two folders of cadiff's, as two of its files."""
    names = [f"sub-1_seg-{seg}_desc-structures_dseg.nii" for seg in ("cadiff", "nmm138")]
    root = tree(*(f"{folder}/{name}" for folder in "ab" for name in names))
    for folder in "ab":
        (root / folder / "seg-nmm138_dseg.tsv").write_text("index\tname\n")
    for finer, name in (("", names[0]), ("nmm138", names[1])):
        (pair,) = pair_up(root / "a", root / "b", finer, both_ours=True).files
        assert [path.name for path in pair] == [name, name]


def test_of_fused_labels_those_of_the_coarser_parcellation_are_scored(tree):
    names = [f"sub-1_seg-{seg}_desc-majority_dseg.nii" for seg in ("cadiff", "nmm138")]
    root = tree(*(f"a/{name}" for name in names), "b/sub-1_dseg.nii")
    ((p, _),) = pair_up(root / "a", root / "b").files
    assert p.name == names[0]


@pytest.fixture
def folders(write, tmp_path):
    """Three segmented scans, of which two have references, and a reference of its own."""
    for name, moves in (("1", (1, 0)), ("2", (0, 2)), ("3", (0, 0))):
        write(f"mine/sub-{name}/anat/sub-{name}_seg-cadiff_dseg.nii.gz", cubes(*moves))
    for name in ("1", "2", "4"):
        write(f"theirs/sub-{name}/anat/sub-{name}_dseg.nii.gz", theirs(cubes(0, 0)))
    return tmp_path / "mine", tmp_path / "theirs"


def test_evaluate_writes_three_tables(folders, tmp_path, capsys):
    out = tmp_path / "new" / "scores"
    assert cli("evaluate", *folders, "-o", out) == 0
    shown = capsys.readouterr()
    assert "…" not in shown.out  # numbers are whole, however narrow the screen
    assert shown.err.splitlines() == [
        f"cadiff: WARNING: 1 of 3 scans have no label map in {folders[1]}: sub-3",
        f"cadiff: WARNING: 1 of 3 scans have no label map in {folders[0]}: sub-4",
    ]
    dice = (0.95 + 0.9) / 2
    (headline,) = (line for line in shown.out.splitlines() if "foreground mean" in line)
    assert f"{dice:.4f}" in headline
    assert "Left-Cerebellum-White-Matter" in shown.out
    assert sorted(p.name for p in out.iterdir()) == [
        "evaluation.tsv",
        "evaluation_scans.tsv",
        "evaluation_structures.tsv",
    ]
    scores = rows(out / "evaluation.tsv")
    assert len(scores) == 2 * 27
    assert {r["dice"] for r in scores} == {"1.0000", "0.9000", "0.8000", "n/a"}
    scans = {r["scan"]: r for r in rows(out / "evaluation_scans.tsv")}
    assert {name: r["dice_mean"] for name, r in scans.items()} == {
        "sub-1": "0.9500",
        "sub-2": "0.9000",
    }
    assert scans["sub-1"]["absent"] == "25"
    structures = {r["structure"]: r for r in rows(out / "evaluation_structures.tsv")}
    assert structures["Left-Thalamus"]["n"] == "2"
    assert structures["Left-Thalamus"]["dice_mean"] == "0.9500"
    assert structures["Left-Thalamus"]["dice_sd"] == f"{statistics.stdev([0.9, 1]):.4f}"
    assert structures["Left-Putamen"]["dice_mean"] == "n/a"


def test_a_pair_that_cannot_be_scored_costs_the_others_nothing(folders, write, tmp_path, capsys):
    write("theirs/sub-2/anat/sub-2_dseg.nii.gz", theirs(cubes(0)), rotation(0, (9, 0, 0)))
    assert cli("evaluate", *folders, "-o", tmp_path / "new") == 1
    (told,) = (line for line in capsys.readouterr().err.splitlines() if "not scored" in line)
    assert "sub-2" in told
    assert {row["scan"] for row in rows(tmp_path / "new" / "evaluation_scans.tsv")} == {"sub-1"}
    damaged = folders[1] / "sub-2" / "anat" / "sub-2_dseg.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:200])
    assert cli("evaluate", *folders) == 1
    assert "damaged" in capsys.readouterr().err


def test_templates_are_no_scans(tree):
    root = tree("sub-1/anat/sub-1_dseg.nii.gz", "templates/tpl-x/tpl-x_dseg.nii.gz")
    assert list(label_maps(root)) == ["sub-1"]


def test_evaluate_never_replaces_unasked(folders, tmp_path, capsys):
    (tmp_path / "evaluation_scans.tsv").write_text("mine")
    assert cli("evaluate", *folders, "-o", tmp_path) == 73
    assert "--overwrite" in capsys.readouterr().err
    assert not (tmp_path / "evaluation.tsv").exists()
    assert (tmp_path / "evaluation_scans.tsv").read_text() == "mine"
    assert cli("evaluate", *folders, "-o", tmp_path, "--overwrite") == 0
    assert (tmp_path / "evaluation_scans.tsv").read_text() != "mine"


def test_evaluate_says_what_is_wrong_in_one_line(folders, write, tmp_path, capsys):
    mine, reference = folders
    ours = mine / "sub-1" / "anat" / "sub-1_seg-cadiff_dseg.nii.gz"
    truth = reference / "sub-1" / "anat" / "sub-1_dseg.nii.gz"
    cut = tmp_path / "cut_dseg.nii.gz"
    cut.write_bytes(truth.read_bytes()[:200])
    (tmp_path / "file").touch()
    elsewhere = write("elsewhere_dseg.nii.gz", theirs(cubes(0)), rotation(0, (9, 0, 0)))
    for code, text, arguments in (
        (66, "no such file", (mine, tmp_path / "gone")),
        (66, "no scheme", (ours, truth, "--reference-labels", "nonsense")),
        (64, "is a file", (mine, truth)),
        (64, "tolerance", (ours, truth, "--tolerance", "-1")),
        (64, "malc28", (ours, truth, "--labels", "malc28")),
        (65, "cut_dseg.nii.gz is damaged", (ours, cut)),
        (65, "lies on", (ours, elsewhere)),
        (65, "not in the label table", (truth, truth)),
        (73, "is a file", (ours, truth, "-o", tmp_path / "file")),
        (73, "cannot write", (ours, truth, "-o", tmp_path / "file" / "out")),
    ):
        assert cli("evaluate", *arguments) == code, text
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert text in line
        assert captured.out == ""


def test_nothing_moves_nothing(phantom, parcellation):
    head = phantom(spacing=4.0)
    classes = Volume(parcellation.encode(head.codes, parcellation.class_of), head.t1.grid)
    np.testing.assert_array_equal(moved_labels(classes, np.eye(4), classes.grid), classes.data)


@pytest.mark.parametrize("spacing", [3.0, (2.0, 3.0, 4.0)], ids=str)
def test_labels_are_carried_by_a_motion(phantom, orientation, spacing, parcellation):
    """A head that moved on its own grid is found again; carried the wrong way, it is not."""
    head, motion = phantom(spacing=3.0), rotation(8, (10, -6, 4))
    classes = parcellation.encode(head.codes, parcellation.class_of)
    moved = Volume(classes, Grid(classes.shape, motion @ head.t1.grid.affine))
    # The very voxels come back ...
    np.testing.assert_array_equal(moved_labels(moved, motion, head.t1.grid), classes)
    # ... and on any other grid the same head.
    other = phantom(orientation, spacing)
    truth = parcellation.encode(other.codes, parcellation.class_of)
    found, lost = (moved_labels(moved, m, other.t1.grid) for m in (motion, np.linalg.inv(motion)))
    assert (found == truth)[truth > 0].mean() > 0.9
    assert (lost == truth)[truth > 0].mean() < 0.8
    assert np.count_nonzero(found) == pytest.approx(np.count_nonzero(truth), rel=0.02)


def test_labels_that_leave_the_field_of_view(parcellation):
    labels = Volume(np.full((6, 6, 6), 3, dtype=np.uint8), Grid((6, 6, 6), np.eye(4)))
    for shift, left in ((3.0, 3 * 36), (50.0, 0), (-50.0, 0)):
        there = moved_labels(labels, rotation(0, (shift, 0, 0)), labels.grid)
        assert np.count_nonzero(there) == left


@pytest.fixture(scope="module")
def sessions(phantom, tmp_path_factory):
    """cadiff's folder of one person scanned twice, in another position and orientation."""
    out, motion = tmp_path_factory.mktemp("retest"), rotation(7, (12, -8, 5))
    heads = {"a": (phantom(), np.eye(4)), "b": (phantom("LPS"), motion)}
    for session, (head, moved) in heads.items():
        grid = Grid(head.t1.grid.shape, moved @ head.t1.grid.affine)
        place = out / "sub-1" / f"ses-{session}" / "anat"
        # The first was made by an earlier version.
        brain, labels = (
            ("desc-preproc_T1w", "seg-cadiff_dseg")
            if session == "a"
            else ("res-1_desc-brain_T1w", "seg-cadiff_desc-structures_dseg")
        )
        save_volume(place / f"sub-1_ses-{session}_{brain}.nii.gz", head.t1.data, grid)
        save_volume(place / f"sub-1_ses-{session}_{labels}.nii.gz", head.codes, grid)
    return out, motion


def test_a_known_motion_is_found(sessions, phantom):
    _, motion = sessions
    first, later = phantom().t1, phantom("LPS", noise=2.0).t1
    later = Volume(later.data, Grid(later.grid.shape, motion @ later.grid.affine))
    found = rigid(first, later)
    corners = np.array([[x, y, z, 1] for x in (-60, 60) for y in (-90, 60) for z in (-50, 70)])
    assert np.linalg.norm(corners @ (found - motion).T, axis=1).max() < 0.2
    np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-5)


def test_retest_of_a_scan_with_itself(sessions, parcellation):
    out, _ = sessions
    ((first, _),) = retest_pairs(out)
    present = [s for s in retest_pair(first, first, parcellation, "all") if not s.absent]
    assert present
    for s in present:
        assert (s.dice, s.nsd, s.hd95_mm, s.volume_difference_percent) == (1, 1, 0, 0)


def test_every_later_scan_is_compared_with_the_first(tree):
    root = tree(
        *(f"sub-1/ses-{s}/anat/sub-1_ses-{s}_seg-cadiff_dseg.nii.gz" for s in ("10", "2", "a")),
        *(f"sub-2/anat/sub-2_run-{r}_seg-cadiff_dseg.nii.gz" for r in "12"),
        "sub-3/anat/sub-3_seg-cadiff_dseg.nii.gz",
        "sub-4/ses-a/anat/sub-4_ses-a_seg-manual_dseg.nii.gz",
        "sub-4/ses-b/anat/sub-4_ses-b_seg-manual_dseg.nii.gz",
        "sub-5/anat/sub-5_acq-fast_seg-cadiff_dseg.nii.gz",  # another sequence is no retest
        "sub-5/anat/sub-5_acq-mprage_seg-cadiff_dseg.nii.gz",
    )
    assert [(scan_of(a), scan_of(b)) for a, b in retest_pairs(root)] == [
        ("sub-1_ses-2", "sub-1_ses-10"),
        ("sub-1_ses-2", "sub-1_ses-a"),
        ("sub-2_run-1", "sub-2_run-2"),
    ]


def test_retest_of_a_moved_head(sessions, tmp_path, capfd):
    """The same volumes, and labels that agree once the heads are aligned."""
    out, _ = sessions
    assert cli("retest", out, "-o", tmp_path / "new") == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    assert "foreground mean" in shown.out
    assert "left out: 16 pairs of scan and structure" in shown.out
    structures = rows(tmp_path / "new" / "retest_structures.tsv")
    assert len(structures) == 27
    present = [r for r in structures if r["n"] == "1"]
    assert len(present) == 11
    for row in present:
        assert float(row["volume_difference_percent_mean"]) < 0.5
        assert float(row["dice_mean"]) > 0.98
        assert float(row["nsd_mean"]) > 0.99
        assert float(row["hd95_mm_mean"]) <= 2
    (scan,) = rows(tmp_path / "new" / "retest_scans.tsv")
    assert (scan["scan"], scan["n"], scan["missed"]) == ("sub-1_ses-b", "11", "0")
    assert {r["reference"] for r in rows(tmp_path / "new" / "retest.tsv")} == {"sub-1_ses-a"}
    # What is there already is found before anything is aligned.
    assert cli("retest", out, "-o", tmp_path / "new") == 73


def test_retest_says_what_is_missing(sessions, tmp_path, capsys):
    out, _ = sessions
    lacking = tmp_path / "lacking"
    shutil.copytree(out, lacking)
    for path in (lacking / "sub-1" / "ses-b").rglob("*_T1w.nii.gz"):
        path.unlink()
    for text, folder in (
        ("none with two scans", out / "sub-1" / "ses-a"),
        ("no folder", out / "gone"),
        ("sub-1_ses-b_res-1_desc-brain_T1w.nii.gz", lacking),
    ):
        assert cli("retest", folder) == 66
        (line,) = capsys.readouterr().err.splitlines()
        assert text in line


def test_labels_in_a_templates_space_are_not_those_of_the_scan(tmp_path):
    """What ``--output-spaces`` writes beside them does not stand in the way."""
    anat = tmp_path / "sub-01" / "anat"
    anat.mkdir(parents=True)
    for name in ("", "_space-MNIColin27", "_space-MNIColin27_seg-cadiff_res-2"):
        suffix = "_dseg.nii.gz" if "seg-" in name else "_seg-cadiff_dseg.nii.gz"
        (anat / f"sub-01{name}{suffix}").touch()
    found = label_maps(tmp_path, prefer_ours=True)
    assert {scan: path.name for scan, path in found.items()} == {
        "sub-01": "sub-01_seg-cadiff_dseg.nii.gz"
    }
