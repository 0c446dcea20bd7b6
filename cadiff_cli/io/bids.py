"""BIDS names and datasets.  The only module that imports pybids, and only for datasets."""

import csv
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadiff_cli.errors import (
    DataError,
    InvalidDatasetError,
    MissingInputError,
    SelectionError,
)
from cadiff_cli.io.files import read_json, read_text
from cadiff_cli.io.formats import stem
from cadiff_cli.io.images import load_scan
from cadiff_cli.io.label_maps import load_classes
from cadiff_cli.io.selection import EVERYTHING, MAGNITUDE, TAKEN, UNIT1, Selection
from cadiff_cli.products import Scan
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.spatial.resample import check_same_grid

if TYPE_CHECKING:
    from bids.layout import BIDSLayout

    from cadiff_cli.labels import LabelTable

log = logging.getLogger(__name__)

OLDEST_YEARS = 120
"""Larger ages stand for a missing one, as 999."""
LINK_KINDS = ("https://doi.org/", "urn:x-bids:")
"""How links to datasets begin that name them; others are relative paths, or the user's own."""


@dataclass(frozen=True)
class LabelledScan:
    """A T1w image, its manual segmentation and whose brain it is."""

    name: str
    subject: str
    t1: Path
    dseg: Path


def source_entities(path: Path) -> str:
    """The name's entities without its suffix: ``sub-01_ses-a_desc-brain_T1w`` -> ``sub-01_ses-a``.

    Derivative entities (``desc``, ``space``) are dropped, as ours take their place.  A name that is
    not BIDS becomes a subject label of letters and digits: ``my scan.nii`` -> ``sub-myscan``.
    """
    name = stem(path)
    parts = name.split("_")
    if parts[0].startswith("sub-") and all("-" in p for p in parts[:-1]):
        entities = parts if "-" in parts[-1] else parts[:-1]
        kept = [p for p in entities if p.split("-", 1)[0] not in ("desc", "space", "res")]
        if all(_is_label(p.split("-", 1)[1]) for p in kept):
            return "_".join(kept)
    label = "".join(c for c in name if c.isalnum() and c.isascii())
    return f"sub-{label or 'unnamed'}"


def labelled_scans(dataset: Path) -> list[LabelledScan]:
    """Every T1w of a BIDS-like folder that has a dseg of the same sub, ses, acq and run.

    Images with a ``space-`` are passed over; what is left without a partner is logged.  Raises
    ``DataError`` where which image belongs to which cannot be told.
    """
    if not dataset.is_dir():
        raise MissingInputError(
            f"no dataset at {dataset}", "give a BIDS-like folder of T1w and dseg"
        )
    from bids.layout import parse_file_entities

    def by_scan(suffix: str) -> dict[tuple[str, ...], Path]:
        found: dict[tuple[str, ...], Path] = {}
        for path in sorted(dataset.glob(f"sub-*/**/[!.]*_{suffix}.nii*")):
            # The folders above may have names like sub-study; pybids wants a slash before a key.
            within = f"/{path.relative_to(dataset).as_posix()}"
            entities = parse_file_entities(within, config=["bids", "derivatives"])
            if "space" in entities:
                continue
            scan = ("subject", "session", "acquisition")
            run = str(entities.get("run", ""))
            key = (*(str(entities.get(k, "")) for k in scan), str(int(run)) if run else "")
            if key in found:
                both = f"{found[key].name}, {path.name}"
                raise DataError(
                    f"{dataset} has two {suffix} images of one scan: {both}",
                    "leave one of them, or link those to learn from into a folder of their own",
                )
            found[key] = path
        return found

    images, segmentations = by_scan("T1w"), by_scan("dseg")
    pairs = [
        LabelledScan(source_entities(path), key[0], path, segmentations[key])
        for key, path in images.items()
        if key in segmentations
    ]
    if not pairs:
        raise DataError(
            f"{dataset} has {len(images)} T1w and {len(segmentations)} dseg images, no pairs",
            "name them sub-X[_ses-Y]_T1w.nii.gz and sub-X[_ses-Y]_dseg.nii.gz",
        )
    for one, other, suffix in ((images, segmentations, "dseg"), (segmentations, images, "T1w")):
        if alone := [path.name for key, path in one.items() if key not in other]:
            log.warning(
                "left out, having no %s of the same sub, ses, acq and run: %s",
                suffix,
                ", ".join(alone),
            )
    return pairs


