"""Batch scripts as a scheduler calls them, and the recipes of images."""

import os
import re
import signal
import subprocess
import time

import pytest
from bids_dataset import QUICK, command, environment, here, write_dataset
from conftest import ROOT

from cadiff_cli.io.bids.layout import finished

SCRIPTS = {
    "slurm_array.sh": {"SLURM_ARRAY_TASK_ID": "2", "SLURM_CPUS_PER_TASK": "1"},
    "sge_array.sh": {"SGE_TASK_ID": "2", "NSLOTS": "1"},
}
SECONDS = 900.0
"""What a run may take on a busy machine."""
pytestmark = pytest.mark.slow


@pytest.fixture
def task(small_head, tiny_weights, tmp_path):
    """The second task of an array over three participants, one of them broken."""
    bids = write_dataset(tmp_path / "bids", small_head, ["sub-01_T1w", "sub-02_T1w"])
    (bids / "sub-02" / "anat" / "sub-02_T1w.nii.gz").write_bytes(b"\x1f\x8b broken")
    # As Windows writes it; and a file that is called like a participant is no list of others.
    (tmp_path / "todo.txt").write_bytes(b"\xef\xbb\xbfsub-02\r\nsub-01\r\nsub-77\r\n")
    (tmp_path / "sub-01").write_text("sub-77\n")
    run = tmp_path / "cadiff-run"
    run.write_text(f'#!/bin/sh\nexec {" ".join(map(_quoted, command("run")))} "$@"\n')
    run.chmod(0o755)
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def start(script, *options, **more):
        arguments = ["todo.txt", bids, tmp_path / "out", *QUICK, "--model", tiny_weights, *options]
        values = {**SCRIPTS[script], "TMPDIR": str(scratch), "CADIFF_RUN": str(run), **more}
        return subprocess.Popen(
            ["bash", ROOT / "containers" / script, *arguments],
            env=environment(**values),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def _quoted(word):
    return f"'{word}'"


def test_a_task_does_its_participant_and_keeps_the_exit_code(task, tmp_path, tiny_weights):
    """Then only what failed is listed again, by the pipeline that the scripts' headers show."""
    process = task("slurm_array.sh")
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert [result.entities for result in finished(tmp_path / "out")] == ["sub-01"]
    process = task("slurm_array.sh", SLURM_ARRAY_TASK_ID="1")
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "damaged or truncated" in said
    assert list((tmp_path / "scratch").iterdir()) == []
    listing = ("run", "bids", "out", "participant", "--dry-run", *QUICK)
    listed = here(*listing, "--model", tiny_weights, cwd=tmp_path)
    assert _to_submit(listed.stdout.encode()) == [b"sub-02"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_chooses_one_participant(task, tmp_path, script):
    """And hands on its options; what cadiff ends with, it ends with."""
    listed, said = (process := task(script, "--dry-run")).communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert listed == "sub-01\ttodo\n"
    (number,) = (name for name in SCRIPTS[script] if "TASK_ID" in name)
    process = task(script, "--dry-run", **{number: "3"})
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 18
    assert "sub-77" in said
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_time_limit_reaches_cadiff(task, tmp_path):
    """SLURM signals the script alone; it must hand the signal on and wait."""
    process = task("slurm_array.sh")
    end = time.monotonic() + SECONDS
    while not list((tmp_path / "out").rglob("sub-01.log")):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 143, said
    assert list((tmp_path / "scratch").iterdir()) == []


def _to_submit(listed):
    """Participants that the command line of the scripts' header chooses from a dry run's list."""
    headers = [
        (ROOT / place).read_text() for place in ("containers/slurm_array.sh", "docs/bids-app.md")
    ]
    commands = {re.search(r"awk -F'\\t' '(.+)' \| sort -u", text).group(1) for text in headers}
    (awk,) = commands
    return subprocess.run(
        ["awk", "-F\t", awk], input=listed, capture_output=True, check=True
    ).stdout.split()


@pytest.mark.parametrize("script", [*SCRIPTS])
@pytest.mark.parametrize("line", ["3", "undefined", ""])
def test_a_task_beyond_the_list_does_not_begin(script, line, tmp_path):
    """Grid Engine says ``undefined`` where no array was submitted."""
    (tmp_path / "todo.txt").write_text("01\n02\n")
    (number,) = (name for name in SCRIPTS[script] if "TASK_ID" in name)
    done = subprocess.run(
        ["bash", ROOT / "containers" / script, "todo.txt", "bids", "out"],
        env=environment(**{number: line}, TMPDIR=str(tmp_path), CADIFF_RUN="echo"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (64, "")
    assert "todo.txt" in done.stderr


@pytest.mark.parametrize("script", [*SCRIPTS])
def test_without_scratch_a_task_does_not_begin(script, tmp_path):
    """An empty name of the work folder would be the current one, on the network."""
    (tmp_path / "todo.txt").write_text("01\n02\n")
    done = subprocess.run(
        ["bash", ROOT / "containers" / script, "todo.txt", "bids", "out"],
        env=environment(**SCRIPTS[script], TMPDIR=str(tmp_path / "gone"), CADIFF_RUN="echo"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (73, "")


def test_what_would_end_the_same_is_not_submitted():
    statuses = (b"done", b"todo", b"failed", b"unsuitable")
    listed = b"".join(b"sub-%s_ses-1\t%s\n" % (status[:1], status) for status in statuses)
    assert _to_submit(listed) == [b"sub-t", b"sub-f"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")
def test_a_user_without_account_on_a_read_only_system_without_network(
    small_head, tiny_weights, tmp_path
):
    """As in a container on a cluster: no network, no home, nothing writable but scratch and OUT."""
    bids = write_dataset(tmp_path / "bids", small_head, ["sub-01_T1w"])
    out = tmp_path / "out"
    out.mkdir()
    inside = f"""
        mount --make-rprivate /
        mount --bind {out} {out}
        mount -o remount,bind,ro /
        mount -t tmpfs tmpfs /var/tmp
        ! touch {tmp_path}/x 2> /dev/null
        exec unshare --user --map-user=54321 --map-group=54321 env -i \\
          PATH=/usr/bin:/bin PYTHONPATH={ROOT} TMPDIR=/var/tmp "$@"
    """
    arguments = [option for option in QUICK if option != "--offline"]
    call = command("run", bids, out, "participant", *arguments, "--model", tiny_weights)
    done = subprocess.run(
        ["unshare", "--net", "--mount", "bash", "-ec", inside, "-", *call],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    if "unshare failed" in done.stderr:
        pytest.skip("this machine does not let us unshare")
    assert done.returncode == 0, done.stderr
    assert [result.entities for result in finished(out)] == ["sub-01"]


def test_recipes_agree():
    """Docker's and Apptainer's images install and set the same."""
    docker = (ROOT / "Dockerfile").read_text()
    apptainer = (ROOT / "containers" / "apptainer.def").read_text()
    for needed in (
        *("MNIColin27", "MNI152NLin2009cAsym", "TEMPLATEFLOW_HOME", "/opt/templateflow"),
        *("MPLCONFIGDIR", "dask,dicom,validate"),
    ):
        assert needed in docker, needed
        assert needed in apptainer, needed
    assert "-c constraints.txt" in docker
    assert "-c /src/constraints.txt" in apptainer
    assert 'ENTRYPOINT ["cadiff", "run"]' in docker
    assert 'exec cadiff run "$@"' in apptainer
    assert "USER 1000" in docker
