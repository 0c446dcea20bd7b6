"""Check a brain's orientation against its header: compare it with a template in all 24 rotations.

A header that is wrong by a quarter or half turn gives plausible but meaningless labels.  The image
shows front and top, but not left and right: a brain is nearly its own mirror image.
"""

import logging
from dataclasses import dataclass, replace
from itertools import permutations, product

import numpy as np
from scipy import ndimage, optimize
from scipy.spatial.transform import Rotation

from cadiff_cli.errors import DataError
from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.products import Scan, Stripped, Template
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.information import normalised_information
from cadiff_cli.spatial.resample import resample
from cadiff_cli.stages.masks import LEAST_SYMMETRY, judge_mask

log = logging.getLogger(__name__)

SPACING_MM = 8.0
"""Fine enough to tell an adult's cerebellum from the forehead; smaller brains get finer voxels."""
BINS = 24
TILTS_DEG = (-20.0, 0.0, 20.0)
"""Heads are tilted within the axes of their scan."""
SHORTLIST = 2
"""Number of rotations, besides the header's, that are examined closely."""
CLEAR, FAIR = 1.1, 1.03
"""Least ratio of the information that the best and the next best rotation share with a template.

The best rotation must reach ``CLEAR``; the header's needs only ``FAIR``.  Thirty scans of six
sources had 1.13 to 2.0, two children's brains under a wrong header 0.80 and 0.83.
"""


@dataclass(frozen=True)
class Orientation:
    """A brain's orientation: ``rotation`` (3, 3) maps its header's directions to anatomical ones.

    ``score`` is the template's normalised mutual information with the rotated brain, ``upright``
    that without a rotation, ``next_best`` that of the best other rotation.
    """

    rotation: np.ndarray
    score: float
    upright: float
    next_best: float

    @property
    def is_upright(self) -> bool:
        """Whether the header fits best."""
        return bool((self.rotation == np.eye(3)).all())

    @property
    def is_clear(self) -> bool:
        """Whether the best rotation is ahead of the others."""
        least = FAIR if self.is_upright else CLEAR
        return self.score - 1 > least * (self.next_best - 1)

    @property
    def turn(self) -> str:
        """The rotation in words: ``90 degrees about x``, or ``120 degrees about a diagonal``."""
        vector = Rotation.from_matrix(self.rotation).as_rotvec(degrees=True)
        angle = float(np.linalg.norm(vector))
        along = np.flatnonzero(abs(vector) > 0.9 * max(angle, 1.0))
        axis = "xyz"[along[0]] if len(along) else "a diagonal"
        return f"{angle:.0f} degrees about {axis}"


def rotations() -> list[np.ndarray]:
    """The 24 rotations (3, 3) that map axes to axes; the first one moves nothing.

    >>> len(rotations()), {round(float(np.linalg.det(r))) for r in rotations()}
    (24, {1})
    """
    signed = (
        np.eye(3)[list(order)] * np.array(signs)[:, None]
        for order in permutations(range(3))
        for signs in product((1.0, -1.0), repeat=3)
    )
    return sorted((r for r in signed if np.linalg.det(r) > 0), key=lambda r: -float(np.trace(r)))


def orientation(brain: Volume, template: Volume) -> Orientation:
    """Find the orientation of a stripped brain (0 outside) of any size and position.

    All rotations are scored; if the result is in doubt, the best ones are fitted.
    """
    scale = (brain.litres / template.litres) ** (1 / 3)
    pair = _Pair(_coarse(brain, min(scale, 1) * SPACING_MM), _coarse(template, SPACING_MM))
    turns = rotations()
    level = [pair.score(turn) for turn in turns]
    shortlist = [0, *(1 + np.argsort(level[1:])[::-1][:SHORTLIST])]
    tilts = [np.radians(angles) for angles in product(TILTS_DEG, repeat=3)]
    tilted = {i: max((pair.score(turns[i], t), tuple(t)) for t in tilts) for i in shortlist}
    scores = {i: score for i, (score, _) in tilted.items()}
    if scores[0] - 1 < CLEAR * (max(scores[i] for i in shortlist[1:]) - 1):
        scores = {i: pair.fit(turns[i], np.array(tilted[i][1])) for i in shortlist}
    first, second = sorted(scores, key=lambda i: -scores[i])[:2]
    return Orientation(turns[first], scores[first], scores[0], scores[second])


def _coarse(brain: Volume, spacing_mm: float) -> Volume:
    """A low-resolution image whose brightest voxels are 1."""
    small = resample(brain, brain.grid.working(spacing_mm, tolerance=0.0))
    data = np.maximum(small.data, 0)
    return Volume(np.clip(data / np.percentile(data[data > 0], 98), 0, 1), small.grid)


