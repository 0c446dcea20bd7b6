"""Plans, journals and teams, without running anything."""

import errno
import gzip
import hashlib
import json
import os
import tomllib
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cadiff_cli import machine
from cadiff_cli.cli.options import Memory, Words
from cadiff_cli.cli.run import command
from cadiff_cli.config import (
    Config,
    OutputConfig,
    Recipe,
    RegisterConfig,
    SampleConfig,
    StripConfig,
)
from cadiff_cli.errors import DataError, DiskError, OutputError, UnsuitableError
from cadiff_cli.io import checksums
from cadiff_cli.io.bids import layout
from cadiff_cli.io.bids.layout import Derivatives, Finished, finished_result
from cadiff_cli.io.bids.raw import Dataset
from cadiff_cli.io.bids.selection import Selection
from cadiff_cli.io.files import locked, read_json, sha256, write_text, write_tsv
from cadiff_cli.io.provenance import Provenance, make_recipe
from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.products import Calibration, Person
from cadiff_cli.quality.calibration import calibration
from cadiff_cli.runner.executor import SCAN_BYTES, Executor
from cadiff_cli.runner.job import Job, Outcome
from cadiff_cli.runner.journal import Journal, failure
from cadiff_cli.runner.participants import _line
from cadiff_cli.runner.plan import make_plan, scan_names


def recipe_of(template="MNIColin27", posteriors=False, **sample):
    config = Config(sample=SampleConfig(**sample), output=OutputConfig(posteriors=posteriors))
    return Recipe(config, template, "cadiff-malc", "0" * 64)


def job_of(out, entities="sub-01_ses-a", **recipe):
    t1 = out.parent / f"{entities}_T1w.nii.gz"
    return Job(t1, out, f"bids:raw:{t1.name}", recipe_of(**recipe), "auto", "cadiff-malc", "run-1")


def test_a_fingerprint_changes_with_what_decides_the_result(monkeypatch):
    base = recipe_of().fingerprint
    assert recipe_of().fingerprint == base
    assert recipe_of(steps=1).fingerprint != base
    assert recipe_of("MNI152NLin2009aSym").fingerprint != base
    assert replace(recipe_of(), calibration="0" * 12).fingerprint != base
    monkeypatch.setattr("cadiff_cli.config.REVISION", 10_000)
    assert recipe_of().fingerprint != base


def test_a_recipe_knows_the_calibration_in_use(toy_template, monkeypatch):
    """Another measurement gives other results; without a network that is given a field, none."""
    found = Calibration("0" * 64, "", (0.0, 1.0), (0.0, 0.5))
    monkeypatch.setattr("cadiff_cli.quality.calibration.load_calibration", lambda _: found)

    def calibrated(**settings):
        config = Config(**settings)
        templates, in_use = [toy_template(spacing=8.0)], calibration(config, "0" * 64)
        return make_recipe(config, templates, "m", "0" * 64, in_use).calibration

    first = calibrated()
    assert len(first) == 12
    found = replace(found, dice=(0.0, 0.6))
    assert calibrated() not in ("", first)
    assert calibrated(sample=SampleConfig(steps=0)) == ""
    assert calibrated(register=RegisterConfig("none")) == ""


def test_settings_hold_no_paths():
    mask = Path("/home/somebody/mask.nii.gz")
    recipe = Recipe(Config(strip=StripConfig(mask=mask)), "x", "m", "0" * 64)
    assert "somebody" not in json.dumps(recipe.settings())


def test_differences_are_named():
    made = Provenance("old", recipe_of(steps=5).settings())
    assert made.differs(recipe_of(steps=1)) == "sample.steps 5 -> 1"
    assert Provenance(recipe_of().fingerprint).differs(recipe_of()) == ""
    assert Provenance("old").differs(recipe_of()) != ""
    assert made.differs(recipe_of()) == "other settings"
    made = Provenance("old", recipe_of(seed=10**39).settings())
    assert made.differs(recipe_of(seed=10**39 + 1)) == ("sample.seed ...000000000 -> ...000000001")
    long = Provenance("old", recipe_of(seed=7 * 10**39).settings()).differs(recipe_of())
    assert long == "sample.seed 700000000000000000000000... -> 0"


