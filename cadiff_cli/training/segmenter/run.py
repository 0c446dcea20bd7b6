"""``cadiff train`` as one function: count the prior, fit, export.  Resumes by itself."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cadiff_cli.config import SampleConfig, as_dict, fingerprint
from cadiff_cli.errors import UsageError, first_few
from cadiff_cli.labels.parcellation import BASE, Parcellation, load_parcellation
from cadiff_cli.nets.models import Model
from cadiff_cli.nets.segmenter import CADiffNet, NetConfig
from cadiff_cli.training.monitor import RunMonitor
from cadiff_cli.training.segmenter.config import TrainConfig
from cadiff_cli.training.segmenter.data import Sample, identity, structures
from cadiff_cli.training.segmenter.patches import Draws
from cadiff_cli.training.segmenter.prior import count_prior
from cadiff_cli.training.session import (
    UNTOLD,
    Identity,
    Session,
    check_held_out,
    finished,
    new_net,
)


@dataclass(frozen=True)
class ScansIdentity(Identity):
    """The scans of a run: people, templates, fingerprints of labels and of files.

    ``also_*`` are those whose labels are trusted less.  ``template_contents`` maps templates that
    are not shipped to their SHA-256.
    """

    trained_on: Sequence[str]
    also_on: Sequence[str]
    templates: Sequence[str]
    labels: Sequence[str]
    also_labels: Sequence[str]
    parcellation: str = BASE
    template_contents: Mapping[str, str] | str = UNTOLD
    recount_prior: bool = False
    scan_files: str = UNTOLD
    also_files: str = UNTOLD


def train(
    samples: Sequence[Sample],
    run: Path,
    config: TrainConfig,
    *,
    parcellation: Parcellation | None = None,
    also: Sequence[Sample] = (),
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

    ``parcellation`` is that of the samples' classes (None: ``BASE``).  ``also`` are scans with
    labels that are trusted less: a share of the patches comes from them (``config.also_share``),
    and the prior is not counted over them.  ``init`` is a model to begin with; nobody it was
    trained on can be held out.  Its prior stays, unless ``recount_prior`` asks for that of these
    subjects.

    ``run/checkpoint.pt`` is continued when it is there.  ``run/config.json`` says what was run,
    ``run/validation.tsv`` how the held-out scans fared on the way.
    """
    parcellation = parcellation or load_parcellation(BASE)
    # The order of folders must not decide which patches a resumed run draws.
    samples, also = (sorted(group, key=lambda s: (s.name, s.key)) for group in (samples, also))
    people, others = ({s.subject for s in group} for group in (samples, also))
    check_people(people, others, hold_out, init, net_config, parcellation)
    chosen = [s for s in samples if s.subject not in set(hold_out)]
    trusted_less = [s for s in also if s.subject not in set(hold_out)]
    if config.head_only and (init is None or recount_prior):
        raise UsageError(
            "head_only trains a head on the trunk and the prior of other weights",
            "give --init, and leave out --recount-prior",
        )
    fresh = NetConfig(n_classes=parcellation.n_classes)
    sizes = net_config or (None if init else fresh)
    net = new_net(CADiffNet, sizes, init, config.seed, device, CADiffNet.begin_with)
    if config.head_only:
        net.requires_grad_(False)
        for weights in net.head_parameters().values():
            weights.requires_grad_(True)
    if recount_prior and not (net.config.reads_field and config.prior_scans != 0):
        raise UsageError("--recount-prior: this config counts no prior", "leave it out")
    told = ScansIdentity(
        net=as_dict(net.config),
        init=init.sha256 if init else None,
        trained_on=sorted({s.subject for s in chosen}),
        also_on=sorted({s.subject for s in trusted_less}),
        templates=sorted({name for s in (*samples, *also) for name in s.fields}),
        labels=sorted({s.labels for s in samples}),
        also_labels=sorted({s.labels for s in also}),
        parcellation=identity(parcellation),
        template_contents=dict(pair for s in (*samples, *also) for pair in s.contents.items()),
        recount_prior=recount_prior,
        scan_files=fingerprint(sorted(s.key for s in chosen)),
        also_files=fingerprint(sorted(s.key for s in trusted_less)),
    )
    if ended := finished(run, Model, told, config, net.config):
        return ended
    facts = {
        "seen_by_init": sorted(init.seen if init else ()),
        "held_out": sorted(hold_out),
        "structures": sorted(
            structures((*chosen, *trusted_less), parcellation)
            | (init.structures if init else set())
        ),
    }
    session = Session.open(run, net, config, told, facts, max_minutes)
    if net.config.reads_field and not session.resumed and (recount_prior or not init):
        order = np.random.default_rng(config.seed).permutation(len(chosen))
        if voters := [chosen[i] for i in order[: config.prior_scans]]:
            prior = count_prior(voters, parcellation, net.config.prior_shape)
            for model in (session.state.net, session.state.ema):
                model.prior.logits.copy_(prior)
    held_out = [s for s in (*samples, *also) if s.subject in set(hold_out)]
    sampling = SampleConfig(flip=False)
    monitor = RunMonitor(
        run, held_out, parcellation, validate_minutes, sampling, device, config.spad
    )
    mirror = torch.from_numpy(parcellation.mirror_classes)
    draws = Draws(
        chosen,
        config.patch,
        mirror,
        config.augment,
        config.seed,
        also=trusted_less,
        also_share=config.also_share,
    )
    session.fit(draws, config.minimised, workers=workers, monitor=monitor)
    monitor.close()
    return session.export(Model, parcellation=parcellation)


def check_people(
    people: Set[str],
    others: Set[str],
    hold_out: Sequence[str],
    init: Model | None,
    net_config: NetConfig | None,
    parcellation: Parcellation,
) -> None:
    """Raise ``UsageError`` unless these subjects can be trained on, and held out, as asked for.

    ``others`` are those of datasets that are trusted less.
    """
    check_held_out(people, hold_out, init, others)
    if both := sorted(people & others):
        raise UsageError(
            f"subjects of two datasets have the same label: {first_few(both)}",
            "rename those of one of them",
        )
    if init and init.parcellation != parcellation:
        raise UsageError(
            f"--init {init.name} draws the parcellation {init.parcellation.name}, and the config"
            f" names {parcellation.name}, another table",
            "give --parcellation that of the weights, or begin anew",
        )
    if init and net_config and net_config.trunk != init.net.config.trunk:
        raise UsageError(
            f"--init {init.name} is another network than the config's",
            "use a config of its network; only the head and label_scale may differ",
        )
