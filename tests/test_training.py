"""Training: what is drawn, what is minimised, and going on after a kill as if nothing happened."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from cadiff_cli.errors import DataError, MissingInputError, UsageError
from cadiff_cli.io.weights import load_model
from cadiff_cli.nets.unet import CADiffNet, Coarse
from cadiff_cli.training import cache
from cadiff_cli.training.augment import AugmentConfig, draw_patch, recolour
from cadiff_cli.training.cache import Sample
from cadiff_cli.training.loop import (
    TrainConfig,
    fit,
    load_checkpoint,
    new_state,
    rate_factor,
    save_checkpoint,
    update_ema,
)
from cadiff_cli.training.losses import central, crop_coarse, dice_ce, field_mse, fractions
from cadiff_cli.training.prior import count_prior
from cadiff_cli.training.run import label_mapping, train

PLAIN = AugmentConfig(0, 0, 0, 0, 0, 24, 0, 0)
# Not 32: the deepest level would be 2 voxels wide, where torch's half-precision gradient of a
# convolution now and then holds uninitialised memory.
QUICK = TrainConfig(steps=6, warmup=2, decay=2, patch=64, fine=32, augment=AugmentConfig())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def mirror(table):
    return torch.from_numpy(table.mirror_classes)


@pytest.fixture(scope="module")
def ramp():
    """A sample whose field is linear: x, y and z of the voxel, scaled."""
    shape = np.array((64, 48, 80))
    # Stored cells are centred in blocks of 4 voxels.
    ijk = np.indices(shape // 4) * 4 + 1.5
    rng = np.random.default_rng(0)
    # The brain keeps away from the border, where the stored field ends.
    inside = (abs(np.indices(shape) - shape.reshape(3, 1, 1, 1) / 2) < 8).all(axis=0)
    return Sample(
        "sub-ramp",
        "ramp",
        rng.integers(0, 256, shape, dtype=np.uint8),
        (rng.integers(1, 41, shape) * inside).astype(np.uint8),
        {"toy": (ijk / shape.reshape(3, 1, 1, 1)).astype(np.float32)},
    )


def test_fractions_sum_to_one_and_count():
    classes = torch.randint(0, 5, (2, 8, 4, 6), generator=seeded())
    for stride in (1, 2):
        share = fractions(classes, 5, stride)
        torch.testing.assert_close(
            share.sum(1), torch.ones(2, 8 // stride, 4 // stride, 6 // stride)
        )
    one_hot = torch.nn.functional.one_hot(classes, 5).permute(0, 4, 1, 2, 3).float()
    torch.testing.assert_close(fractions(classes, 5), one_hot)
    pooled = torch.nn.functional.avg_pool3d(one_hot, 2)
    torch.testing.assert_close(fractions(classes, 5, 2), pooled)


def test_fractions_of_a_mirrored_brain_are_mirrored(mirror):
    classes = torch.randint(0, 41, (1, 8, 4, 6), generator=seeded())
    there = fractions(mirror[classes.flip(1)], 41, 2)
    torch.testing.assert_close(there, fractions(classes, 41, 2)[:, mirror].flip(2))


def test_the_loss_falls_on_the_way_to_the_truth():
    target = fractions(torch.randint(0, 5, (1, 8, 8, 8), generator=seeded()), 5)
    wrong = torch.randn(target.shape, generator=seeded(1))
    right = 30 * target
    values = [float(dice_ce((1 - w) * wrong + w * right, target)) for w in (0, 0.1, 0.3, 1)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 1e-3


def test_the_loss_at_ignorance_has_a_closed_form():
    """Equal logits over K classes: cross-entropy log K, Dice 2 s / (1 + K s), s the share."""
    target = torch.zeros(1, 4, 4, 4, 4)
    target[:, 1, :2], target[:, 0, 2:] = 1, 1
    expected = math.log(4) + 1 - 2 * 0.5 * 0.25 / (0.25 + 0.5)
    assert float(dice_ce(torch.zeros_like(target), target)) == pytest.approx(expected, abs=1e-5)


def test_background_alone_has_no_dice():
    target = torch.zeros(1, 3, 4, 4, 4)
    target[:, 0] = 1
    assert float(dice_ce(torch.zeros_like(target), target)) == pytest.approx(math.log(3))


def test_field_loss_is_in_field_units():
    field = torch.rand(1, 3, 4, 4, 4, generator=seeded())
    assert float(field_mse(2 * field - 1, field)) == pytest.approx(0, abs=1e-12)
    assert float(field_mse(2 * (field + 0.1) - 1, field)) == pytest.approx(0.01, rel=1e-4)


def test_coarse_crops_follow_fine_ones():
    image = torch.randn(1, 1, 16, 16, 16, generator=seeded())
    pooled = torch.nn.functional.avg_pool3d(image, 2)
    part = crop_coarse(Coarse(pooled, pooled, pooled), (4, 0, 8), 8)
    fine = central(image, (4, 0, 8), 8)
    torch.testing.assert_close(part.logits, torch.nn.functional.avg_pool3d(fine, 2))


def test_a_seed_decides_a_patch(toy_sample, mirror):
    a, b, c = (draw_patch(toy_sample, 32, mirror, AugmentConfig(), seeded(s)) for s in (3, 3, 4))
    for name in ("image", "classes", "field"):
        assert torch.equal(getattr(a, name), getattr(b, name))
        assert not torch.equal(getattr(a, name), getattr(c, name))
    assert a.image.shape == (1, 1, 32, 32, 32)
    assert a.classes.shape == (1, 32, 32, 32)
    assert a.field.shape == (1, 3, 16, 16, 16)
    assert 0 <= a.image.min() <= a.image.max() <= 1


@pytest.mark.parametrize("seed", range(3))
def test_without_augmentation_a_patch_is_a_piece_of_the_scan(ramp, mirror, seed):
    """Voxel by voxel, at the place that the field tells."""
    patch = draw_patch(ramp, 16, mirror, PLAIN, seeded(seed))
    # Cell 4 of the half-size field is the centre of voxels 8 and 9.
    start = patch.field[0, :, 4, 4, 4].numpy() * ramp.classes.shape - 8.5
    np.testing.assert_allclose(start, start.round(), atol=1e-3)
    i, j, k = (slice(int(n), int(n) + 16) for n in start.round())
    np.testing.assert_allclose(patch.image[0, 0], ramp.image[i, j, k] / 255, atol=1e-3)
    np.testing.assert_array_equal(patch.classes[0], ramp.classes[i, j, k])


def test_augmentation_can_be_off(toy_sample, mirror):
    patch = draw_patch(toy_sample, 32, mirror, PLAIN, seeded())
    again = draw_patch(
        toy_sample, 32, mirror, replace(PLAIN, deform=1.0, rotation_deg=10.0), seeded()
    )
    assert not torch.equal(patch.image, again.image)
    assert torch.equal(recolour(patch.image[0, 0], 0.0, seeded()), patch.image[0, 0])


def flips(sample, mirror, seed):
    """The same patch straight and flipped."""
    return (
        draw_patch(sample, 32, mirror, replace(PLAIN, flip=chance), seeded(seed))
        for chance in (0.0, 1.0)
    )


def test_flipping_moves_image_classes_and_field_together(ramp, mirror):
    straight, flipped = flips(ramp, mirror, 5)
    torch.testing.assert_close(flipped.image, straight.image.flip(2))
    torch.testing.assert_close(flipped.classes, mirror[straight.classes.flip(1)])
    back = flipped.field.flip(2)
    torch.testing.assert_close(1 - back[:, 0], straight.field[:, 0])
    torch.testing.assert_close(back[:, 1:], straight.field[:, 1:])
    # D_x still grows from left to right.
    assert (flipped.field[0, 0].diff(dim=0)[4:-4] > 0).all()


def test_the_field_moves_with_the_image(toy_sample, mirror):
    """However a patch is turned, the phantom's own prior still finds its labels."""
    config = AugmentConfig(0.5, 1.0, 25.0, 0.1, 0, 24, 0, 0)
    for seed in range(4):
        patch = draw_patch(toy_sample, 32, mirror, config, seeded(seed))
        left = torch.isin(patch.classes, torch.tensor([1, 2, 3, 7, 9]))
        right = torch.isin(patch.classes, mirror[torch.tensor([1, 2, 3, 7, 9])])
        x = torch.nn.functional.interpolate(patch.field[:, :1], scale_factor=2, mode="trilinear")
        assert (x[0][left] < 0.515).all()
        assert (x[0][right] > 0.485).all()


