"""Read scans and write images.  The only module that opens image files with nibabel."""

import gzip
import logging
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel import imageglobals
from nibabel.affines import voxel_sizes
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.orientations import aff2axcodes
from nibabel.spatialimages import HeaderDataError

from cadiff_cli.errors import DataError, UnsuitableError
from cadiff_cli.io.files import replacing, sha256
from cadiff_cli.io.formats import (
    GZIP,
    HEAD_BYTES,
    IMAGE_SUFFIXES,
    Stream,
    check_there,
    foreign,
    stem,
    unpacked,
)
from cadiff_cli.io.intensities import LARGEST, is_ct, usable, without_padding
from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.products import Scan
from cadiff_cli.spatial.grid import Grid, Volume, border_value
from cadiff_cli.spatial.resample import all_voxels, check_same_grid, corners

MIN_EDGE_VOXELS = 8
"""Least number of voxels along an axis: a smaller scan cannot hold a brain."""
MIN_SPACING_MM = 0.2
"""Smallest voxel edge: finer voxels of a person mean a header in the wrong unit."""
MAX_SPACING_MM = 10.0
"""Largest voxel edge: longer voxels show no structures."""
MIN_EDGE_MM = 60.0
"""Shortest edge of a field of view that can hold a brain (an adult's is at least 90 mm high)."""
MAX_EDGE_MM = 1000.0
"""Longest edge of a field of view: beyond head and shoulders the header's unit is wrong."""
MAX_VOXELS = 600_000_000
"""More than a head at 0.25 mm; refuse before memory runs out."""
MAX_FIELD_MM3 = 6e8
"""Largest field of view: one of 840 mm a side."""

ROUNDING_OF_FLOAT = 1e-7
"""Largest excess over length 1 of a quaternion that a header stores as float32."""
ROUNDING_OF_TEXT = 1e-3
"""The same for a quaternion written with three decimals."""
SAME_SIZE = 0.01
"""Largest relative difference between a header's two statements of a voxel's size."""


def load_volume(path: Path) -> Volume:
    """Read a 3-D image (a 4-D one with a single volume is squeezed), scaled by its header.

    Raises ``MissingInputError`` if it is absent, ``DataError`` if it is not a readable image.
    """
    return _read(path).volume


class _Read(NamedTuple):
    """An image, its header, and notes on the file."""

    volume: Volume
    header: Any
    notes: list[Note]


def _read(path: Path) -> _Read:
    name = path.name
    with _opened(path) as (header, stream, notes):
        shape = tuple(int(n) for n in header.get_data_shape())
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) != 3:
            raise UnsuitableError(
                f"{name} is {len(shape)}-D with shape {shape}", "give a single 3-D volume"
            )
        if np.prod(shape, dtype=np.int64) > MAX_VOXELS:
            raise UnsuitableError(
                f"{name} has {np.prod(shape, dtype=np.int64):,} voxels",
                f"at most {MAX_VOXELS:,} are supported: resample it",
            )
        grid = Grid(shape, header.get_best_affine())
        # Read, not memory-mapped: the file may change meanwhile.
        data = np.asanyarray(ArrayProxy(stream, header, mmap=False)).reshape(shape)
        end = stream.tell()
        if isinstance(stream, gzip.GzipFile) and _has_junk(path, stream, end):
            text = f"{name} has bytes after its gzip stream: they were ignored"
            notes.append(Note(NoteCode.TRAILING_BYTES, text))
    if data.dtype.kind not in "iufb":
        raise UnsuitableError(
            f"{name} holds {data.dtype} values", "give a scalar image (not RGB or complex)"
        )
    return _Read(Volume(data, grid), header, notes)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Stream, list[Note]]]:
    """Open an image: its header, its bytes, and notes on the header.

    Errors within the block become ``DataError``.
    """
    check_there(path)
    name = path.name
    # nibabel prints header oddities on stderr; important ones become notes here.
    imageglobals.logger.setLevel(logging.CRITICAL)
    try:
        with unpacked(path) as stream:
            head = stream.read(HEAD_BYTES)
            stream.seek(0)
            header = _header_class(path, head).from_fileobj(stream)
            yield header, stream, [*_unit_quaternion(header, name), *_unplaced(header, head, name)]
    except (ImageFileError, HeaderDataError) as error:
        raise DataError(f"{name} is not a readable image ({error})", "give NIfTI or MGH") from error
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, OverflowError) as error:
        raise DataError(
            f"{name} is damaged or truncated ({error})", "copy or download it again"
        ) from error


