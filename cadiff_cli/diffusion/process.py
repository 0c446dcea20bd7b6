"""Noise processes: from a clean state at t = 0 to pure noise at t = 1, and back.

A network is trained with one process and sampled with the same one; its settings name it.  A new
process is a class with the methods of ``Process`` and an entry in ``PROCESSES``.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Process(Protocol):
    """How noise enters a state, and how it leaves.

    States and ``noise`` are (B, C, *space); ``noise`` is standard normal.  ``t`` is (B,) in [0, 1]
    where each member of a batch has a time of its own, else a number.
    """

    def corrupt(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """State at ``t`` of a clean state."""

    def start(self, noise: Tensor) -> Tensor:
        """State at t = 1, where sampling begins."""

    def step(self, x_t: Tensor, x_0: Tensor, t: float, t_next: float) -> Tensor:
        """State at ``t_next`` < ``t``, from the state at ``t`` and an estimate of the clean one."""

    def guess(self, x_t: Tensor, t: Tensor, spread: float) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the clean state, given nothing but the state at ``t``.

        Clean states have mean 0 and standard deviation ``spread``.  At t = 0 the mean is the state
        itself and the deviation 0; at t = 1 they are 0 and ``spread``.  The mean has the shape of
        ``x_t``; that of the deviation need only broadcast to it.
        """


class NoiseSchedule(Protocol):
    """How much of the clean state and how much noise a state holds."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at ``t`` (any shape): (1, 0) at t = 0, (0, 1) at t = 1."""


@dataclass(frozen=True)
class Cosine:
    """Cosine schedule (Nichol & Dhariwal, 2021, eq. 17), which keeps variance.

    ``offset`` keeps the first noise levels apart.  The cosine is divided by its value at t = 0, so
    that the last sampling step lands on x_0.
    """

    offset: float = 0.008

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at ``t``, computed in float64."""
        angle = (t.double() + self.offset) / (1 + self.offset) * (math.pi / 2)
        start = math.cos(self.offset / (1 + self.offset) * math.pi / 2)
        alpha = (torch.cos(angle) / start).clamp(0.0, 1.0)
        sigma = (1 - alpha**2).clamp(min=0.0).sqrt()
        return alpha.to(t.dtype), sigma.to(t.dtype)


@dataclass(frozen=True)
class Gaussian:
    r"""Gaussian noise that is the same everywhere (paper, eq. 1), sampled by DDIM.

    .. math:: x_t = \alpha_t x_0 + \sigma_t \epsilon
    """

    schedule: NoiseSchedule

    def corrupt(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The weighted sum of a clean state and noise."""
        alpha, sigma = (expand(level, x_0) for level in self.schedule.levels(t))
        return alpha * x_0 + sigma * noise

    def start(self, noise: Tensor) -> Tensor:
        """The noise itself."""
        return noise

    def step(self, x_t: Tensor, x_0: Tensor, t: float, t_next: float) -> Tensor:
        """Deterministic DDIM (Song et al., 2021, eq. 12 with eta = 0): the noise stays the same."""
        (alpha, alpha_next), (sigma, sigma_next) = self.schedule.levels(
            torch.tensor([t, t_next], dtype=torch.float64)
        )
        kept = float(sigma_next / sigma)
        return (float(alpha_next - kept * alpha) * x_0).add_(x_t, alpha=kept)

    def guess(self, x_t: Tensor, t: Tensor, spread: float) -> tuple[Tensor, Tensor]:
        """The Wiener filter; the deviation is (B, 1, ..., 1)."""
        alpha, sigma = (expand(level, x_t) for level in self.schedule.levels(t))
        power = (alpha * spread) ** 2 + sigma**2
        return alpha * spread**2 / power * x_t, sigma * spread / power.sqrt()


DEFAULT = "gaussian-cosine"
PROCESSES: dict[str, Process] = {DEFAULT: Gaussian(Cosine())}
"""By the names that networks' settings hold.  Weights without a name have the default."""


def expand(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with the rank and dtype of ``like``."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
