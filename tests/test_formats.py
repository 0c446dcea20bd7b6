"""What a file holds counts, not what its name says; what is no image is named, with a way out."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import nibabel as nib
import numpy as np
import pytest

from cadiff_cli.errors import DataError, MissingInputError
from cadiff_cli.io.formats import check_there
from cadiff_cli.io.images import load_scan, load_volume, save_volume
from cadiff_cli.notes import NoteCode, codes_of, texts

SHAPE = (31, 32, 33)
AFFINE = np.array([[-2.0, 0, 0, 30], [0, 2.2, 0, -40], [0, 0, 2.4, -20], [0, 0, 0, 1]])
DATA = np.random.default_rng(0).integers(0, 99, SHAPE).astype(np.int16)
KINDS = {"NIfTI-1": nib.Nifti1Image, "NIfTI-2": nib.Nifti2Image, "MGH": nib.MGHImage}
RAW = {
    name: kind(DATA.astype(np.float32) if name == "MGH" else DATA, AFFINE).to_bytes()
    for name, kind in KINDS.items()
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mgh", ".mgz", ".NII.GZ"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("kind", RAW)
def test_content_counts_whatever_the_suffix_says(tmp_path, kind, pack, suffix):
    path = tmp_path / f"scan{suffix}"
    path.write_bytes(pack(RAW[kind]))
    scan = load_scan(path)
    np.testing.assert_array_equal(scan.t1.data, DATA)
    np.testing.assert_allclose(scan.t1.grid.affine, AFFINE, atol=1e-6)
    assert not scan.notes

    save_volume(tmp_path / "out.nii.gz", DATA, scan.t1.grid, like=path)
    out = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(out.affine, AFFINE, atol=1e-5)
    assert isinstance(out, nib.Nifti2Image) == (kind == "NIfTI-2")


@pytest.mark.parametrize("order", ["<", ">"])
def test_either_byte_order_is_read(tmp_path, order):
    path = tmp_path / "scan.nii.gz"
    header = nib.Nifti1Header(endianness=order)
    path.write_bytes(gzip.compress(nib.Nifti1Image(DATA, AFFINE, header).to_bytes()))
    np.testing.assert_array_equal(load_volume(path).data, DATA)


MEMBERS = {
    "one": gzip.compress(RAW["NIfTI-1"], mtime=0),
    "several": b"".join(
        gzip.compress(RAW["NIfTI-1"][i : i + 20_000], mtime=0)
        for i in range(0, len(RAW["NIfTI-1"]), 20_000)
    ),
}


@pytest.mark.parametrize("members", MEMBERS)
@pytest.mark.parametrize(
    ("tail", "doubtful"),
    [
        (b"", False),
        (bytes(999), False),
        (gzip.compress(b"more", mtime=0), False),
        (b"junk", True),
        (b"\x1f\x8bjunk", True),
        (b"\x1f", True),
        (bytes(9) + b"junk", True),
    ],
)
def test_what_follows_a_whole_image_does_not_spoil_it(tmp_path, members, tail, doubtful):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(MEMBERS[members] + tail)
    scan = load_scan(path)
    np.testing.assert_array_equal(scan.t1.data, DATA)
    codes = [note.code for note in scan.notes]
    assert codes == [NoteCode.TRAILING_BYTES] * doubtful


@pytest.mark.parametrize("members", MEMBERS)
@pytest.mark.parametrize("tail", [b"", b"junk", gzip.compress(b"more", mtime=0)])
def test_junk_does_not_hide_damage(tmp_path, members, tail):
    path = tmp_path / "scan.nii.gz"
    whole = MEMBERS[members]
    wrong_sum = whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]
    for damaged in (whole[:-9], whole[:-1], wrong_sum):
        path.write_bytes(damaged + tail)
        with pytest.raises(DataError, match="damaged or truncated"):
            load_scan(path)


def zipped():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("scan.nii", RAW["NIfTI-1"])
    return stream.getvalue()


def tarred():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo("scan.nii")
        info.size = len(RAW["NIfTI-1"])
        archive.addfile(info, io.BytesIO(RAW["NIfTI-1"]))
    return stream.getvalue()


def analyze():
    image = nib.AnalyzeImage(DATA, AFFINE)
    files = {key: nib.FileHolder(fileobj=io.BytesIO()) for key in ("header", "image")}
    image.to_file_map(files)
    return files["header"].fileobj.getvalue()


FOREIGN = {
    "bzip2": (
        bz2.compress(RAW["NIfTI-1"]),
        "rename it to scan.nii.bz2, and unpack it: bunzip2 scan.nii.bz2",
    ),
    "xz": (lzma.compress(RAW["NIfTI-1"]), "unxz scan.nii.xz"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(99), "zstd -d scan.nii.zst"),
    "gzip-compressed twice": (gzip.compress(MEMBERS["one"], mtime=0), "gunzip scan.nii.gz.gz"),
    "zip": (zipped(), "unzip"),
    "tar": (tarred(), "tar xf"),
    "DICOM": (bytes(128) + b"DICM\x02\x00", "dcm2niix"),
    "Analyze": (analyze(), "mri_convert scan.img scan.nii.gz"),
    "half of a NIfTI pair": (RAW["NIfTI-1"].replace(b"n+1", b"ni1", 1), "mri_convert"),
    "NRRD": (b"NRRD0004\ntype: short\n", "ConvertImage"),
    "MetaImage": (b"ObjectType = Image\nNDims = 3\n", "ConvertImage"),
    "MINC": (b"\x89HDF\r\n\x1a\n" + bytes(99), "mnc2nii scan.mnc scan.nii"),
    "MRtrix": (b"mrtrix image\ndim: 2,2,2\n", "mrconvert scan.mif scan.nii.gz"),
    "web page": (b"\n<!DOCTYPE html><title>Log in</title>", "download it again"),
    "picture": (b"\x89PNG\r\n\x1a\n", "give the scan itself"),
    "zeros": (bytes(9999), "copy it again"),
    "text": (b"404: not found\n", "give the scan itself"),
    "empty": (b"", "download it again"),
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_image_is_named_with_a_way_out(tmp_path, what, pack):
    content, remedy = FOREIGN[what]
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(pack(content))
    with pytest.raises(DataError) as caught:
        load_scan(path)
    assert what in caught.value.message
    assert remedy in caught.value.remedy
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "tool"),
    [
        (".img", "mri_convert"),
        (".hdr", "mri_convert"),
        (".nii.zst", "zstd -d"),
        (".nrrd", "ConvertImage"),
        (".mnc", "mnc2nii"),
        (".mif.gz", "mrconvert"),
        (".DCM", "dcm2niix"),
        (".BRIK", "3dAFNItoNIFTI"),
        (".xyz", r"give \.nii\.gz"),
    ],
)
@pytest.mark.parametrize("content", [b"\1\2\3 no signature", bytes(9999)], ids=["?", "air"])
def test_a_name_tells_what_the_content_does_not(tmp_path, suffix, tool, content):
    path = tmp_path / f"scan{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=tool):
        load_volume(path)


def test_an_image_by_another_name_is_to_be_renamed(tmp_path):
    path = tmp_path / "scan.dat"
    path.write_bytes(RAW["NIfTI-1"])
    with pytest.raises(DataError, match="rename it"):
        load_volume(path)


KEY = "annex/objects/MD5E-s9--0cc175b9c0f1b6a831c399e269772661.nii.gz"


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (f"/{KEY}\n", "datalad get scan.nii.gz, or git annex get"),
        (f"../.git/{KEY}", "datalad get"),  # a link where the file system knows none
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    ],
)
def test_a_pointer_is_no_damage(tmp_path, content, remedy):
    path = tmp_path / "scan.nii.gz"
    path.write_text(content)
    for read in (check_there, load_volume):
        with pytest.raises(MissingInputError, match="its content is not here") as caught:
            read(path)
        assert remedy in caught.value.remedy


def test_a_link_to_nothing_tells_where_it_leads(tmp_path):
    annexed, other = tmp_path / "annexed.nii.gz", tmp_path / "other.nii.gz"
    annexed.symlink_to(f"../.git/annex/objects/x/{KEY}")
    other.symlink_to("elsewhere.nii.gz")
    with pytest.raises(MissingInputError, match=r"git-annex pointer.*datalad get annexed"):
        load_volume(annexed)
    with pytest.raises(MissingInputError, match=r"link to nothing \(elsewhere"):
        load_volume(other)


def written(path, bcd, codes, affine=AFFINE):
    """An image whose header holds this quaternion, as nibabel would not write it."""
    header = nib.Nifti1Image(DATA, affine).header
    header.set_sform(affine, code=codes[1])
    header["qform_code"], header["pixdim"][0] = codes[0], 1
    header["quatern_b"], header["quatern_c"], header["quatern_d"] = bcd
    header["magic"], header["vox_offset"] = b"n+1", 352
    path.write_bytes(header.binaryblock + bytes(4) + DATA.tobytes(order="F"))
    return path


@pytest.mark.parametrize(
    ("length", "told"), [(1 + 3e-7, False), (1.0005, False), (1.01, True), (1.56, True)]
)
def test_a_quaternion_longer_than_1_is_a_rotation(tmp_path, length, told):
    """180 degrees about (1, 1, 1): each axis becomes 2/3 of the sum of all, less itself."""
    path = written(tmp_path / "scan.nii", [length / np.sqrt(3)] * 3, (1, 0))
    scan = load_scan(path)
    turn = np.full((3, 3), 2 / 3) - np.eye(3)
    np.testing.assert_allclose(
        scan.t1.grid.affine[:3, :3], turn @ np.diag([2, 2.2, 2.4]), atol=1e-6
    )
    assert (NoteCode.HEADER_ORIENTATION in codes_of(scan.notes)) is told

    save_volume(tmp_path / "out.nii.gz", DATA, scan.t1.grid, like=path)
    np.testing.assert_allclose(
        nib.load(tmp_path / "out.nii.gz").affine, scan.t1.grid.affine, atol=1e-6
    )


def test_sform_is_believed_over_any_quaternion(tmp_path):
    scan = load_scan(written(tmp_path / "scan.nii", [0.9] * 3, (1, 1)))
    np.testing.assert_allclose(scan.t1.grid.affine, AFFINE, atol=1e-6)
    assert any("sform is believed" in text for text in texts(scan.notes))
