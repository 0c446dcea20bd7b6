"""The run of ``cadiff train-mask``: fit, export, score the held-out heads."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from cadiff_cli.config import as_dict, fingerprint
from cadiff_cli.errors import UsageError, first_few
from cadiff_cli.io.files import write_tsv
from cadiff_cli.nets.brain_mask import BrainConfig, BrainNet
from cadiff_cli.nets.models import BrainModel
from cadiff_cli.stages.brain_mask import predict_distance
from cadiff_cli.training.brain_mask.config import HeadConfig
from cadiff_cli.training.brain_mask.data import Head, content
from cadiff_cli.training.brain_mask.objective import MaskObjective, locating_objective
from cadiff_cli.training.brain_mask.patches import HeadDraws
from cadiff_cli.training.brain_mask.skull import SkullDraws, skull_objective
from cadiff_cli.training.loop import Objective
from cadiff_cli.training.session import UNTOLD, Identity, Session, check_held_out, new_net

log = logging.getLogger(__name__)

COARSE_STEPS = 700
"""Steps after which a new network locates a brain well enough to guide the one of its border."""


@dataclass(frozen=True)
class HeadsIdentity(Identity):
    """The heads of a run: numbers by source, held-out sources, and a digest of their content."""

    trained_on: Mapping[str, int]
    held_out: Sequence[str]
    head_files: str = UNTOLD


def train_mask(
    heads: dict[str, list[Head]],
    run: Path,
    config: HeadConfig,
    *,
    init: BrainModel | None = None,
    net_config: BrainConfig | None = None,
    hold_out: Sequence[str] = (),
    device: str = "auto",
    workers: int = 0,
    max_minutes: float = math.inf,
) -> Path:
    """Fit on all sources but those in ``hold_out``; returns the exported weights.

    ``init`` is a model to start from, which can locate brains already; no source that it was
    trained on can be held out.  ``run/held_out.tsv`` gets the Dice of every held-out head at 2 mm,
    once all steps are done.
    If ``net_config`` wants the inner skull, its network alone learns, on label maps: what ``init``
    says of the brain stays the same to the bit.
    """
    check_sources(heads, hold_out, init)
    check_settings(config, net_config, init)
    skull = bool(net_config and net_config.skull)
    drawn = [source for source in hold_out if any(h.image is None for h in heads[source])]
    if drawn:
        raise UsageError(
            f"--hold-out-source names {first_few(drawn)}: label maps have no image to be scored on",
            "hold out real heads",
        )
    # The order of folders must not decide which heads a resumed run draws.
    chosen = [h for source in sorted(heads) if source not in hold_out for h in heads[source]]
    if skull and any(h.held is None for h in chosen):
        raise UsageError("real heads do not tell the inner skull", "train it on --label-maps alone")
    settings = net_config or BrainConfig()
    if init:
        settings = net_config if net_config and skull else init.net.config
    sizes = [
        ("cube", config.cube, 2 * settings.skull_multiple if skull else settings.fine_multiple)
    ]
    if not skull:
        sizes.append(("patch", config.patch, settings.multiple))
    for key, size, multiple in sizes:
        if size < multiple or size % multiple:
            raise UsageError(f"{key} is {size}", f"use a multiple of {multiple}")
    net = new_net(BrainNet, settings, init, config.seed, device, begin=_begin)
    for name, weight in net.named_parameters():
        weight.requires_grad_(name.startswith("skull.") == skull)
    coarse_steps = _coarse_steps(config, init)
    config = replace(config, coarse_steps=coarse_steps)
    identity = HeadsIdentity(
        net=as_dict(net.config),
        init=init.sha256 if init else None,
        trained_on={s: len(g) for s, g in heads.items() if s not in hold_out},
        held_out=sorted(hold_out),
        head_files=fingerprint(sorted(content(head) for head in chosen)),
    )
    facts = {"seen_by_init": sorted(init.seen if init else ())}
    session = Session.open(run, net, config, identity, facts, max_minutes)
    parts: list[tuple[HeadConfig, Dataset[Any], Objective]] = []
    if skull:
        parts.append((config, SkullDraws(chosen, config), skull_objective))
    else:
        if coarse_steps:
            # The first network is trained first: the second one needs its output.
            more = coarse_steps < config.steps
            locating = replace(config, steps=coarse_steps, decay=1) if more else config
            parts.append((locating, HeadDraws(chosen, config, halved=True), locating_objective))
        parts.append((config, HeadDraws(chosen, config), MaskObjective(config.cube)))
    done = all(
        session.fit(dataset, objective, schedule=schedule, workers=workers)
        for schedule, dataset, objective in parts
    )
    path = session.export(BrainModel)
    if not done:  # out of time, or asked to stop
        return path
    rows = []
    for source in hold_out:
        for head in heads[source]:
            score = held_out_dice(session.state.ema, head)
            rows.append((source, head.name, f"{score:.4f}"))
            log.info("held out: %s %s Dice %.4f", source, head.name, score)
    write_tsv(run / "held_out.tsv", ("source", "head", "dice"), rows)
    return path


def _begin(net: BrainNet, other: BrainNet) -> None:
    """Copy weights; a network of the inner skull that ``other`` has not begins anew."""
    net.load_state_dict(net.state_dict() | other.state_dict())


def _coarse_steps(config: HeadConfig, init: BrainModel | None) -> int:
    """Steps in which only the first network learns; weights to start from can locate brains."""
    if config.coarse_steps is None:
        return 0 if init else COARSE_STEPS
    return config.coarse_steps


def check_settings(
    config: HeadConfig, net_config: BrainConfig | None, init: BrainModel | None
) -> None:
    """Raise ``UsageError`` for settings with which a network could not learn, or not go on."""
    skull = bool(net_config and net_config.skull)
    if skull and init is None:
        raise UsageError("the inner skull is learnt after the brain", "give --init brain-mask")
    if init and net_config:
        known = init.net.config
        wanted = replace(net_config, skull=known.skull)
        if not (skull and known.skull):
            wanted = replace(wanted, skull_channels=known.skull_channels)
        if wanted != known:
            raise UsageError(
                f"--init {init.name} is another network than the config's", "give [net] its sizes"
            )
    coarse_steps = _coarse_steps(config, init)
    if init is None and config.steps <= coarse_steps:
        raise UsageError(
            f"steps is {config.steps}, and in the first {coarse_steps} (coarse_steps) only"
            " the network that locates the brain learns",
            "give more --steps, or fewer coarse_steps",
        )


def check_sources(sources: Iterable[str], hold_out: Sequence[str], init: BrainModel | None) -> None:
    """Raise ``UsageError`` if ``hold_out`` names unknown sources, some of ``init``'s, or all."""
    check_held_out(set(sources), hold_out, init, option="--hold-out-source", one="source")


def held_out_dice(net: BrainNet, head: Head) -> float:
    """Dice of the predicted and the reference mask of a real head, at 2 mm."""
    assert head.image is not None
    distance = predict_distance(net, head.image.astype(np.float32) / 255)
    p, q = distance > 0, head.distance > 0
    return float(2 * (p & q).sum() / max(float(p.sum() + q.sum()), 1.0))
