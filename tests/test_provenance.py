"""Provenance is read back as it was written, and out of sidecars that somebody has edited."""

import json
from pathlib import Path

import pytest

from cadiff_cli.config import Config, OutputConfig, Recipe
from cadiff_cli.errors import DataError
from cadiff_cli.io.provenance import Provenance, UsedTemplate, told
from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.products import Person

CONFIG = Config(output=OutputConfig(spaces=("MNI152NLin2009cAsym",)))
RECIPE = Recipe(CONFIG, "MNIColin27", "cadiff-malc", "0" * 64)
MADE = Provenance(
    fingerprint=RECIPE.fingerprint,
    settings=RECIPE.settings(),
    version="1.0",
    packages={"torch": "2"},
    model="cadiff-malc",
    weights_sha256="0" * 64,
    steps=5,
    seed=1,
    tile=64,
    device="cpu",
    precision="float32",
    registration_threads=1,
    templates=(
        UsedTemplate("MNIColin27", "fast", "templateflow", 1.2),
        UsedTemplate("MNI152NLin2009aSym", "affine", "nilearn package data", None, in_field=False),
    ),
    skull_stripping="net",
    bias_ratio=1.1,
    person=Person(30.0, "F"),
    source="bids:raw:sub-01/anat/sub-01_T1w.nii.gz",
    source_sha256="1" * 64,
    seconds={"strip": 2.5},
    expected_dice={"Calibrated": False},
    notes=(Note(NoteCode.COARSE_VOXELS, "coarse voxels"),),
    run_id="20261129-051500_0",
)


def stored(made=MADE):
    """Its sidecar, as JSON gives it back."""
    return json.loads(json.dumps(made.sidecar()))


def test_what_is_written_is_read():
    assert Provenance.read(stored()) == MADE
    read = Provenance.read(stored())
    read.check()
    assert (read.samples, read.flip) == (1, True)
    assert read.output_spaces == CONFIG.output.spaces
    assert read.differs(RECIPE) == ""
    assert read.registration_score == 1.2
    assert read.is_registered
    assert not read.has_own_mask


def test_nobodys_home_is_told():
    note = Note(NoteCode.COARSE_VOXELS, f"no {Path.home()}/scratch/found_Composite.h5")
    assert told([note])["Warnings"] == ["no ~/scratch/found_Composite.h5"]


@pytest.mark.parametrize("key", sorted(stored()))
@pytest.mark.parametrize("value", ["absent", None, 3, "text", [], [3], {}, {"sample": 3}])
def test_reading_takes_whatever_people_leave_in_a_sidecar(key, value):
    """An entry that is lost or nonsense costs that entry alone."""
    sidecar = {**stored(), key: value}
    if value == "absent":
        del sidecar[key]
    read = Provenance.read(sidecar)
    if key == "Fingerprint":
        assert (read is None) == (value != "text")
        return
    assert read.fingerprint == MADE.fingerprint
    assert read.differs(RECIPE) == ""
    assert read.samples == 1
    if key not in ("GeneratedBy", "Model", "Templates"):
        assert all(gap == key for gap in read.gaps)
    Provenance.read(read.sidecar())


@pytest.mark.parametrize(
    ("key", "gap"),
    [
        ("Steps", "Steps"),
        ("Model", "Model.Name"),
        ("GeneratedBy", "GeneratedBy.Version"),
        ("Templates", "Templates"),
        ("Settings", "Settings"),
    ],
)
def test_a_value_that_is_not_known_is_not_stated(key, gap):
    sidecar = stored()
    del sidecar[key]
    with pytest.raises(DataError, match=gap):
        Provenance.read(sidecar).check()


def test_older_results_are_read():
    """Later versions have added entries; results without them are finished all the same."""
    sidecar = stored()
    for key in ("AgeYears", "BiasRatio", "ExpectedDice", "RunId", "Tile", "Precision"):
        del sidecar[key]
    assert Provenance.read(sidecar).gaps == ()


def test_another_programs_sidecar_is_none():
    assert Provenance.read({}) is None
    assert Provenance.read({"GeneratedBy": [{"Name": "fMRIPrep"}]}) is None
