"""Who was scanned: ages and sexes of ``participants.tsv``, as people write them.

A person who comes back has grown older: ``sub-X/sub-X_sessions.tsv`` may tell an age per session.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from cadiff_cli.errors import MissingInputError, first_few, plural
from cadiff_cli.io.files import names_in, read_json
from cadiff_cli.products import Person, Sex
from cadiff_cli.text import lines_of, read_text

T = TypeVar("T")

TABLE, SESSIONS = "participants.tsv", "sub-X_sessions.tsv"
ABOUT = {TABLE: "participants.json", SESSIONS: "sessions.json"}
"""Which file, at a dataset's root, explains the columns of which table."""
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
"""Cells, in lower case, that say nothing; they need no note."""
UNREADABLE = object()
"""The unit of ages of which nothing can be read."""
LONGEST = 40
"""Characters of a cell that a note repeats."""


@dataclass(frozen=True)
class People:
    """People by label (without ``sub-``), and what could not be read, for the user.

    ``ages`` are those of sessions in years, by label and session: ``01_ses-a``.
    """

    persons: Mapping[str, Person] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ages: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.persons or self.notes or self.ages)

    def known(self) -> bool:
        """Whether the age or the sex of anybody is known."""
        return bool(self.ages) or any(person != Person() for person in self.persons.values())

    def of(self, label: str) -> Person:
        """The person with this label, with or without ``sub-``."""
        return self.persons.get(label.removeprefix("sub-"), Person())

    def of_scan(self, entities: str) -> Person:
        """The person in the scan ``sub-01_ses-a_run-1``, of the session's age where it is known."""
        subject, *more = entities.removeprefix("sub-").split("_")
        return self.at(subject, next((part for part in more if part.startswith("ses-")), ""))

    def at(self, label: str, session: str) -> Person:
        """The person at a session, with or without ``ses-``, of its age where it is known."""
        subject, person = label.removeprefix("sub-"), self.of(label)
        age = self.ages.get(f"{subject}_ses-{session.removeprefix('ses-')}")
        return person if age is None else replace(person, age_years=age)


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
    number = re.fullmatch(r"(\d+(?:[.,]\d*)?|[.,]\d+)\s*\+?", text)
    if number is None:
        return None
    years = float(number[1].replace(",", ".")) / per_year
    return years if years <= OLDEST_YEARS else None


def sex_of(text: str, levels: Mapping[str, str] | None = None) -> Sex | None:
    """``F`` or ``M``; None for anything else.  ``levels`` explain codes, if in words known here.

    >>> [sex_of(text) for text in ("Female", "m", "2", "n/a")]
    ['F', 'M', None, None]
    >>> [sex_of(text, {"2": "female", "F": "weiblich"}) for text in ("2", "F")]
    ['F', 'F']
    """
    text = text.strip()
    words = ((levels or {}).get(text, text), text)
    return next(filter(None, (SEXES.get(word.strip().lower()) for word in words)), None)


def read_people(root: Path, table: str = TABLE) -> People:
    """Read the ``table`` of the folder ``root``, with units and codes of its JSON.

    Columns are ``participant_id``, ``age`` and ``sex`` (or ``gender``), in upper or lower case.
    A label with several lines has the values in which those agree that have one.  Ages of sessions
    are those of ``sub-X/sub-X_sessions.tsv`` (``session_id``, ``age``).  Never raises: what cannot
    be read is unknown, and a note says so.  Without tables nothing is known.
    """
    notes = list[str]()
    about = _about((root / table).with_suffix(".json"), notes)
    persons = _persons(root / table, about, notes)
    names = _names_in(root, notes)
    inside = {x: _names_in(root / x, notes) for x in names if x.startswith("sub-")}
    subjects = {name.removeprefix("sub-"): names for name, names in inside.items() if names}
    ages = _at_sessions(root, subjects, about | _about(root / ABOUT[SESSIONS], notes), notes)
    aged = {label for label, person in persons.items() if person.age_years is not None}
    if aged and (absent := [f"sub-{label}" for label in subjects if label not in persons]):
        have = f"{plural(len(absent), 'participant')} {'has' if len(absent) == 1 else 'have'}"
        notes.append(f"{have} no line in {table}: {first_few(absent)}")
    several = [
        f"sub-{label}"
        for label, names in subjects.items()
        if label in aged
        and sum(x.startswith("ses-") and f"{label}_{x}" not in ages for x in names) > 1
    ]
    if several:
        notes.append(
            f"ages are those of {table} for several sessions of"
            f" {plural(len(several), 'participant')} ({first_few(several)}); write the age at each"
            f" session into sub-X/{SESSIONS}, columns session_id and age, parted by tabs"
        )
    return People(persons, tuple(notes), ages)


