"""Make the atlas of a condition: a base template, deformed as a network says (Diff-Def).

The network gives a velocity on a coarse grid; here it becomes a deformation, and the base brain,
its mask, its labels and its frame follow.  Intensities are carried, never made.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Protocol

import numpy as np
import torch

from cadiff_cli.errors import DataError
from cadiff_cli.products import Atlas, Citation, Condition, Deformation, Frame, FromBase, Template
from cadiff_cli.spatial.deformation import (
    carried_labels,
    exponential,
    jacobian,
    log_jacobian,
    on_grid,
    warp,
)
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import resample_mask

REVISION = 2
"""Increase when the same network and condition give another atlas."""
SPACING_MM = 2.0
"""Of stored deformations: on this grid a field of 4 mm splines is linear to a tenth of a mm."""
ROUNDING_MM = 1 / 1024
"""Displacements are stored in steps of this: files are a third smaller."""
CITATION = Citation(
    "Diff-Def: Diffusion-Generated Deformation Fields for Conditional Atlases",
    (
        *("Starck S", "Sideri-Lampretsa V", "Kainz B", "Menten MJ", "Mueller TT"),
        "Rueckert D",
    ),
    ("https://arxiv.org/abs/2403.16776",),
)


class Generator(Protocol):
    """What makes velocities: ``nets/models.AtlasModel``.

    ``base`` names the template that it deforms, ``labels`` are that template's structures (codes),
    ``grid`` is the velocities' grid in its world.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def sha256(self) -> str: ...  # noqa: D102
    @property
    def base(self) -> str: ...  # noqa: D102
    @property
    def grid(self) -> Grid: ...  # noqa: D102
    @property
    def labels(self) -> Volume: ...  # noqa: D102

    def check(self, condition: Condition) -> None:
        """Raise ``UsageError`` for a condition of which the training's people tell nothing."""

    def velocity(self, condition: Condition, seed: int | None = None) -> np.ndarray:
        """(3, X, Y, Z) float32 in mm; without a ``seed`` that of the condition's centre."""


def atlas_name(model: str, condition: Condition, seed: int | None = None) -> str:
    """The name of the template that a model makes for a condition, as ``--template`` spells names.

    >>> atlas_name("cadiff-atlas", Condition(72, "F", 3.1))
    'cadiffatlas:cohort-age72Fventricles3p1'
    """
    letters = "".join(c for c in model.removesuffix(".safetensors") if c.isalnum() and c.isascii())
    cohort = ""
    if condition.age_years is not None:
        cohort += f"age{_digits(condition.age_years)}"
    cohort += condition.sex or ""
    if condition.ventricles_percent is not None:
        cohort += f"ventricles{_digits(condition.ventricles_percent)}"
    if seed is not None:
        cohort += f"seed{seed}"
    return f"{letters or 'atlas'}:cohort-{cohort or 'all'}"


def _digits(number: float) -> str:
    return f"{number:.10g}".replace(".", "p")


def cause(weights_sha256: str, condition: Condition, seed: int | None = None) -> str:
    """A checksum (SHA-256) of everything that decides an atlas."""
    decisive = [REVISION, weights_sha256, asdict(condition), seed]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def make_atlas(
    model: Generator, base: Template, condition: Condition, seed: int | None = None
) -> Atlas:
    """The atlas of the people of a condition; with a ``seed`` that of one possible person.

    ``base`` is the template that the model names.  Raises ``UsageError`` for a condition that the
    model does not know, ``DataError`` for a base that does not suit it.
    """
    base = _labelled(base, model)
    deformation = deform(base.brain.grid, model.velocity(condition, seed), model.grid)
    made = deformed(base, deformation, atlas_name(model.name, condition, seed))
    here, zooms = deformation.grid, deformation.grid.spacing_mm
    larger = -log_jacobian(torch.from_numpy(deformation.backward_mm)[None], zooms)[0]
    return Atlas(
        replace(
            made,
            citation=CITATION,
            condition=condition,
            cause=cause(model.sha256, condition, seed),
        ),
        base,
        condition,
        seed,
        deformation,
        Volume(larger.numpy(), here),
        structure_volumes(base, deformation),
        structure_volumes(base),
        model.name,
        model.sha256,
    )


def sample_volumes(
    model: Generator, base: Template, condition: Condition, seeds: Iterable[int]
) -> list[Mapping[int, float]]:
    """Volumes (mm3 by code) of possible people of a condition, one for each of the ``seeds``."""
    base = _labelled(base, model)
    return [
        structure_volumes(
            base, deform(base.brain.grid, model.velocity(condition, seed), model.grid)
        )
        for seed in seeds
    ]


