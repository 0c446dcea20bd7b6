"""Find a label map's parcellation: its name tells it, and its dataset holds the table."""

import re
from pathlib import Path

from cadiff_cli.io.files import write_text, write_tsv
from cadiff_cli.labels.parcellation import (
    BASE,
    OWN_SEGMENTATION,
    Parcellation,
    load_parcellation,
    shipped_names,
)

SEGMENTATION = re.compile(r"_seg-([A-Za-z0-9]+)_")
BASE_COLUMNS = ("index", "name", "abbreviation", "color", "mapping")


def table_name(parcellation: Parcellation) -> str:
    """File at the root of a dataset that explains the codes: ``dseg.tsv`` for ``BASE``."""
    if parcellation.name == BASE:
        return "dseg.tsv"
    return f"seg-{parcellation.segmentation}_dseg.tsv"


def save_table(out: Path, parcellation: Parcellation) -> None:
    """Write the parcellation's table, unless it is there already.

    ``parcellation_of`` reads the tables of others than ``BASE``.
    """
    path = out / table_name(parcellation)
    if not path.exists():
        write_table(path, parcellation)


def write_table(path: Path, parcellation: Parcellation) -> None:
    """Write the parcellation's table: BIDS' columns for ``BASE``, all columns for others."""
    if parcellation.name != BASE:
        write_text(path, parcellation.as_tsv())
        return
    rows = [(s.code, s.name, s.abbreviation, s.color, s.tissue) for s in parcellation.structures]
    write_tsv(path, BASE_COLUMNS, [(0, "Background", "BG", "#000000", 0), *rows])


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
