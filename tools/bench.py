"""Time the main commands of cadiff on this machine, alone or against an older version.

make bench                                     (the machine idle)
python tools/bench.py --against COMMIT         (both versions in one run, in turn, and their ratios)
python tools/bench.py --scan T1 --scan HEAD --only seg --runs 3

Without ``--scan`` the MNI152 brain that nilearn carries is segmented.  ``--finished N`` copies one
finished result N times, with its logs and journal, and times how ``cadiff run`` plans and resumes
such a dataset; only the first plan reads the sidecars.
"""

import argparse
import json
import os
import platform
import re
import shutil
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
FIRST = "sub-0000"
"""The participant whose result is made; those of others are copies of it."""
FAST = (
    *("--registration", "affine", "--steps", "0", "--offline", "--no-report"),
    "--skip-bids-validation",
)
STAGE = re.compile(r"^\s*([\d.]+) s  (\w+)", re.MULTILINE)
"""A line of ``cadiff-seg -v``: seconds since the start, and the stage that begins."""


@dataclass(frozen=True)
class Version:
    """One installed cadiff: ``bin`` is the folder of its commands."""

    name: str
    bin: Path


@dataclass(frozen=True)
class Measured:
    """Wall and processor seconds, peak GiB of its largest process, seconds of stages if it told."""

    seconds: float
    processor_s: float
    gib: float
    stages: dict[str, float]


def install(commit: str, folder: Path) -> Version:
    """``commit`` of this repository, in a virtual environment of its own."""
    source = folder / "source"
    source.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", source], input=archive.stdout, check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip: list[str | Path] = [folder / "venv/bin/python", "-m", "pip", "install", "--quiet", "-c"]
    subprocess.run([*pip, source / "constraints.txt", source], check=True)
    return Version(commit[:12], folder / "venv/bin")


def timed(*command: object) -> Measured:
    """Run a command in a process of its own, so that its peak memory is its own as well."""
    code = "import resource, subprocess, sys; p = subprocess.run(sys.argv[1:]); u = \
resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime, u.ru_maxrss); \
sys.exit(p.returncode)"
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
    *_, processor_s, kib = done.stdout.split()
    return Measured(seconds, float(processor_s), int(kib) / 2**20, stages)


def dataset(root: Path, scans: Sequence[Path], n: int) -> Path:
    """A BIDS dataset of ``n`` participants; their files are hard links to copies of ``scans``."""
    root.mkdir(parents=True)
    description = {"Name": "copies", "BIDSVersion": "1.10.0"}
    (root / "dataset_description.json").write_text(json.dumps(description), encoding="utf-8")
    for k in range(n):
        scan = scans[k % len(scans)]
        folder = root / f"sub-{k:04}" / "anat"
        folder.mkdir(parents=True)
        suffix = ".nii.gz" if scan.name.endswith(".gz") else ".nii"
        path = folder / f"sub-{k:04}_T1w{suffix}"
        if k < len(scans):
            shutil.copyfile(scan, path)
        else:
            first = f"sub-{k % len(scans):04}"
            os.link(root / first / "anat" / path.name.replace(f"sub-{k:04}", first), path)
    return root


def multiply(out: Path, bids: Path) -> None:
    """Give every participant the finished result of ``FIRST``, as a run would leave it.

    Results, logs and journal; images are hard links.
    """
    journal = out / "logs" / "journal"
    found = (*(out / FIRST).rglob("*"), *out.glob(f"{FIRST}.*"), *journal.glob(f"{FIRST}.*"))
    made = [path for path in found if path.is_file()]
    record = journal / "inputs.tsv"
    checksum = record.read_text(encoding="utf-8").split("\t")[0] if record.exists() else ""
    lines = list[str]()
    for image in sorted(bids.glob("sub-*/anat/*_T1w.nii*")):
        other, status = image.name.split("_")[0], image.stat()
        times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        lines.append("\t".join(map(str, (checksum, *times, image.name))) + "\n")
        for path in made if other != FIRST else ():
            copy = out / str(path.relative_to(out)).replace(FIRST, other)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".gz", ".h5"):
                os.link(path, copy)
            else:
                text = path.read_text(encoding="utf-8").replace(FIRST, other)
                copy.write_text(text, encoding="utf-8")
    if checksum:
        record.write_text("".join(lines), encoding="utf-8")


def show(label: str, versions: Sequence[Version], results: dict[str, list[Measured]]) -> None:
    """Median seconds and largest peak of each version, the ratios, and the stages of the last."""
    rows = []
    for version in versions:
        measured = results[version.name]
        median = statistics.median(m.seconds for m in measured)
        rows.append((version.name, median, max(m.gib for m in measured), measured))
    for name, seconds, gib, measured in rows:
        busy = statistics.median(m.processor_s for m in measured)
        line = f"{label:34} {name:14} {seconds:7.2f} s, of a processor {busy:7.2f} s {gib:5.2f} GiB"
        print(line, flush=True)
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
            resume(root, scans[0], given.finished, compare, versions)


def finished(folder: Path, scan: Path, n: int, made: Path) -> tuple[Path, Path]:
    """A dataset of ``n`` participants in ``folder``, all finished with the result in ``made``."""
    bids, out = dataset(folder / "bids", [scan], n), folder / "out"
    shutil.copytree(made, out)
    multiply(out, bids)
    return bids, out


def resume(root, scan, n, compare, versions):
    """Time how a dataset is planned, and how one participant's job starts and ends.

    Where 4, and where ``n`` scans are finished.
    """
    bids, out = dataset(root / "first" / "bids", [scan], 1), root / "first" / "out"
    timed(versions[0].bin / "cadiff", "run", bids, out, "participant", *FAST)
    for count in (4, n):
        bids, out = finished(root / f"finished{count}", scan, count, root / "first" / "out")
        run = ("cadiff", "run", bids, out, "participant", *FAST)
        one = ("--participant-label", "0001")
        compare(f"--dry-run, {count} finished", *run, "--dry-run")
        compare(f"one participant, {count}, --dry-run", *run, *one, "--dry-run")
        compare(f"one participant, {count} finished", *run, *one)


if __name__ == "__main__":
    main()