def _names_in(folder: Path, notes: list[str]) -> list[str]:
    try:
        return names_in(folder)
    except MissingInputError as error:
        notes.append(f"{error.message}: ages at its sessions are unknown")
        return []


def _persons(path: Path, about: dict[str, dict[str, Any]], notes: list[str]) -> dict[str, Person]:
    """People by label, of a ``participants.tsv``."""
    table = path.name
    try:
        columns = _columns(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{table} cannot be read ({error}): ages and sexes are unknown")
        return {}
    header = first_few([name for name, _ in columns]) or "none"
    cells = _by_name(columns)
    if "participant_id" not in cells:
        notes.append(
            f"{table} has no column participant_id (its columns, parted by tabs: {header})"
        )
        return {}
    labels = [cell.removeprefix("sub-") for cell in cells["participant_id"]]
    sex = next((name for name in ("sex", "gender") if name in cells), "sex")
    if lacking := [name for name in ("age", sex) if name not in cells]:
        names = " and no column ".join(lacking)
        notes.append(f"{table} has no column {names} (its columns: {header})")
    empty = [""] * len(labels)
    both = zip(labels, cells.get("age", empty), cells.get(sex, empty), strict=True)
    lines = [line for line in both if line[0]]
    per_year = _per_year(table, about.get("age", {}), notes)
    ages = _ages(table, [(label, cell, per_year) for label, cell, _ in lines], notes)
    levels = _levels(about.get(sex, {}))
    read = [(label, cell, sex_of(cell, levels)) for label, _, cell in lines]
    notes += _about_sexes(table, sex, read)
    sexes: dict[str, Sex] = _agreed(table, "sexes", read, notes)
    return {label: Person(ages.get(label), sexes.get(label)) for label, *_ in lines}


def _at_sessions(
    root: Path,
    subjects: Mapping[str, Sequence[str]],
    about: dict[str, dict[str, Any]],
    notes: list[str],
) -> dict[str, float]:
    """Ages by label and session, of the tables in the folders of ``subjects`` (label -> names)."""
    lines, lost, absent = list[tuple[str, str, float | None]](), list[str](), list[str]()
    for label, names in subjects.items():
        name = f"sub-{label}_sessions.tsv"
        if name not in names:
            continue
        path = root / f"sub-{label}" / name
        try:
            cells = _by_name(_columns(path))
        except (OSError, ValueError):
            lost.append(name)
            continue
        column = (about | _about(path.with_suffix(".json"), notes)).get("age", {})
        if {"session_id", "age"} <= cells.keys():
            per_year = _per_year(SESSIONS, column, notes)
            for session, cell in zip(cells["session_id"], cells["age"], strict=True):
                if not session:
                    continue
                folder = f"ses-{session.removeprefix('ses-')}"
                lines.append((f"{label}_{folder}", cell, per_year))
                if folder not in names:
                    absent.append(f"sub-{label} {folder}")
    if lost:
        notes.append(f"{first_few(lost)} cannot be read: ages of {TABLE} count in its place")
    if absent:
        notes.append(f"{SESSIONS} tells of sessions that are not there: {first_few(absent)}")
    return _ages(SESSIONS, lines, notes)


def _columns(path: Path) -> list[tuple[str, list[str]]]:
    """Names and cells of a table's columns; BIDS tables have no quoting."""
    lines = [[x.strip() for x in line.split("\t")] for line in lines_of(read_text(path))]
    header, rows = (lines[0], lines[1:]) if lines else ([], [])
    return [
        (name, [row[k] if k < len(row) else "" for row in rows]) for k, name in enumerate(header)
    ]


def _by_name(columns: Sequence[tuple[str, list[str]]]) -> dict[str, list[str]]:
    """Cells by a column's name in lower case; the first of two columns of one name counts."""
    return {name.lower(): cells for name, cells in reversed(columns)}


def _about(path: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    """What a JSON file says of columns, by their names in lower case.

    Of a file that cannot be read nobody knows the unit of its ages: they are unknown, too.
    """
    values = read_json(path)
    if values is None and os.path.lexists(path):  # also a link to a file that was not fetched
        note = f"{path.name} cannot be read: the ages that it explains are taken for unknown"
        notes += [note] * (note not in notes)
        return {"age": {"Units": UNREADABLE}}
    values = values or {}
    return {name.lower(): column for name, column in values.items() if isinstance(column, dict)}


def _per_year(table: str, column: Mapping[str, Any], notes: list[str]) -> float | None:
    """How many units of the age column make a year: BIDS counts in years unless it is said."""
    units = column.get("Units")
    if units is UNREADABLE:
        return None
    if isinstance(units, list) and len(units) == 1:
        (units,) = units
    text = str(units or "").strip() or "years"
    per_year = PER_YEAR.get(text.lower())
    if per_year is None:
        note = (
            f"{_explained_in(table)} gives ages in {_short(text)!r}, not in years, months, weeks or"
            " days: they are ignored"
        )
        notes += [note] * (note not in notes)
    return per_year


def _ages(
    table: str, lines: Sequence[tuple[str, str, float | None]], notes: list[str]
) -> dict[str, float]:
    """Ages in years; ``lines`` are of a label, a cell, and how many of its units make a year."""
    told = [(label, cell, age_of(cell, per_year)) for label, cell, per_year in lines if per_year]
    notes += _about_ages(table, told)
    return _agreed(table, "ages", told, notes)


def _levels(column: Mapping[str, Any]) -> dict[str, str]:
    """What the codes of a column mean; newer files describe each by an object."""
    levels = column.get("Levels")
    if not isinstance(levels, Mapping):
        return {}
    return {
        str(code): str(text.get("Description", "") if isinstance(text, Mapping) else text)
        for code, text in levels.items()
    }


def _about_ages(table: str, told: Sequence[tuple[str, str, float | None]]) -> Iterator[str]:
    """Notes on ages that were not read, or not as they stand, of labels, cells and ages."""
    lost = [
        (label, cell) for label, cell, age in told if age is None and cell.lower() not in UNKNOWN
    ]
    instead = f"; ages of {TABLE} count in their place" if table == SESSIONS else ""
    absurd = [(label, cell) for label, cell in lost if cell.replace(".", "", 1).isdecimal()]
    if absurd:
        yield (
            f"{table}: ages above {OLDEST_YEARS} years are ignored ({_listed(absurd)}){instead}; if"
            f' they are months, write {{"age": {{"Units": "months"}}}} into {_explained_in(table)}'
        )
    if words := [one for one in lost if one not in absurd]:
        yield f"{table}: ages that are not numbers are ignored ({_listed(words)}){instead}"
    if oldest := [(x, cell) for x, cell, age in told if age is not None and cell.endswith("+")]:
        yield f"{table}: ages with + count as they stand ({_listed(oldest)})"


def _about_sexes(
    table: str, name: str, told: Sequence[tuple[str, str, Sex | None]]
) -> Iterator[str]:
    """A note on values that are neither female nor male, of labels, cells and sexes."""
    strange = dict.fromkeys(
        _short(cell) for _, cell, sex in told if sex is None and cell.lower() not in UNKNOWN
    )
    if strange:
        yield (
            f"{table}: {name} {first_few([*strange])} is taken for unknown; F and M are known, and"
            f" codes that {_explained_in(table)} explains as Levels"
        )


def _agreed(
    table: str, what: str, told: Iterable[tuple[str, str, T | None]], notes: list[str]
) -> dict[str, T]:
    """The values of those labels whose lines do not differ, of labels, cells and values."""
    found = dict[str, set[T]]()
    for label, _, value in told:
        if value is not None:
            found.setdefault(label, set()).add(value)
    if torn := [f"sub-{label}" for label in sorted(found) if len(found[label]) > 1]:
        whose = first_few(torn)
        notes.append(f"{table} gives different {what} of one person: {whose}; they are ignored")
    return {label: values.pop() for label, values in found.items() if len(values) == 1}


def _explained_in(table: str) -> str:
    """The name of the JSON file that explains the columns of a table."""
    return ABOUT.get(table, Path(table).with_suffix(".json").name)


def _short(cell: str) -> str:
    return cell if len(cell) <= LONGEST else f"{cell[:LONGEST]}..."


def _listed(pairs: Sequence[tuple[str, str]]) -> str:
    return first_few([f"sub-{label} {_short(cell)}" for label, cell in pairs], 4)
