"""Templates: the embedded one always loads, and damaged downloads say what to do."""

import gzip
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from cadiff_cli.cli.fetch import command as fetch
from cadiff_cli.errors import CadiffError, DataError, MissingInputError, UsageError
from cadiff_cli.io import templateflow
from cadiff_cli.io.templateflow import listed, query_of, templateflow_home
from cadiff_cli.io.templates import (
    EMBEDDED,
    PREFERRED,
    joint_name,
    joint_spec,
    load_template,
    load_templates,
    measured_frame,
    own_contents,
    parse_specs,
    registry,
)
from cadiff_cli.notes import NoteCode, texts
from cadiff_cli.products import Citation, Frame
from cadiff_cli.spatial.grid import Grid, Volume


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def install(home):
    """Put image and mask of the preferred template into an empty cache."""

    def write(head, mask, spacing=2.0):
        name = registry()[PREFERRED]["head"]
        for file, data in ((name, head), (name.replace("_T1w.", "_desc-brain_mask."), mask)):
            path = home / file
            path.parent.mkdir(exist_ok=True)
            if isinstance(data, bytes):
                path.write_bytes(data)
            else:
                nib.save(nib.Nifti1Image(data, np.diag([spacing, spacing, spacing, 1])), path)

    return write


@pytest.fixture
def good(phantom):
    head = phantom("RAS", 2.0)
    return head.t1.data.copy(), (head.codes > 0).astype(np.uint8)


def test_the_embedded_template_is_what_nilearn_loads():
    """To the bit, though its file is read without that package, which takes long to import."""
    from nilearn.datasets import load_mni152_template

    brain, known = load_template(EMBEDDED, offline=True).brain, load_mni152_template(resolution=1)
    np.testing.assert_array_equal(brain.data, np.asarray(known.dataobj, dtype=np.float32))
    np.testing.assert_array_equal(brain.grid.affine, known.affine)


def test_the_embedded_template_needs_nothing():
    template = load_template(EMBEDDED, offline=True)
    inside = template.mask.data
    litres = np.count_nonzero(inside) * template.mask.grid.voxel_volume_mm3 / 1e6
    assert 1 < litres < 2.2
    assert (template.brain.data[~inside] == 0).all()
    assert template.head is None
    assert not template.notes
    # Its origin lies in the brain, and x extents are symmetric so that 0.5 is the midplane.
    ijk = np.linalg.solve(template.brain.grid.affine, [*template.frame.ac_mm, 1])[:3]
    assert inside[tuple(np.round(ijk).astype(int))]
    # The world is left-right symmetric about the AC's plane.
    x = template.brain.grid.to_world(np.argwhere(inside))[:, 0]
    assert x.mean() == pytest.approx(template.frame.ac_mm[0], abs=1)


@pytest.mark.parametrize("name", registry())
def test_extents_hold_a_brain_about_the_ac(name):
    entry = registry()[name]
    low, high = np.array(entry["low_mm"]), np.array(entry["high_mm"])
    assert low[0] == -high[0]
    assert (low < 0).all()
    assert (high > 0).all()


def test_an_unknown_name_is_a_usage_error():
    with pytest.raises(UsageError, match="MNI153") as caught:
        load_template("MNI153", offline=True)
    assert PREFERRED in caught.value.remedy


def test_names_are_joined_by_plus(install, good):
    install(*good)
    assert parse_specs("auto") == ("auto",)
    assert parse_specs(f"{EMBEDDED}+{PREFERRED}+{EMBEDDED}") == (EMBEDDED, PREFERRED)
    for names in (f"{EMBEDDED}+MNI153", f"auto+{EMBEDDED}", "", "MNIInfant:cohort-99", "MNIInfant"):
        with pytest.raises(UsageError, match=r"template|auto"):
            parse_specs(names)
    names = f"{EMBEDDED}+{PREFERRED}"
    loaded = load_templates(names, offline=True)
    assert joint_name(loaded) == joint_spec(loaded) == names
    assert not own_contents(loaded)


def test_an_installed_template_loads(install, good):
    head, mask = good
    install(head, mask)
    template, embedded = load_templates("auto", offline=True)
    assert (template.name, embedded.name) == (PREFERRED, EMBEDDED)
    assert not template.notes + embedded.notes
    np.testing.assert_array_equal(template.mask.data, mask > 0)
    np.testing.assert_array_equal(template.brain.data, np.where(mask > 0, head, 0))


