"""Images of every kind are read, or refused with a remedy; what is saved is loaded."""

import gzip
import hashlib
import os

import nibabel as nib
import numpy as np
import pytest

from cadiff_cli.errors import CadiffError, DataError, MissingInputError, UnsuitableError
from cadiff_cli.io.formats import stem
from cadiff_cli.io.images import load_scan, load_volume, save_volume
from cadiff_cli.notes import NoteCode, codes_of, texts

SHAPE = (70, 72, 74)


def noise(shape=SHAPE):
    return np.random.default_rng(0).uniform(1, 100, shape).astype(np.float32)


def raw_affine(path, matrix):
    """Overwrite the sform as a damaged header would hold it; nibabel refuses to."""
    image = nib.load(path)
    header = image.header.copy()
    header["qform_code"], header["sform_code"] = 0, 1
    header["srow_x"], header["srow_y"], header["srow_z"] = matrix[:3]
    plain = path.with_name("plain.nii")
    with plain.open("wb") as stream:
        header.set_data_offset(352)
        header["magic"] = b"n+1"
        stream.write(header.binaryblock + b"\0" * 4)
        stream.write(np.asarray(image.dataobj, dtype=header.get_data_dtype()).tobytes(order="F"))
    return plain


def truncated(write):
    path = write(noise())
    path.write_bytes(path.read_bytes()[:20_000])
    return path


def plain_text(write):
    path = write(noise())
    path.write_text("not an image\n")
    return path


def gzipped_text(write):
    path = write(noise())
    path.write_bytes(gzip.compress(b"hello " * 999))
    return path


def zero_bytes(write):
    path = write(noise())
    path.write_bytes(b"")
    return path


def folder(write):
    path = write(noise()).parent / "folder.nii.gz"
    path.mkdir()
    return path


def rgb(write):
    pixel = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    data = np.zeros(SHAPE, dtype=pixel)
    data["R"][20:40] = 9
    return write(data)


def hounsfield(write):
    data = noise() - 1000
    data[20:60, 20:60, 20:60] = 40 + noise((40, 40, 40))
    return write(data)


def flipped_bit(write_image):
    """Most such files can be unpacked; only the checksum tells."""
    path = write_image(noise())
    damaged = bytearray(path.read_bytes())
    damaged[-8] ^= 1  # of the checksum itself: as if any voxel had changed
    path.write_bytes(damaged)
    return path


def cut(path, n):
    path.write_bytes(path.read_bytes()[:-n])
    return path


BAD = {
    "missing": (lambda w: w(noise()).with_name("gone.nii.gz"), MissingInputError),
    "folder": (folder, MissingInputError),
    "text": (plain_text, DataError),
    "gzipped text": (gzipped_text, DataError),
    "other suffix": (lambda w: w(noise()).rename(w(noise()).with_suffix(".png")), DataError),
    "truncated": (truncated, DataError),
    "0 bytes": (zero_bytes, DataError),
    "one bit flipped": (flipped_bit, DataError),
    "no checksum": (lambda w: cut(w(noise()), 8), DataError),
    "2-D": (lambda w: w(noise((70, 72))), UnsuitableError),
    "4-D": (lambda w: w(noise((*SHAPE, 2))), UnsuitableError),
    "zeros": (lambda w: w(np.zeros(SHAPE, dtype=np.float32)), UnsuitableError),
    "constant": (lambda w: w(np.full(SHAPE, 7, dtype=np.int16)), UnsuitableError),
    "only NaN": (lambda w: w(np.full(SHAPE, np.nan, dtype=np.float32)), UnsuitableError),
    "thin": (lambda w: w(noise((3, 72, 74)), np.diag([30.0, 1, 1, 1])), UnsuitableError),
    "thick": (lambda w: w(noise((10, 72, 74)), np.diag([12.0, 1, 1, 1])), UnsuitableError),
    "small": (lambda w: w(noise((40, 72, 74))), UnsuitableError),
    "metres": (lambda w: w(noise(), np.diag([1e-3, 1e-3, 1e-3, 1])), UnsuitableError),
    "huge": (lambda w: w(noise((130, 72, 74)), np.diag([9.0, 1, 1, 1])), UnsuitableError),
    "wide": (lambda w: w(noise((90, 90, 90)), np.diag([9.5, 9.5, 9.5, 1])), UnsuitableError),
    "zero affine": (lambda w: raw_affine(w(noise()), np.zeros((4, 4))), DataError),
    "singular": (lambda w: raw_affine(w(noise()), np.diag([1.0, 1, 0, 1])), DataError),
    "NaN affine": (lambda w: raw_affine(w(noise()), np.diag([1.0, np.nan, 1, 1])), DataError),
    "RGB": (rgb, UnsuitableError),
    "complex": (lambda w: w(noise().astype(np.complex64)), UnsuitableError),
    "CT": (hounsfield, UnsuitableError),
}


