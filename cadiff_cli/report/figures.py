"""Slices of a scan with vector outlines over them: sharp on any screen, and quick to draw.

A plane is the axis it is perpendicular to.  Images are drawn with superior or anterior up and the
patient's left on the left; volumes are on grids with RAS axes.  No page needs
more than contourpy and Pillow for them.
"""

import base64
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from scipy import ndimage

from cadiff_cli.labels.parcellation import Parcellation, Structure
from cadiff_cli.report.case import Views, around
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
"""Uncertainty shown in the full colour; a border between two equal structures of 40 has
0.19."""
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
    return np.asarray(np.moveaxis(data, axis, 0)[index].swapaxes(0, 1)[::-1])


def picture(pixels: np.ndarray) -> str:
    """A data URI of (rows, columns) or (rows, columns, 3) uint8."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "WEBP", quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def outline(values: np.ndarray, *levels: float) -> str:
    """The iso-lines (of 0.5, if no other levels are given) of an image as an SVG path.

    In quarters of a pixel; there are none where values are NaN.
    """
    import contourpy

    levels = levels or (0.5,)
    known = np.isfinite(values)
    rows, columns = np.nonzero(known & (values > min(levels)))
    if not len(rows):
        return ""
    # Only the part that holds the iso-lines, with a rim, so that lines close.
    top, left = max(rows.min() - 1, 0), max(columns.min() - 1, 0)
    box = (slice(top, rows.max() + 2), slice(left, columns.max() + 2))
    part = values[box].astype(np.float32)
    if min(part.shape) < 2:
        return ""
    centre = np.array([left + 0.5, top + 0.5])
    masked: Any = np.ma  # untyped
    z = part if known[box].all() else masked.array(part, mask=~known[box])
    lines = contourpy.contour_generator(z=z)
    return "".join(_path(np.asarray(x) + centre) for level in levels for x in lines.lines(level))


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


def parcels(views: Views, parcellation: Parcellation | None, n: int = SLICES) -> list[Plane]:
    """Outlines of the parcels of the cortex over the scan."""
    if views.parcels is None or parcellation is None:
        return []
    inner = [s.code for s in parcellation.structures if s.is_part]
    shown = np.where(np.isin(views.parcels.data, inner), views.parcels.data, 0)
    return structures(replace(views, labels=Volume(shown, views.parcels.grid)), parcellation, n)


def structures(views: Views, parcellation: Parcellation, n: int = SLICES) -> list[Plane]:
    """Outlines of all structures over the scan."""
    labels = resample(views.labels, views.near, order=0).data
    image = grey(views.scan, views.brain)
    shown = labels > 0 if labels.any() else views.brain
    return planes(image, views.near, shown, n, outlined(labels, parcellation))


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


def head(views: Views, n: int = 2) -> list[Plane]:
    """Outlines of brain mask and inner skull over the whole scan, without the air around it."""
    image = grey(views.t1, views.mask.data)
    grid = around(Volume((image > AIR) | views.mask.data, views.mask.grid))
    image = resample(Volume(image, views.t1.grid), grid, order=0).data
    brain = resample(views.mask, grid).data
    skull = resample(views.intracranial, grid).data if views.intracranial else None

    def drawn(axis: int, index: int) -> Iterable[Outline]:
        yield Outline("brain mask", "#ffd43b", outline(cut(brain, axis, index)))
        if skull is not None:
            yield Outline("inner skull", "#66d9e8", outline(cut(skull, axis, index)))

    return planes(image, grid, brain, n, drawn)


def registration(views: Views, n: int = 2) -> list[Plane]:
    """Edges of the carried template over the scan; the second image is the template itself."""
    if views.template is None:
        return []
    template = views.template.data
    mask = template > 0
    other = grey(views.template, mask)
    smooth = ndimage.gaussian_filter(template, 0.7)
    top = float(np.percentile(smooth[mask], 98)) if mask.any() else 1.0

    def drawn(axis: int, index: int) -> Iterable[Outline]:
        for level, color in zip(TISSUES, ("#ffd43b", "#66d9e8"), strict=True):
            yield Outline("template", color, outline(cut(smooth, axis, index), level * top))

    return planes(grey(views.scan), views.near, views.brain, n, drawn, partial(cut, other))


def coordinates(views: Views, n: int = 2) -> list[Plane]:
    """The field as colours, under lines of equal coordinate at every twentieth of the extents."""
    field = views.coordinates
    if field is None:
        return []
    image = grey(views.scan)
    levels = np.arange(FIELD_STEP, 1, FIELD_STEP)
    channels = [Volume(x, field.grid) for x in field.data]

    def values(axis: int, index: int) -> np.ndarray:
        """(3, rows, columns) of the field, which is NaN outside the brain."""
        start, shape = [0, 0, 0], list(views.near.shape)
        start[axis], shape[axis] = index, 1
        grid = views.near.crop(tuple(start), tuple(shape))
        found = [cut(resample(x, grid, fill=np.nan).data, axis, 0) for x in channels]
        return np.where(cut(views.brain, axis, index), np.stack(found), np.nan)

    def drawn(axis: int, index: int) -> Iterable[Outline]:
        for channel, x in enumerate(values(axis, index)):
            if channel != axis:
                yield Outline("xyz"[channel], COLOURS[channel], outline(x, *levels))

    def second(axis: int, index: int) -> np.ndarray:
        pixels, inside = cut(image, axis, index), cut(views.brain, axis, index)
        return tinted(pixels, values(axis, index), inside)

    return planes(image, views.near, views.brain, n, drawn, second)


def tinted(image: np.ndarray, field: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(..., 3) uint8: a grey image; inside the brain tinted red by x, green by y and blue by z.

    ``field`` (3, ...) holds fractions of the template's extents.
    """
    share = np.where(inside, TINT, 0.0)[..., None].astype(np.float32)
    colour = 255 * np.clip(np.nan_to_num(np.moveaxis(field, 0, -1)), 0, 1)
    return np.asarray(((1 - share) * image[..., None] + share * colour).astype(np.uint8))


def uncertainty(views: Views, n: int = 2) -> list[Plane]:
    """The uncertainty of the labels, glowing over the scan."""
    if views.uncertainty is None:
        return []
    glowing = glow(grey(views.scan, views.brain), views.uncertainty.data)
    return planes(glowing, views.near, views.brain, n, lambda _axis, _index: ())


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
    second: Callable[[int, int], np.ndarray] | None = None,
) -> list[Plane]:
    """``n`` slices of each orientation, spread over the object ``inside``.

    ``image`` is (X, Y, Z) or with colours (X, Y, Z, 3); ``second`` gives the pixels of a slice
    (axis, index) that can be laid over it.
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
    second: Callable[[int, int], np.ndarray] | None = None,
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
        picture(second(axis, index)) if second is not None else "",
        MARKS[axis],
    )
