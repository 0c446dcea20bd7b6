"""The two levels of a BIDS app: segment the selected scans, collect the group.

Nothing here prints: a ``Listener`` receives every event, and functions return an exit code.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import cadiff_cli
from cadiff_cli.config import Request
from cadiff_cli.errors import DiskError, MissingInputError, OutputError, UsageError, in_a_line
from cadiff_cli.io.bids.description import (
    people_of,
    refuse_foreign,
    refuse_other_source,
    save_dataset_files,
)
from cadiff_cli.io.bids.layout import finished
from cadiff_cli.io.bids.people import NOBODY, People
from cadiff_cli.io.bids.raw import Dataset
from cadiff_cli.io.bids.selection import Selection
from cadiff_cli.io.cohorts import GROUP_TABLE
from cadiff_cli.io.files import write_text
from cadiff_cli.machine import work_folder
from cadiff_cli.notes import Note, codes_of, texts
from cadiff_cli.quality.group import Group
from cadiff_cli.report.group import GROUP_PAGE, report_group, write_group_page
from cadiff_cli.report.methods import cite, write_citations
from cadiff_cli.report.page import remove, write_page
from cadiff_cli.runner.execute import prepare_torch
from cadiff_cli.runner.executor import Executor
from cadiff_cli.runner.group import collect, known_scans, write_group
from cadiff_cli.runner.job import Job, Outcome, job_of
from cadiff_cli.runner.journal import Journal, alone, failure
from cadiff_cli.runner.plan import Plan, make_plan, new_run_id, scan_names


@dataclass(frozen=True, kw_only=True)
class DatasetRequest(Request):
    """A request to segment the selected scans of a dataset.

    ``options`` are kept in the logs for ``--config-file``.  ``database`` is the folder of pybids'
    index, ``link`` the URI of the dataset.
    """

    dataset: Dataset
    out: Path
    selection: Selection
    executor: Executor
    options: Mapping[str, Any]
    database: Path | None = None
    link: str | None = None
    validate: bool = True
    dry_run: bool = False
    stop_on_first_crash: bool = False


@dataclass(frozen=True)
class Summary:
    """The outcomes of a participant level; ``plan`` holds the scans that were finished before."""

    out: Path
    plan: Plan
    outcomes: tuple[Outcome, ...] = ()

    def of(self, status: str) -> tuple[Outcome, ...]:
        """The outcomes of this run that have the ``status``."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == status)

    @property
    def counts(self) -> dict[str, int]:
        """Number of scans by status, zeros included."""
        planned = len(self.plan.jobs) + len(self.plan.pages) + len(self.plan.failed)
        return {
            "done": len(self.of("done")),
            "done before": len(self.plan.done),
            "failed": len(self.of("failed")),
            "unsuitable": len(self.of("unsuitable")) + len(self.plan.unsuitable),
            "not tried": planned - len(self.outcomes),
        }

    @property
    def exit_code(self) -> int:
        """0 if no scan failed.  Unsuitable scans are no failures: a rerun would not help."""
        failed = self.of("failed")
        if any(outcome.exit_code == DiskError.exit_code for outcome in failed):
            return DiskError.exit_code
        return 1 if failed else 0


class Listener(Protocol):
    """Receives events as they happen."""

    def warn(self, text: str) -> None:
        """One line that the user should read."""

    def line(self, text: str) -> None:
        """One line of the command's output: a file that was written, or a scan of a dry run."""

    def outcome(self, outcome: Outcome, number: int, total: int) -> None:
        """The ``number``-th of ``total`` scans has ended."""

    def summary(self, summary: Summary) -> None:
        """The participant level has ended."""

    def group(self, group: Group, expected: int) -> None:
        """The group table is written; it should hold ``expected`` scans."""


def participant_level(request: DatasetRequest, listener: Listener) -> int:
    """Segment the selected scans; returns the exit code."""
    check_folders(request)
    chosen = request.selection.participants or request.selection.sessions
    if request.validate and not chosen:  # one task of many does not validate for all
        _validate(request.dataset, listener)
    if request.executor.kind == "local" and not request.dry_run:
        prepare_torch(request.machine)
    job, _ = job_of(request, request.out, new_run_id())
    plan = make_plan(request.dataset, request.selection, job, request.database)
    for text in (*texts(job.notes), *plan.notes):
        listener.warn(text)
    if request.dry_run:
        for job, error in plan.failed:
            listener.warn(f"{job.entities}: {in_a_line(error)}")
        for entities, status in plan.status.items():
            listener.line(f"{entities}\t{status}")
        return 0
    save_dataset_files(request.out, request.dataset, request.link)
    _keep_options(request, job)
    summary = Summary(request.out, plan, tuple(_execute(request, plan, listener)))
    listener.summary(summary)
    if plan.done or summary.of("done"):
        _cite(request.out, listener)
    return summary.exit_code


