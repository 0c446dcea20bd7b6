"""What running a dataset saves: ``cadiff run`` against as many calls of ``cadiff-seg``.

python tools/bench_run.py [BIDS_DIR]   (default: four copies of the example brain; the machine idle)

Prints both times, their ratio and the peak memory of each process.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN = Path(sys.executable).parent
N_SCANS = 4


def example(root: Path) -> Path:
    """A dataset of the MNI152 brain."""
    subprocess.run([BIN / "cadiff", "example", "-o", root], check=True, stdout=subprocess.DEVNULL)
    scan = root / "sub-MNI152_T1w.nii.gz"
    for k in range(1, N_SCANS + 1):
        folder = root / "bids" / f"sub-{k:02}" / "anat"
        folder.mkdir(parents=True)
        shutil.copyfile(scan, folder / f"sub-{k:02}_T1w.nii.gz")
    description = {"Name": "copies of one brain", "BIDSVersion": "1.10.0"}
    (root / "bids" / "dataset_description.json").write_text(json.dumps(description))
    return root / "bids"


def seconds(*command: object) -> float:
    begun = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        bids = Path(sys.argv[1]) if len(sys.argv) > 1 else example(root)
        scans = sorted(bids.glob("sub-*/**/anat/*_T1w.nii*"))
        print(f"{len(scans)} scans, {len(os.sched_getaffinity(0))} cores")
        at_once = seconds(
            *(BIN / "cadiff", "run", bids, root / "run", "participant", "--nprocs", 2),
            *("--offline", "--skip-bids-validation"),
        )
        print(f"cadiff run --nprocs 2    {at_once:7.1f} s", flush=True)
        apart = sum(
            seconds(BIN / "cadiff-seg", t1, "-o", root / "seg", "--offline") for t1 in scans
        )
        print(f"cadiff-seg, one by one   {apart:7.1f} s")
        print(f"ratio                    {at_once / apart:7.2f}")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"peak of one process      {peak:7.2f} GiB")


if __name__ == "__main__":
    main()
