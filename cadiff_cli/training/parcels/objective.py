"""The objective of a training of parcels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cadiff_cli.nets.parcels import ParcelNet
from cadiff_cli.training.parcels.losses import ParcelLosses, parcel_losses
from cadiff_cli.training.parcels.patches import HemispherePatch


@dataclass(frozen=True, eq=False)
class ParcelObjective:
    """Name the parcels of a person whom the prior has not counted.

    ``priors`` are by person (``HemispherePatch.person``): with the person's own votes in it, the
    network would trust it more than it can trust it with others.
    """

    priors: Sequence[Tensor]
    dice_weight: float = 1.0

    def __call__(
        self,
        net: ParcelNet,
        patch: HemispherePatch,
        generator: torch.Generator,
        _progress: float = 1.0,
    ) -> ParcelLosses:
        """Losses at the points of one hemisphere."""
        torch.manual_seed(generator.initial_seed())  # torch's own generator decides dropout
        prior = self.priors[int(patch.person)].to(patch.at.device).float()
        logits = net(patch.detail, patch.shares, patch.field, patch.at[0], prior)
        return parcel_losses(logits, patch.parcels[0], self.dice_weight)