def test_a_mask_mended_by_hand_is_no_other_way_of_making_a_dataset():
    def changes(method, **sample):
        config = Config(strip=StripConfig(mask=Path("m.nii.gz")), sample=SampleConfig(**sample))
        settings = replace(recipe_of(), config=config).settings()
        return Provenance("x", settings, skull_stripping=method).differs(recipe_of())

    assert changes("mask file") == ""
    assert changes("net") != ""
    assert (
        changes("mask file", steps=1)
        == "sample.steps 1 -> 5; a mask of somebody's own would be lost"
    )


def is_finished(job):
    return job.is_finished(finished_result(job.place))


def test_a_result_is_current_until_settings_or_input_change(tmp_path):
    job = job_of(tmp_path / "out")
    job.t1.write_text("image")
    recipe = job.recipe
    sidecar = {"Fingerprint": recipe.fingerprint, "Settings": recipe.settings()}
    for name, text in (
        ("seg-cadiff_dseg.json", json.dumps({**sidecar, "SourceSHA256": sha256(job.t1)})),
        ("seg-cadiff_dseg.nii.gz", ""),
        ("desc-volumetric_morph.tsv", ""),
    ):
        assert not is_finished(job)
        write_text(job.place.path(name), text)
    assert is_finished(job)
    other = replace(job, recipe=recipe_of(steps=1))
    with pytest.raises(OutputError, match=r"sample\.steps 5 -> 1"):
        is_finished(other)
    assert not is_finished(replace(other, overwrite=True))
    job.t1.write_text("another image")
    with pytest.raises(OutputError, match="has changed since"):
        is_finished(job)
    job.t1.unlink()
    assert is_finished(job)
    labels = job.place.path("seg-cadiff_dseg.nii.gz")
    labels.unlink()
    assert not is_finished(job)
    labels.symlink_to("../../../.git/annex/objects/elsewhere")  # datalad drop
    assert is_finished(job)
    with pytest.raises(OutputError, match="is there already"):
        job.place.check_free(tmp_path, overwrite=False)


def test_only_what_was_cut_short_is_replaced_unasked(tmp_path):
    """A mask that was drawn after a scan had failed is its owner's."""
    place, journal = Derivatives(tmp_path, Path("sub-01_T1w.nii")), Journal(tmp_path)
    drawn = place.path("desc-brain_mask.nii.gz")
    write_text(drawn, "half of a mask")
    with pytest.raises(SystemExit), journal.writing(place.stem):
        raise SystemExit(143)
    journal.make_room(place, overwrite=False)
    journal.forget(place.stem)  # as cadiff mask does
    with pytest.raises(OutputError, match="is there already"):
        journal.make_room(place, overwrite=False)
    with journal.writing(place.stem):
        write_text(drawn, "all of it")
    with pytest.raises(OutputError, match="is there already"):
        journal.make_room(place, overwrite=False)
    sidecar = place.path("seg-cadiff_dseg.json")
    write_text(sidecar, '{"Manual": true}')  # somebody's own labels
    with pytest.raises(OutputError, match="is there already"):
        journal.make_room(place, overwrite=False)
    write_text(sidecar, '{"Fingerprint": "x"}')  # ours, and the rest of the result is gone
    journal.make_room(place, overwrite=False)
    sidecar.unlink()
    sidecar.symlink_to(tmp_path / "annex" / "object")  # a clone without the content
    drawn.unlink()
    with pytest.raises(OutputError, match=r"link to a file that is absent.*datalad get"):
        journal.make_room(place, overwrite=False)


