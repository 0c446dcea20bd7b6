"""The brain-mask network: a head at 2 mm -> signed distance to the brain's border, in mm.

U-Nets in a cascade.  The first looks at the whole head at 4 mm and finds the brain; the second sees
the head at 2 mm and the first one's answer, and finds the border.  A distance is smooth, so it can
be read between voxels: the border at 1 mm has no 2 mm steps.

A third network may tell what the inner skull holds: the intracranial volume.  It names the tissue
of the eight parts of 1 mm of each voxel.  It sees every head at 2 mm, so that the volume depends
little on the voxels of the scan.
"""

from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.nets.blocks import Block, ChannelNorm, Conv3d, last, shuffle, unshuffle

SPACING_MM = 2.0
REACH_MM = 10.0
"""Distances beyond this are all the same to the network."""


class HeadTissue(IntEnum):
    """What the network of the inner skull tells apart.

    ``FLUID`` is all that the skull holds besides the brain, ``SOFT`` all that is outside it and has
    no name of its own.
    """

    AIR = 0
    BRAIN = 1
    FLUID = 2
    BONE = 3
    MARROW = 4
    SOFT = 5


@dataclass(frozen=True)
class BrainConfig:
    """Channels of the levels: of ``coarse`` from 8 mm down, of ``fine`` from 4 mm down.

    With ``skull`` the network also finds the inner skull: ``skull_channels`` from 2 mm down.
    """

    coarse: tuple[int, ...] = (32, 64, 96, 96)
    fine: tuple[int, ...] = (32, 64, 96)
    skull: bool = False
    skull_channels: tuple[int, ...] = (32, 64, 96)

    @property
    def multiple(self) -> int:
        """Sizes of a whole head must be multiples of this many voxels."""
        return int(max(2 * 2 ** len(self.coarse), self.fine_multiple))

    @property
    def fine_multiple(self) -> int:
        """Sizes of what is refined must be multiples of this many voxels."""
        return int(2 ** len(self.fine))

    @property
    def skull_multiple(self) -> int:
        """Sizes of the part at 2 mm in which the inner skull is found must be multiples of this."""
        return int(2 ** (len(self.skull_channels) - 1))


class BlockNet(nn.Module):
    """A U-Net over blocks of 2^3 voxels: the input loses nothing, and costs an eighth."""

    def __init__(self, c_in: int, channels: tuple[int, ...], c_out: int = 1) -> None:
        super().__init__()
        c = channels
        self.stem = Conv3d(8 * c_in, c[0], 3, padding=1)
        self.encoder = nn.ModuleList(Block(n, n) for n in c)
        self.down = nn.ModuleList(Conv3d(a, b, 2, stride=2) for a, b in pairwise(c))
        self.bottom = Block(c[-1], c[-1])
        self.up = nn.ModuleList(Conv3d(b, a, 1) for a, b in pairwise(c))
        self.decoder = nn.ModuleList(Block(2 * n, n) for n in c[:-1])
        self.norm = ChannelNorm(c[0])
        self.out = Conv3d(c[0], 8 * c_out, 3, padding=1)

    def forward(self, *images: Tensor) -> Tensor:
        """Images (B, 1, X, Y, Z) -> (B, c_out, X, Y, Z) float32."""
        x = self.stem(last(torch.cat([unshuffle(image) for image in images], dim=1)))
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
        return shuffle(self.out(F.silu(self.norm(x))).float())


class BrainNet(nn.Module):
    """Where the brain is, at 4 mm, then where it ends, at 2 mm.

    ``skull`` is a third network, for the inner skull: the brain's border does not depend on it.
    """

    def __init__(self, config: BrainConfig) -> None:
        super().__init__()
        self.config = config
        self.coarse = BlockNet(1, config.coarse)
        self.fine = BlockNet(2, config.fine)
        self.skull = BlockNet(2, config.skull_channels, len(HeadTissue)) if config.skull else None

    def locate(self, head: Tensor) -> Tensor:
        """(B, 1, 2x, 2y, 2z) intensities in [0, 1] at 2 mm -> (B, 1, x, y, z) mm at 4 mm."""
        return self.locate_at_4mm(F.avg_pool3d(head, 2))

    def locate_at_4mm(self, head: Tensor) -> Tensor:
        """As ``locate``, of a head whose voxels have 4 mm already; same shape."""
        distance: Tensor = REACH_MM * self.coarse(2 * head - 1)
        return distance

    def refine(self, head: Tensor, located: Tensor) -> Tensor:
        """``head`` and what ``locate`` says of it, or the same part of both -> mm at 2 mm."""
        hint = F.interpolate(located, scale_factor=2, mode="trilinear") / REACH_MM
        correction: Tensor = self.fine(2 * head - 1, hint.clamp(-1, 1))
        return REACH_MM * (hint + correction)

    def tell_tissues(self, head: Tensor, distance: Tensor) -> Tensor:
        """A part of a head at 2 mm and the distance (mm) to the brain's border there -> logits.

        Both are (B, 1, x, y, z), intensities in [0, 1]; logits are (B, tissues, 2x, 2y, 2z), in the
        order of ``HeadTissue``.  The network must know the skull.
        """
        assert self.skull is not None
        # Square roots: fluid and bone, between which the border lies, are the darkest of a head.
        images = 2 * head.sqrt() - 1, (distance / REACH_MM).clamp(-1, 1)
        finer = (F.interpolate(image, scale_factor=2, mode="trilinear") for image in images)
        logits: Tensor = self.skull(*finer)
        return logits

    def enclose(self, head: Tensor, distance: Tensor) -> Tensor:
        """As ``tell_tissues``: the probability (B, 2x, 2y, 2z) that the skull holds each part."""
        p = self.tell_tissues(head, distance).softmax(dim=1)
        return p[:, HeadTissue.BRAIN] + p[:, HeadTissue.FLUID]
