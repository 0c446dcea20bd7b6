"""Tables of people and the volumes of their structures, to fit age ranges to."""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cadiff_cli.errors import DataError, MissingInputError, UsageError, first_few
from cadiff_cli.io.bids.description import people_of
from cadiff_cli.io.bids.layout import finished
from cadiff_cli.io.bids.people import (
    NOBODY,
    OLDEST_YEARS,
    UNKNOWN,
    People,
    age_of,
    read_people,
    sex_of,
)
from cadiff_cli.io.volumes import column
from cadiff_cli.labels.parcellation import BASE, Parcellation, load_parcellation, shipped_names
from cadiff_cli.products import Person
from cadiff_cli.text import lines_of, read_text

GROUP_TABLE = "group_morph.tsv"
LABELS = ("participant_id", "subject")
"""Columns that may name a person."""
SMALLEST_MM3 = 2_000
"""All structures of a table together: brains in cm3 are smaller, two amygdalae in mm3 larger."""
THOUSANDS = re.compile(r"[1-9]\d{0,2}(,\d{3})+(\.\d*)?")
"""A number with commas that may part its thousands: ``1,234`` may be 1234, or 1.234."""


@dataclass(frozen=True)
class Cohort:
    """People and their volumes: row ``k`` of every list in ``mm3`` (by structure) is one person's.

    ``sources`` name the scanner or study that each comes from.  ``notes`` say what was left out.
    """

    subjects: tuple[str, ...]
    sources: tuple[str, ...]
    persons: tuple[Person, ...]
    mm3: Mapping[str, tuple[float, ...]]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.subjects)

    @property
    def described(self) -> str:
        """Who they are, in words: ``94 people (ds1 67, ds2 27)``."""
        of = sorted(Counter(self.sources).items())
        return f"{len(self)} people ({', '.join(f'{name} {n}' for name, n in of)})"


@dataclass(frozen=True)
class _Scan:
    subject: str
    source: str
    person: Person
    mm3: tuple[float, ...]


def parcellation_in(paths: Sequence[Path], name: str | None = None) -> Parcellation:
    """The structures of tables and folders: those called ``name``, or of a folder's results."""
    if name is not None:
        return load_parcellation(name if name in shipped_names() else Path(name))
    results = (next(finished(path), None) for path in paths if path.is_dir())
    return next((x.parcellation for x in results if x), load_parcellation(BASE))


