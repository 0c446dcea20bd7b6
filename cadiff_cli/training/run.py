"""``cadiff train`` as one function: prepare, count the prior, fit, export.  Resumes by itself."""

import logging
import math
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cadiff_cli.config import SampleConfig, as_dict, fingerprint
from cadiff_cli.device import usable_device
from cadiff_cli.errors import DataError, UsageError
from cadiff_cli.io import models
from cadiff_cli.io.bids.labelled import LabelledScan
from cadiff_cli.io.files import write_json
from cadiff_cli.labels.parcellation import BASE, Parcellation, load_parcellation
from cadiff_cli.nets.models import Model
from cadiff_cli.nets.unet import CADiffNet, NetConfig
from cadiff_cli.training import cache
from cadiff_cli.training.atlas import load_atlas
from cadiff_cli.training.loop import fit, load_checkpoint, new_state, refuse_other_run
from cadiff_cli.training.monitor import RunMonitor
from cadiff_cli.training.prior import count_prior
from cadiff_cli.training.recipe import TrainConfig, patch_loader

log = logging.getLogger(__name__)

SAME = (
    "trained_on",
    "also_on",
    "init",
    "recount_prior",
    "templates",
    "labels",
    "also_labels",
    "scan_files",
    "also_files",
    "net",
)
"""What a run that goes on must share with its checkpoint, beside the settings."""


def prepare(
    scans: Sequence[LabelledScan], mapping: dict[int, int], templates: Sequence[str], folder: Path
) -> list[cache.Sample]:
    """Prepare every scan once (kept in ``folder``) and load them all."""
    parcellation = load_parcellation(BASE)
    for name in templates:  # whatever is wrong with one is said before the first scan
        load_atlas(name)
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for index, scan in enumerate(scans, start=1):
        log.info("preparing %s, %d of %d", scan.name, index, len(scans))
        try:
            samples.append(cache.load(cache.build(scan, templates, parcellation, mapping, folder)))
        except DataError as error:
            raise DataError(f"{scan.name}: {error.message}", error.remedy) from error
    return samples


def train(
    samples: Sequence[cache.Sample],
    run: Path,
    config: TrainConfig,
    *,
    also: Sequence[cache.Sample] = (),
    init: Model | None = None,
    recount_prior: bool = False,
    hold_out: Sequence[str] = (),
    net_config: NetConfig | None = None,
    device: str = "auto",
    workers: int = 0,
    validate_minutes: float = 15.0,
    max_minutes: float = math.inf,
) -> Path:
    """Fit on every subject not in ``hold_out``; returns the exported weights (the EMA's).

    ``also`` are scans with labels that are trusted less: a share of the patches comes from them
    (``config.also_share``), and the prior is not counted over them.  ``init`` is a model to begin
    with; nobody it was trained on can be held out.  Its prior stays, unless ``recount_prior`` asks
    for that of these subjects.
    ``run/checkpoint.pt`` is continued when it is there.  ``run/config.json`` says what was run,
    ``run/validation.tsv`` how the held-out scans fared on the way.
    """
    parcellation = load_parcellation(BASE)
    people, others = ({s.subject for s in group} for group in (samples, also))
    check_people(people, others, hold_out, init, net_config)
    chosen = [s for s in samples if s.subject not in set(hold_out)]
    trusted_less = [s for s in also if s.subject not in set(hold_out)]
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    net = CADiffNet(init.net.config if init else net_config or NetConfig())
    if recount_prior and not (net.config.reads_field and config.prior_scans != 0):
        raise UsageError("--recount-prior: this method counts no prior", "leave it out")
    if init:
        net.load_state_dict(init.net.state_dict())
    net.to(usable_device(device)[0])
    state = new_state(net, config)
    checkpoint = run / "checkpoint.pt"
    described: dict[str, Any] = {
        "train": as_dict(config),
        "fingerprint": fingerprint(as_dict(config)),
        "net": as_dict(net.config),
        "trained_on": sorted({s.subject for s in chosen}),
        "also_on": sorted({s.subject for s in trusted_less}),
        "init": init.sha256 if init else None,
        "recount_prior": recount_prior,
        "seen_by_init": sorted(init.seen if init else ()),
        "held_out": sorted(hold_out),
        "templates": sorted({name for s in (*samples, *also) for name in s.fields}),
        "labels": sorted({s.labels for s in samples}),
        "structures": sorted(
            structures((*chosen, *trusted_less), parcellation)
            | (init.structures if init else set())
        ),
        "also_labels": sorted({s.labels for s in also}),
        "scan_files": fingerprint(sorted(s.key for s in chosen)),
        "also_files": fingerprint(sorted(s.key for s in trusted_less)),
    }
    if checkpoint.exists():
        refuse_other_run(run / "config.json", described, SAME)
        load_checkpoint(checkpoint, state, config)
        log.info("continuing at step %d", state.step)
    elif net.config.reads_field and (recount_prior or not init):
        order = np.random.default_rng(config.seed).permutation(len(chosen))
        if voters := [chosen[i] for i in order[: config.prior_scans]]:
            prior = count_prior(voters, parcellation, net.config.prior_shape)
            for model in (state.net, state.ema):
                model.prior.logits.copy_(prior)
    write_json(run / "config.json", described)
    mirror = torch.from_numpy(parcellation.mirror_classes)
    held_out = [s for s in (*samples, *also) if s.subject in set(hold_out)]
    sampling = SampleConfig(flip=False, device=device)
    monitor = RunMonitor(run, held_out, parcellation, validate_minutes, sampling)
    patches = patch_loader(chosen, mirror, config, state.step, workers, state.device, trusted_less)
    fit(
        state,
        patches,
        config.objective,
        config,
        checkpoint,
        monitor=monitor,
        max_minutes=max_minutes,
    )
    monitor.close()
    if state.step < config.steps:
        log.warning("stopped at step %d of %d: the same command goes on", state.step, config.steps)
    path = run / "model.safetensors"
    described |= {"steps": state.step, "hours": round(state.seconds / 3600, 2)}
    models.save(path, Model(state.ema, training=described, parcellation=parcellation))
    log.info("wrote %s after %d steps", path, state.step)
    return path


def structures(samples: Sequence[cache.Sample], parcellation: Parcellation) -> set[int]:
    """Codes that the samples' labels hold: of others a network learns that they are nowhere."""
    present = np.zeros(parcellation.n_classes, dtype=bool)
    for sample in samples:
        present |= np.bincount(sample.classes.ravel(), minlength=parcellation.n_classes) > 0
    return set(parcellation.codes[1:][present[1:]].tolist())


def check_people(
    people: Set[str],
    others: Set[str],
    hold_out: Sequence[str],
    init: Model | None,
    net_config: NetConfig | None,
) -> None:
    """Raise ``UsageError`` unless these subjects can be trained on, and held out, as asked for.

    ``others`` are those of datasets that are trusted less.
    """
    held = set(hold_out)
    if missing := sorted(held - people - others):
        raise UsageError(f"--hold-out names {missing}", f"there are {sorted(people | others)}")
    if both := sorted(people & others):
        raise UsageError(f"{both} are subjects of two datasets", "rename those of one of them")
    if init and (seen := sorted(init.seen & held)):
        raise UsageError(
            f"--hold-out {seen} were among the people of --init", "hold out others, or begin anew"
        )
    if init and net_config not in (None, init.net.config):
        raise UsageError(
            f"--init {init.name} is another network than the --method's",
            "use the method that it was trained by",
        )
    if not people - held:
        raise UsageError("every subject is held out", "leave some to train on")
