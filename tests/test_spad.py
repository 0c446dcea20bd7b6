"""SPAD: what is perturbed, by how much, when; and a training that is otherwise as it was."""

import json
import math
import tomllib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import NO_CHANGE, TINY, awake, seeded
from scipy import ndimage
from test_objective import METHODS, net_of, objective_of
from test_training import Recorder

from cadiff_cli.config import SampleConfig
from cadiff_cli.errors import UsageError
from cadiff_cli.io import models
from cadiff_cli.nets.models import Model
from cadiff_cli.nets.segmenter import CADiffNet
from cadiff_cli.training import loop
from cadiff_cli.training.batch import stack
from cadiff_cli.training.monitor import RunMonitor, middle_slices, shown
from cadiff_cli.training.segmenter.config import TrainConfig, load
from cadiff_cli.training.segmenter.losses import Losses
from cadiff_cli.training.segmenter.objective import SegmenterObjective, Times
from cadiff_cli.training.segmenter.patches import Draws, draw_patch
from cadiff_cli.training.segmenter.run import train
from cadiff_cli.training.segmenter.spad import (
    BorderNoise,
    Perturbed,
    Progress,
    Spad,
    TargetNoise,
    chosen,
    near_change,
)
from cadiff_cli.training.settings import CONFIGS

SIZE = 48
QUICK = TrainConfig(steps=3, warmup=1, decay=1, patch=64, objective=SegmenterObjective(fine=32))
SPAD = replace(QUICK, spad=Spad())
PARTS = [TargetNoise(), BorderNoise()]
INTENSITIES = [1.0, 0.5, 0.1]
at = torch.tensor


@pytest.fixture(scope="module")
def patch(toy_sample, mirror):
    return draw_patch(toy_sample, SIZE, mirror, NO_CHANGE, seeded())


@pytest.fixture(scope="module")
def image(patch):
    return patch.image[0, 0]


@pytest.fixture(scope="module")
def classes(patch):
    return patch.classes[0]


def flat(value, size=SIZE):
    return torch.full((size,) * 3, value)


@pytest.fixture(scope="module")
def alone():
    """One structure alone: a cube in the middle of nothing."""
    labels = torch.zeros((24,) * 3, dtype=torch.long)
    labels[8:16, 8:16, 8:16] = 5
    return labels


@pytest.mark.parametrize("progress", [Progress(), Progress(until=0.5, power=2.0)], ids=str)
def test_the_intensity_falls_by_its_law_and_vanishes(progress):
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    a = progress.intensity(p)
    assert a[0] == 1
    assert (a.diff() <= 0).all()
    until = round(100 * progress.until)
    assert (a[until:] == 0).all()
    expected = [(1 - i / until) ** progress.power for i in range(until)]
    torch.testing.assert_close(a[:until], torch.tensor(expected, dtype=torch.float64))


def test_progress_is_the_trainings_or_each_members_time():
    t_m = at([1.0, 0.25])
    assert Progress().at(0.3, t_m).tolist() == pytest.approx([0.3, 0.3])
    assert Progress("time").at(0.3, t_m).tolist() == [0, 0.75]


@pytest.mark.parametrize("intensity", INTENSITIES)
def test_only_targets_change_and_anchors_stay_to_the_bit(image, classes, intensity):
    part = TargetNoise(share=0.5)
    after = part(image, classes, intensity, seeded(3))
    generator = seeded(3)
    targets = chosen(classes, 0.5, generator)
    anchors = part.kept(image, intensity, generator)
    changed = after != image
    lost = targets[classes] & ~anchors
    assert not (changed & ~lost).any()
    assert changed[lost].float().mean() > 0.99  # noise may hit the old value
    assert targets.any()
    assert not targets.all()


@pytest.mark.parametrize("intensity", INTENSITIES)
def test_anchors_are_cubes_in_the_promised_share(intensity):
    part = TargetNoise(anchors=0.4, block_mm=5)
    shares = []
    for seed in range(20):
        anchors = part.kept(flat(0.0), intensity, seeded(seed))
        shares.append(float(anchors.float().mean()))
        for axis in range(3):
            others = tuple(a for a in range(3) if a != axis)
            turns = (anchors.diff(dim=axis) != 0).any(dim=others[1]).any(dim=others[0])
            assert len({int(i) % 5 for i in turns.nonzero()}) <= 1
    expected = 1 - 0.6 * intensity
    error = math.sqrt(expected * (1 - expected) / (20 * (SIZE / 5) ** 3))
    assert np.mean(shares) == pytest.approx(expected, abs=5 * error)
    assert part.kept(flat(0.0), 0.0, seeded()).all()


