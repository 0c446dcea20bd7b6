"""Name the parcels of the cerebral cortex: a finer label map that agrees with the first one.

Every cortex voxel of the segmentation gets a parcel of its hemisphere, and no other voxel does.
The network is asked at these voxels, on the scan's own grid: no labels are resampled.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cadiff_cli.device import autocast, enough_memory, usable_device
from cadiff_cli.errors import UsageError
from cadiff_cli.labels.parcellation import BASE, Parcellation, load_parcellation
from cadiff_cli.nets.models import ParcelModel
from cadiff_cli.nets.parcels import MULTIPLE, STRIDE, ParcelNet, sampled
from cadiff_cli.products import Conditions, Segmentation
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.spatial.probabilities import fractions
from cadiff_cli.spatial.resample import bounding_box, resample_labels

LEFT_CORTEX, LEFT_WHITE = 3, 2
"""Codes of ``BASE``."""
MARGIN_VOXELS = 8
"""Around a hemisphere's cortex, so that the network sees what is beside it."""
AT_ONCE = 100_000
"""Voxels that the network is asked about together: memory stays small on any grid."""


@dataclass(frozen=True, eq=False)
class Hemisphere:
    """What the network sees of a hemisphere; a right one is mirrored, and looks left.

    ``classes`` (X, Y, Z) are those of ``BASE`` at 1 mm, in the box that begins at the voxel
    ``start`` of the volume (which is mirrored, too); ``field`` (3, X/4, Y/4, Z/4) is D in the
    middles of its cells.
    """

    classes: np.ndarray
    field: np.ndarray
    start: np.ndarray

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """``detail``, ``shares`` and ``field`` of ``ParcelNet.forward``."""
        return detail(self.classes), shares(self.classes), torch.from_numpy(self.field)[None]


def parcellate(
    segmentation: Segmentation,
    conditions: Conditions,
    model: ParcelModel,
    device_name: str = "auto",
) -> Segmentation:
    """The segmentation, one of ``BASE``, in the finer parcellation of ``model``; on the same grid.

    It has a ``confidence`` where the segmentation has ``posteriors``.  Raises ``UsageError``
    without a field (the network may find one, but keeps it) and for a segmentation that has other
    structures.
    """
    if (field := conditions.field) is None:
        raise UsageError(
            f"{model.parcellation.name} needs the distance field of a registration",
            "leave out --registration none, or --parcellation",
        )
    if segmentation.parcellation.name != BASE:
        raise UsageError(
            f"{model.parcellation.name} divides the cortex of {BASE}, not of"
            f" {segmentation.parcellation.name}",
            "use another --model, or leave out --parcellation",
        )
    crop = conditions.image.grid
    base, finer, labels = load_parcellation(BASE), model.parcellation, segmentation.labels
    to_class = Volume(base.encode(labels.data, base.class_of), labels.grid)
    near = resample_labels(to_class, crop).data
    codes, sure = labels.data.copy(), np.zeros(labels.data.shape, np.float16)
    expected = {c: x for c, x in segmentation.expected_dice.items() if c in finer.class_of}
    device, _ = usable_device(device_name)
    net = model.net.to(device)
    left, to_crop = left_parcels(finer), crop.voxel_map(labels.grid)
    for right in (False, True):
        cortex = base.structures[base.class_of[LEFT_CORTEX] - 1]
        there = np.argwhere(labels.data == (cortex.mirror if right else cortex.code))
        if not len(there):
            continue
        drawn = [finer.structures[finer.class_of[c] - 1].mirror for c in left] if right else left
        points = there @ to_crop[:3, :3].T + to_crop[:3, 3]
        seen, place = near, field.data
        if right:
            seen, place = mirrored(near, base), mirrored_field(field.data)
            points[:, 0] = crop.shape[0] - 1 - points[:, 0]
        with enough_memory():
            p = probabilities(net, hemisphere(seen, place), points, device)
        best = p.argmax(axis=1)
        codes[tuple(there.T)] = np.asarray(drawn, np.int16)[best]
        sure[tuple(there.T)] = p.max(axis=1)
        expected |= {drawn[k]: d for k, d in _expected_dice(p, best)}
    return replace(
        segmentation,
        labels=Volume(codes, labels.grid),
        parcellation=finer,
        posteriors=None,
        confidence=sure if segmentation.posteriors is not None else None,
        uncertainty=None,
        expected_dice=expected,
        volume_sd_mm3={c: x for c, x in segmentation.volume_sd_mm3.items() if c in finer.class_of},
        notes=(),
    )


