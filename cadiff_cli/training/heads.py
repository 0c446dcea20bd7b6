"""Whole heads to learn the brain mask from: label maps that become images, and real scans.

The mask to learn is the one that the segmentation network was trained inside: brain, cerebellum,
brain stem and ventricles, with the CSF of the sulci but not that around the brain.  Closing the
labelled brain with a ball of 5 mm gives that mask (Dice 0.996 with the MALC scans' own), whatever
labels a source comes with, so sources agree.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import monai.transforms as mt
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset

from cadiff_cli.errors import DataError
from cadiff_cli.io.files import replacing
from cadiff_cli.labels.parcellation import BASE, load_parcellation
from cadiff_cli.nets.brain import REACH_MM, SPACING_MM, BrainNet
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.spatial.resample import bounding_box, resample, resample_labels
from cadiff_cli.stages.brain import normalise
from cadiff_cli.training.augment import (
    low_resolution,
    nearest,
    read,
    rotation,
    smooth_noise,
    thicken,
)
from cadiff_cli.training.loop import Schedule, series

CLOSING_MM = 5.0
NOT_BRAIN = (500, 1000)
"""FreeSurfer-like label maps of whole heads: codes between are skull, skin, eyes, air..."""
VERMIS = (630, 631, 632)
OUTER_CSF = (24, 257, 258, 259)
"""Fluid around the brain, and what FreeSurfer knows of the head."""
LEAST_LITRES = 0.1
"""Less is no brain, but a lesion or a slip."""
FAR_MM = 1.5 * REACH_MM
"""Stored distances end here: beyond the network's reach even after a head has been scaled."""


@dataclass(frozen=True, eq=False)
class Head:
    """A head on a 2 mm RAS grid.

    ``distance`` (X, Y, Z) float16 is the signed distance (mm, inside positive) to the mask's
    border.  ``image`` (X, Y, Z) uint8 is a real scan; without one ``labels`` (X, Y, Z) uint8 are
    turned into images.
    """

    name: str
    source: str
    distance: np.ndarray
    image: np.ndarray | None = None
    labels: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class HeadPatch:
    """``image`` (B, 1, N, N, N) in [0, 1]; ``distance`` (B, 1, N, N, N) in mm, within the reach."""

    image: Tensor
    distance: Tensor

    def to(self, device: torch.device) -> "HeadPatch":
        """The same on another device."""
        return HeadPatch(self.image.to(device), self.distance.to(device))

    def pin_memory(self) -> "HeadPatch":
        """The same in memory that a GPU can fetch by itself."""
        return HeadPatch(self.image.pin_memory(), self.distance.pin_memory())


@dataclass(frozen=True)
class HeadConfig(Schedule):
    """How to train the brain mask, and what heads go through.

    ``patch`` voxels a side at 2 mm: as much as a head with its neck.  ``off_centre_mm`` is how far
    a patch's centre may lie from the brain's.  ``tilted`` is the share of heads that lie in any
    way, up to ``rotation_deg``; the others lie as a technician lays them, up to a quarter of that.
    ``cut`` and ``deface`` are the shares of heads whose field of view ends within the head, and
    whose face is removed; ``shrunken`` that of brains which are up to ``shrink_mm`` smaller than
    their skulls, with CSF between.  In the first ``coarse_steps`` only the network that locates the
    brain learns.

    More shares: ``turned`` heads lie along other axes, as under a wrong header; ``small`` ones are
    children's, down to ``smallest`` of their size; ``bright_scalp`` ones have the contrast of a
    clinical spin echo; ``strong_bias`` that of a surface coil; ``stripped`` ones are brains alone.
    Of the others, some have air that the scanner has zeroed (``zeroed_air``), or noise as bright as
    brain in it (``noisy_air``, MP2RAGE).
    """

    coarse_steps: int = 700
    patch: int = 128
    rotation_deg: float = 45.0
    tilted: float = 0.2
    turned: float = 0.12
    scale: float = 0.15
    small: float = 0.1
    smallest: float = 0.65
    elastic_mm: float = 3.0
    off_centre_mm: float = 30.0
    real: float = 0.6
    cut: float = 0.2
    deface: float = 0.2
    shrunken: float = 0.25
    shrink_mm: float = 7.0
    empty: float = 0.12
    slice_mm: float = 8.0
    bright_scalp: float = 0.2
    strong_bias: float = 0.2
    stripped: float = 0.12
    zeroed_air: float = 0.25
    noisy_air: float = 0.1


