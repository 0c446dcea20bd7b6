"""Deterministic DDIM (Song et al., 2021, eq. 12 with eta = 0) for a network that predicts x_0.

The sampler is a generator: progress, early stop and inspection need no callbacks.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from cadiff_cli.diffusion.process import levels


def times(steps: int) -> list[float]:
    """``steps`` equally spaced times from 1 down; the implied last one is 0."""
    return [1 - k / steps for k in range(steps)]


def sample(
    denoise: Callable[[Tensor, float], Tensor], x_t: Tensor, schedule: list[float]
) -> Iterator[Tensor]:
    """States on the way from ``x_t`` at ``schedule[0]`` to 0; ``denoise(x_t, t)`` estimates x_0."""
    for t, t_next in pairwise([*schedule, 0.0]):
        x_0 = denoise(x_t, t)
        (alpha, alpha_next), (sigma, sigma_next) = levels(
            torch.tensor([t, t_next], dtype=torch.float64)
        )
        noise = (x_t - float(alpha) * x_0) / float(sigma)
        x_t = float(alpha_next) * x_0 + float(sigma_next) * noise
        yield x_t
