"""A scan to segment, and what came of it.  Both travel between processes and machines."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cadiff_cli.config import Recipe
from cadiff_cli.io.derivatives import Derivatives, Finished, finished_result
from cadiff_cli.io.releases import sha256


@dataclass(frozen=True)
class Job:
    """One scan: all that a worker needs to know, with absolute paths.

    ``source`` is the scan's BIDS URI.  ``weights`` is what ``load_model`` takes.  ``notes`` are
    warnings about the template.  A job that finds another process at its scan comes back as
    ``busy``, or waits for it if ``wait`` is set.
    """

    t1: Path
    out: Path
    source: str
    recipe: Recipe
    weights: str
    run_id: str
    work_dir: Path | None = None
    threads: int | None = None
    notes: tuple[str, ...] = ()
    wait: bool = False

    def of(self, t1: Path, source: str) -> "Job":
        """The same job for another scan."""
        return replace(self, t1=t1, source=source)

    @property
    def place(self) -> Derivatives:
        """Where its results go."""
        return Derivatives(self.out, self.t1)

    @property
    def entities(self) -> str:
        """Its name in tables and journals, such as ``sub-01_ses-a``."""
        return self.place.stem

    @property
    def log_dir(self) -> Path:
        """Where its log and crash file go."""
        return self.out / self.entities.split("_")[0] / "log" / self.run_id

    def outdated(self, result: Finished) -> str:
        """Why ``result`` is not what this job would make; empty if it is."""
        changed = self.recipe.differs(result.sidecar)
        if not changed and result.sidecar.get("SourceSHA256") != sha256(self.t1):
            return f"{self.t1.name} has changed since"
        return changed

    def is_finished(self) -> bool:
        """Whether a complete and current result is there."""
        result = finished_result(self.place)
        return result is not None and not self.outdated(result)


@dataclass(frozen=True)
class Outcome:
    """What became of a job; ``message`` and ``crash_file`` tell of a failure."""

    entities: str
    status: Literal["done", "failed", "busy"]
    seconds: float = 0.0
    message: str = ""
    exit_code: int = 0
    crash_file: str = ""
    warnings: tuple[str, ...] = ()
