"""What was read from files before, known again by their name, size and times of change.

A record is a hint: a line that fits saves reading a file, any other is as good as none.
"""

import os
import re
import time
from functools import cache
from pathlib import Path

from cadiff_cli.io.files import sha256

FRESH_NS = 2_000_000_000
"""A file that changed this recently may change again within one tick of its file system's clock."""
Key = tuple[str, int, int, int]
"""Name, bytes, time at which the content changed, time at which anything changed (both in ns)."""


class Record:
    """The record at ``path``: a line a file (a value, bytes, two times of change in ns, name).

    Values match the pattern ``values``.  The times are those of the content and of the file as a
    whole.  Programs may set the first (``cp -p``), never the second.

    Several processes may add lines at once; damaged lines are skipped.
    """

    def __init__(self, path: Path, values: str) -> None:
        self.path = path
        self._values = re.compile(values)
        self._known: dict[Key, str] = {}
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return
        line = re.compile(rf"({values})\t(\d+)\t(\d+)\t(\d+)\t(.+)")
        for match in filter(None, map(line.fullmatch, lines)):
            value, *_, size, modified, changed, name = match.groups()
            self._known[name, int(size), int(modified), int(changed)] = value

    def get(self, file: Path) -> str | None:
        """The value that was added for this file as it is now, if any."""
        try:
            return self._known.get(_key(file))
        except OSError:
            return None

    def add(self, file: Path, value: str, begun_ns: int) -> None:
        """Add the value of a file that was read after the time ``begun_ns``.

        Leaves out a file that has changed since or shortly before.  Never raises: a folder may be
        absent, or only others may write to it.
        """
        try:
            key = name, size, modified, changed = _key(file)
            fresh = begun_ns - max(modified, changed) < FRESH_NS
            if fresh or "\n" in name or not self._values.fullmatch(value):
                return
            self._known[key] = value
            cells = (value, size, modified, changed, name)
            line = "\t".join(map(str, cells)).encode(errors="surrogateescape") + b"\n"
            # One write a line: lines of two processes do not mix.
            record = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(record, line)
            finally:
                os.close(record)
        except OSError:
            return


class Checksums(Record):
    """The record of the SHA-256 of files."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "[0-9a-f]{64}")

    def fits(self, file: Path, checksum: str) -> bool:
        """Whether a file has this checksum; it is read only if the record does not say so."""
        if self.get(file) == checksum:
            return True
        begun_ns = time.time_ns()
        if sha256(file) != checksum:
            return False
        self.add(file, checksum, begun_ns)
        return True


@cache
def checksums(path: Path) -> Checksums:
    """The record at ``path``, read once per process."""
    return Checksums(path)


def _key(file: Path) -> Key:
    status = file.stat()
    return file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns
