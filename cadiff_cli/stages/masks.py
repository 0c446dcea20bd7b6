"""Tidy brain masks, and judge them without a reference."""

import numpy as np
from scipy import ndimage

from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.products import MaskQuality
from cadiff_cli.spatial.grid import Volume, faces
from cadiff_cli.spatial.resample import bounding_box, resample, resample_mask

SPACING_MM = 2.0
LEAST_SHARE = 0.9
LEAST_SYMMETRY = 0.85
"""It was at least 0.92 in 26 stripped scans and 48 masks of heads (manual, and from DLMUSE)."""
MOST_AT_EDGE = 0.03
"""A brain of 6 dm2 that is cut 5 mm below its top has 4 % of its border there; one in a tight box
touches each face with 2 %."""
MOST_SKULL_AT_EDGE = 0.08
"""About 1 % of the volume of an inner skull of 1.75 l is missing where so much is cut."""
MOST_IN_AIR = 0.01
"""In 48 whole heads no voxel of the brain (manual, and from DLMUSE) lay outside ``find_head``."""
AIR = 0.1
"""Threshold of a head: this share of the way from the 2nd to the 98th percentile of intensities
(Smith 2002, BET)."""
NECK_MM = 2.5
"""Half the width of a passage out of the cranium that is too narrow to belong to it."""
SPUR_MM = 2.0
"""How far what lies behind such a passage still counts, as borders at the bone are rough."""
TILT_DEG = 45.0
"""Largest angle between a head and the axes that its header names."""


def doubts(quality: MaskQuality) -> tuple[Note, ...]:
    """Notes on the suspicious properties of a mask."""
    notes = []
    if quality.largest_share < LEAST_SHARE:
        text = f"the brain fell into pieces (the largest holds {quality.largest_share:.0%})"
        notes.append(Note(NoteCode.MASK_PIECES, text))
    if quality.symmetry < LEAST_SYMMETRY:
        text = f"the brain mask is lopsided (symmetry {quality.symmetry:.2f})"
        notes.append(Note(NoteCode.MASK_SYMMETRY, text))
    if quality.at_edge > MOST_AT_EDGE:
        text = f"the field of view cuts the brain ({quality.at_edge:.0%} of the mask's border)"
        notes.append(Note(NoteCode.MASK_AT_EDGE, text))
    if quality.in_air is not None and quality.in_air > MOST_IN_AIR:
        text = f"{quality.in_air:.0%} of the brain mask lie outside the head"
        notes.append(Note(NoteCode.MASK_IN_AIR, text))
    return tuple(notes)


def skull_doubts(held: Volume) -> tuple[Note, ...]:
    """Notes on what the inner skull holds (bool): it is too small where the scan does not show it.

    The brain may lie within the field of view still.
    """
    grid = held.grid.working(SPACING_MM, tolerance=0.0)
    share = _at_edge(resample_mask(held, grid).data)
    if share <= MOST_SKULL_AT_EDGE:
        return ()
    text = f"the field of view cuts the skull ({share:.0%} of the inner skull's surface)"
    return (Note(NoteCode.SKULL_AT_EDGE, f"{text}: the intracranial volume is too small"),)


def tidy(mask: np.ndarray, least: float = 1.0) -> np.ndarray:
    """Keep components of at least this share of the largest; fill holes: ventricles are brain."""
    out, box = np.zeros(mask.shape, dtype=bool), bounding_box(mask)
    parts, n = ndimage.label(mask[box])
    if n > 1:
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        keep = sizes >= least * sizes.max()
        parts = keep[parts]
    out[box] = filled(parts > 0)
    return out


def filled(mask: np.ndarray) -> np.ndarray:
    """Fill holes: what is not connected to the faces of the image."""
    outside, _ = ndimage.label(np.pad(~mask, 1, constant_values=True))
    return np.asarray(outside[(slice(1, -1),) * 3] != outside[0, 0, 0])


def closing(mask: np.ndarray, spacing_mm: np.ndarray, radius_mm: float) -> np.ndarray:
    """Close a mask (X, Y, Z) bool, which is not empty, with a ball; fill its holes."""
    width = np.ceil(radius_mm / spacing_mm).astype(int) + 1
    padded = np.pad(mask, [(n, n) for n in width])
    near = ndimage.distance_transform_edt(~padded, sampling=spacing_mm) <= radius_mm
    kept = ndimage.distance_transform_edt(near, sampling=spacing_mm) > radius_mm
    return filled(kept | padded)[tuple(slice(n, -n) for n in width)]


