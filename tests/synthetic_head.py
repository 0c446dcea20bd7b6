"""A whole head that may be published: the MNI152 brain of nilearn in a skull, a face and a neck.

What is around the brain is drawn from distances and ellipsoids; ``seed`` draws the brightness of
every tissue, within what T1-weighted scans show.
"""

import numpy as np
from scipy import ndimage

from cadiff_cli.io.templates import EMBEDDED, load_template
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import resample
from cadiff_cli.training.brain_mask.target import closed

SPACING_MM = 2.0
GREY = 0.45
"""Grey matter is brighter than this share of white matter, CSF darker."""
MARGIN_MM = (30, 40, 24)
NECK_MM = 60


def synthetic_head(seed: int = 0) -> tuple[Volume, Volume]:
    """(T1, brain mask), both 2 mm RAS; the mask is closed with a ball of 5 mm as in training."""
    rng = np.random.default_rng(seed)
    brain = load_template(EMBEDDED, offline=True).brain
    grid = _field_of_view(brain)
    inner = resample(brain, grid).data
    scaled = np.clip(inner / np.percentile(inner[inner > 0], 99), 0, 1.2)
    # The template's mask keeps the CSF around the brain; what is learnt does not.
    mask = closed(scaled > GREY, grid.spacing_mm)
    outside = ndimage.distance_transform_edt(inner <= 0, sampling=grid.spacing_mm)
    x, y, z = np.moveaxis(grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1)), -1, 0)

    def within(centre, radii):
        return sum(((p - c) / r) ** 2 for p, c, r in zip((x, y, z), centre, radii, strict=True)) < 1

    tissue = np.zeros(grid.shape, dtype=np.int64)  # air
    skull_mm = rng.uniform(5, 9)
    tissue[outside < 3 + skull_mm + rng.uniform(4, 10)] = 1  # scalp
    tissue[within((0, 60, -50), (60, 50, 70)) & (z < 0)] = 2  # face: muscle and fat
    tissue[(np.hypot(x / 60, (y + 30) / 65) < 1) & (z < -40)] = 2  # neck
    for side in (-1, 1):
        tissue[within((32 * side, 66, -36), (13, 13, 13))] = 3  # eyes
        tissue[within((18 * side, 62, -58), (12, 20, 14))] = 0  # sinuses
    tissue[np.hypot(x, y - 5) / 10 < (z < -50)] = 0  # airway
    tissue[outside < 3 + skull_mm] = 4  # skull
    tissue[outside < 3] = 5  # CSF
    means = np.array([0.02, rng.uniform(0.7, 1), rng.uniform(0.3, 0.6), 0.2, 0.08, 0.15])
    image = means[tissue] + 0.04 * ndimage.gaussian_filter(rng.standard_normal(grid.shape), 1) * 4
    image = np.where(inner > 0, scaled, np.clip(image, 0, None))
    image = image + 0.02 * np.abs(rng.standard_normal(grid.shape))
    return Volume((1000 * image).astype(np.float32), grid), Volume(mask, grid)


def _field_of_view(brain: Volume) -> Grid:
    """Room around a brain, with a neck below, at ``SPACING_MM``."""
    points = brain.grid.to_world(np.argwhere(brain.data > 0))
    low = points.min(axis=0) - MARGIN_MM - np.array([0, 0, NECK_MM])
    size = points.max(axis=0) + MARGIN_MM - low
    affine = np.diag([SPACING_MM] * 3 + [1.0])
    affine[:3, 3] = low
    shape = np.ceil(size / SPACING_MM).astype(int)
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def stored(data: np.ndarray, grid: Grid, order: tuple[int, ...], signs: tuple[int, ...]) -> Volume:
    """The same voxels at the same places, written along other axes."""
    affine = grid.affine.copy()
    affine[:3, :3] = affine[:3, list(order)]
    data = np.transpose(data, order)
    for axis, sign in enumerate(signs):
        if sign < 0:
            affine[:3, 3] += affine[:3, axis] * (data.shape[axis] - 1)
            affine[:3, axis] *= -1
            data = np.flip(data, axis)
    shape = data.shape
    return Volume(np.ascontiguousarray(data), Grid((shape[0], shape[1], shape[2]), affine))
