"""Volumes of structures in an atlas, differentiable: those by which an atlas is judged."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cadiff_cli.labels.parcellation import BASE, load_parcellation
from cadiff_cli.products import Template
from cadiff_cli.spatial.deformation import exponential, jacobian, splines_between
from cadiff_cli.spatial.grid import Grid
from cadiff_cli.spatial.resample import grid_around
from cadiff_cli.training.atlas.structures import volumes_on

FINER = 2
"""Structures are looked at on a grid that is so much finer than the velocity's."""
MARGIN = 6
"""Voxels of it around them: what flows in from farther away hardly changes volumes."""


@dataclass(frozen=True, eq=False)
class BaseVolumes:
    """Volumes in mm3 of a base template, before it is deformed.

    On the velocity's grid of 4 mm, a Jacobian makes the ventricles of a 90-year-old a seventh too
    small; atlases are made at 2 mm.  So the ``structures`` (K, x, y, z) lie on a box of a finer
    grid; ``splines`` (one matrix an axis) bring a velocity there, and ``zooms_mm`` are its own.
    All ``tissue`` (X, Y, Z) is on the velocity's grid.
    """

    structures: Tensor
    tissue: Tensor
    splines: tuple[Tensor, Tensor, Tensor]
    zooms_mm: Sequence[float]

    @staticmethod
    def of(base: Template, structures: Sequence[Collection[int]], grid: Grid) -> "BaseVolumes":
        """Volumes of ``structures``, each a collection of codes; ``base`` has labels.

        ``grid`` is that of velocities.
        """
        assert base.labels is not None
        codes = base.labels
        tissue = [s.code for s in load_parcellation(BASE).structures if s.is_tissue]
        whole = codes.grid.working(float(grid.spacing_mm[0]) / FINER)
        (there,) = volumes_on(whole, codes, [{code for group in structures for code in group}])
        fine = grid_around(there > 0, whole, MARGIN)
        x, y, z = (torch.from_numpy(each) for each in splines_between(grid, fine))
        return BaseVolumes(
            torch.from_numpy(volumes_on(fine, codes, structures)),
            torch.from_numpy(volumes_on(grid, codes, [tissue])[0]),
            (x, y, z),
            fine.spacing_mm.tolist(),
        )

    def log_shares(self, velocity_mm: Tensor, factors: Tensor) -> Tensor:
        """Logarithm (B, K) of the per cent of the brain that structures have after exp(v).

        ``velocity_mm`` (B, 3, X, Y, Z) and the Jacobian of its exponential, ``factors``
        (B, X, Y, Z), are on the velocity's grid.  A structure that the base lacks gets NaN.
        """
        structures, tissue, *splines = (
            each.to(velocity_mm.device) for each in (self.structures, self.tissue, *self.splines)
        )
        fine = torch.einsum("bcxyz,ix,jy,kz->bcijk", velocity_mm, *splines)
        larger = jacobian(exponential(fine, self.zooms_mm), self.zooms_mm)
        parts = torch.einsum("kxyz,bxyz->bk", structures, larger)
        whole = torch.einsum("xyz,bxyz->b", tissue, factors)
        # A difference of logarithms, not one of a quotient: its slope keeps NaN from ``whole``.
        return parts.where(parts > 0, torch.nan).log() - whole.log()[:, None] + math.log(100)
