"""The BIDS app on a dataset of phantoms: sessions, runs, a broken scan, an odd name."""

import csv
import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bids_dataset import QUICK, cadiff, here, write_dataset

from cadiff_cli.cli.run import command as run_command
from cadiff_cli.io import checksums
from cadiff_cli.io.bids.layout import finished
from cadiff_cli.io.images import save_volume

GOOD = ("sub-01_ses-a", "sub-01_ses-b_run-1", "sub-01_ses-b_run-2", "sub-02_acq-mprage")
BROKEN = "sub-03"


@pytest.fixture(scope="module")
def batch(small_head, tiny_weights, tmp_path_factory):
    """One run over everything, with extra outputs; nothing below changes its files."""
    folder = tmp_path_factory.mktemp("batch")
    bids = write_dataset(folder / "bids", small_head, [f"{name}_T1w" for name in GOOD])
    broken = bids / BROKEN / "anat" / f"{BROKEN}_T1w.nii.gz"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"\x1f\x8b not an image")
    odd = bids / "sub-02" / "anat" / "sub-02_T1w copy.nii.gz"
    odd.write_bytes(b"")
    out = bids / "derivatives" / "cadiff"
    arguments = [*QUICK, "--model", tiny_weights, "--posteriors", "--save-field", "--report"]
    arguments += ["--uncertainty", "--output-spaces", "MNI152NLin2009aSym:res-4"]
    arguments += ["--nprocs", "2", "--mem", "8G"]
    return cadiff("run", bids, out, "participant", *arguments), bids, out, arguments


def anat(out, entities):
    folders = [part for part in entities.split("_") if part.startswith(("sub-", "ses-"))]
    return out.joinpath(*folders, "anat")


def files(out):
    return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_a_bad_scan_is_recorded_and_the_rest_goes_on(batch):
    done, _, out, _ = batch
    assert done.returncode == 1, done.stderr
    assert [result.entities for result in finished(out)] == list(GOOD)
    (crash,) = out.rglob("crash-*")
    assert crash.relative_to(out).parts[:2] == (BROKEN, "log")
    text = crash.read_text()
    assert f"{BROKEN}_T1w.nii.gz" in text
    assert '"steps": 1' in text
    assert "Traceback" in text
    # The table at the end names scan, error and crash file.
    table = done.stderr[done.stderr.index("failed\n") :]
    assert re.search(rf"{BROKEN}\b.*damaged or truncated.*", table)
    assert crash.name in table
    assert "4 done, 1 failed" in done.stderr
    assert "Traceback" not in done.stderr
    # Another one holds what should be looked at in results that are there.
    doubts = done.stderr[done.stderr.index("to look at\n") :]
    warned = {r.entities for r in finished(out) if r.provenance.notes}
    assert warned
    assert all(entities in doubts for entities in warned)


def test_an_odd_name_is_not_lost_silently(batch):
    done, *_ = batch
    assert "sub-02/anat/sub-02_T1w copy.nii.gz has no BIDS name: ignored" in done.stderr


def test_every_scan_has_its_own_complete_result(batch):
    _, _, out, _ = batch
    template = "MNI152NLin2009aSym"
    images = ("desc-preproc_T1w", "desc-brain_mask", "res-1_desc-brain_T1w", "dseg")
    images += ("seg-cadiff_desc-structures_dseg", "desc-distance_field", "seg-cadiff_probseg")
    images += ("seg-cadiff_desc-uncertainty_probseg",)
    images += tuple(f"label-{tissue}_probseg" for tissue in ("GM", "WM", "CSF"))
    images += tuple(
        f"space-{template}_{name}"
        for name in (
            "res-4_desc-brain_T1w",
            "res-4_desc-brain_mask",
            "seg-cadiff_res-4_desc-structures_dseg",
        )
    )
    transforms = [f"from-{a}_to-{b}" for a, b in ((template, "T1w"), ("T1w", template))]
    for entities in GOOD:
        folder = anat(out, entities)
        found = {p.name.removeprefix(f"{entities}_") for p in folder.glob(f"{entities}_*")}
        assert found == {
            *(f"{name}.{suffix}" for name in images for suffix in ("nii.gz", "json")),
            *(f"{t}_mode-image_xfm.{suffix}" for t in transforms for suffix in ("h5", "json")),
            *(f"desc-volumetric_morph.{suffix}" for suffix in ("tsv", "json")),
            *(f"desc-totals_morph.{suffix}" for suffix in ("tsv", "json")),
        }
    assert not list(anat(out, BROKEN).glob("*"))


