"""Expected Dice is what probability theory says, and survives the way to a page."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dense, probabilities_of
from test_probabilities import random_p, some_of

from cadiff_cli.config import Config, OutputConfig, SampleConfig
from cadiff_cli.data import shipped
from cadiff_cli.io.files import sha256
from cadiff_cli.metrics.overlap import dice
from cadiff_cli.products import Calibration, Scan
from cadiff_cli.quality.calibration import KNOTS, fit, load_calibration
from cadiff_cli.quality.expected import expected_dice
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.stages.sampling import brain_blocks, class_probabilities, denoise
from cadiff_cli.stages.segment import segment
from cadiff_cli.stages.volumes import volumes_mm3

QUICK = SampleConfig(steps=1, flip=False)


def test_who_is_certain_expects_one():
    classes = np.random.default_rng(0).integers(0, 4, (9, 8, 7)).astype(np.uint8)
    p = torch.from_numpy(np.stack([classes == k for k in range(5)]).astype(np.float32))
    found = expected_dice(probabilities_of(p), classes)
    np.testing.assert_array_equal(found[:3], 1)
    assert np.isnan(found[3]), "absent on both sides"


@pytest.mark.parametrize("q", [0.5, 0.8, 0.99])
@pytest.mark.parametrize("n", [0, 300, 1000])
def test_equal_probabilities_have_a_closed_form(q, n):
    """``n`` of 1000 voxels are drawn, ``1000 q`` are expected, ``n q`` in both."""
    p = torch.full((2, 10, 10, 10), 1 - q)
    p[1] = q
    drawn = (np.arange(1000) < n).reshape(10, 10, 10).astype(np.uint8)
    assert expected_dice(probabilities_of(p), drawn)[0] == pytest.approx(2 * n * q / (n + 1000 * q))


def test_it_is_the_mean_dice_of_truths_drawn_from_the_probabilities():
    p = random_p((20, 18, 16), sharpness=2.0)
    drawn = probabilities_of(p).most_probable()
    drawn[:4] = 0  # a mask that is too small costs what lies outside it
    flat = torch.distributions.Categorical(p.reshape(4, -1).T)
    torch.manual_seed(0)
    truths = [flat.sample().reshape(p.shape[1:]).numpy().astype(np.uint8) for _ in range(40)]
    mean = np.mean([dice(drawn, truth, (1, 2, 3)) for truth in truths], axis=0)
    np.testing.assert_allclose(expected_dice(probabilities_of(p), drawn), mean, atol=0.003)


def test_what_is_left_out_is_certain_background():
    p = random_p((9, 8, 7), sharpness=2.0)
    some = some_of(p)
    drawn = probabilities_of(p).most_probable()
    whole = expected_dice(probabilities_of(dense(some)), drawn)
    np.testing.assert_allclose(expected_dice(some, drawn), whole, rtol=1e-5)


@pytest.fixture(scope="module")
def small_conditions(conditions_of, small_head):
    return conditions_of(small_head)


@pytest.fixture(scope="module")
def segmented(small_head, small_conditions, tiny_model):
    """Segment the small head with other settings."""

    def run(sample, **output):
        config = Config(sample=sample, output=OutputConfig(**output))
        mask = Volume(small_head.codes > 0, small_head.t1.grid)
        return segment(
            Scan(small_head.t1, Path("x.nii")), small_conditions, mask, tiny_model, config
        )

    return run


@pytest.mark.parametrize("flip", [False, True], ids=["straight", "flip"])
def test_samples_are_averaged(tiny_model, small_conditions, flip):
    seen = []
    config = replace(QUICK, seed=3, samples=3, flip=flip)
    mean, tile = class_probabilities(
        small_conditions, tiny_model, config, lambda p: seen.append(p.values.clone())
    )
    single = [
        class_probabilities(small_conditions, tiny_model, replace(config, seed=seed, samples=1))[
            0
        ].values
        for seed in (3, 4, 5)
    ]
    assert tile is None
    assert all(torch.equal(*pair) for pair in zip(seen, single, strict=True))
    torch.testing.assert_close(mean.values, sum(single) / 3)
    assert not torch.equal(single[0], single[1])


def test_one_sample_is_one_denoising(tiny_model, small_conditions):
    """Bit for bit: nothing is added and nothing divided."""
    image = torch.from_numpy(small_conditions.image.data.copy())[None, None]
    field = torch.from_numpy(small_conditions.field.data.copy())[None]
    noise, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    blocks = brain_blocks(small_conditions.mask.data)
    one = denoise(tiny_model.net, image, field, blocks, 1, noise, cpu)
    assert torch.equal(class_probabilities(small_conditions, tiny_model, QUICK)[0].values, one)


def test_volumes_vary_as_those_of_the_samples_do(segmented, parcellation):
    together = segmented(replace(QUICK, samples=3))
    each = [volumes_mm3(segmented(replace(QUICK, seed=seed))) for seed in range(3)]
    assert set(together.volume_sd_mm3) == {s.code for s in parcellation.structures}
    for code, sd in together.volume_sd_mm3.items():
        assert sd == pytest.approx(np.std([one[code] for one in each], ddof=1))
    assert segmented(QUICK).volume_sd_mm3 == {}


def test_expected_dice_is_told_of_what_is_there(segmented):
    made = segmented(QUICK)
    drawn = {code for code, mm3 in volumes_mm3(made).items() if mm3}
    assert drawn <= set(made.expected_dice)
    assert all(0 <= value <= 1 for value in made.expected_dice.values())


def test_the_map_lies_on_the_scan_and_in_the_mask(segmented, small_head):
    assert segmented(QUICK).uncertainty is None
    for found in (
        segmented(QUICK, uncertainty=True).uncertainty,
        segmented(replace(QUICK, samples=2)).uncertainty,
    ):
        assert found.dtype == np.float32
        assert found.shape == small_head.t1.grid.shape
        assert found.min() == 0
        assert 0 < found.max() <= 1
        assert not found[small_head.codes == 0].any()


# Calibration -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    """Structures whose true Dice is less than expected, one of them less than the other."""
    rng = np.random.default_rng(0)
    raw = rng.uniform(0.2, 1, 4000)
    names = np.where(rng.random(4000) < 0.5, "easy", "hard")
    dice = np.clip(raw**2 - 0.1 * (names == "hard") + rng.normal(0, 0.03, 4000), 0, 1)
    return names, raw, dice, raw > 0.8


def test_a_map_never_falls_and_stays_in_range(measured):
    calibrate = fit(*measured, offsets=True)
    assert len(calibrate.raw) == KNOTS + 1
    for name in ("easy", "hard", "unknown"):
        values = [calibrate(name, raw) for raw in np.linspace(-0.5, 1.5, 201)]
        assert (np.diff(values) >= 0).all()
        assert min(values) >= 0
        assert max(values) <= 1
    steep = Calibration("", "", (0.0, 1.0), (0.0, 1.0), {"low": -0.5, "high": 0.5})
    assert steep("low", 0.2) == 0
    assert steep("high", 0.9) == 1


def test_a_map_tells_what_was_measured(measured):
    names, raw, dice, good = measured
    calibrate = fit(*measured, offsets=True)
    expected = np.array([calibrate(n, r) for n, r in zip(names, raw, strict=True)])
    assert abs(expected - dice).mean() < 0.04 < abs(raw - dice).mean()
    assert calibrate.offsets["easy"] - calibrate.offsets["hard"] == pytest.approx(0.1, abs=0.02)
    for name in ("easy", "hard"):
        usual = expected[good & (names == name)].mean()
        assert calibrate.usual[name] == pytest.approx(usual)
    assert fit(*measured).offsets == {}


def test_a_map_survives_its_file(measured):
    made = fit(*measured, offsets=True, weights_sha256="0" * 64, people="tests")
    read = Calibration.from_dict(json.loads(json.dumps(made.as_dict())))
    assert (read.weights_sha256, read.people) == (made.weights_sha256, made.people)
    assert read.usual == pytest.approx(made.usual, abs=1e-4)
    for raw in np.linspace(0, 1, 21):
        assert read("hard", raw) == pytest.approx(made("hard", raw), abs=1e-3)


def test_a_map_is_for_its_weights_alone():
    assert load_calibration("0" * 64) is None


def test_the_released_map_is_of_the_released_weights(released, parcellation):
    if not shipped("calibration/cadiff-malc.json").is_file():
        pytest.skip("this version has no calibration")
    calibrate = load_calibration(sha256(released))
    assert calibrate is not None, "measure again: tools/measure_quality.py"
    assert calibrate.people
    names = {s.name for s in parcellation.structures}
    assert set(calibrate.offsets) <= set(calibrate.usual) <= names
    assert list(calibrate.raw) == sorted(calibrate.raw)
    assert list(calibrate.dice) == sorted(calibrate.dice)
