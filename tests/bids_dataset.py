"""A BIDS dataset of phantoms, and ``cadiff run`` on it as a lab would call it."""

import io
import json
import os
import signal
import subprocess
import sys
import warnings
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from cadiff_cli import cli
from cadiff_cli.io.images import save_volume
from cadiff_cli.runner.execute import execute

QUICK = (
    *("--offline", "--template", "MNI152NLin2009aSym", "--registration", "affine"),
    *("--skull-strip", "none", "--steps", "1", "--no-flip", "--no-report"),
)
"""The cheapest settings that still go through every stage."""


def write_dataset(root: Path, head, names) -> Path:
    """Images of one head under BIDS names (``sub-01_ses-a_T1w``), and a description."""
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        folders = [part for part in name.split("_") if part.startswith(("sub-", "ses-"))]
        path = root.joinpath(*folders, "anat", f"{name}.nii.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_volume(path, head.t1.data, head.t1.grid)
    description = {"Name": "phantoms", "BIDSVersion": "1.10.0", "Authors": ["A", "B"]}
    (root / "dataset_description.json").write_text(json.dumps(description))
    (root / "README").write_text("Phantoms.")
    return root


def environment(**values) -> dict[str, str]:
    """No network, no templates but the embedded one, no threads to wait for one another."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TEMPLATEFLOW_HOME": "/nonexistent", **values}


def command(*arguments) -> list[str]:
    """``cadiff`` with these arguments, as the installed script runs it."""
    return [
        *(sys.executable, "-c", "from cadiff_cli.cli import main; main()"),
        *map(str, arguments),
    ]


def cadiff(*arguments, **kwargs) -> subprocess.CompletedProcess:
    """Run it to its end."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        check=False,
        env=environment(**kwargs.pop("env", {})),
        **{"timeout": 900, **kwargs},
    )


def here(*arguments, cwd=".") -> subprocess.CompletedProcess:
    """The same in this process, which has everything loaded; a run segments in it, too."""
    words, out, err = [*map(str, arguments)], io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    with (
        mock.patch.dict(os.environ, environment()),
        mock.patch("cadiff_cli.runner.local.run_local", _in_turn),
        warnings.catch_warnings(action="ignore"),
        redirect_stdout(out),
        redirect_stderr(err),
        chdir(cwd),
    ):
        code = cli.guarded(
            lambda: cli.cadiff.main(words, prog_name="cadiff", standalone_mode=False)
        )
    signal.signal(signal.SIGTERM, before)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def _in_turn(jobs, workers, threads):
    yield from map(execute, jobs)
