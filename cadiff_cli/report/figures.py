"""Slices of a scan with vector outlines over them: sharp on any screen, and quick to draw.

A plane is the axis it is perpendicular to.  Images are drawn with superior or anterior up and the
patient's left on the left; volumes are on grids with RAS axes.  The only module that imports
contourpy and Pillow.
"""

import base64
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import ndimage

from cadiff_cli.labels.parcellation import Parcellation, Structure
from cadiff_cli.report.case import Case, around
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import resample

PLANES = ("sagittal", "coronal", "axial")
MARKS = (("P", "A"), ("L", "R"), ("L", "R"))
SLICES = 8
FINE = 4
"""Outlines are written in whole steps of a quarter of a voxel."""
QUALITY = 82
TISSUES = (0.35, 0.72)
"""Shares of a template's 98th percentile of intensity that separate CSF, grey and white matter."""
AIR = 16
"""Shades (of 255) up to this one may be noise."""
FIELD_STEP = 0.05
COLOURS = ("#ff6b6b", "#51cf66", "#4dabf7")
"""Colours of x, y and z."""
TINT = 0.5
"""How much of a voxel's colour is the field's."""
UNCERTAIN = 0.4
"""Uncertainty shown in the full colour; a border between two equal structures has 0.19."""
CALM, ALARM = np.array((255.0, 60.0, 0.0)), np.array((255.0, 255.0, 80.0))
"""Colours of low and of high uncertainty."""


@dataclass(frozen=True)
class Outline:
    """An SVG path; ``name`` is shown when the pointer rests on it."""

    name: str
    color: str
    path: str


Drawn = Callable[[int, int], Iterable[Outline]]
"""The outlines over a slice (axis, index)."""


@dataclass(frozen=True)
class Slice:
    """One picture of ``width`` x ``height`` voxels: an image and the outlines over it."""

    caption: str
    width: int
    height: int
    image: str
    outlines: tuple[Outline, ...] = ()
    second: str = ""
    marks: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Plane:
    """Slices of one orientation."""

    name: str
    slices: tuple[Slice, ...]


def near_mask(case: Case, grid: Grid | None = None) -> np.ndarray:
    """(X, Y, Z) bool: the brain on ``grid``, by default on the grid around it."""
    mask = Volume(case.mask.data.astype(np.float32), case.mask.grid)
    return np.asarray(resample(mask, grid or case.near).data > 0.5)


def grey(t1: Volume, mask: np.ndarray | None = None) -> np.ndarray:
    """(X, Y, Z) uint8: 0 is the darkest, 255 the 99.5th percentile of the brain."""
    inside = t1.data[mask] if mask is not None and mask.any() else t1.data[t1.data > t1.data.min()]
    if not inside.size:
        return np.zeros(t1.data.shape, dtype=np.uint8)
    low = float(min(np.percentile(t1.data, 1), np.percentile(inside, 1)))
    high = float(np.percentile(inside, 99.5))
    scaled = (t1.data - low) / max(high - low, 1e-6) * 255
    return np.asarray(np.clip(scaled, 0, 255).astype(np.uint8))


def cut(data: np.ndarray, axis: int, index: int) -> np.ndarray:
    """Take a slice as rows of an image, the top row first; colours, if any, are the last axis."""
    return np.asarray(np.take(data, index, axis=axis).swapaxes(0, 1)[::-1])


