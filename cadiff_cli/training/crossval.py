"""Cross-validation over people: the paper trains three times and scores each person once."""

import json
import logging
import math
import time
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cadiff_cli.config import SampleConfig
from cadiff_cli.errors import CadiffError, UsageError
from cadiff_cli.evaluation.scores import Score, score_classes
from cadiff_cli.io import models
from cadiff_cli.io.files import write_text
from cadiff_cli.labels.parcellation import BASE, Parcellation, load_parcellation
from cadiff_cli.nets.models import Model
from cadiff_cli.nets.segmenter import NetConfig
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.training.monitor import segment_sample
from cadiff_cli.training.segmenter.config import TrainConfig
from cadiff_cli.training.segmenter.data import Sample
from cadiff_cli.training.segmenter.run import train

log = logging.getLogger(__name__)


def folds(subjects: Iterable[str], n: int, seed: int = 0) -> list[list[str]]:
    """Split the people into ``n`` groups of nearly equal size; each person is in one group."""
    people = sorted(set(subjects))
    if len(people) < 2:
        raise UsageError("there is one person only", "cross-validation needs two or more")
    if not 2 <= n <= len(people):
        raise UsageError(f"{n} folds of {len(people)} people", f"use 2 to {len(people)}")
    order = np.random.default_rng(seed).permutation(len(people))
    return [sorted(people[i] for i in order[k::n]) for k in range(n)]


def joint_folds(groups: Iterable[Set[str]], n: int) -> list[list[str]]:
    """Folds that hold a share of the people of each group; empty groups do not count."""
    parts = zip(*(folds(group, n) for group in groups if group), strict=True)
    return [[name for fold in each for name in fold] for each in parts]


def check_folds(numbers: Iterable[int], n: int) -> None:
    """Raise ``UsageError`` for folds that do not exist."""
    if unknown := sorted(set(numbers) - set(range(1, n + 1))):
        raise UsageError(f"there is no fold {unknown}", f"folds are numbered 1 to {n}")


def shortened(config: TrainConfig, fraction: float) -> TrainConfig:
    """The same schedule with a ``fraction`` of its steps, at least one of each kind."""
    steps, decay, warmup = (
        max(1, round(fraction * n)) for n in (config.steps, config.decay, config.warmup)
    )
    return replace(config, steps=steps, decay=decay, warmup=warmup)


def cross_validate(
    samples: Sequence[Sample],
    run: Path,
    config: TrainConfig,
    *,
    parcellation: Parcellation | None = None,
    n_folds: int = 3,
    only: Sequence[int] | None = None,
    net_config: NetConfig | None = None,
    sampling: SampleConfig | None = None,
    device: str = "auto",
    workers: int = 0,
    max_minutes: float = math.inf,
) -> list[Score]:
    """For each fold, train on the others and segment it; every scan is scored once.

    Fold k (from 1) is stored in ``run/fold-k``; a finished fold is not trained again.  ``only``
    selects folds.  Scores are measured on the network's 1 mm crop.  Raises ``CadiffError`` if a
    fold runs out of ``max_minutes`` or is interrupted.

    ``parcellation`` is that of the samples' classes (None: ``BASE``); its ``headline`` is scored.
    """
    parcellation = parcellation or load_parcellation(BASE)
    subset, sampling = parcellation.headline, sampling or SampleConfig()
    until = time.monotonic() + 60 * max_minutes
    check_folds(only or (), n_folds)
    split = folds([s.subject for s in samples], n_folds, config.seed)
    if blank := [s.name for s in samples if not s.scored(parcellation.subset(subset))]:
        raise UsageError(
            f"the labels of {blank[0]} mean none of the structures of {subset}",
            "there is nothing to score",
        )
    scores: list[Score] = []
    for k, held_out in enumerate(split, start=1):
        if only and k not in only:
            continue
        log.info("fold %d of %d: held out %s", k, n_folds, ", ".join(held_out))
        model = fitted(
            samples,
            run / f"fold-{k}",
            config,
            parcellation=parcellation,
            hold_out=held_out,
            net_config=net_config,
            device=device,
            workers=workers,
            max_minutes=(until - time.monotonic()) / 60,
        )
        for sample in (s for s in samples if s.subject in held_out):
            scores += score_sample(model, sample, sampling, device)
    write_text(run / "folds.json", json.dumps(split, indent=2) + "\n")
    return scores


def fitted(samples: Sequence[Sample], run: Path, config: TrainConfig, **options: Any) -> Model:
    """A network that was trained to the end of its schedule; ``options`` are those of ``train``.

    Raises ``CadiffError`` if it was stopped before.
    """
    weights = train(samples, run, config, validate_minutes=math.inf, **options)
    model = models.load(Model, str(weights))
    if (reached := model.training["steps"]) < config.steps:
        raise CadiffError(
            f"{run} was stopped at step {reached} of {config.steps}: nothing is scored",
            "give the same command again: it goes on from there",
        )
    return model


def score_sample(model: Model, sample: Sample, sampling: SampleConfig, device: str) -> list[Score]:
    """Segment a cached scan and score it on its 1 mm crop, in structures that somebody drew."""
    shape = sample.classes.shape
    grid = Grid((shape[0], shape[1], shape[2]), np.eye(4))
    drawn = model.parcellation
    classes = segment_sample(model.net, sample, drawn, sampling, device)
    predicted, reference = Volume(classes, grid), Volume(sample.classes, grid)
    subset = drawn.headline
    scored = {drawn.structures[k - 1].name for k in sample.scored(drawn.subset(subset))}
    rows = score_classes(sample.name, predicted, reference, drawn, subset)
    return [score for score in rows if score.structure in scored]
