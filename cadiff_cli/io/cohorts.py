"""Tables of people and the volumes of their structures, to fit age ranges to."""

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cadiff_cli.errors import DataError, MissingInputError, UsageError, first_few
from cadiff_cli.io.bids.description import links
from cadiff_cli.io.bids.layout import finished
from cadiff_cli.io.bids.people import People, age_of, read_people, sex_of
from cadiff_cli.io.files import read_json, read_text
from cadiff_cli.io.volumes import column
from cadiff_cli.labels.parcellation import BASE, Parcellation, load_parcellation, shipped_names
from cadiff_cli.products import Person

GROUP_TABLE = "group_morph.tsv"
LABELS = ("participant_id", "subject")
"""Columns that may name a person."""


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
    with their mean volumes and age.  Scans without age or volumes are left out, and noted.

    Raises ``MissingInputError``, ``DataError``, or ``UsageError`` for a path that is given twice.
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
    return _by_person(whole, names, notes)


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each table or folder, which does not tell where it lies."""
    names = [path.resolve().stem for path in paths]
    return [f"{x} {k}" if names.count(x) > 1 else x for k, x in enumerate(names, 1)]


def _people(path: Path, participants: Path | None, notes: list[str]) -> People:
    """Who may be in the table of a folder, or in a table, beside what it says itself."""
    if participants is not None:
        found = read_people(participants.parent, participants.name)
    elif path.is_dir():
        raw = links(read_json(path / "dataset_description.json") or {}).get("raw", "")
        folders = [path, *([path / raw] if raw and ":" not in raw else [])]
        found = next(filter(None, (read_people(folder) for folder in folders)), People())
    else:
        found = People()
    notes += found.notes
    return found


def _columns(name: str, code: str) -> tuple[str, str, str]:
    """Columns that may hold a structure: as now, as up to revision 8, and by its code."""
    return column(name), name.lower().replace("-", "_"), code


def _scans(
    table: Path, source: str, columns: Mapping[str, str], people: People, notes: list[str]
) -> Iterator[_Scan]:
    """Every line of a table that has all volumes."""
    lines = _lines(table)
    header = {name.lower(): name for name in lines[0]} if lines else {}
    label = next((header[name] for name in LABELS if name in header), None)
    if label is None:
        raise DataError(
            f"{table} has no column participant_id (its columns: {first_few([*header]) or 'none'})",
            "name the people: several scans of one person count as one",
        )
    where = {
        name: next((header[x] for x in _columns(name, code) if x in header), "")
        for name, code in columns.items()
    }
    if lacking := [column(name) for name, place in where.items() if not place]:
        raise DataError(
            f"{table} has no column {first_few(lacking, 3)}",
            "volumes of all structures but vessels are needed, in mm3; --parcellation names"
            " another list of structures",
        )
    age, sex = header.get("age", ""), header.get("sex", header.get("gender", ""))
    of_source, verdict = header.get("source", ""), header.get("verdict", "")
    incomplete, looks = list[str](), 0
    for line in lines:
        mm3 = [_number(line.get(place)) for place in where.values()]
        subject = str(line.get(label) or "").removeprefix("sub-")
        volumes = tuple(v for v in mm3 if v is not None)
        if len(volumes) < len(mm3) or not sum(volumes):
            incomplete.append(f"sub-{subject}")
            continue
        known = people.of(subject)
        years, of_sex = age_of(str(line.get(age, ""))), sex_of(str(line.get(sex, "")))
        person = Person(known.age_years if years is None else years, of_sex or known.sex)
        looks += line.get(verdict) == "look"
        yield _Scan(subject, line.get(of_source) or source, person, volumes)
    if incomplete:
        notes.append(f"{table}: left out, without all volumes: {first_few(incomplete)}")
    if looks:
        notes.append(
            f"{table}: {looks} of {len(lines)} scans have the verdict 'look': check them, and"
            " delete the lines of those that failed"
        )


def _lines(table: Path) -> list[dict[str, str | None]]:
    try:
        text = read_text(table)
    except (OSError, ValueError) as error:
        raise DataError(f"{table} is not a table ({error})", "save it as TSV in UTF-8") from error
    first = text.split("\n", 1)[0]
    delimiter = "\t" if "\t" in first else ";" if first.count(";") > first.count(",") else ","
    return [*csv.DictReader(text.splitlines(), delimiter=delimiter)]


def _number(cell: str | None) -> float | None:
    try:
        value = float(cell or "")
    except ValueError:
        return None
    return value if np.isfinite(value) and value >= 0 else None


def _by_person(scans: Sequence[_Scan], names: Sequence[str], notes: list[str]) -> Cohort:
    """One row a person: the mean of all scans."""
    found = dict[tuple[str, str], list[_Scan]]()
    for scan in scans:
        found.setdefault((scan.source, scan.subject), []).append(scan)
    if several := sum(len(group) > 1 for group in found.values()):
        notes.append(f"{several} people have several scans: their means count")
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
