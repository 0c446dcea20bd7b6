"""The network of conditional atlases: a condition -> the velocity of a base brain's deformation.

Diff-Def (Starck et al., 2024): latent diffusion, conditioned by cross-attention, whose latents a
*deformation decoder* turns into a field.  The field is a stationary velocity, so its exponential
cannot fold.  Conditions are numbers, (B, 3) in [0, 1]: age, sex and ventricles; NaN is unknown.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cadiff_cli.diffusion.process import DEFAULT, PROCESSES, Process
from cadiff_cli.diffusion.sampler import sample, spaced_times
from cadiff_cli.errors import DataError, UsageError
from cadiff_cli.nets.blocks import TimeEmbedding, check_process
from cadiff_cli.nets.condition import NAMES, kernel_weights

MULTIPLE = 4
"""Sizes of a velocity grid are multiples of this: the autoencoder halves twice."""
LINEAR, AUTOENCODER = "linear", "autoencoder"


@dataclass(frozen=True)
class AtlasConfig:
    """Sizes of the network.

    ``shape`` is that of the velocity grid.  With ``latent = "linear"`` a velocity is a mean and
    ``components`` linear ones, and a transformer of ``depth`` layers denoises their
    coefficients.  With ``"autoencoder"`` (the paper's way) latents are feature maps at a quarter of
    the size, of ``components`` channels; ``channels`` are the autoencoder's, and twice as many the
    denoising U-Net's.  ``width`` is the size of embeddings, ``frequencies`` the number of Fourier
    features of a condition.  ``steps`` denoise an atlas, in training as later.  ``people`` are
    those whose latents make the centre of a condition (``ConditionCentre``); 0: it has none.
    """

    shape: tuple[int, int, int] = (44, 52, 48)
    latent: str = LINEAR
    components: int = 18
    width: int = 64
    depth: int = 2
    heads: int = 4
    frequencies: int = 4
    channels: tuple[int, ...] = (16, 32, 32)
    steps: int = 10
    process: str = DEFAULT
    people: int = 0

    def __post_init__(self) -> None:
        """Raise ``DataError`` or ``UsageError`` for settings that no network can have."""
        check_process(self.process)
        if self.latent not in (LINEAR, AUTOENCODER):
            raise DataError(
                f"the latent space is {self.latent!r}", f"use {LINEAR!r} or {AUTOENCODER!r}"
            )
        if self.people and self.latent != LINEAR:
            raise UsageError(
                f"the latent space {self.latent!r} has no centre of {self.people} people",
                f"use {LINEAR!r}, or no people",
            )
        if odd := [n for n in self.shape if n % MULTIPLE]:
            raise DataError(f"the velocity grid has sizes {odd}", f"use multiples of {MULTIPLE}")
        if self.width % self.heads:
            raise UsageError(
                f"width {self.width} is no multiple of {self.heads} heads",
                f"give a width that {self.heads} divides",
            )


class ConditionEmbedding(nn.Module):
    """A token for each number of a condition: Fourier features, or a learnt token if unknown."""

    def __init__(self, frequencies: int, width: int) -> None:
        super().__init__()
        scale = math.pi * 2.0 ** torch.arange(frequencies)
        self.register_buffer("scale", scale, persistent=False)
        self.scale: Tensor
        self.weight = nn.Parameter(torch.randn(len(NAMES), 2 * frequencies + 1, width) * 0.3)
        self.bias = nn.Parameter(torch.zeros(len(NAMES), width))
        self.unknown = nn.Parameter(torch.randn(len(NAMES), width) * 0.3)

    def forward(self, conditions: Tensor) -> Tensor:
        """(B, 3), NaN is unknown -> (B, 3, width)."""
        known = conditions.isfinite()
        x = conditions.nan_to_num()[..., None]
        # Half the base frequency: 0 and 1 are the ends of a range, not neighbours on a circle.
        angle = x * self.scale / 2
        features = torch.cat([x, angle.sin(), angle.cos()], dim=-1)
        tokens = torch.einsum("bnf,nfw->bnw", features, self.weight) + self.bias
        return torch.where(known[..., None], tokens, self.unknown)


class LinearLatent(nn.Module):
    """Mean and components of velocities: coefficients have variance 1.

    They are buffers: components are a linear decoder in closed form.  The first ones are the
    directions in which velocities follow what must not be lost (volumes of small structures, which
    hardly count among all of a brain), the others principal components of what is left.
    """

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__()
        size = 3 * math.prod(config.shape)
        self.space = (config.components,)
        self.shape = config.shape
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.zeros(config.components, size))
        self.mean: Tensor
        self.basis: Tensor

    @torch.no_grad()
    def fit(self, velocities: Tensor, followed: Tensor | None = None) -> None:
        """Set mean and components to those of ``velocities`` (people, 3, X, Y, Z).

        ``followed`` (people, K) are numbers that the first components follow; NaN is the mean.
        """
        x = velocities.flatten(1)
        mean = x.mean(dim=0)
        centred = x - mean
        first = centred[:0]
        if followed is not None:
            first = _directions(centred, followed)[: len(self.basis)]
            centred = centred - _coefficients(centred, first) @ first
        _, vectors = torch.linalg.eigh((centred @ centred.T).double())
        n = min(len(self.basis), len(x) - 1) - len(first)
        others = vectors[:, len(x) - n :].flip(1).float().T @ centred / math.sqrt(len(x) - 1)
        self.mean.copy_(mean)
        self.basis.zero_()
        self.basis[: len(first) + n] = torch.cat([first, others])

    def encode(self, velocities: Tensor) -> Tensor:
        """(B, 3, X, Y, Z) -> (B, components): the nearest combination."""
        return _coefficients(velocities.flatten(1) - self.mean, self.basis)

    def decode(self, z: Tensor) -> Tensor:
        """(B, components) -> (B, 3, X, Y, Z) mm."""
        return (self.mean + z @ self.basis).reshape(len(z), 3, *self.shape)


def _directions(centred: Tensor, followed: Tensor) -> Tensor:
    """(k, size): where ``centred`` (n, size) goes with each of ``followed`` (n, K), all else equal.

    Numbers that do not vary have no direction.
    """
    apart = (followed - followed.nanmean(dim=0)).nan_to_num()
    apart = apart[:, apart.std(dim=0) > 0]
    directions = torch.linalg.pinv(apart) @ centred
    deviation = _coefficients(centred, directions).std(dim=0)
    return torch.as_tensor(directions * deviation[:, None])


def _coefficients(centred: Tensor, basis: Tensor) -> Tensor:
    """(n, k): of the nearest combination of ``basis`` (k, size) to each row of (n, size)."""
    gram = basis @ basis.T
    # Components that the people do not fill are 0, and so are their coefficients.
    return torch.as_tensor(centred @ basis.T @ torch.linalg.pinv(gram, hermitian=True))


class AutoencoderLatent(nn.Module):
    """The paper's way: MONAI's autoencoder, here of velocities, as the deformation decoder.

    ``scale`` brings latents to variance 1; it is learnt together with the autoencoder.
    """

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__()
        from monai.networks.nets import AutoencoderKL

        levels = len(config.channels)
        if levels != 3:
            raise DataError(f"{levels} channels of the autoencoder", "give three")
        self.space = (config.components, *(n // MULTIPLE for n in config.shape))
        self.shape = config.shape
        self.net = AutoencoderKL(
            spatial_dims=3,
            in_channels=3,
            out_channels=3,
            num_res_blocks=1,
            channels=config.channels,
            attention_levels=(False,) * levels,
            latent_channels=config.components,
            norm_num_groups=8,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )
        self.register_buffer("scale", torch.ones(()))
        self.scale: Tensor

    def encode(self, velocities: Tensor) -> Tensor:
        """(B, 3, X, Y, Z) -> (B, components, X/4, Y/4, Z/4)."""
        mean, _ = self.net.encode(velocities)
        return torch.as_tensor(mean / self.scale)

    def decode(self, z: Tensor) -> Tensor:
        """The inverse, in mm."""
        return torch.as_tensor(self.net.decode(z * self.scale))


class ConditionCentre(nn.Module):
    """The middle of a condition's people in a linear latent space: kernel regression.

    A hundred people determine the mean of a condition well, and little else.  So the denoiser
    learns what is left: how people differ from it, and what morphology preservation corrects.
    """

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__()
        self.register_buffer("conditions", torch.zeros(config.people, len(NAMES)))
        self.register_buffer("latents", torch.zeros(config.people, config.components))
        self.register_buffer("widths", torch.ones(len(NAMES)))
        self.conditions: Tensor
        self.latents: Tensor
        self.widths: Tensor

    @torch.no_grad()
    def fit(self, conditions: Tensor, latents: Tensor, widths: Sequence[float]) -> None:
        """Keep people: ``conditions`` (n, 3), ``latents`` (n, components), widths of the kernel."""
        self.conditions.copy_(conditions)
        self.latents.copy_(latents)
        self.widths.copy_(self.widths.new_tensor(widths))

    def forward(self, conditions: Tensor, without: Tensor | None = None) -> Tensor:
        """(B, 3) -> (B, components); people of the indices ``without`` (B,) do not count."""
        return kernel_weights(self.conditions, conditions, self.widths, without) @ self.latents


class TokenDenoiser(nn.Module):
    """A transformer whose tokens are coefficients; it attends to the condition's tokens."""

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__()
        n, width = config.components, config.width
        self.enter = nn.Parameter(torch.randn(n, width))
        self.place = nn.Parameter(torch.randn(n, width))
        self.time = TimeEmbedding(width)
        layer = nn.TransformerDecoderLayer(
            width, config.heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, config.depth, nn.LayerNorm(width))
        self.leave = nn.Parameter(torch.zeros(n, width))

    def forward(self, z: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """(B, components) at ``t`` (B,), and (B, 3, width) -> (B, components)."""
        x = z[..., None] * self.enter + self.place + self.time(t)[:, None]
        return torch.as_tensor((self.layers(x, tokens) * self.leave).sum(dim=-1))


class MapDenoiser(nn.Module):
    """The paper's way: MONAI's U-Net with cross-attention, on feature maps."""

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__()
        from monai.networks.nets import DiffusionModelUNet

        self.net = DiffusionModelUNet(
            spatial_dims=3,
            in_channels=config.components,
            out_channels=config.components,
            num_res_blocks=1,
            channels=tuple(2 * c for c in config.channels[:2]),
            attention_levels=(False, True),
            norm_num_groups=8,
            num_head_channels=config.width // config.heads,
            with_conditioning=True,
            cross_attention_dim=config.width,
        )

    def forward(self, z: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Feature maps at ``t`` (B,), and (B, 3, width) -> feature maps."""
        return torch.as_tensor(self.net(z, 1000 * t, tokens))


class AtlasNet(nn.Module):
    """Latents of velocities, their centre, their denoiser and the embedding of conditions."""

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__()
        self.config = config
        linear = config.latent == LINEAR
        self.embed = ConditionEmbedding(config.frequencies, config.width)
        self.latent = LinearLatent(config) if linear else AutoencoderLatent(config)
        self.centre = ConditionCentre(config) if config.people else None
        self.denoiser = TokenDenoiser(config) if linear else MapDenoiser(config)

    @property
    def process(self) -> Process:
        """The noise process of the latents."""
        return PROCESSES[self.config.process]

    def encode(
        self, velocities: Tensor, conditions: Tensor, without: Tensor | None = None
    ) -> Tensor:
        """Latents of velocities (B, 3, X, Y, Z) of ``conditions``, from the centre of these.

        ``without`` (B,) are the indices of these very people among those of the centre: they would
        be too near to a centre that they are part of.
        """
        z = self.latent.encode(velocities)
        return z if self.centre is None else z - self.centre(conditions, without)

    def decode(self, z: Tensor, conditions: Tensor) -> Tensor:
        """The inverse, in mm."""
        return self.latent.decode(z if self.centre is None else z + self.centre(conditions))

    def estimate(self, z_t: Tensor, t: Tensor, conditions: Tensor) -> Tensor:
        """The clean latent: what the noise process guesses, and a learnt multiple of its error."""
        mean, deviation = self.process.guess(z_t, t, 1.0)
        return torch.as_tensor(mean + deviation * self.denoiser(z_t, t, self.embed(conditions)))

    def denoise(self, noise: Tensor, conditions: Tensor) -> Tensor:
        """Latents of ``conditions`` from standard normal ``noise`` (differentiable).

        Noise of 0 is the centre of all noise: it becomes the atlas of the condition's people.
        """

        def clean(z: Tensor, t: float) -> Tensor:
            return self.estimate(z, z.new_full((len(z),), t), conditions)

        times = spaced_times(self.config.steps)
        states = sample(self.process.step, clean, self.process.start(noise), times)
        (z,) = deque(states, maxlen=1)
        return clean(z, times[-1])

    def forward(self, noise: Tensor, conditions: Tensor) -> Tensor:
        """Velocities (B, 3, X, Y, Z) in mm."""
        return self.decode(self.denoise(noise, conditions), conditions)
