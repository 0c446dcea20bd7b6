"""Which scans of a dataset are to be done, and which are done already."""

import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cadiff_cli.errors import DataError
from cadiff_cli.io.bids import Dataset, Selection, source_entities
from cadiff_cli.io.layout import finished
from cadiff_cli.runner.job import Job


@dataclass(frozen=True)
class Plan:
    """``jobs`` to execute; ``pages`` are jobs that only lack their page; ``notes`` for the user.

    ``done`` names complete results that stay.
    """

    jobs: tuple[Job, ...]
    pages: tuple[Job, ...]
    done: tuple[str, ...]
    notes: tuple[str, ...]


def new_run_id() -> str:
    """Names a run's logs: sorts by time, and differs between tasks that start together."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}_{uuid.uuid4().hex[:8]}"


def make_plan(
    dataset: Dataset,
    selection: Selection,
    like: Job,
    database: Path | None = None,
) -> Plan:
    """Find the selected scans and compare them with what is in the output folder.

    ``like`` gives everything but the scan.  Results of other settings or of another version are
    refused, whichever scan they are of: a dataset is made one way.  If ``like`` may overwrite,
    those of the selected scans are made again.
    """
    images, ignored = dataset.t1w(selection, database)
    jobs = [like.of(path, dataset.uri(path)) for path in images]
    _refuse_namesakes(jobs)
    why = "has no BIDS name" if database is None else f"has no BIDS name, or {database} is older"
    notes = [f"{path.relative_to(dataset.root)} {why}: ignored" for path in ignored]
    named = {job.entities.split("_")[0] for job in jobs}
    labels = selection.participants or dataset.participants()
    notes += [f"sub-{x} has no T1w image that fits" for x in labels if f"sub-{x}" not in named]
    selected = {job.entities for job in jobs}
    for result in finished(like.out):
        if result.entities not in selected and not like.overwrite:
            like.refuse(result.entities, like.recipe.differs(result.sidecar))
    done = {job.entities for job in jobs if job.is_finished()}
    todo = tuple(job for job in jobs if job.entities not in done)
    pages = tuple(job for job in jobs if job.entities in done and job.lacks_page())
    done -= {job.entities for job in pages}
    return Plan(todo, pages, tuple(sorted(done)), tuple(notes))


def scan_names(dataset: Dataset, selection: Selection, database: Path | None = None) -> list[str]:
    """Entities of the selected scans."""
    images, _ = dataset.t1w(selection, database)
    return [source_entities(path) for path in images]


def _refuse_namesakes(jobs: Sequence[Job]) -> None:
    for entities, n in Counter(job.entities for job in jobs).items():
        if n > 1:
            names = [str(job.t1) for job in jobs if job.entities == entities]
            raise DataError(
                f"{' and '.join(names)} would have the same results",
                "remove one of them, or choose with --bids-filter-file",
            )
