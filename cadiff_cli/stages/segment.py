"""Denoise labels from noise, conditioned on the image and the clean field (t_d = 0).

The network's trunk runs at 2 mm for every step; the last step adds the 1 mm head.  Whole-volume and
tiled inference run the same code: tiling only changes how the network is applied to a tensor.
"""

import logging
import os
from collections.abc import Callable
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.config import SampleConfig
from cadiff_cli.diffusion.sampler import sample, times
from cadiff_cli.errors import UsageError
from cadiff_cli.io.weights import Model
from cadiff_cli.labels import LabelTable
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
        raise UsageError(
            f"--steps is {config.steps}", "use 5 (the default), or 0 for the prior alone"
        )
    p = class_probabilities(conditions, model, config)
    grid, native = conditions.image.grid, scan.t1.grid
    posteriors = None
    between = grid.voxel_map(native)
    if config.posteriors:
        posteriors = native_posteriors(p, grid, native)
        posteriors[1:, ~mask.data] = 0
        posteriors[0, ~mask.data] = 1
        classes = posteriors.argmax(axis=0)
    elif same_lattice(between):
        best = Volume(p.argmax(dim=0).to(torch.uint8).numpy(), grid)
        classes = resample(best, native, order=0).data
    else:
        classes = native_classes(p, grid, native)
    codes = np.where(mask.data, model.table.codes[classes], 0).astype(np.int16)
    return Segmentation(Volume(codes, native), model.table, config.steps, config.seed, posteriors)


def class_probabilities(conditions: Conditions, model: Model, config: SampleConfig) -> Tensor:
    """(classes, X, Y, Z) float32 on the crop's 1 mm grid."""
    device = pick_device(config.device)
    image = torch.from_numpy(conditions.image.data.copy())[None, None]
    field = torch.from_numpy(conditions.field.data.copy())[None]
    net = model.net.to(device)

    def predict(tile: int | None) -> Tensor:
        generator = torch.Generator().manual_seed(config.seed)
        p = denoise(net, image, field, config.steps, generator, device, tile)
        if config.flip:
            q = denoise(net, *mirrored(image, field), config.steps, generator, device, tile)
            p = p.add_(unmirrored(q, model.table)).div_(2)
        return p

    if config.tile is not None:
        return predict(config.tile)
    if image.numel() * BYTES_PER_VOXEL < free_bytes(device):
        try:
            return predict(None)
        except MemoryError:
            pass
        except RuntimeError as error:  # what torch raises when it cannot allocate
            if "memory" not in str(error):
                raise
    log.warning("not enough memory for the whole volume: using tiles of %d voxels", TILE)
    return predict(TILE)


@torch.no_grad()
def denoise(
    net: CADiffNet,
    image: Tensor,
    field: Tensor,
    steps: int,
    generator: torch.Generator,
    device: torch.device,
    tile: int | None = None,
) -> Tensor:
    """Sample labels for one brain: (classes, X, Y, Z) float32 probabilities on the CPU.

    ``image`` (1, 1, X, Y, Z) in [0, 1]; ``field`` (1, 3, X/2, Y/2, Z/2) in [0, 1].  No steps at
    all give the label prior at the field: what registration alone knows.
    """
    if steps == 0:
        prior = net.prior((2 * field - 1).to(device)).cpu()
        return F.interpolate(prior, scale_factor=STRIDE, mode="trilinear")[0].softmax(dim=0)
    known = torch.cat([unshuffle(image), 2 * field - 1], dim=1)
    n_known = known.shape[1]
    noise = torch.randn(1, net.config.n_classes, *field.shape[2:], generator=generator)
    clean = torch.zeros(1, device=device)

    def coarse(x: Tensor, t: float) -> Tensor:
        """(1, 8 + 3 + classes, ...) at 2 mm -> the estimate of P_0, (1, classes, ...)."""
        x = x.to(device)
        time = torch.full((1,), t, device=device)
        eight, d_0, m_t = x[:, :8], x[:, 8:n_known], x[:, n_known:]
        with autocast(device):
            logits: Tensor = net.trunk(shuffle(eight), d_0, m_t, clean, time).logits
        return logits.softmax(dim=1)

    def fine(x: Tensor, t: float) -> Tensor:
        """The same input -> 1 mm probabilities, (1, classes, 2x, 2y, 2z)."""
        x = x.to(device)
        time = torch.full((1,), t, device=device)
        eight, d_0, m_t = x[:, :8], x[:, 8:n_known], x[:, n_known:]
        with autocast(device):
            _, logits = net(shuffle(eight), d_0, m_t, clean, time)
        p: Tensor = logits.float().softmax(dim=1)
        return p

    def apply(function: Callable[[Tensor, float], Tensor], m_t: Tensor, t: float) -> Tensor:
        x = torch.cat([known, m_t], dim=1)
        if tile is None:
            return function(x, t).cpu()
        from monai.inferers import sliding_window_inference

        answer: Tensor = sliding_window_inference(
            x, tile // STRIDE, 1, lambda part: function(part, t), overlap=0.5, mode="gaussian"
        )
        return answer.cpu()

    schedule = times(steps)
    m_t = noise
    # The sampler is lazy: its last step, which only the fine pass needs, is never evaluated.
    for step in islice(
        sample(lambda m, t: 2 * apply(coarse, m, t) - 1, noise, schedule), steps - 1
    ):
        m_t = step.x_next
    return apply(fine, m_t, schedule[-1])[0]


def mirrored(image: Tensor, field: Tensor) -> tuple[Tensor, Tensor]:
    """Image and field of the left-right mirrored brain; x is the first axis and D_x -> 1 - D_x."""
    flipped = field.flip(2)
    return image.flip(2), torch.cat([1 - flipped[:, :1], flipped[:, 1:]], dim=1)


def unmirrored(p: Tensor, table: LabelTable) -> Tensor:
    """Probabilities (classes, X, Y, Z) of a mirrored brain, brought back."""
    return p[torch.from_numpy(table.mirror_classes)].flip(1)


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


def _slabs(p: Tensor, grid: Grid, native: Grid):  # type: ignore[no-untyped-def]
    """Yield (native x index, (classes, Y, Z) probabilities) for the slices that meet the crop."""
    to_crop = grid.voxel_map(native)
    size = torch.tensor(grid.shape, dtype=torch.float64)
    y, z = np.indices(native.shape[1:])
    for index in range(native.shape[0]):
        native_ijk = np.stack([np.full_like(y, index), y, z], axis=-1)
        ijk = native_ijk @ to_crop[:3, :3].T + to_crop[:3, 3]
        inside = ((ijk > -1) & (ijk < np.array(grid.shape))).all(axis=-1)
        if not inside.any():
            continue
        scaled = 2 * torch.from_numpy(ijk) / (size - 1) - 1
        points = scaled.flip(-1).float()[None, None]
        slab = F.grid_sample(p[None], points, padding_mode="zeros", align_corners=True)[0, :, 0]
        slab[0] += 1 - slab.sum(dim=0)
        yield index, slab


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one; asking for an absent one is an error."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("no CUDA device is available", "use --device cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", "use auto, cpu or cuda") from error


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the processor computes with it; float32 elsewhere."""
    fast = device.type == "cuda"
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        fast = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast)


def free_bytes(device: torch.device) -> int:
    """Memory that can be had now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            fields = dict(line.split(":", 1) for line in stream)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
