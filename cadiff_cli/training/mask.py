"""``cadiff train-mask`` as one function: prepare heads, fit, score the held-out ones, export."""

import logging
import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cadiff_cli.config import as_dict, fingerprint
from cadiff_cli.device import usable_device
from cadiff_cli.errors import DataError, MissingInputError, UsageError
from cadiff_cli.io import models
from cadiff_cli.io.files import sha256, write_json, write_tsv
from cadiff_cli.io.formats import check_there, stem
from cadiff_cli.io.images import load_scan, load_volume
from cadiff_cli.io.label_maps import load_ids
from cadiff_cli.nets.brain import BrainConfig, BrainNet
from cadiff_cli.nets.models import BrainModel
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.spatial.resample import check_same_grid
from cadiff_cli.stages.brain import predict_distance
from cadiff_cli.training.heads import (
    Head,
    HeadConfig,
    MaskObjective,
    content,
    from_labels,
    from_scan,
    head_loader,
    is_brain,
    load_head,
    save_head,
)
from cadiff_cli.training.loop import fit, load_checkpoint, new_state, refuse_other_run

log = logging.getLogger(__name__)

HEAD_FORMAT = 2
"""Counts changes of how heads are prepared: older files are prepared again."""


def prepare_heads(
    label_maps: Sequence[Path], datasets: Sequence[Path], cache: Path
) -> dict[str, list[Head]]:
    """Heads by source (a folder's name), each prepared once and kept in ``cache``.

    ``label_maps`` are folders of whole-head label maps; ``datasets`` are BIDS-like folders of heads
    with a brain ``mask`` (taken as it is) or a ``dseg`` of the brain (closed).
    """
    cache.mkdir(parents=True, exist_ok=True)
    heads: dict[str, list[Head]] = {}
    for folder in (*label_maps, *datasets):
        if not folder.is_dir():
            raise MissingInputError(f"no folder {folder}", "check the path")
        kind = "[!.]*.nii*" if folder in label_maps else "sub-*/**/[!.]*_T1w.nii*"
        images = sorted(folder.glob(kind))
        if folder.name in heads:
            raise UsageError(f"two folders are called {folder.name!r}", "rename one")
        found = heads[folder.name] = []
        for path in images:
            brain = path if folder in label_maps else brain_of(path)
            for needed in (path, brain):
                check_there(needed)
            key = fingerprint([HEAD_FORMAT, *(sha256(p) for p in (path, brain))])
            kept = cache / f"{folder.name}_{stem(path)}_{key}.npz"
            if not kept.exists():
                try:
                    if folder in label_maps:
                        head = from_labels(stem(path), folder.name, load_ids(path)[0])
                    else:
                        head = _real_head(path, brain, folder.name)
                except DataError as error:
                    raise DataError(f"{path.name}: {error.message}", error.remedy) from error
                save_head(kept, head)
            found.append(load_head(kept))
        if not found:
            raise DataError(f"{folder} holds no heads", "see cadiff train-mask --help")
        log.info("%d heads of %s", len(found), folder.name)
    return heads


def brain_of(t1: Path) -> Path:
    """The mask beside a head, else its dseg: of this scan, not of another run."""
    scan = re.escape(t1.name.split("_T1w")[0])
    # A mask of a lesion or of grey matter is none of the brain.
    for suffix, entities in (
        ("mask", "(_(desc|label)-brain)?"),
        ("dseg", r"(_(atlas|desc|label|seg)-\w+)*"),
    ):
        name = re.compile(rf"{scan}{entities}_{suffix}\.nii(\.gz)?", re.ASCII)
        brains = sorted(path for path in t1.parent.iterdir() if name.fullmatch(path.name))
        if len(brains) > 1:
            names = ", ".join(path.name for path in brains)
            raise DataError(f"{t1.name} has {len(brains)} brains: {names}", "leave one of them")
        if brains:
            return brains[0]
    raise DataError(
        f"{t1} has neither brain mask nor dseg beside it",
        "add a mask, desc-brain_mask, label-brain_mask or dseg, or remove the scan",
    )


def _real_head(t1: Path, brain: Path, source: str) -> Head:
    ends_at_cortex = "_dseg." in brain.name
    name = t1.name.split("_T1w")[0]
    image, inside = load_scan(t1).t1, load_volume(brain)
    check_same_grid(brain.name, inside.grid, t1.name, image.grid)
    if ends_at_cortex:
        inside = Volume(is_brain(inside.data), inside.grid)
    return from_scan(name, source, image, inside, close=ends_at_cortex)


