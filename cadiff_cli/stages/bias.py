"""Even out a brain's brightness: N4, repeated until it finds nothing more to correct.

Receive coils and 7 T make one side of a brain several times as bright as the other.  One run of N4
removes a part of a strong field only; its own answer tells whether another is worth it.
"""

import logging
from dataclasses import dataclass

import numpy as np

from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import bounding_box, resample
from cadiff_cli.stages.register import n4

log = logging.getLogger(__name__)

ACROSS = 9
"""Voxels along the edge of a cube of the brain's volume, which makes them 12 mm in an adult.  Bias
is smooth: of a ratio of 3.6 (MALC 1014) 2 % are left after three passes; at 4 mm, 1.3 % after one.
"""
CONVERGED = 0.02
"""Standard deviation of a correction's logarithm (2 %) from which on nothing is left to do."""
MOST_PASSES = 6
"""A field of ratio 8.5 takes five."""
INSIDE = 0.9
"""Share of brain that makes a coarse voxel one of the brain."""
NATURAL = 1.4
"""A smaller ratio is left alone: a part of it is anatomy, and the network was trained with it.  One
scan of MALC (1018, ratio 1.24) lost 0.006 Dice by the correction, at one step."""
STRONG = 6.0
"""Ratio from which on a corrected image deserves a look: noise was made bright with the signal."""


@dataclass(frozen=True, eq=False)
class Bias:
    """A multiplicative field: ``log`` is its natural logarithm on a coarse grid.

    ``ratio`` is that of the 95th and 5th percentiles of what was found in the brain, ``converged``
    False where the last pass still found something.
    """

    log: Volume
    ratio: float
    converged: bool

    @property
    def notes(self) -> tuple[Note, ...]:
        """Reasons to look at the result."""
        if self.converged and self.ratio < STRONG:
            return ()
        left = "" if self.converged else ", though not wholly"
        text = (
            f"the brightness of the brain varies by a factor of {self.ratio:.1f} (receive bias),"
            f" which is evened out before registration{left}"
        )
        return (Note(NoteCode.BIAS, text),)

    def at(self, grid: Grid) -> np.ndarray:
        """The field's factor at each voxel of ``grid``; its outermost values beyond its own."""
        return np.asarray(np.exp(resample(self.log, grid).data))


def find_bias(t1: Volume, mask: Volume) -> Bias:
    """The bias of ``t1`` (from 0 up) within ``mask`` (bool), both on one grid."""
    spacing_mm = 100 * mask.litres ** (1 / 3) / ACROSS
    grid = t1.grid.working(spacing_mm, tolerance=0.0)
    image = resample(t1, grid).data
    share = resample(Volume(mask.data.astype(np.float32), mask.grid), grid).data
    inside = (share > INSIDE) & (image > 0)
    total = np.zeros(grid.shape, dtype=np.float32)
    if not inside.any():
        return Bias(Volume(total, grid), 1.0, converged=True)
    for _ in range(MOST_PASSES):
        evened = np.where(inside, image / np.exp(total), 0)
        found = n4(Volume(evened, grid), Volume(inside, grid))
        found = found - found[inside].mean()
        total += found
        size = float(found[inside].std())
        log.info("N4: a correction of %.1f %%", 100 * size)
        if size < CONVERGED:
            break
    # Beyond the brain nothing holds the splines.
    total = np.clip(total, total[inside].min(), total[inside].max())
    low, high = np.percentile(total[inside], [5, 95])
    ratio = round(float(np.exp(high - low)), 3)
    if ratio < NATURAL:
        total = np.zeros_like(total)
    return Bias(Volume(total, grid), ratio, size < CONVERGED)


def evened(t1: Volume, bias: Bias) -> Volume:
    """``t1`` (0 outside the brain) divided by the field, with the mean that it had."""
    if not bias.log.data.any():
        return t1
    box = bounding_box(t1.data != 0)
    part = t1.grid.crop(tuple(s.start for s in box), tuple(s.stop - s.start for s in box))
    data = t1.data.copy()
    data[box] = data[box] / bias.at(part)
    data *= t1.data.sum(dtype=np.float64) / data.sum(dtype=np.float64)
    return Volume(data, t1.grid)