def load_labelled(
    scan: LabelledScan, table: "LabelTable", mapping: Mapping[int, int]
) -> tuple[Scan, Volume]:
    """A scan and its labels as classes (X, Y, Z) uint8, on one grid.

    Raises ``DataError`` where the grids differ, and what ``load_classes`` raises.
    """
    loaded = load_scan(scan.t1)
    classes, grid = load_classes(scan.dseg, table, mapping, option="--labels"), loaded.t1.grid
    check_same_grid(scan.dseg.name, classes.grid, scan.t1.name, grid)
    return loaded, Volume(classes.data, grid)


@dataclass(frozen=True)
class Selected:
    """The chosen images of a dataset, sorted, and what a user should know of the choice."""

    images: tuple[Path, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """A raw BIDS dataset."""

    root: Path

    @cached_property
    def description(self) -> dict[str, Any]:
        """``dataset_description.json``; raises ``InvalidDatasetError`` unless it is one."""
        if not self.root.is_dir():
            raise MissingInputError(
                f"no dataset at {self.root}",
                "check the path; in a container, bind the folder that holds it",
            )
        path = self.root / "dataset_description.json"
        if not path.is_file():
            raise InvalidDatasetError(
                f"{self.root} has no dataset_description.json", "give the root of a BIDS dataset"
            )
        try:
            found = json.loads(read_text(path))
        except (ValueError, OSError) as error:
            raise InvalidDatasetError(
                f"{path} is not readable JSON ({error})", "mend it"
            ) from error
        missing = {"Name", "BIDSVersion"} - set(found if isinstance(found, dict) else ())
        if missing:
            raise InvalidDatasetError(f"{path} lacks {', '.join(sorted(missing))}", "add it")
        return dict(found)

    def participants(self) -> list[str]:
        """Labels of the ``sub-`` folders."""
        found = (path.name[4:] for path in self.root.glob("sub-*") if path.is_dir())
        return sorted(found)

    @cached_property
    def ages(self) -> dict[str, float]:
        """Age in years by participant label, where ``participants.tsv`` tells one and only one.

        BIDS counts in years unless the column's ``Units`` say otherwise; the oldest may be ``89+``.
        """
        told = (read_json(self.root / "participants.json") or {}).get("age", {})
        units = told.get("Units", "years") if isinstance(told, dict) else "years"
        if str(units).lower() not in ("year", "years", "yr", "y", "a"):
            return {}
        try:
            lines = read_text(self.root / "participants.tsv").splitlines()
        except (OSError, ValueError):
            return {}
        found: dict[str, set[float]] = {}
        for line in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            number = re.fullmatch(r"(\d+(\.\d+)?)\+?", str(line.get("age")).strip())
            if number and float(number[1]) <= OLDEST_YEARS:
                label = str(line.get("participant_id")).removeprefix("sub-")
                found.setdefault(label, set()).add(float(number[1]))
        return {label: ages.pop() for label, ages in found.items() if len(ages) == 1}

    def sessions(self) -> list[str]:
        """Labels of the ``ses-`` folders of all participants."""
        return sorted({path.name[4:] for path in self.root.glob("sub-*/ses-*") if path.is_dir()})

    def require(self, labels: Sequence[str]) -> None:
        """Raise ``SelectionError`` for participants that the dataset does not have."""
        present = self.participants()
        if absent := sorted(set(labels) - set(present)):
            raise SelectionError(
                f"{self.root} has no {', '.join(f'sub-{label}' for label in absent)}",
                f"its {len(present)} participants are {_some(present)}; in a container, is the"
                " folder bound?",
            )

    def uri(self, path: Path) -> str:
        """The BIDS URI of one of the dataset's files, as derivatives cite it."""
        return f"bids:raw:{path.relative_to(self.root).as_posix()}"

    def violations(self) -> list[str]:
        """What the official validator calls errors, one line each; empty where it is not installed.

        Errors of ``dataset_description.json`` raise ``InvalidDatasetError``.  Those of other files
        are the caller's to report: files with wrong names are never selected, and a damaged scan
        must not stop the others.
        """
        beside = Path(sys.executable).with_name("bids-validator-deno")
        program = str(beside) if beside.exists() else shutil.which("bids-validator-deno")
        if program is None:
            log.info("bids-validator-deno is not installed: the dataset is not validated")
            return []
        options = ["--format", "json", "--ignoreWarnings", "--ignoreNiftiHeaders"]
        done = subprocess.run(
            [program, *options, str(self.root)], capture_output=True, text=True, check=False
        )
        try:
            issues = json.loads(done.stdout)["issues"]["issues"]
        except (ValueError, KeyError, TypeError):
            log.warning("bids-validator-deno failed: %s", done.stderr.strip()[-300:])
            return []
        lines = []
        for issue in issues:
            if issue.get("severity") != "error":
                continue
            place = str(issue.get("location", ""))
            said = (place, issue["code"], issue.get("subCode"), issue.get("issueMessage"))
            line = " ".join(" ".join(filter(None, said)).split())
            if place == "/dataset_description.json":
                raise InvalidDatasetError(f"invalid dataset: {line}", "mend the file")
            lines.append(line)
        return lines

    def select(self, selection: Selection = EVERYTHING, database: Path | None = None) -> Selected:
        """The images that are wanted, and notes on what is left out or may surprise.

        Images that are no magnitude (``part``) or that ``.bidsignore`` names are left out.
        ``database`` is a folder for pybids' index, written once and then believed.  Raises
        ``SelectionError``, which names participants that are not there.
        """
        self.require(selection.participants)
        self._require_sessions(selection.sessions)
        chosen = selection.participants or self.participants()
        selection.check([*_entities()])
        named = self._anatomy(chosen, database)
        is_ignored = self._ignored()

        fitting = [path for path, found in named.items() if selection.fits(found)]
        ignored = [path for path in fitting if is_ignored(path)]
        others = [path for path in fitting if named[path].get("part") not in MAGNITUDE]
        images = {p: named[p] for p in fitting if p not in {*ignored, *others}}
        odd = [
            path
            for label in chosen
            for path in sorted((self.root / f"sub-{label}").glob("**/anat/[!.]*.nii*"))
            if any(x in path.name for x in selection.suffixes)
            if path not in named and not is_ignored(path)
        ]
        lacking = set(chosen) - {found["subject"] for found in images.values()}
        unit1 = selection.of(UNIT1)
        instead = {
            found["subject"]
            for path, found in named.items()
            if unit1.fits(found) and found["subject"] in lacking and not is_ignored(path)
        }

        what = " or ".join(selection.suffixes)
        why = "has no BIDS name" + (f", or {database} is older" if database else "")
        unnamed = [f"{self._within(path)[1:]} {why}: ignored" for path in odd]
        left_out = [
            *_left_out(what, ignored, "by .bidsignore"),
            *_left_out(what, others, "as no magnitude"),
        ]
        if instead:
            have = "has" if len(instead) == 1 else "have"
            left_out.append(
                f"{_some(sorted(f'sub-{x}' for x in instead))} {have} a UNIT1 (MP2RAGE) image: ask"
                ' for it with a --bids-filter-file of {"t1w": {"suffix": "UNIT1"}}'
            )
        if not images:
            raise SelectionError(
                "; ".join((f"no {what} image of {self.root} fits", *left_out, *unnamed[:1])),
                "check --participant-label, --session-label and --bids-filter-file; segment other"
                " files one by one with cadiff-seg",
            )
        absent = [f"sub-{label} has no {what} image that fits" for label in sorted(lacking)]
        notes = (*unnamed, *absent, *left_out, *_several(images, what))
        return Selected(tuple(sorted(images)), notes)

    def _anatomy(
        self, labels: Collection[str], database: Path | None
    ) -> dict[Path, dict[str, Any]]:
        """Entities of the participants' images that have a BIDS name and may be segmented."""
        from bids.layout import BIDSLayout, BIDSLayoutIndexer, parse_file_entities

        # Only what can hold the selected images is walked through: seconds, not minutes.
        subject = "[^/]+" if database else f"({'|'.join(map(re.escape, labels))})"
        wanted = rf"^/(sub-{subject}(/ses-[^/]+)?(/anat(/[^/]*)?)?|dataset_description\.json)$"
        indexer = BIDSLayoutIndexer(
            validate=True, index_metadata=False, ignore=[re.compile(f"(?!{wanted})^/.")]
        )

        def layout_at(folder: Path | None) -> BIDSLayout:
            # Its description was read before: pybids refuses a byte order mark.
            return BIDSLayout(self.root, database_path=folder, indexer=indexer, validate=False)

        layout = layout_at(None) if database is None else _kept_index(layout_at, database)
        if not Path(layout.root).samefile(self.root):
            raise DataError(
                f"--bids-database-dir {database} is the index of {layout.root}, not of {self.root}",
                "give each dataset a folder of its own",
            )
        # Folders above the dataset may be called sub-study or anat, and pybids believes them too:
        # it is asked for what ends a name only.
        names = layout.get(
            suffix=[*TAKEN["suffix"]], extension=[*TAKEN["extension"]], return_type="filename"
        )
        # An index may know the dataset under another mount, and participants who are not chosen.
        paths = sorted(self.root / Path(name).relative_to(layout.root) for name in names)
        known = [*_entities().values()]
        found = {path: parse_file_entities(self._within(path), entities=known) for path in paths}
        return {path: each for path, each in found.items() if each["subject"] in labels}

    def _within(self, path: Path) -> str:
        """A path as seen from the root; pybids wants a slash before a key."""
        return f"/{path.relative_to(self.root).as_posix()}"

    def _require_sessions(self, labels: Sequence[str]) -> None:
        present = self.sessions()
        if absent := sorted(set(labels) - set(present)):
            raise SelectionError(
                f"{self.root} has no {', '.join(f'ses-{label}' for label in absent)}",
                f"its sessions are {_some(present)}" if present else "it has none",
            )

    def _ignored(self) -> Callable[[Path], bool]:
        """Whether ``.bidsignore``, which is written as a ``.gitignore``, names an image."""
        from pathspec import GitIgnoreSpec

        path = self.root / ".bidsignore"
        try:
            lines = read_text(path).splitlines() if path.is_file() else []
            spec = GitIgnoreSpec.from_lines(lines)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error})", "mend or remove it") from error
        return lambda image: spec.match_file(self._within(image)[1:])

    def link(self, out: Path) -> str:
        """How a derivative dataset at ``out`` may call this one without telling where you live.

        A relative path where the two lie beside or in one another, else the dataset's DOI, else its
        name as a URN.
        """
        root, out = self.root.resolve(), out.resolve()
        if out.is_relative_to(root.parent):
            return Path(os.path.relpath(root, out)).as_posix()
        doi = self.doi
        by_doi, by_name = LINK_KINDS
        return f"{by_doi}{doi}" if doi else f"{by_name}{root.name}"

    @property
    def doi(self) -> str | None:
        """The dataset's bare DOI (``10...``), if it has one."""
        found = re.search(r"10\.\d+/\S+", str(self.description.get("DatasetDOI", "")))
        return found.group() if found else None