def warped(base: Template, velocity_mm: np.ndarray, grid: Grid, name: str) -> Template:
    """``base`` deformed by the exponential of a velocity (3, X, Y, Z) on ``grid``."""
    return deformed(base, deform(base.brain.grid, velocity_mm, grid), name)


def deform(image: Grid, velocity_mm: np.ndarray, grid: Grid) -> Deformation:
    """The deformation of a velocity (3, X, Y, Z) on ``grid``, over the field of view ``image``."""
    fine = image.working(SPACING_MM)
    velocity = torch.from_numpy(on_grid(velocity_mm, grid, fine))[None]
    forward, backward = (
        torch.round(exponential(sign * velocity, fine.spacing_mm)[0] / ROUNDING_MM) * ROUNDING_MM
        for sign in (1, -1)
    )
    return Deformation(forward.numpy(), backward.numpy(), fine)


def deformed(base: Template, deformation: Deformation, name: str) -> Template:
    """The base's brain, mask, labels, frame and coordinates where the deformation takes them.

    The brain is interpolated once, linearly: no intensity is above or below its neighbours in the
    base.  A label is the one that weighs most.
    """
    grid, mask = base.brain.grid, base.mask or Volume(base.brain.data > 0, base.brain.grid)
    backward = on_grid(deformation.backward_mm, deformation.grid, grid)
    images = torch.from_numpy(np.stack([base.brain.data, mask.data]).astype(np.float32))[None]
    brain, inside = warp(images, torch.from_numpy(backward)[None], grid.spacing_mm)[0].numpy()
    inside = inside > 0.5
    labels = None
    if base.labels is not None:
        places = np.argwhere(inside).T + backward[:, inside] / grid.spacing_mm[:, None]
        codes = np.zeros(grid.shape, dtype=np.int16)
        codes[inside] = carried_labels(base.labels.data, places)
        labels = Volume(codes, grid)
    return Template(
        name,
        Volume(np.where(inside, brain, 0).astype(np.float32), grid),
        _moved_frame(base.frame, mask, deformation),
        mask=Volume(inside, grid),
        labels=labels,
        from_base=FromBase(base.frame, deformation.backward_mm, deformation.grid),
    )


def structure_volumes(base: Template, deformation: Deformation | None = None) -> dict[int, float]:
    """Volume in mm3 of each of the base's structures (by code), after a deformation if given.

    The Jacobian is summed over the base's voxels, so volumes change smoothly with the deformation.
    """
    assert base.labels is not None
    codes, grid = base.labels.data, base.labels.grid
    factors = None
    if deformation is not None:
        # By slopes between 2 mm voxels an old third ventricle would be 7 % too small.
        moved = on_grid(deformation.forward_mm, deformation.grid, grid)
        factors = jacobian(torch.from_numpy(moved)[None], grid.spacing_mm)[0].numpy().ravel()
    sums = np.bincount(codes.ravel(), factors) * grid.voxel_volume_mm3
    return {int(code): float(sums[code]) for code in np.unique(codes) if code > 0}


def _labelled(base: Template, model: Generator) -> Template:
    labels = model.labels
    same = labels.grid.shape == base.brain.grid.shape
    if not same or not np.allclose(labels.grid.affine, base.brain.grid.affine, atol=1e-3):
        raise DataError(
            f"the atlas model {model.name} knows the labels of {base.name} on {labels.grid!r}, and"
            f" the template lies on {base.brain.grid!r}",
            f"use the {base.name} that it was trained with",
        )
    return replace(base, labels=labels)


def _moved_frame(frame: Frame, mask: Volume, deformation: Deformation) -> Frame:
    """The AC goes where the deformation takes it; extents grow as the brain does, axis by axis."""
    grid, forward = deformation.grid, deformation.forward_mm
    ac = np.array(frame.ac_mm)
    at = np.eye(4)
    at[:3, 3] = ac
    moved = ac + on_grid(forward, grid, Grid((1, 1, 1), at))[:, 0, 0, 0]
    inside = resample_mask(mask, grid).data
    before = grid.to_world(np.argwhere(inside)) - ac
    after = before + ac + forward[:, inside].T - moved
    scale = (before * after).sum(axis=0) / (before**2).sum(axis=0)
    points = (moved, scale * np.array(frame.low_mm), scale * np.array(frame.high_mm))
    # Zeros have no sign.
    rounded = (
        np.round(point, digits) + 0.0 for point, digits in zip(points, (2, 1, 1), strict=True)
    )
    return Frame(*(tuple(map(float, point)) for point in rounded))  # type: ignore[arg-type]
