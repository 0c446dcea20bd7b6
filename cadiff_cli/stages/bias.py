"""Even out a brain's brightness: run N4 until it finds nothing more to correct.

Receive coils and 7 T make one side of a brain several times as bright as the other.  One run of N4
removes only a part of a strong field; the size of its correction shows whether to run it again.
"""

import logging
from dataclasses import dataclass

import numpy as np

from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.products import Stripped
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import bounding_box, resample
from cadiff_cli.stages.register import n4

log = logging.getLogger(__name__)

ACROSS = 9
"""Voxels along the edge of a cube with the brain's volume: 12 mm each in an adult.  Bias is smooth:
of a ratio of 3.6 (MALC 1014) 2 % are left after three passes; at 4 mm, 1.3 % after one.
"""
CONVERGED = 0.02
"""N4 has converged below this standard deviation of a correction's logarithm (2 %)."""
MOST_PASSES = 6
"""A field of ratio 8.5 takes five."""
INSIDE = 0.9
"""Coarse voxels with more than this share of brain belong to the brain."""
NATURAL = 1.4
"""A smaller ratio is not corrected: it is partly anatomy, and the network was trained with it.  One
scan of MALC (1018, ratio 1.24) lost 0.006 Dice by the correction, with one denoising step."""
LEVELS = 2**14
"""The most steps of brightness in the corrected head."""
STRONG = 6.0
"""From this ratio on, a note asks to look at the image: the correction amplifies noise too."""


@dataclass(frozen=True, eq=False)
class Bias:
    """A multiplicative field: ``log`` is its natural logarithm on a coarse grid.

    ``ratio`` is that of the 95th to the 5th percentile of the estimated field in the brain;
    ``converged`` is False if the last pass still made a correction.
    """

    log: Volume
    ratio: float
    converged: bool

    @property
    def notes(self) -> tuple[Note, ...]:
        """Reasons to look at the result."""
        if self.converged and self.ratio < STRONG:
            return ()
        left = "" if self.converged else ", but not completely"
        text = (
            f"the brightness of the brain varies by a factor of {self.ratio:.1f} (receive bias),"
            f" which is evened out before registration{left}"
        )
        return (Note(NoteCode.BIAS, text),)


def find_bias(t1: Volume, mask: Volume) -> Bias:
    """Estimate the bias of ``t1`` (no negative values) within ``mask`` (bool), both on one grid."""
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
        correction = n4(Volume(evened, grid), Volume(inside, grid))
        correction = correction - correction[inside].mean()
        total += correction
        size = float(correction[inside].std())
        log.info("N4: a correction of %.1f %%", 100 * size)
        if size < CONVERGED:
            break
    # Outside the brain no data constrain the splines.
    total = np.clip(total, total[inside].min(), total[inside].max())
    low, high = np.percentile(total[inside], [5, 95])
    ratio = round(float(np.exp(high - low)), 3)
    return Bias(Volume(total, grid), ratio, size < CONVERGED)


def evened(t1: Volume, bias: Bias) -> Volume:
    """Divide ``t1`` (0 outside the brain) by the field; the mean intensity stays the same.

    What is natural (``NATURAL``) stays.
    """
    if bias.ratio < NATURAL:
        return t1
    box = bounding_box(t1.data != 0)
    part = t1.grid.within(box)
    data = t1.data.copy()
    data[box] = data[box] / factor(bias.log, part)
    data *= t1.data.sum(dtype=np.float64) / data.sum(dtype=np.float64)
    return Volume(data, t1.grid)


def evened_head(stripped: Stripped) -> Volume | None:
    """The scan on its own grid, divided by the whole field: what other programs expect of N4.

    Rounded to a multiple of a power of 2; the brightest voxel has ``LEVELS`` / 2 to ``LEVELS`` of
    them: the noise is larger, the file smaller.
    """
    head, log_bias = stripped.head, stripped.log_bias
    if head is None or log_bias is None:
        return None
    data = head.data / factor(log_bias, head.grid)
    step = np.exp2(np.ceil(np.log2(data.max() / LEVELS)))  # a power of 2 rounds exactly
    return Volume((np.rint(data / step) * step).astype(np.float32), head.grid)


def factor(log_bias: Volume, grid: Grid) -> np.ndarray:
    """The field's factor at each voxel of ``grid``; beyond the field, its outermost values."""
    n = max(log_bias.grid.shape)
    wide = log_bias.grid.crop((-n,) * 3, tuple(size + 2 * n for size in log_bias.grid.shape))
    return np.asarray(np.exp(resample(Volume(np.pad(log_bias.data, n, "edge"), wide), grid).data))
