"""The training loop: draw, predict, compare, step.  Stops and resumes at any moment.

It knows neither network nor data: batches come from an iterable, losses from an objective.  Each
step's randomness is a function of the seed and the step's number, so a resumed run draws what the
uninterrupted one would have drawn.
"""

import copy
import dataclasses
import io
import logging
import math
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from cadiff_cli.config import MOST_SEED, as_dict
from cadiff_cli.device import autocast, enough_memory
from cadiff_cli.errors import CadiffError, DataError, DiskError, UsageError
from cadiff_cli.nets.blocks import channels_last
from cadiff_cli.training.batch import B, Batch, Parts, generator_of, stack

log = logging.getLogger(__name__)


N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    ``steps`` in all: ``warmup`` rising, then constant at ``rate``, then ``decay`` falling to zero.
    A step sees ``batch`` draws.  ``ema`` is the decay of the weights' average, which is what is
    exported; ``clip`` bounds the gradient's norm.
    """

    steps: int = 3000
    warmup: int = 100
    decay: int = 1000
    rate: float = 1e-3
    weight_decay: float = 1e-2
    clip: float = 1.0
    ema: float = 0.998
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps is {self.steps}", "use 1 or more")
        if not 0 <= self.seed <= MOST_SEED:
            raise UsageError(f"seed is {self.seed}", f"use 0 to {MOST_SEED}")
        if self.batch < 1:
            raise UsageError(f"batch is {self.batch}", "use 1 or more")
        if not 0 < self.rate < math.inf:
            raise UsageError(f"the learning rate is {self.rate}", "use one above 0, as 1e-3")


class Objective(Protocol):
    """Losses of a network on a batch; the generator lives on the batch's device."""

    def __call__(
        self, net: Any, batch: Any, generator: torch.Generator, progress: float, /
    ) -> Parts:
        """Everything random comes from ``generator``; ``progress`` is the run's, from 0 to 1."""


@dataclass
class TrainingState(Generic[N]):
    """What a checkpoint holds: enough to go on exactly."""

    net: N
    ema: N
    optimiser: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self.net.parameters()).device


def rate_factor(step: int, config: Schedule) -> float:
    """Share of the full learning rate at ``step``: linear up, flat, linear down to zero."""
    up = min(1.0, (step + 1) / max(config.warmup, 1))
    down = min(1.0, (config.steps - step) / max(config.decay, 1))
    return max(0.0, min(up, down))


def progress_at(step: int, config: Schedule) -> float:
    """How far a run is when it takes ``step``: 0 at its first, 1 at its last."""
    return min(1.0, step / max(config.steps - 1, 1))


def new_state(net: N, config: Schedule) -> TrainingState[N]:
    """A fresh start from ``net``'s weights, on its device."""
    channels_last(net)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimiser = torch.optim.AdamW(
        net.parameters(), lr=config.rate, weight_decay=config.weight_decay, fused=True
    )
    return TrainingState(net, ema, optimiser)


def save_checkpoint(path: Path, state: TrainingState[N], config: Schedule) -> None:
    """Write atomically: a kill at any moment leaves the last complete checkpoint."""
    stored = {
        "net": state.net.state_dict(),
        "ema": state.ema.state_dict(),
        "optimiser": state.optimiser.state_dict(),
        "step": state.step,
        "seconds": state.seconds,
        "net_config": as_dict(state.net.config),
        "train_config": as_dict(config),
    }
    data = io.BytesIO()  # torch hides why a file cannot be written
    torch.save(stored, data)
    temporary = path.with_suffix(".tmp")  # one name: the next save replaces what a kill leaves
    try:
        temporary.write_bytes(data.getbuffer())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "; the last checkpoint is there still" if path.exists() else ""
        raise DiskError(
            f"writing {path} failed ({error}){kept}",
            "free some space (df -h) and give the same command again",
        ) from error


