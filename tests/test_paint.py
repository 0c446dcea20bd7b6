"""Brains painted from label maps: T1-like, stripped, symmetric, and trained on as scans are."""

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import ndimage

from cadiff_cli.cli.paint import command
from cadiff_cli.errors import DataError, MissingInputError, OutputError
from cadiff_cli.io.bids.labelled import labelled_scans, load_labelled
from cadiff_cli.io.images import load_scan, save_volume
from cadiff_cli.labels.schemes import load_scheme
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.stages.strip import stripped_brain
from cadiff_cli.training import paint
from cadiff_cli.training.brain_mask.target import closed, is_brain
from cadiff_cli.training.paint import (
    T1_BRIGHTNESS,
    UNLIKE_THEIR_STRUCTURE,
    paint_t1,
    tissues,
)
from cadiff_cli.training.segmenter.config import load
from cadiff_cli.training.segmenter.patches import AugmentConfig


@pytest.fixture(scope="module")
def label_map(phantom):
    """The phantom's codes with a skull (507) around them and CSF (24) between."""
    head = phantom("RAS", 2.0)
    brain = is_brain(head.codes)
    fluid = closed(brain, np.full(3, 2.0), 5.0)
    skull = ndimage.binary_dilation(fluid, iterations=4)
    codes = np.where(brain, head.codes, np.where(fluid, 24, np.where(skull, 507, 0)))
    return Volume(codes.astype(np.int16), head.t1.grid)


def drawn(seed=0):
    return np.random.default_rng(seed)


def inner_means(t1, labels, least=30):
    """Mean brightness of structures, a voxel away from their borders."""
    found = {}
    for code in np.unique(labels.data)[1:]:
        inner = ndimage.binary_erosion(labels.data == code)
        if inner.sum() >= least:
            found[int(code)] = float(t1.data[inner].mean())
    return found


def test_a_painted_brain_is_stripped_and_labelled_where_it_is_brain(label_map):
    t1, labels = paint_t1(label_map, drawn())
    codes = label_map.data
    mask = closed(is_brain(codes), label_map.grid.spacing_mm)
    assert np.array_equal(t1.data > 0, mask)
    assert t1.grid is labels.grid is label_map.grid
    brain = is_brain(codes)
    assert np.array_equal(labels.data[brain], codes[brain])
    assert not np.isin(labels.data, codes[codes >= 500]).any()
    assert not labels.data[~mask].any()


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "oblique"])
def test_what_was_painted_is_recognised_as_stripped(phantom, orientation):
    """Training relies on it: else a network would look for the brain."""
    head = phantom(orientation, (1.5, 1.5, 3.0))
    t1, _ = paint_t1(Volume(head.codes, head.t1.grid), drawn())
    found = stripped_brain(t1)
    assert found is not None
    assert np.array_equal(found.data, t1.data > 0)


def test_tissues_are_as_bright_as_in_a_t1(label_map):
    found, tissue = inner_means(*paint_t1(label_map, drawn())), tissues()
    assert len(found) > 5
    for code, mean in found.items():
        # What a person's tissue is off by, and what the borders' blur reaches.
        assert mean == pytest.approx(1000 * T1_BRIGHTNESS[tissue[code]], abs=80), code


def test_left_and_right_are_painted_alike(label_map, parcellation, monkeypatch):
    monkeypatch.setattr(paint, "BETWEEN_PEOPLE", 0.2)  # sides of their own could not be missed
    found = inner_means(*paint_t1(label_map, drawn()))
    pairs = [(s.code, s.mirror) for s in parcellation.structures if s.code < s.mirror]
    pairs = [(a, b) for a, b in pairs if a in found and b in found]
    assert len(pairs) > 3
    for a, b in pairs:
        assert found[a] == pytest.approx(found[b], abs=25)
    again, other = (inner_means(*paint_t1(label_map, drawn(seed))) for seed in (0, 1))
    assert again == found
    assert other != found


def test_texture_does_not_depend_on_the_voxels(phantom):
    def spread(spacing):
        head = phantom("RAS", spacing)
        t1, labels = paint_t1(Volume(head.codes, head.t1.grid), drawn())
        return t1.data[ndimage.binary_erosion(labels.data == 2, iterations=2)].std()

    assert spread(1.5) == pytest.approx(spread(2.5), rel=0.35)


