"""Positions of voxels.  One convention: arrays (X, Y, Z), affines voxel -> RAS+ millimetres."""

from dataclasses import dataclass

import numpy as np
from nibabel import orientations

from cadiff_cli.errors import DataError

MAX_SHEAR = 1e-3
"""Cosine between two axes from which a grid counts as sheared rather than rounded."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A lattice in the world: ``shape`` (3,) and ``affine`` (4, 4), voxel index -> RAS mm.

    >>> Grid((4, 4, 4), np.diag([2.0, 2, 2, 1])).voxel_volume_mm3
    8.0
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise DataError(
                f"affine is {affine.tolist()}",
                "it must be a finite 4x4 matrix: repair the header (sform/qform)",
            )
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        # A volume element much smaller than the product of its edges means collapsed axes.
        if spacing.min() <= 0 or abs(np.linalg.det(affine[:3, :3])) < 1e-3 * spacing.prod():
            raise DataError(
                f"affine is singular (voxel edges {np.round(spacing, 4).tolist()} mm)",
                "repair the header (sform/qform): voxels must span a volume",
            )
        affine.flags.writeable = False
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"<Grid {size} {self.axes} {np.round(self.spacing_mm, 3).tolist()} mm>"

    @property
    def axes(self) -> str:
        """Directions of the axes, such as ``RAS``."""
        return "".join(orientations.aff2axcodes(self.affine))

    @property
    def spacing_mm(self) -> np.ndarray:
        """(3,) edge lengths of a voxel."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of a voxel, the triple product of its edges (correct for sheared grids too)."""
        a, b, c = self.affine[:3, :3].T
        return float(abs(a @ np.cross(b, c)))

    @property
    def is_sheared(self) -> bool:
        """Whether the axes are not at right angles (gantry tilt)."""
        return bool(_shear(self.affine[:3, :3] / self.spacing_mm) > MAX_SHEAR)

    def to_world(self, ijk: np.ndarray) -> np.ndarray:
        """(..., 3) voxel indices -> (..., 3) RAS mm."""
        return np.asarray(ijk @ self.affine[:3, :3].T + self.affine[:3, 3])

    def voxel_map(self, other: "Grid") -> np.ndarray:
        """(4, 4) matrix: voxel indices of ``other`` -> voxel indices of this grid."""
        return np.asarray(np.linalg.solve(self.affine, other.affine))

    def crop(self, start: tuple[int, ...], shape: tuple[int, ...]) -> "Grid":
        """The sub-grid that begins at voxel ``start`` (which may lie outside)."""
        affine = self.affine.copy()
        affine[:3, 3] = self.to_world(np.asarray(start))
        return Grid(shape, affine)  # type: ignore[arg-type]

    def within(self, box: tuple[slice, ...]) -> "Grid":
        """The sub-grid of a box of voxels."""
        return self.crop(tuple(s.start for s in box), tuple(s.stop - s.start for s in box))

    def coarsen(self, factor: int) -> "Grid":
        """The grid of blocks of ``factor``^3 voxels; each new voxel is at its block's centre."""
        affine = self.affine.copy()
        affine[:3, 3] = self.to_world(np.full(3, (factor - 1) / 2))
        affine[:3, :3] *= factor
        return Grid(tuple(n // factor for n in self.shape), affine)  # type: ignore[arg-type]

    def working(self, spacing_mm: float = 1.0, tolerance: float = 0.01) -> "Grid":
        """The same field of view with axes nearest to RAS and cubic voxels of ``spacing_mm``.

        Axes are permuted and flipped, never rotated.  An axis keeps a spacing within
        ``tolerance`` (relative), so a 1 mm scan in any orientation is not interpolated.  Sheared
        axes (gantry tilt) become the nearest orthogonal ones: ITK has no sheared grids.
        """
        to_ras = orientations.io_orientation(self.affine)
        flip = orientations.inv_ornt_aff(to_ras, self.shape)
        affine = self.affine @ flip
        shape = np.array(self.shape)[np.argsort(to_ras[:, 0])]
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        centre = affine[:3, :3] @ ((shape - 1) / 2) + affine[:3, 3]
        directions = affine[:3, :3] / spacing
        if _shear(directions) > MAX_SHEAR:
            u, _, v = np.linalg.svd(directions)
            affine[:3, :3] = (u @ v) * spacing
        step = np.where(abs(spacing / spacing_mm - 1) <= tolerance, 1.0, spacing_mm / spacing)
        new_shape = np.maximum(np.ceil(shape / step - 1e-6), 1).astype(int)
        scaled = affine.copy()
        scaled[:3, :3] = affine[:3, :3] * step
        # Both fields of view share their centre.
        scaled[:3, 3] = centre - scaled[:3, :3] @ ((new_shape - 1) / 2)
        return Grid(tuple(new_shape), scaled)


@dataclass(frozen=True, eq=False)
class Volume:
    """An image: read-only ``data`` (X, Y, Z) on a ``grid``."""

    data: np.ndarray
    grid: Grid

    def __post_init__(self) -> None:
        if self.data.shape != self.grid.shape:
            raise DataError(
                f"array of shape {self.data.shape} on a grid of shape {self.grid.shape}",
                "an image and its grid must agree",
            )
        view = self.data.view()
        view.flags.writeable = False
        object.__setattr__(self, "data", view)

    @property
    def litres(self) -> float:
        """Volume of the voxels that are not 0, for a mask."""
        return float(np.count_nonzero(self.data)) * self.grid.voxel_volume_mm3 / 1e6

    def __repr__(self) -> str:
        return f"<Volume {self.data.dtype} on {self.grid!r}>"


def faces(data: np.ndarray) -> list[np.ndarray]:
    """The six outermost slices of an image (X, Y, Z)."""
    return [np.moveaxis(data, axis, 0)[index] for axis in range(3) for index in (0, -1)]


def border_value(data: np.ndarray) -> float:
    """The value of an image's background: the median of its faces."""
    return float(np.median(np.concatenate([face.ravel() for face in faces(data)])))


def _shear(directions: np.ndarray) -> float:
    """The largest cosine between two of three unit vectors (columns)."""
    return float(abs(directions.T @ directions - np.eye(3)).max())
