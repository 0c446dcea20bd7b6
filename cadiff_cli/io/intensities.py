"""Voxel values of a scan: find unusable ones and padding, and recognise a CT."""

import numpy as np

from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.spatial.grid import border_value

LARGEST = 1e15
"""Larger intensities come from no scanner, and float32 cannot hold the sum of their squares."""
AIR_HU = -500.0
"""Air, and the corners outside the scanned circle, have fewer Hounsfield units than this."""
LEAST_FAT = 0.03
"""Least share of fat in a CT's voxels, not counting air; a head has three times as much."""
LEAST_CORNERS = 4
"""Padding covers at least this many of the eight corners of an image."""
MIXED = 0.02
"""Share of voxels at either end of an image's range that may be mixtures of padding and air."""
FAR = 0.05
"""Least distance of padding from the range of an image, as a share of the range.

Nearer padding is harmless.
"""


def finite(data: np.ndarray) -> np.ndarray:
    """``data`` as float32, with 0 for values that are not ``usable``."""
    return np.where(usable(data), data, 0).astype(np.float32)


def usable(data: np.ndarray) -> np.ndarray:
    """Mask (bool) of values that can be squared and summed: finite and below ``LARGEST``."""
    return np.asarray(np.isfinite(data) & (abs(data) < LARGEST))


def without_padding(data: np.ndarray, name: str) -> tuple[np.ndarray, list[Note]]:
    """Replace padding by air; return the data and a note on the padding, if any.

    Padding is a constant far from all other values: tools that turn or enlarge a field of view fill
    its corners, often with -1000.  Interpolation leaves mixtures of padding and air between them.
    """
    values, counts = np.unique(data[np.ix_([0, -1], [0, -1], [0, -1])], return_counts=True)
    pad = float(values[counts.argmax()])
    if pad == 0 or counts.max() < LEAST_CORNERS:  # 0 is air already
        return data, []
    low, high = (float(v) for v in np.quantile(data[data != pad], [MIXED, 1 - MIXED]))
    reach = FAR * (high - low)
    air = low if low < -reach else 0.0  # splines ring a little below 0
    if pad < min(low, 0) - reach:
        # An image without negative values of its own has only mixtures below 0.
        padded = data < (-reach if air == 0 else (pad + low) / 2)
    elif pad > max(high, 0) + reach:
        padded = data > (pad + high) / 2
    else:
        return data, []
    share = f"{np.mean(padded):.1%} of {name} is padding of {pad:g}"
    note = Note(NoteCode.PADDING, f"{share}: it was set to {air:g}")
    return np.where(padded, np.float32(air), data), [note]


def is_ct(data: np.ndarray, plain: np.ndarray) -> bool:
    """Whether an image is a CT in Hounsfield units; ``plain`` is the image ``without_padding``.

    Air has -1000, the corners outside the scanned circle less; fat has -100, a brain alone 0 to 60.
    Padded MR has no values like fat between the padding and 0.
    """
    if not border_value(data) < AIR_HU < np.percentile(data, 99):
        return False
    if border_value(plain) < AIR_HU:
        return True
    tissue = data[data > AIR_HU]
    first, last = np.percentile(tissue, [25, 75])
    bare = 15 < (first + last) / 2 < 60 and last - first < 25
    return bool(bare or np.mean((tissue > -200) & (tissue < -20)) > LEAST_FAT)
