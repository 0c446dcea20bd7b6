"""Recognise kinds of files by first bytes and name; tell how to convert foreign ones."""

import gzip
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from cadiff_cli.errors import MissingInputError

HEAD_BYTES = 1024
"""Number of first bytes that identify the kind of a file."""
GZIP = b"\x1f\x8b"
Stream = gzip.GzipFile | BufferedReader
IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mgz", ".mgh")

_POINTERS = (
    (rb"[ -~]*/annex/objects/", "git-annex", "datalad get {name}, or git annex get {name}"),
    (rb"version https?://git-lfs", "git-LFS", "git lfs pull"),
)


class _Format(NamedTuple):
    """A kind of file that cadiff does not read; ``signature`` is a pattern for its first bytes."""

    kind: str
    signature: bytes
    suffixes: tuple[str, ...]
    remedy: str


_UNPACK, _CONVERT = "unpack it: {0} {{name}}", "convert it: {0}"
_ANTS = _CONVERT.format("ConvertImage 3 {name} {stem}.nii.gz (of ANTs)")
_AGAIN = "download it again"
_TEXT = _Format("text", rb"[\t\n\r -~\x80-\xff]+\Z", (), "give the scan itself")
_FORMATS = (
    _Format(
        "zstd-compressed", rb"\x28\xb5\x2f\xfd", (".nii.zst", ".zst"), _UNPACK.format("zstd -d")
    ),
    _Format("bzip2-compressed", rb"BZh[1-9]", (".nii.bz2", ".bz2"), _UNPACK.format("bunzip2")),
    _Format("xz-compressed", rb"\xfd7zXZ\0", (".nii.xz", ".xz"), _UNPACK.format("unxz")),
    _Format("gzip-compressed twice", GZIP, (".nii.gz.gz",), _UNPACK.format("gunzip")),
    _Format("a zip archive", rb"PK(\x03\x04|\x05\x06)", (".zip",), _UNPACK.format("unzip")),
    _Format(
        "a tar archive", rb".{257}ustar", (".tar", ".tar.gz", ".tgz"), _UNPACK.format("tar xf")
    ),
    _Format(
        "DICOM",
        rb".{128}DICM",
        (".dcm", ".ima", ".dicom"),
        "give the folder of all its slices to cadiff-seg, or convert it: dcm2niix -z y FOLDER",
    ),
    _Format(
        "Analyze 7.5 or one half of a NIfTI pair",
        rb"\x5c\x01\0\0|\0\0\x01\x5c|\x1c\x02\0\0|\0\0\x02\x1c",
        (".hdr", ".img", ".hdr.gz", ".img.gz"),
        _CONVERT.format("mri_convert {stem}.img {stem}.nii.gz (of FreeSurfer)"),
    ),
    _Format("NRRD", rb"NRRD", (".nrrd", ".nhdr"), _ANTS),
    _Format("MetaImage", rb"(ObjectType|NDims) *=", (".mha", ".mhd"), _ANTS),
    _Format(
        "MINC or other HDF5",
        rb"CDF[\x01\x02\x05]|\x89HDF\r\n",
        (".mnc", ".mnc.gz"),
        _CONVERT.format("mnc2nii {name} {stem}.nii"),
    ),
    _Format(
        "an MRtrix image",
        rb"mrtrix image",
        (".mif", ".mif.gz", ".mih"),
        _CONVERT.format("mrconvert {name} {stem}.nii.gz"),
    ),
    _Format(
        "an AFNI image",
        rb"\s*type *= *\S+-attribute",
        (".head", ".brik", ".brik.gz"),
        _CONVERT.format("3dAFNItoNIFTI {name}"),
    ),
    _Format("Philips PAR/REC", rb"# === DATA DESCR", (".par", ".rec"), _CONVERT.format("dcm2niix")),
    _Format(
        "a web page",
        rb"\s*(?i:<!doctype|<html|<\?xml|<head)",
        (".html", ".htm"),
        f"{_AGAIN}: the server wanted a log-in, or answered with an error",
    ),
    _Format(
        "a picture",
        rb"\x89PNG|\xff\xd8\xff|GIF8|%PDF",
        (".png", ".jpg", ".jpeg", ".gif", ".pdf"),
        "give the scan itself",
    ),
    _Format("nothing but zeros", rb"\0+\Z", (), f"copy it again, or {_AGAIN}"),
    _TEXT,
)


