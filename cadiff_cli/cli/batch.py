"""One run of ``cadiff run`` as a person sees it: checks, a line per scan, a table of failures."""

import json
import logging
import tempfile
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import cadiff_cli
from cadiff_cli.cli.report import scan_pages
from cadiff_cli.config import Config
from cadiff_cli.errors import DiskError, UsageError, in_a_line
from cadiff_cli.io.bids.description import refuse_foreign, refuse_other_source, save_dataset_files
from cadiff_cli.io.bids.raw import Dataset
from cadiff_cli.io.bids.selection import Selection
from cadiff_cli.io.files import write_text
from cadiff_cli.io.provenance import make_recipe
from cadiff_cli.io.releases import DEFAULT, find_weights
from cadiff_cli.io.templates import load_template, load_templates
from cadiff_cli.labels import load_table
from cadiff_cli.report.boilerplate import cite, write_citations
from cadiff_cli.report.group import report_group, write_group_page
from cadiff_cli.runner.executor import Executor
from cadiff_cli.runner.group import collect, write_group
from cadiff_cli.runner.job import Job, Outcome
from cadiff_cli.runner.journal import Journal, failure
from cadiff_cli.runner.logs import warning
from cadiff_cli.runner.plan import Plan, make_plan, new_run_id, scan_names


@dataclass(frozen=True)
class Request:
    """What was asked for.  ``options`` are kept in the logs for ``--config-file``."""

    dataset: Dataset
    out: Path
    selection: Selection
    config: Config
    executor: Executor
    options: Mapping[str, Any]
    atlas: str = "auto"
    model: str = DEFAULT
    offline: bool = False
    spaces: tuple[str, ...] = ()
    field: bool = False
    work_dir: Path | None = None
    database: Path | None = None
    link: str | None = None
    validate: bool = True
    report: bool = True
    overwrite: bool = False
    dry_run: bool = False
    stop_on_first_crash: bool = False
    verbosity: int = 0


def participant_level(request: Request) -> int:
    """Segment the selected scans; returns the exit code."""
    console = make_console(request.verbosity)
    check_folders(request)
    if request.validate:
        _validate(request.dataset, console)
    job = _any_job(request)
    plan = make_plan(request.dataset, request.selection, job, request.database)
    for note in (*job.notes, *plan.notes):
        warn(console, note)
    if request.dry_run:
        for job, error in plan.failed:
            warn(console, f"{job.entities}: {in_a_line(error)}")
        for entities, status in plan.status.items():
            click.echo(f"{entities}\t{status}")
        return 0
    save_dataset_files(request.out, load_table(), request.dataset, request.link)
    _keep_options(request, job)
    outcomes = _execute(request, plan, console)
    code = _sum_up(request.out, plan, outcomes, console)
    if plan.done or any(outcome.status == "done" for outcome in outcomes):
        _cite(request.out, console)
    return code


def _cite(out: Path, console: Console) -> None:
    if why := cite(out):
        warn(console, why)


def group_level(request: Request) -> int:
    """Collect finished scans in one table; returns the exit code.

    The group is the dataset, but for what a filter file leaves out: a table of the participants and
    sessions that one task was given would replace that of all.
    """
    console = make_console(request.verbosity)
    check_folders(request)
    request.dataset.require(request.selection.participants)
    expected = _everybody(request)
    if request.dry_run:
        click.echo("\n".join(expected))
        return 0
    group = write_group(request.out, expected, load_table())
    _cite(request.out, console)
    if why := report_group(request.out, group, load_table(), wanted=request.report):
        warn(console, why)
    for note in group.notes:
        warn(console, note)
    for entities, reason in group.missing.items():
        warn(console, f"{entities} is not in the table: {reason}")
    console.print(f"{len(group.scans)} of {len(expected)} scans: {escape(str(group.path))}")
    return 0


def _everybody(request: Request) -> list[str]:
    """Scans of the group, whichever participants and sessions were named."""
    selection = replace(request.selection, participants=(), sessions=())
    return scan_names(request.dataset, selection, request.database)


def rebuild_reports(request: Request, levels: Collection[str], *, pages: bool) -> int:
    """Write again what is derived from finished results: citations, and pages of the ``levels``."""
    check_folders(request)
    write_citations(request.out)
    code = 0
    if pages and "participant" in levels:
        chosen = scan_names(request.dataset, request.selection, request.database)
        code = scan_pages(request.out, request.dataset.root, chosen)
    if pages and "group" in levels:
        group = collect(request.out, _everybody(request), table := load_table())
        click.echo(write_group_page(request.out, group, table))
    return code


