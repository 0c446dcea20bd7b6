"""Random draws of hemispheres: structures, field and parcels move together.

Everything comes from one generator a draw, so a draw is a function of its number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset

from cadiff_cli.nets.parcels import STRIDE, sampled
from cadiff_cli.stages.parcels import detail, shares
from cadiff_cli.training.batch import Batch
from cadiff_cli.training.parcels.config import ParcelTrainConfig
from cadiff_cli.training.parcels.data import NOWHERE, Labelled

EXTENTS_MM = (180.0, 210.0, 180.0)
"""Of the field from 0 to 1, in all shipped templates: errors are given in mm."""
ERROR_CELLS = 8
"""Cells between the knots of a field's smooth error."""
BEND_VOXELS = 32
"""Voxels of 1 mm between the knots of a bend: wide enough to leave a gyrus in one piece."""


@dataclass(frozen=True, eq=False)
class HemispherePatch(Batch):
    """What ``ParcelNet`` is shown, the parcels (1, n) at the points, and whose they are."""

    detail: Tensor
    shares: Tensor
    field: Tensor
    at: Tensor
    parcels: Tensor
    person: Tensor


class HemisphereDraws(Dataset[HemispherePatch]):
    """An endless series: draw ``i`` is a function of the seed and of ``i``."""

    def __init__(self, hemispheres: Sequence[Labelled], config: ParcelTrainConfig) -> None:
        self.hemispheres, self.config = hemispheres, config
        self.people = sorted({one.subject for one in hemispheres})

    def __getitem__(self, index: int) -> HemispherePatch:
        """Draw number ``index``; in turn, every hemisphere is drawn once before one comes again."""
        rounds, place = divmod(index, len(self.hemispheres))
        order = np.random.default_rng([self.config.seed, rounds]).permutation(len(self.hemispheres))
        rng = np.random.default_rng([self.config.seed, index, 1])
        return self.draw(self.hemispheres[order[place]], rng)

    def draw(self, one: Labelled, rng: np.random.Generator) -> HemispherePatch:
        """A hemisphere with all that is random about it."""
        config = self.config
        shape = np.array(one.parcels.shape)
        matrix, shift = np.eye(3), rng.integers(-STRIDE + 1, STRIDE, 3).astype(float)
        bend = None
        if moved := rng.random() < config.moved:
            angles = rng.uniform(-config.rotation_deg, config.rotation_deg, 3)
            matrix = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
            matrix = matrix * rng.uniform(1 - config.scale, 1 + config.scale, 3)
            if config.elastic_mm:
                knots = np.maximum(2, -(-shape // BEND_VOXELS))
                bend = torch.from_numpy(config.elastic_mm * rng.normal(size=(1, 3, *knots)))
        centre = (shape - 1) / 2

        def source(voxels: np.ndarray) -> Tensor:
            """Where points (n, 3) of the draw come from: 0 to 1 between the faces of the box."""
            old = (voxels - centre) @ matrix.T + centre + shift
            if bend is not None:
                old += sampled(bend, torch.from_numpy((voxels + 0.5) / shape)).numpy()
            return torch.from_numpy((old + 0.5) / shape).float()

        classes, parcels = one.seen.classes, one.parcels
        if moved:
            at = source(np.indices(tuple(shape)).reshape(3, -1).T)
            points = (2 * at - 1).flip(-1).reshape(1, *shape, 3)
            stacked = torch.from_numpy(np.stack([classes, parcels - NOWHERE])).float()[None]
            nearest = F.grid_sample(stacked, points, "nearest", align_corners=False)[0]
            classes, parcels = nearest.numpy().astype(np.int16)
            parcels = parcels + NOWHERE
            # Interpolated masks are smooth, as those of a network are; the largest wins.
            masks = F.grid_sample(detail(one.seen.classes), points, align_corners=False)
            rest = 1 - masks.sum(dim=1, keepdim=True)
            best = torch.cat([masks, rest], dim=1).argmax(dim=1, keepdim=True)
            seen = torch.cat([best == k for k in range(masks.shape[1])], dim=1).float()
        else:
            classes, parcels = (
                moved_by(x, shift.astype(int), fill)
                for x, fill in ((classes, 0), (parcels, NOWHERE))
            )
            seen = detail(classes)
        cells = tuple(shape // STRIDE)
        middles = np.indices(cells).reshape(3, -1).T * STRIDE + (STRIDE - 1) / 2
        field = one.seen.field
        if rng.random() >= config.together:
            field = one.fields[rng.integers(len(one.fields))]
        values = sampled(torch.from_numpy(field)[None], source(middles), corners=False)
        drawn = values.T.reshape(1, 3, *cells) + self._error(cells, rng)
        cortex = np.argwhere(parcels != NOWHERE)
        chosen = cortex[rng.choice(len(cortex), min(config.points, len(cortex)), replace=False)]
        return HemispherePatch(
            seen,
            shares(classes.astype(np.int64)),
            drawn,
            torch.from_numpy(chosen).float()[None],
            torch.from_numpy(parcels[tuple(chosen.T)].astype(np.int64))[None],
            torch.tensor([self.people.index(one.subject)]),
        )

    def _error(self, cells: tuple[int, ...], rng: np.random.Generator) -> Tensor:
        """(1, 3, *cells): a smooth error of the registration, and one of the whole brain."""
        knots = [max(2, -(-n // ERROR_CELLS)) for n in cells]
        noise = rng.normal(size=(1, 3, *knots)) + 0.5 * rng.normal(size=(1, 3, 1, 1, 1))
        smooth = F.interpolate(
            torch.from_numpy(noise).float(), size=cells, mode="trilinear", align_corners=True
        )
        per_mm = self.config.field_error_mm / torch.tensor(EXTENTS_MM)
        return smooth * per_mm[:, None, None, None]


def moved_by(volume: np.ndarray, shift: np.ndarray, fill: int) -> np.ndarray:
    """``volume`` (X, Y, Z) read at voxels + ``shift``; ``fill`` beyond its ends."""
    out = np.full_like(volume, fill)
    to, of = zip(
        *(
            (slice(max(0, -s), n - max(0, s)), slice(max(0, s), n - max(0, -s)))
            for s, n in zip(shift.tolist(), volume.shape, strict=True)
        ),
        strict=True,
    )
    out[to] = volume[of]
    return out
