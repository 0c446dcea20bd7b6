"""The distance field (paper, section II-B): the template coordinates of each voxel."""

from collections.abc import Sequence

import numpy as np

from cadiff_cli.products import CoordinateField, Frame, FromBase, Registered, Template, sound
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.stages.register import warp

MARGIN_MM = 200.0
"""How far coordinates continue beyond the extents: as far as a field of view may reach."""
STEP_MM = 10.0
"""Coordinates are linear, so a coarse grid carries them exactly through linear interpolation."""
BEYOND_VOXELS = 16
"""By which a deformation is continued: a brain may reach beyond a template's field of view."""


def template_coordinates(template: Template) -> tuple[Volume, Volume, Volume]:
    """The field in the template's own world: x, y and z relative to the AC, extents -> [0, 1].

    x is 0.5 on the midsagittal plane.  Values beyond the extents are below 0 or above 1; they are
    clipped only after they have been carried to a scan.  Where a template was deformed from a base,
    they are those of the base at the same anatomy: what a network has learnt of a position holds
    for people whose ventricles are larger, too.
    """
    if template.from_base:
        return _carried(template.from_base)
    frame = template.frame
    low, high = np.array(frame.low_mm), np.array(frame.high_mm)
    start = np.array(frame.ac_mm) + low - MARGIN_MM
    x, y, z = (int(n) + 1 for n in np.ceil((high - low + 2 * MARGIN_MM) / STEP_MM))
    shape = (x, y, z)
    affine = np.diag([STEP_MM, STEP_MM, STEP_MM, 1.0])
    affine[:3, 3] = start
    grid = Grid(shape, affine)
    return _scaled(grid.to_world(np.moveaxis(np.indices(shape), 0, -1)), frame, grid)


def _carried(base: FromBase) -> tuple[Volume, Volume, Volume]:
    """The base's coordinates at the points of the template, some way beyond its field of view."""
    grid, beyond = base.grid, BEYOND_VOXELS
    x, y, z = (n + 2 * beyond for n in grid.shape)
    wide = grid.crop((-beyond,) * 3, (x, y, z))
    pad = ((0, 0), *((beyond, beyond),) * 3)
    moved = np.moveaxis(np.pad(base.to_base_mm, pad, mode="edge"), 0, -1)
    world = wide.to_world(np.moveaxis(np.indices(wide.shape), 0, -1))
    return _scaled(world + moved, base.frame, wide)


def _scaled(points: np.ndarray, frame: Frame, grid: Grid) -> tuple[Volume, Volume, Volume]:
    """The coordinates of ``points`` (X, Y, Z, 3) in a frame's world, as volumes on ``grid``."""
    ac, low, high = (np.array(v) for v in (frame.ac_mm, frame.low_mm, frame.high_mm))
    scaled = (points - ac - low) / (high - low)
    d_x, d_y, d_z = (Volume(scaled[..., a].astype(np.float32), grid) for a in range(3))
    return d_x, d_y, d_z


def coordinate_field(registered: Registered, grid: Grid) -> CoordinateField:
    """The distance field on ``grid``, in the scan's world: (3, X, Y, Z) float32 in [0, 1]."""
    channels = [
        warp(channel, registered.transform, grid).data
        for channel in template_coordinates(registered.template)
    ]
    return CoordinateField(np.clip(np.stack(channels), 0.0, 1.0).astype(np.float32), grid)


def mean_field(registrations: Sequence[Registered], grid: Grid) -> CoordinateField:
    """The mean of the fields of one brain's sound registrations, (3, X, Y, Z) float32 in [0, 1].

    Each registration has its own error of about a millimetre; the mean of two has a smaller one.
    A registration that looks wrong is left out if another one looks right.
    """
    fields = [coordinate_field(r, grid).data for r in sound(registrations)]
    return CoordinateField(np.asarray(np.mean(fields, axis=0, dtype=np.float32)), grid)
