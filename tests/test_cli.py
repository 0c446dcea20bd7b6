"""The commands as a person meets them: quick help, one-line errors, complete results."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import nibabel as nib
import numpy as np
import pytest
from bids_dataset import QUICK, here
from conftest import ROOT

from cadiff_cli import machine
from cadiff_cli.api import segment
from cadiff_cli.cli import COMMANDS, cadiff, guarded
from cadiff_cli.cli.options import FilePath
from cadiff_cli.config import (
    Config,
    OutputConfig,
    RegisterConfig,
    SampleConfig,
    StripConfig,
)
from cadiff_cli.errors import (
    TERMINATED,
    CadiffError,
    DataError,
    DiskError,
    MissingInputError,
    OutputError,
    UsageError,
)
from cadiff_cli.io.files import sha256
from cadiff_cli.io.images import save_volume
from cadiff_cli.labels.parcellation import BASE, load_parcellation
from cadiff_cli.products import Person
from cadiff_cli.quality.age_ranges import percentiles, write_age_ranges
from cadiff_cli.runner.journal import Journal

HEAVY = {
    "torch",
    "ants",
    "nibabel",
    "monai",
    "numpy",
    "scipy",
    "bids",
    "templateflow",
    "nilearn",
    "distributed",
    "contourpy",
    "jinja2",
    "PIL",
}


CODES = (
    *("seg-cadiff_dseg.tsv", "seg-cadiff_dseg.json", "luts/seg-cadiff_FreeSurferColorLUT.txt"),
    *("luts/seg-cadiff_fsleyes.lut", "luts/seg-cadiff_itksnap.txt", "luts/seg-cadiff_niivue.json"),
)
"""What explains the labels at the root of a dataset."""
TABLES = {"desc-volumetric_morph", "desc-totals_morph"}
"""Of every result."""


def call(program, *arguments, home=None, cwd=None, **variables):
    """Run ``cadiff`` or ``cadiff-seg`` as the installed script would, not in a terminal."""
    entry = {"cadiff": "main", "cadiff-seg": "segment_main"}[program]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TEMPLATEFLOW_HOME": str(home or "/nonexistent"),
        **variables,
    }
    return subprocess.run(
        [sys.executable, "-c", f"from cadiff_cli.cli import {entry}; {entry}()", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=cwd,
        timeout=900,
    )


def segmented_alone(head, folder, weights, *options):
    """The scan and the output folder of a real run, from file to files, without a registration."""
    source, out = folder / "sub-01_T1w.nii.gz", folder / "out"
    save_volume(source, head.t1.data, head.t1.grid)
    done = here(
        *("seg", source, "-o", out, "--model", weights),
        *("--registration", "none", "--template", "MNI152NLin2009aSym", "--offline"),
        *("--skull-strip", "none", "--steps", "1", "--threads", "1", *options),
    )
    assert done.returncode == 0, done.stderr
    return source, out


def one_line(done):
    """The single line on stderr of a failed command."""
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("cadiff: error: ")
    assert "Traceback" not in line
    return line


@pytest.mark.parametrize("arguments", [["--help"], ["seg", "--help"], ["--version"]])
def test_help_and_version_say_nothing_else(arguments):
    done = call("cadiff", *arguments)
    assert done.returncode == 0
    assert done.stderr == ""


def test_the_installed_script_shows_help():
    script = Path(sys.executable).with_name("cadiff-seg")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert "cadiff-seg [OPTIONS] T1" in done.stdout
    assert "Exit codes" in done.stdout


def test_help_loads_nothing_heavy():
    """Whichever command it is of: the first one that loads more than click is named."""
    code = (
        "import sys; from cadiff_cli.cli import COMMANDS, cadiff, guarded\n"
        "for arguments in (['--help'], *([name, '--help'] for name in COMMANDS)):\n"
        "    assert guarded(lambda: cadiff.main(arguments, standalone_mode=False)) == 0\n"
        f"    loaded = {HEAVY} & {{*sys.modules}}\n"
        "    assert not loaded, (arguments, loaded)\n"
        "print(' '.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.split())
    assert "click" in loaded
    assert {f"cadiff_cli.cli.{name.replace('-', '_')}" for name in COMMANDS} <= loaded


def every_command():
    """All commands by the words after ``cadiff``, groups and what is in them."""
    context = click.Context(cadiff)
    for name in cadiff.list_commands(context):
        command = cadiff.get_command(context, name)
        yield name, command
        if isinstance(command, click.Group):
            for part in command.list_commands(context):
                yield f"{name} {part}", command.get_command(context, part)


def test_every_command_is_known_and_explained():
    assert cadiff.list_commands(click.Context(cadiff)) == list(COMMANDS)
    found = dict(every_command())
    modules = (ROOT / "cadiff_cli" / "cli").glob("*.py")
    texts = {path.stem: path.read_text() for path in modules if path.stem != "__init__"}
    defined = {
        stem for stem, text in texts.items() if re.search(r"@click\.(command|group)\(", text)
    }
    assert defined <= {re.sub("[- ]", "_", name) for name in found}
    for name, command in found.items():
        assert command.name == name.split()[-1]
        assert command.help
        assert "\\b" not in command.help, "Click's sign for no wrapping is a backspace"
    assert cadiff.get_command(click.Context(cadiff), "nonsense") is None


def test_no_command_takes_an_empty_path_for_the_current_folder():
    """``-o "$UNSET"`` would write its results there."""
    for name, command in every_command():
        for parameter in command.params:
            kinds = getattr(parameter.type, "types", [parameter.type])  # of an option of two words
            assert all(type(x) is FilePath for x in kinds if isinstance(x, click.Path)), name


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["scan.nii"],
        ["scan.nii", "-o", "out", "--stepz", "3"],
        ["scan.nii", "-o", "out", "--steps", "-1"],
        ["scan.nii", "-o", "out", "--steps", "many"],
        ["scan.nii", "-o", "out", "--tile", "50"],
        ["scan.nii", "-o", "out", "--skull-strip", "magic"],
        ["scan.nii", "-o", "out", "--samples", "2", "--steps", "0"],
        ["scan.nii", "-o", ""],
        [f"{'x' * 300}.nii", "-o", "out"],
    ],
    ids=["nothing", "no out", "typo", "negative", "text", "tile", "choice", "samples", "", "long"],
)
def test_usage_errors_exit_64(arguments, capsys):
    from cadiff_cli.cli.seg import command

    code = guarded(lambda: command.main(arguments, prog_name="cadiff-seg", standalone_mode=False))
    assert code == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert "--help" in line


def test_a_link_that_leads_to_itself_is_named(tmp_path, capsys):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for words in (["run", loop, tmp_path / "out", "group"], ["retest", loop]):
        arguments = [*map(str, words)]
        assert guarded(lambda given=arguments: cadiff.main(given, standalone_mode=False)) == 66
        assert "leads to itself" in capsys.readouterr().err


def test_a_missing_file_exits_66_with_one_line(tmp_path):
    done = call("cadiff-seg", str(tmp_path / "gone.nii.gz"), "-o", str(tmp_path / "out"))
    assert done.returncode == 66
    assert "gone.nii.gz" in one_line(done)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["MNIColin27"], 66, "MNIColin27_T1w"),
        ([], 66, "MNIColin27_T1w"),
        (["Talairach"], 64, ""),
        (["auto"], 66, "MNIColin27_T1w"),
        (["MNIColin27+MNI152NLin2009cAsym"], 66, "MNIColin27_T1w"),
    ],
)
def test_fetch_says_what_is_not_there(tmp_path, arguments, code, text):
    done = call("cadiff", "fetch", "--check", *arguments, home=tmp_path)
    assert done.returncode == code
    assert text in one_line(done)


def test_the_example_replaces_nothing_of_the_users(tmp_path, capsys):
    path = tmp_path / "sub-MNI152_T1w.nii.gz"
    path.write_text("mine")
    arguments = ["example", "-o", str(tmp_path)]
    assert guarded(lambda: cadiff.main(arguments, standalone_mode=False)) == 73
    assert path.read_text() == "mine"
    assert guarded(lambda: cadiff.main([*arguments, "--overwrite"], standalone_mode=False)) == 0
    before = path.stat().st_mtime_ns
    assert guarded(lambda: cadiff.main(arguments, standalone_mode=False)) == 0  # the same again
    assert path.stat().st_mtime_ns == before


def test_settings_that_cannot_work_are_refused_before_anything_is_computed():
    scan = object()
    for config, words in (
        (Config(StripConfig("nett")), "--skull-strip is 'nett'.*net, template"),
        (Config(register=RegisterConfig("quick")), "--registration is 'quick'"),
        (Config(register=RegisterConfig(seed=-1)), "--seed is -1"),
        (Config(sample=SampleConfig(steps=-1)), "--steps is -1.*0 or more"),
        (Config(sample=SampleConfig(samples=0)), "--samples is 0"),
        (Config(sample=SampleConfig(samples=500)), "--samples is 500.*100 or less"),
        (Config(sample=SampleConfig(tile=-32)), "--tile is -32"),
        (Config(sample=SampleConfig(tile=0)), "--tile is 0"),
        (Config(output=OutputConfig(codes="fresurfer")), "--codes is 'fresurfer'"),
        (Config(output=OutputConfig(parcellation="nm138")), "--parcellation is 'nm138'.*nmm138"),
        (Config(sample=SampleConfig(tile=50)), "--tile is 50"),
        (Config(sample=SampleConfig(steps=0, samples=2)), "--samples"),
        (Config(register=RegisterConfig("none"), sample=SampleConfig(steps=0)), "--steps 0"),
        (Config(register=RegisterConfig("none"), output=OutputConfig(parcellation="nmm138")), "-p"),
    ):
        with pytest.raises(UsageError, match=words):
            segment(scan, config=config)


def test_fetch_says_what_is_there(shared):
    done = call("cadiff", "fetch", "--check", "MNIColin27", home=shared("templateflow"))
    assert done.returncode == 0
    assert done.stdout.startswith("MNIColin27\t")


def test_bad_data_exits_65_before_anything_is_written(write_image, tmp_path):
    path = write_image(np.zeros((70, 70, 70), dtype=np.float32))
    done = call("cadiff", "seg", str(path), "-o", str(tmp_path / "out"))
    assert done.returncode == 65
    assert "all zero" in one_line(done)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (CadiffError("it broke", "mend it"), 1, "it broke. mend it"),
        (DataError("bad\nscan", "a\tb"), 65, "bad scan. a b"),
        (MissingInputError("gone"), 66, "gone"),
        (OutputError("no room"), 73, "no room"),
        (DiskError("full"), 74, "full"),
        (OSError(28, "No space left on device", "/x"), 74, "No space left on device (/x)"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (EOFError(), 65, "damaged"),
        (MemoryError(), 1, "out of memory"),
        (ZeroDivisionError("division by zero"), 1, "unexpected ZeroDivisionError"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else None,
)
def test_errors_become_one_line_and_a_code(error, code, text, capsys):
    def fail():
        raise error

    assert guarded(fail) == code
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert text in line
    assert captured.out == ""


def test_success_is_zero():
    assert guarded(lambda: None) == 0
    assert guarded(lambda: 3) == 3


@pytest.fixture
def quota(tmp_path, monkeypatch):
    """Say that we live in a container with so much of a host of 64 processors."""

    def limit(said):
        (tmp_path / "cpu.max").write_text(said)
        (tmp_path / "membership").write_text("0::/\n")
        monkeypatch.setattr(machine, "CGROUP", tmp_path)
        monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
        for name in machine.THREAD_VARIABLES:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)

    return limit


@pytest.mark.parametrize(
    ("said", "threads"),
    [("350000 100000", "3"), ("50000 100000", "1"), ("max 100000", None), ("9900000 100000", None)],
    ids=["floor", "at least one", "no quota", "more than there is"],
)
def test_every_command_keeps_to_the_quota(quota, said, threads):
    quota(said)
    seen = []
    guarded(lambda: seen.extend(os.environ.get(name) for name in machine.THREAD_VARIABLES))
    assert seen == [threads] * 3


def test_a_user_s_number_of_threads_wins(quota, monkeypatch):
    quota("200000 100000")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    guarded(lambda: None)
    assert os.environ["OMP_NUM_THREADS"] == "5"
    assert "MKL_NUM_THREADS" not in os.environ


def test_torch_uses_the_threads_that_a_container_has(tmp_path):
    """The number is settled before a command imports torch; ``--threads`` changes it later."""
    (tmp_path / "cpu.max").write_text("190000 100000")
    (tmp_path / "membership").write_text("0::/\n")
    code = (
        "import os; from pathlib import Path; from cadiff_cli import machine;"
        f"machine.CGROUP = Path({str(tmp_path)!r});"
        "machine.MEMBERSHIP = machine.CGROUP / 'membership';"
        "os.sched_getaffinity = lambda _: set(range(64));"
        "from cadiff_cli.cli import guarded\n"
        "def call():\n"
        "    import torch; from cadiff_cli.config import Machine\n"
        "    from cadiff_cli.runner.execute import prepare_torch\n"
        "    for given in (None, 2):\n"
        "        prepare_torch(Machine('cpu', given)); print(torch.get_num_threads())\n"
        "guarded(call)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in machine.THREAD_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == ["1", "2"], done.stderr


def small_brain(phantom):
    """As small as a brain may be that is known to be stripped already."""
    return phantom("oblique", (2.0, 2.0, 2.4), scale=0.72)


@pytest.fixture(scope="module")
def segmented(phantom, tiny_weights, age_ranges, tmp_path_factory):
    """One real run from file to files, offline, with the embedded template.

    Everything lies where ANTs' and glob's own signs are in the path, as in an array job.
    """
    folder = tmp_path_factory.mktemp("run") / "1234[5].server, it's *?{x} 脳"
    folder.mkdir()
    head = small_brain(phantom)
    source = folder / "sub-01_ses-a_T1w.nii.gz"
    save_volume(source, head.t1.data, head.t1.grid)
    arguments = [
        *(str(source), "-o", str(folder / "out"), "--model", str(tiny_weights)),
        *("--template", "MNI152NLin2009aSym", "--registration", "affine", "--offline"),
        *("--steps", "1", "--no-flip", "--seed", "5", "--threads", "1"),
        *("--posteriors", "--save-field", "--samples", "2"),
        *("--age", "040Y", "--sex", "female", "--ranges", str(folder / "ranges.json")),
    ]
    write_age_ranges(folder / "ranges.json", age_ranges)
    done = call("cadiff-seg", *arguments, TMPDIR=str(folder))
    return done, source, folder / "out", arguments


def anat(out, suffix):
    return out / "sub-01" / "ses-a" / "anat" / f"sub-01_ses-a_{suffix}"


def table(out, desc):
    """Rows of a table of volumes."""
    with anat(out, f"{desc}_morph.tsv").open() as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


@pytest.mark.slow
def test_a_run_is_silent_when_not_in_a_terminal(segmented):
    done, *_ = segmented
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    # Warnings may be said, each on a line of ours.
    assert all(line.startswith("cadiff: WARNING") for line in done.stderr.splitlines())


def test_every_result_is_there(segmented, age_ranges):
    _, _, out, _ = segmented
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    logs = {name for name in found if name.startswith("logs/")}
    (log,) = (name for name in logs if name.endswith(".log"))
    cited = {f"logs/CITATION.{suffix}" for suffix in ("md", "html", "bib")}
    locks = {f"logs/journal/{name}.lock" for name in ("sub-01_ses-a", "citation")}
    assert logs == {log, *locks, *cited}
    prefix = "sub-01/ses-a/anat/sub-01_ses-a_"
    images = (
        *("desc-preproc_T1w", "desc-brain_mask", "res-1_desc-brain_T1w", "dseg"),
        *("seg-cadiff_desc-structures_dseg", "seg-cadiff_probseg"),
        *(f"label-{tissue}_probseg" for tissue in ("GM", "WM", "CSF")),
        "seg-cadiff_desc-uncertainty_probseg",
    )
    transforms = ("from-MNI152NLin2009aSym_to-T1w", "from-T1w_to-MNI152NLin2009aSym")
    assert found - logs == {
        *("dataset_description.json", ".bidsignore", "README.md", *CODES),
        *("sub-01_ses-a.html", f"age_ranges_{age_ranges.fingerprint}.json"),
        *(f"{prefix}{name}.{suffix}" for name in images for suffix in ("nii.gz", "json")),
        *(f"{prefix}{t}_mode-image_xfm.{suffix}" for t in transforms for suffix in ("h5", "json")),
        *(f"{prefix}desc-distance_field.{suffix}" for suffix in ("nii.gz", "json")),
        *(f"{prefix}desc-volumetric_morph.{suffix}" for suffix in ("tsv", "json")),
        *(f"{prefix}desc-totals_morph.{suffix}" for suffix in ("tsv", "json")),
    }


def test_results_lie_on_the_scan(segmented):
    _, source, out, _ = segmented
    scan = nib.load(source)
    maps = ("seg-cadiff_probseg", "seg-cadiff_desc-uncertainty_probseg")
    for suffix in ("seg-cadiff_desc-structures_dseg", "desc-brain_mask", *maps):
        image = nib.load(anat(out, f"{suffix}.nii.gz"))
        assert image.shape[:3] == scan.shape
        np.testing.assert_array_equal(image.affine, scan.affine)
    assert nib.load(anat(out, "seg-cadiff_probseg.nii.gz")).shape[3] == 41
    assert nib.load(anat(out, "desc-distance_field.nii.gz")).shape == (*scan.shape, 3)


def test_the_phantom_is_found(segmented, phantom):
    """Left on the left, and the brain where it is."""
    _, _, out, _ = segmented
    head = small_brain(phantom)
    labels = np.asarray(nib.load(anat(out, "seg-cadiff_desc-structures_dseg.nii.gz")).dataobj)
    mask = np.asarray(nib.load(anat(out, "desc-brain_mask.nii.gz")).dataobj)
    assert (mask == (head.codes > 0)).mean() > 0.995
    x = head.t1.grid.to_world(np.moveaxis(np.indices(labels.shape), 0, -1))[..., 0]
    assert x[np.isin(labels, (2, 3))].mean() < -10
    assert x[np.isin(labels, (41, 42))].mean() > 10


def test_volumes_are_label_counts_times_the_voxel(segmented):
    _, _, out, _ = segmented
    image = nib.load(anat(out, "seg-cadiff_desc-structures_dseg.nii.gz"))
    labels, voxel = np.asarray(image.dataobj), abs(np.linalg.det(image.affine[:3, :3]))
    volumes = {row["index"]: float(row["volume_mm3"]) for row in table(out, "desc-volumetric")}
    parcellation = load_parcellation(BASE)
    assert set(volumes) == {str(s.code) for s in parcellation.structures}
    for code, mm3 in volumes.items():
        expected = np.count_nonzero(labels == int(code)) * voxel
        assert mm3 == pytest.approx(expected, abs=2e-3, rel=1e-6)
    totals = [row for row in table(out, "desc-totals") if row["name"] != "Intracranial-Volume"]
    assert len(totals) == len(table(out, "desc-totals")) - 1  # the scan is stripped
    sums = {row["name"]: float(row["volume_mm3"]) for row in totals}
    vessels = volumes["30"] + volumes["62"]
    fluid = sum(volumes[code] for code in ("4", "43", "5", "44", "14", "15", "24"))
    brain = sum(volumes.values()) - vessels
    assert sums["Brain-Segmentation"] == pytest.approx(brain, abs=0.1)
    assert sums["Brain-Segmentation-Not-CSF"] == pytest.approx(brain - fluid, abs=0.1)
    shares = {row["name"]: float(row["percent_brain"]) for row in totals}
    assert shares["Brain-Segmentation"] == 100
    parts = {"Cortex": "3 42", "Cerebral-White": "2 41"}
    parts["Subcortical-Grey"] = "10 49 11 50 12 51 13 52 17 53 18 54 26 58 28 60"
    parts["Total-Grey"] = f"{parts['Cortex']} {parts['Subcortical-Grey']} 8 47 630 631 632"
    for name, codes in parts.items():
        total = sum(volumes[code] for code in codes.split())
        assert sums[name] == pytest.approx(total, abs=0.1), name


def test_every_structure_tells_what_to_expect(segmented):
    _, _, out, _ = segmented
    rows = table(out, "desc-volumetric")
    for row in rows:
        assert float(row["volume_sd_mm3"]) >= 0
        assert float(row["volume_mm3"]) == 0 or 0 <= float(row["expected_dice"]) <= 1
    described = json.loads(anat(out, "desc-volumetric_morph.json").read_text())
    assert not described["expected_dice"]["Calibrated"]
    assert "2 samples" in described["volume_sd_mm3"]["Description"]
    assert {*rows[0]} <= {*described}
    assert [*described["name"]["Levels"]] == [row["name"] for row in rows]
    entropy = nib.load(anat(out, "seg-cadiff_desc-uncertainty_probseg.nii.gz"))
    brain = np.asarray(nib.load(anat(out, "desc-brain_mask.nii.gz")).dataobj) > 0
    assert entropy.get_data_dtype() == np.float32
    values = np.asarray(entropy.dataobj)
    assert 0 < values.max() <= 1
    assert not values[~brain].any()
    page = (out / "sub-01_ses-a.html").read_text()
    for needed in ("Uncertainty", "not calibrated for these weights", "2 samples averaged"):
        assert needed in page
    assert "is not shown" not in page, "the registration"


def test_a_table_says_where_the_person_stands(segmented, age_ranges, parcellation):
    """Among people of the age and sex that were given, by the ranges that were given."""
    _, _, out, _ = segmented
    both = (*table(out, "desc-volumetric"), *table(out, "desc-totals"))
    rows = {row["name"]: row for row in both}
    volumes = {s.name: float(rows[s.name]["volume_mm3"]) for s in parcellation.structures}
    wanted = percentiles(age_ranges, volumes, parcellation, Person(40.0, "F"))
    found = {name: row["percentile"] for name, row in rows.items() if row["percentile"] != "n/a"}
    assert "Left-Cerebral-Cortex" in found
    assert "Brain-Segmentation" in found
    assert {*found} == {*wanted} & {*rows}
    for name, text in found.items():
        assert float(text) == pytest.approx(wanted[name].value, abs=0.06)
        row = rows[name]
        assert float(row["percentile_low"]) <= float(text) <= float(row["percentile_high"])
    described = json.loads(anat(out, "desc-volumetric_morph.json").read_text())
    assert described["percentile"]["MeasuredOn"] == "60 made-up people"
    sidecar = json.loads(anat(out, "seg-cadiff_desc-structures_dseg.json").read_text())
    assert (sidecar["AgeYears"], sidecar["Sex"]) == (40.0, "F")
    assert sidecar["Settings"]["ranges"] == age_ranges.fingerprint
    assert 'id="age"' in (out / "sub-01_ses-a.html").read_text()


def test_the_sidecar_says_how(segmented, tiny_weights):
    _, source, out, _ = segmented
    sidecar = json.loads(anat(out, "seg-cadiff_desc-structures_dseg.json").read_text())
    assert sidecar["Model"]["WeightsSHA256"] == sha256(tiny_weights)
    assert (sidecar["Seed"], sidecar["Steps"]) == (5, 1)
    assert sidecar["Templates"][0]["Name"] == "MNI152NLin2009aSym"
    assert sidecar["Templates"][0]["Registration"] == "affine"
    assert sidecar["Sources"][0] == f"../{source.name}"
    assert set(sidecar["Sources"][1:]) == {
        f"bids::{anat(Path(), name).as_posix()}"
        for name in (
            "res-1_desc-brain_T1w.nii.gz",
            "desc-brain_mask.nii.gz",
            "from-MNI152NLin2009aSym_to-T1w_mode-image_xfm.h5",
        )
    }
    assert set(sidecar["Seconds"]) == {"strip", "register", "field", "segment"}
    assert all(seconds > 0 for seconds in sidecar["Seconds"].values())
    assert sidecar["Packages"]["torch"]
    assert sidecar["GeneratedBy"][0]["Name"] == "cadiff"
    assert sidecar["SkullStripping"] == "none"


def test_posteriors_and_field_are_what_they_say(segmented):
    _, _, out, _ = segmented
    p = np.asarray(nib.load(anat(out, "seg-cadiff_probseg.nii.gz")).dataobj)
    np.testing.assert_allclose(p.sum(-1), 1, atol=5e-3)
    labels = np.asarray(nib.load(anat(out, "seg-cadiff_desc-structures_dseg.nii.gz")).dataobj)
    # Ties in half precision may fall either way.
    assert (load_parcellation(BASE).codes[p.argmax(-1)] == labels).mean() > 0.999
    field = np.asarray(nib.load(anat(out, "desc-distance_field.nii.gz")).dataobj)
    left, right = (field[..., 0][labels == code] for code in (3, 42))
    assert np.median(left) < 0.5 < np.median(right)


def test_what_a_killed_run_has_left_is_replaced(small_head, tiny_weights, tmp_path):
    """But not what somebody else has written.  The second run tells every stage, what found the
    brain, and at the end again what is to be looked at."""
    source, out = tmp_path / "sub-01_ses-a_T1w.nii.gz", tmp_path / "out"
    save_volume(source, small_head.t1.data, small_head.t1.grid)
    arguments = (*map(str, (source, "-o", out, "--model", tiny_weights)), *QUICK, "-v")
    left = anat(out, "desc-brain_mask.nii.gz")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half of a mask")
    done = call("cadiff-seg", *arguments)
    assert done.returncode == 73
    assert left.read_bytes() == b"half of a mask"
    journal = Journal(out)
    name = "sub-01_ses-a"
    with journal.lock(name, wait=False), pytest.raises(SystemExit), journal.writing(name):
        raise SystemExit(143)
    done = call("cadiff-seg", *arguments)
    assert done.returncode == 0, done.stderr
    assert nib.load(left).shape
    begun, end = done.stderr.split("done: ")
    for stage in ("load", "strip", "register", "segment", "write"):
        assert re.search(rf"s  {stage}\b", begun)
    assert "what is not background: nothing was stripped" in end
    said = json.loads(anat(out, "seg-cadiff_desc-structures_dseg.json").read_text())["Warnings"]
    assert said
    assert end.count("look: ") == len(said)


def test_a_run_that_sigterm_ends_says_so(capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)  # keep the handlers of this process
    assert guarded(lambda: sys.exit(TERMINATED)) == 143
    assert capsys.readouterr().err.startswith("cadiff: error: ended by SIGTERM")
    with pytest.raises(SystemExit):  # any other end is the command's own
        guarded(lambda: sys.exit(7))


def test_a_second_run_does_not_overwrite(segmented):
    _, _, out, arguments = segmented
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    done = call("cadiff-seg", *arguments)
    assert done.returncode == 73
    assert "--overwrite" in one_line(done)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_two_do_not_write_the_same_results(segmented, tmp_path):
    """Whichever command the other one is; what stays of the second is its lock."""
    *_, arguments = segmented
    out = tmp_path / "out"
    arguments = [str(out) if a == arguments[2] else a for a in arguments]
    with Journal(out).lock("sub-01_ses-a", wait=False) as mine:
        assert mine
        done = call("cadiff-seg", *arguments)
    assert done.returncode == 73
    assert "another cadiff" in one_line(done)
    assert not list(out.rglob("*.nii.gz"))


def test_a_missing_mask_is_said_before_anything_is_done(segmented):
    _, _, out, arguments = segmented
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    done = call("cadiff-seg", *arguments, "--overwrite", "--mask", "no-such-mask.nii.gz")
    assert done.returncode == 66
    assert "no-such-mask" in one_line(done)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_failed_run_leaves_no_result(segmented, tmp_path):
    """Missing weights are found after the checks; what is left is log and lock."""
    _, source, _, _ = segmented
    done = call(
        *("cadiff-seg", str(source), "-o", str(tmp_path / "out")),
        *("--template", "MNI152NLin2009aSym", "--offline", "--model", "none.safetensors"),
    )
    assert done.returncode == 66
    line = one_line(done)
    assert all(name in line for name in ("cadiff-malc", "cadiff-synth", "or a .safetensors file"))
    left = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert sorted(p.suffix for p in left) == [".lock", ".log"]
    assert "Traceback" in left[0].read_text()


def test_evaluate_prints_a_table_and_nothing_else(segmented, tmp_path):
    """A segmentation against itself; other libraries' warnings are not the user's business."""
    _, _, out, _ = segmented
    path, scores = str(anat(out, "seg-cadiff_desc-structures_dseg.nii.gz")), tmp_path / "scores"
    done = call("cadiff", "evaluate", path, path, "--reference-labels", "cadiff", "-o", str(scores))
    assert done.returncode == 0
    assert done.stdout.count("1.0000") >= 8
    assert len(list(scores.iterdir())) == 3
    assert done.stderr == ""


def test_the_documents_show_options_that_exist():
    """Each line of a command in README and docs, against that command's own options."""
    known = {}
    for name, command in every_command():
        known[name] = {"--help", "-h"}
        for parameter in command.params:
            known[name].update(parameter.opts, parameter.secondary_opts)
    checked = set()
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        blocks = path.read_text(encoding="utf-8").split("```")[1::2]
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        for line in (re.sub(r"\s#.*", "", text) for text in lines):
            if begun := re.match(r"(?:\S+=\S+ )*cadiff ([a-z]\S*)", line):
                assert begun[1] in known, (path.name, line)
            for said in re.findall(r"\bcadiff(?:-seg| [a-z-]+)(?= ).*", line):
                name, *words = said.replace("cadiff-seg", "cadiff seg").split()[1:]
                if words and f"{name} {words[0]}" in known:
                    name = f"{name} {words[0]}"
                if name in known:
                    options = {word.split("=")[0] for word in words if word.startswith("-")}
                    assert options <= known[name], (path.name, line)
                    checked.add(name)
    assert checked >= {"seg", "run", "train", "evaluate", "atlas make"}