def picture(pixels: np.ndarray) -> str:
    """A data URI of (rows, columns) or (rows, columns, 3) uint8."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "WEBP", quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def outline(values: np.ndarray, level: float = 0.5) -> str:
    """The iso-line of an image as an SVG path, in quarters of a pixel."""
    import contourpy

    rows, columns = np.nonzero(np.isfinite(values) & (values > level))
    if not len(rows):
        return ""
    # Only the part that holds the iso-line, with a rim, so that lines close.
    top, left = max(rows.min() - 1, 0), max(columns.min() - 1, 0)
    part = values[top : rows.max() + 2, left : columns.max() + 2].astype(np.float32)
    if min(part.shape) < 2:
        return ""
    centre = np.array([left + 0.5, top + 0.5])
    masked: Any = np.ma  # untyped
    z = masked.array(part, mask=~np.isfinite(part))
    lines = contourpy.contour_generator(z=z).lines(level)
    return "".join(_path(np.asarray(line) + centre) for line in lines)


def _path(points: np.ndarray) -> str:
    """Write relative whole steps; points on a straight line are left out."""
    whole = np.rint(points * FINE).astype(int)
    closed = len(whole) > 2 and (whole[0] == whole[-1]).all()
    steps = np.diff(whole, axis=0)
    steps = steps[steps.any(axis=1)]
    if not len(steps):
        return ""
    turns = np.flatnonzero(np.diff(np.arctan2(steps[:, 1], steps[:, 0]))) + 1
    merged = np.add.reduceat(steps, np.concatenate([[0], turns]), axis=0)
    moves = "".join(f"{x:d}{'' if y < 0 else ' '}{y:d} " for x, y in merged)
    return f"M{whole[0, 0]} {whole[0, 1]}l{moves.rstrip()}{'z' if closed else ''}"


def positions(inside: np.ndarray, axis: int, n: int) -> list[int]:
    """Spread ``n`` slices evenly over the object ``inside``; up to three stay near its middle."""
    occupied = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
    low, high = (0.08, 0.92) if n > 3 else (0.36, 0.55)
    shares = np.linspace(low, high, n)
    return [round(float(x)) for x in np.quantile(occupied, shares)]


def parcels(case: Case, n: int = SLICES) -> list[Plane]:
    """Outlines of the parcels of the cortex over the scan."""
    finer = case.result.finer
    if case.parcels is None or finer is None:
        return []
    inner = [s.code for s in finer.parcellation.structures if s.parent != s.code]
    shown = np.where(np.isin(case.parcels.data, inner), case.parcels.data, 0)
    return structures(replace(case, labels=Volume(shown, case.parcels.grid)), finer.parcellation, n)


def structures(case: Case, parcellation: Parcellation, n: int = SLICES) -> list[Plane]:
    """Outlines of all structures over the scan."""
    t1, labels = resample(case.t1, case.near), resample(case.labels, case.near, order=0).data
    brain = near_mask(case)
    image = grey(t1, brain)
    shown = labels > 0 if labels.any() else brain
    return planes(image, case.near, shown, n, outlined(labels, parcellation))


def outlined(labels: np.ndarray, parcellation: Parcellation) -> Drawn:
    """Outlines of the structures in label codes (X, Y, Z)."""
    by_code = {s.code: s for s in parcellation.structures}

    def drawn(axis: int, index: int) -> Iterable[Outline]:
        codes = cut(labels, axis, index)
        for code in np.unique(codes[codes > 0]):
            s: Structure | None = by_code.get(int(code))
            if s is not None and (path := outline(codes == code)):
                yield Outline(s.name, s.color, path)

    return drawn


def head(case: Case, n: int = 2) -> list[Plane]:
    """The mask's outline over the whole scan, without the air around it."""
    image = grey(case.t1, case.mask.data)
    grid = around(Volume((image > AIR) | case.mask.data, case.mask.grid))
    image = resample(Volume(image, case.t1.grid), grid, order=0).data
    brain = near_mask(case, grid)

    def drawn(axis: int, index: int) -> Iterable[Outline]:
        yield Outline("brain mask", "#ffd43b", outline(cut(brain, axis, index)))

    return planes(image, grid, brain, n, drawn)


