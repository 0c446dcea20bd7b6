"""Templates: the embedded one always loads, and damaged downloads say what to do."""

import gzip
import shutil
import sys
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from cadiff_cli.cli.fetch import command as fetch
from cadiff_cli.errors import CadiffError, DataError, MissingInputError, UsageError
from cadiff_cli.io import templates
from cadiff_cli.io.templates import (
    EMBEDDED,
    PREFERRED,
    joint_name,
    load_template,
    load_templates,
    parse_names,
    registry,
    templateflow_home,
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def install(home):
    """Put image and mask of the preferred template into an empty cache."""

    def write(head, mask, spacing=2.0):
        for part, data in (("head", head), ("mask", mask)):
            path = home / registry()[PREFERRED][part]
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


def test_the_embedded_template_needs_nothing():
    template = load_template(EMBEDDED, offline=True)
    inside = template.mask.data
    litres = np.count_nonzero(inside) * template.mask.grid.voxel_volume_mm3 / 1e6
    assert 1 < litres < 2.2
    assert (template.brain.data[~inside] == 0).all()
    assert template.head is None
    assert not template.warnings
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
    assert parse_names("auto") == ("auto",)
    assert parse_names(f"{EMBEDDED}+{PREFERRED}+{EMBEDDED}") == (EMBEDDED, PREFERRED)
    for names in (f"{EMBEDDED}+MNI153", f"auto+{EMBEDDED}", ""):
        with pytest.raises(UsageError, match="unknown template"):
            parse_names(names)
    names = f"{EMBEDDED}+{PREFERRED}"
    assert joint_name(load_templates(names, offline=True)) == names


def test_an_installed_template_loads(install, good):
    head, mask = good
    install(head, mask)
    template, embedded = load_templates("auto", offline=True)
    assert (template.name, embedded.name) == (PREFERRED, EMBEDDED)
    assert not template.warnings + embedded.warnings
    np.testing.assert_array_equal(template.mask.data, mask > 0)
    np.testing.assert_array_equal(template.brain.data, np.where(mask > 0, head, 0))


def test_auto_falls_back_and_says_so(home):
    (template,) = load_templates("auto", offline=True)
    assert template.name == EMBEDDED
    (warning,) = template.warnings
    assert PREFERRED in warning
    assert "offline" in warning


def test_a_cache_that_may_not_be_read_is_as_none(home, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(templates, "_is_there", refuse)
    (template,) = load_templates("auto", offline=True)
    assert template.name == EMBEDDED
    assert "Permission denied" in template.warnings[0]


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
    assert fallback.warnings


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
    monkeypatch.setattr(templates, "_reachable", lambda: True)
    with pytest.raises(MissingInputError, match="ConnectionError") as caught:
        load_template(PREFERRED)
    assert "cadiff fetch" in caught.value.remedy
    assert (home / "tpl-other").is_dir()  # what whoever else uses the cache has to find there


def test_without_a_network_the_client_is_not_asked(home, monkeypatch):
    """It would try for most of a minute."""
    monkeypatch.setitem(sys.modules, "templateflow.client", None)  # importing it would fail
    monkeypatch.setattr(templates, "_reachable", lambda: False)
    with pytest.raises(MissingInputError, match="no network"):
        load_template(PREFERRED)
    (fallback,) = load_templates("auto")
    assert fallback.name == EMBEDDED
    assert "no network" in fallback.warnings[0]


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
    monkeypatch.setattr(templates, "_reachable", lambda: True)


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
    monkeypatch.setattr(templates, "_reachable", lambda: False)
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
