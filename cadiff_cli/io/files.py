"""Files: replace them atomically, check the disk, read and write text and tables, lock.

Images are read and written elsewhere.
"""

import errno
import fcntl
import fnmatch
import glob
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from cadiff_cli.errors import DiskError, MissingInputError, OutputError
from cadiff_cli.text import read_text

log = logging.getLogger(__name__)

LEAST_FREE_BYTES = 50_000_000
"""Below this there is no room for one scan's results: refuse before the long work."""

NO_SPACE = frozenset(getattr(errno, name) for name in ("ENOSPC", "EDQUOT") if hasattr(errno, name))
"""Numbers of the errors of a full disk or quota; not every platform has quotas."""
_FULL = {*NO_SPACE, errno.EIO}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of file systems without locks; only on Linux are the last two equal."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it to ``path`` when the block succeeds.

    An earlier file stays untouched until then.  An error leaves no temporary file, a killed process
    leaves ``.NAME.*``.  Raises ``OutputError`` or ``DiskError``.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # of names that are too long: neither
        what = "a folder" if path.is_dir() else "a device or pipe"
        raise OutputError(f"{path} is {what}", "name a file")
    suffix = "".join(path.suffixes[-2:])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    temporary = Path(name)
    try:
        yield temporary
        with suppress(OSError):  # CIFS, NTFS and FUSE may have no modes
            temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        if error.errno in _FULL:
            raise DiskError(
                f"writing {path.name} failed ({error.strerror})",
                "free some space (df -h) and run again",
            ) from error
        raise OutputError(
            f"writing {path} failed ({error.strerror or error})", "check the folder and run again"
        ) from error
    finally:
        with suppress(OSError):  # renamed already, or the disk is gone
            temporary.unlink()


def _unwritable(folder: Path, error: OSError) -> OutputError | DiskError:
    """The error for a folder in which no file can be made."""
    if error.errno in _FULL:
        return DiskError(f"no space left in {folder}", "free some and run again")
    return OutputError(
        f"cannot write to {folder} ({error.strerror})", "choose a folder you may write to"
    )


def remove_partial(path: Path) -> None:
    """Remove temporary files of ``path`` left by killed processes; no process may write it now."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*"):
        temporary.unlink(missing_ok=True)


def is_folder_entry(entry: "os.DirEntry[str]", *, follow_symlinks: bool = True) -> bool:
    """Whether an entry of a folder is one itself; a link that leads in a circle is none."""
    try:
        return entry.is_dir(follow_symlinks=follow_symlinks)
    except OSError:
        return False


def folders_in(folder: Path, prefix: str) -> list[str]:
    """Names of the folders in a folder that begin with ``prefix``, sorted.

    Raises the error of ``entries_of``.
    """
    entries = (entry for entry in entries_of(folder) if entry.name.startswith(prefix))
    return sorted(entry.name for entry in entries if is_folder_entry(entry))


def is_among(path: Path, files: Iterable[Path | None]) -> bool:
    """Whether ``path`` is one of the ``files`` that are there, by any name."""
    there = (file for file in files if file and file.exists())
    return path.exists() and any(path.samefile(file) for file in there)


def refuse_existing(*paths: Path, overwrite: bool) -> None:
    """Raise ``OutputError`` for the first file that is there, unless it may be replaced.

    A link to a file that is absent (git-annex) counts: it is somebody's, too.
    """
    if not overwrite and (there := [path for path in paths if os.path.lexists(path)]):
        what = "there already" if there[0].exists() else "a link to a file that is absent"
        raise OutputError(f"{there[0]} is {what}", "use --overwrite, or another -o")


def check_writable(folder: Path) -> None:
    """Make ``folder``; raise ``OutputError`` or ``DiskError`` unless files can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not a TemporaryFile: some mounts refuse to remove an open file.
        handle, name = tempfile.mkstemp(prefix=".cadiff-", dir=folder)
        os.close(handle)
        Path(name).unlink()
    except OSError as error:
        raise _unwritable(folder, error) from error
    if (free := shutil.disk_usage(folder).free) < LEAST_FREE_BYTES:
        raise DiskError(f"{folder} has {free / 1e6:.0f} MB of space left", "free some (df -h)")


