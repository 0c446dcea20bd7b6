"""Errors a user can meet: what was seen, what to do, and the exit code.

Exit codes follow the BIDS execution specification (16 invalid dataset, 17 unknown analysis level,
18 no file selected) and sysexits: 64 usage, 65 bad data, 66 no input, 73 cannot create output,
74 I/O error.
"""

from collections.abc import Sequence

TERMINATED = 143
"""Exit code of a process that SIGTERM ended."""


class CadiffError(Exception):
    """An error with a remedy.  The command line prints both on one line, without a traceback."""

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}" if self.remedy else self.message


def first_few(names: Sequence[str], most: int = 8) -> str:
    """The first ``most`` names, with ``...`` if there are more: ``01, 02, ...``."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def plural(number: int, noun: str) -> str:
    """A number of things: ``1 scan``, ``2 scans``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def in_a_line(error: BaseException) -> str:
    """What went wrong, for a table or a log: our own words, or an unforeseen error's type too."""
    said = str(error) if isinstance(error, CadiffError) else f"{type(error).__name__}: {error}"
    return " ".join(said.split())


class UsageError(CadiffError):
    """The request makes no sense (a wrong option, an unknown name)."""

    exit_code = 64


class DataError(CadiffError):
    """The input is there but cannot be used (empty, damaged, absurd affine...)."""

    exit_code = 65


def changed_meanwhile(what: str) -> DataError:
    """The error for a file that is not the one of the plan any more."""
    return DataError(f"{what} changed while cadiff was running", "run it again from the start")


class UnsuitableError(DataError):
    """A readable image that can never be segmented (a slab, 4-D, a CT, constant...)."""


class MissingInputError(CadiffError):
    """An input, template or weights file is absent or unreadable."""

    exit_code = 66


class OutputError(CadiffError):
    """The output cannot be created (permission, a file in the way)."""

    exit_code = 73


class DiskError(CadiffError):
    """Writing failed half-way (disk full, quota)."""

    exit_code = 74


class InvalidDatasetError(CadiffError):
    """The input folder is not a BIDS dataset."""

    exit_code = 16


class AnalysisLevelError(UsageError):
    """An analysis level that is neither ``participant`` nor ``group``."""

    exit_code = 17


class SelectionError(CadiffError):
    """Participants, sessions or filters that select nothing."""

    exit_code = 18