def test_an_unknown_type_of_mgh_is_damage(tmp_path):
    """nibabel looks it up in a table."""
    path = tmp_path / "T1.mgh"
    nib.save(nib.MGHImage(noise(), np.eye(4)), path)
    raw = bytearray(path.read_bytes())
    raw[20:24] = (99).to_bytes(4, "big")
    path.write_bytes(raw)
    with pytest.raises(DataError, match="damaged"):
        load_scan(path)


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_scan_is_refused_with_a_remedy(write_image, kind):
    make, error = BAD[kind]
    path = make(write_image)
    with pytest.raises(CadiffError) as caught:
        load_scan(path)
    assert type(caught.value) is error
    assert caught.value.exit_code == (66 if error is MissingInputError else 65)
    assert caught.value.remedy
    assert caught.value.remedy in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "spacing", "words"),
    [
        ((50, 50, 50), 1.0, "50 x 50 x 50 mm, too small a field of view"),
        ((90, 90, 40), 1.0, "a slab or a small infant's head cannot be segmented"),
        (SHAPE, 0.1, "with voxels of 0.1 x 0.1 x 0.1 mm. 60 to 1000 mm a side are allowed: check"),
    ],
)
def test_a_small_field_of_view_is_told_from_a_wrong_voxel_size(write_image, shape, spacing, words):
    with pytest.raises(UnsuitableError, match=words):
        load_scan(write_image(noise(shape), np.diag([spacing, spacing, spacing, 1])))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_too_large_to_be_squared_become_zero(write_image, dtype):
    data = noise().astype(dtype)
    data[3, 4, 5], data[6, 7, 8] = 3e36, -1e30
    scan = load_scan(write_image(data))
    assert scan.t1.data[3, 4, 5] == scan.t1.data[6, 7, 8] == 0
    assert scan.t1.data.max() == np.float32(np.delete(data.ravel(), [data.argmax()]).max())
    with pytest.raises(UnsuitableError, match="absurd"):
        load_scan(write_image((noise() + 1) * dtype(1e34)))


def test_some_nan_becomes_zero_with_a_warning(write_image):
    data = noise()
    data[3, 4, 5], data[6, 7, 8] = np.nan, np.inf
    scan = load_scan(write_image(data))
    assert scan.t1.data[3, 4, 5] == scan.t1.data[6, 7, 8] == 0
    assert any(text.startswith("2 voxels") for text in texts(scan.notes))
    finite = np.isfinite(data)
    np.testing.assert_array_equal(scan.t1.data[finite], data[finite])


def test_coarse_voxels_are_reported(write_image):
    scan = load_scan(write_image(noise((70, 72, 20)), np.diag([1.0, 1, 4, 1])))
    assert NoteCode.COARSE_VOXELS in codes_of(scan.notes)
    assert not load_scan(write_image(noise())).notes


def test_one_volume_in_4d_is_a_scan(write_image):
    data = noise()
    np.testing.assert_array_equal(load_scan(write_image(data[..., None])).t1.data, data)