@pytest.mark.parametrize(
    ("n_jobs", "limits", "team"),
    [
        (8, {"nprocs": 4}, (4, 1)),
        (1, {"nprocs": 4}, (1, 4)),
        (3, {"nprocs": 8}, (3, 2)),
        (8, {"nprocs": 8, "omp_nthreads": 4}, (2, 4)),
        (8, {"nprocs": 4, "memory_bytes": 2 * SCAN_BYTES}, (2, 2)),
        (8, {"nprocs": 4, "memory_bytes": 1}, (1, 4)),
        (8, {"nprocs": 2, "omp_nthreads": 4}, (1, 4)),
    ],
)
def test_teams_fit_the_machine(tmp_path, n_jobs, limits, team):
    limits = {"memory_bytes": 100 * SCAN_BYTES, **limits}
    assert Executor(**limits).team([job_of(tmp_path)] * n_jobs) == team


@pytest.mark.parametrize("wish", [{"posteriors": True}, {"samples": 2}], ids=str)
def test_some_wishes_need_more_memory(tmp_path, wish):
    limits = Executor(nprocs=4, memory_bytes=4 * SCAN_BYTES)
    plain, costly = (limits.team([job_of(tmp_path, **w)] * 4)[0] for w in ({}, wish))
    assert costly < plain


def test_a_container_is_smaller_than_its_host(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "membership").write_text("0::/\n")
    cores, memory = machine.cores(), machine.free_memory_bytes()
    assert cores >= 1
    (tmp_path / "cpu.max").write_text("100000 100000")
    (tmp_path / "memory.max").write_text(str(2**20))
    (tmp_path / "memory.current").write_text("0")
    assert machine.cores() == 1
    assert machine.free_memory_bytes() == 2**20 < memory
    (tmp_path / "cpu.max").write_text("max 100000")
    (tmp_path / "memory.max").write_text("max")
    assert machine.cores() == cores


@pytest.mark.parametrize("limited", ["slurm/job_1", "slurm"])
def test_a_job_is_smaller_than_its_machine(tmp_path, monkeypatch, limited):
    """The group that holds this process, or one above it; memory that files fill is free."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "membership").write_text("0::/slurm/job_1\n")
    (tmp_path / "slurm" / "job_1").mkdir(parents=True)
    folder = tmp_path / limited
    (folder / "cpu.max").write_text("100000 100000")
    (folder / "memory.max").write_text("1000000")
    (folder / "memory.current").write_text("900000")
    (folder / "memory.stat").write_text("anon 500000\ninactive_file 400000\n")
    assert machine.cores() == 1
    assert machine.free_memory_bytes() == 500_000


def test_the_first_version_of_control_groups_counts_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "membership").write_text("4:memory:/box\n1:cpu,cpuacct:/box\n")
    for name, value in (
        ("memory/box/memory.limit_in_bytes", 2**20),
        ("memory/box/memory.usage_in_bytes", 0),
        ("cpu/box/cpu.cfs_quota_us", 150_000),
        ("cpu/box/cpu.cfs_period_us", 100_000),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{value}\n")
    assert machine.free_memory_bytes() == 2**20
    assert machine.cores() == 1
    (tmp_path / "cpu/box/cpu.cfs_quota_us").write_text("-1\n")
    assert machine.cores() == 8


def test_a_full_disk_is_told_apart_whoever_meets_it(tmp_path):
    for number in (errno.ENOSPC, errno.EDQUOT):
        outcome = failure(job_of(tmp_path), OSError(number, "No space left on device"))
        assert outcome.exit_code == DiskError.exit_code
        assert "No space left on device" in (tmp_path / outcome.crash_file).read_text()
    eio = failure(job_of(tmp_path), OSError(errno.EIO, "Input/output error"))
    assert eio.exit_code == 1  # a bad sector under one scan is no reason to end the run


def test_a_journal_remembers_the_last_outcome(tmp_path):
    journal = Journal(tmp_path)
    assert journal.read("sub-01") is None
    for outcome in (
        Outcome("sub-01", "failed", 1.5, "no brain", 65, "sub-01/log/x/crash.txt"),
        Outcome("sub-01", "done", 2.0, warnings=(Note(NoteCode.BIAS, "look"),)),
    ):
        journal.record(outcome)
        assert journal.read("sub-01") == outcome
    (tmp_path / "logs" / "journal" / "sub-01.json").write_text("{half")
    assert journal.read("sub-01") is None


def test_half_written_records_and_pages_of_a_killed_run_go(tmp_path):
    journal = Journal(tmp_path)
    journal.folder.mkdir(parents=True)
    gone = [
        journal.folder / ".sub-01.json.x1.json",
        journal.folder / ".sub-01.begun.x1.begun",
        tmp_path / ".sub-01.html.x1.html",
    ]
    kept = [journal.folder / ".sub-01_ses-2.json.x1.json", tmp_path / ".sub-01.txt"]
    for path in (*gone, *kept):
        path.touch()
    with journal.lock("sub-01", wait=False):
        assert not any(path.exists() for path in gone)
        # Whoever does not hold the lock touches nothing: the holder may be writing.
        gone[0].touch()
        with journal.lock("sub-01", wait=False) as mine:
            assert not mine
        assert gone[0].exists()
    assert all(path.exists() for path in kept)


def test_one_process_at_a_time_has_a_scan(tmp_path):
    """Locks are the file's, so two in one process stand for two processes."""
    journal = Journal(tmp_path)
    with journal.lock("sub-01", wait=False) as first:
        assert first
        with journal.lock("sub-01", wait=False) as second:
            assert not second
        with journal.lock("sub-02", wait=False) as other:
            assert other
    with locked(tmp_path / "logs" / "journal" / "sub-01.lock", wait=True) as again:
        assert again


