"""Losses of a conditional atlas and of its autoencoder."""

import warnings
from dataclasses import dataclass

import torch
from monai.losses import BendingEnergyLoss
from torch import Tensor

from cadiff_cli.training.batch import Parts


@dataclass(frozen=True, eq=False)
class AtlasLosses(Parts):
    """Weighted losses: of denoising, of morphology, of structures' volumes and of roughness."""

    denoising: Tensor
    morphology: Tensor
    volumes: Tensor
    smoothness: Tensor


@dataclass(frozen=True, eq=False)
class AutoencoderLosses(Parts):
    """Error of the velocity, and distance of the latents from a standard normal distribution."""

    reconstruction: Tensor
    kl: Tensor


def mean_square(vectors: Tensor, brain: Tensor) -> Tensor:
    """Mean over the ``brain`` (X, Y, Z) and the batch of the squared length of (B, 3, X, Y, Z)."""
    squared = vectors.square().sum(dim=1)
    return (squared * brain).sum() / (brain.sum() * len(vectors))


def bending(velocity: Tensor) -> Tensor:
    """Mean bending energy of (B, 3, X, Y, Z) in voxels."""
    with warnings.catch_warnings(action="ignore"):  # MONAI indexes with lists, torch warns of it
        return torch.as_tensor(BendingEnergyLoss()(velocity))


def divergence_from_normal(mean: Tensor, deviation: Tensor) -> Tensor:
    """Kullback-Leibler divergence of normal latents from standard ones, a mean over numbers."""
    variance = deviation.square()
    return 0.5 * torch.mean(mean.square() + variance - variance.log() - 1)