def test_scaled_integers_are_read_scaled(tmp_path):
    stored = np.random.default_rng(0).integers(-999, 999, SHAPE).astype(np.int16)
    image = nib.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(0.25, 10)
    path = tmp_path / "scaled.nii.gz"
    nib.save(image, path)
    np.testing.assert_allclose(load_volume(path).data, 0.25 * stored + 10)


def test_mgz_is_read(tmp_path):
    path, affine = tmp_path / "T1.mgz", np.diag([-1.0, 1, 1, 1])
    nib.save(nib.MGHImage(noise(), affine), path)
    scan = load_scan(path)
    np.testing.assert_array_equal(scan.t1.data, noise())
    np.testing.assert_allclose(scan.t1.grid.affine, affine)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sub-01_T1w.nii.gz", "sub-01_T1w"),
        ("a.b.nii", "a.b"),
        ("T1.MGZ", "T1"),
        ("scan.NII.GZ", "scan"),
        ("plain", "plain"),
    ],
)
def test_stem_drops_image_suffixes_only(tmp_path, name, expected):
    assert stem(tmp_path / name) == expected


@pytest.mark.parametrize("codes", [(1, 1), (1, 4), (0, 2), (3, 0)])
def test_saving_keeps_both_forms_bit_for_bit(write_image, tmp_path, grid_of, codes):
    """A viewer that prefers either form must overlay labels and scan alike."""
    affine = grid_of("oblique", (1.0, 1.1, 0.9)).affine
    source = write_image(noise(), affine)
    image = nib.load(source)
    other = affine.copy()
    other[:3, 3] += 3
    image.set_qform(other, code=codes[0])
    image.set_sform(affine, code=codes[1])
    image.header["descrip"] = b"a name that must not travel"
    image.header.set_slope_inter(1, 0)
    like = tmp_path / "like.nii.gz"
    nib.save(image, like)

    out = tmp_path / "out.nii.gz"
    save_volume(out, np.ones(SHAPE, dtype=np.int16), load_volume(like).grid, like=like)
    before, after = nib.load(like), nib.load(out)
    for key in (
        *("qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "pixdim"),
        *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    ):
        np.testing.assert_array_equal(before.header[key], after.header[key], err_msg=key)
    assert before.header.get_xyzt_units()[0] == "unknown"
    assert after.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(before.affine, after.affine)
    assert after.get_data_dtype() == np.int16
    assert after.header["descrip"].item() == b""


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.float16, np.float32])
def test_what_is_saved_is_loaded(tmp_path, grid_of, orientation, dtype):
    grid = grid_of(orientation, 8.0)
    data = np.random.default_rng(0).integers(0, 2, grid.shape).astype(dtype)
    save_volume(tmp_path / "x.nii.gz", data, grid)
    back = load_volume(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(back.data, data)
    np.testing.assert_allclose(back.grid.affine, grid.affine, atol=1e-5)
    codes = nib.load(tmp_path / "x.nii.gz").header
    assert codes["qform_code"] == codes["sform_code"] == 1


def test_labels_on_an_mgz_scan_keep_its_affine(tmp_path, grid_of):
    grid = grid_of("LPS", 2.5)
    like = tmp_path / "T1.mgz"
    nib.save(nib.MGHImage(np.ones(grid.shape, dtype=np.float32), grid.affine), like)
    save_volume(tmp_path / "x.nii.gz", np.ones(grid.shape, np.int16), grid, like=like)
    np.testing.assert_allclose(nib.load(tmp_path / "x.nii.gz").affine, grid.affine, atol=1e-5)


@pytest.mark.parametrize(
    ("codes", "mirror", "word"),
    [((0, 0), False, "guess"), ((1, 1), True, "disagree"), ((1, 1), False, None)],
)
def test_doubts_about_left_and_right_are_told(phantom, tmp_path, codes, mirror, word):
    head = phantom("RAS", 4.0)
    image = nib.Nifti1Image(head.t1.data, head.t1.grid.affine)
    other = np.diag([-1.0, 1, 1, 1]) @ head.t1.grid.affine if mirror else head.t1.grid.affine
    image.set_sform(head.t1.grid.affine, codes[0])
    image.set_qform(other, codes[1])
    path = tmp_path / "sub-01_T1w.nii.gz"
    nib.save(image, path)
    text = " ".join(t for t in texts(load_scan(path).notes) if "left and right" in t)
    assert (word in text) if word else not text


def test_forms_that_are_the_same_do_not_disagree_at_45_degrees(phantom, tmp_path):
    """Letters of axes are a tie there, which rounding decides."""
    head = phantom("RAS", 4.0)
    for degrees in (44.9999, 45.0, 45.0001):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        turn = np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]])
        for flip in (1, -1):
            affine = turn @ np.diag([flip, 1, 1, 1]) @ head.t1.grid.affine
            image = nib.Nifti1Image(head.t1.data, affine)
            image.set_sform(affine, 1)
            image.set_qform(affine, 1)
            nib.save(image, tmp_path / "sub-01_T1w.nii.gz")
            notes = load_scan(tmp_path / "sub-01_T1w.nii.gz").notes
            assert not [note for note in notes if note.code is NoteCode.HEADER_ORIENTATION]


