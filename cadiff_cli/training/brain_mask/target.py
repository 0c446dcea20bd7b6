"""The mask to learn, from labels or from a manual mask.

It is the mask in which the segmentation network was trained: brain, cerebellum, brain stem and
ventricles, with the CSF of the sulci but without that around the brain.  Closing the labelled brain
with a ball of 5 mm gives this mask (Dice 0.996 with the MALC scans' own) from the labels of any
source, so sources agree.
"""

import numpy as np
from scipy import ndimage

from cadiff_cli.errors import DataError
from cadiff_cli.nets.brain_mask import REACH_MM, SPACING_MM
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import bounding_box, resample
from cadiff_cli.stages.masks import closing, without_threads

CLOSING_MM = 5.0
NOT_BRAIN = (500, 1000)
"""Range of codes of skull, skin, eyes, air... in FreeSurfer-like label maps of whole heads."""
VERMIS = (630, 631, 632)
OUTER_CSF = (24, 257, 258, 259)
"""FreeSurfer's codes of the fluid and of the head around the brain."""
LEAST_BRAIN_LITRES = 0.1
"""A smaller volume is no brain, but a lesion or a mistake."""
CRANIAL_FLUID = (24, 502, 514)
"""Codes of CSF, arteries and veins: what lies between brain and skull, and also beyond."""
WIDEST_MM = 20.0
"""Fluid farther than this from the box around the brain is not within its skull."""
DURA_MM = 2.0
"""Radius of the ball that closes the inner skull's content.  One of 5 mm held 0.8 to 2.1 % more,
and most of that was bone."""
FAR_MM = 1.5 * REACH_MM
"""Stored distances end here: beyond the network's reach even after a head has been scaled."""


def is_brain(codes: np.ndarray) -> np.ndarray:
    """Mask of FreeSurfer's codes, or ours, that mean brain: not CSF around it, nor 5xx to 9xx.

    The vermis has codes in this range; cortical parcels have higher ones.  None of DLMUSE's
    ids lie in it, so all but 0 are brain.
    """
    around = (codes >= NOT_BRAIN[0]) & (codes < NOT_BRAIN[1]) & ~np.isin(codes, VERMIS)
    return np.asarray((codes > 0) & ~np.isin(codes, OUTER_CSF) & ~around)


def closed(brain: np.ndarray, spacing_mm: np.ndarray, radius_mm: float = CLOSING_MM) -> np.ndarray:
    """Close ``brain`` (X, Y, Z) bool with a ball and fill its holes: the mask to learn."""
    box = _box(brain)
    return _in_box(closing(brain[box], spacing_mm, radius_mm), box, brain.shape)


def intracranial(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """What the inner skull holds (X, Y, Z) bool, from FreeSurfer's codes with CSF around the brain.

    It is the brain, with the fluid and the vessels around it down to its lowest end, that of the
    brain stem, closed with a ball of ``DURA_MM``: dura is within, bone is not.
    """
    shape, spacing_mm = codes.shape, grid.spacing_mm
    brain = is_brain(codes)
    box = _box(brain, np.ceil(WIDEST_MM / spacing_mm))
    codes, brain = codes[box], brain[box]
    height = np.tensordot(grid.affine[2, :3], np.indices(brain.shape, dtype=np.float32), 1)
    held = brain | (np.isin(codes, CRANIAL_FLUID) & (height >= height[brain].min()))
    held = without_threads(held, spacing_mm)
    return _in_box(closed(held | brain, spacing_mm, DURA_MM), box, shape)


def signed_distance(mask: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Distance (mm) to the border between voxels, inside positive, cut at ``FAR_MM``."""
    width = np.ceil(FAR_MM / spacing_mm).astype(int) + 1
    box = _box(mask, width)
    part = mask[box]
    inside = ndimage.distance_transform_edt(part, sampling=spacing_mm)
    outside = ndimage.distance_transform_edt(~part, sampling=spacing_mm)
    # Both transforms measure to voxel centres; the border is half a voxel nearer.
    half = float(spacing_mm.mean()) / 2
    out = np.full(mask.shape, -FAR_MM, dtype=np.float32)
    out[box] = np.clip(np.where(part, inside - half, half - outside), -FAR_MM, FAR_MM)
    return out


def distance_at_2mm(mask: Volume) -> Volume:
    """Signed distance of a mask, on a 2 mm RAS grid."""
    fine = Volume(signed_distance(mask.data, mask.grid.spacing_mm), mask.grid)
    return resample(fine, mask.grid.working(SPACING_MM, tolerance=0.0), fill=-FAR_MM)


def _in_box(part: np.ndarray, box: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    """A mask that is ``part`` in a box of ``shape``, False elsewhere."""
    out = np.zeros(shape, dtype=bool)
    out[box] = part
    return out


def _box(mask: np.ndarray, margin: np.ndarray | int = 0) -> tuple[slice, ...]:
    """The bounding box of a mask, widened by ``margin`` voxels."""
    if not mask.any():
        raise DataError("the brain mask is empty", "remove this scan, or repair its labels")
    return bounding_box(mask, margin)