def load_checkpoint(path: Path, state: TrainingState[N], config: Schedule) -> None:
    """Continue ``state`` from a file written by ``save_checkpoint``.

    Raises ``UsageError`` if it has gone beyond the schedule, ``DataError`` if it is damaged.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, OSError, RuntimeError, UnpicklingError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__})",  # torch's words advise to trust it
            "remove it to begin anew, or copy it again",
        ) from error
    state.net.load_state_dict(stored["net"])
    state.ema.load_state_dict(stored["ema"])
    state.optimiser.load_state_dict(stored["optimiser"])
    state.step, state.seconds = int(stored["step"]), float(stored["seconds"])
    if state.step > config.steps:
        raise UsageError(
            f"{path} has {state.step} steps already, --steps is {config.steps}",
            "give as many or more, or another --run folder",
        )


class Monitor(Protocol):
    """Told how a run is going."""

    def interval(self, step: int, report: "Interval") -> None:
        """Called every ``report_every`` steps."""

    def step_done(self, state: TrainingState[Any]) -> None:
        """Called after every step; may take its time (validation)."""


@dataclass(frozen=True)
class Interval:
    """Means over the last steps: losses by name, rate, seconds a step, share spent on data."""

    losses: dict[str, float]
    rate: float
    seconds_per_step: float
    data_share: float


def fit(
    state: TrainingState[N],
    batches: Iterable[Batch],
    objective: Objective,
    config: Schedule,
    checkpoint: Path,
    *,
    monitor: Monitor | None = None,
    max_minutes: float = math.inf,
    report_every: int = 20,
    save_minutes: float = 4.0,
) -> bool:
    """Train until ``config.steps`` or ``max_minutes``; SIGTERM and Ctrl-C save and return.

    ``batches`` begins with that of step ``state.step``.  Returns whether nothing stopped it.
    """
    stop = False

    def ask(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stop
        stop = True

    handlers = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    begun = saved = reported = time.monotonic()
    before = state.seconds
    waited, since = 0.0, 0
    sums: dict[str, float] = {}
    try:
        queue = iter(batches)
        while state.step < config.steps and not stop:
            if (time.monotonic() - begun) / 60 > max_minutes:
                break
            asked = time.monotonic()
            batch = next(queue).to(state.device)
            waited += time.monotonic() - asked
            losses = train_step(state, batch, objective, config)
            state.seconds = before + time.monotonic() - begun
            for name in ("total", *(f.name for f in dataclasses.fields(losses))):
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
    return state.step >= config.steps and not stop


def series(
    draws: Dataset[B], schedule: Schedule, step: int, workers: int, device: torch.device
) -> "DataLoader[B]":
    """Batches of an endless series of draws from ``step`` on, in order."""
    return DataLoader(
        draws,
        batch_size=schedule.batch,
        sampler=range(step * schedule.batch, schedule.steps * schedule.batch),
        num_workers=workers,
        worker_init_fn=_outlive_signals,
        collate_fn=stack,
        pin_memory=device.type == "cuda",
    )


def _outlive_signals(_worker: int) -> None:
    """For a loader's processes: whoever stops the whole group stops the run, and that stops them.

    Without them the run could not finish its step, and write no checkpoint.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def train_step(
    state: TrainingState[N], batch: Any, objective: Objective, config: Schedule
) -> Parts:
    """One forward and backward pass, one step of the optimiser and of the average."""
    # Not the number that a patch was drawn with: its deformation would decide the times.
    generator = generator_of(config.seed, 5_000_011 + state.step, state.device)
    with enough_memory("use a smaller --batch, or --device cpu"):
        with autocast(state.device):
            losses = objective(state.net, batch, generator, progress_at(state.step, config))
        state.optimiser.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]
    # One step with a NaN would spoil weights, average and checkpoint for good.
    norm = torch.nn.utils.clip_grad_norm_(state.net.parameters(), config.clip)
    if not norm.isfinite():
        raise CadiffError(
            f"the gradient of step {state.step} is {float(norm)}: no checkpoint was spoilt",
            "go on with a lower --rate, or begin anew in another folder with another --seed",
        )
    for group in state.optimiser.param_groups:
        group["lr"] = config.rate * rate_factor(state.step, config)
    state.optimiser.step()
    state.step += 1
    update_ema(state, config)
    return losses


@torch.no_grad()
def update_ema(state: TrainingState[N], config: Schedule) -> None:
    """Exponential moving average of the weights, faster in the beginning; buffers are copied."""
    decay = min(config.ema, (1 + state.step) / (10 + state.step))
    for average, current in zip(state.ema.parameters(), state.net.parameters(), strict=True):
        average.lerp_(current, 1 - decay)
    for copied, buffer in zip(state.ema.buffers(), state.net.buffers(), strict=True):
        copied.copy_(buffer)