def _unplaced(header: Any, head: bytes, name: str) -> list[Note]:
    """Reasons to doubt an MGH header; nibabel fills in what it lacks without a word."""
    if not isinstance(header, MGHHeader) or any(head[28:30]):  # goodRASFlag
        return []
    text = (
        f"{name} does not say how it lies (its goodRASFlag is 0): left and right are a guess, and"
        " voxels count as 1 mm"
    )
    return [Note(NoteCode.HEADER_ORIENTATION, text)]


def _header_class(path: Path, head: bytes) -> Any:
    """Choose nibabel's header class for an image that begins with the bytes ``head``."""
    kinds = {
        nib.Nifti1Header: head[344:347] == b"n+1",
        nib.Nifti2Header: head[4:7] == b"n+2",
        MGHHeader: head.startswith(b"\0\0\0\1"),
    }
    kind = next((kind for kind, fits in kinds.items() if fits), None)
    is_named = path.name.lower().endswith(IMAGE_SUFFIXES)
    if kind and is_named:
        return kind
    if kind:
        raise DataError(
            f"{path.name} is an image, but not by its name",
            f"rename it to end in {' or '.join(IMAGE_SUFFIXES)}",
        )
    if is_named and not head:
        raise DataError(f"{path.name} is empty (0 bytes)", "copy or download it again")
    raise DataError(
        *foreign(path.name, stem(path), head)
        or (f"{path.name} is not an image", f"give {', '.join(IMAGE_SUFFIXES)}")
    )


def _has_junk(path: Path, stream: gzip.GzipFile, end: int) -> bool:
    """Whether bytes that are not gzip follow the image, which ends at byte ``end``.

    Reads to the last byte: gzip keeps its checksum after the last voxel.  Raises gzip's errors if
    the image itself is damaged.
    """
    try:
        while stream.read(1 << 24):
            pass
    except (OSError, EOFError, zlib.error):
        if _sound_bytes(path) < end:
            raise
        return True
    return False


def _sound_bytes(path: Path) -> int:
    """Unpacked size of the complete gzip members with correct checksums at the start of a file."""
    count, rest = 0, path.read_bytes()
    while rest.startswith(GZIP):
        member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            size = len(member.decompress(rest))
        except zlib.error:
            break
        if not member.eof:
            break
        count, rest = count + size, member.unused_data
    return count


def _unit_quaternion(header: Any, name: str) -> list[Note]:
    """Scale a qform's quaternion that is longer than 1 to a rotation, as ITK does.

    nibabel would refuse it.  Returns a note, unless the excess is only a rounding error.
    """
    if not isinstance(header, nib.Nifti1Header) or not header["qform_code"]:
        return []
    keys = ("quatern_b", "quatern_c", "quatern_d")
    length = float(np.linalg.norm(np.array([header[key] for key in keys], dtype=np.float64)))
    if not 1 + ROUNDING_OF_FLOAT < length < np.inf:
        return []
    for key in keys:
        header[key] = header[key] / length
    if length < 1 + ROUNDING_OF_TEXT:
        return []
    remedy = "sform is believed" if header["sform_code"] else "it was scaled to 1"
    text = f"the qform of {name} is no rotation (its quaternion is {length:.3g} long): {remedy}"
    return [Note(NoteCode.HEADER_ORIENTATION, text)]


def load_scan(path: Path) -> Scan:
    """Read a T1-weighted scan and check that it can hold a brain.

    NaN and infinite voxels (some tools mark background with them) become 0, with a note.  Raises
    ``UnsuitableError`` for readable images that cannot be segmented, and the errors of
    ``load_volume``.
    """
    volume, header, notes = _read(path)
    grid, name = volume.grid, path.name
    _check_extent(grid, name)
    good = usable(volume.data)
    # In C's order, as everything that is computed from it; files are in Fortran's.
    data = np.where(good, volume.data, 0).astype(np.float32, order="C")
    bad = data.size - int(np.count_nonzero(good))
    if bad == data.size:
        raise UnsuitableError(
            f"{name} holds only NaN, infinite or absurd values", "check how it was written"
        )
    if bad:
        text = f"{bad:,} voxels of {name} that are NaN, infinite or above {LARGEST:g} were set to 0"
        notes.append(Note(NoteCode.BAD_VALUES, text))
    if data.min() == data.max():
        kind = "all zero" if data.max() == 0 else f"constant ({data.max():g} everywhere)"
        raise UnsuitableError(f"{name} is {kind}", "give a T1-weighted image")
    plain, padding = without_padding(data, name)
    if is_ct(data, plain):
        raise UnsuitableError(
            f"{name} looks like a CT in Hounsfield units ({border_value(data):.0f} at its faces)",
            "give a T1-weighted MR image",
        )
    data = plain
    notes.extend(padding)
    if grid.spacing_mm.max() > 3.0:
        text = (
            f"voxels of {np.round(grid.spacing_mm, 2).tolist()} mm are coarse:"
            " small structures will be unreliable"
        )
        notes.append(Note(NoteCode.COARSE_VOXELS, text))
    notes.extend(_frame_notes(header, name))
    return Scan(Volume(data, grid), path, tuple(notes), sha256(path))


