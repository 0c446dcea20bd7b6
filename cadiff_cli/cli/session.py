"""One run of ``cadiff seg`` as a person sees it: checks first, a line per stage, a log file."""

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

import cadiff_cli
from cadiff_cli.config import Config
from cadiff_cli.io.layout import Derivatives
from cadiff_cli.io.nifti import load_scan
from cadiff_cli.io.releases import DEFAULT
from cadiff_cli.io.templates import load_templates, parse_names
from cadiff_cli.products import Result
from cadiff_cli.runner.journal import alone
from cadiff_cli.stages.strip import given_mask

LOGGER = logging.getLogger("cadiff_cli")


def segment_file(
    t1: Path,
    out: Path,
    config: Config,
    *,
    atlas: str = "auto",
    model: str = DEFAULT,
    offline: bool = False,
    save_field: bool = False,
    overwrite: bool = False,
    report: bool = True,
    threads: int | None = None,
    verbosity: int = 0,
) -> Result:
    """Segment one file and write its derivatives; the body of ``cadiff seg``.

    Input and output are checked before anything costly begins; an error leaves no result behind.
    """
    console = Console(stderr=True, highlight=False)
    # Other libraries' warnings go to the log, not to the user.
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    scan = load_scan(t1)
    if config.strip.mask:
        given_mask(config.strip.mask, scan)
    parse_names(atlas)
    place = Derivatives(out, t1)
    place.claim(t1, config.strip.mask, overwrite=overwrite)
    show = verbosity > 0 or (verbosity == 0 and console.is_terminal)
    log_path = out / "logs" / f"{place.stem}_{time.strftime('%Y%m%dT%H%M%S')}.log"
    begun = time.perf_counter()
    with alone(out, place.stem), _logged(console, log_path, verbosity):
        LOGGER.info("cadiff %s, input %s, %r", cadiff_cli.__version__, t1, scan.t1)
        LOGGER.info("settings %s", config)
        for text in scan.warnings:
            LOGGER.warning(text)
        if show:
            console.print(f"[bold]cadiff {cadiff_cli.__version__}[/]  {t1.name}")

        def announce(stage: str) -> None:
            LOGGER.info("stage %s", stage)
            if show:
                console.print(f"  {time.perf_counter() - begun:6.1f} s  {stage}")

        announce("load")
        # Huge pages: fewer page faults for torch's large tensors.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        from cadiff_cli.io.weights import load_model
        from cadiff_cli.report.boilerplate import cite
        from cadiff_cli.report.page import report_scan
        from cadiff_cli.runner.execute import segment_scan

        if threads:
            import torch

            torch.set_num_threads(threads)
        from cadiff_cli.stages.segment import pick_device

        pick_device(config.sample.device)
        loaded = load_model(model)
        templates = load_templates(atlas, offline=offline)
        with tempfile.TemporaryDirectory(prefix="cadiff-") as work:
            result = segment_scan(
                scan,
                templates,
                loaded,
                config,
                out,
                Path(work),
                field=save_field,
                announce=announce,
            )
        if report:
            announce("report")
        report_scan(out, t1, wanted=report)
        if why := cite(out):
            LOGGER.warning(why)
        if show:
            console.print(f"  {time.perf_counter() - begun:6.1f} s  done: {place.folder}")
        return result


@contextmanager
def _logged(console: Console, path: Path, verbosity: int) -> Iterator[None]:
    """Warnings to the terminal (more with -v), everything to the log file."""
    screen = logging.StreamHandler(console.file)
    screen.setFormatter(logging.Formatter("cadiff: %(levelname)s: %(message)s"))
    screen.setLevel({-1: logging.WARNING, 0: logging.WARNING, 1: logging.INFO}.get(verbosity, 10))
    file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    LOGGER.setLevel(logging.DEBUG)
    LOGGER.propagate = False
    LOGGER.addHandler(screen)
    added: list[tuple[logging.Logger, logging.Handler]] = [(LOGGER, screen)]
    for logger in (LOGGER, logging.getLogger("py.warnings")):
        logger.addHandler(file)
        added.append((logger, file))
    try:
        yield
    except Exception:
        LOGGER.debug("the run failed", exc_info=True)
        raise
    finally:
        for logger, handler in added:
            logger.removeHandler(handler)
            handler.close()
