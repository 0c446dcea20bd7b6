"""Execute a job: the same function in this process, in a worker process or on another machine."""

import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import cadiff_cli
from cadiff_cli.config import Machine, Request
from cadiff_cli.errors import UsageError, changed_meanwhile
from cadiff_cli.io.bids.derivatives import save_result
from cadiff_cli.io.bids.layout import Derivatives, finished_result
from cadiff_cli.io.bids.tables import check_table
from cadiff_cli.io.checksums import checksums
from cadiff_cli.io.files import check_writable, locked
from cadiff_cli.io.images import given_mask, load_scan
from cadiff_cli.io.releases import strip_weights_sha256
from cadiff_cli.io.templates import (
    load_template,
    load_templates,
    own_contents,
    parse_space,
    parse_specs,
)
from cadiff_cli.machine import cores, work_folder
from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.pipeline import Announce, run
from cadiff_cli.products import Person, Result, Scan, Template
from cadiff_cli.quality.age_ranges import AgeRanges, fits, keep_age_ranges, read_age_ranges
from cadiff_cli.report.methods import cite
from cadiff_cli.report.page import draw_result, report_scan
from cadiff_cli.runner.job import RECORD, Job, Outcome, job_of
from cadiff_cli.runner.journal import Journal, alone, failure
from cadiff_cli.runner.logs import LOGGER, capture_warnings, logged
from cadiff_cli.runner.personal import PersonalAtlas, split

if TYPE_CHECKING:
    import torch

    from cadiff_cli.nets.models import Model


class Watcher(Protocol):
    """Sees one scan being segmented."""

    @property
    def screen(self) -> logging.Handler:
        """Handles the package's log records as well."""

    def stage(self, name: str) -> None:
        """A stage begins."""


ASIDE = 3
"""Threads that end a scan: one draws its page, the others compress images."""
_ONE_AT_A_TIME = threading.Lock()
"""ANTs' output is silenced for the whole process: jobs must not share one at the same time."""


def execute(job: Job) -> Outcome:
    """Segment one scan of a dataset.  Errors do not rise: the outcome holds them."""
    begun = time.perf_counter()
    with _ONE_AT_A_TIME:
        try:
            journal = Journal(job.out)
            with journal.lock(job.entities, wait=job.wait) as mine:
                if not mine:
                    return Outcome(job.entities, "busy")
                if job.is_finished(finished_result(job.place)):
                    failed = ""
                    if job.lacks_page():
                        failed = report_scan(job.out, job.t1, person=job.person)
                    outcome = Outcome(job.entities, "done", warnings=_no_page(failed))
                    journal.record(outcome)
                    return outcome
                with logged(job.log_dir / f"{job.entities}.log"):
                    device = prepare_torch(job.machine)
                    begun_ns = time.time_ns()
                    scan = replace(load_scan(job.t1), person=job.person)
                    checksums(job.out / RECORD).add(job.t1, scan.sha256, begun_ns)
                    templates = _templates_of(job)
                    result, failed = make_result(job, scan, templates, device)
                seconds = round(time.perf_counter() - begun, 1)
                notes = (*result.notes, *_no_page(failed))
                outcome = Outcome(job.entities, "done", seconds, warnings=notes)
                journal.record(outcome)
                return outcome
        except Exception as error:
            return failure(job, error, time.perf_counter() - begun)


def _no_page(failed: str) -> tuple[Note, ...]:
    """What a page failed of, as a note; nothing if it did not."""
    return (Note(NoteCode.NO_PAGE, failed),) if failed else ()


def segment_file(
    t1: Path, out: Path, request: Request, watcher: Watcher, person: Person = Person()
) -> Result:
    """Segment one file outside of a dataset, and write its derivatives.  Errors rise.

    Input and output are checked before anything costly begins (``checked``).
    """
    capture_warnings()
    place = Derivatives(out, t1)
    scan = checked(t1, place, request, person)
    log_path = out / "logs" / f"{place.stem}_{time.strftime('%Y%m%dT%H%M%S')}.log"
    with alone(out, place.stem), logged(log_path, watcher.screen):
        watcher.stage("load")
        job, templates, device = planned(request, out, person)
        job = job.of(t1, "").personal(person)
        if job.atlas:
            templates = _templates_of(job)
        jobs = request.machine.threads or cores()
        result, _ = make_result(job, scan, templates, device, watcher.stage, jobs)
        if trouble := cite(out):
            LOGGER.warning(trouble)
    return result


def planned(
    request: Request, out: Path, person: Person
) -> tuple[Job, tuple[Template, ...], "torch.device"]:
    """A job for a scan of ``person``, its templates, and the device.

    All that could fail without the scan fails here.
    """
    device = prepare_torch(request.machine)
    job, templates = job_of(request, out)
    if job.conditional:  # of one scan, nothing takes the place of an atlas that cannot be made
        job.conditional.of(person)
    return job, templates, device


def checked(t1: Path, place: Derivatives, request: Request, person: Person = Person()) -> Scan:
    """Load a scan, whose results will lie at ``place``; check input, mask, age and output folders.

    Results that stand are refused unless ``request.overwrite`` is set; remains of a killed run are
    not.  Folders are made, no file is written or removed.
    """
    scan = replace(load_scan(t1), person=person)
    if mask := request.config.strip.mask:
        given_mask(mask, scan)
    specs, conditional = split(request.template)
    parse_specs(specs)
    if conditional and person.age_years is None:
        raise UsageError("--template conditional needs the person's age", "give --age, and --sex")
    Journal(place.out).make_room(place, t1, mask, overwrite=request.overwrite)
    if request.work_dir:
        check_writable(request.work_dir)
    return scan


