"""Output for people: a line when a scan ends, tables when all have ended."""

import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import cadiff_cli
from cadiff_cli.io.bids.layout import Derivatives
from cadiff_cli.notes import texts
from cadiff_cli.products import Result
from cadiff_cli.quality.group import Group
from cadiff_cli.runner.job import Outcome
from cadiff_cli.runner.logs import ON_SCREEN, warning
from cadiff_cli.runner.participants import Summary

FILE_COLUMNS = 250
"""Wide enough for every table that does not go to a screen: a file is not folded."""


def console(**options: Any) -> Console:
    """A ``Console`` with these options; a file has room for every table."""
    made = Console(**options)
    if not made.is_terminal:
        made.width = FILE_COLUMNS
    return made


class ScanConsole:
    """A ``Watcher`` of one scan: a line per stage, and at the end all warnings again.

    ``verbosity`` -1 shows only warnings and errors; 0 shows stages too, but only in a terminal.
    """

    def __init__(self, t1: Path, out: Path, verbosity: int = 0) -> None:
        self.t1, self.folder = t1, Derivatives(out, t1).folder
        self.console = Console(stderr=True, highlight=False)
        self.shown = verbosity > 0 or (verbosity == 0 and self.console.is_terminal)
        self.screen = logging.StreamHandler(self.console.file)
        self.screen.setFormatter(logging.Formatter(ON_SCREEN))
        levels = {-1: logging.WARNING, 0: logging.WARNING, 1: logging.INFO}
        self.screen.setLevel(levels.get(verbosity, logging.DEBUG))
        self.begun: float | None = None

    def stage(self, name: str) -> None:
        """Print a stage and the seconds until it; before the first one, the scan's name."""
        if self.begun is None:
            self.begun = time.perf_counter()
            self._print(f"[bold]cadiff {cadiff_cli.__version__}[/]  {escape(self.t1.name)}")
        self._print(f"  {self._seconds:6.1f} s  {name}")

    def done(self, result: Result) -> None:
        """Print the folder of the results, and all warnings."""
        self._print(f"  {self._seconds:6.1f} s  done: {escape(str(self.folder))}")
        self._print(f"            {result.prepared.stripped.summary}")
        for text in texts(result.notes):
            self._print(f"            [yellow]look[/]: {escape(text)}")

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - (self.begun or time.perf_counter())

    def _print(self, text: str) -> None:
        if self.shown:
            self.console.print(text)


class RunConsole:
    """A ``Listener``: messages go to stderr, output lines to stdout."""

    def __init__(self) -> None:
        self.console = console(stderr=True, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print one line, as ``cadiff-seg`` does."""
        self.console.print(escape(warning(" ".join(text.split()))))

    def line(self, text: str) -> None:
        """Print a line of output."""
        click.echo(text)

    def outcome(self, outcome: Outcome, number: int, total: int) -> None:
        """Print a scan's line and its warnings."""
        head = f"[{number}/{total}] {outcome.entities}  {outcome.status}  {outcome.seconds:.0f} s"
        self.console.print(escape(f"{head}  {outcome.message}".rstrip()))
        for note in outcome.warnings:
            self.warn(f"{outcome.entities}: {note.text}")

    def summary(self, summary: Summary) -> None:
        """Print tables of the failed, the unsuitable and the doubtful scans, and the counts."""
        if failed := summary.of("failed"):
            crashes = [(o.entities, o.message, o.crash_file) for o in failed]
            self._table("failed", ("scan", "error", "crash file"), crashes)
        if unsuitable := (*summary.plan.unsuitable, *summary.of("unsuitable")):
            reasons = [(o.entities, o.message) for o in unsuitable]
            self._table("unsuitable", ("scan", "why"), reasons)
        if doubts := [(o.entities, note.text) for o in summary.outcomes for note in o.warnings]:
            self._table("to look at", ("scan", "warning"), doubts)
        counts = ", ".join(f"{n} {status}" for status, n in summary.counts.items() if n)
        self.console.print(f"{counts or 'nothing to do'}: {escape(str(summary.out))}")

    def group(self, group: Group, expected: int) -> None:
        """Print the table's path, and the number of ``expected`` scans that it holds."""
        self.console.print(f"{len(group.scans)} of {expected} scans: {escape(str(group.path))}")

    def _table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*map(escape, row))
        self.console.print(table)


def show_log(verbosity: int) -> None:
    """Show the package's log on stderr with ``-v``, hide it without."""
    logger = logging.getLogger("cadiff_cli")
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler() if verbosity else logging.NullHandler())
    logger.setLevel(logging.DEBUG if verbosity > 1 else logging.INFO)
