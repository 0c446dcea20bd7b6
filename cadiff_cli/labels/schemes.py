"""Label ids of other software: tables from their ids to the codes of a parcellation.

``data/labels/schemes/PARCELLATION/SCHEME.tsv`` has columns ``source`` (an id), ``last`` (the last
id of a range that begins at ``source``; may be empty or absent) and ``index`` (the code; 0 is
background, and a negative code stands for the structure or its mirror image, the nearer one).
"""

import csv
import os
from importlib.resources.abc import Traversable
from pathlib import Path

from cadiff_cli.data import shipped
from cadiff_cli.errors import DataError, MissingInputError, first_few
from cadiff_cli.labels.parcellation import Parcellation, load_parcellation, shipped_names
from cadiff_cli.text import read_text

OWN = "cadiff"
"""The parcellation's own codes, as cadiff writes them: they need no table."""
MOST_IDS = 1_000_000
"""A longer list of ids is a mistake, and would fill the memory."""


def load_scheme(name: str, parcellation: Parcellation) -> dict[int, int]:
    """Read id -> class of ``parcellation`` from a scheme (``scheme_names``) or from a table's path.

    The name of a shipped parcellation stands for its codes.  A class is negative if its side must
    be found (``Parcellation.encode``).  Raises ``MissingInputError`` if there is no such scheme,
    ``DataError`` for an invalid table.
    """
    if name == OWN:
        return dict(parcellation.class_of)
    if name in shipped_names():
        return load_parcellation(name).mapping_to(parcellation)
    if name in scheme_names(parcellation):
        text = _folder(parcellation).joinpath(f"{name}.tsv").read_text(encoding="utf-8")
        return parse(name, text, parcellation)
    path = Path(name)
    if not os.path.isfile(path):  # which takes names that are too long
        raise MissingInputError(
            f"no scheme {name!r} of label ids for {parcellation.name}",
            f"use {', '.join(scheme_names(parcellation))}, or a TSV with source and index",
        )
    try:
        text = read_text(path)
    except ValueError as error:
        raise DataError(f"{name} is not a mapping ({error})", "save it as TSV in UTF-8") from error
    return parse(name, text, parcellation)


def scheme_names(parcellation: Parcellation) -> list[str]:
    """Schemes that ship with the package for a parcellation."""
    folder = _folder(parcellation)
    paths = [Path(each.name) for each in folder.iterdir()] if folder.is_dir() else []
    return sorted([OWN, *(path.stem for path in paths if path.suffix == ".tsv")])


def parse(name: str, text: str, parcellation: Parcellation) -> dict[int, int]:
    """Parse id -> class from the text of a scheme's table; raises ``DataError``."""
    try:
        lines = list(csv.DictReader(text.splitlines(), delimiter="\t"))
        rows = [
            (int(line["source"]), int(line.get("last") or line["source"]), int(line["index"]))
            for line in lines
        ]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(
            f"{name} is not a mapping ({error})", "columns source and index, whole numbers"
        ) from error
    if backward := [(first, last) for first, last, _ in rows if last < first]:
        raise DataError(
            f"{name} has a row of ids {backward[0][0]} to {backward[0][1]}",
            "last is source or greater",
        )
    if (count := sum(last - first + 1 for first, last, _ in rows)) > MOST_IDS:
        raise DataError(f"{name} maps {count} ids", f"a mapping holds at most {MOST_IDS}")
    pairs = [(id_, code) for first, last, code in rows for id_ in range(first, last + 1)]
    if negative := sorted({id_ for id_, _ in pairs if id_ < 0}):
        raise DataError(f"{name} maps ids {negative}", "label maps hold no negative ids")
    code_of = dict(pairs)
    if several := sorted({id_ for id_, code in pairs if code_of[id_] != code}):
        raise DataError(f"{name} maps ids {several} to several codes", "give each id one row")
    classes = {0: 0, **parcellation.class_of}
    if unknown := sorted({code for code in code_of.values() if abs(code) not in classes}):
        known = first_few([str(code) for code in parcellation.class_of], 50)
        raise DataError(
            f"{name} maps to unknown codes {first_few([str(code) for code in unknown])}",
            f"{parcellation.name} has {known}",
        )
    return {id_: classes[abs(code)] * (-1 if code < 0 else 1) for id_, code in code_of.items()}


def _folder(parcellation: Parcellation) -> Traversable:
    return shipped(f"labels/schemes/{parcellation.name}")
