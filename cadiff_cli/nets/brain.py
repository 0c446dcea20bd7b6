"""The brain-mask network: a head at 2 mm -> signed distance to the brain's border, in mm.

A distance is smooth, so it can be read between voxels: the border at 1 mm has no 2 mm steps.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.nets.blocks import ChannelNorm, last
from cadiff_cli.nets.unet import shuffle, unshuffle

SPACING_MM = 2.0
REACH_MM = 10.0
"""Distances beyond this are all the same to the network."""


@dataclass(frozen=True)
class BrainConfig:
    """Channels of the levels, from 4 mm down."""

    channels: tuple[int, ...] = (32, 64, 96, 128)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "BrainConfig":
        """Read back what ``config.as_dict`` made for a weights file's metadata."""
        return BrainConfig(tuple(values["channels"]))

    @property
    def multiple(self) -> int:
        """Sizes of the input must be multiples of this many voxels."""
        return int(2 ** len(self.channels))


class Block(nn.Module):
    """Two 3^3 convolutions around a shortcut."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = ChannelNorm(c_in), ChannelNorm(c_out)
        self.conv_1 = nn.Conv3d(c_in, c_out, 3, padding=1)
        self.conv_2 = nn.Conv3d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, X, Y, Z) -> (B, c_out, X, Y, Z)."""
        h = self.conv_1(F.silu(self.norm_1(x)))
        out: Tensor = self.skip(x) + self.conv_2(F.silu(self.norm_2(h)))
        return out


class BrainNet(nn.Module):
    """A U-Net over blocks of 2^3 voxels: the input loses nothing, and costs an eighth."""

    def __init__(self, config: BrainConfig) -> None:
        super().__init__()
        self.config = config
        c = config.channels
        self.stem = nn.Conv3d(8, c[0], 3, padding=1)
        self.encoder = nn.ModuleList(Block(n, n) for n in c)
        self.down = nn.ModuleList(nn.Conv3d(a, b, 2, stride=2) for a, b in pairwise(c))
        self.bottom = Block(c[-1], c[-1])
        self.up = nn.ModuleList(nn.Conv3d(b, a, 1) for a, b in pairwise(c))
        self.decoder = nn.ModuleList(Block(2 * n, n) for n in c[:-1])
        self.norm = ChannelNorm(c[0])
        self.out = nn.Conv3d(c[0], 8, 3, padding=1)

    def forward(self, head: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) intensities in [0, 1] -> (B, 1, X, Y, Z) float32 mm, inside positive."""
        x = self.stem(last(2 * unshuffle(head) - 1))
        skips = []
        for level, block in enumerate(self.encoder):
            if level:
                x = self.down[level - 1](x)
            x = block(x)
            skips.append(x)
        x = self.bottom(x)
        for level in reversed(range(len(self.decoder))):
            x = F.interpolate(self.up[level](x), scale_factor=2, mode="nearest")
            x = self.decoder[level](torch.cat([skips[level], x], dim=1))
        return REACH_MM * shuffle(self.out(F.silu(self.norm(x))).float())
