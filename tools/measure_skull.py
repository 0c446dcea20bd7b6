"""Score the intracranial volume of the brain-mask network, where its truth is known and where not.

python tools/measure_skull.py --label-maps LABEL_MAPS --images 2 --spacings 1 1.2 1.5 2
python tools/measure_skull.py HEADS/mass --spacings 1 1.2 1.5 2

Label maps (FreeSurfer codes, 5xx around the brain) are painted like T1-weighted images, each from
seeds of its own; each volume is compared with the true one.  Folders are BIDS-like; the volume of a
head is compared with that at its first spacing.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from cadiff_cli.io import models
from cadiff_cli.io.images import load_scan
from cadiff_cli.io.label_maps import load_ids
from cadiff_cli.nets.models import BrainModel
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.spatial.resample import resample
from cadiff_cli.stages.brain_mask import find_brain_in_head, find_skull, network_image
from cadiff_cli.training.brain_mask.data import paintable, t1_brightness
from cadiff_cli.training.brain_mask.patches import t1_contrast
from cadiff_cli.training.brain_mask.target import intracranial

BLUR_VOXELS = 0.5
"""Of an image painted from a label map."""


def main() -> None:
    """Print a line for each image, and one for all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--label-maps", type=Path)
    parser.add_argument("--images", type=int, default=1, help="so many of each label map")
    parser.add_argument("--spacings", nargs="+", type=float, default=[1.0], help="mm")
    parser.add_argument("--model", default="brain-mask")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = models.load(BrainModel, arguments.model)
    maps = sorted(arguments.label_maps.glob("*.nii*")) if arguments.label_maps else []
    errors = []
    for path in maps:
        for seed, (image, truth) in enumerate(painted(path, arguments.images)):
            name = f"{path.name} image {seed}, {truth.litres:.3f} l"
            found = [held_in(scan, model).litres for scan in at(image, arguments.spacings)]
            errors.append(compared(name, found, truth.litres))
    moves = []
    for path in sorted(p for f in arguments.folders for p in f.glob("sub-*/**/*_T1w.nii.gz")):
        found = [held_in(scan, model).litres for scan in at(load_scan(path).t1, arguments.spacings)]
        moves.append(compared(path.name, found, found[0]))
    for name, rows in (("against the truth", errors), ("moves by", moves)):
        for spacing, column in zip(arguments.spacings, np.transpose(rows), strict=False):
            size = abs(column)
            print(
                f"{name} at {spacing:g} mm: mean {column.mean():+.2f} %, mean size"
                f" {size.mean():.2f} %, most {size.max():.2f} %"
            )


def compared(name: str, litres: list[float], wanted: float) -> list[float]:
    """Print volumes, and by how many per cent they differ from the wanted one; return these."""
    errors = [100 * (x / wanted - 1) for x in litres]
    cells = (f"{x:.3f} l ({e:+.2f} %)" for x, e in zip(litres, errors, strict=True))
    print(name, *cells, sep="\t", flush=True)
    return errors


def held_in(t1: Volume, model: BrainModel) -> Volume:
    """What the network says that the inner skull holds, at 1 mm."""
    working, head = t1.grid.working(), network_image(t1)
    held = find_skull(head, find_brain_in_head(head, working, model)[1], working, model)
    if held is None:
        raise SystemExit("this network does not know the skull")
    return held


def painted(path: Path, images: int) -> Iterator[tuple[Volume, Volume]]:
    """Images of a label map on its own grid, and what its inner skull holds."""
    dseg, _ = load_ids(path)
    codes = np.rint(dseg.data).astype(np.int32)
    held = intracranial(codes, dseg.grid)
    labels, of_label = paintable(codes)
    t1 = torch.tensor([t1_brightness(code) for code in of_label])
    for seed in range(images):
        generator = torch.Generator().manual_seed(seed)
        contrast = t1_contrast(t1, generator)
        noise = torch.randn(labels.shape, generator=generator).numpy()
        image = contrast.mean.numpy()[labels] + contrast.spread.numpy()[labels] * noise
        smooth = ndimage.gaussian_filter(image, BLUR_VOXELS).clip(0, 1)
        yield Volume(smooth, dseg.grid), Volume(held, dseg.grid)


def at(t1: Volume, spacings: list[float]) -> Iterator[Volume]:
    """The head with cubic voxels of each spacing."""
    for spacing in spacings:
        yield resample(t1, t1.grid.working(spacing, tolerance=0.0), fill=float(t1.data.min()))


if __name__ == "__main__":
    main()