def test_auto_falls_back_and_says_so(home):
    (template,) = load_templates("auto", offline=True)
    assert template.name == EMBEDDED
    (warning,) = texts(template.notes)
    assert PREFERRED in warning
    assert "offline" in warning


def test_a_cache_that_may_not_be_read_is_as_none(home, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(templateflow, "_is_there", refuse)
    (template,) = load_templates("auto", offline=True)
    assert template.name == EMBEDDED
    assert "Permission denied" in template.notes[0].text


def damaged(kind, head, mask):
    """(image, mask) with one thing wrong, and the error that says so."""
    whole = gzip.compress(nib.Nifti1Image(head, np.eye(4)).to_bytes())
    return {
        "absent": (None, None, MissingInputError),
        "empty": (b"", mask, MissingInputError),
        "empty mask file": (head, b"", MissingInputError),
        "half a download": (whole[: len(whole) // 2], mask, DataError),
        "a web page": (b"<html>", mask, DataError),
        "tiny": (head[:9, :9, :9], mask, DataError),
        "constant": (np.ones_like(head), mask, DataError),
        "another grid": (head[:-4], mask, DataError),
        "mask of nothing": (head, np.where(np.indices(mask.shape)[0] < 1, 1, 0), DataError),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        *("absent", "empty", "empty mask file", "half a download", "a web page"),
        *("tiny", "constant", "another grid", "mask of nothing"),
    ],
)
def test_damage_names_its_remedy(install, home, good, kind):
    head, mask, error = damaged(kind, *good)
    if head is not None:
        mask = mask if isinstance(mask, bytes) else mask.astype(np.uint8)
        install(head, mask)
    with pytest.raises(CadiffError) as caught:
        load_template(PREFERRED, offline=True)
    assert type(caught.value) is error
    for advice in ("cadiff fetch", str(home), EMBEDDED):
        assert advice in caught.value.remedy
    (fallback,) = load_templates("auto", offline=True)
    assert fallback.name == EMBEDDED
    assert fallback.notes


def test_a_failed_download_is_one_clear_error(home, monkeypatch):
    """Whatever the client raises; the real one would look for a network."""

    class Client:
        def __init__(self, root, **_):
            assert home in (root, root.parent.parent)  # the cache, or nobody else's view of it
            self.cache = SimpleNamespace(ensure=lambda: (root / "tpl-other").mkdir())

        def get(self, **query):
            assert query["template"] == PREFERRED
            raise ConnectionError("no route to host")

    fake = SimpleNamespace(TemplateFlowClient=Client)
    monkeypatch.setitem(sys.modules, "templateflow.client", fake)
    monkeypatch.setattr(templateflow, "_reachable", lambda: True)
    with pytest.raises(MissingInputError, match="ConnectionError") as caught:
        load_template(PREFERRED)
    assert "cadiff fetch" in caught.value.remedy
    assert (home / "tpl-other").is_dir()  # what whoever else uses the cache has to find there


def test_without_a_network_the_client_is_not_asked(home, monkeypatch):
    """It would try for most of a minute."""
    monkeypatch.setitem(sys.modules, "templateflow.client", None)  # importing it would fail
    monkeypatch.setattr(templateflow, "_reachable", lambda: False)
    with pytest.raises(MissingInputError, match="no network"):
        load_template(PREFERRED)
    (fallback,) = load_templates("auto")
    assert fallback.name == EMBEDDED
    assert "no network" in fallback.notes[0].text


@pytest.fixture
def server(home, good, monkeypatch, write_image):
    """TemplateFlow's client with a network, and with good files of Colin27."""
    head, mask = good
    paths = {
        "T1w": write_image(head, np.diag([2.0, 2, 2, 1]), "head.nii.gz"),
        "mask": write_image(mask, np.diag([2.0, 2, 2, 1]), "mask.nii.gz"),
    }

    class Client:
        def __init__(self, root, **_):
            self.root = root
            assert root != home  # which is a cache already

        def get(self, **query):
            path = self.root / f"tpl-MNIColin27_{query['suffix']}.nii.gz"
            path.write_bytes(b"half of it")  # nobody may see this where the whole will be
            there = home / "tpl-MNIColin27" / path.name
            assert not there.exists() or there.read_bytes() != path.read_bytes()
            return shutil.copy(paths[query["suffix"]], path)

    fake = SimpleNamespace(TemplateFlowClient=Client)
    monkeypatch.setitem(sys.modules, "templateflow.client", fake)
    monkeypatch.setattr(templateflow, "_reachable", lambda: True)


def test_a_download_is_used(server, home, good, monkeypatch):
    _, mask = good
    np.testing.assert_array_equal(load_template(PREFERRED).mask.data, mask > 0)
    assert not list(home.rglob(".cadiff-*"))
    # Now it is in the cache, where it belongs.
    monkeypatch.setitem(sys.modules, "templateflow.client", None)
    np.testing.assert_array_equal(load_template(PREFERRED, offline=True).mask.data, mask > 0)


@pytest.mark.parametrize("kind", ["half a download", "a web page"])
def test_fetch_replaces_what_is_damaged(server, install, good, kind):
    head, mask, _ = damaged(kind, *good)
    install(head, mask if isinstance(mask, bytes) else mask.astype(np.uint8))
    checked = CliRunner().invoke(fetch, ["--check", PREFERRED])
    assert isinstance(checked.exception, DataError)
    done = CliRunner().invoke(fetch, [PREFERRED], catch_exceptions=False)
    assert "again" in done.stderr
    assert done.stdout.startswith(f"{PREFERRED}\t")
    np.testing.assert_array_equal(load_template(PREFERRED, offline=True).mask.data, good[1] > 0)


def test_a_damaged_file_stays_where_no_other_can_be_had(home, install, good, monkeypatch):
    head, mask, _ = damaged("half a download", *good)
    install(head, mask)
    before = {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
    monkeypatch.setattr(templateflow, "_reachable", lambda: False)
    with pytest.raises(MissingInputError, match="is damaged and there is no network"):
        CliRunner().invoke(fetch, [PREFERRED], catch_exceptions=False)
    assert {p: p.read_bytes() for p in home.rglob("*") if p.is_file()} == before


def test_the_cache_lies_where_the_client_puts_it(monkeypatch, tmp_path):
    monkeypatch.delenv("TEMPLATEFLOW_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert templateflow_home() == tmp_path / "templateflow"
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "mine"))
    assert templateflow_home() == tmp_path / "mine"


def test_colin27_loads(shared, monkeypatch):
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(shared("templateflow")))
    template = load_template(PREFERRED, offline=True)
    assert template.head is not None
    assert (template.brain.data[~template.mask.data] == 0).all()
    ijk = np.linalg.solve(template.brain.grid.affine, [*template.frame.ac_mm, 1])[:3]
    assert template.mask.data[tuple(np.round(ijk).astype(int))]


@pytest.fixture
def write_template(tmp_path, good):
    """A template's folder in TemplateFlow's layout; returns the folder that holds the images."""

    def write(
        folder="tpl-toy",
        begin="tpl-toy",
        head=None,
        mask=None,
        about=None,
        labels=None,
        spacing=2.0,
    ):
        place, affine = tmp_path / folder, np.diag([spacing, spacing, spacing, 1])
        affine[:3, 3] = -87, -118, -77
        place.mkdir(parents=True, exist_ok=True)
        parts = {"T1w": good[0] if head is None else head, "desc-brain_mask": mask}
        for suffix, data in (parts | {"seg-cadiff_dseg": labels}).items():
            if data is not None:
                nib.save(nib.Nifti1Image(data, affine), place / f"{begin}_{suffix}.nii.gz")
        if about is not None:
            (place / "template_description.json").write_text(json.dumps(about))
        return place

    return write


FRAME = {"OriginMm": [0, 1, 2], "LowMm": [-90, -120, -80], "HighMm": [90, 90, 100]}


def whole(good):
    """The phantom in a skull of its own."""
    head, mask = good
    ijk = np.moveaxis(np.indices(head.shape), 0, -1) - (np.array(head.shape) - 1) / 2
    shell = (ijk / np.array(head.shape) * 2.1) ** 2
    return np.where((shell.sum(axis=-1) < 1) & (mask == 0), 30, head).astype(np.float32), mask


def test_a_folder_is_a_template(write_template, good):
    """A stripped image alone is enough; everything that its description tells is kept."""
    about = {
        "Name": "A toy",
        "Authors": ["Doe J"],
        "ReferencesAndLinks": ["https://doi.org/1"],
        "Frame": FRAME,
    }
    folder = write_template(about=about, labels=good[1].astype(np.int16))
    template = load_template(str(folder), offline=True)
    assert (template.name, template.label, template.source) == ("toy", "toy", str(folder))
    np.testing.assert_array_equal(template.brain.data, good[0])
    np.testing.assert_array_equal(template.mask.data, good[0] != 0)
    np.testing.assert_array_equal(template.labels.data, good[1])
    assert template.head is None
    assert template.frame == Frame((0, 1, 2), (-90, -120, -80), (90, 90, 100))
    assert template.citation == Citation("A toy", ("Doe J",), ("https://doi.org/1",))


def test_a_head_needs_a_mask(write_template, good):
    head, mask = whole(good)
    with pytest.raises(DataError, match="no brain mask") as caught:
        load_template(str(write_template(head=head + 1)))
    assert "tpl-toy_desc-brain_mask.nii.gz" in caught.value.remedy
    template = load_template(str(write_template(head=head, mask=mask)))
    np.testing.assert_array_equal(template.head.data, head)
    np.testing.assert_array_equal(template.brain.data, np.where(mask, head, 0))
    # A stripped image with a mask of its own is still no head to strip another by.
    assert load_template(str(write_template(mask=mask))).head is None


@pytest.mark.parametrize(("litres", "neck"), [(2.2, False), (1.5, True)], ids=["large", "neck"])
def test_a_head_in_air_of_0_needs_a_mask_too(write_template, good, litres, neck):
    """It is larger than a brain, or goes on downwards."""
    ijk = np.moveaxis(np.indices(good[0].shape), 0, -1) - (np.array(good[0].shape) - 1) / 2
    x, y, z = np.moveaxis(2 * ijk, -1, 0)
    head = x**2 + y**2 + z**2 < (0.75 / np.pi * litres * 1e6) ** (2 / 3)
    if neck:
        head |= (x**2 + y**2 < 50**2) & (z < 0)
    image = np.where(head, 100 + x, 0).astype(np.float32)
    with pytest.raises(DataError, match="neck" if neck else r"2\.2. l are not 0") as caught:
        load_template(str(write_template(head=image)))
    assert "tpl-toy_desc-brain_mask.nii.gz" in caught.value.remedy
    # A brain whose spinal cord is cut by the field of view is one.
    head, _ = good
    cord = (x**2 + (y + 40) ** 2 < 8**2) & (z < 0) & (head == 0)
    assert load_template(str(write_template(head=np.where(cord, 80, head)))).head is None


@pytest.mark.parametrize("name", ["tpl-my-brain_T1w.nii.gz", "tpl-toy_T1w.nii", "T1w.nii.gz"])
def test_an_image_that_is_called_otherwise_is_named(write_template, name):
    folder = write_template()
    (folder / "tpl-toy_T1w.nii.gz").rename(folder / name)
    (folder / "other.nii.gz").touch()
    with pytest.raises(MissingInputError, match="no T1w image") as caught:
        parse_specs(str(folder))
    assert caught.value.message.endswith(f"tpl-NAME_T1w.nii.gz, but {name}")
    assert "letters and digits" in caught.value.remedy


def test_a_mask_that_is_called_otherwise_is_not_passed_over(write_template, good):
    folder = write_template(mask=good[1])
    mask = folder / "tpl-toy_desc-brain_mask.nii.gz"
    assert not load_template(str(folder)).notes
    mask.rename(folder / "tpl-toy_mask.nii.gz")
    (note,) = load_template(str(folder)).notes
    assert note.code == NoteCode.TEMPLATE_MASK
    assert "tpl-toy_mask.nii.gz" in note.text
    assert mask.name in note.text


def test_an_empty_mask_is_called_empty(write_template, good):
    with pytest.raises(DataError, match=r"brain_mask\.nii\.gz is empty: all its voxels are 0"):
        load_template(str(write_template(mask=0 * good[1])))


def test_a_cohort_has_files_of_its_own(write_template, tmp_path):
    """Its description goes before that of all cohorts; the finest resolution is taken."""
    about = {"Name": "Toys", "Authors": ["Doe J"]}
    write_template(about=about)
    (tmp_path / "tpl-toy" / "tpl-toy_T1w.nii.gz").unlink()
    for cohort in (1, 2):
        begin = f"tpl-toy_cohort-{cohort}_res-"
        folder = write_template(f"tpl-toy/cohort-{cohort}", f"{begin}2", about={"Frame": FRAME})
        write_template(f"tpl-toy/cohort-{cohort}", f"{begin}1", spacing=1.8)
    template = load_template(str(folder))
    assert (template.name, template.label) == ("toy:cohort-2", "toy+2")
    assert template.brain.grid.spacing_mm == pytest.approx(1.8)
    assert template.citation.title == "Toys"
    assert template.frame.ac_mm == (0, 1, 2)
    with pytest.raises(MissingInputError, match="no T1w image") as caught:
        load_template(str(tmp_path / "tpl-toy"))
    assert "cohort-1, cohort-2" in caught.value.remedy


def test_two_templates_in_one_folder_are_not_guessed_between(write_template, tmp_path):
    write_template()
    with pytest.raises(MissingInputError, match="T1w images of other, toy"):
        load_template(str(write_template(begin="tpl-other")))
    with pytest.raises(MissingInputError, match="cannot be read"):
        load_template(str(tmp_path / "tpl-gone"))


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ("origin", "cannot be read"),
        ({"OriginMm": [0, 0, 0]}, "lacks LowMm, HighMm"),
        (FRAME | {"LowMm": [-90, "x", -80]}, "cannot be read"),
        (FRAME | {"LowMm": [-90, -120]}, "cannot be read"),
        (FRAME | {"LowMm": [-80, -120, -80]}, "the frame of toy is"),
        (FRAME | {"HighMm": [90, -90, 100]}, "the frame of toy is"),
        (FRAME | {"HighMm": [90, float("nan"), 100]}, "the frame of toy is"),
        (FRAME | {"OriginMm": [0, 300, 0]}, "outside its brain"),
    ],
)
def test_a_frame_that_cannot_be_is_refused(write_template, frame, said):
    with pytest.raises(DataError, match=said) as caught:
        load_template(str(write_template(about={"Frame": frame})))
    assert caught.value.remedy