@cache
def _umask() -> int:
    """The process's mask, asked for once: to ask is to change it, for other threads as well."""
    value = os.umask(0)
    os.umask(value)
    return value


def write_text(path: Path, text: str) -> None:
    """Write UTF-8; the file has either its old content or all of the new one.

    Bytes of file names that are not UTF-8 become escapes, which JSON reads back.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an indented JSON object."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if the file is absent or holds none (perhaps half written)."""
    try:
        values = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def write_tsv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a table as BIDS wants it: tabs, a header, ``n/a`` where a value is missing."""
    lines = [header, *rows]
    write_text(path, "".join("\t".join(map(_cell, line)) + "\n" for line in lines))


def read_tsv(path: Path) -> list[dict[str, str]]:
    """Lines of a table that ``write_tsv`` wrote, by column.

    Raises ``OSError``, or ``ValueError`` if it is no such table.
    """
    header, *lines = (line.split("\t") for line in read_text(path).splitlines() if line)
    return [dict(zip(header, line, strict=True)) for line in lines]


def entries_of(folder: Path | str) -> "list[os.DirEntry[str]]":
    """The entries of a folder, none if it is not there.

    Raises ``MissingInputError`` for one that cannot be read: what it holds must not count as
    absent.
    """
    try:
        with os.scandir(folder) as entries:
            return [*entries]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise MissingInputError(
            f"cannot read the folder {folder} ({error.strerror})",
            "check its permissions (ls -ld) and its disk",
        ) from error


def names_in(folder: Path) -> list[str]:
    """Names of all that lies in a folder, sorted.  Raises the error of ``entries_of``."""
    return sorted(entry.name for entry in entries_of(folder))


def files_below(folder: Path, pattern: str, within: str = "") -> list[Path]:
    """Files below a folder whose names fit a ``pattern`` of ``fnmatch``, sorted.

    Hidden files and folders do not count, nor does ``lost+found``.  Of the folder's own entries
    only folders beginning with ``within`` are searched, if it is given.
    Links to folders are followed in the folder itself and where BIDS has some (``ses-``, anat):
    others may lead in circles, and git-annex makes every file a link.  Raises the error of
    ``entries_of``.
    """
    fits = re.compile(fnmatch.translate(pattern)).match

    def walk(place: str, *, top: bool) -> Iterator[str]:
        for entry in entries_of(place):
            name = entry.name
            if name.startswith(".") or (top and name == "lost+found"):
                continue
            linked = top or name == "anat" or name.startswith("ses-")
            if is_folder_entry(entry, follow_symlinks=linked):
                if not top or name.startswith(within):
                    yield from walk(entry.path, top=False)
            elif fits(name) and not (top and within):
                yield entry.path

    return [*map(Path, sorted(walk(str(folder), top=True)))]


def _cell(value: object) -> str:
    """The text of a cell, without tabs and newlines: BIDS tables have no quoting."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    return " ".join(str(value).split())


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock on ``path``, which the kernel releases when the process ends.

    Yields False if another process holds it and ``wait`` is not set.  On file systems without locks
    every caller succeeds; do not give two processes the same scan.
    """
    if path.is_symlink():  # git-annex makes all empty files links to one, which may be absent
        path.unlink(missing_ok=True)
    try:
        stream = path.open("a", encoding="ascii")
    except PermissionError as error:
        if not path.exists():
            raise _unwritable(path.parent, error) from error
        # A colleague's file in a shared folder.
        stream = path.open(encoding="ascii")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            has_lock = True
        except BlockingIOError:
            has_lock = False
        except OSError as error:
            if error.errno == errno.EBADF:  # NFS locks only writable files
                raise OutputError(
                    f"{path} belongs to another user", "ask for write permission (umask 002)"
                ) from error
            if error.errno not in _NO_LOCKS:
                raise
            log.info("no locks on %s", path.parent)
            has_lock = True
        yield has_lock
