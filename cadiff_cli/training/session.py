"""A training run in its folder: begun or gone on with, fitted, exported.

``config.json`` describes the run, ``checkpoint.pt`` is what it goes on from, and
``model.safetensors`` holds the exported weights (their average).
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from torch import nn
from torch.utils.data import Dataset

from cadiff_cli.config import as_dict, fingerprint
from cadiff_cli.device import usable_device
from cadiff_cli.errors import DataError, OutputError, UsageError, first_few
from cadiff_cli.io import models
from cadiff_cli.io.files import read_json, write_json
from cadiff_cli.machine import memory_kept
from cadiff_cli.nets.models import Trained
from cadiff_cli.training.batch import B
from cadiff_cli.training.loop import (
    Monitor,
    Objective,
    Schedule,
    TrainingState,
    fit,
    load_checkpoint,
    new_state,
    series,
)

log = logging.getLogger(__name__)

N = TypeVar("N", bound=nn.Module)
WEIGHTS = "model.safetensors"
"""The exported weights in a run's folder."""
CHECKPOINT, SETTINGS = "checkpoint.pt", "config.json"
UNTOLD = ""
"""A fact that an older run did not write down: it is taken on trust."""
MAY_CHANGE = ("steps", "decay", "rate")
"""Settings of which a run may go on with others."""


def check_room(folder: Path) -> None:
    """Raise ``OutputError`` if a new run in ``folder`` would replace finished weights."""
    if (folder / WEIGHTS).exists() and not (folder / CHECKPOINT).exists():
        raise OutputError(
            f"{folder / WEIGHTS} is there, and no checkpoint to go on from",
            "choose another folder for this run, or move the weights away",
        )


def check_held_out(
    people: Set[str],
    hold_out: Sequence[str],
    init: Trained[Any] | None,
    others: Set[str] = frozenset(),
    option: str = "--hold-out",
    one: str = "subject",
) -> None:
    """Raise ``UsageError`` unless these people can be held out, and some are left to train on.

    ``others`` are those of datasets that are trusted less; nobody that ``init`` was trained on can
    be held out.  Errors name the ``option``, and what ``one`` of the people is: a subject, or the
    source of many.
    """
    held = set(hold_out)
    if missing := sorted(held - people - others):
        known = first_few(sorted(people | others), 20)
        raise UsageError(f"{option} names {first_few(missing)}", f"there are {known}")
    if init and (seen := sorted(init.seen & held)):
        raise UsageError(
            f"--init was trained on {first_few(seen)}, and {option} names them",
            "hold out others, or begin anew",
        )
    if not people - held:
        raise UsageError(f"every {one} is held out", "leave some to train on")


@dataclass(frozen=True)
class Identity:
    """All that must agree, beside the settings, for a run to go on.

    ``net`` holds the network's settings, ``init`` is the checksum of the weights that it began
    with.  Each kind of network adds its data.  A field's default is the value of older runs, which
    did not write it down.
    """

    net: Mapping[str, Any]
    init: str | None


def new_net(
    kind: Callable[[Any], N],
    settings: Any,
    init: Trained[N] | None,
    seed: int,
    device: str,
    begin: Callable[[N, N], object] = lambda net, other: net.load_state_dict(other.state_dict()),
) -> N:
    """A network on its device, with random weights, a function of ``seed``, or those of ``init``.

    Without ``settings`` it has those of ``init``.  ``begin(net, other)`` copies weights.
    """
    torch.manual_seed(seed)
    net = kind(settings or (init.net.config if init else None))
    if init:
        begin(net, init.net)
    return net.to(usable_device(device)[0])