def test_every_code_that_training_knows_is_painted_as_its_structure(parcellation):
    """But those that are named, and alike on both sides."""
    tissue, mapping = tissues(), load_scheme("synthseg", parcellation)
    assert set(mapping) <= set(tissue)
    assert set(tissue.values()) <= set(T1_BRIGHTNESS)
    for code, k in mapping.items():
        structure = int(parcellation.codes[abs(k)])
        if code not in UNLIKE_THEIR_STRUCTURE:
            assert tissue[code] == min(structure, parcellation.structures[abs(k) - 1].mirror)
    assert tissue[1001] == tissue[2035] == tissue[3]
    assert tissue[5001] == tissue[251] == tissue[2]


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        (lambda c: np.full_like(c, 507), "0.000 l"),
        (lambda c: is_brain(c).astype(np.int16), r"no structures \[1\]"),
    ],
)
def test_what_is_no_brain_of_freesurfers_is_refused(label_map, codes, said):
    with pytest.raises(DataError, match=said):
        paint_t1(Volume(codes(label_map.data), label_map.grid), drawn())


def test_painted_scans_are_pairs_to_train_on(label_map, parcellation, tmp_path):
    maps, out = tmp_path / "maps", tmp_path / "out"
    for name, kind in (("seg_01", np.float32), ("seg_02", np.int16)):
        save_volume(maps / f"{name}.nii.gz", label_map.data.astype(kind), label_map.grid)
    done = CliRunner().invoke(command, [str(maps), "-o", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    scans = labelled_scans(out)
    assert done.output.splitlines() == [str(scan.t1) for scan in scans]
    assert [scan.subject for scan in scans] == ["seg01", "seg02"]
    loaded, classes = load_labelled(scans[0], parcellation, load_scheme("synthseg", parcellation))
    assert set(parcellation.codes[np.unique(classes.data)]) >= {0, 2, 3, 4, 41, 42, 43}
    assert loaded.t1.grid.shape == classes.grid.shape
    first, second = (load_scan(scan.t1).t1.data for scan in scans)
    assert not np.array_equal(first, second)  # two people, though of one shape


def test_what_cannot_be_painted_is_said_before_anything_is_written(label_map, tmp_path):
    maps, out = tmp_path / "maps", tmp_path / "out"

    def refused(error, said, into=out):
        with pytest.raises(error, match=said):
            CliRunner().invoke(command, [str(maps), "-o", str(into)], catch_exceptions=False)
        assert not out.exists()

    refused(MissingInputError, "no folder")
    maps.mkdir()
    refused(DataError, "no label maps")
    save_volume(maps / "seg_1.nii", label_map.data, label_map.grid)
    refused(OutputError, "not empty", into=maps)
    save_volume(maps / "seg-1.nii", label_map.data, label_map.grid)  # one BIDS label
    refused(DataError, "seg_1.nii and seg-1.nii would be sub-seg1")
    (maps / "seg-1.nii").rename(maps / "__.nii")
    refused(DataError, "__.nii would be sub-")
    (maps / "__.nii").unlink()
    save_volume(maps / "seg_2.nii", 0.5 * label_map.data, label_map.grid)
    refused(DataError, "seg_2.nii holds")
    save_volume(maps / "seg_2.nii", np.full_like(label_map.data, 507), label_map.grid)
    refused(DataError, "seg_2.nii: 0.000 l")


def test_synthseg_codes_join_the_structures_that_they_lie_in(parcellation):
    mapping = load_scheme("synthseg", parcellation)
    freesurfer = load_scheme("freesurfer", parcellation)
    assert {code: mapping[code] for code in freesurfer} == freesurfer
    within = {25: 2, 57: 41, 136: 4, 163: 43, 137: 5, 164: 44}
    assert {code: int(parcellation.codes[mapping[code]]) for code in within} == within


def test_every_patch_of_synth_gets_a_new_contrast():
    """Unless the share is asked for."""
    synthesis, usual = load("synth").train.augment.synthesis, AugmentConfig().synthesis
    assert synthesis.share == 1
    assert synthesis.random + synthesis.curve > usual.random + usual.curve
    assert load("synth", synthetic=0.25).train.augment.synthesis.share == 0.25
