"""Time the main commands of cadiff on this machine, alone or against an older version.

make bench                                     (the machine idle)
python tools/bench.py --against COMMIT         (both versions in one run, in turn, and their ratios)
python tools/bench.py --scan T1 --scan HEAD --only seg --runs 3

Without ``--scan`` the MNI152 brain that nilearn carries is segmented.  ``--finished N`` copies one
finished result N times and times how ``cadiff run`` plans and resumes such a dataset.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("help", "seg", "run", "finished")
STAGE = re.compile(r"^\s*([\d.]+) s  (\w+)", re.MULTILINE)
"""A line of ``cadiff-seg -v``: seconds since the start, and the stage that begins."""


@dataclass(frozen=True)
class Version:
    """One installed cadiff: ``bin`` is the folder of its commands."""

    name: str
    bin: Path


@dataclass(frozen=True)
class Measured:
    """Wall seconds, peak resident GiB of its largest process, seconds of each stage if it told."""

    seconds: float
    gib: float
    stages: dict[str, float]


def install(commit: str, folder: Path) -> Version:
    """``commit`` of this repository, in a virtual environment of its own."""
    source = folder / "source"
    source.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", source], input=archive.stdout, check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip = [folder / "venv/bin/python", "-m", "pip", "install", "--quiet", "-c"]
    subprocess.run([*pip, source / "constraints.txt", source], check=True)
    return Version(commit[:12], folder / "venv/bin")


def timed(*command: object) -> Measured:
    """Run a command in a process of its own, so that its peak memory is its own as well."""
    code = "import resource, subprocess, sys; p = subprocess.run(sys.argv[1:]); print(\
resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(p.returncode)"
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], text=True, capture_output=True
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended in {done.returncode}:\n{done.stderr}")
    starts = [(float(at), stage) for at, stage in STAGE.findall(done.stderr)]
    ends = [at for at, _ in starts[1:]]
    stages = {stage: end - at for (at, stage), end in zip(starts, ends, strict=False)}
    return Measured(seconds, int(done.stdout.split()[-1]) / 2**20, stages)


def dataset(root: Path, scans: Sequence[Path], n: int) -> Path:
    """A BIDS dataset of ``n`` participants, whose scans are links to ``scans`` in turn."""
    root.mkdir()
    description = {"Name": "copies", "BIDSVersion": "1.10.0"}
    (root / "dataset_description.json").write_text(json.dumps(description), encoding="utf-8")
    for k in range(n):
        scan = scans[k % len(scans)].resolve()
        folder = root / f"sub-{k:04}" / "anat"
        folder.mkdir(parents=True)
        suffix = ".nii.gz" if scan.name.endswith(".gz") else ".nii"
        (folder / f"sub-{k:04}_T1w{suffix}").symlink_to(scan)
    return root


def multiply(out: Path, bids: Path) -> None:
    """Copy the finished result of ``sub-0000`` to every other participant of the dataset."""
    for other in sorted(path.name for path in bids.glob("sub-*")):
        if other == "sub-0000":
            continue
        for path in (out / "sub-0000" / "anat").iterdir():
            copy = out / other / "anat" / path.name.replace("sub-0000", other)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".json", ".tsv"):
                text = path.read_text(encoding="utf-8").replace("sub-0000", other)
                copy.write_text(text, encoding="utf-8")
            else:
                os.link(path, copy)


def show(label: str, versions: Sequence[Version], results: dict[str, list[Measured]]) -> None:
    """Median seconds and largest peak of each version, the ratios, and the stages of the last."""
    rows = []
    for version in versions:
        measured = results[version.name]
        median = statistics.median(m.seconds for m in measured)
        rows.append((version.name, median, max(m.gib for m in measured), measured))
    for name, seconds, gib, measured in rows:
        print(f"{label:34} {name:14} {seconds:7.2f} s  {gib:5.2f} GiB", flush=True)
        stages = {
            stage: statistics.median(m.stages.get(stage, 0.0) for m in measured)
            for stage in measured[-1].stages
        }
        if stages:
            print(" " * 50 + "  ".join(f"{stage} {s:.1f}" for stage, s in stages.items()))
    if len(rows) == 2:
        (_, new, new_gib, _), (_, old, old_gib, _) = rows
        print(f"{label:34} {'ratio':14} {new / old:7.3f}    {new_gib / old_gib:5.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--against", metavar="COMMIT", help="an older version to compare with")
    parser.add_argument("--scan", type=Path, action="append", help="scans to segment (repeatable)")
    parser.add_argument("--only", choices=PARTS, action="append", help="parts [all]")
    parser.add_argument("--runs", type=int, default=1, help="repetitions of every command [1]")
    parser.add_argument("--finished", type=int, default=400, help="finished scans [400]")
    given = parser.parse_args()
    parts = given.only or PARTS
    with tempfile.TemporaryDirectory(prefix="cadiff-bench-") as work:
        root = Path(work)
        versions = [Version("this version", Path(sys.executable).parent)]
        if given.against:
            (root / "other").mkdir()
            versions.append(install(given.against, root / "other"))
        cores = len(os.sched_getaffinity(0))
        print(f"{platform.machine()}, {cores} cores, Python {platform.python_version()}")
        scans = given.scan
        if not scans:
            subprocess.run(
                [versions[0].bin / "cadiff", "example", "-o", root], check=True, capture_output=True
            )
            scans = [root / "sub-MNI152_T1w.nii.gz"]

        def compare(label: str, *command: object) -> None:
            """Time ``command`` (its first word a command of cadiff) with each version in turn."""
            results: dict[str, list[Measured]] = {version.name: [] for version in versions}
            for k in range(given.runs):
                for version in versions:
                    out = root / f"{label}_{version.name}_{k}".replace(" ", "_")
                    name, *words = (str(word).replace("{out}", str(out)) for word in command)
                    results[version.name].append(timed(version.bin / name, *words))
            show(label, versions, results)

        if "help" in parts:
            compare("cadiff-seg --help", "cadiff-seg", "--help")
        if "seg" in parts:
            for scan in scans:
                command = ("cadiff-seg", scan, "-o", "{out}", "--offline", "-v")
                compare(scan.name.split(".")[0], *command)
        if "run" in parts:
            bids = dataset(root / "four", scans, 4)
            options = ("--nprocs", 2, "--offline", "--skip-bids-validation")
            compare("cadiff run, 4 scans", "cadiff", "run", bids, "{out}", "participant", *options)
        if "finished" in parts:
            resume(root, scans[:1], given.finished, compare, versions)


def resume(root, scans, n, compare, versions):  # type: ignore[no-untyped-def]
    """Time planning and one participant's job where 4, and where ``n`` scans are finished."""
    fast = ("--registration", "affine", "--steps", "0", "--offline", "--no-report")
    for count in (4, n):
        bids, out = dataset(root / f"bids{count}", scans, count), root / f"finished{count}"
        cadiff = versions[0].bin / "cadiff"
        first = (cadiff, "run", bids, out, "participant", *fast, "--skip-bids-validation")
        subprocess.run(
            [*map(str, first), "--participant-label", "0000"], check=True, capture_output=True
        )
        multiply(out, bids)
        plan = ("cadiff", "run", bids, out, "participant", *fast)
        compare(f"--dry-run, {count} finished", *plan, "--skip-bids-validation", "--dry-run")
        compare(f"one participant, {count} finished", *plan, "--participant-label", "0001")


if __name__ == "__main__":
    main()
