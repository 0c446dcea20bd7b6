"""Small text files, written atomically: JSON, TSV and plain."""

import codecs
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cadiff_cli.errors import MissingInputError, UsageError
from cadiff_cli.io.nifti import replacing

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")


def write_text(path: Path, text: str) -> None:
    """UTF-8 text; the file has either its old content or the new one, never a part.

    Bytes of file names that are no UTF-8 become escapes, which JSON reads back.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_text(path: Path) -> str:
    """UTF-8 text of people's making; Windows' editors put a mark before it, or write UTF-16.

    Raises ``OSError``, and ``ValueError`` for what is neither.
    """
    with path.open("rb") as stream:
        wide = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return path.read_text(encoding="utf-16" if wide else "utf-8-sig")


def read_settings(path: Path, kind: type[S]) -> S:
    """A settings object from a TOML file of its fields; what is absent keeps its default.

    Raises ``UsageError`` for a file that is no TOML, an unknown key or a value of another type.
    """
    try:
        values = tomllib.loads(read_text(path))
    except OSError as error:
        raise MissingInputError(f"cannot read {path} ({error.strerror})", "check it") from error
    except ValueError as error:
        raise UsageError(f"{path} is no TOML ({error})", "mend it") from error
    defaults = {f.name: f.default for f in fields(kind)}
    for key, value in values.items():
        if key not in defaults:
            near = get_close_matches(key, defaults, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{path} has an unknown key {key!r}{hint}", f"use {[*defaults]}")
        wanted = type(defaults[key])
        if wanted is float and type(value) is int:
            values[key] = float(value)
        elif type(value) is not wanted:
            raise UsageError(f"{path}: {key} is {value!r}", f"give a value of {wanted.__name__}")
    return kind(**values)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """An indented JSON object."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_tsv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """A table as BIDS wants it: tabs, a header, ``n/a`` where a value is missing."""
    lines = [header, *rows]
    write_text(path, "".join("\t".join(map(_cell, line)) + "\n" for line in lines))


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None if the file is absent or holds none (another's half-written one)."""
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _cell(value: object) -> str:
    """BIDS knows no quoting: a cell holds neither tabs nor newlines."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    return " ".join(str(value).split())