def read_cohort(
    paths: Sequence[Path], parcellation: Parcellation, participants: Path | None = None
) -> Cohort:
    """Read people from tables, or from folders that ``cadiff run`` wrote (their group table).

    A table (TSV, or CSV) has a line a scan, with ``participant_id``, ``age``, ``sex`` and a column
    of mm^3 for every structure but vessels: ``left_hippocampus`` as in the group table, or its
    code.  ``source`` tells scanners or studies apart; without it each path is one.  Where a table
    knows no age, those of ``participants`` count (a ``participants.tsv``), else those beside the
    group table or of the dataset that it was made from.  Several scans of a person count as one,
    with their mean volumes and age.  Scans without age or volumes are left out, and noted.  Numbers
    may have a decimal comma.

    Raises ``MissingInputError``, ``DataError`` (also if no scan is left), or ``UsageError`` for a
    path that is given twice.
    """
    notes, scans = list[str](), list[_Scan]()
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("a table or folder is given twice", "give each once")
    if participants is not None and not participants.is_file():
        raise MissingInputError(f"no such file: {participants}", "check --participants")
    names = [s.name for s in parcellation.structures if s.is_tissue]
    codes = {s.name: str(s.code) for s in parcellation.structures}
    for path, source in zip(paths, _names(paths), strict=True):
        table = path / GROUP_TABLE if path.is_dir() else path
        if not table.is_file():
            remedy = "run cadiff run BIDS_DIR OUT group" if path.is_dir() else "check the path"
            raise MissingInputError(f"no such file: {table}", remedy)
        people = _people(path, participants, notes)
        scans += _scans(table, source, {name: codes[name] for name in names}, people, notes)
    whole = [scan for scan in scans if scan.person.age_years is not None]
    if lost := len(scans) - len(whole):
        notes.append(f"{lost} of {len(scans)} scans are left out: no age is known of them")
    if not whole:
        raise DataError(
            f"no scan can be used: {'; '.join(notes)}",
            "a scan needs an age in years (in the table, or in --participants) and all volumes in"
            " mm3, as 1234.5 or 1234,5",
        )
    middle = float(np.median([sum(scan.mm3) for scan in whole]))
    if middle < SMALLEST_MM3:
        raise DataError(
            f"half of the people have less than {middle:.0f} mm3 in all", "give mm3, not cm3"
        )
    return _by_person(whole, names, notes)


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each table or folder, which does not tell where it lies."""
    names = [path.resolve().stem for path in paths]
    return [f"{x} {k}" if names.count(x) > 1 else x for k, x in enumerate(names, 1)]


def _people(path: Path, participants: Path | None, notes: list[str]) -> People:
    """Who may be in the table of a folder, or in a table, beside what it says itself."""
    if participants is not None:
        found = read_people(participants.parent, participants.name)
    else:
        found = people_of(path) if path.is_dir() else NOBODY
    notes += found.notes
    return found


def _columns(name: str, code: str) -> tuple[str, ...]:
    """Columns that may hold a structure: as now, as up to revision 8, by its name and its code."""
    return column(name), name.lower().replace("-", "_"), name.lower(), code


def _scans(
    table: Path, source: str, columns: Mapping[str, str], people: People, notes: list[str]
) -> Iterator[_Scan]:
    """Every line of a table that has all volumes."""
    header, lines = _lines(table)
    label = next((name for name in LABELS if name in header), None)
    if label is None:
        raise DataError(
            f"{table} has no column participant_id (its columns: {first_few(header) or 'none'})",
            "give this name to the column of the people's labels",
        )
    where = {
        name: next((x for x in _columns(name, code) if x in header), "")
        for name, code in columns.items()
    }
    if lacking := [column(name) for name, place in where.items() if not place]:
        raise DataError(
            f"{table} has no column {first_few(lacking, 3)}",
            "volumes of all structures but vessels are needed, in mm3; --parcellation names"
            " another list of structures",
        )
    used = {label, "age", "sex", "gender", "source", "session_id", *where.values()}
    if twice := sorted(name for name in used if header.count(name) > 1):
        raise DataError(
            f"{table} has several columns {first_few(twice)}", "give each column a name of its own"
        )
    _refuse_thousands(table, (line.get(place, "") for line in lines for place in where.values()))
    sex = "sex" if "sex" in header else "gender"
    incomplete, looks = list[str](), 0
    strange: dict[str, list[str]] = {"age": [], sex: []}
    for line in lines:
        cells = {place: line.get(place, "") for place in where.values()}
        mm3 = {place: _number(cell) for place, cell in cells.items()}
        subject = line.get(label, "").removeprefix("sub-")
        if subject.lower() in ("", "n/a", "nan"):
            incomplete.append(f"a line without {label}")
            continue
        volumes = tuple(v for v in mm3.values() if v is not None)
        if len(volumes) < len(mm3) or not sum(volumes):
            why = next((f"{x} {cells[x]!r}" for x, v in mm3.items() if v is None), "all are 0")
            incomplete.append(f"sub-{subject} ({why})")
            continue
        known = people.at(subject, line.get("session_id", ""))
        years, of_sex = age_of(line.get("age", "")), sex_of(line.get(sex, ""))
        person = Person(known.age_years if years is None else years, of_sex or known.sex)
        for name, value in (("age", person.age_years), (sex, person.sex)):
            if value is None and (cell := line.get(name, "")).lower() not in UNKNOWN:
                strange[name].append(f"sub-{subject} {cell}")
        looks += line.get("verdict") == "look"
        told = line.get("source", "")
        yield _Scan(subject, source if told.lower() in UNKNOWN else told, person, volumes)
    if not lines:
        notes.append(f"{table} has no line below its header")
    if incomplete:
        notes.append(
            f"{table}: {len(incomplete)} of {len(lines)} scans are left out, without all volumes or"
            f" a label: {first_few(incomplete, 4)}"
        )
    for name, unread in strange.items():
        if unread:
            read = "F and M" if name == sex else f"years, 0 to {OLDEST_YEARS}"
            notes.append(
                f"{table}: {name} is taken for unknown in {len(unread)} of {len(lines)} scans"
                f" ({first_few(unread, 4)}); {read} are read"
            )
    if looks:
        notes.append(
            f"{table}: {looks} of {len(lines)} scans have the verdict 'look': check them, and"
            " delete the lines of those that failed"
        )


def _lines(table: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The names of a table's columns in lower case, and its lines by them.

    Columns without a name (pandas writes its row numbers so) and empty lines are left out.
    """
    try:
        text = read_text(table)
    except (OSError, ValueError) as error:
        raise DataError(f"{table} is not a table ({error})", "save it as TSV in UTF-8") from error
    first = text.split("\n", 1)[0]
    delimiter = "\t" if "\t" in first else ";" if first.count(";") > first.count(",") else ","
    rows = [_cells(table, line, delimiter) for line in lines_of(text)]
    header = [name.lower() for name in rows[0]] if rows else []
    lines = list[dict[str, str]]()
    for row in filter(any, rows[1:]):
        if any(row[len(header) :]):  # cells have moved, or a number holds a comma
            raise DataError(
                f"{table}: the line that begins with {first_few(row, 2)} has {len(row)} cells, the"
                f" header {len(header)}",
                "every column needs a name (in R, write with row.names = FALSE), and numbers with"
                " commas need another delimiter or quotes",
            )
        lines.append({name: cell for name, cell in zip(header, row, strict=False) if name})
    return [name for name in header if name], lines