def _check_extent(grid: Grid, name: str) -> None:
    """Raise ``UnsuitableError`` unless field of view and voxel size suit a head."""
    edges_mm = np.array(grid.shape) * grid.spacing_mm
    described = f"{'x'.join(map(str, grid.shape))} voxels of {np.round(grid.spacing_mm, 2)} mm"
    if min(grid.shape) < MIN_EDGE_VOXELS:
        raise UnsuitableError(
            f"{name} has {described}", f"at least {MIN_EDGE_VOXELS} voxels a side are needed"
        )
    if grid.spacing_mm.max() > MAX_SPACING_MM:
        raise UnsuitableError(
            f"{name} has {described}", f"at most {MAX_SPACING_MM:g} mm is allowed"
        )
    size, spacing = (" x ".join(f"{n:.3g}" for n in mm) for mm in (edges_mm, grid.spacing_mm))
    covers = f"{name} covers {size} mm"
    if edges_mm.min() < MIN_EDGE_MM and grid.spacing_mm.min() >= MIN_SPACING_MM:
        raise UnsuitableError(
            f"{covers}, too small a field of view for a brain",
            "a slab or a small infant's head cannot be segmented:"
            f" give a scan of {MIN_EDGE_MM:g} mm a side or more",
        )
    if edges_mm.min() < MIN_EDGE_MM or edges_mm.max() > MAX_EDGE_MM:
        raise UnsuitableError(
            f"{covers} with voxels of {spacing} mm",
            f"{MIN_EDGE_MM:g} to {MAX_EDGE_MM:g} mm a side are allowed: check the voxel size",
        )
    if np.prod(edges_mm) > MAX_FIELD_MM3:
        raise UnsuitableError(
            f"{name} covers {np.prod(edges_mm) / 1e6:.0f} l",
            f"at most {MAX_FIELD_MM3 / 1e6:.0f} l are allowed: check the voxel size, or crop it",
        )


