"""A person of OpenNeuro's ds002748, skull-stripped, from raw BIDS to the group table."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from bids_dataset import cadiff
from conftest import my_cores

from cadiff_cli.io.bids.layout import finished

pytestmark = pytest.mark.slow


def test_from_raw_bids_to_the_group_table_in_one_command(released, shared, tmp_path):
    """One step, else default settings; a filter file, as fMRIPrep's, leaves out the others."""
    bids, home = shared("bids/ds002748"), shared("templateflow")
    out, filters = tmp_path / "out", tmp_path / "filters.json"
    filters.write_text('{"t1w": {"subject": ["60"]}}')
    done = cadiff(
        *("run", bids, out, "participant", "group", "--offline", "--steps", "1"),
        *("--output-spaces", "MNIColin27", "--bids-filter-file", filters),
        env={"TEMPLATEFLOW_HOME": str(home), "OMP_NUM_THREADS": str(my_cores())},
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr
    assert [result.entities for result in finished(out)] == ["sub-60"]
    with (out / "group_morph.tsv").open() as stream:
        (row,) = csv.DictReader(stream, delimiter="\t")
    assert row["participant_id"] == "sub-60"
    # An adult: what textbooks allow.
    assert 900e3 < float(row["brain_segmentation"]) < 1700e3
    for side in ("left", "right"):
        assert 2e3 < float(row[f"{side}_hippocampus"]) < 6e3
    assert float(row["registration_score"]) > 1.06
    links = json.loads((out / "dataset_description.json").read_text())["DatasetLinks"]
    assert "ds002748" in links["raw"]
    assert str(Path.home()) not in json.dumps(links)
    pytest.importorskip("bids_validator_deno")
    program = Path(sys.executable).with_name("bids-validator-deno")
    checked = subprocess.run([program, out], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