@pytest.mark.parametrize("told", [False, True])
def test_a_qform_that_lies_elsewhere_is_told(phantom, tmp_path, told):
    """ITK may read it, and then our transforms do not fit; half a voxel is a rounding."""
    head = phantom("RAS", 4.0)
    image = nib.Nifti1Image(head.t1.data, head.t1.grid.affine)
    other = head.t1.grid.affine.copy()
    other[:3, 3] += (0, 25, 0) if told else (0, 0.1, 0)
    image.set_sform(head.t1.grid.affine, 2)
    image.set_qform(other, 1)
    nib.save(image, tmp_path / "sub-01_T1w.nii.gz")
    said = [
        text for text in texts(load_scan(tmp_path / "sub-01_T1w.nii.gz").notes) if "ITK" in text
    ]
    assert len(said) == told
    assert all("25.0 mm" in text for text in said)


def test_two_statements_of_a_voxels_size_are_told(phantom, tmp_path):
    """A stretched sform over an honest qform makes every volume too large."""
    head = phantom("RAS", 4.0)
    image = nib.Nifti1Image(head.t1.data, head.t1.grid.affine)
    path = tmp_path / "sub-01_T1w.nii.gz"
    nib.save(image, path)
    assert NoteCode.HEADER_SIZES not in codes_of(load_scan(path).notes)
    image.set_sform(head.t1.grid.affine @ np.diag([1.1, 1.0, 1.0, 1.0]), 4)
    nib.save(image, path)
    (said,) = (text for text in texts(load_scan(path).notes) if "pixdim" in text)
    assert "4.4" in said


def test_signed_intensities_are_no_ct(phantom, tmp_path):
    """MP2RAGE's air is salt and pepper around 0."""
    head = phantom("RAS", 4.0)
    rng = np.random.default_rng(0)
    air = rng.uniform(-2048, 2048, head.t1.data.shape)
    path = tmp_path / "sub-01_T1w.nii.gz"
    save_volume(path, np.where(head.codes > 0, 800, air).astype(np.float32), head.t1.grid)
    assert load_scan(path).t1.data.min() < -1500


def test_time_and_slices_of_the_scan_are_not_inherited(phantom, tmp_path):
    head = phantom("RAS", 4.0)
    image = nib.Nifti1Image(head.t1.data[..., None], head.t1.grid.affine)
    image.header["pixdim"][4], image.header["slice_end"] = 2.3, 30
    image.header["toffset"], image.header["intent_p1"] = 5, 7
    path = tmp_path / "in.nii.gz"
    nib.save(image, path)
    save_volume(
        tmp_path / "out.nii.gz", np.zeros((*head.t1.grid.shape, 2), np.float32), head.t1.grid, path
    )
    header = nib.load(tmp_path / "out.nii.gz").header
    assert header["pixdim"][4] == 1
    assert not any(header[key] for key in ("slice_end", "toffset", "intent_p1"))


