"""Carry a result into a template's space (``--output-spaces``)."""

import re
from itertools import product
from pathlib import Path

import numpy as np
from scipy import ndimage

from cadiff_cli.errors import UsageError
from cadiff_cli.io.templates import registry
from cadiff_cli.products import InSpace, Registered, Result, Template
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.stages.register import register, warp

STEP_MM = 10.0
"""Coordinates are linear, so a coarse grid carries them exactly through linear interpolation."""
OUTSIDE_MM = -1e6
"""The position of a voxel that no scan reaches."""


def parse_space(text: str) -> tuple[str, str]:
    """``NAME[:res-N]`` -> (template's name, ``N`` or nothing).

    >>> parse_space("MNI152NLin2009cAsym:res-2")
    ('MNI152NLin2009cAsym', '2')
    """
    match = re.fullmatch(r"([A-Za-z0-9]+)(?::res-(0?[1-4]))?", text)
    if match is None or match[1] not in registry():
        raise UsageError(
            f"unknown output space {text!r}",
            f"use {', '.join(registry())}, with :res-2 for 2 mm voxels",
        )
    return match[1], match[2] or ""


def to_space(result: Result, template: Template, resolution: str, work_dir: Path) -> InSpace:
    """Brain, mask and labels on ``template``'s grid; labels are copied, never mixed.

    The registration that the labels were made with serves again if it was to this template.
    """
    registered = result.prepared.registered
    if template.name != registered.template.name:
        folder = work_dir / template.name
        folder.mkdir(exist_ok=True)
        stripped = result.prepared.stripped
        registered = register(stripped, template, result.config.register, folder)
    grid = standard_grid(template.brain.grid, int(resolution or 1))
    stripped, labels = result.prepared.stripped, result.segmentation.labels
    positions = scan_positions(registered, stripped.t1.grid, grid)

    def pull(volume: Volume, order: int) -> Volume:
        ijk = (positions - volume.grid.affine[:3, 3]) @ np.linalg.inv(volume.grid.affine[:3, :3]).T
        moved = ndimage.map_coordinates(volume.data, np.moveaxis(ijk, -1, 0), order=order)
        return Volume(moved, grid)

    t1, labels = pull(stripped.t1, 1), pull(labels, 0)
    mask = pull(Volume(stripped.mask.data.astype(np.float32), stripped.mask.grid), 1)
    inside = mask.data > 0.5
    return InSpace(
        registered,
        Volume(np.where(inside, t1.data, 0), grid),
        Volume(inside, grid),
        Volume(np.where(inside, labels.data, 0).astype(np.int16), grid),
        resolution,
    )


def standard_grid(grid: Grid, factor: int) -> Grid:
    """TemplateFlow's ``res-`` grids: voxels ``factor`` times as large from the same corner."""
    affine = grid.affine.copy()
    affine[:3, :3] *= factor
    affine[:3, 3] = grid.to_world(np.full(3, -(factor - 1) / 2))
    x, y, z = (-(-n // factor) for n in grid.shape)
    return Grid((x, y, z), affine)


def scan_positions(registered: Registered, scan: Grid, grid: Grid) -> np.ndarray:
    """(X, Y, Z, 3) RAS mm in the scan's world of each voxel of ``grid`` in the template's."""
    corners = scan.to_world(np.array(list(product(*((0, n - 1) for n in scan.shape)))))
    low, high = corners.min(axis=0) - STEP_MM, corners.max(axis=0) + STEP_MM
    affine = np.diag([STEP_MM] * 3 + [1.0])
    affine[:3, 3] = low
    x, y, z = (int(n) for n in np.ceil((high - low) / STEP_MM) + 1)
    coarse = Grid((x, y, z), affine)
    world = coarse.to_world(np.moveaxis(np.indices(coarse.shape), 0, -1)).astype(np.float32)
    channels = [
        warp(Volume(world[..., a], coarse), registered, grid, inverse=True, fill=OUTSIDE_MM).data
        for a in range(3)
    ]
    return np.stack(channels, axis=-1)
