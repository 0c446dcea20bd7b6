"""The diffusion core: laws that every noise process keeps, and a sampler that lands on x_0."""

import itertools
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from conftest import NO_CHANGE, awake, seeded

from cadiff_cli.diffusion import process as processes
from cadiff_cli.diffusion.process import Cosine, Gaussian, expand
from cadiff_cli.diffusion.sampler import sample, spaced_times
from cadiff_cli.errors import DataError
from cadiff_cli.io import models
from cadiff_cli.nets.models import Model
from cadiff_cli.stages.sampling import denoise
from cadiff_cli.training.segmenter.objective import SegmenterObjective, Times
from cadiff_cli.training.segmenter.patches import draw_patch


@dataclass(frozen=True)
class Linear:
    """A second schedule."""

    def levels(self, t):
        return 1 - t, t


@dataclass(frozen=True)
class Flow:
    """A second process, written from scratch: a straight line to noise of half the size."""

    size: float = 0.5

    def corrupt(self, x_0, t, noise):
        t = expand(t, x_0)
        return x_0 + t * (self.size * noise - x_0)

    def start(self, noise):
        return self.size * noise

    def step(self, x_t, x_0, t, t_next):
        return x_t + (t_next - t) * (x_t - x_0) / t

    def guess(self, x_t, t, spread):
        t = expand(t, x_t)
        signal, noise = (1 - t) * spread, t * self.size
        power = signal**2 + noise**2
        return signal * spread / power * x_t, noise * spread / power.sqrt()


@pytest.fixture(
    params=[*processes.PROCESSES.values(), Gaussian(Linear()), Flow()],
    ids=[*processes.PROCESSES, "linear", "test-flow"],
)
def process(request):
    return request.param


def normal(*shape, seed=0):
    """A clean state and noise."""
    return torch.randn(2, *shape, generator=seeded(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cosine_ends_exactly(dtype):
    alpha, sigma = Cosine().levels(torch.tensor([0.0, 1.0], dtype=dtype))
    assert (float(alpha[0]), float(sigma[0])) == (1, 0)
    assert (pytest.approx(float(alpha[1]), abs=1e-12), float(sigma[1])) == (0, 1)
    assert alpha.dtype == sigma.dtype == dtype


def test_the_cosine_keeps_variance_and_falls():
    alpha, sigma = Cosine().levels(torch.linspace(0, 1, 101, dtype=torch.float64))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(101, dtype=torch.float64))
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()


def test_gaussian_corruption_is_the_closed_form_for_each_sample():
    x_0, noise = normal(3, 2, 4, 5, 6)
    t = torch.tensor([0.0, 0.37, 1.0])
    x_t = Gaussian(Cosine()).corrupt(x_0, t, noise)
    alpha, sigma = Cosine().levels(t)
    for b in range(3):
        torch.testing.assert_close(x_t[b], alpha[b] * x_0[b] + sigma[b] * noise[b])


def test_corruption_begins_with_the_clean_state_and_ends_where_sampling_starts(process):
    x_0, noise = normal(2, 3, 4, 5, 6)
    first, last = process.corrupt(x_0, torch.tensor([0.0, 1.0]), noise)
    torch.testing.assert_close(first, x_0[0], rtol=0, atol=0)
    torch.testing.assert_close(last, process.start(noise)[1], rtol=0, atol=1e-6)


def test_expand_keeps_the_batch_first():
    like = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    wide = expand(torch.tensor([1.0, 2.0]), like)
    assert wide.shape == (2, 1, 1, 1)
    assert wide.dtype == like.dtype


@pytest.mark.parametrize("t", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_the_guess_is_the_best_that_a_noisy_state_allows(process, t):
    """Its error is as large as it says, and no multiple of the state would reduce it."""
    spread, (x_0, noise) = 0.35, normal(1, 1, 200_000)
    x_0 = spread * x_0
    time = torch.tensor([t])
    x_t = process.corrupt(x_0, time, noise)
    mean, deviation = process.guess(x_t, time, spread)
    error = x_0 - mean
    assert mean.shape == x_t.shape
    deviation = deviation.expand_as(x_t).square().mean().sqrt()
    assert float(error.std()) == pytest.approx(float(deviation), rel=0.01, abs=1e-6)
    assert abs(float((error * x_t).mean())) < 0.01 * spread * float(x_t.std()) + 1e-6
    if t == 1:
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_an_oracle_lands_on_x_0(process, steps):
    x_0, noise = normal(1, 2, 6, 6, 6)
    times = [*spaced_times(steps), 0.0]
    *_, end = sample(process.step, lambda _x, _t: x_0, process.start(noise), times)
    torch.testing.assert_close(end, x_0, rtol=0, atol=1e-5)


def test_an_oracle_keeps_the_state_on_its_path(process):
    """At every time the state is the clean image mixed with the very noise it began with."""
    x_0, noise = normal(1, 1, 4, 4, 4)
    times = [*spaced_times(5), 0.0]
    states = sample(process.step, lambda _x, _t: x_0, process.start(noise), times)
    for state, t in zip(states, times, strict=True):
        expected = process.corrupt(x_0, torch.tensor([t]), noise)
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-5)


def test_the_sampler_is_lazy():
    """It asks when a state is wanted, and nothing at the last time."""
    asked = []

    def denoise(x, t):
        asked.append(t)
        return torch.zeros_like(x)

    start = torch.ones(1, 1, 2, 2, 2)
    walk = sample(Gaussian(Cosine()).step, denoise, start, spaced_times(4))
    assert next(walk) is start
    assert asked == []
    list(itertools.islice(walk, 2))
    assert asked == [1.0, 0.75]
    assert len(list(walk)) == 1
    assert asked == [1.0, 0.75, 0.5]


@pytest.mark.parametrize("steps", [1, 2, 5, 7])
def test_times_start_at_one_and_are_equally_spaced(steps):
    times = spaced_times(steps)
    assert len(times) == steps
    assert times[0] == 1
    gaps = torch.tensor([*times, 0.0], dtype=torch.float64).diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, -1 / steps))


