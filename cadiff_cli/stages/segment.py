"""Denoise labels from noise, conditioned on the image and the clean field (t_d = 0).

Without a registration the field is noise too, and is denoised together with the labels (t_d = t_m).

The network's trunk runs at 2 mm for every step; the last step adds the 1 mm head.  Whole-volume and
tiled inference run the same code: tiling only changes how the network is applied to a tensor.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cadiff_cli import machine
from cadiff_cli.config import SampleConfig
from cadiff_cli.diffusion.sampler import sample, times
from cadiff_cli.errors import CadiffError, UsageError
from cadiff_cli.io.weights import Model
from cadiff_cli.labels import LabelTable
from cadiff_cli.metrics.quality import expected_dice
from cadiff_cli.nets.unet import STRIDE, CADiffNet, shuffle, unshuffle
from cadiff_cli.products import Conditions, Scan, Segmentation
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import resample, same_lattice

log = logging.getLogger(__name__)

BYTES_PER_VOXEL = 700
"""Peak memory of whole-volume inference per 1 mm voxel, measured; decides about tiling."""
TILE = 96


def segment(
    scan: Scan, conditions: Conditions, mask: Volume, model: Model, config: SampleConfig
) -> Segmentation:
    """Label codes on the scan's own grid, 0 outside ``mask`` (which is on the scan's grid)."""
    if config.steps < 0:
        raise UsageError(f"--steps is {config.steps}", "use 5 (the default), or 0 for the prior")
    if config.samples < 1:
        raise UsageError(f"--samples is {config.samples}", "use 1 (the default) or more")
    table, inside = model.table, conditions.mask.data
    grid, native = conditions.image.grid, scan.t1.grid
    volumes: list[np.ndarray] = []

    def count(p: Tensor) -> None:
        counts = np.bincount(most_probable(p)[inside], minlength=table.n_classes)
        volumes.append(counts * grid.voxel_volume_mm3)

    several = config.samples > 1
    device, trouble = usable_device(config.device)
    on_device = replace(config, device=str(device))
    with enough_memory():
        p, tile = class_probabilities(conditions, model, on_device, count if several else None)
    best = most_probable(p)
    drawn = best * inside
    if same_lattice(grid.voxel_map(native)):
        classes = resample(Volume(best, grid), native, order=0).data
    else:
        classes = native_classes(p, grid, native)
    posteriors = None
    if config.posteriors:
        posteriors = native_posteriors(p, grid, native)
        posteriors[1:, ~mask.data] = 0
        posteriors[0, ~mask.data] = 1
    entropy = None
    if config.uncertainty or several:
        entropy = resample(Volume(uncertainty(p), grid), native).data
        entropy = np.where(mask.data, entropy, 0).astype(np.float32)
    warnings: tuple[str, ...] = (trouble,) if trouble else ()
    if tile is not None and tile != config.tile:
        warnings += (f"memory was short: the volume was segmented in tiles of {tile} voxels",)
    return Segmentation(
        Volume(np.where(mask.data, table.codes[classes], 0).astype(np.int16), native),
        table,
        steps=config.steps,
        seed=config.seed,
        device=str(device),
        precision=str(precision(device)).removeprefix("torch."),
        tile=tile,
        posteriors=posteriors,
        warnings=warnings,
        expected_dice=by_code(table, of_drawn(expected_dice(p.numpy(), drawn), drawn)),
        volume_sd_mm3=by_code(table, np.std(volumes, axis=0, ddof=1)[1:]) if several else {},
        uncertainty=entropy,
    )


def by_code(table: LabelTable, values: np.ndarray) -> dict[int, float]:
    """Code -> value of (classes - 1,) values; NaN are left out."""
    pairs = zip(table.structures, values, strict=True)
    return {s.code: float(value) for s, value in pairs if np.isfinite(value)}


def of_drawn(values: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """(classes - 1,) values, NaN for classes that ``drawn`` (X, Y, Z) does not hold."""
    counts = np.bincount(drawn.ravel(), minlength=len(values) + 1)[1:]
    return np.where(counts > 0, values, np.nan)


def most_probable(p: Tensor) -> np.ndarray:
    """(X, Y, Z) uint8: the class with the highest of (classes, X, Y, Z) probabilities.

    Class by class, which is twice as fast as ``argmax`` over an axis so far apart in memory.
    """
    highest, best = p[0].clone(), torch.zeros(p.shape[1:], dtype=torch.uint8)
    for k in range(1, len(p)):
        best.masked_fill_(p[k] > highest, k)
        torch.maximum(highest, p[k], out=highest)
    return np.asarray(best.numpy())


def uncertainty(p: Tensor) -> np.ndarray:
    """(X, Y, Z) float32 entropy of (classes, X, Y, Z) probabilities: 1 if all are equal.

    Class by class: ``p`` is too large to copy.
    """
    entropy = torch.zeros(p.shape[1:])
    for p_k in p:
        entropy.sub_(torch.xlogy(p_k, p_k))
    return np.asarray(entropy.div_(math.log(len(p))).clamp_(0, 1).numpy())


def class_probabilities(
    conditions: Conditions,
    model: Model,
    config: SampleConfig,
    each: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, int | None]:
    """(classes, X, Y, Z) float32 on the crop's 1 mm grid, and the edge of the tiles if any.

    They are the mean over samples, each of which is shown to ``each`` before.
    """
    device = pick_device(config.device)
    image = torch.from_numpy(conditions.image.data.copy())[None, None]
    known = conditions.field
    field = None if known is None else torch.from_numpy(known.data.copy())[None]
    net = model.net.to(device)

    def predict(seed: int, tile: int | None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        flip = model.table if config.flip else None
        return denoise(net, image, field, config.steps, generator, device, tile, flip)

    def predict_somehow(seed: int, tile: int | None) -> tuple[Tensor, int | None]:
        """Whole if memory allows, unless an earlier sample, or somebody, wanted tiles."""
        if tile is not None:
            return predict(seed, tile), tile
        if image.numel() * BYTES_PER_VOXEL < free_bytes(device):
            try:
                return predict(seed, None), None
            except (MemoryError, RuntimeError) as error:
                if not _is_short_of_memory(error):
                    raise
        log.warning("not enough memory for the whole volume: using tiles of %d voxels", TILE)
        return predict(seed, TILE), TILE

    p, tile = predict_somehow(config.seed, config.tile)
    if each:
        each(p)
    for seed in range(config.seed + 1, config.seed + config.samples):
        another, tile = predict_somehow(seed, tile)
        if each:
            each(another)
        p.add_(another)
    return p if config.samples == 1 else p.div_(config.samples), tile


@torch.no_grad()
def denoise(
    net: CADiffNet,
    image: Tensor,
    field: Tensor | None,
    steps: int,
    generator: torch.Generator,
    device: torch.device,
    tile: int | None = None,
    flip: LabelTable | None = None,
) -> Tensor:
    """Sample labels for one brain: (classes, X, Y, Z) float32 probabilities on the CPU.

    ``image`` (1, 1, X, Y, Z) in [0, 1]; ``field`` (1, 3, X/2, Y/2, Z/2) in [0, 1], or None to
    denoise it with the labels.  No steps at all give the label prior at the field: what
    registration alone knows.  With ``flip``, which tells left from right, the last step is the mean
    of what the network says of the brain and of its mirror image.
    """
    if steps == 0:
        if field is None:
            raise UsageError("no steps and no registration", "ask for one of them")
        prior = net.prior((2 * field - 1).to(device)).cpu()
        return F.interpolate(prior, scale_factor=STRIDE, mode="trilinear")[0].softmax(dim=0)
    known = unshuffle(image)
    if field is not None:
        known = torch.cat([known, 2 * field - 1], dim=1)
    channels = 8 + 3 + net.config.n_classes
    noise = torch.randn(1, channels - known.shape[1], *known.shape[2:], generator=generator)

    def network(x: Tensor, t: float, fine: bool) -> Tensor:
        """(1, 8 + 3 + classes, ...) at 2 mm -> the estimated state there.

        That of the labels, below that of the field if it is not known; or, if ``fine``, the
        probabilities at 1 mm.
        """
        x = x.to(device)
        part, d_t, m_t = shuffle(x[:, :8]), x[:, 8:11], x[:, 11:]
        t_m = torch.full((1,), t, device=device)
        t_d = torch.zeros_like(t_m) if field is not None else t_m
        with autocast(device):
            coarse = net.trunk(part, d_t, m_t, t_d, t_m)
            logits = net.refine(part, coarse, t_d, t_m) if fine else coarse.logits
        # Slab by slab: a float32 copy of all logits would be the peak of the memory.
        p = torch.empty(logits.shape, dtype=torch.float32, device=device)
        for out, slab in zip(
            torch.split(p, 16, dim=2), torch.split(logits, 16, dim=2), strict=True
        ):
            out.copy_(slab.float().softmax(dim=1))
        if fine:
            return p
        labels = p.mul_(2).sub_(1)
        return labels if field is not None else torch.cat([coarse.field, labels], dim=1)

    def estimate(x: Tensor, t: float, fine: bool = False) -> Tensor:
        if tile is None:
            return network(x, t, fine).cpu()
        from monai.inferers import sliding_window_inference

        # Tiles are put together where ``x`` is, on the CPU: a GPU that needs them has no room.
        answer: Tensor = sliding_window_inference(
            x,
            tile // STRIDE,
            1,
            lambda part: network(part, t, fine).cpu(),
            overlap=0.5,
            mode="gaussian",
        )
        return answer

    schedule = times(steps if net.config.reads_labels else 1)
    x_t = noise

    # The sampler is lazy: its last step, which only the fine pass needs, is never evaluated.
    def clean(x_t: Tensor, t: float) -> Tensor:
        return estimate(torch.cat([known, x_t], dim=1), t)

    for state in islice(sample(clean, noise, schedule), len(schedule) - 1):
        x_t = state
    x = torch.cat([known, x_t], dim=1)
    p = estimate(x, schedule[-1], fine=True)[0]
    if flip is None:
        return p
    return add_unmirrored(p, estimate(mirrored(x, flip), schedule[-1], fine=True)[0], flip).div_(2)


def mirrored(x: Tensor, table: LabelTable) -> Tensor:
    """Image, field and labels (1, 8 + 3 + classes, X, Y, Z) of the left-right mirrored brain.

    x is the first axis; the field's states are in [-1, 1], so D_x -> -D_x; left and right labels
    change places.
    """
    image, field, labels = x[:, :8], x[:, 8:11].flip(2), x[:, 11:].flip(2)
    return torch.cat(
        [
            unshuffle(shuffle(image).flip(2)),
            -field[:, :1],
            field[:, 1:],
            labels[:, torch.from_numpy(table.mirror_classes)],
        ],
        dim=1,
    )


def add_unmirrored(p: Tensor, q: Tensor, table: LabelTable) -> Tensor:
    """Add to ``p``, in place, the probabilities ``q`` of the mirrored brain, brought back.

    (classes, X, Y, Z).  Class by class: a second copy of all of them would double the peak memory.
    """
    for k, mirror in enumerate(table.mirror_classes):
        p[k].add_(q[mirror].flip(0))
    return p


def native_classes(p: Tensor, grid: Grid, native: Grid) -> np.ndarray:
    """Most probable class at each native voxel: probabilities are interpolated, not labels."""
    out = np.zeros(native.shape, dtype=np.uint8)
    for index, slab in _slabs(p, grid, native):
        out[index] = slab.argmax(dim=0).numpy()
    return out


def native_posteriors(p: Tensor, grid: Grid, native: Grid) -> np.ndarray:
    """Probabilities at each native voxel, (classes, X, Y, Z) float16; background outside."""
    out = np.zeros((p.shape[0], *native.shape), dtype=np.float16)
    out[0] = 1
    for index, slab in _slabs(p, grid, native):
        out[:, index] = slab.numpy()
    return out


def _slabs(p: Tensor, grid: Grid, native: Grid) -> Iterator[tuple[int, Tensor]]:
    """Yield (native x index, (classes, Y, Z) probabilities) for the slices that meet the crop.

    A native voxel larger than the crop's averages as many points along each axis as fit into it.
    """
    to_crop = grid.voxel_map(native)
    size = torch.tensor(grid.shape, dtype=torch.float64)
    ratio = np.linalg.norm(to_crop[:3, :3], axis=0)
    inner = [(np.arange(n) + 0.5) / n - 0.5 for n in np.maximum(np.rint(ratio), 1).astype(int)]
    shifts = np.stack(np.meshgrid(*inner, indexing="ij"), axis=-1).reshape(-1, 3)
    y, z = np.indices(native.shape[1:])
    for index in range(native.shape[0]):
        voxels = np.stack([np.full_like(y, index), y, z], axis=-1)
        total = None
        for shift in shifts:
            ijk = (voxels + shift) @ to_crop[:3, :3].T + to_crop[:3, 3]
            if not ((ijk > -1) & (ijk < np.array(grid.shape))).all(axis=-1).any():
                continue
            scaled = 2 * torch.from_numpy(ijk) / (size - 1) - 1
            points = scaled.flip(-1).float()[None, None]
            slab = F.grid_sample(p[None], points, padding_mode="zeros", align_corners=True)
            part = slab[0, :, 0] / len(shifts)
            total = part if total is None else total.add_(part)
        if total is not None:
            total[0] += 1 - total.sum(dim=0)
            yield index, total


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one; asking for an absent one is an error."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("no CUDA device is available", "use --device cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", "use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported", "use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"there is no {name}", f"{torch.cuda.device_count()} GPUs are visible")
    return device


def usable_device(name: str) -> tuple[torch.device, str]:
    """``pick_device``, but for ``auto`` the CPU where the GPU cannot compute; and why, if so.

    It may be older than torch's kernels, or taken by another process.  Only whoever is to use the
    GPU should ask: looking takes a share of its memory.
    """
    device = pick_device(name)
    if device.type == "cpu":
        return device, ""
    try:
        torch.ones(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError) as error:
        trouble = f"{device} cannot be used: {str(error).strip().splitlines()[0]}"
        if name != "auto":
            raise UsageError(trouble, "use --device cpu") from error
        log.warning("%s; the CPU works in its place", trouble)
        return torch.device("cpu"), trouble
    return device, ""


def _is_short_of_memory(error: Exception) -> bool:
    """Torch raises a ``RuntimeError`` when it cannot allocate."""
    said = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in said)


@contextmanager
def enough_memory(remedy: str = "use a smaller --tile, or --device cpu") -> Iterator[None]:
    """Raise a ``CadiffError`` with the remedy where torch cannot allocate."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_short_of_memory(error):
            raise
        raise CadiffError(
            "out of memory",
            f"close other programs, {remedy}",
        ) from error


def precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor computes with it; float32 elsewhere."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        fast = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Matrix products and convolutions in the device's ``precision``."""
    enabled = precision(device) == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def free_bytes(device: torch.device) -> int:
    """Memory that can be had now: of the GPU, or of the machine."""
    if device.type == "cuda":
        # What torch keeps for later is its own to use, though the driver counts it as taken.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return machine.free_memory_bytes()
