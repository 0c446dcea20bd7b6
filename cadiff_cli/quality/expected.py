"""The Dice to expect of labels, from the network's own probabilities."""

import numpy as np


def expected_dice(p: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """(classes - 1,) Dice to expect of ``drawn`` if the truth were drawn from ``p``.

    ``p`` (classes, X, Y, Z) are probabilities, background first; ``drawn`` (X, Y, Z) are classes.
    It is twice the expected overlap over the expected sum of both sizes.  NaN where a structure is
    not drawn and less than half a voxel of it is expected: absent on both sides.  Class by class:
    ``p`` is too large to copy.
    """
    found = np.full(len(p) - 1, np.nan)
    for k in range(1, len(p)):
        here = drawn == k
        size, mass = int(np.count_nonzero(here)), float(p[k].sum(dtype=np.float64))
        if size or mass >= 0.5:
            found[k - 1] = 2 * float(p[k][here].sum(dtype=np.float64)) / (size + mass)
    return found
