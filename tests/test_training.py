"""Training: a step decided by its seed, and going on after a kill as if nothing happened."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import NO_CHANGE, TINY, make_conditions, seeded
from torch import nn

from cadiff_cli.cli.train import command
from cadiff_cli.diffusion.process import PROCESSES, Cosine, Gaussian
from cadiff_cli.errors import (
    CadiffError,
    DataError,
    DiskError,
    MissingInputError,
    OutputError,
    UsageError,
)
from cadiff_cli.io import models
from cadiff_cli.io.bids.labelled import LabelledScan
from cadiff_cli.io.images import save_volume
from cadiff_cli.io.models import PRIOR_STEP
from cadiff_cli.labels.parcellation import BASE
from cadiff_cli.labels.schemes import load_scheme
from cadiff_cli.nets.models import Model
from cadiff_cli.nets.segmenter import CADiffNet, NetConfig
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import pool, resample
from cadiff_cli.stages import register as stages_register
from cadiff_cli.training import loop, store
from cadiff_cli.training.batch import stack
from cadiff_cli.training.loop import (
    load_checkpoint,
    new_state,
    rate_factor,
    save_checkpoint,
    train_step,
    update_ema,
)
from cadiff_cli.training.segmenter import data
from cadiff_cli.training.segmenter.config import TrainConfig, load
from cadiff_cli.training.segmenter.data import Sample
from cadiff_cli.training.segmenter.losses import Losses
from cadiff_cli.training.segmenter.objective import SegmenterObjective, Times
from cadiff_cli.training.segmenter.patches import AugmentConfig, Draws, draw_patch
from cadiff_cli.training.segmenter.prior import count_prior
from cadiff_cli.training.segmenter.run import train
from cadiff_cli.training.session import Identity, refuse_other_run
from cadiff_cli.training.templates import load_training_template

CPU = torch.device("cpu")
PATIENCE_S = 300.0
"""What another process may take on a busy machine."""
QUICK = TrainConfig(steps=6, warmup=2, decay=2, patch=64, objective=SegmenterObjective(fine=32))


def fit(state, samples, mirror, config, path, workers=0, **options):
    draws = Draws(samples, config.patch, mirror, config.augment, config.seed)
    batches = loop.series(draws, config, state.step, workers, state.device)
    loop.fit(state, batches, config.objective, config, path, **options)


class Recorder:
    """A monitor that remembers everything, and presses Ctrl-C after a step if it is told to."""

    def __init__(self, stop_after=None):
        self.reports, self.steps, self.stop_after = {}, [], stop_after

    def interval(self, step, report):
        self.reports[step] = report

    def step_done(self, state):
        self.steps.append(state.step)
        if state.step == self.stop_after:
            os.kill(os.getpid(), signal.SIGINT)


def test_the_prior_is_symmetric_and_normalised(toy_sample, parcellation, mirror):
    prior = count_prior([toy_sample], parcellation, (12, 14, 12))
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


@pytest.mark.parametrize("wrong", [{"patch": 32}, {"patch": 80}, {"batch": 0}], ids=str)
def test_senseless_settings_are_usage_errors(wrong):
    with pytest.raises(UsageError) as caught:
        TrainConfig(**wrong)
    assert caught.value.remedy


@pytest.fixture(scope="module")
def start(toy_sample, parcellation):
    """A factory of equal fresh states."""
    prior = count_prior([toy_sample], parcellation, TINY.prior_shape)

    def make(config=QUICK):
        torch.manual_seed(0)
        state = new_state(CADiffNet(TINY), config)
        for net in (state.net, state.ema):
            net.prior.logits.copy_(prior)
        return state

    return make


@pytest.fixture(scope="module")
def straight(start, toy_sample, mirror, tmp_path_factory):
    """An uninterrupted run that reports every step: its end and its record."""
    state, record = start(), Recorder()
    path = tmp_path_factory.mktemp("straight") / "a.pt"
    fit(state, [toy_sample], mirror, QUICK, path, monitor=record, report_every=1)
    return state, record


def assert_equal(a, b):
    for one, other in ((a.net, b.net), (a.ema, b.ema)):
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key


def test_the_loader_goes_on_where_the_run_stands(toy_sample, mirror):
    """Step n's batch is the same whether the loader began with it or before it."""
    config = replace(QUICK, steps=4, batch=2)
    draws = Draws([toy_sample], config.patch, mirror, config.augment, config.seed)
    batches = list(loop.series(draws, config, 2, 0, CPU))
    assert len(batches) == 2
    for step, batch in enumerate(batches, start=2):
        expected = stack([draws[2 * step], draws[2 * step + 1]])
        assert torch.equal(batch.image, expected.image)
        assert torch.equal(batch.field, expected.field)


def test_what_a_network_counts_is_exported():
    """A batch norm's mean is no parameter, and its average would forget it."""
    state = new_state(nn.BatchNorm3d(1), QUICK)
    state.net(torch.full((1, 1, 2, 2, 2), 3.0))
    update_ema(state, QUICK)
    assert state.ema.num_batches_tracked == 1
    assert torch.equal(state.ema.running_mean, state.net.running_mean)
    assert state.ema.running_mean != 0


