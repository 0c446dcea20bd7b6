"""Locks between processes, which the kernel releases when their holder ends, however it ends."""

import errno
import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cadiff_cli.errors import OutputError

log = logging.getLogger(__name__)

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What file systems say that know no locks; the last two are one number on Linux alone."""


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock on ``path``; False if another process has it and we do not wait.

    Where the file system knows no locks, every process gets it: no two may then be given the same
    scan.
    """
    try:
        stream = path.open("a", encoding="ascii")
    except PermissionError:  # a colleague's file, in a folder that we share
        stream = path.open(encoding="ascii")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        except OSError as error:
            if error.errno == errno.EBADF:  # NFS locks only what one may write
                raise OutputError(
                    f"{path} belongs to somebody else", "ask for the right to write it (umask 002)"
                ) from error
            if error.errno not in _NO_LOCKS:
                raise
            log.info("no locks on %s", path.parent)
            mine = True
        yield mine
