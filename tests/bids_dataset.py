"""A BIDS dataset of phantoms, and ``cadiff run`` on it as a lab would call it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from cadiff_cli.io.images import save_volume

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
        **{"timeout": 300, **kwargs},
    )
