"""Denoise labels from noise, conditioned on the image and the clean field (t_d = 0).

Without a registration the field is noise too, and is denoised together with the labels (t_d = t_m).

The network's trunk runs at 2 mm for every step; the last step adds the 1 mm head.  Whole-volume and
tiled inference run the same code: tiling only changes how the network is applied to a tensor.
"""

import logging
from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.config import SampleConfig
from cadiff_cli.device import autocast, free_bytes, is_short_of_memory, pick_device
from cadiff_cli.diffusion.sampler import sample, times
from cadiff_cli.errors import UsageError
from cadiff_cli.io.weights import Model
from cadiff_cli.labels import LabelTable
from cadiff_cli.nets.unet import STRIDE, CADiffNet, shuffle, unshuffle
from cadiff_cli.products import Conditions

log = logging.getLogger(__name__)

BYTES_PER_VOXEL = 700
"""Peak memory of whole-volume inference per 1 mm voxel, measured; decides about tiling."""
TILE = 96


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
                if not is_short_of_memory(error):
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
