"""Small text files, written atomically: JSON, TSV and plain."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cadiff_cli.io.nifti import replacing


def write_text(path: Path, text: str) -> None:
    """UTF-8 text; the file has either its old content or the new one, never a part.

    Bytes of file names that are no UTF-8 become escapes, which JSON reads back.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


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
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _cell(value: object) -> str:
    """BIDS knows no quoting: a cell holds neither tabs nor newlines."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    return " ".join(str(value).split())