def _cells(table: Path, line: str, delimiter: str) -> list[str]:
    try:
        row = next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise DataError(
            f"{table}: the line that begins with {line[:40]!r} cannot be parted ({error})",
            "a cell in quotation marks must end on its own line, and hold nothing after them",
        ) from error
    return [cell.strip() for cell in row]


def _refuse_thousands(table: Path, cells: Iterable[str]) -> None:
    """Refuse a table in which every comma may part thousands: it could be read 1000 times wrong."""
    commas = [cell for cell in cells if "," in cell]
    if commas and all(map(THOUSANDS.fullmatch, commas)):
        raise DataError(
            f"{table}: commas may part thousands or be decimal, in {first_few([*commas], 3)}",
            "write volumes without thousands separators, as 1234.5 or 1234,5",
        )


def _number(cell: str) -> float | None:
    """What a cell holds, with a decimal point or comma; None if it is no volume."""
    try:
        value = float(cell.replace(",", ".", 1))
    except ValueError:
        return None
    return value if np.isfinite(value) and value >= 0 else None


def _by_person(scans: Sequence[_Scan], names: Sequence[str], notes: list[str]) -> Cohort:
    """One row a person: the mean of all scans."""
    found = dict[tuple[str, str], list[_Scan]]()
    for scan in scans:
        found.setdefault((scan.source, scan.subject), []).append(scan)
    if several := sum(len(group) > 1 for group in found.values()):
        notes.append(f"people with several scans, whose means count: {several}")
    rows = [found[key] for key in sorted(found)]
    means = np.array([np.mean([scan.mm3 for scan in group], axis=0) for group in rows])
    return Cohort(
        tuple(group[0].subject for group in rows),
        tuple(group[0].source for group in rows),
        tuple(_one_of(group) for group in rows),
        {name: tuple(means[:, k].tolist()) for k, name in enumerate(names)} if rows else {},
        tuple(notes),
    )


def _one_of(scans: Sequence[_Scan]) -> Person:
    ages = [scan.person.age_years for scan in scans if scan.person.age_years is not None]
    sexes = Counter(scan.person.sex for scan in scans if scan.person.sex)
    return Person(float(np.mean(ages)), next(iter(sexes)) if len(sexes) == 1 else None)
