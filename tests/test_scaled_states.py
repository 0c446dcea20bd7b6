"""Scaled label states: the same process, less to read off a noisy state, in training as at work."""

from dataclasses import replace

import pytest
import torch
from conftest import NO_CHANGE, awake, seeded
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.config import SampleConfig
from cadiff_cli.diffusion.process import DEFAULT, PROCESSES, expand
from cadiff_cli.errors import DataError, UsageError
from cadiff_cli.io import models
from cadiff_cli.nets.models import Model
from cadiff_cli.nets.segmenter import CADiffNet, NetConfig
from cadiff_cli.spatial.probabilities import fractions
from cadiff_cli.stages.sampling import class_probabilities
from cadiff_cli.training.segmenter.config import TrainConfig, load
from cadiff_cli.training.segmenter.objective import SegmenterObjective, Times
from cadiff_cli.training.segmenter.patches import draw_patch
from cadiff_cli.training.segmenter.run import train

SCALE = 0.25
QUICK = TrainConfig(steps=1, warmup=1, decay=1, patch=64, objective=SegmenterObjective(fine=32))


@pytest.fixture(scope="module")
def patch(toy_sample, mirror):
    return draw_patch(toy_sample, 32, mirror, NO_CHANGE, seeded())


@pytest.fixture(scope="module")
def nets(tiny_config):
    """Equal weights with states of full size and of a quarter."""
    return [awake(replace(tiny_config, label_scale=scale)) for scale in (1.0, SCALE)]


def asked(net, monkeypatch, run):
    """Label states and times that the trunk was given during ``run``, and its answers."""
    calls = []
    trunk = net.trunk

    def watched(image, d_t, m_t, t_d, t_m, *known):
        answer = trunk(image, d_t, m_t, t_d, t_m, *known)
        calls.append((m_t, t_m, answer))
        return answer

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(net, "trunk", watched)
        run(net)
    return calls


def alpha(t, like):
    return expand(PROCESSES[DEFAULT].schedule.levels(t)[0], like)


def test_a_state_is_the_scaled_fraction(nets, tiny_config):
    p = torch.rand(2, 41, 3, 3, 3, generator=seeded())
    assert torch.equal(nets[0].label_state(p), 2 * p - 1)
    torch.testing.assert_close(nets[1].label_state(p), SCALE * (2 * p - 1))
    assert NetConfig().label_scale == 1


@pytest.mark.parametrize("wrong", [0.0, -0.3, 1.5, float("nan")])
def test_a_scale_that_cannot_be_is_refused(wrong):
    with pytest.raises(DataError, match=f"label_scale is {wrong}"):
        NetConfig(label_scale=wrong)


def test_training_shows_scaled_labels_in_the_same_noise(nets, patch, monkeypatch):
    objective = SegmenterObjective(Times(1.0, 0.0, 0.0), recycle=0.0, fine=32)
    ((one, t, _),), ((small, _, _),) = (
        asked(net, monkeypatch, lambda net: objective(net, patch, seeded())) for net in nets
    )
    clean = 2 * fractions(patch.classes, 41, 2) - 1
    torch.testing.assert_close(one - small, (1 - SCALE) * alpha(t, clean) * clean)


def test_recycled_states_are_scaled_too(nets, patch, monkeypatch):
    """Pure noise is the same, so is what is made of it, and that is what is scaled."""
    objective = SegmenterObjective(Times(1.0, 0.0, 0.0), recycle=1.0, fine=32)
    (first, one), (again, small) = (
        asked(net, monkeypatch, lambda net: objective(net, patch, seeded())) for net in nets
    )
    torch.testing.assert_close(first[0], again[0])
    clean = 2 * first[2].logits.softmax(dim=1) - 1
    difference = (1 - SCALE) * alpha(one[1], clean) * clean
    torch.testing.assert_close(one[0] - small[0], difference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("known", [True, False])
def test_sampling_follows_the_network(
    nets, conditions_of, small_head, parcellation, monkeypatch, known
):
    """The second state is a step of the process towards the scaled answer to the first."""
    conditions = conditions_of(small_head)
    if not known:
        conditions = replace(conditions, field=None)
    net = nets[1]
    model, config = Model(net, parcellation=parcellation), SampleConfig(steps=2, flip=False)
    (start, t, answer), (state, t_next, _) = asked(
        net, monkeypatch, lambda _: class_probabilities(conditions, model, config)
    )
    clean = SCALE * (2 * answer.logits.softmax(dim=1) - 1)
    expected = PROCESSES[DEFAULT].step(start, clean, float(t), float(t_next))
    torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)


def test_smaller_states_leak_less(toy_sample):
    """The mean of a 3^3 neighbourhood of a noisy state tells fewer labels."""
    size = [n // 2 * 2 for n in toy_sample.classes.shape]
    classes = torch.from_numpy(toy_sample.classes[: size[0], : size[1], : size[2]]).long()[None]
    p = fractions(classes, 41, 2)
    truth, inside = p.argmax(1), p.argmax(1) > 0
    noise, t = torch.randn(p.shape, generator=seeded()), torch.tensor([0.8])

    def told(scale):
        m_t = PROCESSES[DEFAULT].corrupt(scale * (2 * p - 1), t, noise)
        guessed = F.avg_pool3d(m_t, 3, 1, 1).argmax(1)
        return float((guessed == truth)[inside].float().mean())

    shares = [told(scale) for scale in (1.0, 0.5, 0.25, 0.1)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.5 > 0.1 > shares[-1]


def test_weights_keep_their_scale_and_can_begin_with_another(
    toy_sample, tiny_config, tmp_path, parcellation
):
    was = models.load(
        Model, str(train([toy_sample], tmp_path / "a", QUICK, net_config=tiny_config))
    )
    scaled = replace(tiny_config, label_scale=SCALE)
    net = CADiffNet(scaled)
    net.begin_with(was.net)
    for name, weights in was.net.state_dict().items():
        assert torch.equal(net.state_dict()[name], weights), name
    path = train([toy_sample], tmp_path / "b", QUICK, init=was, net_config=scaled)
    assert models.load(Model, str(path)).net.config == scaled
    with pytest.raises(UsageError, match="label_scale"):
        train([toy_sample], tmp_path / "b", QUICK, init=was, net_config=tiny_config)


def test_the_shipped_config_scales_and_recycles_more():
    default, scaled = load("cadiff"), load("scaled")
    assert scaled.net == replace(default.net, label_scale=scaled.net.label_scale)
    assert 0.1 <= scaled.net.label_scale <= 0.5
    assert scaled.train.objective.times.pure_noise < default.train.objective.times.pure_noise
    assert scaled.train.objective.recycle > default.train.objective.recycle
