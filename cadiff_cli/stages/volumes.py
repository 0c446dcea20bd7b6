"""Volumes of structures: voxel count times voxel volume."""

import numpy as np

from cadiff_cli.products import Segmentation


def volumes_mm3(segmentation: Segmentation) -> dict[int, float]:
    """Code -> mm^3 for every structure of the parcellation; 0.0 without a voxel.

    Also 0.0 for structures that the network was never taught: ``result.model.structures`` are the
    codes of those that it was taught.
    """
    labels = segmentation.labels
    size = int(segmentation.parcellation.codes.max()) + 1
    # Slice by slice: bincount converts its input to 8-byte integers.
    counts = np.zeros(size, dtype=np.int64)
    for part in labels.data:
        counts += np.bincount(part.ravel(), minlength=size)
    voxel = labels.grid.voxel_volume_mm3
    return {s.code: float(counts[s.code] * voxel) for s in segmentation.parcellation.structures}
