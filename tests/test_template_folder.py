"""A template that is on no list, from its folder to results, pages and methods text."""

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bids_dataset import QUICK, cadiff, here, write_dataset

from cadiff_cli.io.bids.layout import finished
from cadiff_cli.io.files import read_json
from cadiff_cli.io.images import save_volume
from cadiff_cli.io.templates import load_template
from cadiff_cli.report.case import read_views

ABOUT = {
    "Name": "Toy heads {of} children",
    "Authors": ["Doe J", "Roe, Richard"],
    "ReferencesAndLinks": ["https://doi.org/10.1/toys", "https://example.org"],
    "Frame": {"OriginMm": [12, -9, 7], "LowMm": [-36, -48, -32], "HighMm": [36, 36, 40]},
}
OTHERS = ("--offline", *QUICK[3:])
"""As ``QUICK``, but for the template."""


def write_template(folder, head, begin, about=None):
    """A stripped head as a template's folder."""
    folder.mkdir(parents=True)
    save_volume(folder / f"{begin}_T1w.nii.gz", head.t1.data, head.t1.grid)
    if about:
        (folder / "template_description.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def toy(phantom, tmp_path_factory):
    """A cohort's folder in a place with signs of ours in its path."""
    place = tmp_path_factory.mktemp("a+b:c") / "tpl-toy" / "cohort-2"
    head = phantom("LPS", 1.0, scale=0.4, shift_mm=(12, -9, 7), noise=2.0)
    return write_template(place, head, "tpl-toy_cohort-2_res-1", ABOUT)


@pytest.fixture(scope="module")
def batch(small_head, tiny_weights, toy, tmp_path_factory):
    """``cadiff run`` with it in two worker processes."""
    folder = tmp_path_factory.mktemp("batch")
    bids = write_dataset(folder / "bids", small_head, ["sub-01_T1w", "sub-02_T1w"])
    arguments = [*OTHERS, "--template", toy, "--model", tiny_weights, "--report", "--save-field"]
    arguments += ["--output-spaces", "toy:cohort-2:res-2", "--nprocs", "2", "--mem", "8G"]
    out = folder / "out"
    return cadiff("run", bids, out, "participant", *arguments), bids, out, arguments


def test_workers_segment_with_a_folder(batch, toy):
    done, _, out, _ = batch
    assert done.returncode == 0, done.stderr
    template = load_template(str(toy))
    results = list(finished(out))
    assert [result.entities for result in results] == ["sub-01", "sub-02"]
    for result in results:
        (used,) = result.provenance.templates
        assert used.name == "toy:cohort-2"
        assert Path(used.source).expanduser() == toy
        assert used.sha256 == template.sha256
        assert used.citation == template.citation
        assert used.in_field
        settings = result.provenance.settings
        assert settings["template"] == "toy:cohort-2"
        assert settings["template_sha256"] == {"toy:cohort-2": template.sha256}


def test_the_field_is_that_of_its_frame(batch, small_head):
    """Known in closed form: the template is the same head, moved by more than the tolerance."""
    _, _, out, _ = batch
    path = out / "sub-01" / "anat" / "sub-01_desc-distance_field.nii.gz"
    field = np.asarray(nib.load(path).dataobj)
    grid, inside = small_head.t1.grid, small_head.codes > 0
    world = grid.to_world(np.argwhere(inside))
    expected = (world - (-36, -48, -32)) / (72, 84, 72)
    error_mm = abs(field[inside] - expected) * (72, 84, 72)
    assert error_mm.mean() < 3


def test_files_are_named_as_fmriprep_names_them_and_pybids_reads_them(batch):
    from bids.layout import parse_file_entities

    _, _, out, _ = batch
    anat = out / "sub-01" / "anat"
    for ends in ("from-toy+2_to-T1w", "from-T1w_to-toy+2"):
        path = anat / f"sub-01_{ends}_mode-image_xfm.h5"
        assert path.is_file()
        found = parse_file_entities(str(path), config=["bids", "derivatives"])
        start, end = re.fullmatch(r"from-(.+)_to-(.+)", ends).groups()
        assert (found["from"], found["to"], found["suffix"]) == (start, end, "xfm")
    labels = "seg-cadiff_res-2_desc-structures_dseg"
    for name in ("res-2_desc-brain_T1w", "res-2_desc-brain_mask", labels):
        path = anat / f"sub-01_space-toy_cohort-2_{name}.nii.gz"
        assert path.is_file()
        found = parse_file_entities(str(path), config=["bids", "derivatives"])
        assert (found["space"], found["res"]) == ("toy", "2")
        assert found["suffix"] == name.split("_")[-1]


def test_pages_show_it_and_the_text_cites_its_makers(batch):
    _, _, out, _ = batch
    views = read_views(out, next(finished(out)))
    assert views.registered.template.name == "toy:cohort-2"
    assert not any("registration" in note for note in views.notes)
    text = (out / "logs" / "CITATION.md").read_text()
    assert "registered to toy:cohort-2 (Doe and Roe)" in text
    assert "Doe, J; Roe, Richard. Toy heads of children. https://doi.org/10.1/toys" in text
    assert "MNI" not in text.replace("MNI Space", "")
    bib = (out / "logs" / "CITATION.bib").read_text()
    assert "@misc{template-toy:cohort-2," in bib
    assert "author = {Doe, J and Roe, Richard}" in bib


def test_results_are_finished_until_the_content_changes(batch, toy, phantom, tmp_path):
    _, bids, out, arguments = batch
    again = here("run", bids, out, "participant", *arguments)
    assert "2 done before" in again.stderr
    # The options of its log mean the same in any folder.
    (config, *_) = sorted((out / "logs").glob("cadiff_*.toml"))
    again = here("run", bids, out, "participant", "--config-file", config, cwd=tmp_path)
    assert "2 done before" in again.stderr, again.stderr
    # Another content under the same name.
    other = phantom("LPS", 1.0, scale=0.4, shift_mm=(12, -9, 7), noise=3.0)
    folder = write_template(tmp_path / "x", other, "tpl-toy_cohort-2", ABOUT)
    at = arguments.index(toy)
    changed = [*arguments[:at], folder, *arguments[at + 1 :]]
    refused = here("run", bids, out, "participant", *changed)
    assert refused.returncode == 73
    assert "template_sha256.toy:cohort-2" in refused.stderr
    # And of the same content elsewhere.
    (folder / "tpl-toy_cohort-2_T1w.nii.gz").write_bytes(next(toy.glob("*_T1w*")).read_bytes())
    again = here("run", bids, out, "participant", *changed)
    assert "2 done before" in again.stderr, again.stderr


def test_one_scan_by_the_older_name_of_the_option(small_head, scan_of, toy, tiny_weights, tmp_path):
    """Together with a shipped one; the transform of each lies beside the labels."""
    scan, out = scan_of(small_head), tmp_path / "out"
    specs = f"MNI152NLin2009aSym+{toy}"
    options = ["--model", tiny_weights, "-o", out, *OTHERS]
    done = here("seg", scan.path, *options, "--atlas", specs)
    assert done.returncode == 0, done.stderr
    sidecar = read_json(out / "sub-01" / "anat" / "sub-01_seg-cadiff_desc-structures_dseg.json")
    assert [t["Name"] for t in sidecar["Templates"]] == ["MNI152NLin2009aSym", "toy:cohort-2"]
    assert [*sidecar["Settings"]["template_sha256"]] == ["toy:cohort-2"]
    gone = here("seg", scan.path, *options, "--template", tmp_path / "gone")
    assert gone.returncode == 66
    assert "no template folder" in gone.stderr