def test_the_official_validator_finds_no_error(batch):
    pytest.importorskip("bids_validator_deno")
    _, _, out, _ = batch
    program = Path(sys.executable).with_name("bids-validator-deno")
    done = subprocess.run([program, "--format", "json", out], capture_output=True, check=False)
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []
    assert done.returncode == 0


def test_every_scan_has_a_page_that_shows_the_scan_itself(batch):
    _, _, out, _ = batch
    assert {path.name for path in out.glob("*.html")} == {f"{name}.html" for name in GOOD}
    for name in GOOD:
        assert "The outline over the whole scan" in (out / f"{name}.html").read_text()


def test_sources_are_uris_of_files_that_exist(batch):
    _, bids, out, _ = batch
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "cadiff"
    raw = (out / description["DatasetLinks"]["raw"]).resolve()
    assert raw == bids.resolve()
    roots = {"bids::": out, "bids:raw:": raw}
    sidecars = list(out.glob("sub-*/**/anat/*.json"))
    assert len(sidecars) == 18 * len(GOOD)
    for sidecar in sidecars:
        values = json.loads(sidecar.read_text())
        uris = [*values["Sources"], *[v for k, v in values.items() if k == "SpatialReference"]]
        assert uris
        for uri in uris:
            (root,) = [root for prefix, root in roots.items() if uri.startswith(prefix)]
            assert (root / uri.split(":", 2)[2]).is_file(), (sidecar.name, uri)


def test_nothing_tells_where_somebody_lives(batch):
    """JSON, tables and texts name no absolute path: results are shared, homes are not."""
    _, bids, out, _ = batch
    shared = [*out.glob("*.*"), *out.glob("sub-*/**/anat/*.json"), *out.glob("logs/CITATION*")]
    assert len(shared) > 20
    for path in shared:
        text = path.read_text()
        assert str(bids.parent) not in text, path
        assert str(Path.home()) not in text, path


def test_the_label_map_of_posteriors_fits(batch):
    _, _, out, _ = batch
    base = anat(out, GOOD[0]) / f"{GOOD[0]}_seg-cadiff_probseg"
    names = json.loads(base.with_suffix(".json").read_text())["LabelMap"]
    with (out / "seg-cadiff_dseg.tsv").open() as stream:
        abbreviations = [row["abbreviation"] for row in csv.DictReader(stream, delimiter="\t")]
    assert names == abbreviations
    assert nib.load(base.with_suffix(".nii.gz")).shape[3] == len(names)


def test_results_in_standard_space_agree_with_those_in_native_space(batch):
    """The same fraction of the brain is left, whatever the grid."""
    _, _, out, _ = batch
    folder, entities = anat(out, GOOD[0]), GOOD[0]
    space = "space-MNI152NLin2009aSym"

    def left_share(name):
        labels = np.asarray(nib.load(folder / f"{entities}_{name}.nii.gz").dataobj)
        left, right = (np.isin(labels, codes).sum() for codes in ((2, 3), (41, 42)))
        return left / (left + right)

    native, standard = (
        left_share(f"{each}_desc-structures_dseg")
        for each in ("seg-cadiff", f"{space}_seg-cadiff_res-4")
    )
    assert standard == pytest.approx(native, abs=0.1)
    t1 = nib.load(folder / f"{entities}_{space}_res-4_desc-brain_T1w.nii.gz")
    assert tuple(t1.header.get_zooms()) == (4, 4, 4)


def test_the_boilerplate_says_what_was_run(batch):
    _, _, out, _ = batch
    text = (out / "logs" / "CITATION.md").read_text()
    assert "4 T1-weighted scans of 2 participants" in text
    assert "1 deterministic denoising step (Song et al., 2021)" in text
    assert "affine registration" in text
    assert "SyN" not in text  # it was not run
    assert "TemplateFlow" not in text  # nor was it asked
    keys = re.findall(r"^@\w+{(\w+),", (out / "logs" / "CITATION.bib").read_text(), re.M)
    assert {"cadiff", "ants", "ddim", "bids"} <= set(keys)
    assert "syn" not in keys
    html = (out / "logs" / "CITATION.html").read_text()
    assert "<script" not in html
    assert "Xing et al., 2025" in html


