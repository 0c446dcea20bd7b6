"""Score the brain-mask network on heads whose brain is known: a table by source.

python tools/measure_mask.py HEADS/mass HEADS/nichart            # as they are
python tools/measure_mask.py HEADS/mass --spacings --orientations
python tools/measure_mask.py HEADS/mass --contrasts --model MASK.safetensors  # as in T2, FLAIR...
python tools/measure_mask.py --synthetic 6 --spacings --figure worst.png
python tools/measure_mask.py HEADS/ixi HEADS/nichart --edges     # how wide its brains are
python tools/measure_mask.py HEADS/nichart --shift 0.9           # against brains so much narrower

A folder is BIDS-like: ``sub-*/anat/*_T1w.nii.gz`` with a ``*_mask.nii.gz`` (taken as it is), or a
``*_dseg.nii.gz`` of the brain (closed with a ball of 5 mm, as the training heads are).  Synthetic
heads (``synthetic_head.py``) are free to be shown: ``--figure`` draws the worst of them.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy import ndimage

from cadiff_cli.errors import CadiffError
from cadiff_cli.io import models
from cadiff_cli.io.images import load_scan
from cadiff_cli.metrics.surface import hausdorff95_mm
from cadiff_cli.nets.models import BrainModel
from cadiff_cli.notes import texts
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import resample, resample_mask
from cadiff_cli.stages.brain_mask import find_brain_in_head, network_image, normalise_head
from cadiff_cli.stages.masks import doubts, judge_mask, tidy
from cadiff_cli.training.brain_mask.data import brain_of, load_brain
from cadiff_cli.training.brain_mask.target import closed, signed_distance

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from synthetic_head import stored, synthetic_head

mpl.use("Agg")

SPACINGS = ((1, 1, 1), (2, 2, 2), (3, 3, 3), (6, 1, 1), (1, 6, 1), (1, 1, 6))
FAILURE = 0.9
CONTRASTS = {
    "as it is": ((0, 1), (0, 1)),
    "like T2": ((0, 0.08, 0.25, 0.55, 0.85, 1), (0, 0.08, 1, 0.6, 0.3, 0.6)),
    "like FLAIR": ((0, 0.08, 0.25, 0.55, 0.85, 1), (0, 0.08, 0.1, 0.9, 0.6, 0.9)),
    "inverted": ((0, 0.08, 0.1, 1), (0, 0, 1, 0.1)),
}
"""Curves from the brightness of a T1-weighted head (0 to 1) to that of another contrast.  Fluid has
about 0.25 in T1, grey matter 0.55, white matter 0.85; bone and air stay dark, but for the last."""


@dataclass(frozen=True, eq=False)
class Case:
    """A mask that was found, and what it should be."""

    name: str
    t1: Volume
    brain: Volume
    found: np.ndarray
    dice: float
    hd95_mm: float
    said: str


def main() -> None:
    """Print a line for each head and one for each source."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--synthetic", type=int, default=0, help="so many synthetic heads too")
    parser.add_argument("--model", default="brain-mask")
    parser.add_argument("--spacings", action="store_true", help="1, 2, 3 mm and slices of 6 mm")
    parser.add_argument("--orientations", action="store_true", help="the 48 orders of the axes")
    parser.add_argument("--contrasts", action="store_true", help="brightness along other curves")
    parser.add_argument("--close", action="store_true", help="close masks too, as dsegs are")
    parser.add_argument("--shift", type=float, default=0.0, help="references narrower by, mm")
    parser.add_argument("--edges", action="store_true", help="no network: where the edges lie")
    parser.add_argument("--every", type=int, default=1, help="take every n-th head")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--figure", type=Path, help="draw the worst synthetic case")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.edges:
        for folder in arguments.folders:
            depths = [edge_depth_mm(t1, brain) for _, t1, brain in real(folder, arguments)]
            print(
                f"{folder.name}\t{len(depths)} heads\tthe steepest edge lies"
                f" {np.mean(depths):.2f} mm (SD {np.std(depths):.2f}) inside the mask"
            )
        return
    model = models.load(BrainModel, arguments.model)
    chosen = [at_spacings] * arguments.spacings + [turned] * arguments.orientations
    chosen += [recoloured] * arguments.contrasts
    sources = {folder.name: real(folder, arguments) for folder in arguments.folders}
    sources["synthetic"] = (
        (f"seed {seed}", *synthetic_head(seed)) for seed in range(arguments.synthetic)
    )
    worst: Case | None = None
    for source, heads in sources.items():
        found = dict[str, list[tuple[float, float]]]()
        for head, whole, wanted in heads:
            variants = (variant(whole, wanted) for variant in chosen or [plain])
            for variant, t1, brain in itertools.chain.from_iterable(variants):
                begun = time.perf_counter()
                case = score(f"{head}, {variant}", t1, brain, model)
                seconds = time.perf_counter() - begun
                found.setdefault(variant, []).append((case.dice, case.hd95_mm))
                if source == "synthetic" and (worst is None or case.dice < worst.dice):
                    worst = case
                if not chosen or case.dice < FAILURE:
                    print(
                        f"{source}\t{case.name}\tDice {case.dice:.4f}"
                        f"\tHD95 {case.hd95_mm:.2f} mm\t{seconds:.1f} s\t{case.said}",
                        flush=True,
                    )
        for variant, values in found.items():
            (dice, far), (low, _), (_, high) = (
                f(values, axis=0) for f in (np.mean, np.min, np.max)
            )
            print(
                f"{source}\t{variant}\t{len(values)} images\tDice {dice:.4f} (least {low:.4f})"
                f"\tHD95 {far:.2f} mm (most {high:.2f})",
                flush=True,
            )
    if arguments.figure and worst:
        draw(worst, arguments.figure)


