"""Cross-validation: people are split fairly, and everyone is scored once by a stranger."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cadiff_cli.cli.crossval import command
from cadiff_cli.config import SampleConfig
from cadiff_cli.errors import CadiffError, OutputError, UsageError
from cadiff_cli.evaluation.scores import score_classes
from cadiff_cli.io import models
from cadiff_cli.io.bids.labelled import LabelledScan
from cadiff_cli.nets.models import Model
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.training.crossval import cross_validate, folds, shortened
from cadiff_cli.training.segmenter import data
from cadiff_cli.training.segmenter.config import TrainConfig
from cadiff_cli.training.segmenter.objective import SegmenterObjective

QUICK = TrainConfig(steps=1, warmup=1, decay=1, patch=64, objective=SegmenterObjective(fine=32))


def subjects(n, repeats=()):
    """Whose scans there are: one of each of ``n`` people, and second ones of some."""
    return [f"{i:02d}" for i in (*range(n), *repeats)]


@pytest.mark.parametrize(("people", "n"), [(2, 2), (7, 3), (9, 3), (10, 4), (5, 5)])
def test_folds_are_a_fair_partition_of_the_people(people, n):
    split = folds(subjects(people, repeats=(0, 1, 1)), n)
    assert len(split) == n
    sizes = [len(fold) for fold in split]
    assert max(sizes) - min(sizes) <= 1
    assert sorted(itertools.chain(*split)) == [f"{i:02d}" for i in range(people)]


def test_folds_depend_on_the_seed_and_on_nothing_else():
    """Neither on the order of the scans nor on how many a person has."""
    split = folds(subjects(9), 3, seed=1)
    assert folds(subjects(9, repeats=(3, 3, 8))[::-1], 3, seed=1) == split
    assert folds(subjects(9), 3, seed=2) != split
    assert split != [["00", "03", "06"], ["01", "04", "07"], ["02", "05", "08"]]


@pytest.mark.parametrize("n", [0, 1, 5])
def test_impossible_folds_are_usage_errors(n):
    with pytest.raises(UsageError) as caught:
        folds(subjects(4, repeats=(0, 1)), n)
    assert "2 to 4" in caught.value.remedy


def test_a_shortened_run_keeps_the_shape_of_its_schedule():
    config = TrainConfig(steps=3000, warmup=100, decay=1000, rate=3e-4, batch=2)
    assert shortened(config, 1) == config
    tenth = shortened(config, 0.1)
    assert (tenth.steps, tenth.warmup, tenth.decay) == (300, 10, 100)
    assert replace(tenth, steps=3000, warmup=100, decay=1000) == config
    least = shortened(config, 1e-9)
    assert (least.steps, least.warmup, least.decay) == (1, 1, 1)


def longer(config):
    return replace(config, steps=2 * config.steps)


def test_everyone_is_scored_once_by_a_network_that_never_saw_them(
    toy_sample, tiny_config, parcellation, tmp_path
):
    other = replace(toy_sample, name="sub-other", subject="other")
    settings = {
        "n_folds": 2,
        "net_config": tiny_config,
        "sampling": SampleConfig(steps=1, flip=False),
    }
    scores = cross_validate([toy_sample, other], tmp_path, QUICK, **settings)
    structures = [parcellation.structures[k - 1].name for k in parcellation.subset("malc27")]
    assert [(s.scan, s.structure) for s in scores] == [
        (name, structure)
        for (subject,) in folds(["toy", "other"], 2)
        for name in ("sub-other" if subject == "other" else "sub-toy",)
        for structure in structures
    ]
    large = {"Left-Cerebral-White-Matter", "Right-Cerebral-White-Matter"}
    assert min(s.dice for s in scores if s.structure in large) > 0.7
    held_out = json.loads((tmp_path / "folds.json").read_text())
    for k, fold in enumerate(held_out, start=1):
        model = models.load(Model, str(tmp_path / f"fold-{k}" / "model.safetensors"))
        described = model.training
        assert described["held_out"] == fold
        assert not set(described["trained_on"]) & set(fold)
    # Going on trains nothing again, and one fold can be had alone.
    weights = tmp_path / "fold-2" / "checkpoint.pt"
    before = torch.load(weights, weights_only=True)["seconds"]
    again = cross_validate([toy_sample, other], tmp_path, QUICK, only=(2,), **settings)
    assert json.loads((tmp_path / "folds.json").read_text()) == held_out
    assert [str(s) for s in again] == [str(s) for s in scores[len(structures) :]]
    assert torch.load(weights, weights_only=True)["seconds"] == before
    # Nor does it need the checkpoint, but the weights must be those of the same settings.
    weights.unlink()
    without = cross_validate([toy_sample, other], tmp_path, QUICK, only=(2,), **settings)
    assert [str(s) for s in without] == [str(s) for s in again]
    assert not weights.exists()
    for changed in (replace(QUICK, clip=0.5), longer(QUICK)):
        with pytest.raises(OutputError, match="no checkpoint"):
            cross_validate([toy_sample, other], tmp_path, changed, only=(2,), **settings)


def test_options_of_the_command_reach_the_folds(toy_sample, parcellation, tmp_path, monkeypatch):
    """And with --fold each has tables of its own."""
    people = [LabelledScan(name, name, tmp_path, tmp_path) for name in "abc"]
    seen = []

    def fake_validate(samples, run, config, **options):
        seen.append((config, options))
        whole = Volume(toy_sample.classes, Grid(toy_sample.classes.shape, np.eye(4)))
        return score_classes("sub-a", whole, whole, parcellation, "malc27")

    prepared = []
    monkeypatch.setattr("cadiff_cli.io.bids.labelled.labelled_scans", lambda _: people)
    monkeypatch.setattr(data, "prepare_scans", lambda *a: prepared.append(a) or [])
    monkeypatch.setattr("cadiff_cli.training.crossval.cross_validate", fake_validate)

    def call(*options):
        arguments = ["cadiff", str(tmp_path), "-o", str(tmp_path / "run"), *options]
        return CliRunner().invoke(command, arguments, standalone_mode=False)

    settings = ("--fraction", "0.5", "--steps", "60", "--decay", "20", "--max-minutes", "5")
    assert call(*settings, "--fold", "1", "--fold", "3").exception is None
    assert [options["only"] for _, options in seen] == [[1], [3]]
    assert {(config.steps, config.decay) for config, _ in seen} == {(30, 10)}
    assert all(0 < options["max_minutes"] <= 5 for _, options in seen)
    for k in (1, 3):
        assert (tmp_path / "run" / f"fold-{k}" / "evaluation.tsv").is_file()
    prepared.clear()
    for wrong in (["--fold", "4"], ["--folds", "4"], ["--device", "abacus"]):
        assert isinstance(call(*wrong).exception, UsageError)
    assert not prepared


def test_an_unfinished_fold_is_not_scored(toy_sample, tiny_config, tmp_path):
    """Out of time after its first steps; going on afterwards finishes it."""
    people = [toy_sample, replace(toy_sample, name="sub-other", subject="other")]
    sampling = SampleConfig(steps=1, flip=False)

    def first_fold(**limits):
        return cross_validate(
            people,
            tmp_path,
            QUICK,
            n_folds=2,
            only=(1,),
            net_config=tiny_config,
            sampling=sampling,
            **limits,
        )

    with pytest.raises(CadiffError, match="fold-1 was stopped at step 0 of 1"):
        first_fold(max_minutes=0)
    assert not (tmp_path / "folds.json").exists()
    assert first_fold()


def test_folds_that_are_not_there_are_named(toy_sample, tmp_path):
    with pytest.raises(UsageError, match=r"no fold \[0, 7\]"):
        cross_validate([toy_sample], tmp_path, QUICK, n_folds=3, only=(7, 1, 0))
    assert not list(tmp_path.iterdir())
