"""The group level: one table of every finished scan, and who is missing from it."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cadiff_cli.errors import DataError, MissingInputError
from cadiff_cli.io.derivatives import AGGREGATES, Finished, finished
from cadiff_cli.io.text import write_json, write_tsv
from cadiff_cli.labels import LabelTable
from cadiff_cli.runner.journal import Journal

ENTITIES = {
    "participant_id": ("sub", "Participant"),
    "session_id": ("ses", "Session"),
    "acquisition": ("acq", "Acquisition"),
    "run": ("run", "Run"),
}
"""Columns that say which scan a row is of; ``scan`` holds all of its entities."""
QUALITY = {
    "registration_score": "Normalised mutual information of scan and template, 1 to 2",
    "registration": "Kind of registration that was used",
    "template": "Template that the scan was registered to",
    "skull_stripping": "How the brain mask was found",
    "missing_structures": "Number of structures that were not found",
    "n_warnings": "Number of warnings in the scan's sidecar",
    "seconds": "Seconds that the scan took",
    "version": "Version of cadiff",
    "fingerprint": "Changes with settings, weights, template and version",
}


@dataclass(frozen=True)
class Group:
    """What the table holds (``scans``), and for scans without a result, why (``missing``)."""

    path: Path
    scans: tuple[str, ...]
    missing: dict[str, str]
    notes: tuple[str, ...]


def column(name: str) -> str:
    """A structure's column: ``Left-Cerebral-White-Matter`` -> ``left_cerebral_white_matter``."""
    return name.lower().replace("-", "_")


def write_group(out: Path, expected: Sequence[str], table: LabelTable) -> Group:
    """``group_morph.tsv`` with its JSON; expected scans that lack go to ``group_missing.tsv``.

    Raises ``MissingInputError`` if no expected scan is finished.
    """
    results = [result for result in finished(out) if result.entities in set(expected)]
    if not results:
        raise MissingInputError(
            f"{out} holds no finished result of these scans", "run the participant level first"
        )
    ready = {result.entities for result in results}
    journal = Journal(out)
    missing = {}
    for entities in expected:
        if entities not in ready:
            last = journal.read(entities)
            missing[entities] = last.message if last and last.message else "not run yet"
    volumes = [column(s.name) for s in table.structures] + [column(n) for n in AGGREGATES]
    header = ("scan", *ENTITIES, *volumes, *QUALITY)
    path = out / "group_morph.tsv"
    write_tsv(path, header, ([row(result)[name] for name in header] for result in results))
    write_json(path.with_suffix(".json"), _columns(table))
    lacking = out / "group_missing.tsv"
    if missing:
        write_tsv(lacking, ("scan", "reason"), missing.items())
    else:
        lacking.unlink(missing_ok=True)
    recipes = {result.sidecar["Fingerprint"] for result in results}
    notes = (
        [f"results were made in {len(recipes)} different ways: see the column fingerprint"]
        if len(recipes) > 1
        else []
    )
    return Group(path, tuple(sorted(ready)), missing, tuple(notes))


def row(result: Finished) -> dict[str, Any]:
    """One scan as column -> value; None where there is none."""
    parts = dict(part.split("-", 1) for part in result.entities.split("_"))
    # BIDS tables give these two with their prefix.
    whole = {
        name: f"{key}-{parts[key]}"
        for name, key in (("participant_id", "sub"), ("session_id", "ses"))
        if key in parts
    }
    sidecar = result.sidecar
    with result.morph.open(encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream, delimiter="\t"))
    try:
        volumes = {column(line["name"]): line["volume-mm3"] for line in lines}
        counted = [float(line["volume-mm3"]) for line in lines if line["index"] != "n/a"]
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{result.morph} is not a volume table ({error})",
            "delete it and run the participant level again",
        ) from error
    return {
        "scan": result.entities,
        **{name: whole.get(name, parts.get(key)) for name, (key, _) in ENTITIES.items()},
        **volumes,
        "registration_score": sidecar["Template"]["Score"],
        "registration": sidecar["Template"]["Registration"],
        "template": sidecar["Template"]["Name"],
        "skull_stripping": sidecar["SkullStripping"],
        "missing_structures": counted.count(0.0),
        "n_warnings": len(sidecar["Warnings"]),
        "seconds": round(sum(sidecar["Seconds"].values()), 1),
        "version": sidecar["GeneratedBy"][0]["Version"],
        "fingerprint": sidecar["Fingerprint"],
    }


def _columns(table: LabelTable) -> dict[str, dict[str, Any]]:
    """What every column means."""
    return {
        "scan": {"Description": "Entities of the scan; its files begin with them"},
        **{name: {"Description": text} for name, (_, text) in ENTITIES.items()},
        **{
            column(s.name): {
                "LongName": s.name,
                "Description": f"Volume of label {s.code} ({s.abbreviation})",
                "Units": "mm3",
            }
            for s in table.structures
        },
        **{
            column(name): {"LongName": name, "Description": text, "Units": "mm3"}
            for name, text in AGGREGATES.items()
        },
        **{name: {"Description": text} for name, text in QUALITY.items()},
    }
