"""The same jobs on a real Dask scheduler with two worker processes, one of them killed."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from bids_dataset import QUICK, cadiff, command, environment, write_dataset

from cadiff_cli.io.bids.layout import finished

pytest.importorskip("distributed")
pytestmark = pytest.mark.slow

NAMES = ("sub-01", "sub-02", "sub-03", "sub-04")
SECONDS = 900.0


@pytest.fixture
def dataset(small_head, tmp_path):
    bids = write_dataset(tmp_path / "bids", small_head, [f"{name}_T1w" for name in NAMES])
    (bids / "sub-04" / "anat" / "sub-04_T1w.nii.gz").write_bytes(b"\x1f\x8b broken")
    return bids


@pytest.fixture
def cluster(tmp_path):
    """A scheduler's address and two workers, as they would run on other machines."""
    file = tmp_path / "scheduler.json"
    common = ["--scheduler-file", str(file)]

    def start(role, *options):
        return subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_" + role, *options, *common],
            env=environment(),
            cwd=tmp_path,
            stderr=subprocess.DEVNULL,
        )

    running = [start("scheduler", "--port", "0", "--no-dashboard", "--host", "127.0.0.1")]
    try:
        until(file.exists)
        options = ("--nthreads", "1", "--no-nanny", "--no-dashboard")
        running += [start("worker", *options) for _ in range(2)]
        yield json.loads(file.read_text())["address"], running[1:]
    finally:
        for process in running:
            process.kill()
            process.wait()


def until(condition):
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def test_a_killed_worker_costs_nothing(dataset, cluster, tiny_weights, tmp_path):
    address, workers = cluster
    out = tmp_path / "out"
    arguments = ("run", dataset, out, "participant", *QUICK, "--model", tiny_weights)
    arguments += ("--registration", "none")
    arguments += ("--executor", "dask", "--dask-address", address)
    run = subprocess.Popen(
        command(*arguments), env=environment(), stderr=subprocess.PIPE, text=True
    )
    until(lambda: len(list(out.rglob("sub-*.log"))) >= 2)
    workers[0].send_signal(signal.SIGKILL)
    _, said = run.communicate(timeout=SECONDS)
    # The broken scan fails as it does locally; all others are there, once.
    assert run.returncode == 1, said
    assert "3 done, 1 failed" in said
    assert [result.entities for result in finished(out)] == list(NAMES[:3])
    status = {p.stem: json.loads(p.read_text())["status"] for p in out.glob("logs/journal/*.json")}
    assert status == dict.fromkeys(NAMES[:3], "done") | {"sub-04": "failed"}
    assert len(list(out.rglob("crash-*"))) == 1
    # A second client finds everything done.
    done = cadiff(*arguments, "--dry-run")
    assert done.stdout.splitlines() == [*(f"{n}\tdone" for n in NAMES[:3]), "sub-04\ttodo"]


def test_memory_is_blamed_only_for_workers_that_died():
    from distributed import KilledWorker

    from cadiff_cli.runner.cluster import _lost

    error = _lost(ModuleNotFoundError("No module named 'cadiff_cli'"))
    assert "No module named 'cadiff_cli'" in error.message
    assert "version" in error.remedy
    assert "memory" not in str(error)
    assert "memory" in _lost(KilledWorker("sub-01", SimpleNamespace(address="tcp://x"), 3)).remedy


def test_no_scheduler_is_an_error_that_names_it(dataset, tmp_path, monkeypatch):
    from cadiff_cli.errors import MissingInputError
    from cadiff_cli.runner import cluster

    monkeypatch.setattr(cluster, "TIMEOUT", "1s")
    with pytest.raises(MissingInputError, match="no Dask scheduler answers at tcp"):
        list(cluster.run_dask([], "tcp://127.0.0.1:9", 1, 1))
