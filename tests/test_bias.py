"""Receive bias is found, removed and told; extreme voxels are clipped."""

import numpy as np
import pytest
from scipy import ndimage

from cadiff_cli.config import Config, StripConfig
from cadiff_cli.errors import DataError
from cadiff_cli.io.images import save_volume
from cadiff_cli.pipeline import strip_scan
from cadiff_cli.products import Scan
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.stages.bias import NATURAL, evened, factor, find_bias
from cadiff_cli.stages.strip import winsorized


def biased(volume, k):
    """Brighter by exp(k (0.8 x - 0.7 y^2 + 0.6 z)), x, y, z from -1 to 1 over the field of view."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in volume.data.shape), indexing="ij")
    field = np.exp(k * (0.8 * x - 0.7 * y**2 + 0.6 * z))
    return Volume((volume.data * field).astype(np.float32), volume.grid)


@pytest.fixture(scope="module")
def clean(phantom):
    """Three tissues that fold into one another all over the brain, as in a real one."""
    head = phantom("RAS", 2.0)
    rng = np.random.default_rng(0)
    folds = ndimage.gaussian_filter(rng.standard_normal(head.codes.shape), 2)
    folds /= folds.std()
    tissue = np.select([folds > 0.2, folds > -1], [100.0, 65.0], 20.0)
    tissue += 2 * rng.standard_normal(tissue.shape)
    return Volume(np.where(head.codes > 0, tissue, 0).astype(np.float32), head.t1.grid)


def corrected(volume):
    mask = Volume(volume.data > 0, volume.grid)
    bias = find_bias(volume, mask)
    return evened(volume, bias).data, bias


@pytest.mark.parametrize("k", [0.5, 1.5])
def test_a_bias_is_removed_but_for_what_is_natural_or_a_quarter(clean, k):
    inside = clean.data > 0
    found, bias = corrected(biased(clean, k))
    left = np.percentile(np.log(found[inside] / clean.data[inside]), [5, 95])
    before = np.log(biased(clean, k).data[inside] / clean.data[inside])
    low, high = np.percentile(before, [5, 95])
    assert high - low > np.log(NATURAL)
    assert np.diff(left) < max(np.log(NATURAL), (high - low) / 4)
    assert np.log(bias.ratio) == pytest.approx(high - low, rel=0.25)


def test_a_field_goes_on_beyond_its_grid():
    """A tilted scan reaches farther than the field that was found in its brain."""
    small = Grid((4, 4, 4), np.diag([12.0, 12, 12, 1]))
    wide = Grid((24, 24, 24), np.diag([2.0, 2, 2, 1])).crop((-10,) * 3, (44,) * 3)
    found = factor(Volume(np.full(small.shape, 0.5, np.float32), small), wide)
    np.testing.assert_allclose(found, np.exp(0.5), rtol=1e-4)


def test_a_natural_bias_is_left_alone(clean):
    found, bias = corrected(biased(clean, 0.1))
    assert bias.ratio < NATURAL
    assert np.array_equal(found, biased(clean, 0.1).data)


def test_a_strong_bias_is_told(clean):
    assert not corrected(clean)[1].notes
    assert "receive bias" in corrected(biased(clean, 2.5))[1].notes[0].text


def test_what_is_outside_the_brain_stays_zero(clean):
    found, _ = corrected(biased(clean, 1.5))
    assert (found[clean.data == 0] == 0).all()


@pytest.mark.parametrize(("n", "factor"), [(1, 1e4), (3, 1e6), (30, 1e2)])
def test_extreme_voxels_are_clipped_before_anything_else(clean, n, factor):
    hot, brain = clean.data.copy(), np.argwhere(clean.data > 0)
    where = tuple(brain[:: len(brain) // n][:n].T)
    hot[where] = factor * hot.max()
    found = winsorized(Volume(hot, clean.grid)).data
    same = np.ones(hot.shape, dtype=bool)
    same[where] = False
    assert np.array_equal(found[same], clean.data[same])
    assert found.max() < 3 * clean.data.max()


def test_an_image_of_two_values_stays_as_it_is(clean):
    flat = Volume((clean.data > 0).astype(np.float32), clean.grid)
    assert winsorized(flat) is flat


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_masks_over_nothing_or_next_to_nothing_are_refused(clean, tmp_path, value):
    data = clean.data.copy()
    mask = np.zeros(data.shape, dtype=np.uint8)
    where = (slice(0, 3),) * 3 if value else (slice(0, 30), slice(0, 10), slice(0, 30))
    mask[where], data[where] = 1, value
    path = tmp_path / "mask.nii.gz"
    save_volume(path, mask, clean.grid)
    scan = Scan(Volume(data, clean.grid), tmp_path / "sub-01_T1w.nii.gz")
    with pytest.raises(DataError, match=r"at least 0.02 l" if value else "dark everywhere"):
        strip_scan(scan, None, Config(strip=StripConfig(mask=path)), tmp_path)


def test_a_scan_without_extremes_is_not_copied(clean):
    assert winsorized(clean) is clean


def test_negative_extremes_are_clipped_too(clean):
    data = clean.data.copy()
    data[10, 10, 10] = -1e6
    assert winsorized(Volume(data, clean.grid)).data.min() > -2 * clean.data.max()


def test_the_stripped_image_is_corrected(clean, tmp_path):
    scan = Scan(biased(clean, 1.5), tmp_path / "sub-01_T1w.nii.gz")
    assert strip_scan(scan, None, Config(), tmp_path).bias_ratio > 2
