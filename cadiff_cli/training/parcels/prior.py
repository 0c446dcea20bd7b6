"""Count which parcel lies at each position of the field."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from cadiff_cli.nets.parcels import REACH, sampled
from cadiff_cli.training.parcels.data import Labelled

SMOOTHING_CELLS = 0.8
WIDER = 4
"""Where nobody's cortex lay, the parcels around count: smoothed so many times as widely..."""
FAR_WEIGHT = 1e-2
"""...with this weight."""
PSEUDO_COUNT = 0.02


def counted(hemispheres: Iterable[Labelled], n: int, shape: Sequence[int]) -> np.ndarray:
    """(n, *shape) votes of every cortex voxel for its parcel at its place in the field."""
    votes = np.zeros(n * int(np.prod(shape)))
    top = np.array(shape) - 1
    for one in hemispheres:
        voxels = one.cortex
        at = torch.from_numpy((voxels + 0.5) / one.parcels.shape).float()
        field = sampled(torch.from_numpy(one.seen.field)[None], at, corners=False).numpy()
        cell = np.clip(np.rint(field / (REACH, 1, 1) * top).astype(np.int64), 0, top)
        flat = np.ravel_multi_index(
            (one.parcels[tuple(voxels.T)].astype(np.int64), *cell.T), (n, *shape)
        )
        votes += np.bincount(flat, minlength=votes.size)
    return votes.reshape(n, *shape)


def spread(votes: np.ndarray) -> np.ndarray:
    """Smoothed votes; linear, so that a person's can be taken from those of all."""
    near, far = (
        np.stack([ndimage.gaussian_filter(v, SMOOTHING_CELLS * k, truncate=3) for v in votes])
        for k in (1, WIDER)
    )
    return np.asarray(near + FAR_WEIGHT * far)


def log_prior(votes: np.ndarray) -> Tensor:
    """Log-probability of each parcel, (1, n, *shape) float32, from ``spread`` votes."""
    votes = np.maximum(votes, 0) + 1e-7
    p = votes / votes.sum(axis=0)
    p = (p + PSEUDO_COUNT / len(p)) / (1 + PSEUDO_COUNT)
    return torch.from_numpy(np.log(p)).float()[None]