def test_a_broken_description_is_not_passed_over(write_template):
    """Its frame would be lost without a word."""
    folder = write_template()
    (folder / "template_description.json").write_text('{"Frame": ')
    for read in (parse_specs, load_template):
        with pytest.raises(DataError, match="no readable JSON"):
            read(str(folder))


def test_a_measured_frame_goes_with_the_brain():
    """Of the embedded template, moved and stretched along its axes: known to 0.1 mm."""
    template = load_template(EMBEDDED)
    assert measured_frame(template.mask) == template.frame
    stretch, shift = np.array([0.9, 0.8, 1.1]), np.array([-5.0, 12, 30])
    affine = np.diag([*stretch, 1]) @ template.mask.grid.affine
    affine[:3, 3] += shift
    frame = measured_frame(Volume(template.mask.data, Grid(template.mask.grid.shape, affine)))
    for ours, theirs, moved in (
        (frame.ac_mm, template.frame.ac_mm, shift),
        (frame.low_mm, template.frame.low_mm, 0),
        (frame.high_mm, template.frame.high_mm, 0),
    ):
        np.testing.assert_allclose(ours, stretch * theirs + moved, atol=0.051)
    assert frame.low_mm[0] == -frame.high_mm[0]


def test_colin27s_measured_frame_is_near_its_marked_one(shared, monkeypatch):
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(shared("templateflow")))
    template = load_template(PREFERRED, offline=True)
    found = measured_frame(template.mask)
    np.testing.assert_allclose(found.ac_mm, template.frame.ac_mm, atol=2)


