"""Who was scanned: ages and sexes of ``participants.tsv``, as people write them."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cadiff_cli.errors import first_few
from cadiff_cli.io.files import read_json, read_text
from cadiff_cli.products import Person, Sex

TABLE = "participants.tsv"
OLDEST_YEARS = 120
"""Larger ages, such as 999, mean that the age is missing."""
PER_YEAR = {
    **dict.fromkeys(("years", "year", "yrs", "yr", "y", "a"), 1.0),
    **dict.fromkeys(("months", "month", "mo", "m"), 12.0),
    **dict.fromkeys(("weeks", "week", "wk", "w"), 365.25 / 7),
    **dict.fromkeys(("days", "day", "d"), 365.25),
}
"""How many of these ``Units`` make a year."""
SEXES: Mapping[str, Sex] = {
    **dict.fromkeys(("f", "female", "woman", "girl"), "F"),
    **dict.fromkeys(("m", "male", "man", "boy"), "M"),
}
UNKNOWN = {"", "n/a", "na", "nan", "none", "null", "unknown", "missing", "other", "o", "?", "-"}
"""Cells that say nothing; they need no note."""


@dataclass(frozen=True)
class People:
    """People by label (without ``sub-``), and what could not be read, for the user."""

    persons: Mapping[str, Person] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.persons or self.notes)

    def of(self, label: str) -> Person:
        """The person with this label, with or without ``sub-``."""
        return self.persons.get(label.removeprefix("sub-"), Person())


NOBODY = People()


def age_of(text: str, per_year: float = 1.0) -> float | None:
    """Age in years; None if the text is no age, or none of 0 to 120 years.

    ``per_year`` of the column's units make a year.  The oldest may be ``89+``, which counts as 89.
    DICOM's own form tells its unit.

    >>> [age_of(text) for text in ("34.5", "34,5", "89+", "018M", "n/a", "999", "30-35")]
    [34.5, 34.5, 89.0, 1.5, None, None, None]
    >>> age_of("18", 12)
    1.5
    """
    text = text.strip()
    if dicom := re.fullmatch(r"(\d{3})([DWMY])", text):
        text, per_year = dicom[1], PER_YEAR[dicom[2].lower()]
    number = re.fullmatch(r"(\d+(?:[.,]\d+)?)\s*\+?", text)
    if number is None:
        return None
    years = float(number[1].replace(",", ".")) / per_year
    return years if years <= OLDEST_YEARS else None


def sex_of(text: str, levels: Mapping[str, str] | None = None) -> Sex | None:
    """``F`` or ``M``; None for anything else.  ``levels`` explain codes.

    >>> [sex_of(text) for text in ("Female", "m", "2", "n/a")]
    ['F', 'M', None, None]
    >>> sex_of("2", {"1": "male", "2": "female"})
    'F'
    """
    text = text.strip()
    return SEXES.get((levels or {}).get(text, text).strip().lower())


def read_people(root: Path, table: str = TABLE) -> People:
    """Read the ``table`` of the folder ``root``, with units and codes of its JSON.

    Columns are ``participant_id``, ``age`` and ``sex`` (or ``gender``), in upper or lower case.
    A label with several lines has the values in which those agree that have one.  Never raises:
    what cannot be read is unknown, and a note says so.  Without the table nothing is known.
    """
    path = root / table
    try:
        lines = read_text(path).splitlines()
    except FileNotFoundError:
        return People()
    except (OSError, ValueError) as error:
        return People(notes=(f"{TABLE} cannot be read ({error}): ages and sexes are unknown",))
    # BIDS tables have no quoting.
    rows = [*csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]
    header = [name.strip() for name in rows[0]] if rows else []
    place = {name.lower(): k for k, name in reversed([*enumerate(header)])}
    if "participant_id" not in place:
        found = first_few(header) or "none"
        return People(notes=(f"{TABLE} has no column participant_id (its columns: {found})",))
    about = {
        name.lower(): values
        for name, values in (read_json(path.with_suffix(".json")) or {}).items()
        if isinstance(values, dict)
    }
    notes = list[str]()
    labels = [_cell(row, place["participant_id"]).removeprefix("sub-") for row in rows[1:]]

    def column(*names: str) -> tuple[str, list[str]]:
        """The name of the first of these columns that is there, and its cells."""
        name = next((name for name in names if name in place), names[0])
        where = place.get(name, len(header))
        return name, [_cell(row, where) for row in rows[1:]]

    lacking = ["age"] * ("age" not in place) + ["sex"] * (not {"sex", "gender"} & {*place})
    if lacking:
        names = " and no column ".join(lacking)
        notes.append(f"{TABLE} has no column {names} (its columns: {first_few(header)})")
    _, cells = column("age")
    per_year = _per_year(about.get("age", {}), notes)
    years = [age_of(cell, per_year) if per_year else None for cell in cells]
    if per_year:
        notes += _about_ages(labels, cells, years)
    torn = _torn(labels, years, "ages", notes)
    ages = {
        x: age for x, age in zip(labels, years, strict=True) if age is not None and x not in torn
    }
    name, cells = column("sex", "gender")
    levels = _levels(about.get(name, {}))
    read: list[Sex | None] = [sex_of(cell, levels) for cell in cells]
    notes += _about_sexes(name, cells, read)
    torn = _torn(labels, read, "sexes", notes)
    sexes = {x: sex for x, sex in zip(labels, read, strict=True) if sex and x not in torn}
    persons = {label: Person(ages.get(label), sexes.get(label)) for label in labels if label}
    return People(persons, tuple(notes))


def _cell(row: Sequence[str], place: int) -> str:
    return row[place].strip() if place < len(row) else ""


def _per_year(column: Mapping[str, Any], notes: list[str]) -> float | None:
    """How many units of the age column make a year: BIDS counts in years unless it is said."""
    units = str(column.get("Units", "years")).strip()
    per_year = PER_YEAR.get(units.lower())
    if per_year is None:
        known = "years, months, weeks or days"
        notes.append(f"participants.json gives ages in {units!r}, not in {known}: they are unknown")
    return per_year


def _levels(column: Mapping[str, Any]) -> dict[str, str]:
    """What the codes of a column mean; newer files describe each by an object."""
    levels = column.get("Levels")
    if not isinstance(levels, Mapping):
        return {}
    return {
        str(code): str(text.get("Description", "") if isinstance(text, Mapping) else text)
        for code, text in levels.items()
    }


def _about_ages(
    labels: Sequence[str], cells: Sequence[str], years: Sequence[float | None]
) -> Iterator[str]:
    """Notes on ages that were not read, or not as they stand."""
    told = [*zip(labels, cells, years, strict=True)]
    lost = [
        (label, cell) for label, cell, age in told if age is None and cell.lower() not in UNKNOWN
    ]
    absurd = [(label, cell) for label, cell in lost if cell.replace(".", "", 1).isdecimal()]
    if absurd:
        yield (
            f"{TABLE}: ages above {OLDEST_YEARS} years are ignored ({_listed(absurd)}); if they are"
            ' months, write {"age": {"Units": "months"}} into participants.json'
        )
    if words := [one for one in lost if one not in absurd]:
        yield f"{TABLE}: ages that are not numbers are ignored ({_listed(words)})"
    if oldest := [(x, cell) for x, cell, age in told if age is not None and cell.endswith("+")]:
        yield f"{TABLE}: ages with + count as they stand ({_listed(oldest)})"


def _about_sexes(name: str, cells: Sequence[str], sexes: Sequence[Sex | None]) -> Iterator[str]:
    """A note on values that are neither female nor male."""
    strange = dict.fromkeys(
        cell
        for cell, sex in zip(cells, sexes, strict=True)
        if sex is None and cell.lower() not in UNKNOWN
    )
    if strange:
        yield (
            f"{TABLE}: {name} {first_few([*strange])} is taken for unknown; F and M are known, and"
            " codes that participants.json explains as Levels"
        )


def _torn(labels: Sequence[str], values: Sequence[object], what: str, notes: list[str]) -> set[str]:
    """Labels whose lines have different values."""
    found = dict[str, set[object]]()
    for label, value in zip(labels, values, strict=True):
        if value is not None:
            found.setdefault(label, set()).add(value)
    torn = {label for label, several in found.items() if len(several) > 1}
    if torn:
        whose = first_few([f"sub-{label}" for label in sorted(torn)])
        notes.append(f"{TABLE} gives different {what} of one person: {whose}; they are unknown")
    return torn


def _listed(pairs: Sequence[tuple[str, str]]) -> str:
    return first_few([f"sub-{label} {cell}" for label, cell in pairs], 4)