@pytest.mark.slow
def test_finished_scans_are_skipped_and_failed_ones_tried_again(
    batch, small_head, tmp_path, monkeypatch
):
    """The same command on a copy in which the broken scan was mended."""
    monkeypatch.setattr(checksums, "FRESH_NS", -(10**18))
    _, bids, _, arguments = batch
    copy = shutil.copytree(bids, tmp_path / "bids")
    out = copy / "derivatives" / "cadiff"
    write_dataset(copy, small_head, [f"{BROKEN}_T1w"])
    before = files(out)
    done = here("run", copy, out, "participant", "group", *arguments)
    assert done.returncode == 0, done.stderr
    assert "1 done, 4 done before" in done.stderr
    assert "5 of 5 scans" in done.stderr
    assert [result.entities for result in finished(out)] == [*GOOD, BROKEN]
    after = files(out)
    changed = {p.relative_to(out).as_posix() for p, t in before.items() if after.get(p) != t}
    assert changed <= {
        *(f"logs/journal/{name}" for name in (f"{BROKEN}.json", "inputs.tsv", "results.tsv")),
        *(f"logs/CITATION.{suffix}" for suffix in ("md", "html", "bib")),
    }
    # A third time there is nothing to do, and no image to read.
    checksums.checksums.cache_clear()
    monkeypatch.setattr(checksums, "sha256", lambda path: pytest.fail(f"{path} is read"))
    done = here("run", copy, out, "participant", *arguments, "--dry-run")
    assert done.returncode == 0
    lines = [f"{name}\tdone" for name in (*GOOD, BROKEN)]
    assert done.stdout.splitlines() == lines


def test_other_settings_are_refused_with_a_remedy(batch):
    _, bids, out, arguments = batch
    before = files(out)
    done = here("run", bids, out, "participant", *arguments, "--steps", "2")
    assert done.returncode == 73
    assert "sample.steps 1 -> 2" in done.stderr
    assert "--overwrite" in done.stderr
    assert files(out) == before
    # Even for a scan that has no result yet: one dataset is made one way.
    done = here(
        *("run", bids, out, "participant", *arguments, "--seed", "1"),
        *("--participant-label", BROKEN),
    )
    assert done.returncode == 73
    assert files(out) == before


def test_a_changed_input_is_not_taken_for_finished(batch, phantom, tmp_path):
    _, bids, _, arguments = batch
    copy = shutil.copytree(bids, tmp_path / "bids")
    write_dataset(copy, phantom("RAS", 1.0, scale=0.41), [f"{GOOD[0]}_T1w"])
    out = copy / "derivatives" / "cadiff"
    done = here("run", copy, out, "participant", *arguments, "--dry-run")
    assert done.returncode == 0
    assert f"{GOOD[0]}_T1w.nii.gz has changed since" in done.stderr
    status = dict(line.split("\t") for line in done.stdout.splitlines())
    # One scan's trouble: the others are as before.
    assert status == dict.fromkeys(GOOD, "done") | {GOOD[0]: "failed", BROKEN: "todo"}
    done = here("run", copy, out, "participant", *arguments, "--dry-run", "--overwrite")
    status = dict(line.split("\t") for line in done.stdout.splitlines())
    assert status == dict.fromkeys(GOOD, "done") | {GOOD[0]: "todo", BROKEN: "todo"}


def test_overwrite_makes_selected_scans_again(batch, tmp_path):
    """What the new settings do not write goes; another run's files stay."""
    _, bids, _, arguments = batch
    copy = shutil.copytree(bids, tmp_path / "bids")
    out = copy / "derivatives" / "cadiff"
    extra = ("--posteriors", "--uncertainty", "--save-field")
    kept = [option for option in arguments if option not in extra]
    done = here(
        *("run", copy, out, "participant", *kept, "--steps", "0", "--overwrite"),
        *("--participant-label", "sub-01", "--session-label", "b"),
        *("--bids-filter-file", _filters(tmp_path, run=2)),
    )
    assert done.returncode == 0, done.stderr
    steps = {result.entities: result.provenance.steps for result in finished(out)}
    assert steps == dict.fromkeys(GOOD, 1) | {"sub-01_ses-b_run-2": 0}
    left = {p.name for p in (copy / "derivatives").rglob("*run-*probseg.nii.gz")}
    tissues = [f"label-{tissue}" for tissue in ("CSF", "GM", "WM")]
    optional = ["seg-cadiff", "seg-cadiff_desc-uncertainty"]
    expected = {1: [*tissues, *optional], 2: tissues}
    assert left == {
        f"sub-01_ses-b_run-{run}_{name}_probseg.nii.gz"
        for run, names in expected.items()
        for name in names
    }
    # The group level tells that the dataset is a mixture now.
    done = here("run", copy, out, "group")
    assert "2 different ways" in done.stderr


