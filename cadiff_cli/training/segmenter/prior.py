"""Count which class stands at each position of the field: the network's starting point."""

from collections.abc import Iterable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.training.segmenter.data import Sample, sample_field

SMOOTHING_CELLS = 0.6
PSEUDO_COUNT = 0.02


def count_prior(
    samples: Iterable[Sample], parcellation: Parcellation, shape: tuple[int, int, int]
) -> Tensor:
    """Log-probability of each class per field cell, (1, classes, *shape) float32.

    Every voxel of every sample votes for the cell at the mean of its templates' fields (cells are
    centred like ``grid_sample`` with ``align_corners``); mirrored brains vote too, so the prior is
    symmetric.  Cells without votes say background.
    """
    counts = np.zeros((parcellation.n_classes, *shape))
    top = np.array(shape) - 1
    for sample in samples:
        classes = sample.classes.ravel().astype(np.int64)
        field = torch.from_numpy(sample_field(sample))[None]
        fine = F.interpolate(field, size=sample.classes.shape, mode="trilinear")[0].numpy()
        cell = [np.rint(fine[a].ravel() * top[a]).astype(np.int64) for a in range(3)]
        flat = np.ravel_multi_index((classes, *cell), counts.shape)
        counts += np.bincount(flat, minlength=counts.size).reshape(counts.shape)
    counts += counts[parcellation.mirror_classes][:, ::-1]
    smooth = np.stack([ndimage.gaussian_filter(c, SMOOTHING_CELLS) for c in counts])
    smooth[0] += 1e-3
    p = smooth / smooth.sum(axis=0)
    p = (p + PSEUDO_COUNT / len(p)) / (1 + PSEUDO_COUNT)
    return torch.from_numpy(np.log(p)).float()[None]