def _cite(out: Path, listener: Listener) -> None:
    if why := cite(out):
        listener.warn(why)


def group_level(request: DatasetRequest, listener: Listener) -> int:
    """Collect finished scans in one table; returns the exit code.

    The group is the whole dataset without scans that a filter file excludes.  Named participants
    and sessions are ignored: a table of one task's scans would replace that of all.
    """
    check_folders(request)
    request.dataset.require(request.selection.participants, request.selection.sessions)
    expected = _everybody(request)
    if request.dry_run:
        listener.line("\n".join(expected))
        return 0
    tell(request.dataset.people, listener)
    group = write_group(request.out, expected, request.dataset.people)
    _cite(request.out, listener)
    if why := report_group(request.out, group, wanted=request.config.output.report):
        listener.warn(why)
    for note in group.notes:
        listener.warn(note)
    for entities, reason in group.missing.items():
        listener.warn(f"{entities} is not in the table: {reason}")
    listener.group(group, len(expected))
    return 0


def _everybody(request: DatasetRequest) -> list[str]:
    """Scans of the group: of all participants and sessions, even if some were named."""
    selection = replace(request.selection, participants=(), sessions=())
    return scan_names(request.dataset, selection, request.database)


def rebuild_reports(
    request: DatasetRequest, levels: Collection[str], listener: Listener, *, pages: bool
) -> int:
    """Write citations, and pages of the ``levels``, again from finished results; the exit code."""
    check_folders(request)
    code = 0
    if note := cite(request.out) if pages else write_citations(request.out):
        listener.warn(note)
        code = 1
    if pages:
        tell(request.dataset.people, listener)
    if pages and "participant" in levels:
        chosen = scan_names(request.dataset, request.selection, request.database)
        dataset = request.dataset
        pages_code = scan_pages(request.out, dataset.root, listener, chosen, dataset.people)
        code = max(code, pages_code)
    if pages and "group" in levels:
        group = collect(request.out, _everybody(request), request.dataset.people)
        listener.line(str(write_group_page(request.out, group)))
    return code


def tell(people: People, listener: Listener) -> None:
    """Say what could not be read of ages and sexes."""
    for note in people.notes:
        listener.warn(note)


def folder_pages(out: Path, scans: Path | None, listener: Listener) -> int:
    """Pages of all finished results of a folder, and of the group if it has several scans.

    Ages and sexes are those that ``scans`` or the dataset tell.  Returns the exit code.
    """
    people = people_of(out, scans)
    tell(people, listener)
    code = scan_pages(out, scans, listener, people=people)
    names = known_scans(out)
    if len(names) > 1 or (out / GROUP_TABLE).exists():
        listener.line(str(write_group_page(out, collect(out, names, people))))
    else:
        remove(out / GROUP_PAGE)
    return code


def scan_pages(
    out: Path,
    scans: Path | None,
    listener: Listener,
    only: Collection[str] | None = None,
    people: People = NOBODY,
) -> int:
    """Pages of all finished results, or of ``only`` those with these entities; the exit code.

    Ages and sexes that ``people`` know count, not what sidecars hold.
    """
    results = [r for r in finished(out) if only is None or r.entities in only]
    if not results:
        whose = "" if only is None else " of the scans that were named"
        raise MissingInputError(f"{out} holds no finished result{whose}", "segment a scan first")
    code = 0
    for result in results:
        try:
            with alone(out, result.entities):
                listener.line(str(write_page(out, result.known_as(people), scans)))
        except Exception as error:  # one bad result must not cost the others their pages
            listener.warn(f"{result.entities}: {in_a_line(error)}")
            code = 1
    return code


