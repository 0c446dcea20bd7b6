"""Write an image as a series of DICOM files, as a scanner would: explicit little endian, MR."""

import struct
from pathlib import Path

import numpy as np

NAME, ID = "Mustermann^Erika", "P47110815"
BIRTH, DAY, TIME = "19700102", "20200304", "050607.123456"
"""What must never be in a result."""
MR_IMAGE, LITTLE_ENDIAN = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.1.2.1"
ROOT = "1.2.826.0.1.3680043.8.498"
"""Prefix of the identifiers that are made here."""


def element(group: int, number: int, kind: str, value) -> bytes:
    """One data element with an explicit value representation (DICOM PS3.5, 7.1.2)."""
    if kind == "US":
        data = struct.pack("<H", value)
    elif isinstance(value, bytes):
        data = value
    else:
        data = str(value).encode()
    if len(data) % 2:
        data += b"\0" if kind in ("UI", "OB") else b" "
    size = (
        struct.pack("<HI", 0, len(data)) if kind in ("OW", "OB") else struct.pack("<H", len(data))
    )
    return struct.pack("<HH", group, number) + kind.encode() + size + data


def write_series(
    folder: Path, data: np.ndarray, affine: np.ndarray, number: int, title: str, bits: int = 16
):
    """Slices along the last axis of ``data`` (uint16, X, Y, Z); ``affine`` is RAS, as NIfTI's."""
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    x, y = (lps[:3, axis] / spacing[axis] for axis in (0, 1))
    for k in range(data.shape[2]):
        position = lps[:3, 3] + k * lps[:3, 2]
        uid = f"{ROOT}.{number}.{k + 1}"
        rows = np.ascontiguousarray(data[:, :, k].T).astype("<u2")  # the first index runs fastest
        elements = [
            element(0x0008, 0x0008, "CS", "ORIGINAL\\PRIMARY\\M\\ND"),
            element(0x0008, 0x0016, "UI", MR_IMAGE),
            element(0x0008, 0x0018, "UI", uid),
            element(0x0008, 0x0020, "DA", DAY),
            element(0x0008, 0x0022, "DA", DAY),
            element(0x0008, 0x0030, "TM", TIME),
            element(0x0008, 0x0032, "TM", TIME),
            element(0x0008, 0x0060, "CS", "MR"),
            element(0x0008, 0x0070, "LO", "SIEMENS"),
            element(0x0008, 0x103E, "LO", title),
            element(0x0010, 0x0010, "PN", NAME),
            element(0x0010, 0x0020, "LO", ID),
            element(0x0010, 0x0030, "DA", BIRTH),
            element(0x0018, 0x0020, "CS", "GR"),
            element(0x0018, 0x0023, "CS", "3D"),
            element(0x0018, 0x0050, "DS", f"{spacing[2]:g}"),
            element(0x0018, 0x0080, "DS", "2300"),
            element(0x0018, 0x0081, "DS", "2.9"),
            element(0x0018, 0x0082, "DS", "900"),
            element(0x0018, 0x1030, "LO", title),
            element(0x0020, 0x000D, "UI", f"{ROOT}.9"),
            element(0x0020, 0x000E, "UI", f"{ROOT}.9.{number}"),
            element(0x0020, 0x0011, "IS", number),
            element(0x0020, 0x0013, "IS", k + 1),
            element(0x0020, 0x0032, "DS", "\\".join(f"{v:.6g}" for v in position)),
            element(0x0020, 0x0037, "DS", "\\".join(f"{v:.8g}" for v in (*x, *y))),
            element(0x0020, 0x0052, "UI", f"{ROOT}.9.{number}.0"),
            element(0x0028, 0x0002, "US", 1),
            element(0x0028, 0x0004, "CS", "MONOCHROME2"),
            element(0x0028, 0x0010, "US", rows.shape[0]),
            element(0x0028, 0x0011, "US", rows.shape[1]),
            element(0x0028, 0x0030, "DS", f"{spacing[1]:g}\\{spacing[0]:g}"),
            element(0x0028, 0x0100, "US", 16),
            element(0x0028, 0x0101, "US", bits),
            element(0x0028, 0x0102, "US", bits - 1),
            element(0x0028, 0x0103, "US", 0),
            element(0x7FE0, 0x0010, "OW", rows.tobytes()),
        ]
        meta = b"".join(
            (
                element(0x0002, 0x0001, "OB", b"\0\1"),
                element(0x0002, 0x0002, "UI", MR_IMAGE),
                element(0x0002, 0x0003, "UI", uid),
                element(0x0002, 0x0010, "UI", LITTLE_ENDIAN),
                element(0x0002, 0x0012, "UI", f"{ROOT}.1"),
            )
        )
        length = struct.pack("<HH", 2, 0) + b"UL" + struct.pack("<HI", 4, len(meta))
        path = folder / f"{number:02d}_{k:04d}.dcm"
        path.write_bytes(bytes(128) + b"DICM" + length + meta + b"".join(elements))
