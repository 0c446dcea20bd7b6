"""Sample labels from noise, conditioned on the image and the known field (t_d = 0).

Without a registration the field is sampled together with the labels (t_d = t_m).  Every step runs
the network's trunk at 2 mm; the last step adds the 1 mm head.  Whole-volume and tiled inference
run the same code.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.config import SampleConfig
from cadiff_cli.device import autocast, free_bytes, is_short_of_memory, usable_device
from cadiff_cli.diffusion.sampler import sample, spaced_times
from cadiff_cli.errors import UsageError
from cadiff_cli.machine import memory_kept
from cadiff_cli.nets.blocks import at_blocks, last, shuffle, unshuffle, upsampled
from cadiff_cli.nets.models import Model
from cadiff_cli.nets.segmenter import STRIDE, CADiffNet, Coarse, Prior
from cadiff_cli.products import Conditions
from cadiff_cli.spatial.probabilities import Probabilities

log = logging.getLogger(__name__)
T = TypeVar("T")

BYTES_PER_VOXEL, BYTES_PER_CLASS = 208, 12
"""Peak memory of whole-volume inference per 1 mm voxel; decides about tiling.

700 bytes were measured with 41 classes when probabilities were made for the whole box; they are
made for the brain's voxels now, so less is needed.
"""
TILE = 96
AT_ONCE = 16384
"""Blocks whose logits are made at a time: 30 MB with 41 classes stay near the processor."""


def bytes_per_voxel(n_classes: int) -> int:
    """Peak memory of whole-volume inference per 1 mm voxel.

    >>> bytes_per_voxel(41)
    700
    """
    return BYTES_PER_VOXEL + BYTES_PER_CLASS * n_classes


def class_probabilities(
    conditions: Conditions,
    model: Model,
    config: SampleConfig,
    each: Callable[[Probabilities], None] | None = None,
    device_name: str = "auto",
) -> tuple[Probabilities, int | None]:
    """Those of the brain's voxels on the crop's 1 mm grid, and the edge of the tiles if any.

    They are the mean over the samples; ``each`` is called with every sample.
    """
    device, _ = usable_device(device_name)
    image = torch.from_numpy(conditions.image.data.copy())[None, None]
    known = conditions.field
    field = None if known is None else torch.from_numpy(known.data.copy())[None]
    net, blocks = model.net.to(device), brain_blocks(conditions.mask.data)

    def predict(seed: int, tile: int | None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        mirror = torch.from_numpy(model.parcellation.mirror_classes) if config.flip else None
        return denoise(net, image, field, blocks, config.steps, generator, device, tile, mirror)

    def predict_or_tile(seed: int, tile: int | None) -> tuple[Tensor, int | None]:
        """In tiles if they are asked for or memory is short, else the whole volume."""
        if tile is not None:
            return predict(seed, tile), tile
        if image.numel() * bytes_per_voxel(model.parcellation.n_classes) < free_bytes(device):
            try:
                return predict(seed, None), None
            except (MemoryError, RuntimeError) as error:
                if not is_short_of_memory(error):
                    raise
        log.warning("not enough memory for the whole volume: using tiles of %d voxels", TILE)
        return predict(seed, TILE), TILE

    x, y, z = image.shape[2:]
    voxels = at_blocks(torch.arange(x * y * z).reshape(x, y, z, 1), blocks).flatten()

    def told(values: Tensor) -> Probabilities:
        return Probabilities(values, voxels, (x, y, z))

    p, tile = predict_or_tile(config.seed, config.tile)
    if each:
        each(told(p))
    for seed in range(config.seed + 1, config.seed + config.samples):
        another, tile = predict_or_tile(seed, tile)
        if each:
            each(told(another))
        p.add_(another)
    return told(p if config.samples == 1 else p.div_(config.samples)), tile


def brain_blocks(mask: np.ndarray) -> Tensor:
    """(n, 3) 2 mm voxels in and next to ``mask`` (X, Y, Z): where a label may be asked for.

    Beyond them nobody looks: outside the mask there are no labels, and interpolation at its border
    reaches one voxel.
    """
    touched = F.max_pool3d(torch.from_numpy(mask.astype(np.float32))[None, None], STRIDE)
    return F.max_pool3d(touched, 3, stride=1, padding=1)[0, 0].nonzero()


@dataclass(frozen=True, eq=False)
class DiffusionState:
    """A brain on its way from noise to labels.

    ``image`` (1, 1, 2x, 2y, 2z) in [0, 1]; ``field`` (1, 3, x, y, z) and ``labels``
    (1, classes, x, y, z) at one time of the process each; clean fields are in [-1, 1], clean labels
    what ``CADiffNet.label_state`` makes of probabilities.
    ``prior`` is the network's at a known field, looked up once for all times.
    """

    image: Tensor
    field: Tensor
    labels: Tensor
    prior: Prior | None = None

    def packed(self) -> Tensor:
        """All of it as one tensor at 2 mm, which MONAI cuts into tiles."""
        return torch.cat([unshuffle(self.image), self.field, self.labels], dim=1)

    @staticmethod
    def unpacked(x: Tensor) -> "DiffusionState":
        """The inverse of ``packed``, for a tile too."""
        blocks = STRIDE**3
        image, field, labels = torch.split(x, [blocks, 3, x.shape[1] - blocks - 3], dim=1)
        return DiffusionState(shuffle(image), field, labels)

    def mirrored(self, mirror: Tensor) -> "DiffusionState":
        """The left-right mirrored brain; ``mirror`` (classes,) maps a class to the other side's.

        The first axis points from left to right, so D_x -> -D_x.
        """
        sign = torch.tensor([-1.0, 1.0, 1.0]).reshape(3, 1, 1, 1)
        return DiffusionState(
            self.image.flip(2), sign * self.field.flip(2), self.labels.flip(2)[:, mirror]
        )


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A network, asked about states on ``device``, whole or in tiles of ``tile`` 1 mm voxels.

    A ``known`` field stays as it is at t_d = 0; an unknown one has the time of the labels.  With
    ``mirror`` (see ``DiffusionState.mirrored``) the final answer is that about the brain and its
    mirror image.
    """

    net: CADiffNet
    known: bool
    device: torch.device
    tile: int | None = None
    mirror: Tensor | None = None

    def estimate(self, state: DiffusionState, t: float) -> DiffusionState:
        """The network's estimate of the clean state."""

        def clean(part: DiffusionState) -> tuple[Tensor, Tensor]:
            coarse, _ = self._ask(part, t)
            return coarse.field.cpu(), self.net.label_state(softmax(coarse.logits)).cpu()

        field, labels = by_tiles(clean, state, self.tile)
        return replace(state, field=state.field if self.known else field, labels=labels)

    def look_up(self, state: DiffusionState) -> DiffusionState:
        """The state with the prior at its known field; tiles look it up themselves."""
        if not self.known or self.tile is not None:
            return state
        clean = torch.zeros(1, device=self.device)
        with autocast(self.device):
            return replace(state, prior=self.net.look_up(state.field.to(self.device), clean))

    def step(
        self, state: DiffusionState, estimate: DiffusionState, t: float, t_next: float
    ) -> DiffusionState:
        """The state at ``t_next``, as the network's noise process makes it."""
        step = self.net.process.step
        labels = step(state.labels, estimate.labels, t, t_next)
        if self.known:
            return replace(state, labels=labels)
        return replace(state, field=step(state.field, estimate.field, t, t_next), labels=labels)

    def probabilities(self, state: DiffusionState, blocks: Tensor, t: float) -> Tensor:
        """The network's answer at 1 mm, (n, 8, classes) on the CPU, at ``blocks`` (n, 3)."""
        if self.tile is not None:
            p = by_tiles(lambda part: self._fine(part, t), state, self.tile)
            return at_blocks(p[0].permute(1, 2, 3, 0), blocks)
        p = torch.empty(len(blocks), STRIDE**3, self.net.config.n_classes)
        coarse, (image, t_d, t_m) = self.answer(state, t)
        del state  # a 1 mm head needs its memory
        with autocast(self.device):
            features = self.net.fine_features(image, coarse, t_d, t_m)
            coarse_logits = last(coarse.logits.to(features.dtype))
            split = (torch.split(x, AT_ONCE) for x in (p, blocks.to(self.device)))
            for out, some in zip(*split, strict=True):
                logits = self.net.refine_blocks(features, coarse_logits, some)
                out.copy_(logits.float().softmax(dim=2))
        return p

    def _fine(self, state: DiffusionState, t: float) -> Tensor:
        """Probabilities of all 1 mm voxels, (1, classes, 2x, 2y, 2z) on the CPU."""
        coarse, (image, t_d, t_m) = self.answer(state, t)
        with autocast(self.device):
            return softmax(self.net.refine(image, coarse, t_d, t_m)).cpu()

    def answer(
        self, state: DiffusionState, t: float
    ) -> tuple[Coarse, tuple[Tensor, Tensor, Tensor]]:
        """The trunk's final answer, which the head refines; with the image and both times.

        Of the mirrored brain only the probabilities at 2 mm are asked for.  A second pass of the
        head would cost as much as two of the trunk and change Dice by less than 0.0005.
        """
        coarse, given = self._ask(state, t)
        if self.mirror is None:
            return coarse, given
        there = self._ask(state.mirrored(self.mirror), t)[0].logits
        back = there.flip(2)[:, self.mirror]
        both = torch.logaddexp(coarse.logits.log_softmax(dim=1), back.log_softmax(dim=1))
        return replace(coarse, logits=both), given

    def _ask(self, state: DiffusionState, t: float) -> tuple[Coarse, tuple[Tensor, Tensor, Tensor]]:
        """The trunk's answer; with the image and both times on the device."""
        image, d_t, m_t = (x.to(self.device) for x in (state.image, state.field, state.labels))
        t_m = torch.full((1,), t, device=self.device)
        t_d = torch.zeros_like(t_m) if self.known else t_m
        with autocast(self.device):
            return self.net.trunk(image, d_t, m_t, t_d, t_m, state.prior), (image, t_d, t_m)


