"""The training loop: draw, corrupt, predict, compare, step.  Stops and resumes at any moment.

Each step's randomness (patch, times, noise) is a function of the seed and the step's number, so a
resumed run draws what the uninterrupted one would have drawn.
"""

import logging
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from cadiff_cli.config import as_dict
from cadiff_cli.diffusion.process import corrupt
from cadiff_cli.errors import UsageError
from cadiff_cli.nets.unet import STRIDE, CADiffNet, channels_last
from cadiff_cli.training.augment import AugmentConfig, Patch, draw_patch
from cadiff_cli.training.cache import Sample
from cadiff_cli.training.losses import (
    Losses,
    central,
    crop_coarse,
    dice_ce,
    field_mse,
    fractions,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    ``steps`` in all: ``warmup`` rising, then constant at ``rate``, then ``decay`` falling to zero.
    ``patch`` is the edge in voxels; the 1 mm head sees a random cube of ``fine`` voxels of it.

    Times: t_m is 1 with probability ``p_noise`` (inference begins there) and t_d is 0 with
    probability ``p_clean_field`` (inference stays there), else uniform in [0, 1], independently
    (eq. 3).  With probability ``p_recycle`` a label state with t_m < 1 is made from the network's
    own prediction at t_m = 1 instead of the manual labels, as inference will (Fu et al., 2023).
    """

    steps: int = 3000
    warmup: int = 100
    decay: int = 1000
    rate: float = 1e-3
    weight_decay: float = 1e-2
    clip: float = 1.0
    ema: float = 0.998
    patch: int = 96
    fine: int = 64
    p_noise: float = 0.5
    p_clean_field: float = 0.75
    p_recycle: float = 1.0
    seed: int = 0
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        if self.patch < 64 or self.patch % 32 or self.fine % 2 or self.fine > self.patch:
            # Below 64 the deepest level is 2 voxels wide, where torch's bfloat16 gradients fail.
            raise UsageError(
                f"patch {self.patch} and fine {self.fine}",
                "patch: 64 or more, a multiple of 32; fine: even, at most patch",
            )


@dataclass
class State:
    """What a checkpoint holds: enough to go on exactly."""

    net: CADiffNet
    ema: CADiffNet
    optimiser: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0


def rate_factor(step: int, config: TrainConfig) -> float:
    """Share of the full learning rate at ``step``: linear up, flat, linear down to zero."""
    up = min(1.0, (step + 1) / max(config.warmup, 1))
    down = min(1.0, (config.steps - step) / max(config.decay, 1))
    return max(0.0, min(up, down))


def new_state(net: CADiffNet, config: TrainConfig) -> State:
    """A fresh start from ``net``'s weights."""
    channels_last(net)
    ema = channels_last(CADiffNet(net.config))
    ema.load_state_dict(net.state_dict())
    ema.requires_grad_(False)
    optimiser = torch.optim.AdamW(
        net.parameters(), lr=config.rate, weight_decay=config.weight_decay, fused=True
    )
    return State(net, ema, optimiser)


def save_checkpoint(path: Path, state: State, config: TrainConfig) -> None:
    """Write atomically: a kill at any moment leaves the last complete checkpoint."""
    temporary = path.with_suffix(".tmp")
    torch.save(
        {
            "net": state.net.state_dict(),
            "ema": state.ema.state_dict(),
            "optimiser": state.optimiser.state_dict(),
            "step": state.step,
            "seconds": state.seconds,
            "net_config": as_dict(state.net.config),
            "train_config": as_dict(config),
        },
        temporary,
    )
    temporary.replace(path)


def load_checkpoint(path: Path, state: State) -> None:
    """Continue ``state`` from a file written by ``save_checkpoint``."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    state.net.load_state_dict(stored["net"])
    state.ema.load_state_dict(stored["ema"])
    state.optimiser.load_state_dict(stored["optimiser"])
    state.step, state.seconds = int(stored["step"]), float(stored["seconds"])


def step_losses(
    net: CADiffNet, patch: Patch, config: TrainConfig, generator: torch.Generator
) -> Losses:
    """One forward pass of eq. 3 and the losses of eq. 4."""
    k = net.config.n_classes
    target = fractions(patch.classes, k, STRIDE)
    field_0, label_0 = 2 * patch.field - 1, 2 * target - 1

    def chance(p: float) -> bool:
        return float(torch.rand(1, generator=generator)) < p

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    t_m = torch.ones(1) if chance(config.p_noise) else torch.rand(1, generator=generator)
    t_d = torch.zeros(1) if chance(config.p_clean_field) else torch.rand(1, generator=generator)
    d_t = corrupt(field_0, t_d, noise(field_0))
    recycle = chance(config.p_recycle) and float(t_m) < 1
    if recycle:
        with torch.no_grad():
            first = net.trunk(patch.image, d_t, noise(label_0), t_d, torch.ones(1))
            label_0 = 2 * first.logits.softmax(dim=1) - 1
    m_t = corrupt(label_0, t_m, noise(label_0))

    coarse = net.trunk(patch.image, d_t, m_t, t_d, t_m)
    room = (config.patch - config.fine) // STRIDE + 1
    start = tuple(STRIDE * int(n) for n in torch.randint(room, (3,), generator=generator))
    fine = net.refine(
        central(patch.image, start, config.fine),
        crop_coarse(coarse, start, config.fine),
        t_d,
        t_m,
    )
    classes = central(patch.classes[:, None], start, config.fine)[:, 0]
    return Losses(
        label=dice_ce(fine, fractions(classes, k)),
        coarse=dice_ce(coarse.logits, target),
        field=field_mse(coarse.field, patch.field),
    )


def fit(
    state: State,
    samples: Sequence[Sample],
    mirror: Tensor,
    config: TrainConfig,
    checkpoint: Path,
    *,
    max_minutes: float = math.inf,
    report_every: int = 20,
    save_minutes: float = 4.0,
) -> None:
    """Train until ``config.steps`` or ``max_minutes``; SIGTERM and Ctrl-C save and return."""
    stop = False

    def ask(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stop
        stop = True

    handlers = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    begun = saved = reported = time.monotonic()
    before = state.seconds
    sums = torch.zeros(4)
    try:
        while state.step < config.steps and not stop:
            if (time.monotonic() - begun) / 60 > max_minutes:
                break
            generator = torch.Generator().manual_seed(config.seed * 10_000_019 + state.step)
            pick = int(torch.randint(len(samples), (1,), generator=generator))
            patch = draw_patch(samples[pick], config.patch, mirror, config.augment, generator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses = step_losses(state.net, patch, config, generator)
            state.optimiser.zero_grad(set_to_none=True)
            losses.total.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(state.net.parameters(), config.clip)
            for group in state.optimiser.param_groups:
                group["lr"] = config.rate * rate_factor(state.step, config)
            state.optimiser.step()
            state.step += 1
            update_ema(state, config)
            state.seconds = before + time.monotonic() - begun
            parts = (losses.total, losses.label, losses.coarse, losses.field)
            sums += torch.stack([p.detach() for p in parts])
            now = time.monotonic()
            if state.step % report_every == 0:
                total, label, coarse, fld = (sums / report_every).tolist()
                log.info(
                    "step %d/%d  loss %.3f  label %.3f  coarse %.3f  field %.5f  %.2f s/step",
                    *(state.step, config.steps, total, label, coarse, fld),
                    (now - reported) / report_every,
                )
                sums.zero_()
                reported = now
            if now - saved > 60 * save_minutes:
                save_checkpoint(checkpoint, state, config)
                saved = now
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    save_checkpoint(checkpoint, state, config)


@torch.no_grad()
def update_ema(state: State, config: TrainConfig) -> None:
    """Exponential moving average of the weights, faster in the beginning."""
    decay = min(config.ema, (1 + state.step) / (10 + state.step))
    for average, current in zip(state.ema.parameters(), state.net.parameters(), strict=True):
        average.lerp_(current, 1 - decay)
