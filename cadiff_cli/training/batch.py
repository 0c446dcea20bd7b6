"""Tensors that travel together through training, their losses, and the randomness behind them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

import torch
from torch import Tensor

B = TypeVar("B", bound="Batch")


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """One draw or several; the first axis of each field, a tensor, counts them."""

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same in memory that a GPU can fetch by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(
            **{f.name: change(getattr(self, f.name)) for f in dataclasses.fields(self)}
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """Weighted scalar losses of a step, and their sum."""

    @property
    def total(self) -> Tensor:
        """The sum of all parts: what is minimised."""
        first, *others = (getattr(self, part.name) for part in dataclasses.fields(self))
        total: Tensor = sum(others, start=first)
        return total


def stack(draws: Sequence[B]) -> B:
    """Several draws as one batch."""
    kind = type(draws[0])
    return kind(
        **{
            f.name: torch.cat([getattr(draw, f.name) for draw in draws])
            for f in dataclasses.fields(kind)
        }
    )


def generator_of(seed: int, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The randomness of draw ``index`` of a run: a function of both numbers alone."""
    return torch.Generator(device).manual_seed(seed * 10_000_019 + index)