@torch.no_grad()
def denoise(
    net: CADiffNet,
    image: Tensor,
    field: Tensor | None,
    blocks: Tensor,
    steps: int,
    generator: torch.Generator,
    device: torch.device,
    tile: int | None = None,
    mirror: Tensor | None = None,
) -> Tensor:
    """Sample labels for one brain: (voxels, classes) float32 probabilities on the CPU.

    ``image`` (1, 1, X, Y, Z) in [0, 1]; ``field`` (1, 3, X/2, Y/2, Z/2) in [0, 1], or None to
    denoise it with the labels; ``blocks`` (n, 3) are the 2 mm voxels whose 8 n voxels at 1 mm are
    asked about, block by block as ``at_blocks`` orders them.  Zero steps give the label prior at
    the field: the answer of the registration alone.  With ``mirror`` (see
    ``DiffusionState.mirrored``) the last step asks about the brain and its mirror image.
    """
    if steps == 0:
        if field is None:
            raise UsageError("no steps and no registration", "ask for one of them")
        prior = net.prior((2 * field - 1).to(device)).cpu()
        return upsampled(prior[0].permute(1, 2, 3, 0), blocks).softmax(dim=2).flatten(0, 1)
    space = [n // STRIDE for n in image.shape[2:]]

    def noise(channels: int) -> Tensor:
        return net.process.start(last(torch.randn(1, channels, *space, generator=generator)))

    d_1 = noise(3) if field is None else 2 * field - 1
    denoiser = Denoiser(net, field is not None, device, tile, mirror)
    start = DiffusionState(image, d_1, noise(net.config.n_classes))
    times = spaced_times(steps if net.config.reads_labels else 1)
    states = sample(denoiser.step, denoiser.estimate, denoiser.look_up(start), times)
    with memory_kept():
        final = deque(states, maxlen=1)
        if net.config.head_stride == STRIDE:
            return denoiser.probabilities(final.pop(), blocks, times[-1]).flatten(0, 1)
    # Tensors of a 1 mm head do not fit where others were.
    return denoiser.probabilities(final.pop(), blocks, times[-1]).flatten(0, 1)


def by_tiles(function: Callable[[DiffusionState], T], state: DiffusionState, tile: int | None) -> T:
    """``function(state)``, at once or in overlapping tiles of ``tile`` 1 mm voxels, blended.

    ``function`` returns a new tensor, or several, on the CPU; blending scales them in place.
    """
    if tile is None:
        return function(state)
    from monai.inferers import sliding_window_inference

    # Tiles are put together where the state is, on the CPU: a GPU that needs them has no room.
    blended: T = sliding_window_inference(
        state.packed(),
        tile // STRIDE,
        1,
        lambda x: function(DiffusionState.unpacked(x)),
        overlap=0.5,
        mode="gaussian",
    )
    return blended


def softmax(logits: Tensor) -> Tensor:
    """Probabilities (B, classes, X, Y, Z) in float32, in the memory layout of the logits.

    The classes of a voxel lie together in ``channels_last_3d``; softmax of the second axis would
    copy all twice.
    """
    return logits.permute(0, 2, 3, 4, 1).float().softmax(dim=4).permute(0, 4, 1, 2, 3)