def _filters(folder, **entities):
    path = folder / "filters.json"
    path.write_text(json.dumps({"t1w": entities, "bold": {"task": "rest"}}))
    return path


def test_a_config_file_repeats_a_run(batch):
    _, bids, out, _ = batch
    (config,) = (out / "logs").glob("cadiff_*.toml")
    arguments = ("run", bids, out, "participant", "--config-file", config, "--dry-run")
    done = here(*arguments)
    assert done.returncode == 0, done.stderr
    assert [line.split("\t")[1] for line in done.stdout.splitlines()] == ["done"] * 4 + ["todo"]
    assert here(*arguments, "--steps", "3").returncode == 73  # flags win
    text = config.read_text()
    assert 'mem = "8589934592B"' in text
    assert "strip_model" not in text  # it follows the model, unless it was named


def test_group_table_has_a_row_per_finished_scan_and_names_the_rest(batch, tmp_path):
    _, bids, source, _ = batch
    out = shutil.copytree(source, tmp_path / "out")
    done = here("run", bids, out, "group")
    assert done.returncode == 0, done.stderr
    page = (out / "group.html").read_text()
    assert all(f'href="{name}.html"' in page for name in GOOD)
    assert "damaged or truncated" in page
    assert "sub-03 is not in the table: sub-03_T1w.nii.gz is damaged or truncated" in done.stderr
    assert "4 of 5 scans" in done.stderr
    with (out / "group_morph.tsv").open() as stream:
        rows = {row["scan"]: row for row in csv.DictReader(stream, delimiter="\t")}
    assert list(rows) == list(GOOD)
    described = json.loads((out / "group_morph.json").read_text())
    assert list(described) == list(rows[GOOD[0]])
    row = rows["sub-01_ses-b_run-2"]
    which = ("participant_id", "session_id", "run", "acquisition", "ceagent", "suffix")
    assert [row[k] for k in which] == ["sub-01", "ses-b", "2", "n/a", "n/a", "T1w"]
    # Volumes are those of the scan's own table, under the same name.
    for entities, row in rows.items():
        volumes = {}
        for table in ("volumetric", "totals"):
            with (anat(out, entities) / f"{entities}_desc-{table}_morph.tsv").open() as stream:
                for line in csv.DictReader(stream, delimiter="\t"):
                    name = line["name"].replace("3rd", "third").replace("4th", "fourth")
                    volumes[name.lower().replace("-", "_")] = line["volume_mm3"]
        assert {name: row[name] for name in volumes} == volumes
        assert all(name.isidentifier() for name in row)
        assert row["bids_name"] == f"{entities}_T1w"
        assert float(row["registration_score"]) > 1
    with (out / "group_missing.tsv").open() as stream:
        (missing,) = csv.DictReader(stream, delimiter="\t")
    assert missing["scan"] == BROKEN
    # A group is the dataset: one task's participants do not replace all.  A damaged result is told.
    tables = [anat(out, name) / f"{name}_desc-volumetric_morph.tsv" for name in GOOD[:2]]
    tables[1].write_text("\n".join(tables[0].read_text().splitlines()[:9]))
    tables[0].write_text("x\n1\n")
    done = here(*("run", bids, out, "group", "--participant-label", "02", "--session-label", "a"))
    assert done.returncode == 0, done.stderr
    with (out / "group_morph.tsv").open() as stream:
        assert [row["scan"] for row in csv.DictReader(stream, delimiter="\t")] == list(GOOD[2:])
    for name, why in zip(GOOD[:2], ("is not a volume table", "lacks"), strict=True):
        assert re.search(
            f"{name} is not in the table: its result cannot be read.*{why}", done.stderr
        )
    done = here("run", bids, out, "group", "--participant-label", "77")
    assert done.returncode == 18
    done = here("report", out, "--scans", bids)
    assert done.returncode == 1
    assert {path.stem for path in out.glob("*.html")} == {*GOOD, "group"}
    assert f"WARNING: {GOOD[0]}" in done.stderr