@dataclass
class Session(Generic[N]):
    """A run: its folder, its state, its settings and the description that its weights carry.

    ``resumed`` says that it goes on from a checkpoint; at ``deadline`` (of ``time.monotonic``) it
    stops.
    """

    folder: Path
    state: TrainingState[N]
    config: Schedule
    description: dict[str, Any]
    resumed: bool
    deadline: float

    @classmethod
    def open(
        cls,
        folder: Path,
        net: N,
        config: Schedule,
        identity: Identity,
        facts: Mapping[str, Any],
        max_minutes: float = math.inf,
    ) -> Self:
        """Begin a run with ``net``, or go on from the checkpoint in ``folder``.

        ``facts`` are told in ``config.json`` too, but need not agree.  Raises ``UsageError`` where
        the checkpoint is of another run, or has more steps than ``config``, and ``OutputError``
        where finished weights would be lost.
        """
        folder.mkdir(parents=True, exist_ok=True)
        settings = as_dict(config)
        state, checkpoint = new_state(net, config), folder / CHECKPOINT
        described = folder / SETTINGS
        if resumed := checkpoint.exists():
            refuse_other_run(described, identity, config, net.config)
            load_checkpoint(checkpoint, state, config)
            log.info("continuing at step %d", state.step)
        else:
            check_room(folder)
        description = {
            "train": settings,
            "fingerprint": fingerprint(settings),
            **as_dict(identity),
            **facts,
        }
        write_json(described, description)
        deadline = time.monotonic() + 60 * max_minutes
        return cls(folder, state, config, description, resumed, deadline)

    def fit(
        self,
        draws: Dataset[B],
        objective: Objective,
        *,
        schedule: Schedule | None = None,
        workers: int = 0,
        monitor: Monitor | None = None,
    ) -> bool:
        """Train on ``draws`` to the end of the ``schedule`` (the run's own, or a first part of it).

        Returns whether nothing stopped it.
        """
        schedule = schedule or self.config
        # Tensors of a training come and go by the hundred.
        with memory_kept():
            return fit(
                self.state,
                series(draws, schedule, self.state.step, workers, self.state.device),
                objective,
                schedule,
                self.folder / CHECKPOINT,
                monitor=monitor,
                max_minutes=(self.deadline - time.monotonic()) / 60,
            )

    def export(self, kind: Callable[..., Trained[N]], **facts: Any) -> Path:
        """Write the average of the weights as a model of a ``kind`` that also holds ``facts``."""
        state, steps = self.state, self.config.steps
        if state.step < steps:
            log.warning("stopped at step %d of %d: the same command goes on", state.step, steps)
        progress = {"steps": state.step, "hours": round(state.seconds / 3600, 2)}
        path = self.folder / WEIGHTS
        models.save(path, kind(state.ema, training=self.description | progress, **facts))
        log.info("wrote %s after %d steps", path, state.step)
        return path


def finished(
    folder: Path, kind: type[Trained[Any]], identity: Identity, config: Schedule, net: Any
) -> Path | None:
    """The weights of a run that took all its steps, where somebody removed its checkpoint.

    ``config`` and ``net`` are the settings of the run and of its network.  None without such
    weights: those of another run are not ours to use.
    """
    weights, settings = folder / WEIGHTS, folder / SETTINGS
    if not (weights.exists() and settings.exists()) or (folder / CHECKPOINT).exists():
        return None
    try:
        refuse_other_run(settings, identity, config, net)
    except UsageError:
        return None
    steps = models.load(kind, str(weights)).training["steps"]
    return weights if steps >= config.steps else None


def refuse_other_run(path: Path, identity: Identity, config: Schedule, net: Any) -> None:
    """Refuse to go on with a run (``path`` is its ``config.json``) that was another one.

    ``config`` and ``net`` are the settings of the run and of its network.  What older runs did not
    write down had its default, as in ``identity``.
    """
    before = read_json(path)
    if before is None or not {"train", "net"} <= before.keys():
        raise DataError(
            f"{path} does not say whose checkpoint lies beside it",
            "copy it again, or use another --run folder",
        )
    untold = {f.name: f.default for f in fields(identity) if f.default is not MISSING}
    was = untold | as_dict(type(config)()) | before | before["train"]
    was["net"] = as_dict(type(net)()) | was["net"]
    values = {**as_dict(identity), **as_dict(config)}
    # The network last: other data or settings may be the reason why it is another one.
    for key, now in sorted(values.items(), key=lambda item: item[0] == "net"):
        if key not in MAY_CHANGE and was.get(key) not in (UNTOLD, now):
            raise UsageError(
                f"the checkpoint beside {path} has {key} {was.get(key)}, not {now}",
                "use another --run folder; only --steps, --decay and --rate may change",
            )


def refuse_other_budget(folder: Path, config: Schedule) -> None:
    """Refuse to go on with a network that was begun with another budget: it would have had more.

    A training by itself may go on with more steps, or at another rate.
    """
    was, now = (read_json(folder / SETTINGS) or {}).get("train", {}), as_dict(config)
    for key in MAY_CHANGE:
        if key in was and was[key] != now[key]:
            raise UsageError(
                f"{folder} was begun with {key} {was[key]}, not {now[key]}",
                "use another --run folder, or the options of before",
            )