def test_a_second_process_needs_its_class_and_a_name(
    monkeypatch, tiny_config, toy_sample, mirror, parcellation, tmp_path
):
    """It is trained with, stored, loaded and sampled; nobody asks the first one."""
    path = tmp_path / "flow.safetensors"
    with monkeypatch.context() as patched:
        patched.setitem(processes.PROCESSES, "test-flow", Flow())
        patched.setattr(Cosine, "levels", None)
        net = awake(replace(tiny_config, process="test-flow"))
        patch = draw_patch(toy_sample, 32, mirror, NO_CHANGE, seeded())
        # Field and labels are noisy, and the third step recycles.
        objective = SegmenterObjective(Times(0.0, 0.0, 0.0), recycle=0.0, fine=32)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        before = net.stem.weight.detach().clone()
        for seed, recycle in enumerate((0.0, 0.0, 1.0)):
            loss = replace(objective, recycle=recycle)(net, patch, seeded(seed)).total
            assert loss.isfinite()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert not torch.equal(net.stem.weight, before)
        models.save(path, Model(net, parcellation=parcellation))
        loaded = models.load(Model, str(path)).net
        assert loaded.process == Flow()
        blocks = torch.ones([n // 2 for n in patch.image.shape[2:]]).nonzero()
        cpu = torch.device("cpu")
        run = partial(denoise, image=patch.image, field=None, blocks=blocks, steps=2, device=cpu)
        p = run(loaded, generator=seeded())
        torch.testing.assert_close(p.sum(1), torch.ones(len(p)))
        patched.setitem(processes.PROCESSES, "test-flow", Flow(size=1.0))
        other = run(models.load(Model, str(path)).net, generator=seeded())
        assert not torch.equal(other, p)
    with pytest.raises(DataError, match=r"flow.* the noise process is 'test-flow'") as caught:
        models.load(Model, str(path))
    assert caught.value.remedy
