"""The diffusion core: exact ends, kept variance, and a sampler that lands where it should."""

import itertools

import pytest
import torch

from cadiff_cli.diffusion.process import corrupt, expand, levels
from cadiff_cli.diffusion.sampler import sample, times


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_schedule_ends_exactly(dtype):
    alpha, sigma = levels(torch.tensor([0.0, 1.0], dtype=dtype))
    assert (float(alpha[0]), float(sigma[0])) == (1, 0)
    assert (pytest.approx(float(alpha[1]), abs=1e-12), float(sigma[1])) == (0, 1)
    assert alpha.dtype == sigma.dtype == dtype


def test_the_schedule_keeps_variance_and_falls():
    alpha, sigma = levels(torch.linspace(0, 1, 101, dtype=torch.float64))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(101, dtype=torch.float64))
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()


def test_corruption_is_the_closed_form_for_each_sample():
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(3, 2, 4, 5, 6, generator=generator) for _ in range(2))
    t = torch.tensor([0.0, 0.37, 1.0])
    x_t = corrupt(x_0, t, noise)
    alpha, sigma = levels(t)
    for b in range(3):
        torch.testing.assert_close(x_t[b], alpha[b] * x_0[b] + sigma[b] * noise[b])
    torch.testing.assert_close(x_t[0], x_0[0], rtol=0, atol=0)
    torch.testing.assert_close(x_t[2], noise[2], rtol=0, atol=1e-6)


def test_expand_keeps_the_batch_first():
    like = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    wide = expand(torch.tensor([1.0, 2.0]), like)
    assert wide.shape == (2, 1, 1, 1)
    assert wide.dtype == like.dtype


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_an_oracle_lands_on_x_0(steps):
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(1, 2, 6, 6, 6, generator=generator) for _ in range(2))
    *_, end = sample(lambda _x, _t: x_0, noise, times(steps))
    torch.testing.assert_close(end, x_0, rtol=0, atol=1e-5)


def test_an_oracle_keeps_the_state_on_its_path():
    """At every time the state is the clean image mixed with the very noise it began with."""
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(1, 1, 4, 4, 4, generator=generator) for _ in range(2))
    schedule = times(5)
    for state, t_next in zip(
        sample(lambda _x, _t: x_0, noise, schedule), [*schedule[1:], 0.0], strict=True
    ):
        expected = corrupt(x_0, torch.tensor([t_next]), noise)
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-5)


def test_the_sampler_is_lazy():
    seen = []

    def denoise(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    walk = sample(denoise, torch.ones(1, 1, 2, 2, 2), times(4))
    assert seen == []
    next(walk)
    assert seen == [1.0]
    list(itertools.islice(walk, 2))
    assert seen == [1.0, 0.75, 0.5]


@pytest.mark.parametrize("steps", [1, 2, 5, 7])
def test_times_start_at_one_and_are_equally_spaced(steps):
    schedule = times(steps)
    assert len(schedule) == steps
    assert schedule[0] == 1
    gaps = torch.tensor([*schedule, 0.0], dtype=torch.float64).diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, -1 / steps))
