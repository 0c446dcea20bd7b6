"""Inputs that nobody thought of: each must give a result, or one line that says what is wrong.

    python tools/fuzz.py --seed 0 --n 500
    python tools/fuzz.py --seed 0 --only 123 --keep /tmp/case     # one of them again, to look at

Every input is read, goes through ``cadiff mask``, and through ``cadiff run --dry-run`` as a scan of
a BIDS dataset, in worker processes that are used again.  Prints each finding with its seed and
index; exits with 1 when there is any.
"""

import argparse
import gzip
import json
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

import nibabel as nib
import numpy as np

MEMORY_BYTES = 2 * 2**30
"""What a small file may make a process allocate, on top of what its libraries take."""
SECONDS = 60.0
CODES = {"read": {0, 65, 66}, "mask": {0, 65, 66, 73}, "run": {0, 16, 18, 65, 66, 73}}
"""Documented codes that a bad input may end with; 64 and 74 would blame another."""
EDGE, SPACING_MM = 44, 2.5
LIMITS = (0, 1, -1, 2, 127, 128, 255, 256, 32767, -32768, 2**31 - 1, -(2**31), 2**63 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan, 0.1, 1e6)
DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "f16", "c8", "c16", "rgb")
SUFFIXES = (".nii", ".nii.gz", ".mgh", ".mgz", ".NII.GZ", ".img", ".hdr", ".txt", ".dcm", ".gz", "")
NAMES = (
    "two words",
    'it\'s "quoted"',
    "new\nline",
    "tab\tand \\ back",
    "größe_脳_🧠",
    "x" * 240,
    "脳" * 80,
    "[1234].a,b",
    "*?{x}",
    "$HOME `id` ;&|",
    "-o",
    "%s%d",
    "\x1b[31mred",
    "[bold]rich[bold] [red]",
    os.fsdecode(b"latin-\xe4\xff"),
    ".hidden",
    "...",
    "sub-01_[a]-1_T1w",
    "sub-01_run-_T1w",
    "sub-_T1w",
    "sub-a\nb_T1w",
    "sub-01_ses-../x_T1w".replace("/", "\u2215"),
    "CON",
    "T1w.nii",
)


def head(rng: np.random.Generator, *, stripped: bool = True) -> np.ndarray:
    """(X, Y, Z) float32: a textured ball of half a litre, in air or in nothing."""
    r = np.linalg.norm(np.indices((EDGE,) * 3) - (EDGE - 1) / 2, axis=0) * SPACING_MM
    inside = (r < 48) * (60 + 40 * (r < 30) + rng.normal(0, 8, r.shape))
    air = 0 if stripped else abs(rng.normal(0, 2, r.shape))
    return np.where(inside > 0, inside, air).astype(np.float32)


def zipped(content: bytes) -> bytes:
    """The same bytes at any time."""
    return gzip.compress(content, 1, mtime=0)