def train_mask(
    heads: dict[str, list[Head]],
    run: Path,
    config: HeadConfig,
    *,
    init: BrainModel | None = None,
    hold_out: Sequence[str] = (),
    device: str = "auto",
    workers: int = 0,
    max_minutes: float = math.inf,
) -> Path:
    """Fit on all sources but those in ``hold_out``; returns the exported weights.

    ``init`` is a model to begin with, which locates brains already; no source that it was trained
    on can be held out.
    ``run/held_out.tsv`` gets the Dice (at 2 mm) of every held-out head.
    """
    check_sources(heads, hold_out, init)
    drawn = [source for source in hold_out if any(h.image is None for h in heads[source])]
    if drawn:
        raise UsageError(
            f"--hold-out-source names {drawn}: label maps have no image to be scored on",
            "hold out real heads",
        )
    chosen = [h for source, group in heads.items() if source not in hold_out for h in group]
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    net = BrainNet(init.net.config if init else BrainConfig())
    if init:
        net.load_state_dict(init.net.state_dict())
        config = replace(config, coarse_steps=0)
    net.to(usable_device(device)[0])
    state = new_state(net, config)
    checkpoint = run / "checkpoint.pt"
    described: dict[str, Any] = {
        "train": as_dict(config),
        "fingerprint": fingerprint(as_dict(config)),
        "net": as_dict(net.config),
        "trained_on": {s: len(g) for s, g in heads.items() if s not in hold_out},
        "head_files": fingerprint(sorted(content(head) for head in chosen)),
        "init": init.sha256 if init else None,
        "seen_by_init": sorted(init.seen if init else ()),
        "held_out": sorted(hold_out),
    }
    if checkpoint.exists():
        kept = ("trained_on", "head_files", "held_out", "init", "net")
        refuse_other_run(run / "config.json", described, kept)
        load_checkpoint(checkpoint, state, config)
        log.info("continuing at step %d", state.step)
    write_json(run / "config.json", described)
    ends = time.monotonic() + 60 * max_minutes
    # What refines learns from what locates, so that goes first.
    locating = replace(config, steps=min(config.coarse_steps, config.steps), decay=1)
    for phase, objective in ((locating, MaskObjective(fine=0)), (config, MaskObjective())):
        loader = head_loader(chosen, phase, state.step, workers, state.device)
        left = (ends - time.monotonic()) / 60
        if not fit(state, loader, objective, phase, checkpoint, max_minutes=left):
            break  # out of time, or asked to stop
    if state.step < config.steps:
        log.warning("stopped at step %d of %d: the same command goes on", state.step, config.steps)
    path = run / "model.safetensors"
    described |= {"steps": state.step, "hours": round(state.seconds / 3600, 2)}
    models.save(path, BrainModel(state.ema, training=described))
    rows = []
    for source in hold_out:
        for head in heads[source]:
            score = held_out_dice(state.ema, head)
            rows.append((source, head.name, f"{score:.4f}"))
            log.info("held out: %s %s Dice %.4f", source, head.name, score)
    write_tsv(run / "held_out.tsv", ("source", "head", "dice"), rows)
    return path


def check_sources(sources: Iterable[str], hold_out: Sequence[str], init: BrainModel | None) -> None:
    """Raise ``UsageError`` unless these sources can be trained on, and held out, as asked for."""
    there, held = set(sources), set(hold_out)
    if unknown := sorted(held - there):
        raise UsageError(f"--hold-out-source names {unknown}", f"there are {sorted(there)}")
    if init and (seen := sorted(init.seen & held)):
        raise UsageError(
            f"--hold-out-source {seen}: --init was trained on some of it",
            "hold out others, or begin anew",
        )
    if not there - held:
        raise UsageError("every source is held out", "leave one to train on")


def held_out_dice(net: BrainNet, head: Head) -> float:
    """Dice of the predicted and the wanted mask of a real head, at 2 mm."""
    assert head.image is not None
    distance = predict_distance(net, head.image.astype(np.float32) / 255)
    p, q = distance > 0, head.distance > 0
    return float(2 * (p & q).sum() / max(float(p.sum() + q.sum()), 1.0))