@torch.no_grad()
def probabilities(
    net: ParcelNet, seen: Hemisphere, points: np.ndarray, device: torch.device
) -> np.ndarray:
    """(n, parcels) float32 at ``points`` (n, 3), in voxels of the volume that ``seen`` is part of.

    The features of the hemisphere are computed once for all of them.
    """
    inputs = [x.to(device) for x in seen.inputs()]
    at = torch.from_numpy(points - seen.start).float()
    with autocast(device):
        cells = net.features(*inputs)
        parts = [
            net.logits(cells, inputs[0], inputs[2], part.to(device)).float().softmax(dim=1).cpu()
            for part in torch.split(at, AT_ONCE)
        ]
    return torch.cat(parts).numpy()


def left_parcels(parcellation: Parcellation) -> list[int]:
    """Codes of the parcels of the left cortex, in the order of the network's logits."""
    return [s.code for s in parcellation.structures if s.parent == LEFT_CORTEX]


def mirrored(classes: np.ndarray, parcellation: Parcellation) -> np.ndarray:
    """Classes (X, Y, Z) of the left-right mirrored brain."""
    return np.asarray(parcellation.mirror_classes[classes[::-1]].astype(classes.dtype))


def mirrored_field(field: np.ndarray) -> np.ndarray:
    """D (3, X, Y, Z) of the left-right mirrored brain: D_x becomes 1 - D_x."""
    turned = field[:, ::-1].copy()
    turned[0] = 1 - turned[0]
    return turned


def hemisphere(classes: np.ndarray, field: np.ndarray) -> Hemisphere:
    """The left hemisphere of a brain: classes of ``BASE`` at 1 mm, and D on a coarser grid.

    The field covers the same volume as the classes.
    """
    cortex = load_parcellation(BASE).class_of[LEFT_CORTEX]
    box = bounding_box(classes == cortex)
    start = np.array([s.start for s in box]) - MARGIN_VOXELS
    size = np.array([s.stop for s in box]) + MARGIN_VOXELS - start
    return cut(classes, field, start, -(-size // MULTIPLE) * MULTIPLE)


def cut(classes: np.ndarray, field: np.ndarray, start: np.ndarray, shape: np.ndarray) -> Hemisphere:
    """A box of a brain, which may leave the volume: there is background, and the field's border."""
    padded = np.zeros(tuple(shape), classes.dtype)
    low, high = np.maximum(start, 0), np.minimum(start + shape, classes.shape)
    inside, source = (
        tuple(slice(a, max(a, b)) for a, b in zip(x, y, strict=True))
        for x, y in ((low - start, high - start), (low, high))
    )
    padded[inside] = classes[source]
    middles = np.indices(tuple(shape // STRIDE)).reshape(3, -1).T * STRIDE + (STRIDE - 1) / 2
    at = torch.from_numpy((middles + start + 0.5) / classes.shape).float()
    values = sampled(torch.from_numpy(np.ascontiguousarray(field)).float()[None], at, corners=False)
    return Hemisphere(padded, values.T.reshape(3, *(shape // STRIDE)).numpy(), start)


def detail(classes: np.ndarray) -> Tensor:
    """(1, 3, X, Y, Z) of 0 and 1: left cortex, left white matter, every other structure."""
    known = load_parcellation(BASE).class_of
    cortex, white = (classes == known[code] for code in (LEFT_CORTEX, LEFT_WHITE))
    maps = np.stack([cortex, white, (classes > 0) & ~cortex & ~white])
    return torch.from_numpy(maps.astype(np.float32))[None]


def shares(classes: np.ndarray) -> Tensor:
    """(1, classes, X/4, Y/4, Z/4): the fraction of each class of ``BASE`` in each cell."""
    n = load_parcellation(BASE).n_classes
    return fractions(torch.from_numpy(classes.astype(np.int64))[None], n, STRIDE)


def _expected_dice(p: np.ndarray, best: np.ndarray) -> Iterator[tuple[int, float]]:
    """(parcel, Dice to expect if the truth were drawn from ``p``) of those that were drawn."""
    for k in range(p.shape[1]):
        here = best == k
        if here.any():
            yield k, 2 * float(p[here, k].sum()) / float(here.sum() + p[:, k].sum())