class _Pair:
    """A brain and a template, compared with equal centres and sizes."""

    def __init__(self, brain: Volume, template: Volume) -> None:
        self.brain, self.template = brain, template
        # Centres of the shapes: a bias field moves the centre of brightness.
        self.centre, self.template_centre = (
            np.argwhere(v.data > 0).mean(axis=0) for v in (brain, template)
        )
        self.scale = (brain.litres / template.litres) ** (1 / 3)
        self.levels = _levels(template.data)

    def score(self, turn: np.ndarray, tilt: np.ndarray | None = None) -> float:
        """Normalised mutual information, 1 to 2, with the brain turned and tilted (radians).

        ``tilt`` may have six more values: three logarithms of scales, three shifts in 100 mm.
        """
        tilt = np.zeros(3) if tilt is None else tilt
        linear = turn.T @ Rotation.from_euler("xyz", tilt[:3]).as_matrix()
        shift = np.zeros(3)
        if len(tilt) > 3:
            linear = linear @ np.diag(np.exp(tilt[3:6]))
            shift = 100 * tilt[6:]
        to_voxels = np.linalg.inv(self.brain.grid.affine[:3, :3])
        matrix = to_voxels @ (self.scale * linear) @ self.template.grid.affine[:3, :3]
        offset = self.centre + to_voxels @ shift - matrix @ self.template_centre
        moved = ndimage.affine_transform(
            self.brain.data, matrix, offset, self.template.grid.shape, order=1
        )
        return _information(_levels(moved), self.levels)

    def fit(self, turn: np.ndarray, tilt: np.ndarray) -> float:
        """The score after fitting angles, scales and shifts, beginning at a tilt."""
        begin = np.concatenate([tilt, np.zeros(6)])
        optimum = optimize.minimize(
            lambda x: -self.score(turn, x),
            begin,
            method="Powell",
            bounds=[(a - 0.4, a + 0.4) for a in tilt] + 3 * [(-0.25, 0.25)] + 3 * [(-0.2, 0.2)],
            options={"xtol": 1e-2, "ftol": 1e-3, "maxiter": 3},
        )
        return float(-optimum.fun)


def _levels(data: np.ndarray) -> np.ndarray:
    """Intensities in [0, 1] as 0 to BINS - 1; only voxels outside the brain become 0."""
    return np.asarray(np.ceil(data * (BINS - 1)).astype(np.int64))


def _information(a: np.ndarray, b: np.ndarray) -> float:
    """What two images tell of each other where either is not 0."""
    counts = np.bincount((a * BINS + b).ravel(), minlength=BINS * BINS).reshape(BINS, BINS)
    counts[0, 0] = 0
    return normalised_information(counts)


def reoriented(grid: Grid, rotation: np.ndarray) -> Grid:
    """``grid`` with its world rotated by ``rotation`` (3, 3) about the grid's centre."""
    centre = grid.to_world((np.array(grid.shape) - 1) / 2)
    affine = grid.affine.copy()
    affine[:3, :3] = rotation @ affine[:3, :3]
    affine[:3, 3] = centre + rotation @ (affine[:3, 3] - centre)
    return Grid(grid.shape, affine)


def verified(scan: Scan, stripped: Stripped, template: Template) -> Stripped:
    """Check ``stripped`` against its header; add a note if the orientation is unclear.

    Raises ``DataError`` if a whole brain clearly has another orientation.
    """
    name, grid = scan.path.name, scan.t1.grid
    best = orientation(stripped.t1, template.brain)
    log.info("orientation: %s", best)
    if best.is_upright and best.is_clear:
        return stripped
    # Refuse a scan only by a whole brain, not by half of one or by a mask of something else.
    rotated = Volume(stripped.mask.data, reoriented(stripped.mask.grid, best.rotation))
    whole = judge_mask(rotated).symmetry >= LEAST_SYMMETRY
    if not (best.is_clear and whole):
        text = f"cadiff cannot tell whether {name} lies as its header says (axes {grid.axes})"
        log.warning(text)
        return replace(stripped, notes=(*stripped.notes, Note(NoteCode.ORIENTATION, text)))
    raise DataError(
        f"{name} is turned by {best.turn}: its header says {grid.axes}, its image looks like"
        f" {reoriented(grid, best.rotation).axes} (left and right cannot be seen)",
        f"mend the header: cadiff reorient {name} -o MENDED.nii.gz",
    )
