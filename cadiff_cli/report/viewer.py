"""The volumes of the interactive viewer, small enough to be stored inside the page."""

import base64
import gzip
from typing import Any

import numpy as np

from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.report.case import Views
from cadiff_cli.report.figures import grey
from cadiff_cli.spatial.resample import resample, resample_mask

MOST_VOXELS = 9_000_000
"""Voxels of the largest brain that is shown at 1 mm (2 to 4 MB); larger ones are shown at 2 mm."""
SHADES = 64
"""Shades of grey that are kept: more look alike beneath an overlay, and cost bytes."""


def viewer_data(views: Views, parcellation: Parcellation) -> dict[str, Any]:
    """The data of the page's script: sizes, affine, structures, and two gzipped volumes.

    Volumes are in C order with x last (an image's row).  The image is uint8; labels are indices
    into ``names``, uint8, or int16 if they are ``wide``.
    """
    grid, t1, brain = views.near, views.scan, views.brain
    if np.prod(grid.shape) > MOST_VOXELS:
        grid = grid.coarsen(2)
        t1, brain = resample(views.t1, grid), resample_mask(views.mask, grid).data
    shades = grey(t1, brain) // (256 // SHADES) * (256 // SHADES)
    labels = resample(views.labels, grid, order=0)
    classes = parcellation.encode(labels.data, parcellation.class_of)
    order = np.argsort(classes, axis=None, kind="stable")
    present, first, count = np.unique(classes.ravel()[order], return_index=True, return_counts=True)
    middles = np.stack(np.unravel_index(order[first + count // 2], classes.shape), axis=-1)
    centres = {int(k): at for k, at in zip(present, middles.tolist(), strict=True) if k}
    return {
        "shape": list(grid.shape),
        "affine": np.round(grid.affine, 4).tolist(),
        "names": ["", *(s.name for s in parcellation.structures)],
        "colors": ["", *(s.color for s in parcellation.structures)],
        "codes": parcellation.codes.tolist(),
        "centres": centres,
        "t1": pack(shades),
        "labels": pack(classes),
        "wide": classes.dtype.itemsize > 1,
    }


def pack(volume: np.ndarray) -> str:
    """(X, Y, Z) -> base64 of gzip, x running fastest, the lower byte first."""
    little = volume.dtype.newbyteorder("<")
    raw = np.ascontiguousarray(volume.transpose(2, 1, 0), dtype=little).tobytes()
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode()
