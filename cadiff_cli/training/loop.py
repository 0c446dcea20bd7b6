"""The training loop: draw, predict, compare, step.  Stops and resumes at any moment.

Each step's randomness (patches, times, noise) is a function of the seed and the step's number, so a
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
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cadiff_cli.config import as_dict
from cadiff_cli.errors import UsageError
from cadiff_cli.nets.unet import CADiffNet, channels_last
from cadiff_cli.stages.segment import autocast
from cadiff_cli.training.augment import AugmentConfig, Draws, Patch, stack
from cadiff_cli.training.cache import Sample
from cadiff_cli.training.losses import Losses
from cadiff_cli.training.objective import Objective

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    ``steps`` in all: ``warmup`` rising, then constant at ``rate``, then ``decay`` falling to zero.
    A step sees ``batch`` patches of ``patch`` voxels a side.  ``ema`` is the decay of the weights'
    average, which is what is exported; ``clip`` bounds the gradient's norm.  The label prior is
    counted over ``prior_scans`` scans drawn by the seed, or over all (0).
    """

    steps: int = 3000
    warmup: int = 100
    decay: int = 1000
    rate: float = 1e-3
    weight_decay: float = 1e-2
    clip: float = 1.0
    ema: float = 0.998
    patch: int = 96
    batch: int = 1
    seed: int = 0
    prior_scans: int = 0
    objective: Objective = field(default_factory=Objective)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        if self.patch < 64 or self.patch % 32:
            # Below 64 the deepest level is 2 voxels wide, where torch's bfloat16 gradients fail.
            raise UsageError(f"patch is {self.patch}", "use 64 or more, a multiple of 32")
        if self.batch < 1:
            raise UsageError(f"batch is {self.batch}", "use 1 or more")


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
    """A fresh start from ``net``'s weights, on its device."""
    channels_last(net)
    ema = channels_last(CADiffNet(net.config)).to(next(net.parameters()).device)
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


class Monitor(Protocol):
    """Whoever wants to know how a run is going."""

    def interval(self, step: int, report: "Interval") -> None:
        """Called every ``report_every`` steps."""

    def step_done(self, state: State) -> None:
        """Called after every step; may take its time (validation)."""


@dataclass(frozen=True)
class Interval:
    """Means over the last steps: losses by name, rate, seconds a step, share spent on data."""

    losses: dict[str, float]
    rate: float
    seconds_per_step: float
    data_share: float


def fit(
    state: State,
    samples: Sequence[Sample],
    mirror: Tensor,
    config: TrainConfig,
    checkpoint: Path,
    *,
    monitor: Monitor | None = None,
    workers: int = 0,
    max_minutes: float = math.inf,
    report_every: int = 20,
    save_minutes: float = 4.0,
) -> None:
    """Train until ``config.steps`` or ``max_minutes``; SIGTERM and Ctrl-C save and return.

    ``workers`` processes draw patches ahead of the network (0: the training process itself).
    """
    stop = False

    def ask(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stop
        stop = True

    handlers = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    device = next(state.net.parameters()).device
    begun = saved = reported = time.monotonic()
    before = state.seconds
    waited, since = 0.0, 0
    sums: dict[str, float] = {}
    try:
        patches = iter(patch_loader(samples, mirror, config, state.step, workers, device))
        while state.step < config.steps and not stop:
            if (time.monotonic() - begun) / 60 > max_minutes:
                break
            asked = time.monotonic()
            patch = next(patches).to(device)
            waited += time.monotonic() - asked
            losses = train_step(state, patch, config)
            state.seconds = before + time.monotonic() - begun
            for name in ("total", *Losses.__dataclass_fields__):
                sums[name] = sums.get(name, 0.0) + float(getattr(losses, name).detach())
            since += 1
            now = time.monotonic()
            if state.step % report_every == 0:
                report = Interval(
                    {name: value / since for name, value in sums.items()},
                    config.rate * rate_factor(state.step, config),
                    (now - reported) / since,
                    waited / (now - reported),
                )
                log.info(
                    "step %d/%d  %s  rate %.1e  %.2f s/step, data %.0f %%",
                    state.step,
                    config.steps,
                    "  ".join(f"{name} {value:.3f}" for name, value in report.losses.items()),
                    report.rate,
                    report.seconds_per_step,
                    100 * report.data_share,
                )
                if monitor:
                    monitor.interval(state.step, report)
                sums, waited, since, reported = {}, 0.0, 0, now
            if now - saved > 60 * save_minutes:
                save_checkpoint(checkpoint, state, config)
                saved = now
            if monitor:
                monitor.step_done(state)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    save_checkpoint(checkpoint, state, config)


def patch_loader(
    samples: Sequence[Sample],
    mirror: Tensor,
    config: TrainConfig,
    step: int,
    workers: int,
    device: torch.device,
) -> "DataLoader[Patch]":
    """Batches of patches from ``step`` on, in order."""
    draws = Draws(samples, config.patch, mirror, config.augment, config.seed)
    return DataLoader(
        draws,
        batch_size=config.batch,
        sampler=range(step * config.batch, config.steps * config.batch),
        num_workers=workers,
        collate_fn=stack,
        pin_memory=device.type == "cuda",
    )


def train_step(state: State, patch: Patch, config: TrainConfig) -> Losses:
    """One forward and backward pass, one step of the optimiser and of the average."""
    device = patch.image.device
    # Not the number that the patch was drawn with: its deformation would decide the times.
    number = config.seed * 10_000_019 + 5_000_011 + state.step
    generator = torch.Generator(device).manual_seed(number)
    with autocast(device):
        losses = config.objective(state.net, patch, generator)
    state.optimiser.zero_grad(set_to_none=True)
    losses.total.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(state.net.parameters(), config.clip)
    for group in state.optimiser.param_groups:
        group["lr"] = config.rate * rate_factor(state.step, config)
    state.optimiser.step()
    state.step += 1
    update_ema(state, config)
    return losses


@torch.no_grad()
def update_ema(state: State, config: TrainConfig) -> None:
    """Exponential moving average of the weights, faster in the beginning."""
    decay = min(config.ema, (1 + state.step) / (10 + state.step))
    for average, current in zip(state.ema.parameters(), state.net.parameters(), strict=True):
        average.lerp_(current, 1 - decay)
