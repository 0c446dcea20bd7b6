"""Draw a finished result for documents: three planes of the scan, structures, and parcels if any.

python tools/draw_result.py demo/out sub-MNI152 demo/sub-MNI152_T1w.nii.gz -o figure.png
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap

from cadiff_cli.io.bids.tables import parcellation_of
from cadiff_cli.io.images import load_scan
from cadiff_cli.io.label_maps import load_ids
from cadiff_cli.spatial.resample import bounding_box

mpl.use("Agg")

MARGIN_VOXELS = 4


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of results")
    parser.add_argument("scan", help="name of the result, as sub-01_ses-a")
    parser.add_argument("t1", type=Path, help="the scan itself, in RAS axes at 1 mm")
    parser.add_argument("-o", "--figure", type=Path, required=True)
    arguments = parser.parse_args()
    image = load_scan(arguments.t1).t1.data
    pattern = f"{arguments.scan}_seg-*_desc-structures_dseg.nii.gz"
    maps = sorted(arguments.out.rglob(pattern))
    box = bounding_box(image > 0, MARGIN_VOXELS)
    middle = [(side.stop - side.start) // 2 for side in box]
    rows = 1 + len(maps)
    figure, axes = plt.subplots(
        rows, 3, figsize=(9, 3.1 * rows), layout="constrained", facecolor="black"
    )
    for row, path in zip(axes, [None, *maps], strict=True):
        for axis, panel in enumerate(row):
            plane = np.take(image[box], middle[axis], axis=axis).T
            panel.imshow(plane, cmap="gray", origin="lower")
            panel.axis("off")
            if path is None:
                continue
            codes, parcellation = load_ids(path)[0].data[box], parcellation_of(path)
            classes = parcellation.encode(codes, parcellation.class_of)
            labels = np.take(classes, middle[axis], axis=axis).T
            colours = ListedColormap([s.color for s in parcellation.structures])
            shown = np.ma.masked_equal(labels, 0) - 1
            panel.imshow(
                shown,
                cmap=colours,
                vmin=0,
                vmax=parcellation.n_classes - 2,
                origin="lower",
                interpolation="nearest",
                alpha=0.75,
            )
    figure.savefig(arguments.figure, dpi=72, facecolor="black")


if __name__ == "__main__":
    main()
