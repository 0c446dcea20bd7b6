"""The group level: one table of all finished scans, and a list of the missing ones."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cadiff_cli.errors import CadiffError, DataError, MissingInputError, in_a_line
from cadiff_cli.io.bids.derivatives import read_mask_quality
from cadiff_cli.io.bids.layout import Finished, finished
from cadiff_cli.io.bids.people import NOBODY, People
from cadiff_cli.io.bids.selection import SUFFIXES
from cadiff_cli.io.cohorts import GROUP_TABLE
from cadiff_cli.io.files import read_tsv, write_json, write_tsv
from cadiff_cli.io.formats import stem
from cadiff_cli.io.volumes import (
    BRAIN,
    INTRACRANIAL,
    NOT_CSF,
    PERCENTILE,
    SUMS,
    TOTALS,
    Row,
    column,
    percentile_cells,
    read_rows,
)
from cadiff_cli.labels.parcellation import Parcellation, load_parcellation, shipped_names
from cadiff_cli.quality.age_ranges import ranges_of
from cadiff_cli.quality.group import Group, outliers
from cadiff_cli.quality.judgement import COLUMNS, Judgement, columns, judge
from cadiff_cli.quality.ranges import load_ranges
from cadiff_cli.runner.job import Outcome
from cadiff_cli.runner.journal import Journal

MISSING = "group_missing.tsv"
ENTITIES = {
    "participant_id": ("sub", "Participant"),
    "session_id": ("ses", "Session"),
    "acquisition": ("acq", "Acquisition"),
    "ceagent": ("ce", "Contrast agent"),
    "reconstruction": ("rec", "Reconstruction"),
    "run": ("run", "Run"),
    "echo": ("echo", "Echo"),
    "inv": ("inv", "Inversion time"),
    "part": ("part", "Part of a complex image"),
    "chunk": ("chunk", "Chunk of the field of view"),
}
"""Columns that identify a row's scan; ``scan`` holds all of its entities."""
WITH_PERCENTILE = (BRAIN, NOT_CSF)
"""Totals that have percentiles, too."""
SCAN = {"bids_name": "Name of the scan's file without its ending, as in MRIQC's tables"}
SUFFIX = {"suffix": "Suffix of the scan: T1w, or UNIT1 (uniform image of an MP2RAGE)"}
QUALITY = {
    "registration_score": "Normalised mutual information of scan and template (1 to 2), the lowest",
    "registration": "Kinds of registration that were used, in the templates' order if they differ",
    "template": "Templates that the scan was registered to",
    "skull_stripping": "How the brain mask was found",
    "n_warnings": "Number of warnings in the scan's sidecar",
    "seconds": "Seconds from stripping to labels, without other spaces, files and the page",
    "version": "Version of cadiff",
    "fingerprint": "Changes with settings, weights, calibration, template and version",
    **COLUMNS,
    "outlier": "Why the scan stands out from the group (median and MAD; docs/report.md)",
}


def collect(out: Path, expected: Sequence[str], people: People = NOBODY) -> Group:
    """Collect rows of the expected scans that are finished, and the reasons for missing ones.

    A table has one parcellation, that of most results; results in others count as missing.
    ``people`` are of today's ``participants.tsv``: what it knows counts, not what sidecars hold.

    Raises ``MissingInputError`` if no expected scan is finished.
    """
    names = set(expected)
    results = [r.known_as(people) for r in finished(out) if r.entities in names]
    journal, missing, notes = Journal(out), dict[str, str](), list[str]()
    if not results:
        tried = (journal.read(entities) for entities in expected)
        whys = sorted({_why_missing(last) for last in tried if last and last.message})
        raise MissingInputError(
            "; ".join((f"{out} holds no finished result of these scans", *whys[:3])),
            "see the participant level" if whys else "run the participant level first",
        )
    parcellation = Counter(result.parcellation for result in results).most_common(1)[0][0]
    ranges = load_ranges(parcellation)
    judged, rows, sound = dict[str, Judgement](), list[dict[str, Any]](), list[Finished]()
    parcels = dict[str, tuple[str, tuple[Row, ...]]]()
    for result in results:
        if result.parcellation != parcellation:
            other = result.parcellation.name
            missing[result.entities] = f"its labels are of {other}, not of {parcellation.name}"
            continue
        try:
            lines = result.rows()
            by_age = ranges_of(out, result.provenance.ranges, parcellation)
            quality = read_mask_quality(result)
            judgement = judge(result, lines, quality, parcellation, ranges, by_age)
            found = row(result, lines, parcellation) | columns(judgement)
            rows.append(found | _percentiles(judgement, parcellation))
            judged[result.entities] = judgement
            sound.append(result)
        except Exception as error:  # one bad result must not cost the others their table
            missing[result.entities] = f"its result cannot be read ({in_a_line(error)})"
    if not sound:
        raise DataError(f"no result of {out} is readable", "; ".join(missing.values()))
    ready = {result.entities for result in results}
    for entities in expected:
        if entities not in ready:
            missing[entities] = _why_missing(journal.read(entities))
    for result in sound:
        if finer := result.finer:
            try:
                parcels[result.entities] = finer.name, tuple(read_rows(finer.morph))
            except (CadiffError, OSError) as error:
                notes.append(f"{result.entities} is not among {finer.name} ({in_a_line(error)})")
        if why := journal.failed_since(result.entities, result.sidecar):
            notes.append(f"{result.entities} has an earlier result, its last run failed: {why}")
    if (ways := count_ways(sound)) > 1:
        notes.append(f"results were made in {ways} different ways: see column fingerprint")
    far = outliers(judged, ranges)
    for one in rows:
        one["outlier"] = "; ".join(far.get(one["scan"], ())) or None
    path = out / GROUP_TABLE
    return Group(path, parcellation, tuple(rows), judged, missing, tuple(notes), parcels)


