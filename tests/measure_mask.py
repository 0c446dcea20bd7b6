"""Score the brain-mask network on heads whose brain is known: a table by source.

python tests/measure_mask.py HEADS/mass HEADS/nichart            # as they are
python tests/measure_mask.py HEADS/mass --hard                   # spacings, slices, orientations

A folder is BIDS-like: ``sub-*/anat/*_T1w.nii.gz`` with a ``*_mask.nii.gz`` (taken as it is), or a
``*_dseg.nii.gz`` of the brain (closed with a ball of 5 mm, as the training heads are).
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from cadiff_cli.errors import CadiffError
from cadiff_cli.io.nifti import load_scan, load_volume
from cadiff_cli.io.weights import BrainModel, load_brain_model
from cadiff_cli.metrics.surface import hausdorff95_mm
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import resample
from cadiff_cli.stages.brain import brain_mask
from cadiff_cli.stages.strip import tidy
from cadiff_cli.training.heads import closed

SPACINGS = ((1, 1, 1), (2, 2, 2), (3, 3, 3), (6, 1, 1), (1, 6, 1), (1, 1, 6))
FAILURE = 0.9


def main() -> None:
    """Print a line for each head and one for each source."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--model", default="brain-mask")
    parser.add_argument("--hard", action="store_true")
    parser.add_argument("--close", action="store_true", help="close masks too, as dsegs are")
    parser.add_argument("--every", type=int, default=1, help="take every n-th head")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = load_brain_model(arguments.model)
    variants = hard if arguments.hard else plain
    for folder in arguments.folders:
        heads = sorted(folder.glob("sub-*/**/*_T1w.nii.gz"))[:: arguments.every]
        found = dict[str, list[tuple[float, float]]]()
        for path in heads:
            for name, t1, brain in variants(load_scan(path).t1, truth(path, arguments.close)):
                begun = time.perf_counter()
                overlap, distance_mm, said = score(t1, brain, model)
                seconds = time.perf_counter() - begun
                found.setdefault(name, []).append((overlap, distance_mm))
                if not arguments.hard or overlap < FAILURE:
                    print(
                        f"{folder.name}\t{path.name}\t{name}\tDice {overlap:.4f}"
                        f"\tHD95 {distance_mm:.2f} mm\t{seconds:.1f} s\t{said}",
                        flush=True,
                    )
        for name, values in found.items():
            (dice, far), (low, _), (_, high) = (
                f(values, axis=0) for f in (np.mean, np.min, np.max)
            )
            print(
                f"{folder.name}\t{name}\t{len(values)} heads\tDice {dice:.4f} (least {low:.4f})"
                f"\tHD95 {far:.2f} mm (most {high:.2f})",
                flush=True,
            )


def truth(t1: Path, close: bool) -> Volume:
    """The brain that a head comes with."""
    prefix = t1.name.split("_T1w")[0]
    masks = sorted(t1.parent.glob(f"{prefix}*_mask.nii*"))
    if masks:
        volume = load_volume(masks[0])
        if not close:
            return Volume(np.asarray(volume.data) > 0, volume.grid)
    else:
        volume = load_volume(next(t1.parent.glob(f"{prefix}*_dseg.nii*")))
    return Volume(closed(np.asarray(volume.data) > 0, volume.grid.spacing_mm), volume.grid)


def score(t1: Volume, brain: Volume, model: BrainModel) -> tuple[float, float, str]:
    """Dice, 95 % Hausdorff distance in mm, and what was suspicious."""
    try:
        mask, quality = brain_mask(t1, t1.grid.working(), model)
    except CadiffError as error:
        return 0.0, np.inf, str(error)
    smooth = Volume(tidy(mask.data).astype(np.float32), mask.grid)
    found = resample(smooth, t1.grid).data > 0.5
    overlap = 2 * np.count_nonzero(found & brain.data) / (found.sum() + brain.data.sum())
    far = hausdorff95_mm(
        found.astype(np.uint8), brain.data.astype(np.uint8), (1,), t1.grid.spacing_mm.tolist()
    )[0]
    return float(overlap), float(far), "; ".join(quality.warnings)


def plain(t1: Volume, brain: Volume) -> Iterator[tuple[str, Volume, Volume]]:
    """The head as it is."""
    yield "as it is", t1, brain


def hard(t1: Volume, brain: Volume) -> Iterator[tuple[str, Volume, Volume]]:
    """The head at other spacings, and stored along each of the 48 orders and signs of the axes."""
    box = t1.grid.working(1.0, tolerance=0.0)
    for spacing in SPACINGS:
        affine = box.affine @ np.diag([*spacing, 1.0])
        shape = tuple(int(n) for n in np.ceil(np.array(box.shape) / spacing))
        grid = Grid((shape[0], shape[1], shape[2]), affine)
        inside = Volume(brain.data.astype(np.float32), brain.grid)
        inner = Volume(resample(inside, grid).data > 0.5, grid)
        yield f"{' x '.join(map(str, spacing))} mm", resample(t1, grid), inner
    small = box.coarsen(3)
    inside = Volume(brain.data.astype(np.float32), brain.grid)
    at_3mm = resample(t1, small).data, resample(inside, small).data > 0.5
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            turned = [stored(data, small, order, signs) for data in at_3mm]
            yield "48 orientations at 3 mm", turned[0], turned[1]


def stored(data: np.ndarray, grid: Grid, order: tuple[int, ...], signs: tuple[int, ...]) -> Volume:
    """The same voxels at the same places, written along other axes."""
    affine = grid.affine.copy()
    affine[:3, :3] = affine[:3, list(order)]
    data = np.transpose(data, order)
    for axis, sign in enumerate(signs):
        if sign < 0:
            affine[:3, 3] += affine[:3, axis] * (data.shape[axis] - 1)
            affine[:3, axis] *= -1
            data = np.flip(data, axis)
    shape = data.shape
    return Volume(np.ascontiguousarray(data), Grid((shape[0], shape[1], shape[2]), affine))


if __name__ == "__main__":
    main()
