"""Runs that are killed, or that meet one another: nothing is lost, the next run completes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bids_dataset import QUICK, command, environment, here, write_dataset
from kill_runs import workers

from cadiff_cli.io.bids.layout import finished

NAMES = ("sub-01", "sub-02")
SECONDS = 900.0

pytestmark = pytest.mark.slow


@pytest.fixture
def dataset(small_head, tmp_path):
    return write_dataset(tmp_path / "bids", small_head, [f"{name}_T1w" for name in NAMES])


@pytest.fixture
def arguments(tiny_weights, tmp_path):
    quick = (*QUICK, "--registration", "none", "--model", tiny_weights)
    return (*quick, "-w", tmp_path / "work", "--skip-bids-validation")


@pytest.fixture
def start(dataset, arguments, tmp_path):
    """Start ``cadiff run`` in a process group of its own; whatever is left is killed at the end."""
    begun = []

    def go(*more):
        process = subprocess.Popen(
            command("run", dataset, tmp_path / "out", "participant", *arguments, *more),
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        begun.append(process)
        return process

    yield go
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(condition):
    """Wait for something true."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def stage(out, name):
    """Whether some scan's log says that this stage began."""
    return lambda: any(f"stage {name}" in log.read_text() for log in out.rglob("sub-*.log"))


def is_complete(dataset, out, arguments):
    """The next run finishes what is left; there are no remains, and the validator agrees."""
    done = here("run", dataset, out, "participant", *arguments)
    assert done.returncode == 0, done.stderr
    assert [result.entities for result in finished(out)] == list(NAMES)
    assert not [path for path in out.rglob(".*") if path.name != ".bidsignore"]
    status = [json.loads(path.read_text()) for path in out.glob("logs/journal/*.json")]
    assert {entry["status"] for entry in status} == {"done"}
    program = Path(sys.executable).with_name("bids-validator-deno")
    if program.exists():
        checked = subprocess.run([program, out], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout


def test_sigkill_of_everything_leaves_what_the_next_run_completes(
    start, dataset, arguments, tmp_path
):
    """Early, with two workers; ``test_killed`` kills when results are written."""
    out = tmp_path / "out"
    process = start("--nprocs", "2")
    until(stage(out, "register"))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [*finished(out)] == []  # nothing claims to be complete
    is_complete(dataset, out, arguments)


def test_sigterm_stops_workers_and_cleans_up(start, dataset, arguments, tmp_path):
    """As a batch system ends a job; in ITK, whose code knows no signals."""
    out, itk = tmp_path / "out", ("--registration", "affine")
    process = start("--nprocs", "1", *itk)
    until(stage(out, "register"))
    (worker,) = workers(process.pid)
    process.terminate()
    assert process.wait(SECONDS) == 143
    assert not Path(f"/proc/{worker}").exists()
    assert list((tmp_path / "work").iterdir()) == []
    is_complete(dataset, out, (*arguments, *itk))


def test_workers_do_not_outlive_a_killed_parent(start, tmp_path):
    out = tmp_path / "out"
    process = start("--nprocs", "1")
    until(stage(out, "strip"))
    (worker,) = workers(process.pid)
    process.kill()
    process.wait()
    until(lambda: not Path(f"/proc/{worker}").exists())
    assert list(finished(out)) == []


def test_a_killed_worker_costs_nothing(start, tmp_path):
    """As when memory runs out: the scan is tried again, the others go on."""
    out = tmp_path / "out"
    process = start("--nprocs", "1")
    until(stage(out, "register"))
    os.kill(next(workers(process.pid)), signal.SIGKILL)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert [result.entities for result in finished(out)] == list(NAMES)


def test_a_scan_that_kills_every_worker_is_a_failure(start, tmp_path):
    out = tmp_path / "out"
    process = start("--nprocs", "1", "--participant-label", "01")
    killed = set()
    for _ in range(2):
        (worker,) = until(lambda: set(workers(process.pid)) - killed)
        killed.add(worker)
        os.kill(worker, signal.SIGKILL)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, said
    assert "ended by SIGKILL, 2 times" in said
    (crash,) = out.rglob("crash-*")
    assert "sub-01_T1w.nii.gz" in crash.read_text()


def test_two_runs_share_an_output_folder(start, dataset, arguments, tmp_path):
    """Each scan is segmented once, by one of them; both end well."""
    out = tmp_path / "out"
    both = [start("--nprocs", "1") for _ in range(2)]
    for process in both:
        _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, said
    assert [result.entities for result in finished(out)] == list(NAMES)
    logs = [path.name for path in out.rglob("sub-*.log")]
    assert sorted(logs) == [f"{name}.log" for name in NAMES]
    is_complete(dataset, out, arguments)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk_ends_the_run_at_once(dataset, arguments, tmp_path):
    """No scan's fault: trying the others would cost their time as well."""
    out = tmp_path / "out"
    out.mkdir()
    inside = f'mount -t tmpfs -o size=400k tmpfs {out} && exec "$@" 2> {tmp_path}/said'
    call = command("run", dataset, out, "participant", *arguments, "--nprocs", "1")
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", inside, "-", *call],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr:
        pytest.skip("this machine does not let us unshare")
    said = (tmp_path / "said").read_text()
    assert done.returncode == 74, said
    assert "1 failed, 1 not tried" in said
    assert "space" in said
