"""SHA-256 of files that were hashed before, known again by name, size and times of change.

A record is a hint: a line that fits saves reading a file, any other is as good as none.
"""

import os
import re
import time
from functools import cache
from pathlib import Path

from cadiff_cli.io.files import sha256

LINE = re.compile(r"([0-9a-f]{64})\t(\d+)\t(\d+)\t(\d+)\t(.+)")
FRESH_NS = 2_000_000_000
"""A file that changed this recently may change again within one tick of its file system's clock."""
Key = tuple[str, int, int, int]
"""Name, bytes, time at which the content changed, time at which anything changed (both in ns)."""


class Checksums:
    """The record at ``path``: a line a file (SHA-256, bytes, two times of change in ns, name).

    The times are those of the content and of the file as a whole.  Programs may set the first
    (``cp -p``), never the second.

    Several processes may add lines at once; lines that were damaged thereby are passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[Key, str] = {}
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return
        for match in filter(None, map(LINE.fullmatch, lines)):
            checksum, *numbers, name = match.groups()
            size, modified, changed = map(int, numbers)
            self._known[name, size, modified, changed] = checksum

    def fits(self, file: Path, checksum: str) -> bool:
        """Whether a file has this checksum; it is read only if the record does not say so."""
        key = _key(file)
        if self._known.get(key) == checksum:
            return True
        if sha256(file) != checksum:
            return False
        self._add(key, checksum)
        return True

    def _add(self, key: Key, checksum: str) -> None:
        self._known[key] = checksum
        name, size, modified, changed = key
        if "\n" in name or time.time_ns() - max(modified, changed) < FRESH_NS:
            return
        cells = (checksum, size, modified, changed, name)
        line = "\t".join(map(str, cells)).encode(errors="surrogateescape") + b"\n"
        try:  # one write a line: lines of two processes do not mix
            record = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(record, line)
            finally:
                os.close(record)
        except OSError:  # a folder that only others may write to, or that is not there
            return


@cache
def checksums(path: Path) -> Checksums:
    """The record at ``path``, read once per process."""
    return Checksums(path)


def _key(file: Path) -> Key:
    status = file.stat()
    return file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns
