"""Dice and surface Dice per class.  A class missing on one side counts 0, on both sides NaN."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics import compute_dice, compute_surface_dice


def dice(prediction: np.ndarray, reference: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """(len(classes),) Dice coefficients of two class maps (X, Y, Z); NaN where both are empty."""
    p, r = (_one_hot(m, classes) for m in (prediction, reference))
    scores = compute_dice(p, r, ignore_empty=False)[0].numpy()
    return np.where(_absent(p, r), np.nan, scores)


def surface_dice(
    prediction: np.ndarray,
    reference: np.ndarray,
    classes: Sequence[int],
    spacing_mm: Sequence[float],
    tolerance_mm: float = 1.0,
) -> np.ndarray:
    """(len(classes),) normalised surface Dice (Nikolov et al., 2018) at ``tolerance_mm``.

    MONAI's sub-voxel surfaces, which equal DeepMind's reference implementation.
    """
    out = np.full(len(classes), np.nan)
    for index, k in enumerate(classes):
        p, r = prediction == k, reference == k
        if not p.any() and not r.any():
            continue
        if not p.any() or not r.any():
            out[index] = 0.0
            continue
        box = _bounding_box(p | r)
        pair = (torch.from_numpy(np.stack([~m[box], m[box]])[None]) for m in (p, r))
        with warnings.catch_warnings():
            # MONAI 1.6 calls its own deprecated argument.
            warnings.filterwarnings("ignore", message=".*always_return_as_numpy")
            score = compute_surface_dice(
                *pair,
                class_thresholds=[tolerance_mm],
                spacing=[float(s) for s in spacing_mm],
                use_subvoxels=True,
            )
        out[index] = float(score)
    return out


def _one_hot(classes_map: np.ndarray, classes: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.stack([classes_map == k for k in classes]))[None]


def _absent(p: torch.Tensor, r: torch.Tensor) -> np.ndarray:
    return np.asarray(~(p | r).flatten(2).any(dim=2)[0].numpy())


def _bounding_box(mask: np.ndarray, margin: int = 2) -> tuple[slice, ...]:
    """Slices around ``mask`` with a margin: surfaces elsewhere are empty."""
    box = []
    for axis in range(mask.ndim):
        rest = tuple(a for a in range(mask.ndim) if a != axis)
        (inside,) = np.nonzero(mask.any(axis=rest))
        box.append(slice(max(int(inside[0]) - margin, 0), int(inside[-1]) + 1 + margin))
    return tuple(box)
