"""Carry a result into a template's space (``--output-spaces``)."""

from pathlib import Path

import numpy as np
from scipy import ndimage

from cadiff_cli.products import InSpace, Result, Template
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.stages.register import register_template, warp


def to_space(result: Result, template: Template, resolution: str, work_dir: Path) -> InSpace:
    """Carry brain, mask and labels to ``template``'s grid; each voxel gets the heaviest label.

    A registration to this template is used again, be it that of the labels or that of a space that
    ``result`` has already.  Otherwise the scan is registered with the same settings.
    """
    stripped = result.prepared.stripped
    earlier = (*result.prepared.registrations, *(space.registered for space in result.spaces))
    by_name = {r.template.name: r for r in earlier}
    registered = by_name.get(template.name)
    if registered is None:
        config = result.config.register.elsewhere
        registered = register_template(stripped, template, config, work_dir)
    grid = standard_grid(template.brain.grid, int(resolution or 1))
    labels = result.segmentation.labels

    def carried(data: np.ndarray, source: Grid, interpolator: str = "linear") -> np.ndarray:
        volume = Volume(data.astype(np.float32), source)
        return warp(
            volume, registered.transform, grid, inverse=True, interpolator=interpolator
        ).data

    inside = carried(stripped.mask.data, stripped.mask.grid) > 0.5
    t1 = carried(stripped.t1.data, stripped.t1.grid)
    codes = carried(labels.data, labels.grid, "genericLabel")
    labels = Volume(np.where(inside, np.rint(codes), 0).astype(np.int16), grid)
    parcels = None
    if result.finer is not None:
        finer = result.finer.segmentation
        # In its own vote, a parcel would lose to white matter where the whole cortex wins.
        divided = labels.data.copy()
        for cortex in {s.parent for s in finer.parcellation.structures if s.is_part}:
            within = labels.data == cortex
            if within.any():
                spread = nearest_codes(finer.labels.data, result.segmentation.labels.data == cortex)
                moved = carried(spread, finer.labels.grid, "genericLabel")
                divided[within] = np.rint(moved[within])
        parcels = Volume(divided, grid)
    return InSpace(
        registered,
        Volume(np.where(inside, t1, 0), grid),
        Volume(inside, grid),
        labels,
        resolution,
        parcels,
    )


def nearest_codes(codes: np.ndarray, where: np.ndarray) -> np.ndarray:
    """``codes`` (X, Y, Z) inside ``where``; elsewhere that of the nearest voxel of ``where``."""
    _, index = ndimage.distance_transform_edt(~where, return_indices=True)
    return np.asarray(codes[tuple(index)])


def standard_grid(grid: Grid, factor: int) -> Grid:
    """``grid`` with voxels ``factor`` times as large.

    The first voxel ends where the first voxel of ``grid`` ends, as in TemplateFlow's ``res-02`` of
    MNI152NLin2009cAsym.
    """
    affine = grid.affine.copy()
    affine[:3, :3] *= factor
    affine[:3, 3] = grid.to_world(np.full(3, -(factor - 1) / 2))
    x, y, z = (-(-n // factor) for n in grid.shape)
    return Grid((x, y, z), affine)