INDEX = "layout_index.sqlite"
"""pybids' name for it."""


def _kept_index(layout_at: Callable[[Path | None], "BIDSLayout"], database: Path) -> "BIDSLayout":
    """The index of pybids in a folder; it appears there when it is complete.

    pybids itself writes as it walks, and believes the half of an index that a killed run leaves.
    """
    from sqlalchemy.exc import SQLAlchemyError

    try:
        if (database / INDEX).exists():
            return layout_at(database)
        database.mkdir(parents=True, exist_ok=True)
        layout = layout_at(None)
        with tempfile.TemporaryDirectory(prefix=".cadiff-", dir=database) as folder:
            layout.save(folder, replace_connection=False)
            (Path(folder) / INDEX).replace(database / INDEX)
        return layout
    except FileExistsError as error:
        raise DataError(
            f"--bids-database-dir {database} is a file", "name a folder for the index"
        ) from error
    except SQLAlchemyError as error:
        raise DataError(
            f"{database / INDEX} is not an index ({' '.join(str(error).split())[:200]})",
            "remove this file, or name another folder",
        ) from error


@cache
def _entities() -> dict[str, Any]:
    """All entities that pybids knows, by name."""
    from bids.layout import Config

    return dict(Config.load("bids").entities)


def _left_out(what: str, paths: Collection[Path], why: str) -> list[str]:
    """One note on all images that are left out for one reason, if there are any."""
    plural = "" if len(paths) == 1 else "s"
    names = _some(sorted(path.name for path in paths))
    return [f"{len(paths)} {what} image{plural} left out {why}: {names}"] if paths else []


def _several(images: Mapping[Path, Mapping[str, Any]], suffix: str, shown: int = 5) -> list[str]:
    """Notes on sessions of which more than one image is segmented."""
    by_session: dict[str, set[str]] = {}
    for path, found in images.items():
        session = f" ses-{found['session']}" if "session" in found else ""
        by_session.setdefault(f"sub-{found['subject']}{session}", set()).add(stem(path))
    notes = [
        f"{session} has {len(names)} {suffix} images: {_some(sorted(names))}; all are segmented,"
        " choose with --bids-filter-file"
        for session, names in by_session.items()
        if len(names) > 1
    ]
    more = len(notes) - shown
    return (
        notes
        if more < 1
        else [*notes[:shown], f"{more} more sessions have several {suffix} images"]
    )


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _is_label(text: str) -> bool:
    return bool(text) and text.isascii() and text.replace("+", "").isalnum()
