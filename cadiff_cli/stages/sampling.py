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

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.config import SampleConfig
from cadiff_cli.device import autocast, free_bytes, is_short_of_memory, pick_device
from cadiff_cli.diffusion.sampler import sample, spaced_times
from cadiff_cli.errors import UsageError
from cadiff_cli.nets.blocks import last, shuffle, unshuffle
from cadiff_cli.nets.models import Model
from cadiff_cli.nets.segmenter import STRIDE, CADiffNet, Prior
from cadiff_cli.products import Conditions

log = logging.getLogger(__name__)
T = TypeVar("T")

BYTES_PER_VOXEL, BYTES_PER_CLASS = 208, 12
"""Peak memory of whole-volume inference per 1 mm voxel; decides about tiling.

700 bytes were measured with 41 classes; 12 of each class are the logits and the probabilities of
a brain and of its mirror image, in 4 bytes.
"""
TILE = 96


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
    each: Callable[[Tensor], None] | None = None,
    device_name: str = "auto",
) -> tuple[Tensor, int | None]:
    """(classes, X, Y, Z) float32 on the crop's 1 mm grid, and the edge of the tiles if any.

    They are the mean over the samples; ``each`` is called with every sample.
    """
    device = pick_device(device_name)
    image = torch.from_numpy(conditions.image.data.copy())[None, None]
    known = conditions.field
    field = None if known is None else torch.from_numpy(known.data.copy())[None]
    net = model.net.to(device)

    def predict(seed: int, tile: int | None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        mirror = torch.from_numpy(model.parcellation.mirror_classes) if config.flip else None
        return denoise(net, image, field, config.steps, generator, device, tile, mirror)

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

    p, tile = predict_or_tile(config.seed, config.tile)
    if each:
        each(p)
    for seed in range(config.seed + 1, config.seed + config.samples):
        another, tile = predict_or_tile(seed, tile)
        if each:
            each(another)
        p.add_(another)
    return p if config.samples == 1 else p.div_(config.samples), tile


@dataclass(frozen=True, eq=False)
class State:
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
    def unpacked(x: Tensor) -> "State":
        """The inverse of ``packed``, for a tile too."""
        blocks = STRIDE**3
        image, field, labels = torch.split(x, [blocks, 3, x.shape[1] - blocks - 3], dim=1)
        return State(shuffle(image), field, labels)

    def mirrored(self, mirror: Tensor) -> "State":
        """The left-right mirrored brain; ``mirror`` (classes,) maps a class to the other side's.

        The first axis points from left to right, so D_x -> -D_x.
        """
        sign = torch.tensor([-1.0, 1.0, 1.0]).reshape(3, 1, 1, 1)
        return State(self.image.flip(2), sign * self.field.flip(2), self.labels.flip(2)[:, mirror])


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A network, asked about states on ``device``, whole or in tiles of ``tile`` 1 mm voxels.

    A ``known`` field stays as it is at t_d = 0; an unknown one has the time of the labels.
    """

    net: CADiffNet
    known: bool
    device: torch.device
    tile: int | None = None

    def estimate(self, state: State, t: float) -> State:
        """The network's estimate of the clean state."""

        def clean(part: State) -> tuple[Tensor, Tensor]:
            field, p = self._ask(part, t, fine=False)
            return field.cpu(), self.net.label_state(p).cpu()

        field, labels = by_tiles(clean, state, self.tile)
        return replace(state, field=state.field if self.known else field, labels=labels)

    def look_up(self, state: State) -> State:
        """The state with the prior at its known field; tiles look it up themselves."""
        if not self.known or self.tile is not None:
            return state
        clean = torch.zeros(1, device=self.device)
        with autocast(self.device):
            return replace(state, prior=self.net.look_up(state.field.to(self.device), clean))

    def step(self, state: State, estimate: State, t: float, t_next: float) -> State:
        """The state at ``t_next``, as the network's noise process makes it."""
        step = self.net.process.step
        labels = step(state.labels, estimate.labels, t, t_next)
        if self.known:
            return replace(state, labels=labels)
        return replace(state, field=step(state.field, estimate.field, t, t_next), labels=labels)

    def probabilities(self, state: State, t: float) -> Tensor:
        """The network's answer at 1 mm, (classes, 2x, 2y, 2z) on the CPU."""
        return by_tiles(lambda part: self._ask(part, t, fine=True)[1].cpu(), state, self.tile)[0]

    def _ask(self, state: State, t: float, fine: bool) -> tuple[Tensor, Tensor]:
        """The field at 2 mm, and probabilities at 2 mm or, if ``fine``, at 1 mm."""
        image, d_t, m_t = (x.to(self.device) for x in (state.image, state.field, state.labels))
        t_m = torch.full((1,), t, device=self.device)
        t_d = torch.zeros_like(t_m) if self.known else t_m
        with autocast(self.device):
            coarse = self.net.trunk(image, d_t, m_t, t_d, t_m, state.prior)
            if not fine:
                return coarse.field, coarse.logits.softmax(dim=1)
            return coarse.field, softmax(self.net.refine(image, coarse, t_d, t_m))


@torch.no_grad()
def denoise(
    net: CADiffNet,
    image: Tensor,
    field: Tensor | None,
    steps: int,
    generator: torch.Generator,
    device: torch.device,
    tile: int | None = None,
    mirror: Tensor | None = None,
) -> Tensor:
    """Sample labels for one brain: (classes, X, Y, Z) float32 probabilities on the CPU.

    ``image`` (1, 1, X, Y, Z) in [0, 1]; ``field`` (1, 3, X/2, Y/2, Z/2) in [0, 1], or None to
    denoise it with the labels.  Zero steps give the label prior at the field: the answer of the
    registration alone.  With ``mirror`` (see ``State.mirrored``) the last step is the mean over
    the brain and its mirror image.
    """
    if steps == 0:
        if field is None:
            raise UsageError("no steps and no registration", "ask for one of them")
        prior = net.prior((2 * field - 1).to(device)).cpu()
        return F.interpolate(prior, scale_factor=STRIDE, mode="trilinear")[0].softmax(dim=0)
    space = [n // STRIDE for n in image.shape[2:]]

    def noise(channels: int) -> Tensor:
        return net.process.start(last(torch.randn(1, channels, *space, generator=generator)))

    d_1 = noise(3) if field is None else 2 * field - 1
    denoiser = Denoiser(net, field is not None, device, tile)
    start = State(image, d_1, noise(net.config.n_classes))
    times = spaced_times(steps if net.config.reads_labels else 1)
    states = sample(denoiser.step, denoiser.estimate, denoiser.look_up(start), times)
    (state,) = deque(states, maxlen=1)
    p = denoiser.probabilities(state, times[-1])
    if mirror is None:
        return p
    state = state.mirrored(mirror)  # which frees the prior
    q = denoiser.probabilities(denoiser.look_up(state), times[-1])
    return add_unmirrored(p, q, mirror).div_(2)


def softmax(logits: Tensor) -> Tensor:
    """Probabilities (B, classes, X, Y, Z) in float32."""
    p = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    # Slab by slab: a float32 copy of all logits would be the peak of the memory.
    for out, slab in zip(torch.split(p, 16, dim=2), torch.split(logits, 16, dim=2), strict=True):
        out.copy_(slab.float().softmax(dim=1))
    return p


def by_tiles(function: Callable[[State], T], state: State, tile: int | None) -> T:
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
        lambda x: function(State.unpacked(x)),
        overlap=0.5,
        mode="gaussian",
    )
    return blended


def add_unmirrored(p: Tensor, q: Tensor, mirror: Tensor) -> Tensor:
    """Add to ``p``, in place, the probabilities ``q`` of the mirrored brain, mirrored back.

    Both are (classes, X, Y, Z).  Class by class: a copy of all would double the peak memory.
    """
    for k, other in enumerate(mirror.tolist()):
        p[k].add_(q[other].flip(0))
    return p
