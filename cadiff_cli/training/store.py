"""Prepared scans on disk: each is prepared once, and again when its content or its making changes.

One small ``.npz`` a scan, whose name holds a fingerprint of all that decides its content.  A folder
of them travels to another machine as it is.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np

from cadiff_cli.config import Config, as_dict, fingerprint
from cadiff_cli.errors import DataError
from cadiff_cli.io.files import replacing
from cadiff_cli.io.releases import strip_weights_sha256
from cadiff_cli.stages.register import settings

DAMAGED = (
    *(ValueError, EOFError, OSError, NotImplementedError, SyntaxError),
    *(BadZipFile, TokenError, zlib.error),
)
"""What NumPy raises for a file of arrays with wrong bytes in it."""


def stored_path(folder: Path, name: str, content: Iterable[Any]) -> Path:
    """The file of a prepared scan; ``content`` holds plain values that decide what is in it."""
    return folder / f"{name}_{fingerprint(list(content))}.npz"


def made_by(config: Config) -> list[Any]:
    """All that decides how a run with ``config`` finds a brain and registers it."""
    register = config.register
    return [as_dict(register), settings(register.name), strip_weights_sha256(config.strip)]


def once(path: Path, name: str, prepare: Callable[[], Mapping[str, Any]]) -> Path:
    """Write the arrays that ``prepare`` returns to ``path``, unless the file is there already.

    A ``DataError`` of ``prepare`` is raised again with the scan's ``name``.
    """
    if path.exists():
        return path
    try:
        arrays = prepare()
    except DataError as error:
        raise DataError(f"{name}: {error.message}", error.remedy) from error
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    return path


def read(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file that ``once`` wrote; raises ``DataError`` if it is damaged."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return dict(stored)
    except DAMAGED as error:
        raise DataError(
            f"{path} is damaged ({error})", "remove it: the same command prepares it again"
        ) from error