def registration(case: Case, n: int = 2) -> list[Plane]:
    """Edges of the carried template over the scan; the second image is the template itself."""
    if case.template is None:
        return []
    brain, image = near_mask(case), grey(resample(case.t1, case.near))
    mask = case.template.data > 0
    other = grey(case.template, mask)
    smooth = ndimage.gaussian_filter(case.template.data, 0.7)
    top = float(np.percentile(smooth[mask], 98)) if mask.any() else 1.0

    def drawn(axis: int, index: int) -> Iterable[Outline]:
        for level, color in zip(TISSUES, ("#ffd43b", "#66d9e8"), strict=True):
            yield Outline("template", color, outline(cut(smooth, axis, index), level * top))

    return planes(image, case.near, brain, n, drawn, other)


def coordinates(case: Case, n: int = 2) -> list[Plane]:
    """The field as colours, under lines of equal coordinate at every twentieth of the extents."""
    if case.coordinates is None:
        return []
    field = case.coordinates.data
    image = grey(resample(case.t1, case.near))
    inside = near_mask(case)
    levels = np.arange(FIELD_STEP, 1, FIELD_STEP)

    def drawn(axis: int, index: int) -> Iterable[Outline]:
        brain = cut(inside, axis, index)
        for channel in (a for a in range(3) if a != axis):
            values = np.where(brain, cut(field[channel], axis, index), np.nan)
            path = "".join(outline(values, float(level)) for level in levels)
            yield Outline("xyz"[channel], COLOURS[channel], path)

    return planes(image, case.near, inside, n, drawn, tinted(image, field, inside))


def tinted(image: np.ndarray, field: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(X, Y, Z, 3) uint8: a grey image; inside the brain tinted red by x, green by y and blue by z.

    ``field`` (3, X, Y, Z) holds fractions of the template's extents.
    """
    share = np.where(inside, TINT, 0.0)[..., None].astype(np.float32)
    colour = 255 * np.clip(np.nan_to_num(np.moveaxis(field, 0, -1)), 0, 1)
    return np.asarray(((1 - share) * image[..., None] + share * colour).astype(np.uint8))


def uncertainty(case: Case, n: int = 2) -> list[Plane]:
    """The uncertainty of the labels, glowing over the scan."""
    if case.uncertainty is None:
        return []
    inside = near_mask(case)
    image = grey(resample(case.t1, case.near), inside)
    glowing = glow(image, case.uncertainty.data)
    return planes(image, case.near, inside, n, lambda _axis, _index: (), glowing)


def glow(image: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    """(X, Y, Z, 3) uint8: a grey image under orange (uncertain) to yellow (very uncertain)."""
    share = np.clip(uncertainty / UNCERTAIN, 0, 1)[..., None].astype(np.float32)
    colour = CALM + share * (ALARM - CALM)
    return np.asarray(((1 - share) * image[..., None] + share * colour).astype(np.uint8))


def planes(
    image: np.ndarray,
    grid: Grid,
    inside: np.ndarray,
    n: int,
    drawn: Drawn,
    second: np.ndarray | None = None,
) -> list[Plane]:
    """``n`` slices of each orientation, spread over the object ``inside``.

    ``image``, and ``second`` that can be laid over it, are (X, Y, Z) or with colours (X, Y, Z, 3).
    """
    return [
        Plane(
            name,
            tuple(
                _slice(image, grid, axis, index, drawn(axis, index), second)
                for index in positions(inside, axis, n)
            ),
        )
        for axis, name in enumerate(PLANES)
    ]


def _slice(
    image: np.ndarray,
    grid: Grid,
    axis: int,
    index: int,
    outlines: Iterable[Outline],
    second: np.ndarray | None = None,
) -> Slice:
    pixels = cut(image, axis, index)
    at = (np.array(grid.shape) - 1) / 2
    at[axis] = index
    mm = round(float(grid.to_world(at)[axis]))
    return Slice(
        f"{'xyz'[axis]} = {mm} mm",
        pixels.shape[1],
        pixels.shape[0],
        picture(pixels),
        tuple(outlines),
        picture(cut(second, axis, index)) if second is not None else "",
        MARKS[axis],
    )
