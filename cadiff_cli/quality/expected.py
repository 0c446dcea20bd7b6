"""The Dice to expect of labels, from the network's own probabilities."""

import numpy as np
import torch

from cadiff_cli.spatial.probabilities import Probabilities


def expected_dice(p: Probabilities, drawn: np.ndarray) -> np.ndarray:
    """(classes - 1,) Dice to expect of ``drawn`` if the truth were drawn from ``p``.

    ``drawn`` (X, Y, Z) are classes.  It is twice the expected overlap over the expected sum of
    both sizes.  NaN where a structure is not drawn and less than half a voxel of it is expected:
    absent on both sides.
    """
    chosen = drawn.ravel()[p.voxels.numpy()]
    at = torch.from_numpy(chosen.astype(np.int64))[:, None]
    own = p.values.gather(1, at)[:, 0].double().numpy()
    overlap = np.bincount(chosen, weights=own, minlength=p.n_classes)
    size = np.bincount(drawn.ravel(), minlength=p.n_classes)
    mass = p.values.sum(dim=0, dtype=torch.float64).numpy()
    found = np.full(p.n_classes, np.nan)
    there = (size > 0) | (mass >= 0.5)
    found[there] = (2 * overlap / (size + mass).clip(min=0.5))[there]
    return found[1:]
