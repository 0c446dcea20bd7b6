"""Child processes, for work that keeps its process busy: ITK ignores signals while it runs."""

import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, current_process, get_context, parent_process
from multiprocessing.connection import wait
from typing import Any

from cadiff_cli.errors import CadiffError

Each = Callable[..., Iterator[Any]]
"""``map``, or its equal over several processes."""


@contextmanager
def children(jobs: int, begin: Callable[[], object] | None = None) -> Iterator[Each]:
    """A ``map`` over ``jobs`` child processes, which start at once if ``begin`` is given.

    Each child calls ``begin`` first.  Functions, arguments and answers are pickled; children log
    nothing.  They end when the block ends: at once if an error ends it, or if this process is
    killed.  Raises ``CadiffError`` if a child is killed, and errors of ``begin`` as they are.
    """
    others = set(active_children())
    with ProcessPoolExecutor(jobs, get_context("spawn"), _prepare) as pool:
        try:
            with _without_interrupts():  # children take this from their parent
                begun = [pool.submit(begin) for _ in range(jobs)] if begin else []

            def each(*task: Any) -> Iterator[Any]:
                for future in begun:
                    future.result()
                return pool.map(*task)

            yield each
        except BrokenProcessPool as error:
            raise CadiffError(
                "a child process was killed, perhaps because memory was short",
                "free some memory, or use fewer processes (--jobs, --threads 1)",
            ) from error
        except BaseException:
            for child in set(active_children()) - others:
                child.terminate()
            raise


def may_have_children() -> bool:
    """Whether this process may start others: a worker of ``cadiff run`` may not."""
    return not current_process().daemon


def follow_parent() -> None:
    """End this process when its parent has ended, however that ended."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)  # nobody is left to tell


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends children
    follow_parent()
    logging.disable()  # the parent logs what comes back
    warnings.simplefilter("ignore")


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the block has ended."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
