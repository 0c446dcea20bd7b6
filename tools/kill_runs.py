"""Kill runs of a dataset at random moments: nothing may be lost, and nothing be there by half.

    python tools/kill_runs.py --kills 100 --seed 0

Four phantoms are segmented by ``cadiff run`` with a tiny network.  Everything, the parent alone or
one worker gets SIGKILL, and the run is resumed; what it leaves is compared with an undisturbed one.
Prints each finding with the seed and the number of the kill; exits with 1 when there is any.
"""

import argparse
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from cadiff_cli.io import models
from cadiff_cli.io.bids.layout import finished
from cadiff_cli.labels.parcellation import BASE, load_parcellation
from cadiff_cli.nets.models import Model

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from bids_dataset import QUICK, command, environment, write_dataset
from conftest import TINY, awake, make_phantom

NAMES = ("sub-01", "sub-02", "sub-03_ses-a", "sub-03_ses-b")
VICTIMS = ("everything", "everything", "the parent", "a worker")
GONE_S = 20.0
"""How long workers may outlive their parent."""


def contents(out: Path) -> dict[str, bytes]:
    """What must be the same however a run was disturbed: tables and images, by relative path.

    Raises ``OSError`` or ``ValueError`` for a file that is there by half.
    """
    found = {}
    for path in sorted(out.rglob("[!.]*")):
        name = path.relative_to(out).as_posix()
        if name.startswith("logs/") or not path.is_file():
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>"), f"{name} ends early"
        elif path.suffix == ".h5":
            assert path.read_bytes().startswith(b"\x89HDF"), f"{name} is no transform"
        elif path.suffix == ".tsv":
            found[name] = without_seconds(path.read_bytes())
        elif path.suffix == ".gz":
            found[name] = gzip.decompress(path.read_bytes())
    return found


def without_seconds(table: bytes) -> bytes:
    """A table without its column of times, which no two runs share."""
    rows = [line.split(b"\t") for line in table.splitlines()]
    kept = [k for k, name in enumerate(rows[0]) if name != b"seconds"] if rows else []
    return b"\n".join(b"\t".join(row[k] for k in kept if k < len(row)) for row in rows)


@dataclass
class Trial:
    """Runs of one dataset into folders below ``place``; ``findings`` are what should not be."""

    dataset: Path
    arguments: tuple[object, ...]
    place: Path
    seed: int
    names: tuple[str, ...] = NAMES
    findings: list[str] = field(default_factory=list)
    killed: dict[str, int] = field(default_factory=dict)
    completed: int = 0
    begun: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, out: Path) -> subprocess.Popen[bytes]:
        """``cadiff run`` in a process group of its own."""
        levels = ("participant", "group", "--skip-bids-validation", "-w", self.place / "work")
        with (self.place / "said.txt").open("ab") as said:
            process = subprocess.Popen(
                command("run", self.dataset, out, *levels, *self.arguments),
                env=environment(),
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self.begun.append(process)
        return process

    def undisturbed(self, out: Path) -> float:
        """Seconds of a run that nobody kills."""
        begun = time.perf_counter()
        code = self.start(out).wait()
        if code:
            self.finding(f"an undisturbed run ended with {code}")
        return time.perf_counter() - begun

    def finding(self, text: str) -> None:
        """Print and keep what should not be."""
        text = f"seed {self.seed}, kill {sum(self.killed.values())}: {text}"
        print(text, flush=True)
        self.findings.append(text)

    def kill(self, kills: int) -> None:
        """So many kills, then the end of the run that was killed last; everything is checked."""
        try:
            self._kill(kills)
        finally:
            for process in self.begun:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def _kill(self, kills: int) -> None:
        rng = random.Random(self.seed)
        whole = self.place / "undisturbed"
        seconds = self.undisturbed(whole)
        wanted = contents(whole)
        print(f"undisturbed: {seconds:.0f} s, {len(wanted)} tables and images", flush=True)
        out, process = self.place / "out", None
        before: dict[str, bytes] = {}
        while sum(self.killed.values()) < kills:
            if process is None:
                process = self.start(out)
            with suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, seconds))
            if process.poll() is not None:
                self.ended(process, out, wanted)
                process, before = None, {}
                continue
            victim = rng.choice(VICTIMS)
            if not strike(process, victim, rng):
                continue
            self.killed[victim] = self.killed.get(victim, 0) + 1
            if victim == "a worker":
                continue
            self.wait_until_gone(process)
            process = None
            before = self.check(out, before, wanted)
        if process is not None:
            process.wait()
        self.undisturbed(out)
        self.check(out, before, wanted)
        self.is_complete(out, wanted)

    def wait_until_gone(self, process: subprocess.Popen[bytes]) -> None:
        """Workers follow their parent."""
        process.wait()
        end = time.monotonic() + GONE_S
        while group_lives(process.pid) and time.monotonic() < end:
            time.sleep(0.05)
        if group_lives(process.pid):
            self.finding(f"a worker outlived its parent by {GONE_S:.0f} s")
            os.killpg(process.pid, signal.SIGKILL)

    def check(self, out: Path, before: dict[str, bytes], wanted: dict[str, bytes]) -> dict:
        """Results that were complete still are; what is there is whole; the rest is nobody's."""
        try:
            now = contents(out)
        except (OSError, ValueError, EOFError, AssertionError) as error:
            self.finding(f"half a file: {type(error).__name__}: {error}")
            return {}
        for name in before.keys() - now.keys():
            self.finding(f"{name} is lost")
        complete = {result.entities for result in finished(out)}
        kept = {name: data for name, data in now.items() if scan_of(name) in complete}
        for name in wanted.keys() - now.keys():
            if scan_of(name) in complete:
                self.finding(f"{name} lacks in a result that claims to be complete")
        for name, data in kept.items():
            if data != wanted.get(name):
                self.finding(f"{name} differs from the undisturbed run's")
        return kept

    def ended(self, process: subprocess.Popen[bytes], out: Path, wanted: dict[str, bytes]) -> None:
        """A run came to its end between kills; only dead workers excuse a failed scan."""
        if process.returncode == 1 and self.killed.get("a worker", 0) > 1:
            return  # the next run tries that scan again
        if process.returncode:
            self.finding(f"a run ended with {process.returncode}")
        self.is_complete(out, wanted)
        shutil.rmtree(out)

    def is_complete(self, out: Path, wanted: dict[str, bytes]) -> None:
        """All is as if nobody had been killed."""
        self.completed += 1
        if (names := [result.entities for result in finished(out)]) != list(self.names):
            self.finding(f"complete are {names} only")
        found = contents(out)
        for name in sorted(wanted.keys() | found.keys()):
            if (one := wanted.get(name)) != (other := found.get(name)):
                self.finding(f"{name} is not as in the undisturbed run: {difference(one, other)}")
        for path in out.rglob(".*"):
            if path.name != ".bidsignore":
                self.finding(f"{path.relative_to(out)} is left")
        for path in (out / "logs" / "journal").glob("*.begun"):
            self.finding(f"{path.relative_to(out)} is left")