class Maker:
    """Makes one input, ``index`` of ``seed``; the same again in another folder."""

    def __init__(self, seed: int, index: int) -> None:
        self.random = random.Random(f"{seed}-{index}")
        self.rng = np.random.default_rng([seed, index])
        self.kind = KINDS[index % len(KINDS)]
        self.name, self.suffix = "scan", self.random.choice((".nii", ".nii.gz"))
        self.data = head(self.rng, stripped=self.random.random() < 0.95)
        self.header: Any = self.random.choice((nib.Nifti1Header, nib.Nifti2Header))(
            endianness=self.random.choice("<>")
        )
        self.header.set_data_dtype(np.float32)
        self.header.set_data_shape(self.data.shape)
        self.header["pixdim"][1:4] = SPACING_MM
        self.header.set_sform(np.diag([-SPACING_MM, SPACING_MM, SPACING_MM, 1]), code=1)
        self.header["vox_offset"] = self.header.single_vox_offset
        self.header["magic"] = self.header.single_magic
        self.touch: Callable[[Path], object] = self.write
        self.change: Callable[[bytes], bytes] = lambda content: content
        self.gzip: Callable[[bytes], bytes] = zipped
        getattr(self, self.kind)()

    def write(self, path: Path) -> None:
        """The image as a file."""
        path.write_bytes(self.content())

    def content(self) -> bytes:
        """Header and data, gzipped where the suffix says so, then changed."""
        order = self.header.endianness
        raw = self.header.binaryblock
        raw += bytes(max(self.header.single_vox_offset - len(raw), 0))
        if self.data.dtype.names:
            raw += self.data.tobytes(order="F")
        else:
            raw += self.data.astype(self.data.dtype.newbyteorder(order)).tobytes(order="F")
        return self.change(self.gzip(raw) if self.suffix.lower().endswith("gz") else raw)

    def of(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    # Kinds of inputs.

    def field(self) -> None:
        """One to three header fields, at random or at a limit."""
        names = [name for name in self.header.template_dtype.names if name != "magic"]
        for name in self.random.sample(names, self.random.choice((1, 1, 2, 3))):
            values = np.atleast_1d(np.asarray(self.header[name]))
            at = self.random.randrange(values.size)
            if values.dtype.kind == "f":
                new: Any = self.random.choice((*FLOATS, self.of(-10, 10)))
            elif values.dtype.kind in "iu":
                info = np.iinfo(values.dtype)
                new = int(np.clip(self.random.choice(LIMITS), info.min, info.max))
            else:
                new = self.rng.bytes(values.dtype.itemsize)
            values = values.copy()
            with np.errstate(all="ignore"):
                values.flat[at] = new
            self.header[name] = values if np.ndim(self.header[name]) else values[0]

    def data_type(self) -> None:
        kind = self.random.choice(DTYPES)
        if kind == "rgb":
            self.data = np.repeat(self.data.astype(np.uint8), 3).view("u1,u1,u1")
            self.header["datatype"], self.header["bitpix"] = 128, 24
            return
        self.data = self.data.astype(kind)
        if kind == "f16":  # of Intel's 80 bits, which nibabel does not write
            self.header["datatype"], self.header["bitpix"] = 1536, 128
        else:
            self.header.set_data_dtype(self.data.dtype)
        if self.random.random() < 0.2:
            self.header["bitpix"] = self.random.choice(LIMITS[:6])

    def scaling(self) -> None:
        with np.errstate(all="ignore"):
            for name in ("scl_slope", "scl_inter"):
                self.header[name] = self.random.choice((*FLOATS, self.of(-1e4, 1e4)))
        if self.random.random() < 0.5:
            self.data = self.data.astype(np.int16)
            self.header.set_data_dtype(np.int16)

    def dimensions(self) -> None:
        dim = [self.random.choice((0, 1, 2, 3, 4, 5, 7, 8, -1)), *self.header["dim"][1:4]]
        dim += [self.random.choice((0, 1, 1, 1, 2, -1, 32767)) for _ in range(4)]
        if self.random.random() < 0.5:
            dim[self.random.randrange(1, 4)] = self.random.choice((0, -1, 1, 7, 32767, 88))
        self.header["dim"] = dim

    def sform(self) -> None:
        affine = np.diag([SPACING_MM] * 3 + [1.0])
        affine[:3, :3] += self.rng.normal(0, self.random.choice((0, 0.1, 1)), (3, 3))
        affine[:3, :3] *= self.rng.choice([-1, 1], 3)
        affine[:3, 3] = self.rng.normal(0, self.random.choice((1, 1e3, 1e30)), 3)
        if self.random.random() < 0.4:
            row, column = self.random.randrange(3), self.random.randrange(4)
            affine[row, column] = self.random.choice(FLOATS)
        with np.errstate(all="ignore"):
            for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
                self.header[name] = affine[row]
        self.header["sform_code"] = self.random.choice((0, 1, 4, 5, 99, -1))

    def qform(self) -> None:
        for name in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x"):
            self.header[name] = self.random.choice((0, self.of(-1, 1), self.random.choice(FLOATS)))
        self.header["pixdim"][0] = self.random.choice((-1, 0, 1, 2, np.nan))
        self.header["qform_code"] = self.random.choice((0, 1, 2, 99))
        self.header["sform_code"] = self.random.choice((0, 0, 1))
        if self.random.random() < 0.3:
            self.header["pixdim"][self.random.randrange(1, 4)] = self.random.choice(FLOATS)

    def truncated(self) -> None:
        tenth = self.random.randrange(11)
        self.change = lambda content: content[: len(content) * tenth // 10 - (tenth == 10)]

    def bits(self) -> None:
        """Some bytes of the file are others."""
        n = self.random.choice((1, 4, 64))

        def flip(content: bytes) -> bytes:
            changed = bytearray(content)
            end = self.random.choice((352, len(changed)))
            for _ in range(n):
                changed[self.random.randrange(min(end, len(changed)))] = self.random.randrange(256)
            return bytes(changed)

        self.change = flip

    def odd_gzip(self) -> None:
        """Odd gzip: twice, in members, with junk behind, or none at all."""
        self.suffix = ".nii.gz"
        junk = self.rng.bytes(self.random.choice((1, 100, 5000)))
        self.gzip = self.random.choice(
            (
                lambda raw: zipped(zipped(raw)),
                lambda raw: zipped(raw[:999]) + zipped(raw[999:]),
                lambda raw: zipped(raw) + junk,
                lambda raw: zipped(raw) + bytes(512),
                lambda raw: zipped(raw + junk),
                lambda raw: raw,
                lambda _: zipped(b""),
                lambda raw: zipped(raw)[:-4] + b"\1\2\3\4",
            )
        )

    def offset(self) -> None:
        """Extensions, and data that begin elsewhere."""
        self.header["vox_offset"] = self.random.choice((0, 1, 348, 352, 353, 4096, 10**9, -16))

    def suffixed(self) -> None:
        """The name says something else."""
        content = self.content()
        self.suffix = self.random.choice(SUFFIXES)
        self.touch = lambda path: path.write_bytes(content)

    def named(self) -> None:
        self.name = self.random.choice(NAMES)

    def values(self) -> None:
        """Other intensities."""
        choices: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
            lambda x: np.zeros_like(x),
            lambda x: np.full_like(x, 7),
            lambda x: np.where(self.rng.random(x.shape) < 0.1, np.nan, x),
            lambda x: np.full_like(x, np.nan),
            lambda x: np.where(x > 0, x, np.nan),
            lambda x: np.where(x > 0, x, -np.inf),
            lambda x: x * np.float32(3e36),
            lambda x: x * np.float32(1e-42),
            lambda x: -x,
            lambda x: x - 1000,
            lambda x: (x > 0).astype(np.float32),
            lambda x: np.where(np.arange(x.size).reshape(x.shape) == 5, 1, 0),
            lambda x: self.rng.normal(0, 1, x.shape),
            lambda x: self.rng.choice(FLOATS, x.shape),
        )
        with np.errstate(all="ignore"):
            self.data = self.random.choice(choices)(self.data).astype(np.float32)

    def mgh(self) -> None:
        self.suffix = self.random.choice((".mgh", ".mgz"))
        shape = self.data.shape[: self.random.choice((3, 3, 2))] + (1,) * self.random.randrange(2)
        image = nib.MGHImage(
            self.data[..., 0] if len(shape) < 3 else self.data.reshape(self.data.shape),
            np.diag([-SPACING_MM, SPACING_MM, SPACING_MM, 1]),
        )
        raw = bytearray(image.to_bytes())
        for _ in range(self.random.randrange(4)):
            raw[self.random.randrange(284)] = self.random.choice((0, 255, 127, 128, 1))
        if self.random.random() < 0.2:
            raw = raw[: self.random.randrange(len(raw))]
        content = bytes(raw)
        self.touch = lambda path: path.write_bytes(
            zipped(content) if path.suffix == ".mgz" else content
        )

    def thing(self) -> None:
        """What is no image at all."""

        def circle(path: Path) -> None:
            other = path.with_name(f"to-{path.name}")
            other.symlink_to(path.name)
            path.symlink_to(other.name)

        def locked(path: Path) -> None:
            self.write(path)
            path.chmod(0)

        def in_a_file(path: Path) -> None:
            path.with_suffix(".x").write_text("a file")
            path.symlink_to(path.with_suffix(".x") / "below")

        text = self.random.choice(("", "hello\n", "\0" * 400, "<html>no</html>", '{"a": 1}'))
        junk = self.rng.bytes(self.random.choice((1, 2, 3, 347, 348, 352, 10_000)))
        self.touch = self.random.choice(
            (
                Path.mkdir,
                lambda path: os.mkfifo(path),
                circle,
                locked,
                in_a_file,
                lambda path: path.symlink_to("/nonexistent/annex/objects/x"),
                lambda path: path.symlink_to("/dev/null"),
                lambda path: path.symlink_to("/dev/zero"),
                lambda path: path.write_text(text) and None,
                lambda path: path.write_bytes(junk) and None,
                lambda path: path.write_bytes(zipped(junk)) and None,
                lambda _: None,
            )
        )

    # Where it goes.

    def into(self, folder: Path) -> Path:
        """The input in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}{self.suffix}"
        self.touch(path)
        return path

    def dataset(self, root: Path) -> Path:
        """A BIDS dataset that holds it as a scan."""
        anat = root / "sub-01" / "anat"
        anat.mkdir(parents=True)
        description = {"Name": "fuzz", "BIDSVersion": "1.10.0"}
        (root / "dataset_description.json").write_text(json.dumps(description))
        if self.kind != "named":
            self.name = "sub-01_T1w"
        elif not self.name.startswith("sub-"):
            self.name = f"sub-01_{self.name}_T1w"
            while len(os.fsencode(self.name)) > 240:
                self.name = self.name.replace(self.name[20], "", 1)
        self.into(anat)
        return root


KINDS = (
    *("field", "data_type", "scaling", "dimensions", "sform", "qform", "truncated", "bits"),
    *("odd_gzip", "offset", "suffixed", "named", "values", "mgh", "thing", "field", "named"),
)


def examine(seed: int, index: int, place: Path, *, apart: bool = False) -> list[str]:
    """What is wrong with what cadiff does with one input; everything happens below ``place``."""
    from cadiff_cli.cli import cadiff
    from cadiff_cli.io.images import load_scan

    scratch = place / "tmp"
    scratch.mkdir()
    tempfile.tempdir = str(scratch)
    path, out = Maker(seed, index).into(place / "in"), place / "out"
    dataset = Maker(seed, index).dataset(place / "bids")
    kept = snapshot(place)
    scans: list[Any] = []
    mask = ("mask", "--offline", "-o", str(out), "--", str(path))
    dry = ("run", str(dataset), str(place / "derivatives"), "participant", "--dry-run")
    quick = ("--offline", "--skip-bids-validation", "--template", "MNI152NLin2009aSym")
    found, codes = [], {}
    for step, call in (
        ("read", lambda: scans.append(load_scan(path))),
        ("mask", lambda: cadiff.main(list(mask), prog_name="cadiff", standalone_mode=False)),
        ("run", lambda: cadiff.main([*dry, *quick], prog_name="cadiff", standalone_mode=False)),
    ):
        code, said = watched(call, scratch.parent)
        codes[step] = code
        found += [f"{step}: {text}" for text in wrong(step, code, said)]
        found += [f"{step}: left {left} in the temporary folder" for left in os.listdir(scratch)]
        shutil.rmtree(scratch)
        scratch.mkdir()
    if scans and not np.isfinite(scans[0].t1.data).all():
        found.append("read: values are not finite")
    if codes["read"] and codes["mask"] != codes["read"]:
        found.append(f"mask: exit code {codes['mask']}, but reading ended with {codes['read']}")
    found += [f"mask: left {name}" for name in halves(out, codes["mask"])]
    if (place / "derivatives").exists():
        found.append("run: a dry run wrote")
    if snapshot(place) != kept:
        found.append("an input was changed")
    if apart:
        done = subprocess.run(
            [sys.executable, "-c", "from cadiff_cli.cli import main; main()"]
            + [str(place / "again") if word == str(out) else word for word in mask],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=SECONDS,
        )
        found += [f"mask alone: {text}" for text in wrong("mask", done.returncode, done.stderr)]
        if done.returncode != codes["mask"]:
            found.append(f"mask alone: exit code {done.returncode}, not {codes['mask']}")
    return found


def watched(call: Callable[[], object], place: Path) -> tuple[int, str]:
    """Exit code of a command in this process, and what it wrote to standard error."""
    from cadiff_cli.cli import guarded

    with (place / "stderr").open("w+b") as err, (place / "stdout").open("w+b") as out:
        with redirected(1, out.fileno()), redirected(2, err.fileno()):
            code = guarded(lambda: result if isinstance(result := call(), int) else 0)
        err.seek(0)
        return code, err.read().decode(errors="replace")


@contextmanager
def redirected(number: int, to: int) -> Iterator[None]:
    """What is written to a file descriptor, by whichever library, goes elsewhere."""
    stream = sys.stdout if number == 1 else sys.stderr
    stream.flush()
    saved = os.dup(number)
    os.dup2(to, number)
    try:
        yield
    finally:
        stream.flush()
        os.dup2(saved, number)
        os.close(saved)


def wrong(step: str, code: int, said: str) -> Iterator[str]:
    """What a user should not see."""
    lines = said.splitlines()
    errors = [line for line in lines if line.startswith("cadiff: error: ")]
    if code not in CODES[step]:
        yield f"exit code {code}: {said.strip()[-300:]}"
    elif len(errors) != (code != 0):
        yield f"{len(errors)} error lines with exit code {code}: {said.strip()[-300:]}"
    for line in lines:
        if "Traceback" in line or "This is a bug" in line or not line.startswith("cadiff: "):
            yield f"says {line[:300]!r}"
        elif not line.isprintable():
            yield f"says what is not printable: {line[:300]!r}"


def halves(out: Path, code: int) -> Iterator[str]:
    """Files that a command should not have left, or left by half."""
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or (name.startswith("logs/") and path.suffix == ".lock"):
            continue
        if code or (path.name.startswith(".") and path.name != ".bidsignore"):
            yield name
        elif path.suffix == ".gz":
            try:
                np.asarray(nib.load(path).dataobj)
            except Exception as error:
                yield f"{name}, which cannot be read ({error})"


def snapshot(place: Path) -> dict[str, tuple[int, int, int]]:
    """Mode, size and time of each input."""
    found = {}
    for folder in (place / "in", place / "bids"):
        for path in folder.rglob("*"):
            about = path.lstat()
            found[str(path)] = (about.st_mode, about.st_size, about.st_mtime_ns)
    return found


def serve() -> None:
    """A worker: seed, index and whether to try it apart on standard input, findings as JSON out."""
    import torch

    import cadiff_cli.runner.participants  # noqa: F401  what takes long to import

    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    answers = os.fdopen(os.dup(1), "w")
    # A first call loads what is loaded once.
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        examine(0, KINDS.index("named"), Path(folder))
    used = max(used, int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize())
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        seed, index, apart = map(int, line.split())
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/tmp") as folder:
            try:
                found = examine(seed, index, Path(folder), apart=bool(apart))
            except BaseException as error:
                found = [f"the fuzzer failed: {type(error).__name__}: {error}"]
            tempfile.tempdir = None
            for path in Path(folder).rglob("*"):
                if stat.S_ISREG(path.lstat().st_mode):
                    path.chmod(0o600)
        print(json.dumps(found), file=answers, flush=True)


class Worker:
    """A process that examines one input after another, and is replaced when it hangs or dies."""

    process: subprocess.Popen[str] | None = None

    def __call__(self, seed: int, index: int, apart: bool) -> list[str]:
        """Findings of one input."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "TEMPLATEFLOW_HOME": "/nonexistent",
                    "PYTHONWARNINGS": "default",
                },
            )
            self._answer(10 * SECONDS)
        assert self.process.stdin
        self.process.stdin.write(f"{seed} {index} {int(apart)}\n")
        self.process.stdin.flush()
        answer = self._answer(SECONDS * (1 + apart))
        return json.loads(answer) if answer else [self.end()]

    def _answer(self, seconds: float) -> str:
        assert self.process
        assert self.process.stdout
        ready, _, _ = select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else ""

    def end(self) -> str:
        """Kill it; says how it was found."""
        if self.process is None:
            return ""
        code = self.process.poll()
        self.process.kill()
        self.process.communicate()
        self.process = None
        return f"took more than {SECONDS:.0f} s" if code is None else f"the process died ({code})"


