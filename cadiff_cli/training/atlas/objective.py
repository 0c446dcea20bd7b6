"""What a conditional atlas is trained for: to denoise people, and to lie in the middle of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cadiff_cli.nets.atlas import AtlasNet, AutoencoderLatent
from cadiff_cli.spatial.deformation import exponential, jacobian
from cadiff_cli.training.atlas.config import PeopleConfig
from cadiff_cli.training.atlas.draws import PeopleBatch
from cadiff_cli.training.atlas.losses import (
    AtlasLosses,
    AutoencoderLosses,
    bending,
    divergence_from_normal,
    mean_square,
)
from cadiff_cli.training.atlas.volumes import BaseVolumes

PURE_NOISE = 0.3
"""Share of draws at t = 1, where sampling begins and the condition is all that is known."""
SCALE_MEMORY = 0.98


@dataclass(frozen=True)
class AtlasObjective:
    """Diffusion loss, morphology preservation, volumes of structures and smoothness.

    ``brain`` (X, Y, Z) weighs the base brain on the velocity grid with voxels of ``zooms_mm``.
    """

    config: PeopleConfig
    brain: Tensor
    volumes: BaseVolumes
    zooms_mm: Sequence[float]

    def __call__(
        self, net: AtlasNet, batch: PeopleBatch, generator: torch.Generator, _progress: float = 1.0
    ) -> AtlasLosses:
        """Losses of a batch.

        In points x of the base, the mean displacement from the atlas exp(v) to people exp(v_i) is
        mean_i exp(v_i)(x) - exp(v)(x): the people's fields are fixed, and nothing is registered.
        """
        c, device = self.config, batch.velocity.device
        # The nets are tiny, and half precision would cost the velocities their accuracy.
        with torch.autocast(device.type, enabled=False):
            with torch.no_grad():
                z = net.encode(batch.velocity, batch.condition, batch.person)
            t = torch.rand(len(z), generator=generator, device=device)
            pure = torch.rand(len(z), generator=generator, device=device) < PURE_NOISE
            t = t.masked_fill(pure, 1.0)
            noise = torch.randn(z.shape, generator=generator, device=device)
            estimate = net.estimate(net.process.corrupt(z, t, noise), t, batch.condition)

            # The exponential is most of the work: not every draw needs an atlas.
            some = slice(c.atlases)
            begin = torch.zeros_like(z[some])
            if c.preserve == "samples":
                begin = torch.randn(begin.shape, generator=generator, device=device)
            velocity = net(begin, batch.wanted[some])
            moved = exponential(velocity, self.zooms_mm)
            mean = batch.neighbours[some] - moved
            shares = self.volumes.log_shares(velocity, jacobian(moved, self.zooms_mm))
            # The base or all neighbours may lack a structure: then nothing is asked of it.
            off = (shares - batch.log_shares[some]).nan_to_num()
            zooms = velocity.new_tensor(list(self.zooms_mm)).reshape(3, 1, 1, 1)
            return AtlasLosses(
                (estimate - z).square().mean(),
                c.morphology * mean_square(mean, self.brain.to(device)),
                c.volumes * off.square().mean(),
                c.smoothness * bending(velocity / zooms),
            )


@dataclass(frozen=True)
class AutoencoderObjective:
    """The autoencoder alone: velocities as they are, latents not far from normal."""

    config: PeopleConfig
    brain: Tensor

    def __call__(
        self, net: AtlasNet, batch: PeopleBatch, generator: torch.Generator, _progress: float = 1.0
    ) -> AutoencoderLosses:
        """Losses of a batch; keeps the scale of latents up to date."""
        latent, device = net.latent, batch.velocity.device
        assert isinstance(latent, AutoencoderLatent)
        with torch.autocast(device.type, enabled=False):
            mean, deviation = latent.net.encode(batch.velocity)
            noise = torch.randn(mean.shape, generator=generator, device=device)
            decoded = latent.net.decode(mean + deviation * noise)
            with torch.no_grad():
                latent.scale.mul_(SCALE_MEMORY).add_((1 - SCALE_MEMORY) * mean.std())
            return AutoencoderLosses(
                mean_square(decoded - batch.velocity, self.brain.to(device)),
                self.config.kl * divergence_from_normal(mean, deviation),
            )
