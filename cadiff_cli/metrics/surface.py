"""Distances between the surfaces of two label maps, per class, in millimetres."""

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from cadiff_cli.config import TOLERANCE_MM
from cadiff_cli.errors import UsageError
from cadiff_cli.metrics.overlap import masks


def surface_dice(
    prediction: np.ndarray,
    reference: np.ndarray,
    classes: Sequence[int],
    spacing_mm: Sequence[float],
    tolerance_mm: float = TOLERANCE_MM,
) -> np.ndarray:
    """(len(classes),) normalised surface Dice (Nikolov et al., 2018) at ``tolerance_mm``.

    MONAI's sub-voxel surfaces give the values of DeepMind's reference implementation.  A class
    missing on one side counts 0, on both sides NaN.  Raises ``UsageError`` for a negative or
    infinite tolerance.
    """
    if not 0 <= tolerance_mm < math.inf:
        raise UsageError(f"the tolerance is {tolerance_mm} mm", "give a number from 0 upwards")
    return _per_class(
        lambda *pair: compute_surface_dice(
            *pair, class_thresholds=[tolerance_mm], spacing=list(spacing_mm), use_subvoxels=True
        ),
        prediction,
        reference,
        classes,
        one_sided=0.0,
    )


def hausdorff95_mm(
    prediction: np.ndarray,
    reference: np.ndarray,
    classes: Sequence[int],
    spacing_mm: Sequence[float],
) -> np.ndarray:
    """(len(classes),) 95th percentile Hausdorff distance: the larger of the two directions.

    Unlike the surface Dice, MONAI's distance has no sub-voxel surfaces: it is measured between the
    centres of border voxels, all with equal weight, so it changes in steps of the voxel size.  A
    class missing on one side gives infinity, on both sides NaN.
    """
    return _per_class(
        lambda *pair: compute_hausdorff_distance(*pair, percentile=95, spacing=list(spacing_mm)),
        prediction,
        reference,
        classes,
        one_sided=math.inf,
    )


def _per_class(
    measure: Callable[..., torch.Tensor],
    prediction: np.ndarray,
    reference: np.ndarray,
    classes: Sequence[int],
    one_sided: float,
) -> np.ndarray:
    out = np.full(len(classes), np.nan)
    for index, (p, r) in enumerate(masks(prediction, reference, classes)):
        if p.any() != r.any():
            out[index] = one_sided
        elif p.any():
            with warnings.catch_warnings():
                # MONAI 1.6 calls its own deprecated argument.
                warnings.filterwarnings("ignore", message=".*always_return_as_numpy")
                # MONAI wants a channel of background, which it then ignores.
                pair = (torch.from_numpy(np.stack([~m, m])[None]) for m in (p, r))
                out[index] = float(measure(*pair))
    return out
