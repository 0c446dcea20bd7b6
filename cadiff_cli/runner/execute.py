"""Execute a job: the same function in this process, in a worker process or on another machine."""

import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import cadiff_cli
from cadiff_cli import machine
from cadiff_cli.errors import DataError
from cadiff_cli.io.bids.derivatives import save_result
from cadiff_cli.io.bids.names import source_entities
from cadiff_cli.io.files import locked
from cadiff_cli.io.images import load_scan
from cadiff_cli.io.templates import load_template, load_templates, own_contents
from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.pipeline import Announce, run
from cadiff_cli.products import Result, Scan, Template
from cadiff_cli.report.page import report_scan
from cadiff_cli.runner.job import Job, Outcome
from cadiff_cli.runner.journal import Journal, failure
from cadiff_cli.runner.logs import LOGGER, logged

if TYPE_CHECKING:
    import torch

    from cadiff_cli.config import Config
    from cadiff_cli.nets.models import Model

_ONE_AT_A_TIME = threading.Lock()
"""ANTs' output is silenced for the whole process: jobs must not share one at the same time."""


def execute(job: Job) -> Outcome:
    """Segment one scan and write its results.  Whatever goes wrong with it is in the outcome."""
    begun = time.perf_counter()
    with _ONE_AT_A_TIME:
        try:
            journal = Journal(job.out)
            with journal.claim(job.entities, wait=job.wait) as mine:
                if not mine:
                    return Outcome(job.entities, "busy")
                if job.is_finished():
                    failed = report_scan(job.out, job.t1) if job.lacks_page() else ""
                    outcome = Outcome(job.entities, "done", warnings=_no_page(failed))
                    journal.record(outcome)
                    return outcome
                with logged(job.log_dir / f"{job.entities}.log"):
                    LOGGER.info("cadiff %s, input %s", cadiff_cli.__version__, job.t1)
                    LOGGER.info("settings %s", job.recipe.settings())
                    journal.make_room(job.place, job.t1, overwrite=job.overwrite)
                    result = _segment(job)
                    failed = report_scan(job.out, job.t1, wanted=job.report)
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


def _segment(job: Job) -> Result:
    device = prepare_torch(job.threads, job.recipe.config.sample.device)
    scan = replace(load_scan(job.t1), age_years=job.age_years)
    for note in scan.notes:
        LOGGER.warning(note.text)
    with tempfile.TemporaryDirectory(
        prefix=f"{job.entities}-", dir=job.work_dir, ignore_cleanup_errors=True
    ) as work:
        return segment_scan(
            scan,
            _templates(job.templates, job.recipe.template_sha256, job.notes),
            _model(job.weights, job.recipe.weights_sha256),
            job.recipe.config,
            job.out,
            Path(work),
            field=job.recipe.field,
            spaces=job.recipe.spaces,
            source=job.source,
            run_id=job.run_id,
            announce=lambda stage: LOGGER.info("stage %s", stage),
            gate=gate(device),
        )


def prepare_torch(threads: int | None, device: str) -> "torch.device":
    """Settle how this process uses the machine, before torch is first imported.

    Returns the device that is meant; raises ``UsageError`` for one that is not there.
    """
    # Huge pages: fewer page faults for torch's large tensors.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    from cadiff_cli.device import pick_device

    if threads:
        torch.set_num_threads(threads)
    LOGGER.info("%d threads of %d cores", torch.get_num_threads(), machine.cores())
    return pick_device(device)


def gate(device: "torch.device") -> AbstractContextManager[object]:
    """What inference passes through: one process at a time on a GPU."""
    return _gpu(device) if device.type == "cuda" else nullcontext()


def segment_scan(
    scan: Scan,
    templates: Sequence[Template],
    model: "Model",
    config: "Config",
    out: Path,
    work_dir: Path,
    *,
    field: bool = False,
    spaces: Sequence[str] = (),
    source: str | None = None,
    run_id: str | None = None,
    announce: Announce | None = None,
    gate: AbstractContextManager[object] | None = None,
) -> Result:
    """Run the pipeline on one scan and write everything it gives into ``out``."""
    from cadiff_cli.stages.field import mean_field
    from cadiff_cli.stages.space import parse_space, to_space

    result = run(scan, templates, model, config, work_dir, announce, gate)
    own = {template.name: template for template in templates}
    for text in spaces:
        name, resolution = parse_space(text, templates)
        space = to_space(result, own.get(name) or _template(name), resolution, work_dir)
        result = replace(result, spaces=(*result.spaces, space))
    if announce:
        announce("write")
    asked = mean_field(result.prepared.registrations, scan.t1.grid) if field else None
    with Journal(out).writing(source_entities(scan.path)):
        save_result(result, out, asked, source=source, run_id=run_id)
    LOGGER.info("seconds per stage: %s", dict(result.seconds))
    return result


@lru_cache(maxsize=1)
def _model(name: str, sha256: str) -> "Model":
    """Loaded once per process."""
    from cadiff_cli.io import models
    from cadiff_cli.nets.models import Model

    model = models.load(Model, name)
    if model.sha256 != sha256:
        raise DataError(
            f"the weights {name} changed while cadiff was running", "run it again from the start"
        )
    return model


@lru_cache(maxsize=1)
def _templates(
    specs: str, contents: tuple[tuple[str, str], ...], notes: tuple[Note, ...]
) -> tuple[Template, ...]:
    """Loaded once per process; ``notes`` are what was said when they were chosen."""
    templates = load_templates(specs, offline=True)
    if own_contents(templates) != contents:
        raise DataError(
            f"the templates {specs} changed while cadiff was running", "run it again from the start"
        )
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
