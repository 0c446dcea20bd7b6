"""One run of ``cadiff seg`` as a person sees it: checks first, a line per stage, a log file."""

import logging
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

import cadiff_cli
from cadiff_cli.config import Config
from cadiff_cli.io.bids.layout import Derivatives
from cadiff_cli.io.images import load_scan
from cadiff_cli.io.releases import DEFAULT
from cadiff_cli.io.templates import load_templates, parse_specs
from cadiff_cli.notes import texts
from cadiff_cli.products import Result
from cadiff_cli.runner.journal import Journal, alone
from cadiff_cli.runner.logs import LOGGER, ON_SCREEN, capture_warnings, logged
from cadiff_cli.stages.strip import given_mask


def segment_file(
    t1: Path,
    out: Path,
    config: Config,
    *,
    template: str = "auto",
    model: str = DEFAULT,
    offline: bool = False,
    save_field: bool = False,
    overwrite: bool = False,
    report: bool = True,
    threads: int | None = None,
    verbosity: int = 0,
) -> Result:
    """Segment one file and write its derivatives; the body of ``cadiff seg``.

    Input and output are checked before anything costly begins.  What a killed run leaves behind is
    not taken for a result, and the next run replaces it.
    """
    console = Console(stderr=True, highlight=False)
    capture_warnings()
    scan = load_scan(t1)
    if config.strip.mask:
        given_mask(config.strip.mask, scan)
    parse_specs(template)
    place, journal = Derivatives(out, t1), Journal(out)
    inputs = (t1, config.strip.mask)
    journal.make_room(place, *inputs, overwrite=overwrite)
    show = verbosity > 0 or (verbosity == 0 and console.is_terminal)
    log_path = out / "logs" / f"{place.stem}_{time.strftime('%Y%m%dT%H%M%S')}.log"
    begun = time.perf_counter()
    with alone(out, place.stem), logged(log_path, _screen(console, verbosity)):
        # Again: another process may have finished meanwhile.
        journal.make_room(place, *inputs, overwrite=overwrite)
        LOGGER.info("cadiff %s, input %s, %r", cadiff_cli.__version__, t1, scan.t1)
        LOGGER.info("settings %s", config)
        for note in scan.notes:
            LOGGER.warning(note.text)
        if show:
            console.print(f"[bold]cadiff {cadiff_cli.__version__}[/]  {escape(t1.name)}")

        def announce(stage: str) -> None:
            LOGGER.info("stage %s", stage)
            if show:
                console.print(f"  {time.perf_counter() - begun:6.1f} s  {stage}")

        announce("load")
        from cadiff_cli.io import models
        from cadiff_cli.nets.models import Model
        from cadiff_cli.report.methods import cite
        from cadiff_cli.report.page import report_scan
        from cadiff_cli.runner.execute import gate, prepare_torch, segment_scan

        device = prepare_torch(threads, config.sample.device)
        loaded = models.load(Model, model)
        templates = load_templates(template, offline=offline)
        with tempfile.TemporaryDirectory(prefix="cadiff-", ignore_cleanup_errors=True) as work:
            result = segment_scan(
                scan,
                templates,
                loaded,
                config,
                out,
                Path(work),
                field=save_field,
                announce=announce,
                gate=gate(device),
            )
        if report:
            announce("report")
        report_scan(out, t1, wanted=report)
        if why := cite(out):
            LOGGER.warning(why)
        if show:
            took = time.perf_counter() - begun
            console.print(f"  {took:6.1f} s  done: {escape(str(place.folder))}")
            console.print(f"            {result.prepared.stripped.summary}")
            for text in texts(result.notes):
                console.print(f"            [yellow]look[/]: {escape(text)}")
        return result


def _screen(console: Console, verbosity: int) -> logging.Handler:
    """Warnings for the terminal, more with -v."""
    handler = logging.StreamHandler(console.file)
    handler.setFormatter(logging.Formatter(ON_SCREEN))
    handler.setLevel({-1: logging.WARNING, 0: logging.WARNING, 1: logging.INFO}.get(verbosity, 10))
    return handler