def make_console(verbosity: int) -> Console:
    """Messages go to stderr, the package's log with ``-v``; files are not folded at 80 columns."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 200
    logger = logging.getLogger("cadiff_cli")
    logger.propagate = False
    if not logger.handlers:  # one level of several has added it
        logger.addHandler(logging.StreamHandler() if verbosity else logging.NullHandler())
    logger.setLevel(logging.DEBUG if verbosity > 1 else logging.INFO)
    return console


def warn(console: Console, text: str) -> None:
    """One line, as ``cadiff-seg`` says it."""
    console.print(escape(warning(" ".join(text.split()))))


def check_folders(request: Request) -> None:
    """The dataset is one, and the output and work folders are not in its way."""
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
    refuse_foreign(request.out)
    refuse_other_source(request.out, request.dataset, request.link)


def _validate(dataset: Dataset, console: Console, shown: int = 5) -> None:
    errors = dataset.violations()
    for line in errors[:shown]:
        warn(console, f"BIDS validator: {line}")
    if len(errors) > shown:
        warn(console, f"BIDS validator: and {len(errors) - shown} more errors")


def _any_job(request: Request) -> Job:
    """A job for no scan in particular; what all need is looked for, and downloaded, now."""
    from cadiff_cli.device import pick_device
    from cadiff_cli.stages.space import parse_space

    if request.executor.kind == "local" and not request.dry_run:
        pick_device(request.config.sample.device)
    path, label, sha256 = find_weights(request.model)
    spaces = tuple(dict.fromkeys(request.spaces))
    for name, _ in map(parse_space, spaces):
        load_template(name, offline=request.offline)
    templates = load_templates(request.atlas, offline=request.offline)
    return Job(
        t1=Path(),
        out=request.out,
        source="",
        recipe=make_recipe(request.config, templates, label, sha256, spaces, request.field),
        weights=str(path.absolute()) if Path(request.model).suffix else request.model,
        run_id=new_run_id(),
        work_dir=request.work_dir,
        threads=request.executor.omp_nthreads,
        notes=templates[0].warnings,
        overwrite=request.overwrite,
        report=request.report,
    )


def _keep_options(request: Request, job: Job) -> None:
    """The run's options as TOML (JSON's plain values are TOML's), fit for ``--config-file``."""
    values = {**request.options, "atlas": job.recipe.template, "model": job.weights}
    chosen = request.selection  # labels may have come from a file, found from here only
    values |= {"participant_label": chosen.participants, "session_label": chosen.sessions}
    if values.get("mem"):  # bytes by now; a bare number would be MB
        values["mem"] = f"{values['mem']}B"
    lines = [
        f"{name} = {json.dumps(_anywhere(value), ensure_ascii=False)}"
        for name, value in values.items()
        if value is not None
    ]
    write_text(
        request.out / "logs" / f"cadiff_{job.run_id}.toml",
        f"# cadiff {cadiff_cli.__version__}\n" + "\n".join(lines) + "\n",
    )


def _anywhere(value: object) -> object:
    """An option's value, such that it means the same in another working directory."""
    return str(value.absolute()) if isinstance(value, Path) else value


def _execute(request: Request, plan: Plan, console: Console) -> list[Outcome]:
    """Every job once; those that another process was at, when the others are done."""
    jobs = (*plan.jobs, *plan.pages)
    by_entities = {job.entities: job for job in jobs}
    outcomes: list[Outcome] = []

    def add(outcome: Outcome) -> None:
        outcomes.append(outcome)
        _tell(console, outcome, f"[{len(outcomes)}/{len(jobs) + len(plan.failed)}]")

    journal = Journal(request.out)
    for job, error in plan.failed:
        with journal.claim(job.entities, wait=True):
            add(failure(job, error))
        if _is_last(request, outcomes[-1]):
            return outcomes
    if request.work_dir:
        request.work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cadiff-", dir=request.work_dir) as scratch:
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


def _without(outcome: Outcome, known: Collection[str]) -> Outcome:
    """The outcome but for warnings that were said once for all scans."""
    return replace(outcome, warnings=tuple(w for w in outcome.warnings if w not in known))


def _is_last(request: Request, outcome: Outcome) -> bool:
    """A full disk is no scan's fault: the others would fail as well."""
    failed = outcome.status == "failed"
    return failed and (request.stop_on_first_crash or outcome.exit_code == DiskError.exit_code)


def _tell(console: Console, outcome: Outcome, count: str) -> None:
    said = f"{count} {outcome.entities}  {outcome.status}  {outcome.seconds:.0f} s"
    console.print(escape(f"{said}  {outcome.message}".rstrip()))
    for text in outcome.warnings:
        warn(console, f"{outcome.entities}: {text}")


def _sum_up(out: Path, plan: Plan, outcomes: list[Outcome], console: Console) -> int:
    """A table of what failed, and one line of counts; returns the exit code.

    Unsuitable scans are told of, but ask for no other run.
    """
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed:
        table = Table("scan", "error", "crash file", title="failed")
        for outcome in failed:
            table.add_row(*map(escape, (outcome.entities, outcome.message, outcome.crash_file)))
        console.print(table)
    unsuitable = [outcome for outcome in outcomes if outcome.status == "unsuitable"]
    if unsuitable or plan.unsuitable:
        table = Table("scan", "why", title="unsuitable")
        for outcome in (*plan.unsuitable, *unsuitable):
            table.add_row(escape(outcome.entities), escape(outcome.message))
        console.print(table)
    if doubts := [(outcome.entities, text) for outcome in outcomes for text in outcome.warnings]:
        table = Table("scan", "warning", title="to look at")
        for doubt in doubts:
            table.add_row(*map(escape, doubt))
        console.print(table)
    untried = len(plan.jobs) + len(plan.pages) + len(plan.failed) - len(outcomes)
    counts = {
        "done": len(outcomes) - len(failed) - len(unsuitable),
        "done before": len(plan.done),
        "failed": len(failed),
        "unsuitable": len(unsuitable) + len(plan.unsuitable),
        "not tried": untried,
    }
    said = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    console.print(f"{said or 'nothing to do'}: {escape(str(out))}")
    if any(outcome.exit_code == DiskError.exit_code for outcome in failed):
        return DiskError.exit_code
    return 1 if failed else 0