def test_content_tells_templates_of_one_name_apart(write_template, good):
    """Every image counts, and the frame; where the files lie does not, nor how they are packed."""
    head, mask = whole(good)
    folders = {
        "as it is": write_template("1/tpl-toy", head=head, mask=mask),
        "elsewhere": write_template("2/tpl-toy", head=head.astype(np.float64), mask=mask),
        "image": write_template("3/tpl-toy", head=head + (head > 0), mask=mask),
        "mask": write_template(
            "4/tpl-toy", head=head, mask=mask * (np.indices(mask.shape)[0] > 30)
        ),
        "grid": write_template("5/tpl-toy", head=head, mask=mask, spacing=2.1),
        "frame": write_template("6/tpl-toy", head=head, mask=mask, about={"Frame": FRAME}),
        "labels": write_template("7/tpl-toy", head=head, mask=mask, labels=mask.astype(np.int16)),
    }
    found = {key: load_template(str(folder)).sha256 for key, folder in folders.items()}
    assert found["as it is"] == found["elsewhere"]
    assert len(set(found.values())) == len(found) - 1
    with pytest.raises(UsageError, match="two templates are called toy"):
        load_templates(f"{folders['image']}+{folders['grid']}")


@pytest.mark.parametrize("name", ["a+b", "a:cohort-1", "+", "a b", "tpl-toy"])
def test_folders_of_any_name_can_be_joined(write_template, name, tmp_path, monkeypatch):
    """Absolute or not, whatever signs of ours are in their paths."""
    folder = write_template(f"{name}/tpl-toy")
    other = write_template("other", "tpl-other")
    specs = f"{folder}+{EMBEDDED}+{other}"
    assert parse_specs(specs) == (str(folder), EMBEDDED, str(other))
    monkeypatch.chdir(tmp_path)
    here = f"./{name}/tpl-toy+{EMBEDDED}+./other"
    assert parse_specs(here) == (f"./{name}/tpl-toy", EMBEDDED, "./other")
    loaded = load_templates(here, offline=True)
    assert joint_name(loaded) == f"toy+{EMBEDDED}+other"
    monkeypatch.chdir("/")
    again = load_templates(joint_spec(loaded), offline=True)
    assert [t.sha256 for t in again] == [t.sha256 for t in loaded]
    assert [name for name, _ in own_contents(loaded)] == ["toy", "other"]


