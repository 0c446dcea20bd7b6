"""What ``make bench`` prints: wall time and peak memory of the main commands on this machine."""

import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN = Path(sys.executable).parent


def timed(*command: str) -> tuple[float, float]:
    """Wall seconds and peak resident GiB of a command (the peak is over all so far)."""
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begun
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def main() -> None:
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    helped = min(timed(str(BIN / "cadiff-seg"), "--help")[0] for _ in range(3))
    print(f"cadiff-seg --help            {helped:6.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([BIN / "cadiff", "example", "-o", folder], check=True)
        scan = f"{folder}/sub-MNI152_T1w.nii.gz"
        seconds, gib = timed(str(BIN / "cadiff-seg"), scan, "-o", f"{folder}/out", "--offline")
        print(f"cadiff-seg, default options {seconds:6.1f} s   peak {gib:.2f} GiB")


if __name__ == "__main__":
    main()