def test_a_quaternion_that_is_none_leaves_the_sform_to_be_believed(write_image):
    path = write_image(noise(), name="scan.nii")
    image = nib.load(path)
    header = image.header.copy()
    header["quatern_b"] = header["quatern_c"] = header["quatern_d"] = 0.9
    header["qform_code"], header["sform_code"] = 1, 1
    raw = bytearray(path.read_bytes())
    raw[: header.structarr.nbytes] = header.structarr.tobytes()
    path.write_bytes(raw)
    scan = load_scan(path)
    np.testing.assert_allclose(scan.t1.grid.affine, image.affine)
    assert any("sform is believed" in text for text in texts(scan.notes))


@pytest.mark.parametrize("turn", [np.diag([-1, -1, 1, 1]), np.eye(4)[[0, 2, 1, 3]]])
def test_two_statements_of_how_a_scan_lies_are_told(phantom, tmp_path, turn):
    """Both right-handed, or both left-handed: the determinant alone says nothing."""
    head = phantom("RAS", 2.0)
    path = tmp_path / "turned.nii.gz"
    image = nib.Nifti1Image(head.t1.data, head.t1.grid.affine)
    image.set_sform(head.t1.grid.affine, code=1)
    image.set_qform(head.t1.grid.affine @ turn, code=1)
    nib.save(image, path)
    assert any("disagree" in text for text in texts(load_scan(path).notes))


def test_a_qform_that_is_not_a_number_is_told(phantom, tmp_path):
    head = phantom("RAS", 2.0)
    path = tmp_path / "nan.nii.gz"
    image = nib.Nifti1Image(head.t1.data, head.t1.grid.affine)
    image.set_sform(head.t1.grid.affine, code=1)
    image.set_qform(head.t1.grid.affine, code=1)
    image.header["qoffset_x"] = np.nan
    nib.save(image, path)
    assert any("no rotation" in text for text in texts(load_scan(path).notes))


def test_a_unit_that_nifti_does_not_define_is_millimetres(write_image, tmp_path):
    image = nib.load(write_image(noise()))
    image.header["xyzt_units"] = 4
    path, out = tmp_path / "odd.nii.gz", tmp_path / "out.nii.gz"
    nib.save(image, path)
    scan = load_scan(path)
    save_volume(out, scan.t1.data, scan.t1.grid, like=path)
    assert nib.load(out).header.get_xyzt_units()[0] == "mm"


def test_an_mgh_that_does_not_say_how_it_lies_is_told(tmp_path):
    path = tmp_path / "scan.mgh"
    nib.save(nib.MGHImage(noise(), np.diag([2.0, 2, 2, 1])), path)
    assert not load_scan(path).notes
    content = bytearray(path.read_bytes())
    content[28:30] = b"\0\0"  # goodRASFlag
    path.write_bytes(content)
    (note,) = load_scan(path).notes
    assert note.code == NoteCode.HEADER_ORIENTATION
    assert "left and right are a guess" in note.text


def test_an_open_image_does_not_change_with_its_file(tmp_path):
    path = tmp_path / "plain.nii"
    nib.save(nib.Nifti1Image(noise(), np.eye(4)), path)
    volume = load_volume(path)
    before = volume.data.copy()
    path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(volume.data, before)


def test_a_name_that_no_file_system_takes_is_a_missing_input(tmp_path):
    with pytest.raises(MissingInputError):
        load_volume(tmp_path / f"{'x' * 300}.nii.gz")


def test_a_pipe_is_not_waited_for(tmp_path):
    path = tmp_path / "scan.nii.gz"
    os.mkfifo(path)
    with pytest.raises(MissingInputError, match="pipe"):
        load_volume(path)


def test_a_scan_knows_which_file_it_was(write_image):
    path = write_image(noise())
    scan = load_scan(path)
    was = scan.sha256
    assert was == hashlib.sha256(path.read_bytes()).hexdigest()
    write_image(noise() + 1)
    assert load_scan(path).sha256 != was