def test_a_step_is_a_function_of_its_seed_and_number(start, toy_sample, mirror):
    patch = draw_patch(toy_sample, 64, mirror, AugmentConfig(), seeded())

    def stepped(seed, step):
        state = start()
        state.step = step
        losses = train_step(state, patch, QUICK.objective, replace(QUICK, seed=seed))
        assert state.step == step + 1
        return state, losses.total.detach()

    (one, loss), (two, same) = (stepped(0, 1) for _ in range(2))
    assert_equal(one, two)
    assert torch.equal(loss, same)
    others = [stepped(*which)[1] for which in ((1, 1), (0, 2))]
    assert len({float(x) for x in (loss, *others)}) == 3


def test_a_patch_says_nothing_about_its_steps_times(start, ramp, mirror):
    """Both follow from seed and step, and yet a deformed patch must not mean pure noise."""
    pure = []

    def witness(net, patch, generator, _progress):
        """Draws the times as a step does, and leaves the network alone."""
        _, t_m = Times(pure_noise=0.5).draw(len(patch.image), generator)
        pure.append(bool(t_m == 1))
        nothing = 0 * net.stem.bias.sum()
        return Losses(nothing, nothing, nothing, nothing)

    config = replace(QUICK, objective=witness)
    draws = Draws([ramp], 16, mirror, replace(NO_CHANGE, deform=0.5), config.seed)
    state, deformed = start(config), []
    for step in range(64):
        patch = draws[step]
        levels = 255 * patch.image
        deformed.append(not torch.allclose(levels, levels.round(), atol=0.1))
        train_step(state, patch, config.objective, config)
    together = [a == b for a, b in zip(deformed, pure, strict=True)]
    for share in (deformed, pure, together):
        assert 16 < sum(share) < 48


@pytest.fixture(scope="module")
def resumed(start, toy_sample, mirror, tmp_path_factory):
    """The same run stopped after step 3 and continued, reporting every second step."""
    path = tmp_path_factory.mktemp("resumed") / "a.pt"
    first, second = start(), start()
    before, after = Recorder(stop_after=3), Recorder()
    fit(first, [toy_sample], mirror, QUICK, path, monitor=before, report_every=2)
    load_checkpoint(path, second, QUICK)
    assert first.step == second.step == 3
    fit(second, [toy_sample], mirror, QUICK, path, monitor=after, report_every=2)
    return second, before, after


def test_a_resumed_run_is_the_uninterrupted_one(straight, resumed):
    (expected, _), (state, before, after) = straight, resumed
    assert state.step == expected.step == 6
    assert_equal(expected, state)
    assert (before.steps, after.steps) == ([1, 2, 3], [4, 5, 6])


def test_a_monitor_hears_of_every_step(straight):
    _, record = straight
    assert record.steps == list(record.reports) == [1, 2, 3, 4, 5, 6]
    for step, report in record.reports.items():
        parts = {k: v for k, v in report.losses.items() if k != "total"}
        assert report.losses["total"] == pytest.approx(sum(parts.values()), rel=1e-5)
        assert set(parts) == {"label", "coarse", "field", "consistency"}
        assert report.rate == pytest.approx(QUICK.rate * rate_factor(step, QUICK))
        assert report.seconds_per_step > 0
        assert 0 < report.data_share < 1


def test_reports_are_means_also_after_a_stop(straight, resumed):
    """Of the steps since the last report, or since the run went on."""
    (_, record), (_, before, after) = straight, resumed
    total = {step: report.losses["total"] for step, report in record.reports.items()}
    reports = before.reports | after.reports
    expected = {2: (total[1] + total[2]) / 2, 4: total[4], 6: (total[5] + total[6]) / 2}
    assert {step: r.losses["total"] for step, r in reports.items()} == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # with one core
def test_workers_change_nothing(start, toy_sample, mirror, tmp_path):
    config = replace(QUICK, steps=1, batch=2)
    states = []
    for workers in (0, 2):
        states.append(start())
        fit(states[-1], [toy_sample], mirror, config, tmp_path / "a.pt", workers=workers)
        assert states[-1].step == 1
    assert_equal(*states)


def test_a_step_that_is_no_number_ends_the_run_and_spoils_nothing(
    start, toy_sample, mirror, tmp_path
):
    state = start()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (state.net, state.ema)]
    broken = replace(toy_sample, fields={k: v * np.nan for k, v in toy_sample.fields.items()})
    with pytest.raises(CadiffError, match="gradient of step 0"):
        fit(state, [broken], mirror, QUICK, tmp_path / "a.pt")
    for model, was in zip((state.net, state.ema), before, strict=True):
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, was[key], rtol=0, atol=0)
    assert not (tmp_path / "a.pt").exists()


