"""Worker processes on this machine.

Each loads the model once and processes whole scans, so that one scan's single-threaded stages
(strip, register) run beside another's inference.  A killed worker loses at most its current scan.
This module imports nothing heavy: a new process sets its number of threads before numpy is loaded.
"""

import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from cadiff_cli import machine
from cadiff_cli.errors import TERMINATED, CadiffError
from cadiff_cli.processes import follow_parent

if TYPE_CHECKING:
    from cadiff_cli.runner.job import Job, Outcome

TRIES = 2
"""A scan whose worker died is tried once more: there may be enough free memory by then."""
AGAIN = "run it again; if it ends so again, report it with the scan's log"
"""What to do where nobody knows why a worker ended."""
GRACE_S = 10.0
"""Time that a worker may take to clean up before it is killed."""


class Worker:
    """A process that executes one job after another."""

    def __init__(self, threads: int) -> None:
        context = get_context("spawn")
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(far_end, threads), daemon=True)
        self.process.start()
        far_end.close()
        self.job: Job | None = None

    def give(self, job: "Job") -> None:
        """Start a job; ``take`` its outcome when ``pipe`` is ready."""
        self.job = job
        with suppress(ConnectionError):  # it died while idle: ``take`` returns None
            self.pipe.send(job)

    def take(self) -> "Outcome | None":
        """The outcome of the job, or None if the worker died."""
        try:
            outcome: Outcome = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return None
        self.job = None
        return outcome


def run_local(jobs: Iterable["Job"], workers: int, threads: int) -> Generator["Outcome"]:
    """Yield outcomes in the order of completion; closing the iterator ends the workers."""
    from cadiff_cli.runner.journal import failure

    queue, deaths = deque(jobs), Counter[str]()
    team: list[Worker] = []
    try:
        while queue or any(worker.job for worker in team):
            while queue and len(team) < workers:
                team.append(Worker(threads))
                team[-1].give(queue.popleft())
            by_pipe = {worker.pipe: worker for worker in team if worker.job}
            for pipe in wait(list(by_pipe)):
                worker = by_pipe[pipe]  # type: ignore[index]
                job, outcome = worker.job, worker.take()
                assert job is not None
                if outcome is None:
                    team.remove(worker)
                    deaths[job.entities] += 1
                    if deaths[job.entities] < TRIES:
                        queue.append(job)
                        continue
                    outcome = failure(job, CadiffError(*_how_it_died(worker.process.exitcode)))
                elif queue:
                    worker.give(queue.popleft())
                yield outcome
    finally:
        _end(team)


def _end(team: list[Worker]) -> None:
    """Ask workers to end every second, as a library may swallow the exception; then kill them."""
    end = time.monotonic() + GRACE_S
    while time.monotonic() < end and (alive := [w.process for w in team if w.process.is_alive()]):
        for process in alive:
            process.terminate()
        wait([process.sentinel for process in alive], timeout=1.0)
    for worker in team:
        worker.process.kill()
        worker.process.join()


def _how_it_died(code: int | None) -> tuple[str, str]:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "was memory short? Use fewer --nprocs, or --tile 96" if name == "SIGKILL" else AGAIN
        return f"the worker process was ended by {name}, {TRIES} times", hint
    return f"the worker process ended with code {code}, {TRIES} times", AGAIN


def _serve(pipe: Connection, threads: int) -> None:
    """Run a worker process until its parent closes the pipe or dies."""
    os.environ.update(machine.thread_variables(threads))
    os.environ[machine.ITK_THREADS] = "1"  # several workers register at once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(TERMINATED)
    )  # leave through the clean-up code
    follow_parent()
    from cadiff_cli.runner.execute import execute

    try:
        while True:
            pipe.send(execute(pipe.recv()))
    except (EOFError, BrokenPipeError):
        pass
