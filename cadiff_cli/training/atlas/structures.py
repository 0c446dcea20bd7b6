"""Bring a person's structures and the base's together: what a registration of images leaves apart.

By intensities alone a ventricle five times as large as the base's is not reached. Here the velocity
of the registration is the beginning, and maps of structures correct it: the share of each structure
in a person's voxel shall be that at the point of the base that the velocity takes it to.  The
correction is smooth (a Gaussian over the velocity's grid) and costs something, so the registration
stays as it is where no border asks for another.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.networks.layers import GaussianFilter
from scipy import ndimage
from torch import Tensor

from cadiff_cli.nets.parcels import sampled
from cadiff_cli.spatial.deformation import exponential
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import grid_around, pool, resample, resample_labels
from cadiff_cli.training.atlas.velocity import folded

STRIDE = 2
"""Shares are counted over blocks of so many voxels a side."""
AROUND = 3
"""Blocks around a brain in which there is nothing."""
ITERATIONS = 20
SQUARINGS = 5
"""While a velocity is fitted: 20 mm in steps of 0.6 mm."""
RATE_MM = 0.5
"""Of Adam: about the length of a step."""
WIDTH_VOXELS = 1.0
"""Standard deviation of the Gaussian that smooths corrections, on the velocity's grid."""
STIFFNESS = 0.01
"""Weighs the mean square of the correction's slopes, in mm a voxel, against errors of shares."""


@dataclass(frozen=True, eq=False)
class Shares:
    """Shares (C, X, Y, Z) float32 of each of C structures in the voxels of ``grid``."""

    data: np.ndarray
    grid: Grid

    @classmethod
    def of(cls, codes: Volume, structures: Sequence[Sequence[int]]) -> "Shares":
        """Shares of ``structures``, each a collection of codes, in a label map at about 1 mm."""
        fine = codes.grid.working()
        labels = resample_labels(codes, fine)
        grid = grid_around(labels.data > 0, fine, STRIDE * AROUND, STRIDE)
        inside = resample(labels, grid, order=0).data
        shares = [pool(np.isin(inside, list(group))[None], STRIDE)[0] for group in structures]
        return cls(np.stack(shares), grid.coarsen(STRIDE))


def volumes_on(grid: Grid, codes: Volume, structures: Sequence[Collection[int]]) -> np.ndarray:
    """Volumes (C, X, Y, Z) float32 in mm3 of each of C structures in each voxel of ``grid``."""
    to_grid = grid.voxel_map(codes.grid)
    sums = list[np.ndarray]()
    for group in structures:
        ijk = np.argwhere(np.isin(codes.data, list(group))) @ to_grid[:3, :3].T + to_grid[:3, 3]
        near = np.ravel_multi_index(tuple(np.rint(ijk).astype(int).T), grid.shape, mode="clip")
        sums.append(np.bincount(near, minlength=int(np.prod(grid.shape))).reshape(grid.shape))
    return np.stack(sums).astype(np.float32) * np.float32(codes.grid.voxel_volume_mm3)


def fit_structures(
    velocity_mm: np.ndarray, affine: np.ndarray, person: Shares, base: Shares, to: Grid
) -> tuple[np.ndarray, int]:
    """Correct a velocity (3, X, Y, Z) on the grid ``to`` so that structures meet.

    ``affine`` (4, 4) takes the person's points to the base's world, as ``Fit`` holds it.  Returns
    the velocity, float32 in mm, and the number of voxels at which its exponential folds.
    """
    near = ndimage.binary_dilation(person.data.any(axis=0))
    blocks = np.argwhere(near)
    points = person.grid.to_world(blocks) @ affine[:3, :3].T + affine[:3, 3]
    maps, wanted = torch.from_numpy(base.data)[None], torch.from_numpy(person.data[:, near])
    at, to_base = (torch.from_numpy(np.linalg.inv(grid.affine)) for grid in (to, base.grid))
    # Every other block, like the white fields of a chessboard, then the black ones.
    halves = []
    for odd in (0, 1):
        half = torch.from_numpy(blocks.sum(axis=1) % 2 == odd)
        places = torch.from_numpy(points)[half]
        halves.append((places, _moved(places, at).float(), wanted[:, half]))
    zooms = to.spacing_mm.tolist()
    start = torch.from_numpy(velocity_mm.astype(np.float32))[None]
    rough = torch.zeros_like(start, requires_grad=True)
    smooth = GaussianFilter(3, WIDTH_VOXELS)
    steps = torch.optim.Adam([rough], lr=RATE_MM, betas=(0.9, 0.9))
    for step in range(ITERATIONS):
        places, in_velocity, shares = halves[step % 2]
        correction = smooth(rough)
        back = _read(exponential(-(start + correction), zooms, SQUARINGS), in_velocity)
        found = _read(maps, _moved(places + back, to_base).float()).T
        slopes = torch.gradient(correction[0], dim=(1, 2, 3))
        stiff = sum((slope.square().mean() for slope in slopes), torch.zeros(()))
        loss = (found - shares).square().mean(dim=1).sum() + STIFFNESS * stiff
        steps.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        steps.step()
    with torch.no_grad():
        velocity = start + smooth(rough)
    return velocity[0].numpy(), folded(velocity, zooms)


def _moved(points: Tensor, affine: Tensor) -> Tensor:
    """Points (n, 3) after an affine map (4, 4)."""
    return points @ affine[:3, :3].T + affine[:3, 3]


def _read(image: Tensor, places: Tensor) -> Tensor:
    """(n, C): an image (1, C, X, Y, Z) at ``places`` (n, 3) in voxels; beyond it, its border."""
    return sampled(image, places / (torch.tensor(image.shape[2:]) - 1))
