"""From noise to a clean state, for a network that estimates the clean state.

The sampler is a generator: progress, early stop and inspection need no callbacks.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TypeVar

S = TypeVar("S")


def spaced_times(steps: int) -> list[float]:
    """``steps`` equally spaced times from 1 down; the next one would be 0."""
    return [1 - k / steps for k in range(steps)]


def sample(
    step: Callable[[S, S, float, float], S],
    denoise: Callable[[S, float], S],
    state: S,
    times: list[float],
) -> Iterator[S]:
    """Yield the state at each of the falling ``times``, beginning with ``state`` at the first.

    ``denoise(state, t)`` estimates the clean state; ``step`` is a ``Process``'s, or applies it to
    the parts of a state.  At the last time nothing is estimated any more.
    """
    yield state
    for t, t_next in pairwise(times):
        state = step(state, denoise(state, t), t, t_next)
        yield state
