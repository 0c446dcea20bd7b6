"""MR that somebody padded, and CT: both may have -1000 all round."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, rotate

from cadiff_cli.errors import UnsuitableError
from cadiff_cli.io.images import load_scan, save_volume
from cadiff_cli.notes import NoteCode, codes_of, texts
from cadiff_cli.spatial.grid import Grid, border_value
from cadiff_cli.stages.strip import stripped_brain

SHAPE = (64, 64, 64)
GRID = Grid(SHAPE, np.diag([3.5, 3.5, 3.5, 1.0]))
X, Y, Z = np.indices(SHAPE) - 31.5
RADIUS = np.sqrt(X**2 + (0.8 * Y) ** 2 + Z**2)


def tissues(air, skin, bone, brain, csf):
    """A head: what lies at which depth."""
    return np.select(
        [RADIUS < 6, RADIUS < 19, RADIUS < 21, RADIUS < 24], [csf, brain, bone, skin], air
    )


def noisy(data, sd, seed=0):
    return data + sd * np.random.default_rng(seed).standard_normal(SHAPE)


def mr(scale=1.0):
    """Magnitudes: nowhere below 0, with air that is nearly so."""
    return np.abs(noisy(scale * tissues(0, 900, 60, 500 + 2 * X, 150), scale * 8))


def ct():
    return noisy(gaussian_filter(tissues(-1000.0, -90, 900, 35, 8), 0.6), 12)


def bare(data, around, radius=19):
    return np.where(radius > RADIUS, data, around)


def within(data, pad, margin=6):
    """``data`` in a larger field of view."""
    inside = np.zeros(SHAPE, dtype=bool)
    inside[(slice(margin, -margin),) * 3] = True
    return np.where(inside, data, pad)


def turned(data, pad, order=1):
    return rotate(data, 20, reshape=False, order=order, cval=pad)


def read(tmp_path, data):
    path = tmp_path / "sub-01_T1w.nii.gz"
    save_volume(path, data.astype(np.float32), GRID)
    return load_scan(path)


CT = {
    "as scanned": lambda: ct(),
    "clipped": lambda: np.maximum(ct(), -1000).round(),
    "clipped at a window": lambda: np.clip(ct(), -1000, 300),
    "a circle in a square": lambda: np.where(np.hypot(X, Y) < 31, ct(), -3024),
    "clipped, a circle in a square": lambda: np.where(
        np.hypot(X, Y) < 31, np.maximum(ct(), -1024), -2000
    ),
    "turned": lambda: turned(ct(), -1024),
    "cut out": lambda: bare(ct(), -1024, radius=24),
    "a bare brain": lambda: bare(ct(), -1024, radius=17),
}


@pytest.mark.parametrize("kind", CT)
def test_a_ct_is_refused(tmp_path, kind):
    with pytest.raises(UnsuitableError, match="CT in Hounsfield units"):
        read(tmp_path, CT[kind]())


MR = {
    "all round": lambda pad: within(mr(), pad),
    "turned": lambda pad: turned(mr(), pad),
    "turned by splines": lambda pad: turned(mr(), pad, order=3),
    "small numbers": lambda pad: turned(mr(0.1), pad),
    "small numbers, all round": lambda pad: within(mr(0.1), pad),
}


@pytest.mark.parametrize("pad", [-1000, -32768, -1, 30000])
@pytest.mark.parametrize("kind", MR)
def test_padding_becomes_air(tmp_path, kind, pad):
    """The scan is what it would be, had its field of view been filled with air."""
    scan = read(tmp_path, MR[kind](pad))
    wanted = MR[kind](0)
    far = abs(pad) > 0.05 * np.quantile(wanted, 0.98)
    assert any(f"padding of {pad}: it was set to 0" in text for text in texts(scan.notes)) == far
    assert border_value(scan.t1.data) == pytest.approx(border_value(wanted), abs=1.01)
    # Edges of the padding hold mixtures.
    off = abs(np.maximum(scan.t1.data, 0) - np.maximum(wanted, 0)) > 1.01
    assert off.mean() < 0.02
    assert not off[RADIUS < 24].any()
    assert (
        not far
        or pad > 0
        or scan.t1.data.min() > min(wanted.min(), -0.06 * np.quantile(wanted, 0.98))
    )


def test_without_padding_nothing_changes(tmp_path):
    rng = np.random.default_rng(0)
    for data in (mr(), bare(mr(), 0), within(mr(), 0), rng.uniform(-2048, 2048, SHAPE)):
        scan = read(tmp_path, data)
        np.testing.assert_array_equal(scan.t1.data, data.astype(np.float32))
        assert NoteCode.PADDING not in codes_of(scan.notes)


@pytest.mark.parametrize("scale", [1.0, 0.2, None])
def test_a_bare_brain_far_above_its_background_stays_one(tmp_path, scale):
    """Also of few grey values, or z-scored (None)."""
    brain = mr(scale or 1.0)
    if scale is None:
        brain = (brain - brain[RADIUS < 19].mean()) / brain[RADIUS < 19].std()
    scan = read(tmp_path, bare(brain, -1000))
    found = stripped_brain(scan.t1)
    np.testing.assert_array_equal(found.data, RADIUS < 19)
    np.testing.assert_allclose(scan.t1.data[found.data], brain[found.data], rtol=1e-6)
