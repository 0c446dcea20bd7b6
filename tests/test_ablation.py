"""The ablation: every row at the same budget, nothing done twice, and means that are means."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import TINY

from cadiff_cli.cli.ablate import command
from cadiff_cli.errors import CadiffError, UsageError
from cadiff_cli.evaluation.scores import Score
from cadiff_cli.evaluation.tables import read_scores, write_scores
from cadiff_cli.io import models
from cadiff_cli.io.bids.labelled import LabelledScan
from cadiff_cli.nets.models import Model
from cadiff_cli.report.ablation import Spread, lines, write_tables
from cadiff_cli.training.ablation import (
    ALSO,
    DATASET,
    MEASURES,
    PERSON,
    TABLES,
    Network,
    NetworkScores,
    Plan,
    Row,
    Table,
    tables_of,
)
from cadiff_cli.training.segmenter import data
from cadiff_cli.training.segmenter.config import Training, load
from cadiff_cli.training.settings import shipped_configs

COMMON = f"""
kind = "segmenter"
[net]
channels = {list(TINY.channels)}
head_channels = {TINY.head_channels}
head_blocks = {TINY.head_blocks}
time_channels = {TINY.time_channels}
embed_channels = {TINY.embed_channels}
taca_sizes = {list(TINY.taca_sizes)}
prior_shape = [8, 8, 8]
[train]
patch = 64
[train.objective]
fine = 32
"""
PEOPLE = {"a": "a.nii.gz", "b": "b.nii.gz", "c": "c.nii.gz"}


def score(scan, dice, kind=DATASET, structure="Left-Thalamus", hd95=1.0):
    return Score(scan, kind, structure, dice, dice / 2, hd95, 10.0, 10.0)


def test_rows_are_shipped_configs_and_titles_tell_them_apart():
    shipped = shipped_configs(Training.kind)
    for table in TABLES.values():
        assert {row.config for row in table.rows} <= set(shipped)
        assert len({row.title for row in table.rows}) == len(table.rows)
        assert list(table.steps) == sorted(set(table.steps))


def test_tables_are_named_in_any_case():
    assert list(tables_of("iv, II,spad")) == ["IV", "II", "SPAD"]
    with pytest.raises(UsageError) as caught:
        tables_of("II,VII")
    assert "'vii'" in caught.value.message
    assert "VI" in caught.value.remedy


def test_rows_share_networks():
    """Each is trained once for a seed and fold; the first seed fills every table."""
    plan = Plan(TABLES, (4, 5), [["a"], ["b"]])
    networks = plan.networks()
    assert len(set(networks)) == len(networks)
    assert [n.seed for n in networks] == sorted(n.seed for n in networks)
    one = {(n.config, n.template) for n in networks if (n.seed, n.fold) == (4, 1)}
    assert len(networks) == 4 * len(one)
    assert sorted(t for c, t in one if c == "taca") == ["", "MNI152NLin2009aSym", PERSON]
    assert len({n.folder for n in networks}) == len(networks)
    both = replace(plan, templates=("MNIColin27", "MNI152NLin2009aSym"))
    assert Network("taca", "MNIColin27", 4, 0) in both.networks()
    assert plan.steps(Network("taca", "", 5, 0)) == list(range(1, 11))
    assert plan.steps(Network("taca", PERSON, 5, 0)) == [5]
    assert plan.steps(Network("cadiff", "", 4, 1)) == [1, 2, 5, 10]


def test_the_atlas_is_somebody_who_is_trained_on():
    plan = Plan(TABLES, range(20), [["a"], ["b"]])
    for fold, held_out in enumerate(("a", "b")):
        drawn = [plan.templates_of(Network("taca", PERSON, s, fold), PEOPLE) for s in plan.seeds]
        assert {name for (name,) in drawn} == set(PEOPLE.values()) - {PEOPLE[held_out]}
    network = Network("taca", PERSON, 3, 1)
    assert plan.templates_of(network, PEOPLE) == plan.templates_of(network, PEOPLE)
    assert plan.templates_of(Network("taca", "", 0, 0), PEOPLE) == plan.templates


def test_scores_are_read_as_they_were_written(tmp_path):
    """Absent and missed structures too."""
    rows = [score("s", 0.5), score("s", 0.0, hd95=math.inf), score("t", math.nan, hd95=math.nan)]
    write_scores(tmp_path / "scores.tsv", rows, MEASURES)
    again = read_scores(tmp_path / "scores.tsv")
    assert [str(s) for s in again] == [str(s) for s in rows]
    assert [(s.missed, s.absent) for s in again] == [(False, False), (True, False), (False, True)]


def test_figures_are_means_over_scans_and_spreads_over_seeds(tmp_path):
    """Scans weigh the same, whatever they hold; a seed counts when all its folds are done."""
    plan = Plan({"T": Table("T", (Row("r", "taca", (50.0, 25.0)),))}, range(3), [["a"], ["b"]])

    def result(seed, fold, *scores):
        return NetworkScores(Network("taca", "", seed, fold), 5, scores)

    results = [
        result(0, 0, score("a", 0.2), score("a", 0.4, structure="other")),
        result(0, 1, score("b", 0.5), score("h", 0.9, ALSO)),
        result(1, 0, score("a", 0.5)),
        result(1, 1, score("b", 0.5, hd95=math.inf)),
        result(2, 0, score("a", 1.0)),
    ]
    (line,) = lines(plan, plan.tables["T"], results, DATASET)
    assert line.seeds == 2
    dice = line.spreads["dice"]
    assert dice.mean == pytest.approx(45)
    assert dice.sd == pytest.approx(math.sqrt(50))
    assert line.spreads["nsd"].mean == pytest.approx(22.5)
    assert line.spreads["missed"].mean == 0.5
    (path,) = write_tables(tmp_path, plan, results, 7)
    text = path.read_text()
    assert (
        "| r | 45.00 ± 7.07 | 22.50 ± 3.54 | 1.00 ± 0.00 | 0.50 ± 0.71 | 2 | 50.00 | 25.00 |"
        in (text.splitlines())
    )
    assert "Budget: 7 training steps for every row, 3 seeds, 2 splits of people." in text
    (other,) = lines(plan, plan.tables["T"], results, ALSO)
    assert other.seeds == 0  # no fold but one holds out anybody there


@pytest.mark.parametrize(
    ("values", "text"),
    [([1.0], "1.00"), ([1.0, 3.0], "2.00 ± 1.41"), ([], "n/a"), ([2.0, math.nan], "2.00")],
)
def test_a_spread_needs_two_seeds(values, text):
    assert str(Spread.over(values)) == text


@pytest.fixture
def call(toy_sample, monkeypatch, tmp_path):
    """The command on four small brains of two datasets, with a small network for every row."""
    cut = tuple(slice((n - 32) // 8 * 4, (n - 32) // 8 * 4 + 32) for n in toy_sample.image.shape)
    coarse = tuple(slice(s.start // 4, s.stop // 4) for s in cut)
    field = toy_sample.fields["toy"][(slice(None), *coarse)]
    arrays = {key: getattr(toy_sample, key)[cut] for key in ("image", "mask", "classes")}
    prepared = []

    def scans_of(folder):
        names = {"heads": "xy"}.get(folder.name, "abc")
        return [LabelledScan(f"sub-{n}", n, Path(f"{n}.nii.gz"), folder) for n in names]

    def prepare(scans, templates, *_):
        prepared.append(templates)
        fields = dict.fromkeys(templates, field)
        return [
            replace(
                toy_sample,
                name=s.name,
                subject=s.subject,
                fields=fields,
                key=call.keys.get(s.subject, ""),
                **arrays,
            )
            for s in scans
        ]

    monkeypatch.setattr(data, "labelled_scans", scans_of)
    monkeypatch.setattr(data, "prepare_scans", prepare)
    monkeypatch.setattr("cadiff_cli.training.templates.load_training_template", lambda name: name)
    (tmp_path / "common.toml").write_text(COMMON)

    def call(*options):
        fixed = ("--common", tmp_path / "common.toml", "-o", tmp_path / "run", "--steps", "1")
        arguments = map(str, (tmp_path / "data", *fixed, *options))
        return CliRunner().invoke(command, list(arguments), standalone_mode=False)

    call.prepared, call.keys = prepared, {}
    return call


def test_the_small_network_keeps_what_rows_compare():
    """``--common small`` changes sizes alone: of each row, the method stays as its config says."""
    rows = {row.config for table in TABLES.values() for row in table.rows}
    sizes = ("channels", "head_channels", "time_channels")
    half = asdict(load("cadiff", common="small").net)
    for config in rows:
        own, small = load(config), load(config, common="small")
        net, less = asdict(own.net), asdict(small.net)
        assert {k for k in net if net[k] != less[k]} == set(sizes)
        assert [less[k] for k in sizes] == [half[k] for k in sizes]
        assert replace(small.train.objective, fine=own.train.objective.fine) == own.train.objective
        assert (small.train.spad, small.train.augment) == (own.train.spad, own.train.augment)


@pytest.mark.slow
def test_every_table_is_filled(call, tmp_path):
    """All of them at toy size: equal budgets, atlases of their own, one figure for each line."""
    also = ("--also", tmp_path / "heads", "dlmuse", "--hold-out", "a", "--hold-out", "x")
    done = call(*also, "--tables", ",".join(TABLES), "--seeds", "1")
    assert done.exception is None, done.output
    run = tmp_path / "run"
    trained = {path.parent for path in run.rglob("model.safetensors")}
    assert len(trained) == len(Plan(TABLES, (0,), [["a"]]).networks())
    for folder in trained:
        told = models.load(Model, str(folder / "model.safetensors")).training
        assert (told["steps"], told["held_out"]) == (1, ["a", "x"])
        assert (told["trained_on"], told["also_on"]) == (["b", "c"], ["y"])
    assert {("MNIColin27",), ("MNI152NLin2009aSym",)} < set(call.prepared)
    assert set(call.prepared) & {("b.nii.gz",), ("c.nii.gz",)}
    for name, table in TABLES.items():
        text = (run / f"table-{name}.md").read_text()
        rows = [
            line.split("|") for line in text.splitlines() if " 1 |" in line and "± " not in line
        ]
        assert len([r for r in rows if "n/a" not in r[2]]) == 2 * len(table.rows) * len(table.steps)
        assert "(1 scan)" in text
        assert (run / f"figure-{name}.svg").exists() == (len(table.steps) > 1)
    text = (run / "table-II.md").read_text()
    assert text.count("| 90.19 | 93.79 |") == 1
    assert (run / "figure-4.svg").read_text().count("<circle") == 10


@pytest.mark.slow
def test_it_stops_and_goes_on(call, tmp_path):
    """Out of time at once; then one fold after another, and nothing again."""
    options = ("--tables", "III", "--folds", "2", "--seeds", "1")
    stopped = call(*options, "--max-minutes", "0")
    assert isinstance(stopped.exception, CadiffError)
    run = tmp_path / "run"
    assert not list(run.glob("table-*"))
    assert call(*options).exception is None
    table = (run / "table-III.md").read_text()
    assert table.count(" | 1 |") == 3  # finished seeds of each row
    assert "(3 scans)" in table
    stamps = {path: path.stat().st_mtime_ns for path in run.rglob("scores_*.tsv")}
    assert len(stamps) == 3 * 2
    assert call(*options).exception is None
    assert {path: path.stat().st_mtime_ns for path in run.rglob("scores_*.tsv")} == stamps
    assert (run / "table-III.md").read_text() == table
    for other in (("--steps", "2"), ("--rate", "0.5")):
        assert isinstance(call(*options, *other).exception, UsageError)


@pytest.mark.slow
def test_labels_that_were_repaired_are_scored_again(call, tmp_path):
    """Of people held out, so that the weights are the same."""
    options = ("--tables", "III", "--seeds", "1", "--hold-out", "a")
    for n_scores in (3, 6):
        assert call(*options).exception is None
        assert len(list((tmp_path / "run").rglob("scores_*.tsv"))) == n_scores
        call.keys["a"] = "repaired"


def test_seed_and_templates_of_the_common_file_count(call, tmp_path):
    text = COMMON.replace("[net]", 'templates = ["MNI152NLin2009aSym"]\n[net]')
    (tmp_path / "common.toml").write_text(text.replace("patch = 64", "patch = 64\nseed = 5"))
    options = ("--tables", "III", "--seeds", "2", "--hold-out", "a", "--max-minutes", "0")
    assert isinstance(call(*options).exception, CadiffError)
    assert call.prepared == [("MNI152NLin2009aSym",)]
    assert [path.name for path in (tmp_path / "run").glob("*/seed-*")] == ["seed-5"]
    assert call(*options, "--template", "MNIColin27", "--seed", "3").exception is not None
    assert call.prepared[1:] == [("MNIColin27",)]
    assert [*(tmp_path / "run").glob("*/seed-3")]


def test_what_cannot_be_is_said_before_anything_is_prepared(call, tmp_path, tiny_weights):
    for wrong in (
        ("--tables", "VII"),
        ("--folds", "4"),
        ("--hold-out", "nobody"),
        ("--also-share", "0.5"),
        ("--device", "abacus"),
        ("--init", tiny_weights),  # not the network of every row
    ):
        assert isinstance(call(*wrong).exception, UsageError), wrong
    assert call.prepared == []
