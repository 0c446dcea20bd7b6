"""The volumes of the interactive viewer, small enough to travel inside the page."""

import base64
import gzip
from typing import Any

import numpy as np

from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.report.case import Case
from cadiff_cli.report.figures import grey, near_mask
from cadiff_cli.spatial.resample import resample

MOST_VOXELS = 9_000_000
"""Of a brain at 1 mm, which becomes 2 to 4 MB; larger ones are shown at 2 mm."""
SHADES = 64
"""Shades of grey that are kept: more cannot be told apart beneath an overlay, and cost bytes."""


def viewer_data(case: Case, parcellation: Parcellation) -> dict[str, Any]:
    """What the script needs: sizes, affine, structures, and two gzipped volumes.

    Volumes are in C order with x last (an image's row): the image uint8, labels (indices into
    ``names``) uint8 too, or int16 if they are ``wide``.
    """
    grid = case.near
    if np.prod(grid.shape) > MOST_VOXELS:
        grid = grid.coarsen(2)
    t1 = grey(resample(case.t1, grid), near_mask(case, grid))
    labels = resample(case.labels, grid, order=0)
    classes = parcellation.encode(labels.data, parcellation.class_of)
    order = np.argsort(classes, axis=None, kind="stable")
    found, first, count = np.unique(classes.ravel()[order], return_index=True, return_counts=True)
    middles = np.stack(np.unravel_index(order[first + count // 2], classes.shape), axis=-1)
    centres = {int(k): at for k, at in zip(found, middles.tolist(), strict=True) if k}
    return {
        "shape": list(grid.shape),
        "affine": np.round(grid.affine, 4).tolist(),
        "names": ["", *(s.name for s in parcellation.structures)],
        "colors": ["", *(s.color for s in parcellation.structures)],
        "codes": parcellation.codes.tolist(),
        "centres": centres,
        "t1": pack(t1 // (256 // SHADES) * (256 // SHADES)),
        "labels": pack(classes),
        "wide": classes.dtype.itemsize > 1,
    }


def pack(volume: np.ndarray) -> str:
    """(X, Y, Z) -> base64 of gzip, x running fastest, the lower byte first."""
    little = volume.dtype.newbyteorder("<")
    raw = np.ascontiguousarray(volume.transpose(2, 1, 0), dtype=little).tobytes()
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode()
