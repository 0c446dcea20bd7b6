"""Dice per class.  A class missing on one side counts 0, on both sides NaN."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from monai.metrics import compute_dice
from scipy import ndimage

MARGIN_VOXELS = 2
"""Background kept around a structure, so that its surface closes inside the crop."""


def dice(prediction: np.ndarray, reference: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """(len(classes),) Dice coefficients of two class maps (X, Y, Z); NaN where both are empty."""
    out = np.full(len(classes), np.nan)
    for index, (p, r) in enumerate(masks(prediction, reference, classes)):
        if p.any() or r.any():
            pair = (torch.from_numpy(m[None, None]) for m in (p, r))
            out[index] = float(compute_dice(*pair, ignore_empty=False))
    return out


def masks(
    prediction: np.ndarray, reference: np.ndarray, classes: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield boolean masks of each class on both sides, cropped to the box around the two."""
    objects = [ndimage.find_objects(side, max(classes)) for side in (prediction, reference)]
    for k in classes:
        boxes = [of_class[k - 1] for of_class in objects if of_class[k - 1]]
        box = tuple(
            slice(
                max(min(s.start for s in axis) - MARGIN_VOXELS, 0),
                max(s.stop for s in axis) + MARGIN_VOXELS,
            )
            for axis in zip(*boxes, strict=True)
        )
        # Absent on both sides: the crop is empty.
        box = box or (slice(0),)
        yield prediction[box] == k, reference[box] == k
