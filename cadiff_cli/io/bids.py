"""BIDS names and datasets.  The only module that imports pybids, and only for datasets."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadiff_cli.errors import (
    DataError,
    InvalidDatasetError,
    MissingInputError,
    SelectionError,
    UsageError,
)
from cadiff_cli.io.label_maps import load_classes
from cadiff_cli.io.nifti import load_scan, stem
from cadiff_cli.products import Scan
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.spatial.resample import check_same_grid

if TYPE_CHECKING:
    from bids.layout import BIDSLayout

    from cadiff_cli.labels import LabelTable

log = logging.getLogger(__name__)

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
class Selection:
    """Which scans of a dataset are wanted; empty means all.

    ``filters`` are pybids entities of the T1w images (see ``read_filters``).
    """

    participants: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    filters: Mapping[str, Any] | None = None


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
            found = json.loads(path.read_text(encoding="utf-8"))
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

    def t1w(
        self, selection: Selection = Selection(), database: Path | None = None
    ) -> tuple[list[Path], list[Path]]:
        """The selected T1w images, sorted, and files that seem to be T1w but have no BIDS name.

        ``database`` is a folder for pybids' index, written once and then believed.  Raises
        ``SelectionError``, which names participants that are not there.
        """
        from bids.layout import BIDSLayout, BIDSLayoutIndexer

        self.require(selection.participants)
        chosen = selection.participants or self.participants()
        # Only what can hold the selected images is walked through: seconds, not minutes.
        labels = "[^/]+" if database else f"({'|'.join(map(re.escape, chosen))})"
        wanted = rf"^/(sub-{labels}(/ses-[^/]+)?(/anat(/[^/]*)?)?|dataset_description\.json)$"
        indexer = BIDSLayoutIndexer(
            validate=True, index_metadata=False, ignore=[re.compile(f"(?!{wanted})^/.")]
        )

        def layout_at(folder: Path | None) -> "BIDSLayout":
            return BIDSLayout(self.root, database_path=folder, indexer=indexer)

        layout = layout_at(None) if database is None else _kept_index(layout_at, database)
        if not Path(layout.root).samefile(self.root):
            raise DataError(
                f"--bids-database-dir {database} is the index of {layout.root}, not of {self.root}",
                "give each dataset a folder of its own",
            )

        def here(names: Iterable[str]) -> list[Path]:
            """An index may know the dataset under another mount."""
            return sorted(self.root / Path(name).relative_to(layout.root) for name in names)

        t1w: dict[str, Any] = {"suffix": "T1w", "extension": [".nii", ".nii.gz"]}
        query = {**(selection.filters or {}), **t1w, "return_type": "filename"}
        if selection.participants:
            query["subject"] = list(selection.participants)
        if selection.sessions:
            query["session"] = list(selection.sessions)
            present = {path.name.removeprefix("ses-") for path in self.root.glob("sub-*/ses-*")}
            if absent := sorted(set(selection.sessions) - present):
                raise SelectionError(
                    f"{self.root} has no {', '.join(f'ses-{label}' for label in absent)}",
                    f"its sessions are {_some(sorted(present))}" if present else "it has none",
                )
        try:
            found = here(layout.get(**query))
        except ValueError as error:
            raise UsageError(f"--bids-filter-file: {error}", "use BIDS entities") from error
        known = set(here(layout.get(**t1w, return_type="filename")))
        seen = [
            path
            for label in chosen
            for path in sorted((self.root / f"sub-{label}").glob("**/anat/*T1w*.nii*"))
        ]
        unnamed = [path for path in seen if path not in known]
        if not found:
            others = (
                f"; {unnamed[0].name} is no raw BIDS name (desc-, space-...)" if unnamed else ""
            )
            raise SelectionError(
                f"no T1w image of {self.root} fits{others}",
                "check --participant-label, --session-label and --bids-filter-file; segment other"
                " files one by one with cadiff-seg",
            )
        return found, sorted(unnamed)

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


def read_filters(path: Path) -> dict[str, Any]:
    """The ``t1w`` part of a ``--bids-filter-file``, as fMRIPrep reads it.

    ``null`` asks for the entity's absence, ``"*"`` for any value of it.
    """
    from bids.layout import Query

    if not path.is_file():
        raise MissingInputError(f"no such file: {path}", "check --bids-filter-file")
    try:
        filters = json.loads(path.read_text(encoding="utf-8"))["t1w"]
        special = {None: Query.NONE, "*": Query.ANY}
        for key, value in filters.items():
            if isinstance(value, dict):
                raise TypeError(f"{key} is {value}")
        return {
            key: value if isinstance(value, list) else special.get(value, value)
            for key, value in filters.items()
        }
    except KeyError as error:
        raise UsageError(
            f"{path} says nothing of t1w", 'write {"t1w": {}} if every T1w image is wanted'
        ) from error
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(
            f"{path} is not a filter file ({error})", 'write {"t1w": {"acquisition": "mprage"}}'
        ) from error


def labels(words: Sequence[str], prefix: str) -> tuple[str, ...]:
    """Labels without their prefix, each once; a word that names a file stands for its lines.

    Raises ``UsageError`` for a file without a label: to ask for nobody is not to ask for all.
    """
    found: list[str] = []
    for word in words:
        path = Path(word)
        lines = [word]
        if not _is_label(word) and path.is_file():
            try:
                lines = path.read_text(encoding="utf-8").split()
            except (OSError, ValueError) as error:
                raise UsageError(f"{path} is not a list ({error})", "one label a line") from error
            if not lines:
                raise UsageError(f"{path} names nobody", f"one label a line, as {prefix}01")
        found.extend(line.removeprefix(prefix) for line in lines)
    return tuple(dict.fromkeys(found))


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


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _is_label(text: str) -> bool:
    return bool(text) and text.isascii() and text.replace("+", "").isalnum()
