"""Runs that are killed again and again end as undisturbed ones do (``tools/kill_runs.py``)."""

import pytest
from bids_dataset import QUICK, write_dataset
from kill_runs import Trial, contents, difference

NAMES = ("sub-01", "sub-02_ses-a")
SEED = 6
"""Kills everything after four fifths of a run's time."""


@pytest.mark.slow
def test_a_kill_costs_nothing(phantom, tiny_weights, tmp_path):
    """Tables and label maps are those of an undisturbed run; late, when results are written."""
    dataset = tmp_path / "bids"
    for name, scale in zip(NAMES, (0.4, 0.41), strict=True):
        write_dataset(dataset, phantom("RAS", 1.0, scale=scale), [f"{name}_T1w"])
    quick = (*QUICK, "--registration", "none")
    arguments = (*quick, "--nprocs", 1, "--model", tiny_weights)
    trial = Trial(dataset, arguments, tmp_path, seed=SEED, names=NAMES)
    trial.kill(1)
    assert trial.findings == []
    assert sum(trial.killed.values()) == 1
    assert trial.completed >= 1


def test_half_a_file_is_noticed(tmp_path):
    """A check that finds nothing must be able to."""
    path = tmp_path / "sub-01" / "anat" / "sub-01_desc-x_y.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"a": 1')
    with pytest.raises(ValueError, match="delimiter"):
        contents(tmp_path)
    path.unlink()
    table = path.with_suffix(".tsv")
    table.write_text("a\tseconds\tb\n1\t9\t2\n")
    assert contents(tmp_path) == {"sub-01/anat/sub-01_desc-x_y.tsv": b"a\tb\n1\t2"}
    assert difference(b"a\tb\n1\t2\n", b"a\tb\n1\t3\n") == "b'2' became b'3'"