def write_finer(out: Path, group: Group) -> list[Path]:
    """Write ``group_seg-NAME_morph.tsv`` with its JSON for every finer parcellation of the group.

    It has a row for each scan of the group table that has one.  Tables of an earlier group of which
    no scan is left are removed.
    """
    paths = []
    for name in sorted({name for name, _ in group.parcels.values()}):
        parcellation = load_parcellation(name)
        rows = [
            {"scan": scan, **_identity(scan)} | {column(line.name): _mm3(line) for line in lines}
            for scan, (of, lines) in sorted(group.parcels.items())
            if of == name
        ]
        header = ("scan", *ENTITIES, *(column(s.name) for s in parcellation.structures))
        paths.append(out / f"group_seg-{name}_morph.tsv")
        write_tsv(paths[-1], header, ([row.get(key) for key in header] for row in rows))
        described = {key: text for key, text in _columns(parcellation).items() if key in header}
        write_json(paths[-1].with_suffix(".json"), described)
    ours = {out / f"group_seg-{name}_morph.tsv" for name in shipped_names()}
    for path in ours - set(paths):
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    return paths


def _why_missing(last: Outcome | None) -> str:
    if last is not None and last.status == "done":
        return "its sidecar is gone, or cannot be read"
    if last is None or not last.message:
        return "not run yet"
    return f"unsuitable: {last.message}" if last.status == "unsuitable" else last.message


def write_group(out: Path, expected: Sequence[str], people: People = NOBODY) -> Group:
    """Write ``group_morph.tsv`` with its JSON; list missing scans in ``group_missing.tsv``."""
    group = collect(out, expected, people)
    parcellation = group.parcellation
    volumes = [column(s.name) for s in parcellation.structures] + [column(n) for n in TOTALS]
    of_people = _of_percentiles(parcellation)
    # The skull is known of no scan, or of some: n/a in all rows would only be in the way.
    known = any(one[column(INTRACRANIAL)] for one in group.rows)
    shares = _of_skull(parcellation) if known else {}
    header = ("scan", *SCAN, *ENTITIES, *SUFFIX, *volumes, *shares, *of_people, *QUALITY)
    write_tsv(group.path, header, ([one[name] for name in header] for one in group.rows))
    described = _columns(parcellation)
    write_json(group.path.with_suffix(".json"), {name: described[name] for name in header})
    missing_path = out / MISSING
    if group.missing:
        write_tsv(missing_path, ("scan", "reason"), group.missing.items())
    else:
        missing_path.unlink(missing_ok=True)
    write_finer(out, group)
    return group


def count_ways(results: Sequence[Finished]) -> int:
    """In how many ways results were made; a user's mask is no other setting."""
    return len({r.provenance.way for r in results if not r.provenance.has_own_mask})


def known_scans(out: Path) -> list[str]:
    """All scans of an output folder: finished, tried, or missing from the last group table."""
    return sorted(tried_scans(out) | {result.entities for result in finished(out)})


def tried_scans(out: Path) -> set[str]:
    """Scans of an output folder that were tried, or were missing from the last group table."""
    return _lacking(out) | Journal(out).scans()


def _lacking(out: Path) -> set[str]:
    """Scans that the last group table named as missing."""
    try:
        return {line["scan"] for line in read_tsv(out / MISSING)}
    except (OSError, ValueError, KeyError):
        return set()