def test_recolouring_stays_in_range_and_in_the_brain():
    image = torch.rand(24, 24, 24, generator=seeded()) * (torch.arange(24) > 8)
    changed = 0
    for seed in range(6):
        out = recolour(image, 1.0, seeded(seed))
        assert 0 <= out.min() <= out.max() <= 1
        assert (out[image == 0] == 0).all()
        torch.testing.assert_close(out, recolour(image, 1.0, seeded(seed)), rtol=0, atol=0)
        changed += not torch.equal(out, image)
    assert changed > 3


def test_the_prior_is_symmetric_and_normalised(toy_sample, table, mirror):
    prior = count_prior([toy_sample], table, (12, 14, 12))
    assert prior.shape == (1, 41, 12, 14, 12)
    total = prior.logsumexp(dim=1)
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-4)
    torch.testing.assert_close(prior[:, mirror].flip(2), prior, rtol=0, atol=1e-4)
    # The AC lies in white matter, on the left just left of it.
    assert int(prior[0, :, 3, 8, 5].argmax()) in (1, 2)
    assert int(prior[0, :, 0, 0, 0].argmax()) == 0


def test_the_rate_is_a_trapezoid():
    config = TrainConfig(steps=100, warmup=10, decay=20)
    factors = [rate_factor(step, config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:81] == [1] * 72
    assert factors[90] == pytest.approx(0.5)
    assert factors[100] == 0
    assert (np.diff(factors[:10]) > 0).all()
    assert (np.diff(factors[80:]) < 0).all()


@pytest.fixture
def start(tiny_config, toy_sample, table):
    """A factory of equal fresh states."""
    prior = count_prior([toy_sample], table, tiny_config.prior_shape)

    def make(config=QUICK):
        torch.manual_seed(0)
        state = new_state(CADiffNet(tiny_config), config)
        for net in (state.net, state.ema):
            net.prior.logits.copy_(prior)
        return state

    return make


def assert_equal(a, b):
    for one, other in ((a.net, b.net), (a.ema, b.ema)):
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key


def test_a_resumed_run_is_the_uninterrupted_one(start, toy_sample, mirror, tmp_path, monkeypatch):
    straight = start()
    fit(straight, [toy_sample], mirror, QUICK, tmp_path / "a.pt")

    def interrupt(state, config):
        """What Ctrl-C does, at a known step."""
        update_ema(state, config)
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    first = start()
    with monkeypatch.context() as patch:
        patch.setattr("cadiff_cli.training.loop.update_ema", interrupt)
        fit(first, [toy_sample], mirror, QUICK, tmp_path / "b.pt")
    assert first.step == 3
    second = start()
    load_checkpoint(tmp_path / "b.pt", second)
    assert second.step == 3
    fit(second, [toy_sample], mirror, QUICK, tmp_path / "b.pt")
    assert second.step == straight.step == 6
    assert_equal(straight, second)


def test_signals_are_given_back(start, toy_sample, mirror, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fit(start(), [toy_sample], mirror, replace(QUICK, steps=1), tmp_path / "a.pt")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_minutes_run_out(start, toy_sample, mirror, tmp_path):
    state = start()
    fit(state, [toy_sample], mirror, QUICK, tmp_path / "a.pt", max_minutes=0)
    assert state.step < QUICK.steps
    assert (tmp_path / "a.pt").exists()


def test_checkpoints_are_replaced_whole(start, tmp_path):
    state = start()
    save_checkpoint(tmp_path / "a.pt", state, QUICK)
    with torch.no_grad():
        state.net.stem.weight.add_(1)
    state.step = 7
    save_checkpoint(tmp_path / "a.pt", state, QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    back = start()
    load_checkpoint(tmp_path / "a.pt", back)
    assert back.step == 7
    assert_equal(state, back)


@pytest.mark.slow
def test_training_lowers_the_loss(start, toy_sample, mirror, tmp_path, caplog):
    """From a flat prior: on one small head, a couple of dozen steps is enough to see it."""
    config = replace(QUICK, steps=24, warmup=1, decay=1, rate=1e-2)
    state = start(config)
    state.net.prior.logits.zero_()
    with caplog.at_level("INFO", logger="cadiff_cli.training.loop"):
        fit(state, [toy_sample], mirror, config, tmp_path / "a.pt", report_every=8)
    losses = [record.args[2] for record in caplog.records if "loss" in record.msg]
    assert len(losses) == 3
    assert losses[-1] < 0.8 * losses[0]


def write_cache(sample, folder, name="sub-toy", subject="toy"):
    folder.mkdir(exist_ok=True)
    fields = {f"field_{key}": value for key, value in sample.fields.items()}
    np.savez_compressed(
        folder / f"{name}.npz",
        name=name,
        subject=subject,
        image=sample.image,
        classes=sample.classes,
        **fields,
    )


def test_a_cache_is_read_back(toy_sample, tmp_path):
    write_cache(toy_sample, tmp_path)
    back = cache.load(tmp_path / "sub-toy.npz")
    assert (back.name, back.subject) == ("sub-toy", "toy")
    np.testing.assert_array_equal(back.image, toy_sample.image)
    np.testing.assert_array_equal(back.classes, toy_sample.classes)
    np.testing.assert_array_equal(back.fields["toy"], toy_sample.fields["toy"])


def test_a_sample_is_built_as_inference_would(
    phantom, toy_template, identity, table, monkeypatch, tmp_path
):
    """From files to a sample; registration alone is taken on trust."""
    from cadiff_cli.io.bids import LabelledScan
    from cadiff_cli.io.nifti import save_volume

    head = phantom("LPS", 1.0, scale=0.8)
    paths = [tmp_path / "sub-1_T1w.nii.gz", tmp_path / "sub-1_dseg.nii.gz"]
    for path, data in zip(paths, (head.t1.data, head.codes), strict=True):
        save_volume(path, data, head.t1.grid)
    template = toy_template(scale=0.8, spacing=8.0)
    monkeypatch.setattr(cache, "load_template", lambda name, offline: template)
    monkeypatch.setattr(cache, "register", lambda s, t, c, w: identity(t))
    scan = LabelledScan("sub-1", "1", *paths)
    sample = cache.load(
        cache.build(scan, ["toy"], table, table.identity_mapping(), tmp_path / "cache")
    )
    relabelled = cache.cached_path(scan, ["toy"], {10: 1}, tmp_path)
    assert relabelled.name != cache.cached_path(scan, ["toy"], {10: 2}, tmp_path).name
    for code in (2, 41, 3, 42, 10):
        k = int(np.flatnonzero(table.codes == code)[0])
        assert np.count_nonzero(sample.classes == k) == np.count_nonzero(head.codes == code)
    left = np.argwhere(np.isin(sample.classes, [1, 2]))
    cells = sample.fields["toy"][0][tuple((left // 4).T)]
    assert (cells < 0.52).all()
    assert ((sample.image > 0) <= (sample.classes > 0)).all()


TRAINER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import conftest
from test_training import QUICK
from dataclasses import replace
from cadiff_cli.training import cache, loop, run
loop.fit.__kwdefaults__["save_minutes"] = 0.0
samples = [cache.load(Path({cache!r}) / "sub-toy.npz")]
config = replace(QUICK, steps=int(sys.argv[1]))
print("ready", flush=True)
run.train(samples, Path({run!r}), config, net_config=conftest.TINY)
"""


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_same_command(toy_sample, tmp_path, tiny_config):
    """SIGKILL, which no program can prepare for, then the same command again."""
    write_cache(toy_sample, tmp_path / "cache")
    run = tmp_path / "run"
    program = TRAINER.format(
        tests=os.path.dirname(__file__), cache=str(tmp_path / "cache"), run=str(run)
    )
    checkpoint = run / "checkpoint.pt"

    def command(steps):
        return [sys.executable, "-c", program, str(steps)]

    with subprocess.Popen(command(100_000), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
            assert process.poll() is None
        time.sleep(0.5)  # somewhere inside a step or a save
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "model.safetensors").exists()
    done = torch.load(checkpoint, weights_only=True)["step"]
    assert done >= 1
    subprocess.run(command(done + 3), check=True, stdout=subprocess.DEVNULL, timeout=60)
    assert torch.load(checkpoint, weights_only=True)["step"] == done + 3
    model = load_model(str(run / "model.safetensors"))
    assert model.metadata["training"]["steps"] == done + 3
    assert model.net.config == tiny_config


def test_held_out_people_are_not_trained_on(toy_sample, tmp_path, tiny_config):
    other = replace(toy_sample, name="sub-other", subject="other")
    config = replace(QUICK, steps=1)
    path = train([toy_sample, other], tmp_path, config, hold_out=["other"], net_config=tiny_config)
    described = load_model(str(path)).metadata["training"]
    assert described["trained_on"] == ["toy"]
    assert described["held_out"] == ["other"]
    with pytest.raises(UsageError, match="trained_on"):  # the checkpoint knows whom it has seen
        train([toy_sample, other], tmp_path, config, net_config=tiny_config)
    for hold_out in (["nobody"], ["toy", "other"]):
        with pytest.raises(UsageError):
            train([toy_sample, other], tmp_path, config, hold_out=hold_out)


def test_label_mappings(table, tmp_path):
    path = tmp_path / "map.tsv"
    path.write_text("source\tindex\n1\t10\n2\t49\n3\t0\n")
    classes = label_mapping(str(path), table)
    assert {source: int(table.codes[k]) for source, k in classes.items()} == {1: 10, 2: 49, 3: 0}
    assert label_mapping("cadiff", table)[10] == classes[1]
    assert label_mapping("neuromorphometrics", table)[60] == classes[1]
    path.write_text("source\tindex\n1\t1999\n")
    with pytest.raises(DataError, match="1999"):
        label_mapping(str(path), table)
    path.write_text("from\tto\n1\t2\n")
    with pytest.raises(DataError, match="mapping"):
        label_mapping(str(path), table)
    with pytest.raises(MissingInputError):
        label_mapping("no-such-mapping", table)
