"""Building blocks: two time embeddings, residual blocks, time-adapted channel attention.

Convolutions run in ``channels_last_3d`` and, under autocast, in bfloat16: on a CPU both decide the
speed.  Normalisation is per voxel over channels, so that a patch and the whole volume see the same
network away from their borders.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.diffusion.process import PROCESSES
from cadiff_cli.errors import DataError

N = TypeVar("N", bound=nn.Module)


def check_process(name: str) -> None:
    """Raise ``DataError`` unless there is a noise process of this name."""
    if name not in PROCESSES:
        raise DataError(
            f"the noise process is {name!r}, not one of {list(PROCESSES)}",
            "name one of these; for weights, use the version of cadiff that wrote them",
        )


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each voxel; (B, C, X, Y, Z)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        last = x.permute(0, 2, 3, 4, 1)
        shape = self.weight.shape
        normed = F.layer_norm(last, shape, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return normed.permute(0, 4, 1, 2, 3)


SMALL = 20480
"""Channels x X x Y of one float32 volume up to which torch leaves oneDNN (ATen, ``use_mkldnn``)."""


class Conv3d(nn.Conv3d):
    """A convolution (B, C_in, X, Y, Z) -> (B, C_out, X', Y', Z') that is fast for one small volume.

    In float32 on a CPU, torch computes a single volume of at most ``SMALL`` with a loop of its own,
    up to 14 times slower than oneDNN, but not two volumes.  The halves of the volume, with the rim
    that the kernel reaches into, are two volumes; the result is the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Same result as ``nn.Conv3d``, up to rounding."""
        kernel, stride, rim = self.kernel_size[0], self.stride[0], int(self.padding[0])
        half, odd = divmod((x.shape[2] + 2 * rim - kernel) // stride + 1, 2)
        is_small = x.shape[0] == 1 and math.prod(x.shape[1:4]) <= SMALL
        if kernel == 1 or odd or not is_small or not self._is_float32_on_cpu(x):
            return super().forward(x)
        padded = F.pad(x, (0, 0, 0, 0, rim, rim)) if rim else x
        length = (half - 1) * stride + kernel
        halves = [padded.narrow(2, start, length) for start in (0, half * stride)]
        padding = (0, *self.padding[1:])
        out = F.conv3d(torch.cat(halves), self.weight, self.bias, self.stride, padding)
        # In channels_last memory the second half lies behind the first: nothing is copied.
        return out.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(3, 0, 1, 2)[None]

    @staticmethod
    def _is_float32_on_cpu(x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and x.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
        )


class TimeEmbedding(nn.Module):
    """t in [0, 1], (B,) -> (B, channels): sines and cosines, then a two-layer perceptron."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        frequencies = torch.exp(torch.linspace(0.0, math.log(1000.0), half))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.frequencies: Tensor
        self.mlp = nn.Sequential(
            nn.Linear(2 * half, channels), nn.SiLU(), nn.Linear(channels, channels)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embed a batch of times."""
        angle = t[:, None] * self.frequencies[None]
        embedded: Tensor = self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))
        return embedded


class ResidualBlock(nn.Module):
    """Two 3^3 convolutions; the two times enter through separate linear layers (section II-C).

    Each linear layer yields half of the channels; the halves are concatenated and added to the
    feature map, as the paper says.
    """

    def __init__(self, c_in: int, c_out: int, c_time: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = ChannelNorm(c_in), ChannelNorm(c_out)
        self.conv_1 = Conv3d(c_in, c_out, 3, padding=1)
        self.conv_2 = Conv3d(c_out, c_out, 3, padding=1)
        self.time_field = nn.Linear(c_time, c_out // 2)
        self.time_label = nn.Linear(c_time, c_out - c_out // 2)
        self.skip = Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv_2.weight)
        assert self.conv_2.bias is not None
        nn.init.zeros_(self.conv_2.bias)

    def forward(self, x: Tensor, e_field: Tensor, e_label: Tensor) -> Tensor:
        """(B, c_in, X, Y, Z) and two embeddings (B, c_time) -> (B, c_out, X, Y, Z)."""
        h = self.conv_1(silu(self.norm_1(x)))
        e = torch.cat([self.time_field(e_field), self.time_label(e_label)], dim=1)
        h = plus(h, e.to(h.dtype)[:, :, None, None, None])
        return plus(self.conv_2(silu(self.norm_2(h))), self.skip(x))


class DynamicConv1d(nn.Module):
    """A 1-D convolution whose kernel is a time-dependent mixture of K kernels (eq. 11)."""

    def __init__(self, size: int, c_time: int, n_kernels: int = 4) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.randn(n_kernels, size) / math.sqrt(size))
        self.bias = nn.Parameter(torch.zeros(n_kernels))
        self.mixture = nn.Linear(c_time, n_kernels)

    def forward(self, pooled: Tensor, e: Tensor) -> Tensor:
        """``pooled`` (B, C), ``e`` (B, c_time) -> (B, C)."""
        pi = self.mixture(e).softmax(dim=1)
        weight, bias = pi @ self.weight.to(pi.dtype), pi @ self.bias.to(pi.dtype)
        # One kernel per sample: samples become groups.
        out: Tensor = F.conv1d(
            pooled[None], weight[:, None], bias, padding=self.size // 2, groups=pooled.shape[0]
        )
        return out[0]


class TimeAdaptedChannelAttention(nn.Module):
    """TACA (section II-E, eqs. 9-12): reweight a skip connection's channels by the times."""

    def __init__(self, c_time: int, sizes: Sequence[int] = (7, 11, 15)) -> None:
        super().__init__()
        self.time = nn.Linear(2 * c_time, c_time)
        self.convs = nn.ModuleList(DynamicConv1d(size, c_time) for size in sizes)
        self.fuse = nn.Conv1d(len(sizes), 1, 1)

    def forward(self, encoder: Tensor, decoder: Tensor, e_field: Tensor, e_label: Tensor) -> Tensor:
        """Features (B, C, X, Y, Z) of both sides -> (B, 2 C, X, Y, Z)."""
        joined = torch.cat([encoder, decoder], dim=1)
        pooled = joined.mean(dim=(2, 3, 4), dtype=torch.float32)
        with torch.autocast(joined.device.type, enabled=False):
            e = self.time(torch.cat([e_field, e_label], dim=1).float())
            mask = self.fuse(torch.stack([conv(pooled, e) for conv in self.convs], dim=1))[:, 0]
        weights = (1 + mask.sigmoid()).to(joined.dtype)[:, :, None, None, None]
        return joined * weights if torch.is_grad_enabled() else joined.mul_(weights)


class Concatenate(nn.Module):
    """The plain skip connection that TACA is compared with."""

    def forward(self, encoder: Tensor, decoder: Tensor, _e_d: Tensor, _e_m: Tensor) -> Tensor:
        """Features (B, C, X, Y, Z) of both sides -> (B, 2 C, X, Y, Z)."""
        return torch.cat([encoder, decoder], dim=1)


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nothing else needs: in place, unless gradients are wanted."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def plus(x: Tensor, y: Tensor) -> Tensor:
    """``x + y``, where nothing else needs ``x``: in place, unless gradients are wanted."""
    return x + y if torch.is_grad_enabled() else x.add_(y)


class Block(nn.Module):
    """Two 3^3 convolutions around a shortcut, without a time."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = ChannelNorm(c_in), ChannelNorm(c_out)
        self.conv_1 = Conv3d(c_in, c_out, 3, padding=1)
        self.conv_2 = Conv3d(c_out, c_out, 3, padding=1)
        self.skip = Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, X, Y, Z) -> (B, c_out, X, Y, Z)."""
        h = self.conv_1(silu(self.norm_1(x)))
        return plus(self.conv_2(silu(self.norm_2(h))), self.skip(x))


def channels_last(net: N) -> N:
    """``net`` with its convolution weights in ``channels_last_3d`` memory (in place)."""
    net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return net


def last(x: Tensor) -> Tensor:
    """``x`` in ``channels_last_3d`` memory."""
    return x.contiguous(memory_format=torch.channels_last_3d)


BLOCK = 2
"""Voxels along a side of the blocks that ``unshuffle`` turns into channels."""


# MONAI's pixelunshuffle and pixelshuffle give the same, but importing them takes 1.3 s a run.
def unshuffle(image: Tensor, side: int = BLOCK) -> Tensor:
    """(B, C, s x, s y, s z) -> (B, s^3 C, x, y, z) of blocks: nothing is lost, unlike pooling.

    The voxels of a block's first channel come first, then those of the second.
    """
    b, c, *shape = image.shape
    x, y, z = (n // side for n in shape)
    blocks = image.reshape(b, c, x, side, y, side, z, side)
    return blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, -1, x, y, z)


def at_blocks(image: Tensor, blocks: Tensor) -> Tensor:
    """(2x, 2y, 2z, C) at some blocks (n, 3) -> (n, 8, C); voxels as ``unshuffle`` orders them."""
    x, y, z, c = image.shape
    s = BLOCK
    parts = image.reshape(x // s, s, y // s, s, z // s, s, c).permute(0, 2, 4, 1, 3, 5, 6)
    return parts[blocks.unbind(1)].flatten(1, 3)


def upsampled(coarse: Tensor, blocks: Tensor) -> Tensor:
    """(x, y, z, C) at twice the resolution, at some blocks (n, 3) -> (n, 8, C).

    Trilinear, as ``F.interpolate`` does it: a voxel's part lies a quarter of a voxel off its
    centre, so it takes 3/4 of the voxel and 1/4 of the neighbour along each axis.
    """
    along = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.75, 0.25]])
    weights = torch.kron(torch.kron(along, along), along).to(coarse)
    limit = torch.tensor(coarse.shape[:3], device=blocks.device) - 1
    steps = torch.cartesian_prod(*3 * [torch.arange(-1, 2, device=blocks.device)])
    around = (blocks[:, None] + steps).clamp_(min=0).minimum(limit)
    return weights @ coarse[around.unbind(2)]


def shuffle(blocks: Tensor) -> Tensor:
    """(B, 8 C, x, y, z) -> (B, C, 2x, 2y, 2z); of one channel, the inverse of ``unshuffle``.

    The C channels of a block's first voxel come first, then those of the second.
    """
    b, _, x, y, z = blocks.shape
    s = BLOCK
    parts = blocks.reshape(b, s, s, s, -1, x, y, z)
    return parts.permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(b, -1, x * s, y * s, z * s)