def row(result: Finished, lines: Sequence[Row], parcellation: Parcellation) -> dict[str, Any]:
    """Column -> value of a scan, from its sidecar and its volume table's ``lines``; None if absent.

    Raises ``DataError`` if its sidecar lacks a value.
    """
    provenance = result.provenance
    provenance.check()
    source = stem(Path(provenance.source))
    return {
        "scan": result.entities,
        "bids_name": source or None,
        **_identity(result.entities),
        "suffix": next((x for x in SUFFIXES if source.endswith(f"_{x}")), None),
        **dict.fromkeys(map(column, (*SUMS, INTRACRANIAL))),
        **{column(line.name): _mm3(line) for line in lines},
        **dict.fromkeys(_of_skull(parcellation)),
        **_shares(lines),
        "registration_score": provenance.registration_score,
        "registration": "+".join(dict.fromkeys(used.registration for used in provenance.templates)),
        "template": "+".join(used.name for used in provenance.templates),
        "skull_stripping": provenance.skull_stripping,
        "n_warnings": len(provenance.notes),
        "seconds": round(sum(provenance.seconds.values()), 1),
        "version": provenance.version,
        "fingerprint": provenance.fingerprint,
    }


def _identity(entities: str) -> dict[str, str | None]:
    """The columns that identify a scan."""
    parts = dict(part.split("-", 1) for part in entities.split("_"))
    # BIDS tables keep the prefix of these two.
    whole = {
        name: f"{key}-{parts[key]}"
        for name, key in (("participant_id", "sub"), ("session_id", "ses"))
        if key in parts
    }
    return {name: whole.get(name, parts.get(key)) for name, (key, _) in ENTITIES.items()}


def _of_skull(parcellation: Parcellation) -> dict[str, str]:
    """Column -> whose share of the intracranial volume it is."""
    names = [*(s.name for s in parcellation.structures), *TOTALS]
    return {f"{column(name)}_percent_intracranial": name for name in names if name != INTRACRANIAL}


def _shares(lines: Sequence[Row]) -> dict[str, str]:
    """Cells of the columns ``_of_skull``; none where the intracranial volume is not known."""
    held = next((line.mm3 for line in lines if line.name == INTRACRANIAL), None)
    return {
        f"{column(line.name)}_percent_intracranial": f"{100 * line.mm3 / held:.3f}"
        for line in lines
        if held and line.mm3 is not None and line.name != INTRACRANIAL
    }


def _mm3(line: Row) -> str | None:
    """A volume as it stands in a table."""
    return None if line.mm3 is None else f"{line.mm3:.3f}"


def _columns(parcellation: Parcellation) -> dict[str, dict[str, Any]]:
    """The description of every column."""
    return {
        "scan": {"Description": "Entities of the scan; its files begin with them"},
        **{name: {"Description": text} for name, text in SCAN.items()},
        **{name: {"Description": text} for name, (_, text) in ENTITIES.items()},
        **{name: {"Description": text} for name, text in SUFFIX.items()},
        **{
            column(s.name): {
                "LongName": s.name,
                "Description": f"Volume of label {s.code} ({s.abbreviation})",
                "Units": "mm3",
            }
            for s in parcellation.structures
        },
        **{
            column(name): {"LongName": name, "Description": text, "Units": "mm3"}
            for name, text in TOTALS.items()
        },
        **{
            name: {"Description": f"{whose}, as a share of the {INTRACRANIAL}", "Units": "%"}
            for name, whose in _of_skull(parcellation).items()
        },
        **{
            name: {"Description": f"{whose}. {PERCENTILE[kind]}", "Units": "%"}
            for name, (whose, kind) in _of_percentiles(parcellation).items()
        },
        **{name: {"Description": text} for name, text in QUALITY.items()},
    }


def _of_percentiles(parcellation: Parcellation) -> dict[str, tuple[str, str]]:
    """Column -> whose percentile it is, and of which kind."""
    names = [*(s.name for s in parcellation.structures if s.is_tissue), *WITH_PERCENTILE]
    return {f"{column(name)}_{kind}": (name, kind) for name in names for kind in PERCENTILE}


def _percentiles(judgement: Judgement, parcellation: Parcellation) -> dict[str, str | None]:
    """The group table's percentiles of a scan; None where there is none."""
    cells = dict.fromkeys(_of_percentiles(parcellation))
    for name in {name for name, _ in _of_percentiles(parcellation).values()}:
        cells |= percentile_cells(judgement.percentiles.get(name), f"{column(name)}_")
    return cells
