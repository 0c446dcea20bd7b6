"""Locks between processes, which the kernel releases when their holder ends, however it ends."""

import errno
import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock on ``path``; False if another process has it and we do not wait.

    Where the file system knows no locks, every process gets it: results are written atomically, so
    the worst is work done twice.
    """
    with path.open("a", encoding="ascii") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            log.info("no locks on %s", path.parent)
            mine = True
        yield mine
