"""Make the network's input from a registered brain: crop, normalise, attach the field."""

from collections.abc import Sequence

import numpy as np

from cadiff_cli.errors import DataError
from cadiff_cli.products import Conditions, Registered, Stripped
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import bounding_box, grid_around, resample
from cadiff_cli.stages.field import mean_field

MARGIN_VOXELS = 2
MULTIPLE = 16
FIELD_STRIDE = 2
"""The field is smooth: the network reads it (and diffuses labels) at 2 mm."""
BORDER_MM = 6.0
"""Contrast is measured farther inside the brain than this..."""
LEAST_INNER = 0.2
"""...if at least this share of the brain lies there; in a mouse's brain nothing does."""


def condition(stripped: Stripped, registrations: Sequence[Registered]) -> Conditions:
    """Crop to the brain, scale intensities and sample the distance field on the crop.

    Without ``registrations`` the network finds the field itself.
    """
    grid = brain_crop(stripped.mask)
    image, mask = (resample(v, grid) for v in (stripped.t1, stripped.mask))
    return Conditions(
        image=Volume(normalise(image.data, mask.data, grid.spacing_mm), grid),
        mask=mask,
        field=mean_field(registrations, grid.coarsen(FIELD_STRIDE)) if registrations else None,
    )


def brain_crop(mask: Volume) -> Grid:
    """The box around ``mask`` with a margin, grown to multiples of 16; it may leave the image."""
    if not mask.data.any():
        raise DataError("the brain mask is empty", "check the input, or give a mask with --mask")
    return grid_around(mask.data, mask.grid, MARGIN_VOXELS, MULTIPLE)


def normalise(image: np.ndarray, mask: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Scale intensities to [0, 1] by percentiles 0.5 and 99.5 of the brain's inner part; 0 outside.

    At its border a mask may contain fat, vessels or dura, brighter or darker than any brain.  They
    would change the contrast of the brain.
    """
    box = bounding_box(mask)
    inner = deep(mask[box], BORDER_MM, spacing_mm)
    inside = image[box][inner] if inner.sum() > LEAST_INNER * mask.sum() else image[mask]
    low, high = np.percentile(inside, [0.5, 99.5])
    if not high > low:
        raise DataError(
            f"the brain is constant ({low:g})", "is this a T1-weighted image with its own mask?"
        )
    scaled = np.clip((image - low) / (high - low), 0.0, 1.0)
    return np.where(mask, scaled, 0.0).astype(np.float32)


def deep(mask: np.ndarray, depth_mm: float, spacing_mm: np.ndarray) -> np.ndarray:
    """Voxels (bool) farther than this from every voxel outside, those beyond the faces included.

    Squared distances are found along one axis after the other, no farther than asked for: a few
    times as fast as a whole distance transform.
    """
    far = np.float32(2 * depth_mm**2)
    squares = np.where(np.pad(mask, 1), far, np.float32(0))
    for axis, spacing in enumerate(spacing_mm):
        before = np.moveaxis(squares, axis, 0)
        after = before.copy()
        for step in range(1, min(int(depth_mm / spacing) + 1, len(before))):
            away = np.float32((step * spacing) ** 2)
            np.minimum(after[step:], before[:-step] + away, out=after[step:])
            np.minimum(after[:-step], before[step:] + away, out=after[:-step])
        squares = np.moveaxis(after, 0, axis)
    return np.asarray(squares[(slice(1, -1),) * 3] > np.float32(depth_mm**2))