def make_result(
    job: Job,
    scan: Scan,
    templates: Sequence[Template],
    device: "torch.device",
    announce: Announce | None = None,
    jobs: int = 1,
) -> tuple[Result, str]:
    """Segment the job's scan and write results and page, under the lock that the caller holds.

    ``device`` is that of ``prepare_torch``; ``jobs`` registrations are done at a time.

    Returns the result, and why the page could not be written (empty if it was).
    """
    from cadiff_cli.stages.field import mean_field
    from cadiff_cli.stages.space import to_space

    def begin(stage: str) -> None:
        LOGGER.info("stage %s", stage)
        if announce:
            announce(stage)

    config = job.recipe.config
    LOGGER.info("cadiff %s, input %s, %r", cadiff_cli.__version__, job.t1, scan.t1)
    LOGGER.info("settings %s", job.recipe.settings())
    for note in scan.notes:
        LOGGER.warning(note.text)
    journal = Journal(job.out)
    journal.make_room(job.place, job.t1, config.strip.mask, overwrite=job.overwrite)
    model = _model(job.weights, job.recipe.weights_sha256)
    check_table(job.out, model.parcellation)
    if strip_weights_sha256(config.strip) != job.recipe.strip_sha256:
        raise changed_meanwhile(f"the weights {config.strip.network}")
    if config.output.codes == "freesurfer":  # raises now, not when all is computed
        model.parcellation.freesurfer(model.parcellation.codes)
    ranges = _ranges(job, model) if job.ranges else None
    with work_folder(f"cadiff-{job.entities}-", job.work_dir) as folder:
        work = Path(folder)
        result = run(
            scan,
            templates,
            model,
            config,
            work,
            begin,
            gate(device),
            job.machine.device,
            jobs=jobs,
            ranges=ranges,
        )
        own = {template.name: template for template in templates}
        for text in config.output.spaces:
            name, resolution = parse_space(text, templates)
            space = to_space(result, own.get(name) or _template(name), resolution, work)
            result = replace(result, spaces=(*result.spaces, space))
        begin("write")
        wanted = config.output.field
        field = mean_field(result.prepared.registrations, scan.t1.grid) if wanted else None
        if ranges:
            keep_age_ranges(job.out, ranges)
        with ThreadPoolExecutor(ASIDE) as aside:  # the page is drawn while files are written
            drawn = aside.submit(draw_result, result) if config.output.report else None
            with journal.writing(job.entities):
                save_result(
                    result,
                    job.out,
                    field,
                    source=job.source or None,
                    run_id=job.run_id or None,
                    aside=aside,
                )
    LOGGER.info("seconds per stage: %s", dict(result.seconds))
    if drawn is None:
        return result, report_scan(job.out, job.t1, wanted=False)
    begin("report")
    return result, report_scan(job.out, job.t1, drawn=drawn.result)


def prepare_torch(machine: Machine) -> "torch.device":
    """Settle how this process uses the machine, before torch is first imported.

    Returns the device that is meant; raises ``UsageError`` for one that is not there.
    """
    # Huge pages: fewer page faults for torch's large tensors.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    from cadiff_cli.device import pick_device

    if machine.threads:
        torch.set_num_threads(machine.threads)
    LOGGER.info("%d threads of %d cores", torch.get_num_threads(), cores())
    return pick_device(machine.device)


def gate(device: "torch.device") -> AbstractContextManager[object]:
    """What inference passes through: one process at a time on a GPU."""
    return _gpu(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=1)
def _model(name: str, sha256: str) -> "Model":
    """Loaded once per process."""
    from cadiff_cli.io import models
    from cadiff_cli.nets.models import Model

    return models.load(Model, name, sha256)


def _templates_of(job: Job) -> tuple[Template, ...]:
    """The job's templates; the person's own atlas is made now, unless it was."""
    if job.atlas:
        job.atlas.provide(job.out)
    return _templates(job.templates, job.recipe.template_sha256, job.notes, job.atlas)


def _ranges(job: Job, model: "Model") -> AgeRanges:
    """The user's own age ranges.  Raises ``UsageError`` for those of other structures."""
    ranges = read_age_ranges(job.ranges or Path())
    if ranges.fingerprint != job.recipe.ranges:
        raise changed_meanwhile(f"{job.ranges}")
    if not fits(ranges, model.parcellation):
        raise UsageError(
            f"--ranges {job.ranges} are of {ranges.parcellation}, {model.name} draws"
            f" {model.parcellation.name}",
            "make them from results of these weights with cadiff ranges train",
        )
    return ranges


@lru_cache(maxsize=1)
def _templates(
    specs: str,
    contents: tuple[tuple[str, str], ...],
    notes: tuple[Note, ...],
    atlas: PersonalAtlas | None,
) -> tuple[Template, ...]:
    """Loaded once per process; ``notes`` are what was said when they were chosen."""
    templates = load_templates(specs, offline=True)
    if atlas:
        templates = tuple(map(atlas.mark, templates))
    if own_contents(templates) != contents:
        raise changed_meanwhile(f"the templates {specs}")
    first, *others = templates
    return replace(first, notes=notes), *others


@lru_cache(maxsize=4)
def _template(name: str) -> Template:
    """Loaded once per process; whoever planned the jobs has downloaded it."""
    return load_template(name, offline=True)


@contextmanager
def _gpu(device: "torch.device") -> Iterator[None]:
    """One inference at a time on a GPU, whichever processes share it; its memory is given back."""
    import torch

    # Numbers and names depend on CUDA_VISIBLE_DEVICES; the identity does not.
    name = f"cadiff-{os.getuid()}-{torch.cuda.get_device_properties(device).uuid}.lock"
    with locked(Path(tempfile.gettempdir()) / name, wait=True):
        try:
            yield
        finally:
            torch.cuda.empty_cache()
