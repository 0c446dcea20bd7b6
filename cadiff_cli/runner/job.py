"""A scan to segment, and what came of it.  Both travel between processes and machines."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cadiff_cli.config import Recipe
from cadiff_cli.errors import OutputError
from cadiff_cli.io.bids.layout import Derivatives, Finished, finished_result
from cadiff_cli.io.bids.names import page_path
from cadiff_cli.io.files import sha256
from cadiff_cli.notes import Note


@dataclass(frozen=True)
class Job:
    """One scan: all that a worker needs to know, with absolute paths.

    ``source`` is the scan's BIDS URI. ``templates`` is what ``load_templates`` takes,
    ``weights`` what ``io.models.load`` does. ``notes`` are about the template.
    ``overwrite`` allows it to replace a result of other settings. A job that finds another
    process at its scan comes back as ``busy``, or waits if ``wait`` is set. ``report`` asks for
    a page to look at. ``age_years`` is that of the person, if it is known.
    """

    t1: Path
    out: Path
    source: str
    recipe: Recipe
    templates: str
    weights: str
    run_id: str
    work_dir: Path | None = None
    threads: int | None = None
    notes: tuple[Note, ...] = ()
    overwrite: bool = False
    wait: bool = False
    report: bool = True
    age_years: float | None = None

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
        made = result.provenance
        if changed := made.differs(self.recipe):
            return changed
        if not self.has_changed(made.source_sha256):
            return ""
        before = Path(made.source).name
        if before not in ("", self.t1.name):
            return f"of {before}, not of {self.t1.name}"
        return f"{self.t1.name} has changed since"

    def has_changed(self, checksum: str) -> bool:
        """Whether the input is another than that of ``checksum``.

        One that is not there any more (``datalad drop``), or that nobody may read now, is not.
        """
        return self.input_sha256() not in ("", checksum)

    def input_sha256(self) -> str:
        """Checksum of the input; empty if it cannot be read."""
        try:
            return sha256(self.t1)
        except OSError:
            return ""

    def is_finished(self) -> bool:
        """Whether a complete and current result is there; raises ``OutputError`` for another."""
        result = finished_result(self.place)
        if result is None:
            return False
        why = self.outdated(result)
        if not self.overwrite:
            self.refuse(self.entities, why)
        return not why

    def lacks_page(self) -> bool:
        """Whether a page is wanted that is not there: a run may be killed before it writes one."""
        return self.report and not page_path(self.out, self.entities).exists()

    def refuse(self, entities: str, why: str) -> None:
        """Raise ``OutputError`` for a result that was made otherwise, if there is a ``why``."""
        if why:
            raise OutputError(
                f"{self.out} holds {entities}, made otherwise ({why})",
                "use another output folder, the same settings (--config-file with a file of its"
                " logs), or --overwrite to make the selected scans again",
            )


@dataclass(frozen=True)
class Outcome:
    """What became of a job; ``message`` and ``crash_file`` tell of a failure.

    An ``unsuitable`` scan can never be segmented: it is not tried again while its input has
    ``input_sha256`` and the recipe this ``fingerprint``.
    """

    entities: str
    status: Literal["done", "failed", "busy", "unsuitable"]
    seconds: float = 0.0
    message: str = ""
    exit_code: int = 0
    crash_file: str = ""
    warnings: tuple[Note, ...] = ()
    input_sha256: str = ""
    fingerprint: str = ""
