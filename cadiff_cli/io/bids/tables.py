"""Find a label map's parcellation: its name tells it, and its dataset holds the table."""

import re
from pathlib import Path

from cadiff_cli.errors import OutputError
from cadiff_cli.io.files import write_json, write_text, write_tsv
from cadiff_cli.labels.luts import FORMATS
from cadiff_cli.labels.parcellation import (
    BASE,
    OWN_SEGMENTATION,
    Parcellation,
    load_parcellation,
    shipped_names,
)

SEGMENTATION = re.compile(r"_seg-([A-Za-z0-9]+)_")
ABOUT = {
    "name": "Name of the structure",
    "abbreviation": "Its short name",
    "color": "Its colour, red green blue in hexadecimal digits",
    "mirror": "Code of the partner in the other hemisphere; its own in the middle",
    "parent": "Code of the structure of cadiff40 that this one is a part of",
    "subsets": "Names of selections that the structure belongs to",
}
"""What the columns of a table mean; ``index`` and ``mapping`` are BIDS' own."""
BASE_COLUMNS = ("index", "name", "abbreviation", "color", "mapping")


def table_name(parcellation: Parcellation) -> str:
    """File at the root of a dataset that explains the codes: ``seg-cadiff_dseg.tsv``."""
    return f"seg-{parcellation.segmentation}_dseg.tsv"


def check_table(out: Path, parcellation: Parcellation) -> None:
    """Raise ``OutputError`` if the table in ``out`` explains other codes under the same name.

    Label maps that are there already would change their meaning with a new table, and new ones
    would get wrong names from the old one.
    """
    path = out / table_name(parcellation)
    if parcellation.name in shipped_names() or not path.exists():
        return
    there, new = (
        {s.code: (s.name, s.parent) for s in each.structures}
        for each in (load_parcellation(path), parcellation)
    )
    if there != new:
        raise OutputError(
            f"{path} is the table of another parcellation with the name {parcellation.name}",
            "use another output folder, or another name",
        )


def save_table(out: Path, parcellation: Parcellation) -> None:
    """Write the parcellation's table, and its colours for viewers, unless they are there already.

    ``parcellation_of`` reads the tables of others than ``BASE``.  That of earlier versions is
    removed: it would explain the map of tissues too.  Raises what ``check_table`` raises.
    """
    check_table(out, parcellation)
    if _is_earlier(before := out / "dseg.tsv"):
        before.unlink()
    for ending, text in FORMATS.items():
        colours = out / "luts" / f"seg-{parcellation.segmentation}_{ending}"
        if not colours.exists():
            write_text(colours, text(parcellation))
    path = out / table_name(parcellation)
    if not path.exists():
        about = {name: {"Description": text} for name, text in ABOUT.items()}
        if not (described := path.with_suffix(".json")).exists():
            write_json(described, about)
        write_table(path, parcellation)


def write_table(path: Path, parcellation: Parcellation) -> None:
    """Write the parcellation's table: BIDS' columns for ``BASE``, all columns for others."""
    if parcellation.name != BASE:
        write_text(path, parcellation.as_tsv())
        return
    rows = [(s.code, s.name, s.abbreviation, s.color, s.tissue) for s in parcellation.structures]
    write_tsv(path, BASE_COLUMNS, [(0, "Background", "BG", "#000000", 0), *rows])


def _is_earlier(path: Path) -> bool:
    """Whether a ``dseg.tsv`` is the table of ``BASE`` that cadiff wrote up to revision 8."""
    try:
        lines = [line.split("\t")[:3] for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return False
    known = [[str(s.code), s.name, s.abbreviation] for s in load_parcellation(BASE).structures]
    return lines[2:] == known


def is_ours(out: Path, path: Path) -> bool:
    """Whether a file's name has no ``seg-``, or that of a parcellation that ``out`` holds."""
    match = SEGMENTATION.search(path.name)
    return match is None or _table(out, match[1]) is not None


def named_parcellation(label_map: Path) -> Parcellation | None:
    """The parcellation that ``seg-`` in a label map's name means; None for other programs' maps.

    Its table is shipped, or lies at the root of the map's dataset.
    """
    if match := SEGMENTATION.search(label_map.name):
        for folder in label_map.absolute().parents[:4]:  # sub-X/ses-Y/anat
            if table := _table(folder, match[1]):
                return load_parcellation(table)
    return None


def parcellation_of(label_map: Path) -> Parcellation:
    """The parcellation of a label map of cadiff's; ``BASE`` if its name means none."""
    return named_parcellation(label_map) or load_parcellation(BASE)


def _table(out: Path, segmentation: str) -> str | Path | None:
    """The argument of ``load_parcellation`` for a segmentation; None if it is unknown."""
    if segmentation == OWN_SEGMENTATION:
        return BASE
    if segmentation in shipped_names():
        return segmentation
    path = out / f"seg-{segmentation}_dseg.tsv"
    return path if path.is_file() else None
