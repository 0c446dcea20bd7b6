"""What is said of a mask without knowing the truth."""

import numpy as np
import pytest
from scipy import ndimage

from cadiff_cli.notes import NoteCode, codes_of
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.stages.masks import doubts, judge_mask, skull_doubts, without_threads

SIZE = 96


def body(*parts, spacing=2.0):
    """A mask of ellipsoids: (centre, radii) in mm from the middle of the image."""
    mm = spacing * (np.indices((SIZE,) * 3) - SIZE / 2)
    inside = np.zeros((SIZE,) * 3, dtype=bool)
    for centre, radii in parts:
        at = (mm - np.reshape(centre, (3, 1, 1, 1))) / np.reshape(radii, (3, 1, 1, 1))
        inside |= (at**2).sum(axis=0) < 1
    return inside


def judged(inside, spacing=2.0):
    return judge_mask(Volume(inside, Grid(inside.shape, np.diag([spacing] * 3 + [1.0]))))


BRAIN = body(((0, 0, 0), (66, 84, 60)), ((0, -40, -40), (48, 30, 28)))
"""Left and right alike; front and back, top and bottom not."""


def test_a_brain_is_not_suspicious():
    quality = judged(BRAIN)
    assert not doubts(quality)
    assert quality.largest_share == 1
    assert quality.symmetry > 0.97
    assert quality.at_edge == 0


@pytest.mark.parametrize("axes", [(0, 1), (0, 2)])
@pytest.mark.parametrize("degrees", [-40, -17, 25])
def test_a_turned_head_is_as_symmetric(axes, degrees):
    turned = ndimage.rotate(BRAIN.astype(np.float32), degrees, axes, reshape=False, order=1) > 0.5
    assert judged(turned).symmetry > 0.95


def test_a_missing_hemisphere_is_lopsided():
    """Though it is symmetric enough from top to bottom."""
    half = BRAIN.copy()
    half[SIZE // 2 :] = False
    assert NoteCode.MASK_SYMMETRY in codes_of(doubts(judged(half)))


def test_a_missing_piece_of_a_side_is_lopsided():
    bitten = BRAIN.copy()
    bitten[: SIZE // 2, : SIZE // 2] = False
    assert NoteCode.MASK_SYMMETRY in codes_of(doubts(judged(bitten)))


@pytest.mark.parametrize(("axis", "low"), [(0, True), (1, False), (2, False)])
def test_a_skull_that_the_field_of_view_cuts_is_said(axis, low):
    """By 16 mm; one that ends just within it, or 2 mm outside, is not."""
    grid = Grid(BRAIN.shape, np.diag([2.0] * 3 + [1.0]))
    inside = np.flatnonzero(BRAIN.any(axis=tuple({0, 1, 2} - {axis})))
    for cut, codes in ((-1, []), (1, []), (8, [NoteCode.SKULL_AT_EDGE])):
        start, stop = (inside[0] + cut, SIZE) if low else (0, inside[-1] + 1 - cut)
        shape, corner = list(BRAIN.shape), [0, 0, 0]
        shape[axis], corner[axis] = stop - start, start
        part = np.moveaxis(np.moveaxis(BRAIN, axis, 0)[start:stop], 0, axis)
        held = Volume(part, grid.crop(tuple(corner), tuple(shape)))
        assert [note.code for note in skull_doubts(held)] == codes


def test_pieces_are_said():
    pieces = body(((-60, 0, 0), (40, 40, 40)), ((60, 0, 0), (34, 34, 34)))
    assert NoteCode.MASK_PIECES in codes_of(doubts(judged(pieces)))


def test_a_cut_is_said():
    assert NoteCode.MASK_AT_EDGE in codes_of(doubts(judged(BRAIN[:, :, 40:])))


def test_a_box_that_just_holds_the_brain_does_not_cut_it():
    low, high = (f(np.argwhere(BRAIN), axis=0) for f in (np.min, np.max))
    box = BRAIN[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))]
    assert not doubts(judged(box))


def test_orientation_and_spacing_do_not_matter():
    wanted = judged(BRAIN)
    flipped = Grid(BRAIN.shape, np.diag([-2.0, -2.0, 2.0, 1.0]))
    seen = judge_mask(Volume(BRAIN[::-1, ::-1], flipped))
    assert seen.symmetry == pytest.approx(wanted.symmetry, abs=0.01)
    fine = np.repeat(np.repeat(np.repeat(BRAIN, 2, 0), 2, 1), 2, 2)
    assert judged(fine, 1.0).symmetry == pytest.approx(wanted.symmetry, abs=0.02)


def test_nothing_is_judged_as_nothing():
    assert judged(np.zeros((8, 8, 8), dtype=bool)).largest_share == 0


@pytest.mark.parametrize("spacing_mm", [1.0, 0.8])
def test_what_hangs_by_a_thread_is_cut(spacing_mm):
    """A ball stays as it is, so does one at a face; what lies behind a narrow passage goes."""
    ijk = np.indices((80, 60, 60))
    ball = ((ijk - np.array((20, 30, 30))[:, None, None, None]) ** 2).sum(axis=0) < 20**2
    spacing = np.full(3, spacing_mm)
    assert np.array_equal(without_threads(ball, spacing), ball)
    face = ball[10:]
    assert np.array_equal(without_threads(face, spacing), face)
    beyond = ball.copy()
    beyond[38:60, 29:32, 29:32] = True  # a passage of 3 voxels to a bulb of 12
    beyond[60:72, 24:36, 24:36] = True
    cut = without_threads(beyond, spacing)
    assert not cut[60:].any()
    assert np.count_nonzero(cut ^ ball) < 9 * 8
    sheet = ball.copy()
    sheet[20:70, 46:50, 20:40] = True  # as high as the ball: it ends the mask's box, not the image
    assert not without_threads(sheet, spacing)[50:].any()
    wide = ball.copy()
    wide[30:70, 22:38, 22:38] = True
    assert np.count_nonzero(wide & ~without_threads(wide, spacing)) < 0.01 * wide.sum()