def test_a_page_that_a_kill_has_cost_is_written_by_the_next_run(batch, tmp_path):
    _, bids, _, arguments = batch
    copy = shutil.copytree(bids, tmp_path / "bids")
    out = copy / "derivatives" / "cadiff"
    page = out / f"{GOOD[-1]}.html"
    page.unlink()
    before = files(out)
    (copy / BROKEN / "anat" / f"{BROKEN}_T1w.nii.gz").unlink()
    done = here("run", copy, out, "participant", *arguments)
    assert done.returncode == 0, done.stderr
    assert "1 done, 3 done before" in done.stderr
    assert page.exists()
    page.unlink()
    listed = here("run", copy, out, "participant", *arguments, "--dry-run").stdout
    assert "todo" not in listed  # a page is not worth a cluster's job
    assert all(files(out)[p] == t for p, t in before.items() if p.name.endswith("dseg.nii.gz"))


def test_what_a_run_did_not_write_is_not_lost(batch, tiny_weights, tmp_path):
    """A mask that somebody corrected is in the way, until --overwrite says that it may go."""
    _, bids, _, _ = batch
    out = tmp_path / "out"
    corrected = anat(out, GOOD[-1]) / f"{GOOD[-1]}_desc-brain_mask.nii.gz"
    corrected.parent.mkdir(parents=True)
    corrected.write_bytes(b"by hand")
    chosen = (*QUICK, "--registration", "none", "--model", tiny_weights, "--nprocs", "1")
    chosen += ("--participant-label", "02")
    for _ in range(2):  # however often it is tried
        done = here("run", bids, out, "participant", "group", *chosen)
        assert done.returncode == 1  # the scan's failure, not the lack of results
        assert f"{corrected} is there already" in done.stderr
        assert corrected.read_bytes() == b"by hand"
    done = here("run", bids, out, "participant", *chosen, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert corrected.read_bytes() != b"by hand"


def test_two_datasets_do_not_share_an_output_folder(batch, small_head, tmp_path):
    _, bids, source, arguments = batch
    other = write_dataset(bids.parent / "other", small_head, ["sub-77_T1w"])
    done = here("run", other, source, "participant", *arguments, "--dry-run")
    assert done.returncode == 73
    assert "another dataset (../..)" in done.stderr
    said = ("--dataset-links", "raw=../..")
    done = here("run", other, source, "participant", *arguments, "--dry-run", *said)
    assert done.returncode == 0, done.stderr


def test_the_group_level_needs_results(batch, tmp_path):
    _, bids, _, _ = batch
    done = here("run", bids, tmp_path / "out", "group")
    assert done.returncode == 66
    assert "participant level" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["{bids}", "{out}"], 64, "Missing argument"),
        (["{bids}", "{out}", "subject"], 17, "'subject'"),
        (["{bids}", "{out}", "participant", "--participant-label", "01", "77"], 18, "sub-77"),
        (["{bids}", "{out}", "participant", "--session-label", "a", "z"], 18, "no ses-z"),
        (["{bids}/gone", "{out}", "participant"], 66, "no dataset"),
        (["{bids}/sub-01", "{out}", "participant"], 16, "dataset_description.json"),
        (["{bids}", "{bids}", "participant"], 64, "derivatives"),
        (["{bids}", "{out}", "participant", "-w", "{bids}/work"], 64, "work folder"),
        (["{bids}", "{out}", "participant", "-w", __file__], 73, "is a file"),
        (["{bids}", "{out}", "participant", "--mem", "much"], 64, "16G"),
        (["{bids}", "{out}", "participant", "--output-spaces", "Talairach"], 64, "Talairach"),
        (["{bids}", "{out}", "participant", "--model", "none"], 66, "no model"),
        (["{bids}", "{out}", "participant", "--bids-filter-file", "{bids}/x"], 66, "filter-file"),
        (["{bids}", "{out}", "participant", "--dataset-links", "x=y"], 64, "raw=URI"),
        (["{bids}", "{out}", "participant", "--dask-address", "tcp://x:1"], 64, "--executor dask"),
        (["{bids}", "{out}", "group", "--dry-run", "--reports-only"], 64, "leave out one"),
        (["{bids}", "{out}", "group", "--dry-run", "--boilerplate-only"], 64, "leave out one"),
        (
            ["{bids}", "{out}", "participant", "--bids-database-dir", "{bids}/README"],
            65,
            "is a file",
        ),
    ],
)
def test_errors_have_the_documented_exit_codes(batch, tmp_path, arguments, code, text):
    _, bids, _, _ = batch
    places = {"bids": str(bids), "out": str(tmp_path / "out")}
    given = [argument.format(**places) for argument in arguments]
    done = here("run", *given, "--offline", "--skip-bids-validation")
    assert done.returncode == code, done.stderr
    assert text in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_folder_of_somebody_else_is_refused(batch, tmp_path):
    _, bids, _, _ = batch
    out = tmp_path / "out"
    out.mkdir()
    description = {"Name": "x", "DatasetType": "derivative", "GeneratedBy": [{"Name": "fMRIPrep"}]}
    (out / "dataset_description.json").write_text(json.dumps(description))
    done = here("run", bids, out, "participant", "--offline")
    assert done.returncode == 73
    assert "fMRIPrep" in done.stderr


