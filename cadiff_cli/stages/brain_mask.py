"""The learned brain mask: a head on any grid -> signed distance to the brain's border -> mask.

The network may know the inner skull, too: then there are two masks.
"""

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.device import autocast
from cadiff_cli.errors import DataError
from cadiff_cli.nets.brain_mask import REACH_MM, SPACING_MM, BrainNet
from cadiff_cli.nets.models import BrainModel
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import (
    bounding_box,
    mapped_box,
    resample,
    resample_in,
)
from cadiff_cli.stages.masks import tidy, without_threads

BOX_MARGIN_MM = 9.0
"""Margin around the first network's brain within which the second network refines it."""
SKULL_MARGIN_MM = 24.0
"""The inner skull is looked for so far from the brain: a shrunken one lies far from it."""
DEEP_MM = 6.0
"""Voxels farther inside the brain than this are deep inside."""
NO_BRAIN_LITRES = 0.12
"""A smaller volume deep inside is no brain at all; a larger one may be a newborn's."""
LEAST_DEEP_LITRES = 0.3
"""A brain of half a litre has this volume deep inside; a false brain in noise has 0.09 l."""


def network_image(t1: Volume) -> Volume:
    """The network's input from a scan: 2 mm voxels in RAS axes, intensities in [0, 1].

    It is the same, up to rounding, for all 48 orders and directions of a scan's axes.
    """
    grid = t1.grid.working(SPACING_MM, tolerance=0.0)
    return Volume(normalise_head(resample(t1, grid, fill=float(t1.data.min())).data), grid)


def normalise_head(image: np.ndarray) -> np.ndarray:
    """Scale intensities to [0, 1]: air becomes 0, the 99.5th percentile of brighter voxels 1.

    Air is the median of the darkest twentieth of the image.
    """
    low = float(np.median(image[image <= np.percentile(image, 5)]))
    above = image[image > low]
    high = float(np.percentile(above, 99.5)) if len(above) else low
    scaled = (image - low) / ((high - low) or 1.0)
    return np.asarray(np.clip(scaled, 0, 1), dtype=np.float32)


@torch.no_grad()
def predict_distance(net: BrainNet, head: np.ndarray) -> np.ndarray:
    """(X, Y, Z) intensities in [0, 1] at 2 mm -> signed distance to the brain's border.

    (X, Y, Z) float32 in mm, inside positive, within the network's reach.  The image is padded with
    air to the sizes that the network takes.  Only a box around the brain of the first network is
    looked at more closely.
    """
    x = _padded(head, net)
    with autocast(x.device):
        located = net.locate(x)
        distance = F.interpolate(located, scale_factor=2, mode="trilinear")
        if box := _around(located[0, 0] > -BOX_MARGIN_MM, net.config.fine_multiple // 2):
            a, b, c = box
            i, j, k = (slice(2 * s.start, 2 * s.stop) for s in box)
            distance[..., i, j, k] = net.refine(x[..., i, j, k], located[..., a, b, c])
    i, j, k = (slice(0, n) for n in head.shape)
    near = distance[0, 0, i, j, k].clamp(-REACH_MM, REACH_MM)
    return np.asarray(near.float().cpu().numpy())


def _padded(head: np.ndarray, net: BrainNet) -> torch.Tensor:
    """(1, 1, X, Y, Z): the image, padded with air to the sizes that the network takes."""
    pad = [(0, -n % net.config.multiple) for n in head.shape]
    return torch.from_numpy(np.pad(head, pad))[None, None].to(next(net.parameters()).device)


def _around(inside: torch.Tensor, multiple: int) -> tuple[slice, ...]:
    """The box around (X, Y, Z) bool, in multiples of ``multiple`` voxels; () if all are False.

    Sizes of ``inside`` must be such multiples.
    """
    box = []
    for axis in range(3):
        indices = inside.movedim(axis, 0).flatten(1).any(dim=1).nonzero()
        if not len(indices):
            return ()
        low = int(indices[0]) // multiple * multiple
        high = -(-(int(indices[-1]) + 1) // multiple) * multiple
        box.append(slice(low, high))
    return tuple(box)


def find_brain_in_head(head: Volume, working: Grid, model: BrainModel) -> tuple[Volume, Volume]:
    """The brain's mask (bool) on the ``working`` grid, and the distance to its border at 2 mm.

    ``head`` is the ``network_image`` of a scan, of any size and orientation, with or without a
    neck.  The mask is as the network draws it: ``strip`` judges and tidies it.  The distance is in
    mm, inside positive.  Raises ``DataError`` if no brain is found.
    """
    distance = Volume(predict_distance(model.net, head.data), head.grid)
    deep = Volume(tidy(distance.data > 0) & (distance.data > DEEP_MM), distance.grid)
    if deep.litres < LEAST_DEEP_LITRES:
        problem = "no brain found" if deep.litres < NO_BRAIN_LITRES else "the brain is too small"
        raise DataError(
            f"{problem}: {deep.litres:.2f} l of the image lie deep inside one,"
            f" at least {LEAST_DEEP_LITRES} l should",
            "is this a T1-weighted head, and not a newborn's? Check the header's voxel sizes and"
            " axes, or give --mask FILE",
        )
    return _inside(distance, working), distance


@torch.no_grad()
def find_skull(head: Volume, distance: Volume, working: Grid, model: BrainModel) -> Volume | None:
    """What the inner skull of a head holds (bool) on the ``working`` grid: one piece, no holes.

    ``head`` is the ``network_image`` of a scan, ``distance``, on the same grid, that to the brain's
    border (``find_brain_in_head``); voxels deep inside a brain are always held.  None if the
    network does not know the skull.
    """
    net = model.net
    if not net.config.skull:
        return None
    box = bounding_box(tidy(distance.data > 0), int(SKULL_MARGIN_MM / SPACING_MM))
    part = distance.grid.within(box)
    # What lies beyond the field of view is not known: air there would be an end of the head.
    pad = [(0, -n % net.config.skull_multiple) for n in part.shape]
    x, depth = (
        torch.from_numpy(np.pad(data[box], pad, mode="edge"))[None, None]
        for data in (head.data, distance.data)
    )
    device = next(net.parameters()).device
    with autocast(device):
        p = net.enclose(x.to(device), depth.to(device))[0].cpu().numpy()
    eighths = part.working(SPACING_MM / 2, tolerance=0.0)  # of the same field of view
    known = Volume(p[tuple(slice(n) for n in eighths.shape)], eighths)
    held = resample(known, working).data > 0.5
    held |= resample(distance, working, fill=-REACH_MM).data > DEEP_MM
    return Volume(without_threads(held, working.spacing_mm), working)


def _inside(distance: Volume, working: Grid) -> Volume:
    """Where the distance is positive (bool), on the working grid."""
    # Linear interpolation reaches one voxel beyond the border.
    wide = tuple(slice(s.start - 1, s.stop + 1) for s in bounding_box(distance.data > 0))
    box = mapped_box(wide, working.voxel_map(distance.grid), working.shape)
    fine = resample_in(box, distance, working, fill=-REACH_MM)
    return Volume(fine.data > 0, working)