def test_a_failure_is_recorded_with_what_is_needed_to_mend_it(tmp_path):
    job = job_of(tmp_path / "out", steps=3)
    try:
        raise DataError("no brain\nfound", "give a mask")
    except DataError as error:
        outcome = failure(job, error, 3.21)
    assert (outcome.status, outcome.exit_code, outcome.seconds) == ("failed", 65, 3.2)
    assert outcome.message == "no brain found. give a mask"
    text = (job.out / outcome.crash_file).read_text()
    for needed in (str(job.t1), '"steps": 3', "Traceback", "test_runner.py"):
        assert needed in text
    assert Journal(job.out).read("sub-01_ses-a") == outcome


def test_an_unsuitable_scan_is_not_tried_again_until_something_changes(tmp_path):
    job = job_of(tmp_path / "out")
    job.t1.write_text("a slab")
    outcome = failure(job, UnsuitableError("too small", "give a whole head"), 1.0)
    journal = Journal(job.out)
    assert (outcome.status, outcome.crash_file) == ("unsuitable", "")
    assert journal.unsuitable(job) == outcome == journal.read(job.entities)
    assert journal.unsuitable(replace(job, overwrite=True)) is None
    assert journal.unsuitable(replace(job, recipe=recipe_of(steps=1))) is None
    job.t1.write_text("a head")
    assert journal.unsuitable(job) is None
    job.t1.unlink()  # datalad drop
    assert journal.unsuitable(job) == outcome
    failure(job, UnsuitableError("what is gone", ""))  # nor does a record of it raise
    failure(job, DataError("damaged", ""))
    assert journal.unsuitable(job) is None


