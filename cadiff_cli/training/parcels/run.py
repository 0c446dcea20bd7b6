"""``cadiff train-parcels`` as one function: count the prior, fit, export.  Resumes by itself."""

import logging
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cadiff_cli.config import as_dict, fingerprint
from cadiff_cli.errors import UsageError
from cadiff_cli.io.files import write_tsv
from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.nets.models import ParcelModel
from cadiff_cli.nets.parcels import ParcelConfig, ParcelNet
from cadiff_cli.stages.parcels import left_parcels, probabilities
from cadiff_cli.training.parcels.config import ParcelTrainConfig
from cadiff_cli.training.parcels.data import Labelled, hemispheres
from cadiff_cli.training.parcels.objective import ParcelObjective
from cadiff_cli.training.parcels.patches import HemisphereDraws
from cadiff_cli.training.parcels.prior import counted, log_prior, spread
from cadiff_cli.training.segmenter.data import Sample, identity
from cadiff_cli.training.session import Identity, Session, check_held_out, new_net

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParcelIdentity(Identity):
    """The scans of a run: people, templates, fingerprints of labels and of files."""

    trained_on: Sequence[str]
    templates: Sequence[str]
    labels: Sequence[str]
    parcellation: str
    template_contents: Mapping[str, str]
    scan_files: str


def train_parcels(
    samples: Sequence[Sample],
    run: Path,
    config: ParcelTrainConfig,
    parcellation: Parcellation,
    *,
    init: ParcelModel | None = None,
    net_config: ParcelConfig | None = None,
    hold_out: Sequence[str] = (),
    device: str = "auto",
    workers: int = 0,
    max_minutes: float = math.inf,
) -> Path:
    """Fit on every subject not in ``hold_out``; returns the exported weights (the EMA's).

    ``samples`` have classes of ``parcellation``.  ``init`` is a model to begin with; nobody it was
    trained on can be held out, and the prior is counted anew.  At the end ``run/held_out.tsv`` gets
    the mean Dice of the parcels of every hemisphere that was held out, inside its true cortex.
    """
    check_people({s.subject for s in samples}, hold_out, init, parcellation)
    chosen = [s for s in samples if s.subject not in set(hold_out)]
    n = len(left_parcels(parcellation))
    sizes = replace(net_config or (init.net.config if init else ParcelConfig()), n_parcels=n)
    if init and replace(sizes, dropout=init.net.config.dropout) != init.net.config:
        raise UsageError(
            f"--init {init.name} is another network than the config's", "give [net] its sizes"
        )
    net = new_net(ParcelNet, sizes, init, config.seed, device)
    told = ParcelIdentity(
        net=as_dict(net.config),
        init=init.sha256 if init else None,
        trained_on=sorted({s.subject for s in chosen}),
        templates=sorted({name for s in samples for name in s.fields}),
        labels=sorted({s.labels for s in samples}),
        parcellation=identity(parcellation),
        template_contents=dict(pair for s in samples for pair in s.contents.items()),
        scan_files=fingerprint(sorted(s.key for s in chosen)),
    )
    facts = {"held_out": sorted(hold_out), "seen_by_init": sorted(init.seen if init else ())}
    session = Session.open(run, net, config, told, facts, max_minutes)
    draws = HemisphereDraws(hemispheres(chosen, parcellation), config)
    votes = {
        person: spread(
            counted(
                (one for one in draws.hemispheres if one.subject == person), n, sizes.prior_shape
            )
        )
        for person in draws.people
    }
    total = np.sum(list(votes.values()), axis=0)
    for model in (session.state.net, session.state.ema):
        model.prior.copy_(log_prior(total))
    alone = len(votes) == 1
    priors = [log_prior(total if alone else total - votes[p]).half() for p in draws.people]
    done = session.fit(draws, ParcelObjective(priors, config.dice_weight), workers=workers)
    path = session.export(ParcelModel, parcellation=parcellation)
    if not done:
        return path  # out of time, or asked to stop
    held = [s for s in samples if s.subject in set(hold_out)]
    rows = []
    for sample in held:
        for side, one in zip(("left", "right"), hemispheres([sample], parcellation), strict=True):
            score = held_out_dice(session.state.ema, one)
            rows.append((sample.name, side, f"{score:.4f}"))
            log.info("held out: %s %s Dice %.4f", sample.name, side, score)
    write_tsv(run / "held_out.tsv", ("scan", "hemisphere", "dice"), rows)
    return path


def check_people(
    people: Set[str], hold_out: Sequence[str], init: ParcelModel | None, parcellation: Parcellation
) -> None:
    """Raise ``UsageError`` unless these subjects can be trained on, and held out, as asked for."""
    check_held_out(people, hold_out, init)
    if init and init.parcellation != parcellation:
        raise UsageError(
            f"--init names the parcels of {init.parcellation.name}, the config {parcellation.name}",
            "use weights of this parcellation, or begin anew",
        )
    if not left_parcels(parcellation):
        raise UsageError(
            f"{parcellation.name} has no parcels of the cortex",
            "give one whose column parent names it",
        )


def held_out_dice(net: ParcelNet, one: Labelled) -> float:
    """Mean Dice of the parcels of a hemisphere, inside its true cortex."""
    voxels = one.cortex
    truth = one.parcels[tuple(voxels.T)].astype(np.int64)
    device = next(net.parameters()).device
    was_training = net.training
    net.eval()
    p = probabilities(net, one.seen, voxels + one.seen.start, torch.device(device))
    net.train(was_training)
    drawn = p.argmax(axis=1)
    sizes, found = (np.bincount(x, minlength=p.shape[1]) for x in (truth, drawn))
    both = np.bincount(truth[truth == drawn], minlength=p.shape[1])
    there = sizes > 0
    return float(np.mean(2 * both[there] / (sizes + found)[there]))
