"""Watching a run: scores of held-out scans, curves where TensorBoard is, a picture."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import awake

from cadiff_cli.config import SampleConfig
from cadiff_cli.metrics.overlap import dice
from cadiff_cli.training.loop import Interval, TrainingState
from cadiff_cli.training.monitor import RunMonitor, overlay, segment_sample

ONE_STEP = SampleConfig(steps=1, flip=False)
LARGE = (2, 41, 3, 42)
REPORT = Interval({"total": 2.0, "label": 1.5}, rate=1e-3, seconds_per_step=0.5, data_share=0.1)


@pytest.fixture(scope="module")
def state(tiny_net, tiny_config):
    """A run whose averaged network knows the phantom and whose own does not."""
    net = awake(tiny_config)
    return TrainingState(net, tiny_net, torch.optim.SGD(net.parameters()), step=40, seconds=1800.0)


@pytest.fixture(scope="module")
def drawn(tiny_net, toy_sample, parcellation):
    return segment_sample(tiny_net, toy_sample, parcellation, ONE_STEP)


@pytest.fixture
def people(toy_sample, drawn):
    """Two held-out scans; the second's manual labels are what the network draws."""
    return [toy_sample, replace(toy_sample, name="sub-known", classes=drawn)]


def rows(folder):
    lines = (folder / "validation.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines]


def test_a_cached_scan_is_segmented_in_its_own_space(tiny_net, toy_sample, parcellation, drawn):
    """By the field alone, too: the stored one lies where the brain does."""
    prior = segment_sample(tiny_net, toy_sample, parcellation, replace(ONE_STEP, steps=0))
    for classes in (drawn, prior):
        assert classes.shape == toy_sample.classes.shape
        assert classes.dtype == np.uint8
        assert not classes[~toy_sample.mask].any()
    large = [int(np.flatnonzero(parcellation.codes == code)[0]) for code in LARGE]
    assert dice(prior, toy_sample.classes, large).min() > 0.85
    assert not np.array_equal(prior, drawn)


def test_held_out_scans_take_turns(tmp_path, state, people, parcellation):
    """The averaged network is scored, and a perfect match is 1."""
    monitor = RunMonitor(tmp_path, people, parcellation, sampling=ONE_STEP)
    scores = [monitor.validate(state) for _ in range(3)]
    monitor.close()
    assert scores[0] == scores[2] < scores[1] == 1
    header, *found = rows(tmp_path)
    assert header == ["step", "hours", "scan", "dice"]
    assert [row[2] for row in found] == ["sub-toy", "sub-known", "sub-toy"]
    assert all(row[:2] == ["40", "0.500"] for row in found)
    assert [float(row[3]) for row in found] == pytest.approx(scores, abs=1e-4)
    pictures = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert pictures == ["000040_sub-known.png", "000040_sub-toy.png"]
    assert (tmp_path / "validation" / pictures[0]).read_bytes().startswith(b"\x89PNG")
    # A run that goes on adds to its table.
    again = RunMonitor(tmp_path, people, parcellation, sampling=ONE_STEP)
    again.validate(state)
    again.close()
    assert rows(tmp_path)[:4] == [header, *found]
    assert len(rows(tmp_path)) == 5


@pytest.mark.parametrize(
    ("minutes", "held_out", "times"), [(0, 2, 2), (1e9, 2, 0), (0, 0, 0)], ids=str
)
def test_validation_waits_for_its_time(
    tmp_path, state, people, parcellation, minutes, held_out, times
):
    monitor = RunMonitor(tmp_path, people[:held_out], parcellation, minutes, ONE_STEP)
    for _ in range(2):
        monitor.step_done(state)
    monitor.close()
    assert (len(rows(tmp_path)) - 1 if times else 0) == times
    assert (tmp_path / "validation.tsv").exists() == bool(times)


def test_curves_and_picture_are_written_for_tensorboard(tmp_path, state, people, parcellation):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monitor = RunMonitor(tmp_path, people[1:], parcellation, sampling=ONE_STEP)
    monitor.interval(20, REPORT)
    monitor.interval(40, REPORT)
    monitor.validate(state)
    monitor.close()
    board = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    expected = {"loss/total": 2.0, "loss/label": 1.5, "rate": 1e-3, "seconds_per_step": 0.5}
    for tag, value in (expected | {"data_share": 0.1}).items():
        assert [e.step for e in board.Scalars(tag)] == [20, 40]
        assert board.Scalars(tag)[0].value == pytest.approx(value)
    (score,) = board.Scalars("dice/sub-known")
    assert (score.step, score.value) == (40, 1)
    (picture,) = board.Images("held_out")
    assert (picture.height, picture.width) == overlay(
        people[1], people[1].classes, parcellation
    ).shape[:2]


def test_tensorboard_is_optional(tmp_path, state, people, parcellation, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level("INFO", logger="cadiff_cli"):
        monitor = RunMonitor(tmp_path, people, parcellation, sampling=ONE_STEP)
    assert "pip install tensorboard" in caplog.text
    monitor.interval(20, REPORT)
    monitor.validate(state)
    monitor.close()
    assert {p.name for p in tmp_path.iterdir()} == {"validation.tsv", "validation"}


def test_the_picture_shows_image_prediction_and_truth(toy_sample, drawn, parcellation):
    """Three rows of three planes: grey, and inked only where there are labels."""
    x, y, z = toy_sample.image.shape
    picture = overlay(toy_sample, drawn, parcellation)
    height = max(y, z)
    assert picture.shape == (3 * height, y + x + x, 3)
    assert picture.dtype == np.uint8
    grey, predicted, truth = picture.reshape(3, height, -1, 3)
    assert (grey == grey[..., :1]).all()
    np.testing.assert_array_equal(grey[:z, :y, 0], toy_sample.image[x // 2].T[::-1])
    np.testing.assert_array_equal(grey[:y, y + x :, 0], toy_sample.image[:, :, z // 2].T[::-1])
    assert not np.array_equal(predicted, truth)
    labels = toy_sample.classes[x // 2].T[::-1]
    np.testing.assert_array_equal(
        (truth[:z, :y] != grey[:z, :y]).any(axis=2) & (labels == 0), False
    )
    assert (truth[:z, :y] != grey[:z, :y]).any(axis=2)[labels > 0].mean() > 0.95
    same = overlay(toy_sample, toy_sample.classes, parcellation).reshape(3, height, -1, 3)
    np.testing.assert_array_equal(same[1], same[2])
    blank = overlay(toy_sample, np.zeros_like(drawn), parcellation).reshape(3, height, -1, 3)
    np.testing.assert_array_equal(blank[1], blank[0])
