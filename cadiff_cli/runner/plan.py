"""Which scans of a dataset are to be done, and which are done already."""

import hashlib
import time
import uuid
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cadiff_cli.config import Recipe
from cadiff_cli.errors import CadiffError, DataError, first_few
from cadiff_cli.io.bids.names import source_entities
from cadiff_cli.io.bids.raw import Dataset
from cadiff_cli.io.bids.selection import Selection, select
from cadiff_cli.io.formats import stem, unpacked
from cadiff_cli.runner.job import Job, Outcome
from cadiff_cli.runner.journal import Journal
from cadiff_cli.runner.results import Results


@dataclass(frozen=True)
class Plan:
    """``jobs`` to execute; ``pages`` are jobs that only lack their page; ``notes`` for the user.

    ``done`` names complete results that stay; ``failed`` are jobs that cannot be begun, with why.
    ``unsuitable`` are outcomes of earlier runs, which would be the same again.
    """

    jobs: tuple[Job, ...]
    pages: tuple[Job, ...]
    done: tuple[str, ...]
    failed: tuple[tuple[Job, Exception], ...]
    unsuitable: tuple[Outcome, ...]
    notes: tuple[str, ...]

    @property
    def status(self) -> dict[str, str]:
        """What would become of each scan: ``todo``, ``done``, ``failed`` or ``unsuitable``."""
        found = dict.fromkeys(self.done, "done")
        found |= {job.entities: "todo" for job in self.jobs}
        found |= {job.entities: "done" for job in self.pages}
        found |= {job.entities: "failed" for job, _ in self.failed}
        found |= {outcome.entities: "unsuitable" for outcome in self.unsuitable}
        return dict(sorted(found.items()))


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
    those of the selected scans are made again.  What is wrong with one scan is that scan's.
    """
    selected = select(dataset, selection, database)
    personal = cache(like.personal)

    def recipe(entities: str) -> Recipe:
        return personal(dataset.people.of_scan(entities)).recipe

    results = Results(like.out, lambda entities: recipe(entities).fingerprint)
    if not like.overwrite:
        for result in results.read:
            like.refuse(result.entities, result.provenance.differs(recipe(result.entities)))
    journal, notes = Journal(like.out), [*selected.notes, *dataset.people.notes]
    jobs, pages, done = list[Job](), list[Job](), list[str]()
    failed, unsuitable = list[tuple[Job, Exception]](), list[Outcome]()
    for paths in _by_name(selected.images).values():
        theirs = personal(dataset.people.of_scan(source_entities(paths[0])))
        job = theirs.of(paths[0], dataset.uri(paths[0]))
        try:
            if len(paths) > 1:
                image = _one_of(paths)
                notes.append(f"{image.name} is taken; {paths[0].name} is the same image")
                job = theirs.of(image, dataset.uri(image))
            if results.has(job):
                if job.lacks_page():
                    pages.append(job)
                else:
                    done.append(job.entities)
            elif before := journal.unsuitable(job):
                unsuitable.append(before)
            else:
                jobs.append(job)
        except (CadiffError, OSError) as error:
            failed.append((job, error))
    if like.conditional and (without := [job.entities for job in jobs if job.atlas is None]):
        notes.append(
            f"{like.recipe.template} instead of an atlas of their own for {first_few(without)}:"
            " the age is unknown, or none that the atlas model knows"
        )
    return Plan(
        tuple(jobs), tuple(pages), tuple(done), tuple(failed), tuple(unsuitable), tuple(notes)
    )


def scan_names(dataset: Dataset, selection: Selection, database: Path | None = None) -> list[str]:
    """Entities of the selected scans."""
    return [*_by_name(select(dataset, selection, database).images)]


def _by_name(images: Iterable[Path]) -> dict[str, list[Path]]:
    """Images by the entities that their results would be named after."""
    found = dict[str, list[Path]]()
    for path in images:
        found.setdefault(source_entities(path), []).append(path)
    return found


def _one_of(namesakes: Sequence[Path]) -> Path:
    """The compressed one of two files of one image.

    Raises ``DataError`` where they are two images: their results would have the same names.
    """
    names = " and ".join(path.name for path in namesakes)
    if len({stem(path) for path in namesakes}) > 1:
        raise DataError(
            f"{names} would have the same results",
            'choose with a --bids-filter-file of {"t1w": {"suffix": "T1w"}}, or "UNIT1"',
        )
    plain, packed = sorted(namesakes)
    if not _is_same(plain, packed):
        raise DataError(
            f"{names} are not the same image",
            'remove one, or choose with a --bids-filter-file of {"t1w": {"extension": ".nii.gz"}}',
        )
    return packed


def _is_same(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes when they are unpacked."""
    try:
        with unpacked(one) as first, unpacked(other) as second:
            digests = (hashlib.file_digest(stream, "sha256").digest() for stream in (first, second))
            return len({*digests}) == 1
    except (OSError, EOFError, zlib.error):  # one of them is damaged
        return False