def test_reports_can_be_rebuilt_from_finished_results(batch, tmp_path):
    _, bids, source, _ = batch
    out = shutil.copytree(source, tmp_path / "out")
    before = (out / "logs" / "CITATION.md").read_text()
    for path in out.glob("logs/CITATION.*"):
        path.unlink()
    for page in out.glob("*.html"):
        page.unlink()
    for option in ("--boilerplate-only", "--reports-only"):
        done = here("run", bids, out, "participant", option)
        assert done.returncode == 0, done.stderr
        assert (out / "logs" / "CITATION.md").read_text() == before
    assert {path.stem for path in out.glob("*.html")} == set(GOOD)
    for page in out.glob("*.html"):
        page.unlink()
    one = GOOD[0].split("_")[0].removeprefix("sub-")
    done = here("run", bids, out, "participant", "group", option, "--participant-label", one)
    assert done.returncode == 0, done.stderr
    assert {path.stem.split("_")[0] for path in out.glob("*.html")} == {f"sub-{one}", "group"}
    # A page that shows other results than the table does not stay.
    done = here("run", bids, out, "group", "--no-report")
    assert done.returncode == 0, done.stderr
    assert not (out / "group.html").exists()
    assert here("run", bids, tmp_path / "empty", "participant", option).returncode == 66


def test_a_damaged_sidecar_costs_the_others_nothing(batch, tmp_path):
    """Neither pages nor the text on methods; a page needs no expected Dice."""
    _, bids, source, _ = batch
    out = shutil.copytree(source, tmp_path / "out")
    for page in (*out.glob("*.html"), *out.glob("logs/CITATION.*")):
        page.unlink()
    for name, key in zip(GOOD, ("Steps", "ExpectedDice"), strict=False):
        (sidecar,) = out.rglob(f"{name}_seg-cadiff_desc-structures_dseg.json")
        values = json.loads(sidecar.read_text())
        del values[key]
        sidecar.write_text(json.dumps(values))
    done = here("run", bids, out, "participant", "group", "--reports-only")
    assert done.returncode == 1, done.stderr
    assert f"logs/CITATION.md leaves out {GOOD[0]}: " in done.stderr
    assert {path.stem for path in out.glob("*.html")} == {*GOOD[1:], "group"}
    assert f"{len(GOOD) - 1} T1-weighted scans" in (out / "logs" / "CITATION.md").read_text()
    sound = GOOD[-1].split("_")[0]
    assert sound != GOOD[0].split("_")[0]
    named = ("--participant-label", sound)
    done = here("run", bids, out, "participant", "--reports-only", *named)
    assert done.returncode == 1, done.stderr  # the text is still not of all


def test_a_group_of_one_keeps_its_page(batch, tmp_path):
    _, bids, source, _ = batch
    out = shutil.copytree(source, tmp_path / "out")
    for path in (*out.glob("sub-*"), *out.glob("logs/journal/*")):
        if not path.name.startswith(GOOD[0]) and path.name != GOOD[0].split("_")[0]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for entities in GOOD[1:]:
        for path in out.rglob(f"{entities}_*"):
            path.unlink()
    assert here("run", bids, out, "group").returncode == 0
    (out / "group_missing.tsv").unlink(missing_ok=True)
    (out / "group.html").unlink()
    done = here("report", out)
    assert done.returncode == 0, done.stderr
    assert (out / "group.html").exists()