def fuzz(seed: int, indices: range, workers: int = 2, apart_every: int = 50) -> dict[int, list]:
    """Findings by index."""
    team = [Worker() for _ in range(workers)]
    found: dict[int, list[str]] = {}

    def work(k: int) -> None:
        for index in indices[k::workers]:
            apart = bool(apart_every) and index % apart_every == apart_every - 1
            if texts := team[k](seed, index, apart):
                found[index] = texts
                kind = KINDS[index % len(KINDS)]
                for text in texts:
                    print(f"seed {seed}, index {index} ({kind}): {text}", flush=True)

    try:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, range(workers)))
    finally:
        for worker in team:
            worker.end()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--only", type=int, help="This input alone, in this process.")
    parser.add_argument("--keep", type=Path, help="Where to leave that input.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.serve:
        serve()
        return 0
    if wanted.only is not None:
        folder = wanted.keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
        folder.mkdir(parents=True, exist_ok=True)
        found = examine(wanted.seed, wanted.only, folder)
        print("\n".join(found) or "nothing wrong", f"\n{folder}")
        return 1 if found else 0
    of_input = fuzz(wanted.seed, range(wanted.n), wanted.workers)
    kinds = Counter(KINDS[index % len(KINDS)] for index in of_input)
    print(f"{wanted.n} inputs, findings with {len(of_input)}: {dict(kinds)}")
    return 1 if of_input else 0


if __name__ == "__main__":
    sys.exit(main())