def check_folders(request: DatasetRequest) -> None:
    """Raise unless the dataset is valid and the output and work folders are allowed."""
    _ = request.dataset.description
    root, out = request.dataset.root.resolve(), request.out.resolve()
    if root == out:
        raise UsageError(
            f"the output folder is the dataset itself ({out})",
            f"use {out / 'derivatives' / 'cadiff'}",
        )
    if request.work_dir and request.work_dir.resolve().is_relative_to(root):
        raise UsageError(
            f"the work folder {request.work_dir} lies in the dataset", "choose another with -w"
        )
    if request.work_dir and request.work_dir.exists() and not request.work_dir.is_dir():
        raise OutputError(f"the work folder {request.work_dir} is a file", "name a folder with -w")
    refuse_foreign(request.out)
    refuse_other_source(request.out, request.dataset, request.link)


def _validate(dataset: Dataset, listener: Listener, shown: int = 5) -> None:
    errors = dataset.violations()
    for line in errors[:shown]:
        listener.warn(f"BIDS validator: {line}")
    if len(errors) > shown:
        listener.warn(f"BIDS validator: and {len(errors) - shown} more errors")


def _keep_options(request: DatasetRequest, job: Job) -> None:
    """The run's options as TOML, fit for ``--config-file``."""
    values = {
        **request.options,
        "template": job.specs,
        "model": job.weights,
    }
    if request.config.strip.model:  # else it follows --model, of which a command may name another
        values["strip_model"] = job.recipe.config.strip.model
    if job.conditional:
        values["atlas_model"] = job.conditional.model
    chosen = request.selection  # labels may have come from a file with a relative path
    values |= {"participant_label": chosen.participants, "session_label": chosen.sessions}
    if values.get("mem"):  # bytes by now; a bare number would be MB
        values["mem"] = f"{values['mem']}B"
    lines = [_line(name, _plain(x)) for name, x in values.items() if x is not None]
    write_text(
        request.out / "logs" / f"cadiff_{job.run_id}.toml",
        f"# cadiff {cadiff_cli.__version__}\n" + "\n".join(lines) + "\n",
    )


def _line(name: str, value: object) -> str:
    """A line of TOML; a comment where TOML cannot hold the value."""
    # JSON's plain values are TOML's, but for a control character.
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    try:
        text.encode()
    except UnicodeEncodeError:  # a file's name that is not UTF-8
        return f"# {name} is not UTF-8: give it again"
    return f"{name} = {text}"


def _plain(value: object) -> object:
    """An option's value; a path becomes one that stays valid in another working directory."""
    return str(value.absolute()) if isinstance(value, Path) else value


def _execute(request: DatasetRequest, plan: Plan, listener: Listener) -> list[Outcome]:
    """Execute every job once; scans that another process works on come last."""
    jobs = (*plan.jobs, *plan.pages)
    by_entities = {job.entities: job for job in jobs}
    outcomes: list[Outcome] = []

    def add(outcome: Outcome) -> None:
        outcomes.append(outcome)
        listener.outcome(outcome, len(outcomes), len(jobs) + len(plan.failed))

    journal = Journal(request.out)
    for job, error in plan.failed:
        with journal.lock(job.entities, wait=True):
            add(failure(job, error))
        if _is_last(request, outcomes[-1]):
            return outcomes
    if request.work_dir:
        request.work_dir.mkdir(parents=True, exist_ok=True)
    with work_folder(where=request.work_dir) as scratch:
        # Another machine sees the work folder that was given, but not this one's /tmp.
        here = Path(scratch) if request.executor.kind == "local" else request.work_dir
        waiting = [replace(job, work_dir=here) for job in jobs]
        while waiting:
            busy: list[Job] = []
            with closing(request.executor.run(waiting)) as stream:
                for outcome in stream:
                    if outcome.status == "busy":
                        again = replace(by_entities[outcome.entities], work_dir=here, wait=True)
                        busy.append(again)
                        continue
                    outcome = _without(outcome, by_entities[outcome.entities].notes)
                    add(outcome)
                    if _is_last(request, outcome):
                        return outcomes
            waiting = busy
    return outcomes


def _without(outcome: Outcome, reported: Iterable[Note]) -> Outcome:
    """The outcome without notes that were reported once for all scans."""
    codes = codes_of(reported)
    return replace(outcome, warnings=tuple(x for x in outcome.warnings if x.code not in codes))


def _is_last(request: DatasetRequest, outcome: Outcome) -> bool:
    """Whether to stop: on a full disk all other scans would fail as well."""
    failed = outcome.status == "failed"
    return failed and (request.stop_on_first_crash or outcome.exit_code == DiskError.exit_code)
