"""The run of ``cadiff atlas train``: fit, export, compare on the people left out."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cadiff_cli.config import as_dict, fingerprint
from cadiff_cli.errors import DataError, UsageError
from cadiff_cli.io.files import write_tsv
from cadiff_cli.nets.atlas import AUTOENCODER, LINEAR, AtlasNet, LinearLatent
from cadiff_cli.nets.condition import ConditionSpace
from cadiff_cli.nets.models import AtlasModel
from cadiff_cli.products import Template
from cadiff_cli.spatial.deformation import exponential
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import resample
from cadiff_cli.training.atlas.config import Training
from cadiff_cli.training.atlas.data import (
    STRUCTURES,
    PreparedPerson,
    brain_mask,
    held_out,
    known_to,
)
from cadiff_cli.training.atlas.draws import PeopleDraws
from cadiff_cli.training.atlas.losses import mean_square
from cadiff_cli.training.atlas.objective import AtlasObjective, AutoencoderObjective
from cadiff_cli.training.atlas.regression import KernelRegression, Source, sources_of
from cadiff_cli.training.atlas.volumes import BaseVolumes
from cadiff_cli.training.session import Identity, Session, new_net

log = logging.getLogger(__name__)

FEWEST = 8
"""People without whom nothing can be learnt of a condition."""


@dataclass(frozen=True)
class PeopleIdentity(Identity):
    """The people of a run, those left out, a digest of all, and the base with its content."""

    trained_on: Sequence[str]
    held_out: Sequence[str]
    people_files: str
    base: str
    base_sha256: str


def train_atlas(
    people: Sequence[PreparedPerson],
    base: Template,
    grid: Grid,
    run: Path,
    training: Training,
    *,
    device: str = "auto",
    workers: int = 0,
    max_minutes: float = math.inf,
) -> Path:
    """Fit on all people but a share; returns the exported weights.

    ``base`` carries labels, which the weights keep; ``grid`` is that of the people's velocities.
    ``run/held_out.tsv`` gets the distance from the base, from kernel regression and from the atlas
    to each person left out.  Raises ``DataError`` for too few people.
    """
    check_steps(training)
    config = training.train
    # The order of folders must not decide whose latents are whose.
    people = sorted(people, key=lambda person: person.label)
    if len(people) < FEWEST:
        raise DataError(
            f"{len(people)} people can be learnt from",
            f"give {FEWEST} or more; warnings above name those who were left out",
        )
    out = held_out(people, config.hold_out, config.leave_out)
    learnt = [p for p in people if p.label not in out]
    if len(learnt) < FEWEST:
        raise DataError(
            f"{len(learnt)} people remain to learn from", f"give {FEWEST} or more to learn from"
        )
    space = ConditionSpace.of([p.condition for p in learnt])
    regression = KernelRegression.of(learnt, space)
    linear = training.net.latent == LINEAR
    centred = len(learnt) if config.centred and linear else 0
    settings = replace(training.net, shape=grid.shape, people=centred)
    net = new_net(AtlasNet, settings, None, config.seed, device)
    if isinstance(net.latent, LinearLatent):
        velocities = torch.from_numpy(np.stack([p.velocity_mm for p in learnt])).float()
        velocities = velocities.to(net.latent.mean.device)
        followed = torch.from_numpy(np.stack([p.log_shares for p in learnt]))
        net.latent.fit(velocities, followed.to(velocities))
        if net.centre is not None:
            conditions = torch.from_numpy(regression.conditions)
            net.centre.fit(conditions, net.latent.encode(velocities), regression.widths)
    identity = PeopleIdentity(
        net=as_dict(net.config),
        init=None,
        trained_on=sorted(p.label for p in learnt),
        held_out=sorted(out),
        people_files=fingerprint(sorted([p.label, p.key, as_dict(p.condition)] for p in people)),
        base=base.name,
        base_sha256=base.sha256,
    )
    facts = {"people": Counter(p.source for p in learnt)}
    session = Session.open(run, net, config, identity, facts, max_minutes)
    zooms = grid.spacing_mm.tolist()
    draws = PeopleDraws(learnt, regression, zooms, config)
    brain = torch.from_numpy(brain_weight(base, grid))
    volumes = BaseVolumes.of(base, list(STRUCTURES.values()), grid)
    objective = AtlasObjective(config, brain, volumes, zooms)
    done = True
    if training.net.latent == AUTOENCODER and config.autoencoder_steps:
        first = replace(config, steps=min(config.autoencoder_steps, config.steps), decay=1)
        alone = AutoencoderObjective(config, brain)
        done = session.fit(draws, alone, schedule=first, workers=workers)
    done = done and session.fit(draws, objective, workers=workers)
    parts: dict[str, Any] = {"base": base.name, "grid": grid, "space": space, "labels": base.labels}
    path = session.export(AtlasModel, **parts)
    if not done:  # out of time, or asked to stop
        return path
    model = AtlasModel(session.state.ema.cpu().eval(), **parts)
    left_out = known_to(space, [p for p in people if p.label in out])
    _compare(left_out, sources_of(model, regression), brain, grid, run)
    return path


def check_steps(training: Training) -> None:
    """Raise ``UsageError`` if the steps end before the diffusion network learns."""
    config = training.train
    if training.net.latent == AUTOENCODER and config.steps <= config.autoencoder_steps:
        raise UsageError(
            f"steps is {config.steps}, and in the first {config.autoencoder_steps}"
            " (autoencoder_steps) only the autoencoder learns",
            "give more --steps, or fewer autoencoder_steps",
        )


def distances_mm(
    person: PreparedPerson, sources: Mapping[str, Source], brain: torch.Tensor, grid: Grid
) -> list[float]:
    """For each source, the root mean square distance in mm to the person's shape."""
    own = displacement(person.velocity_mm, grid)
    gaps = (displacement(make(person.condition), grid) - own for make in sources.values())
    return [float(mean_square(gap[None], brain).sqrt()) for gap in gaps]


def _compare(
    people: Sequence[PreparedPerson],
    sources: Mapping[str, Source],
    brain: torch.Tensor,
    grid: Grid,
    run: Path,
) -> None:
    """Write and log how far the sources are from people left out."""
    found = [distances_mm(person, sources, brain, grid) for person in people]
    rows = (
        (p.label, p.age_years, *(round(mm, 4) for mm in each))
        for p, each in zip(people, found, strict=True)
    )
    write_tsv(run / "held_out.tsv", ("person", "age", *sources), rows)
    for name, values in zip(sources, zip(*found, strict=True), strict=False):
        log.info("%s: %.3f mm from %d people left out", name, np.mean(values), len(values))


def displacement(velocity_mm: np.ndarray, grid: Grid) -> torch.Tensor:
    """(3, X, Y, Z) float32 in mm: the exponential of a velocity."""
    velocity = torch.from_numpy(velocity_mm.astype(np.float32))[None]
    return exponential(velocity, grid.spacing_mm.tolist())[0]


def brain_weight(base: Template, grid: Grid) -> np.ndarray:
    """(X, Y, Z) float32: 1 in the base brain, 0 outside, on the velocity grid."""
    share = resample(Volume(brain_mask(base).astype(np.float32), base.brain.grid), grid)
    return (share.data > 0.5).astype(np.float32)
