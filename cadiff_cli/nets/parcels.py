"""Name the parcel of cortex voxels, one hemisphere at a time; a right one is seen as its mirror.

Position in the distance field gives a prior.  A small U-Net in cells of 4 mm, which sees the
structures and the field, moves the prior's borders to the sulci.  It never sees the image, so
neither contrast nor the network that drew the structures matters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.nets.blocks import Block, ChannelNorm, Conv3d, last, silu, unshuffle

STRIDE = 4
"""Voxels of 1 mm along an edge of the U-Net's cells."""
MULTIPLE = 4 * STRIDE
"""Hemispheres have multiples of so many voxels along each axis: the U-Net has three levels."""
DETAIL = 3
"""Maps at 1 mm: cortex of the hemisphere, its white matter, all other structures."""
REACH = 0.6
"""The prior ends at this D_x: a left hemisphere lies below 0.5, and gyri cross the midplane."""


@dataclass(frozen=True)
class ParcelConfig:
    """Sizes of the network.

    ``n_parcels`` are those of one hemisphere; ``n_classes`` the structures that it sees, with
    background.  ``channels`` are those of the three levels of the U-Net, at 4, 8 and 16 mm;
    ``own_channels`` are features that each voxel of a cell has of its own.  ``prior_shape`` is the
    grid of the prior over the part of the field that a left hemisphere reaches.
    """

    n_parcels: int = 49
    n_classes: int = 41
    channels: tuple[int, int, int] = (48, 96, 128)
    own_channels: int = 16
    hidden: int = 128
    dropout: float = 0.1
    prior_shape: tuple[int, int, int] = (32, 61, 53)


class ParcelNet(nn.Module):
    """Logits of parcels at points of a left hemisphere."""

    def __init__(self, config: ParcelConfig) -> None:
        super().__init__()
        self.config = config
        a, b, c = config.channels
        prior = torch.zeros(1, config.n_parcels, *config.prior_shape)
        self.register_buffer("prior", prior)
        self.prior: Tensor
        self.embed_detail = Conv3d(DETAIL * STRIDE**3, a, 1)
        self.embed_shares = Conv3d(config.n_classes + 3, a, 1)
        self.embed_prior = Conv3d(config.n_parcels, a, 1, bias=False)
        self.down_1, self.down_2 = Conv3d(a, b, 2, stride=2), Conv3d(b, c, 2, stride=2)
        self.up_2, self.up_1 = Conv3d(c, b, 1), Conv3d(b, a, 1)
        self.enter, self.leave = Block(a, a), Block(a, a)
        self.middle_in, self.deep, self.middle_out = Block(b, b), Block(c, c), Block(b, b)
        self.norm = ChannelNorm(a)
        self.to_own = Conv3d(a, config.own_channels * STRIDE**3, 1)
        answer = nn.Linear(config.hidden, config.n_parcels)
        self.to_logits = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(a + config.own_channels + DETAIL + 3, config.hidden),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            answer,
        )
        # The network begins as the prior.
        nn.init.zeros_(answer.weight)
        nn.init.zeros_(answer.bias)

    def prior_at(self, field: Tensor, prior: Tensor | None = None) -> Tensor:
        """Log-probability (n, parcels) at points (n, 3) of the field, in [0, 1].

        ``prior`` stands for the network's own (training leaves the person out).
        """
        reach = torch.tensor([REACH, 1.0, 1.0], device=field.device)
        return sampled(self.prior if prior is None else prior, field / reach)

    def forward(
        self, detail: Tensor, shares: Tensor, field: Tensor, at: Tensor, prior: Tensor | None = None
    ) -> Tensor:
        """Logits (n, parcels) at points ``at`` (n, 3) of a hemisphere, in voxels of 1 mm.

        ``detail`` (1, 3, 4x, 4y, 4z) are 0 or 1 (``DETAIL``); ``shares`` (1, classes, x, y, z) is
        the fraction of each structure in a cell; ``field`` (1, 3, x, y, z) is D in the cells'
        middles.  ``prior`` is as in ``prior_at``.
        """
        return self.logits(self.features(detail, shares, field, prior), detail, field, at, prior)

    def features(
        self, detail: Tensor, shares: Tensor, field: Tensor, prior: Tensor | None = None
    ) -> Tensor:
        """Features (1, C, x, y, z) of the cells; see ``forward``."""
        known = self.prior_at(field[0].flatten(1).T, prior).T.reshape(1, -1, *field.shape[2:])
        x = self.embed_detail(last(2 * unshuffle(detail, STRIDE) - 1))
        x = x + self.embed_shares(last(torch.cat([shares, 4 * field - 2], dim=1)))
        fine = self.enter(x + self.embed_prior(last(known.exp())))
        middle = self.middle_in(self.down_1(fine))
        x = self.up_2(self.deep(self.down_2(middle)))
        x = self.middle_out(middle + F.interpolate(x, scale_factor=2, mode="nearest"))
        x = fine + F.interpolate(self.up_1(x), scale_factor=2, mode="nearest")
        return silu(self.norm(self.leave(x)))

    def logits(
        self, cells: Tensor, detail: Tensor, field: Tensor, at: Tensor, prior: Tensor | None = None
    ) -> Tensor:
        """Logits (n, parcels) from the ``features`` of the cells; see ``forward``."""
        size = torch.tensor(detail.shape[2:], device=at.device)
        where = (at + 0.5) / size
        place = sampled(field, where, corners=False)
        voxel = torch.minimum(at.round().long().clamp(min=0), size - 1)
        i, j, k = voxel.T
        seen = detail[0][:, i, j, k].T
        part = voxel % STRIDE
        own = self.to_own(cells)[0].unflatten(0, (STRIDE**3, -1))
        i, j, k = (voxel // STRIDE).T
        own = own[(part[:, 0] * STRIDE + part[:, 1]) * STRIDE + part[:, 2], :, i, j, k]
        near = sampled(cells.float(), where, corners=False)
        row = torch.cat([near, own.float(), seen, 4 * place - 2], dim=1)
        answer: Tensor = self.prior_at(place, prior) + self.to_logits(row).float()
        return answer


def sampled(volume: Tensor, at: Tensor, *, corners: bool = True) -> Tensor:
    """Values (n, C) of a volume (1, C, X, Y, Z) at points (n, 3), linear; constant beyond its ends.

    0 and 1 are the centres of the outermost voxels, or the outer faces without ``corners``.
    """
    points = (2 * at - 1).flip(-1)[None, :, None, None]
    values = F.grid_sample(volume, points, padding_mode="border", align_corners=corners)
    return values[0, :, :, 0, 0].T