@pytest.fixture
def dataset(tmp_path):
    """A dataset of files; what is in them does not matter here."""

    def make(**contents):
        root = tmp_path / "bids"
        root.mkdir()
        (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
        for number, files in contents.items():
            for name, content in files.items():
                path = root / f"sub-{number}" / "anat" / f"sub-{number}_{name}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return Dataset(root)

    return make


def without_page(out):
    """A job for no scan in particular."""
    like = job_of(out)
    config = replace(like.recipe.config, output=OutputConfig(report=False))
    return replace(like, recipe=replace(like.recipe, config=config))


def finish(like, **inputs):
    """Finished results of participants by name, made of inputs of this content."""
    made = {"Fingerprint": like.recipe.fingerprint, "Settings": like.recipe.settings()}
    for name, content in inputs.items():
        place = Derivatives(like.out, Path(f"sub-{name}_T1w.nii.gz"))
        told = {**made, "SourceSHA256": hashlib.sha256(content).hexdigest()}
        write_text(place.path("seg-cadiff_dseg.json"), json.dumps(told))
        for result in ("seg-cadiff_dseg.nii.gz", "desc-volumetric_morph.tsv"):
            write_text(place.path(result), "")


def test_one_scans_trouble_is_that_scans(dataset, tmp_path):
    """Two files of one image are one; two images of one name fail, whatever the others are."""
    packed = gzip.compress(b"image")
    raw = dataset(
        A={"T1w.nii": b"image", "T1w.nii.gz": packed},
        B={"T1w.nii": b"another", "T1w.nii.gz": packed},
        C={"T1w.nii": b"image", "T1w.nii.gz": packed[:-9]},
        D={"T1w.nii.gz": packed, "UNIT1.nii.gz": packed},
        E={"T1w.nii.gz": b"sound"},
        F={"T1w.nii.gz": b"changed"},
        G={"T1w.nii.gz": b"finished"},
    )
    like = without_page(tmp_path / "out")
    finish(like, F=b"before", G=b"finished")
    both = Selection(filters={"suffix": ["T1w", "UNIT1"]})
    plan = make_plan(raw, both, like)
    assert plan.status == {
        **dict.fromkeys(("sub-A", "sub-E"), "todo"),
        **dict.fromkeys(("sub-B", "sub-C", "sub-D", "sub-F"), "failed"),
        "sub-G": "done",
    }
    assert [job.t1.name for job in plan.jobs] == ["sub-A_T1w.nii.gz", "sub-E_T1w.nii.gz"]
    assert plan.jobs[0].source == "bids:raw:sub-A/anat/sub-A_T1w.nii.gz"
    assert "sub-A_T1w.nii.gz is taken; sub-A_T1w.nii is the same image" in plan.notes
    why = {job.entities: str(error) for job, error in plan.failed}
    assert "extension" in why["sub-B"]
    assert why["sub-C"].startswith("sub-C_T1w.nii and sub-C_T1w.nii.gz are not the same image")
    assert '"suffix"' in why["sub-D"]
    assert "sub-F_T1w.nii.gz has changed since" in why["sub-F"]
    assert scan_names(raw, both) == [f"sub-{x}" for x in "ABCDEFG"]
    # But a dataset is made one way.
    with pytest.raises(OutputError, match="sub-F, made otherwise"):
        make_plan(raw, Selection(("E",)), replace(like, recipe=recipe_of(steps=1)))


def test_each_session_is_planned_for_its_own_age(dataset, tmp_path):
    raw = dataset()
    for name in "ab":
        anat = raw.root / "sub-A" / f"ses-{name}" / "anat"
        anat.mkdir(parents=True)
        for run in (1, 2):
            (anat / f"sub-A_ses-{name}_run-{run}_T1w.nii.gz").write_bytes(b"image %d" % run)
    (raw.root / "participants.tsv").write_text("participant_id\tage\tsex\nsub-A\t60\tF\n")
    table = raw.root / "sub-A" / "sub-A_sessions.tsv"
    table.write_text("session_id\tage\nses-b\t64.5\n")
    plan = make_plan(raw, Selection(), without_page(tmp_path / "out"))
    assert {job.entities: job.person for job in plan.jobs} == {
        f"sub-A_ses-{name}_run-{run}": Person(age, "F")
        for name, age in (("a", 60.0), ("b", 64.5))
        for run in (1, 2)
    }
    assert not [note for note in plan.notes if "participants.tsv" in note]
    table.unlink()
    notes = make_plan(Dataset(raw.root), Selection(), without_page(tmp_path / "out")).notes
    (note,) = (note for note in notes if "participants.tsv" in note)
    assert "several sessions of 1 participant (sub-A)" in note


@pytest.fixture
def planned_again(dataset, tmp_path, monkeypatch):
    """Plan a dataset of ``n`` finished scans twice; then plan it and tell what was read."""
    read = list[str]()

    def counted(function):
        return lambda path: read.append(path.name) or function(path)

    monkeypatch.setattr(checksums, "FRESH_NS", -(10**18))
    monkeypatch.setattr(checksums, "sha256", counted(sha256))
    monkeypatch.setattr(layout, "read_json", counted(read_json))

    def make(n):
        inputs = {f"{k:02}": f"scan {k}".encode() for k in range(n)}
        raw = dataset(**{name: {"T1w.nii.gz": content} for name, content in inputs.items()})
        like = without_page(tmp_path / "out")
        finish(like, **inputs)
        (like.out / "logs" / "journal").mkdir(parents=True)

        def plan(job=like, participants=()):
            checksums.checksums.cache_clear()  # as in another process
            read.clear()
            return make_plan(raw, Selection(participants), job), [*read]

        assert len(plan()[1]) == 2 * n
        return plan, raw, like

    return make


@pytest.mark.parametrize("n", [2, 9])
def test_what_a_plan_reads_does_not_grow_with_finished_scans(planned_again, n):
    """Neither inputs nor sidecars are read a second time."""
    plan, _, like = planned_again(n)
    done = dict.fromkeys((f"sub-{k:02}" for k in range(n)), "done")
    again, read = plan()
    assert (again.status, read) == (done, [])
    one, read = plan(participants=("01",))
    assert (one.status, read) == ({"sub-01": "done"}, [])
    # A new scan costs no more than itself.
    Derivatives(like.out, Path("sub-01_T1w.nii")).path("seg-cadiff_dseg.json").touch()
    (like.out / "logs" / "journal" / "inputs.tsv").write_text("")
    again, read = plan(participants=("01",))
    assert (again.status, sorted(read)) == (
        {"sub-01": "done"},
        ["sub-01_T1w.nii.gz", "sub-01_seg-cadiff_dseg.json"],
    )


def test_what_is_known_by_its_times_is_read_again_once_it_changes(planned_again):
    """Input, settings, weights, labels, volumes and sidecar: none may change unseen."""
    plan, raw, like = planned_again(5)
    places = [Derivatives(like.out, Path(f"sub-{k:02}_T1w.nii")) for k in range(5)]
    for recipe in (replace(like.recipe, weights_sha256="1" * 64), recipe_of(steps=1)):
        with pytest.raises(OutputError, match="made otherwise"):
            plan(replace(like, recipe=recipe))
        assert {*plan(replace(like, recipe=recipe, overwrite=True))[0].status.values()} == {"todo"}
    (raw.root / "sub-00" / "anat" / "sub-00_T1w.nii.gz").write_bytes(b"SCAN 0")
    places[1].path("seg-cadiff_dseg.nii.gz").unlink()
    places[2].path("desc-volumetric_morph.tsv").unlink()
    places[3].path("seg-cadiff_dseg.json").write_text("{}")
    changed, _ = plan()
    assert changed.status == {
        "sub-00": "failed",
        **dict.fromkeys(("sub-01", "sub-02", "sub-03"), "todo"),
        "sub-04": "done",
    }
    assert "has changed since" in str(changed.failed[0][1])
    sidecar = places[4].path("seg-cadiff_dseg.json")
    sidecar.write_text(sidecar.read_text().replace(like.recipe.fingerprint, "0" * 12))
    with pytest.raises(OutputError, match="sub-04, made otherwise"):
        plan()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_two_files_of_one_image_are_told_by_content(dataset, tmp_path, pack):
    """Whichever of the two is compressed, and whatever their names say."""
    raw = dataset(A={"T1w.nii": gzip.compress(b"image", mtime=1), "T1w.nii.gz": pack(b"image")})
    plan = make_plan(raw, Selection(), job_of(tmp_path / "out"))
    assert plan.status == {"sub-A": "todo"}


def test_another_image_of_the_same_name_is_not_called_changed(tmp_path):
    job = job_of(tmp_path / "out")
    unit1 = replace(job, t1=job.t1.with_name("sub-01_ses-a_UNIT1.nii.gz"))
    unit1.t1.write_text("image")
    assert unit1.entities == job.entities
    source = f"bids:raw:x/{job.t1.name}"
    made = Provenance(job.recipe.fingerprint, source=source, source_sha256="0" * 64)
    assert (
        unit1.outdated(Finished(job.entities, Path(), made))
        == "of sub-01_ses-a_T1w.nii.gz, not of sub-01_ses-a_UNIT1.nii.gz"
    )


def test_tables_hold_no_tabs_or_quotes_of_their_own(tmp_path):
    write_tsv(tmp_path / "x.tsv", ("a", "b"), [('say "hi"\tor\nbye', None)])
    assert (tmp_path / "x.tsv").read_text() == 'a\tb\nsay "hi" or bye\tn/a\n'


@pytest.mark.parametrize(
    "words",
    [
        ["ds", "out", "participant", "--label", "01", "02", "-v"],
        ["ds", "out", "participant", "-v", "--label", "01", "--label", "02"],
        ["--label", "01", "02", "-v", "ds", "out", "participant"],
        ["ds", "out", "participant", "-v", "--label=01", "02"],
    ],
)
def test_an_option_takes_every_word_up_to_the_next(words):
    @click.command()
    @click.argument("places", nargs=3)
    @click.option("--label", cls=Words)
    @click.option("-v", is_flag=True)
    def app(places, label, v):
        click.echo(json.dumps([places, label, v]))

    answer = CliRunner().invoke(app, words)
    assert json.loads(answer.output) == [["ds", "out", "participant"], ["01", "02"], True]


@pytest.mark.parametrize(
    ("text", "size"),
    [("16G", 2**34), ("16GB", 2**34), ("1.5g", 3 * 2**29), ("8000", 8000 * 2**20), ("5B", 5)],
)
def test_memory_is_read_as_fmriprep_reads_it(text, size):
    assert Memory().convert(text, None, None) == size


def test_a_config_file_with_a_typo_is_refused(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("stepz = 3\n")
    assert tomllib.loads(path.read_text())
    answer = CliRunner().invoke(command, ["a", "b", "participant", "--config-file", str(path)])
    assert answer.exit_code == 2
    assert "did you mean 'steps'" in answer.output


@pytest.mark.parametrize(
    "line",
    [
        *("steps = 0.5", "steps = true", "samples = [1]", "nprocs = 1.9", "flip = 0"),
        *("ranges = [3]", "work_dir = true", "overwrite = 1", 'participant_label = [["01"]]'),
        *("version = true", "steps = 2026-01-01"),
    ],
)
def test_a_config_files_values_are_checked_like_options(line, tmp_path):
    """Not cut, nor taken for true."""
    path = tmp_path / "x.toml"
    path.write_text(f"{line}\n")
    with pytest.raises(click.UsageError) as caught:
        command.make_context("run", ["a", "b", "participant", "--config-file", str(path)])
    assert line.split()[0].replace("_", "-") in caught.value.format_message().replace("_", "-")


def test_a_config_file_takes_numbers_texts_and_lists(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(
        'steps = 3\nmem = 1000\nflip = false\nparticipant_label = ["01", "02"]\nranges = "r.tsv"\n'
        'session_label = "a"\n'
    )
    with command.make_context("run", ["a", "b", "group", "--config-file", str(path)]) as context:
        taken = context.params
    assert (taken["steps"], taken["mem"], taken["flip"]) == (3, 1000 * 2**20, False)
    assert taken["participant_label"] == ("01", "02")
    assert taken["session_label"] == ("a",)
    assert taken["ranges"] == Path("r.tsv")


@pytest.mark.parametrize("text", ["plain", "a\x7fb", 'quote " and \\', "脑", "tab\t"])
def test_options_of_any_text_are_kept(text):
    assert tomllib.loads(_line("ranges", text)) == {"ranges": text}


def test_an_option_that_toml_cannot_hold_is_named():
    line = _line("ranges", "\udcff")
    assert tomllib.loads(line) == {}
    assert "ranges" in line


def test_a_config_file_may_use_an_options_older_name(tmp_path):
    """Logs of runs from before ``--template`` say ``atlas``."""
    path = tmp_path / "x.toml"
    path.write_text('atlas = "MNIColin27"\n')
    with command.make_context("run", ["a", "b", "group", "--config-file", str(path)]) as context:
        assert context.params["template"] == "MNIColin27"
