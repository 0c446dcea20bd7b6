"""How much two images tell of each other."""

import numpy as np
from scipy.special import entr


def normalised_information(joint: np.ndarray) -> float:
    """Normalised mutual information (H(a) + H(b)) / H(a, b) of a joint histogram of counts.

    1 to 2; 0 of an empty one (Studholme et al., 1999).

    >>> normalised_information(np.ones((4, 4)))
    1.0
    >>> normalised_information(np.eye(4))
    2.0
    """
    p = joint / max(joint.sum(), 1)
    apart = entr(p.sum(axis=0)).sum() + entr(p.sum(axis=1)).sum()
    return float(apart / max(entr(p).sum(), 1e-9))
