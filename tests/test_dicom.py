"""A folder of DICOM files is segmented as the image in it, and its names stay where they are."""

import gzip

import dicom_series
import numpy as np
import pytest
from dicom_series import BIRTH, DAY, ID, NAME, TIME, write_series

from cadiff_cli.cli import cadiff, guarded
from cadiff_cli.errors import DataError, MissingInputError, OutputError, UsageError
from cadiff_cli.io import dicom
from cadiff_cli.io.dicom import IS_OTHER, IS_T1, convert
from cadiff_cli.io.images import load_scan


@pytest.fixture(scope="module")
def head(phantom):
    """A brain of 0.7 times the size: larger than the smallest field of view of a head."""
    return phantom("LPS", (2.5, 2.5, 3.0), scale=0.7)


@pytest.fixture(scope="module")
def folder(head, tmp_path_factory):
    """An examination: localizer, T1, T2; the folder is named after the person."""
    pytest.importorskip("dcm2niix", reason="dcm2niix is not installed (cadiff[dicom])")
    place = tmp_path_factory.mktemp("dicom") / "MUSTERMANN_ERIKA"
    data = (10 * head.t1.data).astype(np.uint16)
    for number, title in ((1, "localizer"), (3, "t1_mprage_sag"), (4, "t2_space")):
        part = data[..., :20] if number == 1 else data
        write_series(place / f"S{number}", part, head.t1.grid.affine, number, title)
    return place


def test_the_t1_of_an_examination_is_found_where_it_lies(folder, head, tmp_path):
    path = tmp_path / "sub-01_T1w.nii.gz"
    assert convert(folder, None, path, overwrite=False) == "series 3 't1_mprage_sag' of 3"
    scan = load_scan(path)
    there = np.argwhere(scan.t1.data == scan.t1.data.max())[0]
    here = np.argwhere(head.t1.data == head.t1.data.max())[0]
    np.testing.assert_allclose(scan.t1.grid.to_world(there), head.t1.grid.to_world(here), atol=0.01)
    assert scan.t1.data.sum() == pytest.approx((10 * head.t1.data).astype(np.uint16).sum())
    # The same again is no other scan; another one is.
    convert(folder, 3, path, overwrite=False)
    half = tmp_path / "half"
    data = (5 * head.t1.data).astype(np.uint16)
    write_series(half, data, head.t1.grid.affine, 3, "t1_mprage_sag")
    with pytest.raises(OutputError, match="another scan"):
        convert(half, None, path, overwrite=False)


def test_where_it_is_not_clear_the_series_are_listed(folder, head, tmp_path):
    path = tmp_path / "sub-01_T1w.nii.gz"
    with pytest.raises(UsageError, match="no series 7") as caught:
        convert(folder, 7, path, overwrite=False)
    for title in ("1 'localizer'", "3 't1_mprage_sag'", "4 't2_space'"):
        assert title in caught.value.remedy
    with pytest.raises(UsageError, match="no series looks") as caught:
        convert(folder / "S4", None, path, overwrite=False)
    assert "--series" in caught.value.remedy
    convert(folder / "S4", 4, path, overwrite=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no DICOM"):
        convert(tmp_path / "empty", None, path, overwrite=False)


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("lost", [(20,), range(15, 20)])
def test_a_head_without_some_of_its_slices_is_refused(folder, head, tmp_path, bits, lost):
    """It would be shorter than the head, and nothing would tell."""
    data = (10 * head.t1.data).astype(np.uint16)
    place = tmp_path / "S3"
    write_series(place, data, head.t1.grid.affine, 3, "t1_mprage_sag", bits=bits)
    path = tmp_path / "sub-01_T1w.nii.gz"
    convert(place, None, path, overwrite=False)
    files = sorted(place.iterdir())
    for k in lost:
        files[k].unlink()
    for wanted in (None, 3):
        with pytest.raises((DataError, UsageError)) as caught:
            convert(place, wanted, path, overwrite=True)
        if wanted is None:
            assert "are missing, or unevenly spaced" in str(caught.value)
    assert load_scan(path).t1.grid.shape == head.t1.grid.shape


def test_no_name_and_no_date_is_in_any_result(folder, tiny_weights, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        *("seg", str(folder), "-o", str(out), "--model", str(tiny_weights), "--offline"),
        *("--registration", "none", "--template", "MNI152NLin2009aSym", "--skull-strip", "none"),
        *("--steps", "1", "--no-flip", "--subject", "A7"),
    ]
    assert guarded(lambda: cadiff.main(arguments, standalone_mode=False)) == 0
    assert "series 3 't1_mprage_sag' of 3" in capsys.readouterr().err
    assert [*out.rglob("sub-A7_seg-cadiff_desc-structures_dseg.nii.gz")]
    name = NAME.split("^")[0]
    secrets = (name, name.upper(), ID, BIRTH, DAY, "2020-03-04", TIME[:9], dicom_series.ROOT)
    paths = [path for path in out.rglob("*") if path.is_file()]
    assert len(paths) > 20
    for path in paths:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        for secret in secrets:
            assert secret not in path.name
            assert secret.encode() not in content, path.name


def test_a_refused_command_leaves_the_scan_of_an_earlier_one(folder, tmp_path, capsys):
    """And writes none beside results that it may not replace."""

    def call(*options):
        arguments = ["seg", str(folder), "-o", str(out), "--offline", *options]
        return guarded(lambda: cadiff.main(arguments, standalone_mode=False))

    out = tmp_path / "out"
    assert call("--template", "nosuch") == 64
    assert not (out / "sourcedata").exists()
    source = out / "sourcedata" / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    source.parent.mkdir(parents=True)
    source.write_bytes(b"another scan")
    assert call("--overwrite", "--template", "nosuch") == 64
    assert call("--overwrite", "--mask", str(folder / "absent.nii")) == 66
    mask = out / "sub-01" / "anat" / "sub-01_desc-brain_mask.nii.gz"
    mask.parent.mkdir(parents=True)
    mask.touch()
    assert call("--overwrite", "--template", "conditional") == 64
    assert call("--overwrite", "--model", "nosuch") == 66
    assert call("--overwrite", "--ranges", str(tmp_path / "absent.json")) == 66
    assert source.read_bytes() == b"another scan"
    source.unlink()
    assert call("--subject", "sub-01") == 73
    assert "there already" in capsys.readouterr().err
    assert not source.exists()


@pytest.mark.parametrize(
    "name",
    ["t1_mprage_sag_p2_iso", "MPRAGE", "Sag T1 3D", "AX BRAVO", "3D_TFE", "FSPGR", "WIP T1w"],
)
def test_names_of_t1_series(name):
    assert IS_T1.search(name)
    assert not IS_OTHER.search(name)


@pytest.mark.parametrize(
    "name", ["t2_tse", "FLAIR", "localizer", "ep2d_diff", "T1 map", "mp2rage_inv1", "TOF_3D"]
)
def test_names_of_other_series(name):
    assert IS_OTHER.search(name) or not IS_T1.search(name)


def test_without_dcm2niix_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "find_spec", lambda _name: None)
    monkeypatch.setattr(dicom.shutil, "which", lambda _name: None)
    monkeypatch.setattr(dicom.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(MissingInputError, match="dcm2niix") as caught:
        convert(tmp_path, None, tmp_path / "x.nii.gz", overwrite=False)
    assert "cadiff[dicom]" in caught.value.remedy