def closed(brain: np.ndarray, spacing_mm: np.ndarray, radius_mm: float = CLOSING_MM) -> np.ndarray:
    """``brain`` (X, Y, Z) bool closed with a ball, holes filled: the mask that is learnt."""
    width = np.ceil(radius_mm / spacing_mm).astype(int) + 1
    box = _box(brain)
    padded = np.pad(brain[box], [(n, n) for n in width])
    near = ndimage.distance_transform_edt(~padded, sampling=spacing_mm) <= radius_mm
    kept = ndimage.distance_transform_edt(near, sampling=spacing_mm) > radius_mm
    inner = tuple(slice(n, -n) for n in width)
    out = np.zeros_like(brain)
    out[box] = ndimage.binary_fill_holes(kept | padded)[inner]
    return out


def signed_distance(mask: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Distance (mm) to the border between voxels, inside positive, cut at ``FAR_MM``."""
    width = np.ceil(FAR_MM / spacing_mm).astype(int) + 1
    box = _box(mask, width)
    part = mask[box]
    inside = ndimage.distance_transform_edt(part, sampling=spacing_mm)
    outside = ndimage.distance_transform_edt(~part, sampling=spacing_mm)
    # Both transforms measure to voxel centres; the border lies half a voxel nearer.
    half = float(spacing_mm.mean()) / 2
    out = np.full(mask.shape, -FAR_MM, dtype=np.float32)
    out[box] = np.clip(np.where(part, inside - half, half - outside), -FAR_MM, FAR_MM)
    return out


def _box(mask: np.ndarray, margin: np.ndarray | int = 0) -> tuple[slice, ...]:
    """The bounding box of a mask, widened by ``margin`` voxels where there are any."""
    if not mask.any():
        raise DataError("the brain mask is empty", "remove this scan, or repair its labels")
    margins = np.broadcast_to(margin, 3)
    found = bounding_box(mask)
    return tuple(
        slice(max(0, s.start - int(m)), s.stop + int(m))
        for s, m in zip(found, margins, strict=True)
    )


def content(head: Head) -> str:
    """What tells a head from others, and from itself with another brain."""
    pixels = head.labels if head.image is None else head.image
    parts = (head.distance, pixels)
    digest = hashlib.sha256(b"".join(part.tobytes() for part in parts if part is not None))
    return f"{head.source} {head.name} {digest.hexdigest()}"


def is_brain(codes: np.ndarray) -> np.ndarray:
    """Where FreeSurfer's codes, or ours, mean brain: neither the CSF around it nor 5xx to 9xx.

    The vermis has codes among these; cortical parcels lie above them.  Other programs' ids are
    brain wherever they are not 0, as none of DLMUSE's lie among these.
    """
    around = (codes >= NOT_BRAIN[0]) & (codes < NOT_BRAIN[1]) & ~np.isin(codes, VERMIS)
    return np.asarray((codes > 0) & ~np.isin(codes, OUTER_CSF) & ~around)


def from_labels(name: str, source: str, dseg: Volume) -> Head:
    """A head without an image: ``dseg`` holds FreeSurfer's codes and 5xx for what is around."""
    codes = np.rint(dseg.data).astype(np.int32)
    brain = is_brain(codes)
    distance = _distance(Volume(closed(brain, dseg.grid.spacing_mm), dseg.grid))
    # Left and right share their intensities, so they share a label.
    left = load_parcellation(BASE).left_codes
    known, compact = np.unique(codes, return_inverse=True)
    _, paired = np.unique([left.get(int(code), int(code)) for code in known], return_inverse=True)
    if paired.max() > 255:
        raise DataError(f"{paired.max()} different labels", "give a label map of at most 255")
    compact = paired[compact].reshape(codes.shape)
    small = resample_labels(Volume(compact.astype(np.uint8), dseg.grid), distance.grid)
    return Head(name, source, distance.data.astype(np.float16), labels=small.data.copy())


def from_scan(name: str, source: str, t1: Volume, brain: Volume, *, close: bool) -> Head:
    """A real head and a brain on its grid; ``close`` where the brain ends at the cortex."""
    mask = np.asarray(brain.data) > 0.5
    litres = Volume(mask, brain.grid).litres
    if litres < LEAST_LITRES:
        raise DataError(f"the brain mask holds {litres:.3f} l", "is it one of the brain?")
    if close:
        mask = closed(mask, brain.grid.spacing_mm)
    distance = _distance(Volume(ndimage.binary_fill_holes(mask), brain.grid))
    image = normalise(resample(t1, distance.grid).data)
    return Head(
        name, source, distance.data.astype(np.float16), np.round(image * 255).astype(np.uint8)
    )


def _distance(mask: Volume) -> Volume:
    """Signed distance of a mask, on a 2 mm RAS grid."""
    fine = Volume(signed_distance(mask.data, mask.grid.spacing_mm), mask.grid)
    return resample(fine, mask.grid.working(SPACING_MM, tolerance=0.0), fill=-FAR_MM)


class HeadDraws(Dataset[HeadPatch]):
    """Patch ``i`` of an endless series: a function of ``seed`` and ``i`` alone.

    A source is drawn as often as the square root of its heads' number: neither a large one nor a
    small one decides what a brain is.
    """

    def __init__(self, heads: Sequence[Head], config: HeadConfig) -> None:
        self.real = [h for h in heads if h.image is not None]
        self.drawn = [h for h in heads if h.labels is not None]
        self.config = config

    def __getitem__(self, index: int) -> HeadPatch:
        """Draw a source, a head of it, and a patch; or nothing."""
        generator = torch.Generator().manual_seed(self.config.seed * 10_000_019 + index)
        if float(torch.rand(1, generator=generator)) < self.config.empty:
            return draw_nothing(self.config, generator)
        want_real = float(torch.rand(1, generator=generator)) < self.config.real
        pool = (self.real if want_real else self.drawn) or self.real or self.drawn
        of_source = Counter(h.source for h in pool)
        weights = torch.tensor([of_source[h.source] ** -0.5 for h in pool])
        head = pool[int(torch.multinomial(weights, 1, generator=generator))]
        return draw_head(head, self.config, generator)


def draw_head(head: Head, config: HeadConfig, generator: torch.Generator) -> HeadPatch:
    """Rotate, scale and bend a head, give it contrast, artefacts and a field of view."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def chance(p: float) -> bool:
        return float(torch.rand(1, generator=generator)) < p

    n = config.patch
    shape = torch.tensor(head.distance.shape)
    inside = np.argwhere(head.distance > 0)
    centre = torch.from_numpy(inside.mean(axis=0)).float()
    centre = centre + uniform(-1, 1, 3) * config.off_centre_mm / SPACING_MM
    zoom = float(1 + config.scale * uniform(-1, 1, 1))
    if chance(config.small):
        zoom /= float(uniform(config.smallest, 1, 1))
    widest = config.rotation_deg if chance(config.tilted) else config.rotation_deg / 4
    matrix = rotation(uniform(-1, 1, 3) * math.radians(widest)) * zoom
    if chance(config.turned):
        matrix = matrix @ rotation(torch.randint(4, (3,), generator=generator) * math.pi / 2)
    axis = torch.arange(n, dtype=torch.float32) - (n - 1) / 2
    offsets = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    bend = smooth_noise(config.elastic_mm / SPACING_MM, 20.0, n, n, generator)
    points = torch.einsum("ab,bxyz->axyz", matrix, offsets) + bend + centre[:, None, None, None]
    if chance(0.5):
        points = points.flip(1)

    stored = torch.from_numpy(head.distance.astype(np.float32))[None] + FAR_MM
    distance = (read(stored, points, shape)[0] - FAR_MM) / zoom
    rim = torch.zeros_like(distance)
    if chance(config.shrunken):
        points, distance, rim = shrink(points, distance, config.shrink_mm, generator)
    if head.image is not None:
        image = read(torch.from_numpy(head.image)[None].float() / 255, points, shape)[0]
    else:
        assert head.labels is not None
        flat, outside = nearest(points, shape)
        labels = torch.from_numpy(head.labels).reshape(-1)[flat].long()
        image = paint(labels.masked_fill(outside, 0), generator)
    if rim.any():
        # Dark in a real scan, as its own ventricles are; of any brightness in a drawn one.
        share = float(uniform(0, 1, 1)) * (0.1 if head.image is not None else 1.0)
        fluid = float(image[distance > 0].quantile(share)) if (distance > 0).any() else 0.0
        speckle = 0.03 * torch.randn(image.shape, generator=generator)
        image = image + rim * (fluid + speckle - image)
    if chance(config.bright_scalp):
        image = _spin_echo(image, distance, generator)
    image = _artefacts(image, config, generator)
    if chance(config.stripped):
        # Programs strip more or less widely: the brain is what they leave.
        distance = distance - float(uniform(-6, 1, 1))
        image = image * (distance > 0)
    elif chance(config.zeroed_air):
        image = image * (image > float(uniform(0.02, 0.12, 1)))
    elif chance(config.noisy_air):
        noise = float(uniform(0.3, 1, 1)) * torch.rand(image.shape, generator=generator)
        image = torch.where(F.avg_pool3d(image[None], 3, 1, 1)[0] < 0.08, noise, image)
    if chance(config.deface):
        image = _deface(image, distance, generator)
    if chance(config.cut):
        image, distance = _cut(image, distance, generator)
    return HeadPatch(image[None, None], distance.clamp(-REACH_MM, REACH_MM)[None, None])


def shrink(
    points: Tensor, distance: Tensor, widest_mm: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a brain in from its border by 0 to ``widest_mm`` mm, here more and there less (atrophy).

    ``points`` (3, N, N, N) are where the patch's voxels are read, ``distance`` (N, N, N) mm is that
    to the border.  Returns both as they are after it, and the share (0 to 1) of each voxel that
    lies in the gap between the old border and the new one.  What is near the border moves by the
    whole width, the image deep inside not at all.
    """
    n = distance.shape[-1]
    wave = smooth_noise(1.0, 20.0, n, n, generator)[0]
    wave = (1.5 * wave / wave.std().clamp(min=1e-6)).sigmoid()
    width = widest_mm * torch.rand(1, generator=generator) * wave
    outwards = -torch.stack(torch.gradient(F.avg_pool3d(distance[None], 3, 1, 1)[0]))
    outwards = outwards / outwards.norm(dim=0).clamp(min=1e-3)
    move = width * ((FAR_MM - distance) / (FAR_MM - width)).clamp(0, 1)
    move = torch.where(distance < 0, 0, move)
    axis = torch.arange(n, dtype=torch.float32)
    index = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    shape = torch.tensor(distance.shape)
    # A voxel that the old border cuts keeps its place: else a shell of skull would show it.
    shift = torch.where(distance < SPACING_MM / 2, 0, move)
    points = read(points, index + shift / SPACING_MM * outwards, shape, padding="border")
    new = torch.where(distance < 0, distance - width, distance - move)
    old_share, share = ((0.5 + d / SPACING_MM).clamp(0, 1) for d in (distance, new))
    return points, new, old_share - share


def draw_nothing(config: HeadConfig, generator: torch.Generator) -> HeadPatch:
    """Noise or texture in an ellipsoid, everywhere, or along a ramp: no brain in it.

    A network that never saw such an image finds a litre of brain in noise.
    """
    n = config.patch

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    image = torch.zeros(n, n, n)
    pure = float(uniform(0, 1, 1)) < 0.3
    for amount in (1.0, float(uniform(0, 1, 1))):
        side = n if pure else round(float(2 ** uniform(1, math.log2(n), 1)))
        coarse = torch.rand(1, 1, side, side, side, generator=generator)
        image += amount * F.interpolate(coarse, size=(n, n, n), mode="trilinear")[0, 0]
    image = float(uniform(0, 1, 1)) + float(uniform(0, 1, 1)) * image
    axis = torch.linspace(-1, 1, n)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    view = (3, 1, 1, 1)
    kind = float(torch.rand(1, generator=generator))
    if kind < 0.6:
        centre, radii = uniform(-0.3, 0.3, 3), uniform(0.2, 1.0, 3)
        inside = ((points - centre.view(view)) / radii.view(view)).square().sum(dim=0) < 1
        image = torch.where(inside, image, 0.05 * torch.rand(n, n, n, generator=generator))
    elif kind < 0.8:
        image = image * (1 + (points * uniform(-1, 1, 3).view(view)).sum(dim=0))
    image = _artefacts((image / image.max()).clamp(0, 1), config, generator)
    return HeadPatch(image[None, None], torch.full((1, 1, n, n, n), -REACH_MM))


def paint(labels: Tensor, generator: torch.Generator) -> Tensor:
    """An image of ``labels`` (X, Y, Z) int64: a random mean and texture for each; 0 is air.

    Labels share a few tissues in some images, so that borders within the brain vanish as they do
    in real ones.
    """
    n = int(labels.max()) + 1
    means = torch.rand(n, generator=generator)
    if float(torch.rand(1, generator=generator)) < 0.5:
        tissues = torch.rand(5, generator=generator)
        means = tissues[torch.randint(5, (n,), generator=generator)]
    spread = 0.08 * torch.rand(n, generator=generator)
    if float(torch.rand(1, generator=generator)) < 0.8:
        means[0], spread[0] = 0.0, 0.02 * spread[0]
    noise = torch.randn(labels.shape, generator=generator)
    image = means[labels] + spread[labels] * noise
    width = 0.3 + 0.5 * float(torch.rand(1, generator=generator))
    smooth = ndimage.gaussian_filter(image.numpy(), width)
    return torch.from_numpy(smooth).clamp(0, 1)


def _spin_echo(image: Tensor, distance: Tensor, generator: torch.Generator) -> Tensor:
    """Scalp up to three times as bright, and less contrast in the brain."""
    gain, kept = (float(x) for x in torch.rand(2, generator=generator))
    brain = distance > 0
    if brain.any():
        mean = image[brain].mean()
        image = torch.where(brain, mean + (0.4 + 0.6 * kept) * (image - mean), image)
    image = torch.where(distance < -2 * SPACING_MM, (1 + 2 * gain) * image, image)
    return image / max(1.0, float(image.max()))


def _artefacts(image: Tensor, config: HeadConfig, generator: torch.Generator) -> Tensor:
    """Bias field, contrast, noise, thick slices or large voxels, any brightness."""
    if float(torch.rand(1, generator=generator)) < 0.3:
        thickest = config.slice_mm / SPACING_MM
        voxels = 1 + (thickest - 1) * float(torch.rand(1, generator=generator))
        image = thicken(image, voxels, generator)
    chain = mt.Compose(
        [
            mt.RandBiasField(prob=0.6, coeff_range=(-0.25, 0.25)),
            mt.RandBiasField(prob=config.strong_bias, degree=2, coeff_range=(-0.8, 0.8)),
            mt.Lambda(lambda biased: torch.from_numpy(normalise(biased.numpy()))),
            mt.RandAdjustContrast(prob=0.6, gamma=(0.5, 2.0)),
            mt.RandHistogramShift(num_control_points=(5, 10), prob=0.2),
            low_resolution(0.15),
            mt.RandGaussianSmooth(
                prob=0.15, sigma_x=(0.3, 1.0), sigma_y=(0.3, 1.0), sigma_z=(0.3, 1.0)
            ),
            mt.RandGaussianNoise(prob=0.5, std=0.06),
            mt.RandScaleIntensity(factors=0.3, prob=0.6),
        ]
    )
    chain.set_random_state(seed=int(torch.randint(2**31 - 1, (1,), generator=generator)))
    changed: Tensor = chain(image[None])
    return changed.as_subclass(Tensor)[0].clamp(0, 1)


def _deface(image: Tensor, distance: Tensor, generator: torch.Generator) -> Tensor:
    """Remove what lies in front of and below a plane that keeps clear of the brain."""
    axis = torch.linspace(-1, 1, image.shape[0])
    _, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    angle = math.radians(20 + 50 * float(torch.rand(1, generator=generator)))
    along = y * math.sin(angle) - z * math.cos(angle)
    brain = distance > -1
    if not brain.any():
        return image
    margin = 0.02 + 0.1 * float(torch.rand(1, generator=generator))
    return torch.where(along > float(along[brain].max()) + margin, 0.0, image)


def _cut(image: Tensor, distance: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A field of view that ends within the head: up to a quarter is missing at one or two sides.

    What is not seen is not in the mask: the distance is also that to the plane of the cut.
    """
    for _ in range(int(torch.randint(1, 3, (1,), generator=generator))):
        axis = int(torch.randint(3, (1,), generator=generator))
        size = image.shape[axis]
        amount = int(size * 0.25 * float(torch.rand(1, generator=generator)))
        inside_mm = SPACING_MM * (torch.arange(size) - amount + 0.5)
        if float(torch.rand(1, generator=generator)) < 0.5:
            inside_mm = inside_mm.flip(0)
        view = [1, 1, 1]
        view[axis] = -1
        inside_mm = inside_mm.reshape(view)
        image, distance = image * (inside_mm > 0), torch.minimum(distance, inside_mm)
    return image, distance


@dataclass(frozen=True, eq=False)
class MaskLosses:
    """Losses of the two parts of the cascade."""

    coarse: Tensor
    fine: Tensor

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        return self.coarse + self.fine


@dataclass(frozen=True)
class MaskObjective:
    """Whole heads for the first network, a random cube of ``fine`` voxels for the second.

    With ``fine`` 0 only the first one learns: it is the quicker part, and the second one's input.
    """

    fine: int = 80

    def __call__(self, net: BrainNet, patch: HeadPatch, generator: torch.Generator) -> MaskLosses:
        """Losses of one batch of heads; the cube lies around a random place in a brain."""
        located = net.locate(patch.image)
        coarse = distance_loss(located, F.avg_pool3d(patch.distance, 2))
        size = min(self.fine, patch.image.shape[-1])
        if not size:
            return MaskLosses(coarse, torch.zeros_like(coarse))
        # The corner is even: both resolutions share it.
        inside = torch.nonzero(patch.distance[:, 0] > 0)[:, 1:]
        if not len(inside):
            inside = torch.nonzero(patch.distance[0, 0] > -torch.inf)
        pick = torch.randint(len(inside), (1,), generator=generator, device=generator.device)
        corner = (inside[pick][0] - size // 2).clamp(0, patch.image.shape[-1] - size) // 2

        def cube(volume: Tensor, voxels: int, scale: int) -> Tensor:
            for axis, start in enumerate(corner.tolist(), 2):
                volume = volume.narrow(axis, start * scale, voxels)
            return volume

        hint = cube(located.detach(), size // 2, 1)
        estimate = net.refine(cube(patch.image, size, 2), hint)
        return MaskLosses(coarse, distance_loss(estimate, cube(patch.distance, size, 2)))


def distance_loss(estimate: Tensor, truth: Tensor) -> Tensor:
    """L1 of a distance (in units of the reach) and soft Dice of its sigmoid (1 mm wide)."""
    error = (estimate - truth).abs()
    # Where the truth is at the end of the reach, anything farther on that side is right.
    far = (truth.abs() >= REACH_MM) & (estimate * truth.sign() > REACH_MM)
    p, q = estimate.sigmoid(), (truth > 0).float()
    dice = (2 * (p * q).sum() + 1) / (p.sum() + q.sum() + 1)
    return error.masked_fill(far, 0).mean() / REACH_MM + 0.5 * (1 - dice)


def stack_heads(patches: Sequence[HeadPatch]) -> HeadPatch:
    """Several patches as one batch."""
    return HeadPatch(
        torch.cat([p.image for p in patches]), torch.cat([p.distance for p in patches])
    )


def head_loader(
    heads: Sequence[Head], config: HeadConfig, step: int, workers: int, device: torch.device
) -> "DataLoader[HeadPatch]":
    """Batches from ``step`` on, in order."""
    return series(HeadDraws(heads, config), stack_heads, config, step, workers, device)


def save_head(path: Path, head: Head) -> None:
    """Write one head as a compressed ``.npz``."""
    arrays = {"image": head.image, "labels": head.labels}
    present = {key: value for key, value in arrays.items() if value is not None}
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(
            stream,
            name=head.name,
            source=head.source,
            distance=head.distance,
            **present,  # type: ignore[arg-type]
        )


def load_head(path: Path) -> Head:
    """Read a head written by ``save_head``."""
    with np.load(path, allow_pickle=False) as stored:
        found = dict(stored)
    return Head(
        str(found["name"]),
        str(found["source"]),
        found["distance"],
        found.get("image"),
        found.get("labels"),
    )