def real(folder: Path, arguments: argparse.Namespace) -> Iterator[tuple[str, Volume, Volume]]:
    """(name, T1, brain) of every n-th head of a folder."""
    for path in sorted(folder.glob("sub-*/**/*_T1w.nii.gz"))[:: arguments.every]:
        brain = truth(path, arguments.close)
        if arguments.shift:
            depth = smooth_depth_mm(brain.data, brain.grid.spacing_mm)
            brain = Volume(depth > arguments.shift, brain.grid)
        yield path.name, load_scan(path).t1, brain


def smooth_depth_mm(inside: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Signed distance to a mask's border, smoothed by 0.7 voxels: it varies within a voxel too."""
    return np.asarray(ndimage.gaussian_filter(signed_distance(inside, spacing_mm), 0.7))


def edge_depth_mm(t1: Volume, brain: Volume) -> float:
    """How far inside a mask the image rises most steeply, over the upper half of the brain.

    That rise is from the CSF to the cortex, so what differs between sources is where their masks
    end.  Both are looked at in RAS axes at 2 mm.
    """
    grid = brain.grid.working(2.0, tolerance=0.0)
    inside = resample_mask(brain, grid).data
    depth = smooth_depth_mm(inside, grid.spacing_mm)
    image = ndimage.gaussian_filter(resample(t1, grid).data.astype(np.float32), 0.5)
    inwards = np.stack(np.gradient(depth))
    slope = (np.stack(np.gradient(image)) * inwards).sum(axis=0)
    slope /= np.maximum(np.linalg.norm(inwards, axis=0), 1e-3)
    top = int(np.median(np.argwhere(inside)[:, 2]))
    slope, depth = slope[:, :, top:], depth[:, :, top:]
    at = np.arange(-3, 8, 0.25)
    near = [np.exp(-(((depth - a) / 0.6) ** 2) / 2) for a in at]
    return float(at[np.argmax([(slope * w).sum() / w.sum() for w in near])])


def truth(t1: Path, close: bool) -> Volume:
    """The brain that a head comes with."""
    brain, ends_at_cortex = load_brain(brain_of(t1))
    if close or ends_at_cortex:
        return Volume(closed(brain.data, brain.grid.spacing_mm), brain.grid)
    return brain


def score(name: str, t1: Volume, brain: Volume, model: BrainModel) -> Case:
    """What the network finds, with Dice, 95 % Hausdorff distance, and what was suspicious."""
    try:
        mask, _ = find_brain_in_head(network_image(t1), t1.grid.working(), model)
    except CadiffError as error:
        return Case(name, t1, brain, np.zeros(t1.grid.shape, bool), 0.0, np.inf, str(error))
    found = resample_mask(Volume(tidy(mask.data), mask.grid), t1.grid).data
    overlap = 2 * np.count_nonzero(found & brain.data) / (found.sum() + brain.data.sum())
    far = hausdorff95_mm(
        found.astype(np.uint8), brain.data.astype(np.uint8), (1,), t1.grid.spacing_mm.tolist()
    )[0]
    said = "; ".join(texts(doubts(judge_mask(mask))))
    return Case(name, t1, brain, found, float(overlap), float(far), said)


def draw(case: Case, path: Path) -> None:
    """Three planes through the brain's centre: what should be found in white, what was in red."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
    middle = np.argwhere(case.brain.data).mean(axis=0).astype(int)
    sides = case.t1.grid.spacing_mm
    for axis, panel in enumerate(axes):
        plane = [np.take(d, middle[axis], axis=axis).T for d in (case.t1.data, case.found)]
        wanted = np.take(case.brain.data, middle[axis], axis=axis).T
        across, up = (sides[i] for i in range(3) if i != axis)
        panel.imshow(plane[0], cmap="gray", origin="lower", aspect=up / across)
        panel.contour(wanted, [0.5], colors="white", linewidths=1)
        if plane[1].any():
            panel.contour(plane[1], [0.5], colors="red", linewidths=1)
        panel.axis("off")
    figure.suptitle(f"{case.name}: Dice {case.dice:.3f}", fontsize=9)
    figure.savefig(path, dpi=110)


def plain(t1: Volume, brain: Volume) -> Iterator[tuple[str, Volume, Volume]]:
    """The head as it is."""
    yield "as it is", t1, brain


def at_spacings(t1: Volume, brain: Volume) -> Iterator[tuple[str, Volume, Volume]]:
    """The head with other voxels."""
    box = t1.grid.working(1.0, tolerance=0.0)
    for spacing in SPACINGS:
        affine = box.affine @ np.diag([*spacing, 1.0])
        shape = tuple(int(n) for n in np.ceil(np.array(box.shape) / spacing))
        grid = Grid((shape[0], shape[1], shape[2]), affine)
        name = f"{' x '.join(map(str, spacing))} mm"
        yield name, resample(t1, grid), resample_mask(brain, grid)


def recoloured(t1: Volume, brain: Volume) -> Iterator[tuple[str, Volume, Volume]]:
    """The head with the brightness of other sequences."""
    bright = normalise_head(t1.data)
    for name, (knots, values) in CONTRASTS.items():
        yield name, Volume(np.interp(bright, knots, values).astype(np.float32), t1.grid), brain


def turned(t1: Volume, brain: Volume) -> Iterator[tuple[str, Volume, Volume]]:
    """The head at 3 mm, stored along each of the 48 orders and signs of the axes.

    Those of which the network sees an image that it has seen already are not scored again.
    """
    small = t1.grid.working(1.0, tolerance=0.0).coarsen(3)
    at_3mm = resample(t1, small).data, resample_mask(brain, small).data
    seen: list[np.ndarray] = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            images = [stored(data, small, order, signs) for data in at_3mm]
            sees = network_image(images[0]).data
            if not any(s.shape == sees.shape and np.allclose(s, sees, atol=1e-5) for s in seen):
                seen.append(sees)
                yield "48 orientations at 3 mm", images[0], images[1]


if __name__ == "__main__":
    main()