def _turned(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether an axis of an affine points elsewhere in another: by more than 45 degrees."""
    a, b = one[:3, :3], other[:3, :3]
    lengths = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
    # An axis without a length points nowhere.
    return bool(((a * b).sum(axis=0) <= math.sqrt(0.5) * lengths).any())


def _frame_notes(header: Any, name: str) -> list[Note]:
    """Reasons to doubt the orientation or the voxel size of a NIfTI header."""
    if not isinstance(header, nib.Nifti1Header):
        return []
    sform, s_code = header.get_sform(coded=True)
    qform, q_code = header.get_qform(coded=True)
    if q_code and not np.isfinite(qform).all():
        text = f"the qform of {name} is no rotation: sform is believed"
        return [Note(NoteCode.HEADER_ORIENTATION, text)]
    if not s_code and not q_code:
        text = (
            f"{name} does not say how it lies (qform and sform codes are 0):"
            " left and right are a guess"
        )
        return [Note(NoteCode.HEADER_ORIENTATION, text)]
    notes = []
    if s_code and q_code:
        if _turned(sform, qform):
            ours, theirs = ("".join(map(str, aff2axcodes(form))) for form in (sform, qform))
            text = (
                f"sform and qform of {name} disagree about left and right, front or top"
                f" ({ours} and {theirs}): sform is believed"
            )
            notes.append(Note(NoteCode.HEADER_ORIENTATION, text))
        elif (apart_mm := _apart_mm(header, sform, qform)) > voxel_sizes(sform).min() / 2:
            text = (
                f"sform and qform of {name} lie up to {apart_mm:.1f} mm apart: sform is believed."
                " ITK's programs (ANTs, fMRIPrep) may read the qform, which our transforms do not"
                " fit: make both the same (fslorient -copysform2qform)"
            )
            notes.append(Note(NoteCode.HEADER_ORIENTATION, text))
    pixdim, sizes = np.array(header.get_zooms()[:3]), voxel_sizes(header.get_best_affine())
    if (abs(sizes / pixdim - 1) > SAME_SIZE).any():
        text = (
            f"voxels of {name} are {np.round(pixdim, 3).tolist()} mm by its pixdim and"
            f" {np.round(sizes, 3).tolist()} mm by its sform, which is believed: volumes follow it"
        )
        notes.append(Note(NoteCode.HEADER_SIZES, text))
    return notes


def _apart_mm(header: Any, one: np.ndarray, other: np.ndarray) -> float:
    """How far a corner of the image lies from itself by another affine."""
    box = all_voxels(header.get_data_shape()[:3])
    return float(np.linalg.norm(corners(box, one) - corners(box, other), axis=0).max())


def save_volume(
    path: Path,
    data: np.ndarray,
    grid: Grid,
    like: Path | None = None,
    code: str = "scanner",
    *,
    labels: bool = False,
) -> None:
    """Write ``data`` ((X, Y, Z) or (X, Y, Z, n)) as NIfTI, atomically.

    ``like``: an image on the same grid whose header (qform and sform with their codes, units) is
    kept; data type, scaling and display range are reset.  ``code`` names the world of a new
    header (NIfTI's ``scanner``, ``mni``...).  ``labels`` marks a label map: viewers such as NiiVue
    give it colours of labels, and do not interpolate.
    """
    header = None
    affine: np.ndarray | None = grid.affine
    if like is not None:
        with _opened(like) as (kept, _, _):
            header = kept if isinstance(kept, nib.Nifti1Header) else None
    if header is not None:
        header.extensions.clear()
        header["cal_min"] = header["cal_max"] = 0
        header["descrip"] = b""
        header["aux_file"] = b""
        header["intent_name"] = b""
        for key in _STALE:
            header[key] = 0
        header["pixdim"][4:] = 1
        header.set_slope_inter(1, 0)
        affine = None  # the header's own qform and sform, bit for bit
    # NIfTI has neither bool nor float16; nibabel converts float16 while it writes.
    data = data.view(np.uint8) if data.dtype == bool else data
    dtype = np.dtype(np.float32) if data.dtype == np.float16 else data.dtype
    if data.ndim == 3:  # in the file's order: nibabel would pick up its slices voxel by voxel
        data = np.asfortranarray(data, dtype)
    klass = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = klass(data, affine, header or klass.header_class(), dtype=dtype)
    if header is None:
        image.set_sform(grid.affine, code=code)
        image.set_qform(grid.affine, code=code, strip_shears=True)
    try:
        unit, time = image.header.get_xyzt_units()
    except KeyError:  # a code that NIfTI does not define
        unit, time = "unknown", "unknown"
    if unit == "unknown":  # we take it to be mm, so others should
        image.header.set_xyzt_units("mm", time)
    if labels:
        image.header.set_intent("label")
    with replacing(path) as temporary:
        nib.save(image, temporary)


def save_displacement(path: Path, displacement_mm: np.ndarray, grid: Grid) -> None:
    """Write a displacement (3, X, Y, Z) in RAS mm as ITK reads it: a NIfTI vector image in LPS.

    ANTs and nitransforms take such a file for a transform.
    """
    vectors = np.moveaxis(displacement_mm, 0, -1)[..., None, :] * (-1, -1, 1)
    image = nib.Nifti1Image(vectors.astype(np.float32), grid.affine)
    image.header.set_intent("vector")
    image.header.set_xyzt_units("mm")
    image.set_sform(grid.affine, code="mni")
    image.set_qform(grid.affine, code="mni")
    with replacing(path) as temporary:
        nib.save(image, temporary)


def load_displacement(path: Path) -> tuple[np.ndarray, Grid]:
    """Read what ``save_displacement`` wrote: (3, X, Y, Z) float32 in RAS mm, and its grid.

    Raises ``MissingInputError`` if it is absent, ``DataError`` if it is not such an image.
    """
    with _opened(path) as (header, stream, _):
        x, y, z, *vector = (int(n) for n in header.get_data_shape())
        if vector != [1, 3]:
            raise DataError(
                f"{path.name} is no displacement: its shape ends in {vector}, not [1, 3]",
                "give a NIfTI vector image",
            )
        data = np.asanyarray(ArrayProxy(stream, header, mmap=False))
        grid = Grid((x, y, z), header.get_best_affine())
    ras = data[..., 0, :] * np.array([-1, -1, 1], dtype=np.float32)
    return np.ascontiguousarray(np.moveaxis(ras, -1, 0), dtype=np.float32), grid


_STALE = [
    "intent_code",
    "intent_p1",
    "intent_p2",
    "intent_p3",
    "toffset",
    "slice_code",
    "slice_start",
    "slice_end",
    "slice_duration",
]
"""Header fields about the scan's acquisition or time."""


def given_mask(path: Path, scan: Scan) -> Volume:
    """Read a user's brain mask (bool) on the scan's own grid.

    Raises ``DataError`` if it has another grid or is empty.
    """
    mask = load_volume(path)
    check_same_grid(path.name, mask.grid, scan.path.name, scan.t1.grid)
    inside = np.nan_to_num(np.asarray(mask.data, dtype=np.float32)) > 0.5
    if not inside.any():
        raise DataError(f"mask {path.name} is empty", "give a mask with the brain above 0.5")
    return Volume(inside, scan.t1.grid)  # a header may round the same grid otherwise