@pytest.mark.parametrize("name", ["mem", "mem_mb"])
def test_memory_in_a_file_is_in_megabytes(name, tmp_path):
    """By every name of the option, as on the command line."""
    config = tmp_path / "options.toml"
    config.write_text(f"{name} = 16000\n")
    given = [str(tmp_path), str(tmp_path / "out"), "participant", "--config-file", str(config)]
    assert run_command.make_context("run", given).params["mem"] == 16000 * 2**20


def test_a_run_can_stop_at_the_first_crash(small_head, tiny_weights, tmp_path):
    bids = write_dataset(tmp_path / "bids", small_head, ["sub-01_T1w", "sub-02_T1w"])
    (bids / "sub-01" / "anat" / "sub-01_T1w.nii.gz").write_bytes(b"\x1f\x8b broken")
    done = cadiff(
        *("run", bids, tmp_path / "out", "participant", *QUICK, "--model", tiny_weights),
        *("--nprocs", "1", "--stop-on-first-crash"),
    )
    assert done.returncode == 1
    assert "1 failed, 1 not tried" in done.stderr
    assert not list(finished(tmp_path / "out"))


def test_what_can_never_be_segmented_is_told_once_and_done_with(small_head, tiny_weights, tmp_path):
    """A slab, two files of one image, and two images of one name: each is its own trouble only."""
    names = ("sub-01_UNIT1", "sub-02_T1w", "sub-03_T1w")
    bids, out = write_dataset(tmp_path / "bids", small_head, names), tmp_path / "out"
    one, two, slab = (bids / name[:6] / "anat" / f"{name}.nii.gz" for name in names)
    for path in (one, two):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    two.with_suffix("").write_bytes(b"another")
    grid = small_head.t1.grid.crop((0, 0, 0), (*small_head.t1.grid.shape[:2], 20))
    save_volume(slab, small_head.t1.data[:, :, :20], grid)
    call = ("run", bids, out, "participant", *QUICK, "--model", tiny_weights, "--nprocs", "1")
    call += ("--bids-filter-file", _filters(tmp_path, suffix=["T1w", "UNIT1"]))

    done = here(*call)
    assert done.returncode == 1, done.stderr
    assert "1 done, 1 failed, 1 unsuitable" in done.stderr
    assert "sub-01_UNIT1.nii.gz is taken; sub-01_UNIT1.nii is the same image" in done.stderr
    failed, unsuitable = (
        re.search(rf"^ *{title}\n.*?\n\n", done.stderr + "\n\n", re.M | re.S)
        for title in ("failed", "unsuitable")
    )
    assert failed is not None
    assert "sub-02_T1w.nii and sub-02_T1w.nii.gz are not the same image" in failed.group()
    assert unsuitable is not None
    assert "too small a field of view" in unsuitable.group()
    assert [result.entities for result in finished(out)] == ["sub-01"]
    assert [path.name for path in out.rglob("crash-*")] == ["crash-sub-02.txt"]

    _filters(tmp_path, suffix=["T1w", "UNIT1"], extension=".nii.gz")  # as the failure said
    done = here(*call, "group")
    assert done.returncode == 0, done.stderr
    assert "1 done, 1 done before, 1 unsuitable" in done.stderr
    assert "sub-03 is not in the table: unsuitable: sub-03_T1w.nii.gz covers" in done.stderr
    with (out / "group_missing.tsv").open() as stream:
        (missing,) = csv.DictReader(stream, delimiter="\t")
    assert (missing["scan"], missing["reason"][:12]) == ("sub-03", "unsuitable: ")
    with (out / "group_morph.tsv").open() as stream:
        suffixes = {row["scan"]: row["suffix"] for row in csv.DictReader(stream, delimiter="\t")}
    assert suffixes == {"sub-01": "UNIT1", "sub-02": "T1w"}

    two.with_suffix("").unlink()
    done = here(*call, "--dry-run")
    assert done.stdout.splitlines() == ["sub-01\tdone", "sub-02\tdone", "sub-03\tunsuitable"]