def without_threads(mask: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """The largest piece of a mask (X, Y, Z) bool, without what hangs on it by a narrow passage.

    A passage is narrow below twice ``NECK_MM``; the first ``SPUR_MM`` behind it stay.  So end the
    fluid of the cranium, and leaks of a mask of it: at the spinal canal, the optic nerves, vessels.
    """
    out, box = np.zeros(mask.shape, dtype=bool), bounding_box(mask, margin=1)
    # Beyond the image the mask goes on: its face is no border.
    padded = np.pad(mask[box], 1, mode="edge")
    wide = tidy(ndimage.distance_transform_edt(padded, sampling=spacing_mm) > NECK_MM)
    near = ndimage.distance_transform_edt(~wide, sampling=spacing_mm) <= NECK_MM + SPUR_MM
    out[box] = tidy(padded & near)[1:-1, 1:-1, 1:-1]
    return out


def find_brain(stripped: Volume, least: float) -> Volume:
    """Find the brain of a stripped scan (both bool), at 2 mm: without specks, holes filled."""
    grid = stripped.grid.working(SPACING_MM, tolerance=0.0)
    return Volume(tidy(resample_mask(stripped, grid).data, least), grid)


def find_head(t1: Volume) -> Volume:
    """Find a whole head (bool), at 2 mm: voxels brighter than air, and everything they enclose."""
    grid = t1.grid.working(SPACING_MM, tolerance=0.0)
    smooth = ndimage.uniform_filter(resample(t1, grid).data.astype(np.float32), 3)
    low, high = np.percentile(smooth, [2, 98])
    reach = 2
    closed = ndimage.binary_closing(
        np.pad(smooth > low + AIR * (high - low), reach), iterations=reach
    )
    inner = (slice(reach, -reach),) * 3
    return Volume(filled(closed[inner]), grid)


def judge_mask(mask: Volume, inside_of: Volume | None = None) -> MaskQuality:
    """Judge a bool mask on any grid; it is examined in RAS axes at 2 mm.

    ``inside_of`` (bool, any grid) is the object that should contain it: the head, if it is known.
    """
    grid = mask.grid.working(SPACING_MM, tolerance=0.0)
    inside = resample_mask(mask, grid).data
    parts, n = ndimage.label(inside)
    if n == 0:
        return MaskQuality(0.0, 0.0, 0.0)
    sizes = np.bincount(parts.ravel())[1:]
    largest = parts == 1 + np.argmax(sizes)
    air = None
    if inside_of is not None:
        outer = resample_mask(inside_of, grid).data
        air = round(float(np.count_nonzero(inside & ~outer) / np.count_nonzero(inside)), 4)
    return MaskQuality(
        round(float(sizes.max() / sizes.sum()), 4),
        round(_symmetry(largest), 4),
        round(_at_edge(largest), 4),
        air,
    )


def _at_edge(mask: np.ndarray) -> float:
    """Share of a mask's border that lies in the face of the image that cuts it most."""
    border = np.count_nonzero(mask & ~ndimage.binary_erosion(mask, border_value=1))
    edge = max(int(face.sum()) for face in faces(mask))
    return edge / max(edge + int(border), 1)


def _symmetry(mask: np.ndarray) -> float:
    """Dice of a mask (RAS axes) with its mirror image in the best plane between left and right.

    Planes go through the mask's centre.  Front and back, or top and bottom, are not compared: half
    a brain would look symmetric.
    """
    points = np.argwhere(mask).astype(np.float64)
    if len(points) < 100:
        return 0.0
    centre = points.mean(axis=0)
    points = np.ascontiguousarray((points[:: 1 + len(points) // 20_000] - centre).T)

    def overlap(angles: tuple[float, float]) -> float:
        yaw, roll = np.deg2rad(angles)
        normal = np.array([1.0, np.tan(yaw), np.tan(roll)])
        normal /= np.linalg.norm(normal)
        beyond = 2 * (normal @ points)
        i, j, k = (
            np.rint(p - beyond * along + c).astype(int)
            for p, along, c in zip(points, normal, centre, strict=True)
        )
        valid = (i >= 0) & (j >= 0) & (k >= 0)
        for index, size in zip((i, j, k), mask.shape, strict=True):
            valid &= index < size
        return float(mask[i[valid], j[valid], k[valid]].sum()) / len(i)

    best = (0.0, 0.0)
    for reach, steps in ((TILT_DEG, 9), (TILT_DEG / 4, 5), (TILT_DEG / 16, 5)):
        near = np.linspace(-reach, reach, steps)
        best = max(((best[0] + y, best[1] + r) for y in near for r in near), key=overlap)
    return overlap(best)