def test_signals_are_given_back(start, toy_sample, mirror, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fit(start(), [toy_sample], mirror, replace(QUICK, steps=1), tmp_path / "a.pt")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_minutes_run_out(start, toy_sample, mirror, tmp_path):
    state = start()
    fit(state, [toy_sample], mirror, QUICK, tmp_path / "a.pt", max_minutes=0)
    assert state.step < QUICK.steps
    assert (tmp_path / "a.pt").exists()


@pytest.mark.parametrize("damage", [b"", b"PK", b"nonsense"])
def test_a_damaged_checkpoint_is_told(start, tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(damage)
    with pytest.raises(DataError, match="is damaged"):
        load_checkpoint(path, start(), QUICK)


@pytest.mark.parametrize("text", ["{", "{}", None])
def test_a_run_that_does_not_say_what_it_is_is_not_gone_on_with(tmp_path, text):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match="does not say"):
        refuse_other_run(path, Identity(net={}, init=None), QUICK, NetConfig())


@pytest.mark.parametrize("kept", [0, 20, 200])
def test_a_damaged_prepared_scan_is_told(tmp_path, kept):
    path = store.once(tmp_path / "x.npz", "x", lambda: {"a": np.arange(999)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="remove it"):
        store.read(path)


def test_checkpoints_are_replaced_whole(start, tmp_path):
    state = start()
    save_checkpoint(tmp_path / "a.pt", state, QUICK)
    with torch.no_grad():
        state.net.stem.weight.add_(1)
    state.step = 5
    save_checkpoint(tmp_path / "a.pt", state, QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    back = start()
    load_checkpoint(tmp_path / "a.pt", back, QUICK)
    assert back.step == 5
    assert_equal(state, back)


@pytest.mark.slow
def test_training_lowers_the_loss(start, toy_sample, mirror, tmp_path):
    """From a flat prior: on one small head, two dozen steps are enough to see it."""
    config = replace(QUICK, steps=25, warmup=1, decay=1, rate=1e-2)
    state, record = start(config), Recorder()
    state.net.prior.logits.zero_()
    fit(state, [toy_sample], mirror, config, tmp_path / "a.pt", monitor=record, report_every=5)
    losses = [report.losses["total"] for report in record.reports.values()]
    assert len(losses) == 5
    assert losses[-1] < 0.8 * losses[0]


def write_cache(sample, folder, name="sub-toy", subject="toy"):
    folder.mkdir(exist_ok=True)
    fields = {f"field_{key}": value for key, value in sample.fields.items()}
    np.savez_compressed(
        folder / f"{name}.npz",
        name=name,
        subject=subject,
        labels=sample.labels,
        drawn=sample.drawn,
        key=sample.key,
        image=sample.image,
        mask=sample.mask,
        classes=sample.classes,
        **fields,
    )


def test_a_cache_is_read_back(toy_sample, tmp_path):
    write_cache(toy_sample, tmp_path)
    back = data.load(tmp_path / "sub-toy.npz")
    assert (back.name, back.subject) == ("sub-toy", "toy")
    for part in ("image", "mask", "classes"):
        np.testing.assert_array_equal(getattr(back, part), getattr(toy_sample, part))
        assert getattr(back, part).dtype == getattr(toy_sample, part).dtype
    assert set(back.fields) == set(toy_sample.fields)
    for name, field in toy_sample.fields.items():
        np.testing.assert_array_equal(back.fields[name], field)


def test_finished_weights_are_not_lost(toy_sample, tmp_path, tiny_config):
    """A checkpoint is large: people delete it, and keep the weights."""
    config = replace(QUICK, steps=1, warmup=1, decay=1)
    weights = train([toy_sample], tmp_path, config, net_config=tiny_config)
    before = weights.read_bytes()
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(OutputError, match="no checkpoint"):
        train([toy_sample], tmp_path, replace(config, seed=5), net_config=tiny_config)
    assert weights.read_bytes() == before


def test_a_run_goes_on_only_with_what_it_began_with(toy_sample, tmp_path, tiny_config):
    """The same files, and no fewer steps than it has done."""
    people = [replace(toy_sample, subject=x, key=x) for x in ("a", "b")]
    run, config = tmp_path / "run", replace(QUICK, steps=2, warmup=1, decay=1)
    train(people, run, config, net_config=tiny_config)
    with pytest.raises(UsageError, match="scan_files"):
        train([people[0], replace(people[1], key="c")], run, config, net_config=tiny_config)
    with pytest.raises(UsageError, match="2 steps already"):
        train(people, run, replace(config, steps=1), net_config=tiny_config)
    changed = [replace(person, contents={"toy": "another"}) for person in people]
    with pytest.raises(UsageError, match="template_contents"):
        train(changed, run, config, net_config=tiny_config)
    # A run of before, which did not write down the content of templates, goes on.
    described = json.loads((run / "config.json").read_text())
    del described["template_contents"]
    (run / "config.json").write_text(json.dumps(described))
    train(changed, run, config, net_config=tiny_config)


def test_samples_know_the_content_of_templates_that_are_not_shipped(
    toy_sample, toy_template, parcellation, monkeypatch, tmp_path
):
    shipped, own = load_training_template("MNI152NLin2009aSym"), toy_template(spacing=8.0)
    monkeypatch.setattr(data, "load_training_template", {"shipped": shipped, "own": own}.get)
    monkeypatch.setattr(data, "build", lambda *_: tmp_path)
    monkeypatch.setattr(data, "load", lambda _: toy_sample)
    scan = LabelledScan("sub-1", "1", tmp_path, tmp_path)
    (sample,) = data.prepare_scans([scan], ["shipped", "own"], parcellation, {}, tmp_path)
    assert sample.contents == {"toy": own.sha256}


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(start, tmp_path, monkeypatch):
    state, path = start(), tmp_path / "a.pt"
    save_checkpoint(path, state, QUICK)
    before = path.read_bytes()

    write = Path.write_bytes

    def full(file, data):
        write(file, data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskError, match="last checkpoint"):
        save_checkpoint(path, state, QUICK)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_structures_that_nobody_drew_are_not_scored(toy_sample, parcellation):
    chosen = parcellation.subset("malc27")
    assert toy_sample.scored(chosen) == chosen
    mapping = {7: 1, 8: 2, 9: 0, 10: -3}
    drawn = tuple(sorted(parcellation.reached(mapping)))
    assert set(drawn) == {1, 2, 3, int(parcellation.mirror_classes[3])}
    assert replace(toy_sample, drawn=drawn).scored((1, 5, 9)) == (1,)


def test_a_sample_is_built_as_inference_would(
    phantom, toy_template, identity, parcellation, lobes, monkeypatch, tmp_path
):
    """From files to a sample; registration alone is taken on trust."""
    head = phantom("LPS", 1.0, scale=0.8)
    paths = [tmp_path / "sub-1_T1w.nii.gz", tmp_path / "sub-1_dseg.nii.gz"]
    for path, voxels in zip(paths, (head.t1.data, head.codes), strict=True):
        save_volume(path, voxels, head.t1.grid)
    template = toy_template(scale=0.8, spacing=8.0)
    monkeypatch.setattr(data, "load_training_template", lambda name: template)
    monkeypatch.setattr(data, "template_key", str)
    monkeypatch.setattr(stages_register, "register_template", lambda s, t, c, w: identity(t))
    scan = LabelledScan("sub-1", "1", *paths)
    sample = data.load(
        data.build(scan, ["toy"], parcellation, parcellation.class_of, tmp_path / "cache")
    )

    def stored_as(mapping, drawn=parcellation):
        return data.sample_path(scan, ["toy"], drawn, mapping, tmp_path)

    relabelled = stored_as({10: 1})
    assert relabelled.name != stored_as({10: 2}).name
    others = (lobes, replace(lobes, structures=lobes.structures[:4]))
    assert len({relabelled, *(stored_as({10: 1}, drawn) for drawn in others)}) == 3
    with monkeypatch.context() as patched:  # another network may find another brain
        patched.setattr(store, "strip_weights_sha256", lambda _: "another")
        assert relabelled != stored_as({10: 1})
    for code in (2, 41, 3, 42, 10):
        k = int(np.flatnonzero(parcellation.codes == code)[0])
        assert np.count_nonzero(sample.classes == k) == np.count_nonzero(head.codes == code)
    left = np.argwhere(np.isin(sample.classes, [1, 2]))
    cells = sample.fields["toy"][0][tuple((left // 4).T)]
    assert (cells < 0.52).all()
    assert sample.mask.dtype == bool
    np.testing.assert_array_equal(sample.mask, sample.classes > 0)
    assert not sample.image[~sample.mask].any()


@pytest.mark.parametrize(
    ("affine", "code", "said"),
    [(np.eye(4), 10, "share a grid"), (None, 999, "no known label id")],
    ids=["another grid", "unknown ids"],
)
def test_labels_that_do_not_fit_their_image_are_refused(
    phantom, parcellation, tmp_path, affine, code, said
):
    """Before hours of learning that everything is background."""
    head = phantom("LPS", 2.0, scale=0.8)
    grid = head.t1.grid if affine is None else Grid(head.t1.grid.shape, affine)
    paths = [tmp_path / "sub-1_T1w.nii.gz", tmp_path / "sub-1_dseg.nii.gz"]
    save_volume(paths[0], head.t1.data, head.t1.grid)
    save_volume(paths[1], np.where(head.codes > 0, code, 0).astype(np.int16), grid)
    scan = LabelledScan("sub-1", "1", *paths)
    with pytest.raises(DataError, match=said):
        data.build(scan, ["MNIColin27"], parcellation, parcellation.class_of, tmp_path / "cache")


@pytest.mark.parametrize(
    ("poor", "kept"), [((), "ab"), (("a",), "b"), (("a", "b"), "ab")], ids=["none", "one", "all"]
)
def test_a_sample_holds_the_fields_that_inference_would_use(
    phantom, toy_template, identity, parcellation, monkeypatch, tmp_path, poor, kept
):
    paths = [tmp_path / "sub-1_T1w.nii.gz", tmp_path / "sub-1_dseg.nii.gz"]
    head = phantom("RAS", 2.0, scale=0.8)
    for path, voxels in zip(paths, (head.t1.data, head.codes), strict=True):
        save_volume(path, voxels, head.t1.grid)
    template = toy_template(scale=0.8, spacing=8.0)
    monkeypatch.setattr(data, "load_training_template", lambda name: replace(template, name=name))
    monkeypatch.setattr(data, "template_key", str)

    def register(_stripped, template, *_):
        found = identity(template)
        transform = replace(found.transform, trusted=template.name not in poor)
        return replace(found, transform=transform)

    monkeypatch.setattr(stages_register, "register_template", register)
    scan, mapping = LabelledScan("sub-1", "1", *paths), parcellation.class_of
    sample = data.load(data.build(scan, ["a", "b"], parcellation, mapping, tmp_path))
    assert set(sample.fields) == set(kept)


def test_a_person_may_be_the_atlas(phantom, orientation, parcellation, tmp_path):
    """Its frame lies about where a template's does, whatever way its voxels run."""
    head = phantom(orientation, 2.0)
    path = tmp_path / "sub-1_T1w.nii.gz"
    save_volume(path, head.t1.data, head.t1.grid)
    atlas = load_training_template(str(path))
    assert atlas.name == "sub-1_T1w"
    inside = atlas.brain.grid.to_world(np.argwhere(atlas.brain.data > 0)) - atlas.frame.ac_mm
    assert abs(inside[:, 0].mean()) < 2
    span = np.subtract(atlas.frame.high_mm, atlas.frame.low_mm)
    position = (inside - atlas.frame.low_mm) / span
    assert (position > 0).all()
    assert (position < 1).all()
    left = np.isin(head.codes, [2, 3, 10])[atlas.brain.data > 0]
    assert np.median(position[left, 0]) < 0.5
    scan = LabelledScan("sub-2", "2", path, path)
    files = (
        data.sample_path(scan, [atlas], parcellation, {}, tmp_path)
        for atlas in (str(path), "MNIColin27")
    )
    assert len({*files}) == 2


def test_a_whole_head_is_no_atlas(phantom, tmp_path):
    head = phantom("RAS", 3.0)
    path = tmp_path / "sub-head_T1w.nii.gz"
    save_volume(
        path, head.t1.data + np.random.default_rng(0).random(head.codes.shape), head.t1.grid
    )
    with pytest.raises(DataError, match="not skull-stripped"):
        load_training_template(str(path))


TRAINER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import conftest
from test_training import QUICK
from dataclasses import replace
from functools import partial
from cadiff_cli.training import loop
from cadiff_cli.training.segmenter import data, run
loop.fit.__kwdefaults__["save_minutes"] = 0.0
samples = [data.load(Path({cache!r}) / "sub-toy.npz")]
config = replace(QUICK, steps=int(sys.argv[1]))
print("ready", flush=True)
run.train(samples, Path({run!r}), config, net_config=conftest.TINY, workers=int(sys.argv[2]))
"""


def wait_for(path, process):
    """Until the process has written the file."""
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it has not written {path.name}")
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_same_command(toy_sample, tmp_path, tiny_config):
    """SIGKILL, which no program can prepare for, then the same command again."""
    write_cache(toy_sample, tmp_path / "cache")
    run = tmp_path / "run"
    program = TRAINER.format(
        tests=os.path.dirname(__file__), cache=str(tmp_path / "cache"), run=str(run)
    )
    checkpoint = run / "checkpoint.pt"

    def command(steps, workers=0):
        return [sys.executable, "-c", program, str(steps), str(workers)]

    with subprocess.Popen(command(100_000), stdout=subprocess.DEVNULL) as process:
        wait_for(checkpoint, process)
        time.sleep(0.5)  # somewhere inside a step or a save
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "model.safetensors").exists()
    done = torch.load(checkpoint, weights_only=True)["step"]
    assert done >= 1
    subprocess.run(command(done + 3), check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE_S)
    assert torch.load(checkpoint, weights_only=True)["step"] == done + 3
    model = models.load(Model, str(run / "model.safetensors"))
    assert model.training["steps"] == done + 3
    assert model.net.config == tiny_config
    # The same as if nobody had killed it (nothing decays before the steps that were done).
    config = replace(QUICK, steps=done + 3)
    path = train([toy_sample], tmp_path / "straight", config, net_config=tiny_config)
    straight = models.load(Model, str(path)).net.state_dict()
    for key, value in model.net.state_dict().items():
        assert torch.equal(value, straight[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_group_finishes_its_step(toy_sample, tmp_path, number):
    """As a scheduler or Ctrl-C stops it: the loader's processes get the signal too."""
    write_cache(toy_sample, tmp_path / "cache")
    run = tmp_path / "run"
    program = TRAINER.format(
        tests=os.path.dirname(__file__), cache=str(tmp_path / "cache"), run=str(run)
    )
    command = [sys.executable, "-c", program, "100000", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        wait_for(run / "checkpoint.pt", process)
        os.killpg(process.pid, number)
        assert process.wait(timeout=PATIENCE_S) == 0
    done = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert models.load(Model, str(run / "model.safetensors")).training["steps"] == done >= 1


def test_held_out_people_are_scored_but_not_trained_on(toy_sample, tmp_path, tiny_config):
    other = replace(toy_sample, name="sub-other", subject="other")
    config, people = replace(QUICK, steps=2), [toy_sample, other]
    path = train(
        people, tmp_path, config, hold_out=["other"], net_config=tiny_config, validate_minutes=0
    )
    model = models.load(Model, str(path))
    described = model.training
    assert described["trained_on"] == ["toy"]
    present = set(np.unique(toy_sample.classes).tolist()) - {0}
    assert model.structures == {int(model.parcellation.codes[k]) for k in present}
    assert described["held_out"] == ["other"]
    header, *rows = (tmp_path / "validation.tsv").read_text().splitlines()
    assert header.split("\t") == ["step", "hours", "scan", "dice"]
    assert [row.split("\t")[::2] for row in rows] == [["1", "sub-other"], ["2", "sub-other"]]
    assert all(0 < float(row.split("\t")[3]) <= 1 for row in rows)
    with pytest.raises(UsageError, match="trained_on"):  # the checkpoint knows whom it has seen
        train(people, tmp_path, config, net_config=tiny_config)
    assert described["templates"] == ["other", "toy"]
    fewer = [replace(s, fields={"toy": s.fields["toy"]}) for s in people]
    relabelled = [replace(s, labels="others") for s in people]
    for samples, what in ((fewer, "templates"), (relabelled, "labels")):
        with pytest.raises(UsageError, match=f"has {what}") as caught:
            train(
                *(samples, tmp_path, config),
                hold_out=["other"],
                net_config=tiny_config,
            )
        assert "another --run folder" in caught.value.remedy
    plain = replace(tiny_config, attention=False)
    with pytest.raises(UsageError, match="has net"):
        train(people, tmp_path, config, hold_out=["other"], net_config=plain)
    for hold_out in (["nobody"], ["toy", "other"]):
        with pytest.raises(UsageError):
            train(people, tmp_path, config, hold_out=hold_out)


def test_a_run_from_before_noise_processes_had_names_goes_on(
    toy_sample, tmp_path, tiny_config, monkeypatch
):
    begin = partial(train, [toy_sample], tmp_path)
    begin(replace(QUICK, steps=1), net_config=tiny_config)
    path = tmp_path / "config.json"
    described = json.loads(path.read_text())
    del described["net"]["process"]
    path.write_text(json.dumps(described))
    monkeypatch.setitem(PROCESSES, "other", Gaussian(Cosine(0.1)))
    with pytest.raises(UsageError, match="has net"):
        begin(QUICK, net_config=replace(tiny_config, process="other"))
    model = models.load(Model, str(begin(replace(QUICK, steps=2), net_config=tiny_config)))
    assert model.training["steps"] == 2


def test_another_parcellation_is_trained(small_head, lobes, tiny_config, tmp_path):
    """Two steps and a validation; the weights carry the table, and no run changes it on the way."""
    sample = lobes_sample(small_head, lobes)
    people = [sample, replace(sample, name="sub-other", subject="other")]
    net, begin = replace(tiny_config, n_classes=lobes.n_classes), partial(train, people, tmp_path)
    options = {"hold_out": ["other"], "net_config": net, "validate_minutes": 0}
    config = replace(QUICK, steps=2, warmup=1, decay=1)
    model = models.load(Model, str(begin(config, parcellation=lobes, **options)))
    assert model.parcellation == lobes
    assert model.net.config.n_classes == len(lobes) + 1
    assert model.structures == {*lobes.class_of}
    counted = count_prior([sample], lobes, net.prior_shape)
    torch.testing.assert_close(model.net.prior.logits, counted, atol=PRIOR_STEP, rtol=0)
    rows = (tmp_path / "validation.tsv").read_text().splitlines()[1:]
    assert all(0 < float(row.split("\t")[3]) <= 1 for row in rows)
    assert len(rows) == 2
    recoloured = replace(lobes.structures[0], color="#123456")
    other = replace(lobes, structures=(recoloured, *lobes.structures[1:]))
    with pytest.raises(UsageError, match="parcellation lobes-"):
        begin(config, parcellation=other, **options)
    with pytest.raises(UsageError, match="draws the parcellation lobes"):
        train(people, tmp_path / "new", config, init=model)


def lobes_sample(head, lobes):
    """The phantom in four lobes and a stem, as a training sample."""
    conditions = make_conditions(head)
    front = np.arange(head.codes.shape[1]) > head.codes.shape[1] // 2
    sides = np.where(np.isin(head.codes, (42, 41, 51, 43, 49)), 2001, 1001)
    codes = np.select([head.codes == 0, head.codes == 16], [0, 16], sides + ~front[:, None])
    codes = resample(Volume(codes, head.t1.grid), conditions.image.grid, order=0).data
    return Sample(
        "sub-toy",
        "toy",
        np.round(conditions.image.data * 255).astype(np.uint8),
        conditions.mask.data.copy(),
        lobes.encode(codes, lobes.class_of),
        {"toy": pool(conditions.field.data, 2).astype(np.float16)},
    )


def test_a_run_from_before_parcellations_had_names_goes_on(toy_sample, tmp_path, tiny_config):
    """It drew ``BASE``."""
    begin = partial(train, [toy_sample], tmp_path, net_config=tiny_config)
    begin(replace(QUICK, steps=1))
    path = tmp_path / "config.json"
    described = json.loads(path.read_text())
    assert described.pop("parcellation") == BASE
    path.write_text(json.dumps(described))
    model = models.load(Model, str(begin(replace(QUICK, steps=2))))
    assert model.training["steps"] == 2


def test_scans_trusted_less_are_trained_on_but_do_not_vote(
    toy_sample, parcellation, tmp_path, tiny_config
):
    flat = replace(toy_sample, subject="flat", classes=np.minimum(toy_sample.classes, 1))
    far = replace(toy_sample, name="sub-far", subject="far")
    config = replace(QUICK, steps=2, also_share=1.0)
    path = train(
        [toy_sample],
        tmp_path,
        config,
        also=[flat, far],
        hold_out=["far"],
        net_config=tiny_config,
        validate_minutes=0,
    )
    model = models.load(Model, str(path))
    described = model.training
    assert (described["trained_on"], described["also_on"]) == (["toy"], ["flat"])
    counted = count_prior([toy_sample], parcellation, tiny_config.prior_shape)
    assert torch.allclose(model.net.prior.logits, counted, atol=0.1)
    rows = (tmp_path / "validation.tsv").read_text().splitlines()[1:]
    assert {row.split("\t")[2] for row in rows} == {"sub-far"}
    with pytest.raises(UsageError, match="also_on"):
        train([toy_sample], tmp_path, config, net_config=tiny_config)
    relabelled = [replace(flat, labels="others"), far]
    with pytest.raises(UsageError, match="also_labels"):
        train(
            *([toy_sample], tmp_path, config),
            also=relabelled,
            hold_out=["far"],
            net_config=tiny_config,
        )
    with pytest.raises(UsageError, match="two datasets"):
        train([toy_sample], tmp_path / "new", config, also=[toy_sample])


def test_a_run_begins_with_the_weights_it_is_given(toy_sample, parcellation, tmp_path, tiny_config):
    """Network, weights and prior are theirs; after no steps they come out as they went in."""
    flat = replace(toy_sample, classes=np.minimum(toy_sample.classes, 1))
    first = train([toy_sample], tmp_path / "a", replace(QUICK, steps=2), net_config=tiny_config)
    was = models.load(Model, str(first))
    again = train([flat], tmp_path / "b", QUICK, init=was, max_minutes=0)
    now = models.load(Model, str(again))
    assert now.net.config == was.net.config == tiny_config
    for key, value in was.net.state_dict().items():
        assert torch.equal(now.net.state_dict()[key], value), key
    assert now.training["init"] == was.sha256
    assert now.training["seen_by_init"] == ["toy"]
    # What the first network was taught to draw, the second may draw still.
    assert now.structures == was.structures > {int(parcellation.codes[1])}
    with pytest.raises(UsageError, match="init"):
        train([flat], tmp_path / "b", QUICK, net_config=tiny_config)
    new = train([flat], tmp_path / "e", QUICK, init=was, recount_prior=True, max_minutes=0)
    mine = models.load(Model, str(new)).net.state_dict()
    counted = count_prior([flat], parcellation, tiny_config.prior_shape)
    torch.testing.assert_close(mine["prior.logits"], counted, atol=PRIOR_STEP, rtol=0)
    assert not torch.equal(mine["prior.logits"], was.net.state_dict()["prior.logits"])
    for key, value in was.net.state_dict().items():
        assert key == "prior.logits" or torch.equal(mine[key], value), key
    other = replace(toy_sample, subject="other")
    with pytest.raises(UsageError, match="--init was trained on toy"):
        train([toy_sample, other], tmp_path / "c", QUICK, init=now, hold_out=["toy"])
    with pytest.raises(UsageError, match="another network"):
        train([other], tmp_path / "d", QUICK, init=was, net_config=load("unet").net)


def test_a_new_head_is_trained_on_the_trunk_of_other_weights(toy_sample, tmp_path, tiny_config):
    """With ``head_only`` the trunk comes out as it went in; the head, of another shape, learns."""
    first = train([toy_sample], tmp_path / "a", replace(QUICK, steps=2), net_config=tiny_config)
    was = models.load(Model, str(first))
    other = replace(tiny_config, head_stride=2, head_channels=6)
    config = replace(QUICK, steps=2, head_only=True)
    path = train([toy_sample], tmp_path / "b", config, init=was, net_config=other)
    net = models.load(Model, str(path)).net
    assert net.config == other
    head, theirs = net.head_parameters(), was.net.state_dict()
    for name, weights in net.state_dict().items():
        assert name in head or torch.equal(weights, theirs[name]), name
    assert net.head_label.weight.any()
    for settings in ({}, {"init": was, "recount_prior": True}):
        with pytest.raises(UsageError, match="head_only"):
            train([toy_sample], tmp_path / "c", config, **settings)


def test_a_run_of_before_there_were_other_heads_goes_on(toy_sample, tmp_path, tiny_config):
    train([toy_sample], tmp_path, replace(QUICK, steps=1), net_config=tiny_config)
    path = tmp_path / "config.json"
    run = json.loads(path.read_text())
    del run["net"]["head_stride"], run["train"]["head_only"]
    path.write_text(json.dumps(run))
    train([toy_sample], tmp_path, replace(QUICK, steps=2), net_config=tiny_config)
    run["net"]["head_stride"] = 2
    path.write_text(json.dumps(run))
    with pytest.raises(UsageError, match="head_stride"):
        train([toy_sample], tmp_path, replace(QUICK, steps=3), net_config=tiny_config)


def test_options_of_the_command_reach_the_run(monkeypatch, tmp_path, parcellation, toy_sample):
    """Datasets, their labels and the share; what is wrong is said before anything is prepared."""
    prepared, trained = [], {}

    def prepare(scans, _templates, drawn, mapping, _folder):
        assert drawn == parcellation
        prepared.append(([scan.subject for scan in scans], mapping))
        return [replace(toy_sample, subject=scan.subject) for scan in scans]

    def fake_train(samples, run, config, **options):
        trained.update(samples=samples, config=config, **options)
        return run / "model.safetensors"

    def people_of(folder):
        return [LabelledScan(folder.name, folder.name, folder, folder)]

    monkeypatch.setattr("cadiff_cli.training.segmenter.data.labelled_scans", people_of)
    monkeypatch.setattr("cadiff_cli.training.segmenter.data.prepare_scans", prepare)
    monkeypatch.setattr("cadiff_cli.training.segmenter.run.train", fake_train)
    here = [str(tmp_path / name) for name in ("manual", "machine", "more")]
    run = ["-o", str(tmp_path / "run")]
    also = ["--also", here[1], "dlmuse", "--also", here[2], "freesurfer", "--also-share", "0.4"]

    def call(*options):
        return CliRunner().invoke(
            command, ["cadiff", here[0], *run, *options], standalone_mode=False
        )

    assert call(*also, "--steps", "7", "--hold-out", "sub-more").exception is None
    assert trained["hold_out"] == ("more",)
    assert prepared == [
        (["manual"], load_scheme("neuromorphometrics", parcellation)),
        (["machine"], load_scheme("dlmuse", parcellation)),
        (["more"], load_scheme("freesurfer", parcellation)),
    ]
    assert [s.subject for s in trained["samples"]] == ["manual"]
    assert [s.subject for s in trained["also"]] == ["machine", "more"]
    assert (trained["config"].also_share, trained["config"].steps) == (0.4, 7)
    assert trained["init"] is None
    prepared.clear()
    for wrong, kind in (
        (["--also", here[1], "no-such-labels"], MissingInputError),
        (["--init", "no-such-model"], MissingInputError),
        (["--also-share", "0.2"], UsageError),
        (["--recount-prior"], UsageError),
        (["--hold-out", "nobody"], UsageError),
        (["--hold-out", "sub-manual"], UsageError),
        (["--also", here[0], "dlmuse"], UsageError),
        (["--device", "abacus"], UsageError),
    ):
        assert isinstance(call(*wrong).exception, kind)
    assert prepared == []


@pytest.mark.parametrize("voters", [None, 0, 1])
def test_the_prior_is_counted_over_the_wanted_scans(
    toy_sample, parcellation, tmp_path, tiny_config, voters
):
    """All of them, nobody, or as many as the seed draws: one person's labels in the field."""
    flat = replace(toy_sample, subject="flat", classes=np.minimum(toy_sample.classes, 1))
    config = replace(QUICK, steps=1, prior_scans=voters)
    people = [toy_sample, flat]
    path = train(people, tmp_path, config, net_config=tiny_config, max_minutes=0)
    prior = models.load(Model, str(path)).net.prior.logits
    if voters == 0:
        assert not prior.any()
        return
    counted = {
        name: count_prior(chosen, parcellation, tiny_config.prior_shape)
        for name, chosen in (("both", people), ("toy", people[:1]), ("flat", people[1:]))
    }
    same = {k for k, v in counted.items() if torch.allclose(v, prior, atol=0.1)}
    assert same == {"both"} if voters is None else len(same) == 1 and "both" not in same


def test_a_network_without_field_starts_without_prior(toy_sample, tmp_path, tiny_config):
    """It goes from a run to weights and back, and still does not read the field."""
    config = replace(QUICK, steps=1, objective=replace(load("unet").train.objective, fine=32))
    blind = replace(tiny_config, reads_field=False, reads_labels=False, attention=False)
    path = train([toy_sample], tmp_path, config, net_config=blind)
    net = models.load(Model, str(path)).net
    assert net.config == blind
    assert not net.prior.logits.any()