@pytest.mark.parametrize("intensity", INTENSITIES)
def test_a_lost_voxel_is_the_stated_mixture(intensity):
    """Mean and deviation, and with them the expectation of the image."""
    part = TargetNoise(share=1.0, anchors=0.25, weight=0.8, sd=0.2)
    before = flat(0.9)
    after = part(before, torch.ones(before.shape, dtype=torch.long), intensity, seeded(1))
    changed = after[after != before]
    w = 0.8 * intensity
    assert float(changed.mean()) == pytest.approx((1 - w) * 0.9 + w * 0.5, abs=0.004)
    assert float(changed.std()) == pytest.approx(w * 0.2, rel=0.02)
    lost = 0.75 * intensity
    assert float(after.mean()) == pytest.approx(0.9 + lost * w * (0.5 - 0.9), abs=0.01)


@pytest.mark.parametrize("radius", [1, 1.3, 1.5, 2, 3, 4])
def test_the_band_is_where_the_next_label_is_near(classes, radius):
    """Compared with the distance transform of every class by itself."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 4, (5, 6, 4)).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    for labels in (classes.numpy(), coarse):
        distance = np.zeros(labels.shape)
        for k in np.unique(labels):
            inside = labels == k
            distance[inside] = ndimage.distance_transform_edt(inside)[inside]
        near = near_change(torch.from_numpy(labels), radius).numpy()
        np.testing.assert_array_equal(near, distance <= radius)
        assert near.any()


@pytest.mark.parametrize("intensity", INTENSITIES)
def test_borders_are_blurred_without_bias(intensity):
    """Two halves: the band has its width, the noise its size, and its mean is the image."""
    labels = torch.ones((SIZE,) * 3, dtype=torch.long)
    labels[SIZE // 2 :] = 2
    part = BorderNoise(radius_mm=4.0, sd=0.2)
    before = flat(0.6)
    noise = torch.stack([part(before, labels, intensity, seeded(s)) - before for s in range(4)])
    touched = noise.any(dim=0).flatten(1).any(dim=1).nonzero()[:, 0]
    width = int(1 + 3 * intensity)
    assert touched.tolist() == list(range(SIZE // 2 - width, SIZE // 2 + width))
    band = noise[:, touched]
    assert float(band.std()) == pytest.approx(0.2 * intensity, rel=0.03)
    assert abs(float(band.mean())) < 5 * 0.2 * intensity / band.numel() ** 0.5


def test_only_borders_of_chosen_structures_are_blurred(image, classes):
    after = BorderNoise(share=0.3)(image, classes, 1.0, seeded(2))
    mine = chosen(classes, 0.3, seeded(2))[classes]
    band = near_change(torch.where(mine, classes, 0), 3)
    assert torch.equal(after != image, band)
    assert 0 < int(band.sum()) < int(near_change(classes, 3).sum())


def test_left_and_right_are_chosen_by_themselves(parcellation, mirror):
    left = int(np.flatnonzero(parcellation.codes == 17)[0])
    right = int(mirror[left])
    assert right != left
    labels = torch.arange(41)
    draws = torch.stack([chosen(labels, 0.4, seeded(s)) for s in range(2000)])
    one, other = draws[:, left].float(), draws[:, right].float()
    assert float(one.mean()) == pytest.approx(0.4, abs=0.05)
    assert float((one * other).mean()) == pytest.approx(0.16, abs=0.04)
    assert not draws[:, 0].any()


def test_one_structure_alone_is_found(alone):
    before = flat(0.5, 24)
    lost = TargetNoise(share=1.0, anchors=0.0)(before, alone, 1.0, seeded()) != before
    assert torch.equal(lost, alone > 0)
    blurred = BorderNoise(radius_mm=2.0)(before, alone, 1.0, seeded()) != before
    inside = alone.numpy() > 0
    distance = np.where(inside, *(ndimage.distance_transform_edt(m) for m in (inside, ~inside)))
    np.testing.assert_array_equal(blurred.numpy(), distance <= 2)


@pytest.mark.parametrize("part", [*PARTS, TargetNoise(share=0.0), BorderNoise(share=0.0)], ids=str)
def test_without_structures_nothing_happens(part, image, classes):
    labels = classes if part.share == 0 else torch.zeros_like(classes)
    assert torch.equal(part(image, labels, 1.0, seeded()), image)


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_noise_falls_with_the_intensity(part, image, classes):
    changes = [(part(image, classes, a, seeded()) - image).square().mean() for a in (1, 0.6, 0.2)]
    assert changes[0] > changes[1] > changes[2] > 0


def test_parts_compose(patch):
    """Targets first, borders last, each as it would be alone with the same draws."""
    both = Spad()
    image, labels = patch.image[0, 0], patch.classes[0]
    generator = seeded(4)
    first = both.targets(image, labels, 0.5, generator)
    expected = both.borders(first, labels, 0.5, generator)
    seen = both(patch.image, patch.classes, at([0.4]), seeded(4))
    assert torch.equal(seen[0, 0], expected)
    for alone in (Spad(borders=None), Spad(targets=None)):
        part = alone.targets or alone.borders
        seen = alone(patch.image, patch.classes, at([0.4]), seeded(4))
        assert torch.equal(seen[0, 0], part(image, labels, 0.5, seeded(4)))


def test_members_of_a_batch_have_a_progress_of_their_own(patch):
    two = stack([patch, patch])
    seen = Spad()(two.image, two.classes, at([0.0, 0.8]), seeded())
    assert seen.shape == two.image.shape
    assert torch.equal(seen[1], patch.image[0])
    assert not torch.equal(seen[0], patch.image[0])
    assert seen.dtype == two.image.dtype


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Progress("space"),
        lambda: Progress(until=0.0),
        lambda: Progress(power=0.0),
        lambda: TargetNoise(share=1.5),
        lambda: TargetNoise(block_mm=0),
        lambda: BorderNoise(radius_mm=0.5),
        lambda: BorderNoise(sd=-1.0),
        lambda: Spad(None, None),
    ],
)
def test_senseless_settings_are_usage_errors(wrong):
    with pytest.raises(UsageError) as caught:
        wrong()
    assert caught.value.remedy


def test_the_shipped_configs_are_the_parts():
    assert load("spad").train == replace(load("cadiff").train, spad=Spad())
    named = tomllib.loads((CONFIGS / "spad.toml").read_text())["train"]["spad"]
    assert named == json.loads(json.dumps(asdict(Spad())))
    assert load("spad-targets").train.spad == Spad(borders=None)
    assert load("spad-borders").train.spad == Spad(targets=None)
    assert load("spad-time").train.spad == Spad(progress=Progress("time"))


# In a training.


def step_of(objective, net, patch, monkeypatch, progress=0.0, seed=0):
    """Losses of a step, the images that the network was shown, and all else that it was."""
    images, rest = [], []
    trunk = net.trunk

    def watched(image, *others):
        images.append(image)
        rest.extend(others)
        return trunk(image, *others)

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(net, "trunk", watched)
        losses = objective(net, patch, seeded(seed), progress)
    return losses, images, rest


def test_only_the_image_of_a_step_changes(patch, monkeypatch):
    """Same times, same states, same cube; recycling is shown what the step is."""
    net = net_of("cadiff")
    plain = objective_of("cadiff", recycle=0.0, times=Times(0.0, 0.0, 0.0))
    _, (clean,), rest = step_of(plain, net, patch, monkeypatch)
    losses, (seen,), same = step_of(Perturbed(plain, Spad()), net, patch, monkeypatch)
    assert torch.equal(clean, patch.image)
    assert not torch.equal(seen, clean)
    assert all(torch.equal(a, b) for a, b in zip(rest, same, strict=True))
    assert losses.total.isfinite()
    _, (again,), _ = step_of(Perturbed(plain, Spad()), net, patch, monkeypatch)
    assert torch.equal(again, seen)
    _, (other,), _ = step_of(Perturbed(plain, Spad()), net, patch, monkeypatch, seed=1)
    assert not torch.equal(other, seen)
    recycled = replace(plain, recycle=1.0)
    _, (first, second), _ = step_of(Perturbed(recycled, Spad()), net, patch, monkeypatch)
    assert torch.equal(first, second)


def test_at_the_end_a_step_is_the_plain_one(patch, monkeypatch):
    net, plain = net_of("cadiff"), objective_of("cadiff")
    expected = plain(net, patch, seeded(5))
    losses, *_ = step_of(Perturbed(plain, Spad()), net, patch, monkeypatch, progress=1.0, seed=5)
    assert torch.equal(losses.total, expected.total)


def test_by_time_the_cleanest_states_see_the_cleanest_image(patch, monkeypatch):
    net, spad = net_of("cadiff"), Spad(progress=Progress("time", until=1.0))
    for known, t in ((Times(1.0, 0.0, 1.0), 1.0), (Times(1.0, 0.0, 0.0), None)):
        objective = Perturbed(objective_of("cadiff", times=known, recycle=0.0), spad)
        _, (seen,), (*_, t_m) = step_of(objective, net, patch, monkeypatch, progress=0.9)
        assert t is None or float(t_m) == t
        own = torch.Generator().manual_seed(seeded().initial_seed() + 2_500_003)
        assert torch.equal(seen, spad(patch.image, patch.classes, 1 - t_m, own))


@pytest.mark.parametrize(
    ("name", "of"),
    [*((name, "training") for name in METHODS), ("cadiff", "time"), ("unet", "time")],
)
def test_it_works_with_every_method(name, of, patch, monkeypatch):
    net, objective = net_of(name), objective_of(name)
    perturbed = Perturbed(objective, Spad(progress=Progress(of)))
    losses, images, _ = step_of(perturbed, net, patch, monkeypatch, seed=1)
    assert losses.total.isfinite()
    assert not torch.equal(images[-1], patch.image)


def test_progress_runs_from_the_first_step_to_the_last(toy_sample, mirror, tmp_path):
    seen = []

    def objective(net, _batch, _generator, progress):
        seen.append(progress)
        nothing = torch.zeros(())
        size = sum(p.square().sum() for p in net.parameters())
        return Losses(label=size, coarse=nothing, field=nothing, consistency=nothing)

    state = loop.new_state(CADiffNet(TINY), QUICK)
    draws = Draws([toy_sample], 32, mirror, NO_CHANGE, QUICK.seed)
    batches = loop.series(draws, QUICK, 0, 0, torch.device("cpu"))
    loop.fit(state, batches, objective, QUICK, tmp_path / "checkpoint.pt")
    assert seen == [0, 0.5, 1]
    assert loop.progress_at(0, replace(QUICK, steps=1)) == 0


def test_a_resumed_run_is_the_uninterrupted_one(toy_sample, mirror, tmp_path):
    def run(name, stop_after=None, go_on=False):
        path = tmp_path / name
        torch.manual_seed(0)
        state = loop.new_state(CADiffNet(TINY), SPAD)
        if go_on:
            loop.load_checkpoint(path, state, SPAD)
        draws = Draws([toy_sample], SPAD.patch, mirror, SPAD.augment, SPAD.seed)
        batches = loop.series(draws, SPAD, state.step, 0, state.device)
        loop.fit(state, batches, SPAD.minimised, SPAD, path, monitor=Recorder(stop_after))
        return state

    straight, stopped = run("straight"), run("stopped", 1)
    assert stopped.step == 1
    resumed = run("stopped", go_on=True)
    assert resumed.step == straight.step == 3
    for a, b in zip(straight.net.parameters(), resumed.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_remembers_its_perturbation(toy_sample, tmp_path, tiny_config):
    """One of before there was any goes on without; scans trusted less are perturbed too."""
    config = replace(QUICK, steps=1, also_share=0.5)
    options = {"also": [replace(toy_sample, subject="other")], "net_config": tiny_config}
    train([toy_sample], tmp_path / "old", config, **options)
    path = tmp_path / "old" / "config.json"
    run = json.loads(path.read_text())
    del run["train"]["spad"]
    path.write_text(json.dumps(run))
    train([toy_sample], tmp_path / "old", config, **options)
    with pytest.raises(UsageError, match="spad"):
        train([toy_sample], tmp_path / "old", replace(config, spad=Spad()), **options)
    path = train([toy_sample], tmp_path / "new", replace(config, spad=Spad()), **options)
    described = models.load(Model, str(path)).training["train"]
    assert described["spad"] == json.loads(json.dumps(asdict(Spad())))


def test_a_picture_shows_what_is_shown(toy_sample, parcellation, tmp_path):
    """Five rows, from much noise to the scan as it is."""
    picture = shown(toy_sample, Spad())
    scan = middle_slices(toy_sample.image)
    rows = picture.reshape(5, *scan.shape).astype(float)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(rows[-1], scan)
    far = [np.square(row - scan).mean() for row in rows]
    assert far == sorted(far, reverse=True)
    assert far[3] > 0
    state = loop.new_state(awake(TINY), QUICK)
    monitor = RunMonitor(
        tmp_path, [toy_sample], parcellation, sampling=SampleConfig(1, flip=False), spad=Spad()
    )
    monitor.validate(state)
    monitor.close()
    names = {path.name for path in (tmp_path / "validation").iterdir()}
    assert names == {"000000_sub-toy.png", "000000_sub-toy_shown.png"}
