"""Read text that people wrote: encodings and ends of lines differ between their programs."""

import codecs
import re
from pathlib import Path


def read_text(path: Path) -> str:
    """Read text that people wrote: UTF-8, or with a byte order mark, or Windows' UTF-16.

    Raises ``OSError``; ``ValueError`` for other encodings.
    """
    with path.open("rb") as stream:
        wide = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return path.read_text(encoding="utf-16" if wide else "utf-8-sig")


def lines_of(text: str) -> list[str]:
    """Lines of a table: unlike ``str.splitlines``, only line breaks part them."""
    return re.split(r"\r\n|\r|\n", text.rstrip("\r\n"))