def pointer(name: str, head: bytes) -> tuple[str, str] | None:
    """Message and remedy for a file whose content git keeps elsewhere; None for other files."""
    for signature, system, remedy in _POINTERS:
        if re.match(signature, head):
            message = f"{name} is a {system} pointer: its content is not here"
            return message, f"fetch it: {remedy.format(name=name)}"
    return None


def foreign(name: str, stem: str, head: bytes = b"") -> tuple[str, str] | None:
    """Message and remedy for a file that is not NIfTI or MGH; None if its kind is unknown.

    The first bytes decide, else the name.  The remedy converts the file to NIfTI.
    """
    by_content = (f for f in _FORMATS if re.match(f.signature, head, re.DOTALL))
    by_name = (f for f in _FORMATS if f.suffixes and name.lower().endswith(f.suffixes))
    format_ = next(by_content, None)
    if format_ is None or not format_.suffixes:  # air, or a header in words, begins many a file
        is_image = name.lower().endswith(IMAGE_SUFFIXES)
        format_ = next(by_name, format_ if is_image or format_ is _TEXT else None)
    if format_ is None:
        return None
    remedy, proper_name = format_.remedy, name
    if "{" in remedy and not name.lower().endswith(format_.suffixes):
        # Tools decide by name, and must not overwrite this file.
        proper_name = f"{stem}{format_.suffixes[0]}"
        remedy = f"rename it to {proper_name}, and {remedy}"
    return f"{name} is {format_.kind}", remedy.format(name=proper_name, stem=stem)


def stem(path: Path) -> str:
    """File name without its image suffix: ``sub-01_T1w.nii.gz`` -> ``sub-01_T1w``."""
    for suffix in IMAGE_SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


@contextmanager
def unpacked(path: Path) -> Iterator[Stream]:
    """Open a file's bytes, decompressed if they begin as gzip does; names are often wrong."""
    with path.open("rb") as file:
        is_packed = file.read(len(GZIP)) == GZIP
        file.seek(0)
        yield gzip.GzipFile(fileobj=file) if is_packed else file


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder; raises ``MissingInputError`` if it cannot be looked at."""
    try:
        return path.is_dir()
    except OSError as error:  # a parent folder without permission, a name too long
        raise _unseen(path, error) from error


def _unseen(path: Path, error: OSError) -> MissingInputError:
    return MissingInputError(
        f"cannot look at {path} ({error.strerror})", "check the path and its permissions"
    )


def check_there(path: Path) -> None:
    """Raise ``MissingInputError`` unless ``path`` is a file that can be read."""
    try:
        if path.is_symlink() and not path.exists():
            if reason := pointer(path.name, os.fsencode(path.readlink())):
                raise MissingInputError(*reason)
            raise MissingInputError(
                f"{path} is a link to nothing ({path.readlink()})", "check where it leads"
            )
        if not path.exists():
            raise MissingInputError(f"no such file: {path}", "check the path")
        if path.is_dir():
            raise MissingInputError(
                f"{path} is a folder",
                "give one image file; cadiff-seg takes a folder of DICOM files too",
            )
        if not path.is_file():
            raise MissingInputError(f"{path} is a pipe or a device", "give one image file")
    except OSError as error:
        raise _unseen(path, error) from error
    if not os.access(path, os.R_OK):
        raise MissingInputError(f"cannot read {path}", "check its permissions")
    try:
        with path.open("rb") as stream:
            reason = pointer(path.name, stream.read(HEAD_BYTES))
    except OSError as error:  # a lost mount, another machine's lease
        raise MissingInputError(f"cannot read {path} ({error.strerror})", "try again") from error
    if reason:
        raise MissingInputError(*reason)
