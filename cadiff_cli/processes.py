"""Child processes, for work that keeps its process busy: ITK ignores signals while it runs."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, current_process, get_context
from typing import Any

from cadiff_cli.errors import CadiffError

Each = Callable[..., Iterator[Any]]
"""``map``, or its equal over several processes."""


@contextmanager
def children(jobs: int, begin: Callable[[], object] | None = None) -> Iterator[Each]:
    """A ``map`` over ``jobs`` child processes, each of which calls ``begin`` as it starts.

    Functions, arguments and answers are pickled.  They end when the block ends, at once if an
    error ends it.  Raises ``CadiffError`` if one of them is killed.
    """
    others = set(active_children())
    with ProcessPoolExecutor(jobs, get_context("spawn"), _prepare, (begin,)) as pool:
        try:
            if begin:  # else they would start with the first task
                for _ in range(jobs):
                    pool.submit(_nothing)
            yield pool.map
        except BrokenProcessPool as error:
            raise CadiffError(
                "a worker process was killed, perhaps for want of memory",
                "free some memory, or use fewer processes (--jobs, --nprocs, --threads 1)",
            ) from error
        except BaseException:
            for child in set(active_children()) - others:
                child.terminate()
            raise


def may_have_children() -> bool:
    """Whether this process may start others: a worker of ``cadiff run`` may not."""
    return not current_process().daemon


def _prepare(begin: Callable[[], object] | None) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the parent, which ends its children
    if begin:
        begin()


def _nothing() -> None:
    """Keep a process busy for no time."""
