r"""Noise schedule and forward process (paper, eq. 1), in continuous time t in [0, 1].

.. math:: x_t = \alpha_t x_0 + \sigma_t \epsilon, \qquad \alpha_t^2 + \sigma_t^2 = 1
"""

import math

import torch
from torch import Tensor

OFFSET = 0.008
"""Keeps the first noise levels apart (Nichol & Dhariwal, 2021, eq. 17)."""


def levels(t: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine schedule: (alpha, sigma) at ``t`` (any shape); exactly (1, 0) at 0 and (0, 1) at 1.

    The cosine is divided by its value at t = 0, so that the last DDIM step lands on x_0.
    """
    angle = (t.double() + OFFSET) / (1 + OFFSET) * (math.pi / 2)
    start = math.cos(OFFSET / (1 + OFFSET) * math.pi / 2)
    alpha = (torch.cos(angle) / start).clamp(0.0, 1.0)
    sigma = (1 - alpha**2).clamp(min=0.0).sqrt()
    return alpha.to(t.dtype), sigma.to(t.dtype)


def corrupt(x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Mix a clean state with noise; ``x_0`` and ``noise`` (B, C, *space), ``t`` (B,)."""
    alpha, sigma = (expand(level, x_0) for level in levels(t))
    return alpha * x_0 + sigma * noise


def expand(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with the rank and dtype of ``like``."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