def test_what_is_no_template_says_what_would_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="'mine'") as caught:
        parse_specs("mine")
    assert "./mine" in caught.value.remedy
    with pytest.raises(MissingInputError, match=r"no template folder ./gone\+mine"):
        parse_specs(f"{EMBEDDED}+./gone+mine")
    (tmp_path / "t1.nii.gz").touch()
    for file in ("t1.nii.gz", "./t1.nii.gz"):
        with pytest.raises(MissingInputError, match="is a file, not the folder"):
            parse_specs(file)
    # Before anything heavy is imported.
    with pytest.raises(MissingInputError, match="no T1w image"):
        parse_specs("./mine")


def test_a_folder_called_as_a_shipped_template_is_not_taken_for_it(write_template):
    (template,) = load_templates(str(write_template(begin=f"tpl-{PREFERRED}")))
    assert template.name == PREFERRED
    assert own_contents([template]) == ((PREFERRED, template.sha256),)


def test_any_template_of_templateflow_may_be_in_the_cache(home, write_template, good):
    """By name and cohort; it is a head, and its description is TemplateFlow's."""
    head, mask = whole(good)
    with pytest.raises(MissingInputError, match=r"res-1_T1w.nii.gz is not there") as caught:
        load_template("MNIPediatricAsym:cohort-5", offline=True)
    assert "cadiff fetch MNIPediatricAsym:cohort-5" in caught.value.remedy
    write_template(
        "tpl-MNIPediatricAsym/cohort-5", "tpl-MNIPediatricAsym_cohort-5_res-1", head, mask
    )
    (template,) = load_templates("MNIPediatricAsym:cohort-5", offline=True)
    assert (template.name, template.label) == ("MNIPediatricAsym:cohort-5", "MNIPediatricAsym+5")
    assert template.source == "templateflow"
    assert template.head is not None
    assert "https://doi.org/10.1016/j.neuroimage.2010.07.033" in template.citation.links
    assert joint_spec([template]) == template.name
    assert own_contents([template]) == ((template.name, template.sha256),)


def test_files_not_yet_downloaded_are_known(home):
    assert "tpl-MNIInfant_cohort-2_res-1_T1w.nii.gz" in listed("tpl-MNIInfant/cohort-2")
    assert not listed("tpl-MNI153")


@pytest.mark.filterwarnings("ignore:TemplateFlow:ResourceWarning")
def test_queries_find_one_file(home):
    """In the layout of TemplateFlow's own client, which installs it without a network."""
    from templateflow.client import TemplateFlowClient

    client = TemplateFlowClient(root=home, use_datalad=False, autoupdate=False)
    for name in (
        *(str(Path(entry["head"]).name) for entry in registry().values() if "head" in entry),
        "tpl-MNIPediatricAsym_cohort-5_res-1_desc-brain_mask.nii.gz",
        "tpl-fsaverage_res-01_T1w.nii.gz",
    ):
        assert [path.name for path in client.ls(**query_of(name))] == [name]
