"""The ablation: networks at equal budgets, scored on people whom they never saw.

The tables of the CA-Diff paper, and ours for what was added to it.  A row names a config; rows that
need the same network share it.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cadiff_cli.config import SampleConfig, fingerprint
from cadiff_cli.errors import UsageError
from cadiff_cli.evaluation.scores import Score
from cadiff_cli.evaluation.tables import read_scores, write_scores
from cadiff_cli.io.templates import EMBEDDED, PREFERRED
from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.nets.models import Model
from cadiff_cli.training.crossval import fitted, score_sample
from cadiff_cli.training.segmenter.config import Training
from cadiff_cli.training.segmenter.data import Sample
from cadiff_cli.training.session import refuse_other_budget

log = logging.getLogger(__name__)

PERSON = "person"
"""A template that is one of the people trained on, drawn by the seed (the paper's "sample")."""
MEASURES = ("dice", "nsd", "hd95_mm")
DATASET, ALSO = "dataset", "also"
"""What a score's reference is: labels of the dataset, or of those that are trusted less."""


@dataclass(frozen=True)
class Row:
    """A row: a shipped config, with a template of its own or that of all rows.

    ``paper`` is the paper's Dice and NSD on MALC, in per cent, where our copy of it is legible.
    """

    title: str
    config: str
    paper: tuple[float, float] | None = None
    template: str = ""


@dataclass(frozen=True)
class Table:
    """Rows to compare, each with ``steps`` sampling steps (five in the paper)."""

    title: str
    rows: tuple[Row, ...]
    steps: tuple[int, ...] = (5,)


DIFFUSION = Row("Diffusion", "diffusion", (88.72, 92.23))
COLLABORATIVE = Row("Collaborative diffusion", "collaborative", (89.62, 93.34))
CA_DIFF = (90.63, 94.32)
TABLES: Mapping[str, Table] = {
    "II": Table(
        "Framework design",
        (
            DIFFUSION,
            COLLABORATIVE,
            Row("+ consistency loss", "consistency", (90.19, 93.79)),
            Row("+ TACA", "taca", CA_DIFF),
        ),
    ),
    "III": Table("Fusion", (DIFFUSION, Row("Dual condition", "dual"), COLLABORATIVE)),
    # The paper's networks have TACA too; ours differ in the similarity alone, without it.
    "IV": Table(
        "Similarity measure",
        (
            Row("Dice", "consistency-dice", (90.40, 94.17)),
            Row("Cosine", "consistency", CA_DIFF),
        ),
    ),
    "V": Table(
        "Condition",
        (
            Row("Label", "label"),
            Row("Distance field, always known", "dual"),
            Row("Distance field", "collaborative", (89.62, 93.34)),
        ),
    ),
    "VI": Table(
        "Template",
        (
            Row("Sample", "taca", (90.26, 94.09), PERSON),
            Row("MNI152", "taca", (90.42, 94.13), EMBEDDED),
            Row("Colin27", "taca", CA_DIFF, PREFERRED),
        ),
    ),
    "4": Table("Sampling steps", (Row("CA-Diff", "taca"),), tuple(range(1, 11))),
    "SPAD": Table(
        "Parts of SPAD, and what progress is",
        (
            Row("Baseline", "cadiff"),
            Row("ScD", "spad-targets"),
            Row("BcD", "spad-borders"),
            Row("ScD and BcD", "spad"),
            Row("ScD and BcD, by diffusion time", "spad-time"),
        ),
    ),
    "states": Table(
        "Size of label states", (Row("1", "cadiff"), Row("Scaled", "scaled")), (1, 2, 5, 10)
    ),
}
"""By the names that ``cadiff ablate --tables`` takes."""


def tables_of(names: str) -> dict[str, Table]:
    """The tables of a list such as ``II,4``, in upper or lower case."""
    known = {name.lower(): name for name in TABLES}
    wanted = [name.strip().lower() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise UsageError(f"there is no table {unknown[0]!r}", f"use some of {','.join(TABLES)}")
    return {known[name]: TABLES[known[name]] for name in wanted}


@dataclass(frozen=True)
class Network:
    """One training: a config, a template of its own or none, a seed, and a fold from 0."""

    config: str
    template: str
    seed: int
    fold: int

    @property
    def folder(self) -> str:
        """Where it lies in the ablation's folder."""
        name = "_".join(part for part in (self.config, self.template) if part)
        return f"{name}/seed-{self.seed}/fold-{self.fold + 1}"


@dataclass(frozen=True)
class Plan:
    """What is compared with what.

    ``splits`` are the subjects to hold out, a list for each fold; ``templates`` those of all rows
    without one of their own.
    """

    tables: Mapping[str, Table]
    seeds: Sequence[int]
    splits: Sequence[Sequence[str]]
    templates: tuple[str, ...] = (PREFERRED,)

    def networks(self) -> list[Network]:
        """All trainings, seed by seed, so that the first of them fills every table."""
        rows = [row for table in self.tables.values() for row in table.rows]
        return list(
            dict.fromkeys(
                self.network(row, seed, fold)
                for seed in self.seeds
                for fold in range(len(self.splits))
                for row in rows
            )
        )

    def network(self, row: Row, seed: int, fold: int) -> Network:
        """The training that fills a row."""
        template = "" if (row.template,) == self.templates else row.template
        return Network(row.config, template, seed, fold)

    def steps(self, network: Network) -> list[int]:
        """Numbers of sampling steps that some table wants of a network."""
        seed, fold = network.seed, network.fold
        wanted = (
            steps
            for table in self.tables.values()
            for row in table.rows
            if self.network(row, seed, fold) == network
            for steps in table.steps
        )
        return sorted(set(wanted))

    def templates_of(self, network: Network, people: Mapping[str, str]) -> tuple[str, ...]:
        """Templates of a training; ``people`` maps subjects of the dataset to their scans.

        A person is drawn among those who are trained on.
        """
        if network.template != PERSON:
            return (network.template,) if network.template else self.templates
        held_out = self.splits[network.fold]
        choice = sorted(subject for subject in people if subject not in held_out)
        pick = np.random.default_rng([network.seed, network.fold]).integers(len(choice))
        return (people[choice[pick]],)


@dataclass(frozen=True)
class NetworkScores:
    """Scores of one network with so many sampling steps."""

    network: Network
    steps: int
    scores: Sequence[Score]


Prepare = Callable[[tuple[str, ...]], tuple[Sequence[Sample], Sequence[Sample]]]
"""Samples of the dataset and of those that are trusted less, registered to the templates."""


def ablate(
    plan: Plan,
    run: Path,
    load: Callable[[str, int], Training],
    prepare: Prepare,
    people: Mapping[str, str],
    parcellation: Parcellation,
    *,
    init: Model | None = None,
    device: str = "auto",
    workers: int = 0,
    max_minutes: float = math.inf,
) -> Iterator[NetworkScores]:
    """Train and score every network of the plan; each result is yielded as soon as it is there.

    ``load(config, seed)`` is a training with the budget of all.  Each network has a folder in
    ``run``: a finished one is not trained again, and its scores are kept beside its weights.
    Raises ``CadiffError`` if one runs out of ``max_minutes`` or is interrupted, ``UsageError`` if
    it was begun with other settings.
    """
    until = time.monotonic() + 60 * max_minutes
    networks = plan.networks()
    for number, network in enumerate(networks, start=1):
        log.info("network %d of %d: %s", number, len(networks), network.folder)
        training, folder = load(network.config, network.seed), run / network.folder
        refuse_other_budget(folder, training.train)
        samples, also = prepare(plan.templates_of(network, people))
        held_out = plan.splits[network.fold]
        model = fitted(
            samples,
            folder,
            training.train,
            also=also,
            hold_out=held_out,
            init=init,
            parcellation=parcellation,
            net_config=training.net,
            device=device,
            workers=workers,
            max_minutes=(until - time.monotonic()) / 60,
        )
        everybody = [(s, DATASET) for s in samples] + [(s, ALSO) for s in also]
        scans = [(s, kind) for s, kind in everybody if s.subject in held_out]
        content = fingerprint(sorted((s.name, s.key, s.labels) for s, _ in scans))
        for steps in plan.steps(network):
            path = folder / f"scores_steps-{steps}_{model.sha256[:12]}_{content}.tsv"
            if not path.exists():
                sampling = SampleConfig(steps=steps)
                scores = [
                    replace(score, reference=kind)
                    for sample, kind in scans
                    for score in score_sample(model, sample, sampling, device)
                ]
                write_scores(path, scores, MEASURES)
            yield NetworkScores(network, steps, read_scores(path))