def difference(one: bytes | None, other: bytes | None) -> str:
    """The first line of a table that differs, or which of both is not there."""
    if one is None or other is None:
        return "not there" if other is None else "there now only"
    lines = zip_longest(one.splitlines(), other.splitlines())
    cells = next(
        (
            zip_longest(*(x.split(b"\t") for x in pair))
            for pair in lines
            if pair[0] != pair[1] and None not in pair
        ),
        (),
    )
    return ", ".join(f"{a!r} became {b!r}" for a, b in cells if a != b)[:300] or "its length"


def scan_of(name: str) -> str:
    """``sub-03/ses-a/anat/sub-03_ses-a_desc-x_y.tsv`` -> ``sub-03_ses-a``."""
    parts = Path(name).name.split("_")
    return "_".join(part for part in parts if part.startswith(("sub-", "ses-")))


def strike(process: subprocess.Popen[bytes], victim: str, rng: random.Random) -> bool:
    """SIGKILL; False where there was nobody to kill."""
    with suppress(ProcessLookupError):
        if victim == "everything":
            os.killpg(process.pid, signal.SIGKILL)
        elif victim == "the parent":
            process.kill()
        elif found := list(workers(process.pid)):
            os.kill(rng.choice(found), signal.SIGKILL)
        else:
            return False
        return True
    return False


def workers(parent: int) -> Iterator[int]:
    """Ids of the worker processes, as Linux knows them."""
    with suppress(OSError):
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            with suppress(OSError):
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    yield int(child)


def group_lives(group: int) -> bool:
    """Whether a process of the group runs; those that nobody has waited for do not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = stat.read_text().rsplit(")", 1)[1].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False


def phantoms(root: Path) -> Path:
    """A dataset of four small heads, none like another."""
    for k, name in enumerate(NAMES):
        head = make_phantom("RAS", 1.0, scale=0.4 + 0.01 * k)
        write_dataset(root, head, [f"{name}_T1w"])
    return root


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        place = Path(folder)
        weights = place / "tiny.safetensors"
        models.save(weights, Model(awake(TINY), parcellation=load_parcellation(BASE)))
        quick = tuple(option for option in QUICK if option != "--no-report")
        arguments = (*quick, "--model", weights, "--nprocs", 2)
        trial = Trial(phantoms(place / "bids"), arguments, place, wanted.seed)
        trial.kill(wanted.kills)
    print(
        f"{sum(trial.killed.values())} kills {trial.killed}, {trial.completed} runs completed,"
        f" {len(trial.findings)} findings"
    )
    return 1 if trial.findings else 0


if __name__ == "__main__":
    sys.exit(main())
