"""The journal of an output folder: the state of each scan, on disk, so that any process may die.

``logs/journal/SCAN.json`` holds the last outcome and ``SCAN.lock`` is locked while a process works
on the scan; the kernel unlocks it when that process ends or is killed.  ``SCAN.begun`` exists while
results are written, and after a run was killed while it wrote them.
"""

import json
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import cadiff_cli
from cadiff_cli.errors import (
    CadiffError,
    DiskError,
    OutputError,
    UnsuitableError,
    in_a_line,
)
from cadiff_cli.io.bids.layout import Derivatives, finished_result
from cadiff_cli.io.bids.names import JOURNAL, page_path
from cadiff_cli.io.files import NO_SPACE, locked, read_json, remove_partial, write_json, write_text
from cadiff_cli.io.provenance import Provenance
from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.runner.job import Job, Outcome

log = logging.getLogger(__name__)


class Journal:
    """The outcomes of an output folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / JOURNAL

    def record(self, outcome: Outcome) -> None:
        """Replace the record of a scan."""
        write_json(self.folder / f"{outcome.entities}.json", asdict(outcome))

    def scans(self) -> set[str]:
        """Scans of which an outcome is known."""
        return {path.stem for path in self.folder.glob("*.json")}

    def read(self, entities: str) -> Outcome | None:
        """The last outcome of a scan; None without a readable record."""
        values = read_json(self.folder / f"{entities}.json")
        if not values:
            return None
        try:
            notes = tuple(Note(NoteCode(x["code"]), x["text"]) for x in values["warnings"])
            return Outcome(**{**values, "warnings": notes})
        except (TypeError, KeyError):  # written by another version
            return None

    @contextmanager
    def writing(self, entities: str) -> Iterator[None]:
        """Mark results as unfinished within the block; after a killed run they may be replaced."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._mark(entities), "")
        yield
        self.forget(entities)

    def make_room(self, place: Derivatives, *inputs: Path | None, overwrite: bool) -> None:
        """Run ``place.check_free``; files of a killed run count as replaceable.

        So does a result with a deleted part, if its sidecar shows that cadiff wrote it.
        """
        sidecars = (Provenance.read(read_json(path) or {}) for path in place.sidecars)
        ours = self._mark(place.stem).exists() or any(sidecars)
        unfinished = ours and finished_result(place) is None
        place.check_free(*inputs, overwrite=overwrite or unfinished)

    def forget(self, entities: str) -> None:
        """Remove the mark of unfinished results."""
        self._mark(entities).unlink(missing_ok=True)

    def _mark(self, entities: str) -> Path:
        return self.folder / f"{entities}.begun"

    def failed_since(self, entities: str, path: Path) -> str:
        """The error of a scan that failed after ``path`` was written; empty if it did not fail."""
        last, record = self.read(entities), self.folder / f"{entities}.json"
        if last is None or last.status not in ("failed", "unsuitable"):
            return ""
        return last.message if record.stat().st_mtime > path.stat().st_mtime else ""

    def unsuitable(self, job: Job) -> Outcome | None:
        """The last outcome of an unsuitable scan; None if scan or settings have changed since."""
        last = self.read(job.entities)
        if last is None or last.status != "unsuitable" or job.overwrite:
            return None
        same = last.fingerprint == job.recipe.fingerprint
        return last if same and not job.has_changed(last.input_sha256) else None

    @contextmanager
    def lock(self, entities: str, *, wait: bool) -> Iterator[bool]:
        """Lock a scan for this process until the block ends; yield False if another has it.

        Once it is locked, half-written records and pages of killed runs are removed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / f"{entities}.lock", wait=wait) as is_ours:
            if is_ours:
                page = page_path(self.out, entities)
                records = (self.folder / f"{entities}.{kind}" for kind in ("json", "begun"))
                for path in (page, *records):
                    remove_partial(path)
            yield is_ours


@contextmanager
def alone(out: Path, entities: str) -> Iterator[None]:
    """Lock a scan for the block; raise ``OutputError`` if another process works on it."""
    with Journal(out).lock(entities, wait=False) as is_ours:
        if not is_ours:
            raise OutputError(
                f"another cadiff is working on {entities} in {out}",
                "wait until it has finished, or choose another output folder",
            )
        yield


def failure(job: Job, error: BaseException, seconds: float = 0.0) -> Outcome:
    """Record a job that failed, or whose scan can never be segmented."""
    cause = error
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        # Raised by a library.
        cause = DiskError(f"writing {error.filename or ''} failed ({error.strerror})", "free space")
    code = cause.exit_code if isinstance(cause, CadiffError) else 1
    outcome = Outcome(job.entities, "failed", round(seconds, 1), in_a_line(cause), code)
    if isinstance(error, UnsuitableError):
        outcome = replace(
            outcome,
            status="unsuitable",
            input_sha256=job.input_sha256(),
            fingerprint=job.recipe.fingerprint,
        )
    else:
        outcome = replace(outcome, crash_file=_write_crash_file(job, error))
    try:
        Journal(job.out).record(outcome)
    except CadiffError:
        log.warning("cannot write the journal of %s", job.out)
    return outcome


def _write_crash_file(job: Job, error: BaseException) -> str:
    """Write the facts for a bug report; return the file's path, empty if it cannot be written."""
    trace = "".join(traceback.format_exception(error))
    path = job.log_dir / f"crash-{job.entities}.txt"
    settings = json.dumps(job.recipe.settings(), indent=2)
    text = f"cadiff {cadiff_cli.__version__}\ninput {job.t1}\nsettings {settings}\n\n{trace}"
    try:
        write_text(path, text)
    except CadiffError:
        log.warning("cannot write %s", path)
        return ""
    return path.relative_to(job.out).as_posix()
