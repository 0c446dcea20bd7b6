"""A raw dataset: its description, participants and errors."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cadiff_cli.errors import (
    InvalidDatasetError,
    MissingInputError,
    SelectionError,
    first_few,
    plural,
)
from cadiff_cli.io.bids.people import People, read_people
from cadiff_cli.io.files import folders_in
from cadiff_cli.text import read_text

log = logging.getLogger(__name__)

LINK_KINDS = ("https://doi.org/", "urn:x-bids:")
"""Beginnings of links that name a dataset; other links are relative paths, or the user's own."""


@dataclass(frozen=True)
class Dataset:
    """A raw BIDS dataset."""

    root: Path

    @cached_property
    def description(self) -> dict[str, Any]:
        """``dataset_description.json``; raises ``InvalidDatasetError`` if it is invalid."""
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
            values = json.loads(read_text(path))
        except (ValueError, OSError) as error:
            raise InvalidDatasetError(
                f"{path} is not readable JSON ({error})", "correct it: it holds one JSON object"
            ) from error
        missing = {"Name", "BIDSVersion"} - set(values if isinstance(values, dict) else ())
        if missing:
            raise InvalidDatasetError(
                f"{path} lacks {', '.join(sorted(missing))}",
                'add it, such as {"Name": "my study", "BIDSVersion": "1.10.0"}',
            )
        return dict(values)

    def participants(self) -> list[str]:
        """Labels of the ``sub-`` folders."""
        return [name[4:] for name in folders_in(self.root, "sub-")]

    @cached_property
    def people(self) -> People:
        """Ages and sexes of ``participants.tsv``, and ages of sessions."""
        return read_people(self.root)

    def sessions(self) -> list[str]:
        """Labels of the ``ses-`` folders of all participants."""
        people = (self.root / f"sub-{label}" for label in self.participants())
        return sorted({name[4:] for person in people for name in folders_in(person, "ses-")})

    def require(self, participants: Sequence[str], sessions: Sequence[str] = ()) -> None:
        """Raise ``SelectionError`` for participants or sessions that the dataset does not have."""
        present = self.participants()
        if absent := sorted(set(participants) - set(present)):
            raise SelectionError(
                f"{self.root} has no {', '.join(f'sub-{label}' for label in absent)}",
                f"it has {plural(len(present), 'participant')} ({first_few(present)}); in a"
                " container, is the folder bound?",
            )
        if not sessions:
            return
        present = self.sessions()
        if absent := sorted(set(sessions) - set(present)):
            raise SelectionError(
                f"{self.root} has no {', '.join(f'ses-{label}' for label in absent)}",
                f"its sessions are {first_few(present)}" if present else "it has none",
            )

    def uri(self, path: Path) -> str:
        """The BIDS URI by which derivatives cite one of the dataset's files."""
        return f"bids:raw:{path.relative_to(self.root).as_posix()}"

    def violations(self) -> list[str]:
        """Errors that the official validator finds, one line each; none if it is not installed.

        Errors of ``dataset_description.json`` raise ``InvalidDatasetError``.  The caller reports
        the others: files with wrong names are never selected, and a damaged scan must not stop the
        other ones.
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
            parts = (place, issue["code"], issue.get("subCode"), issue.get("issueMessage"))
            line = " ".join(" ".join(filter(None, parts)).split())
            if place == "/dataset_description.json":
                raise InvalidDatasetError(f"invalid dataset: {line}", "correct the file")
            lines.append(line)
        return lines

    def link(self, out: Path) -> str:
        """Link from a derivative dataset at ``out`` to this one, without absolute paths.

        A relative path if ``out`` is beside the dataset or in it, else the dataset's DOI, else its
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
        match = re.search(r"10\.\d+/\S+", str(self.description.get("DatasetDOI", "")))
        return match.group() if match else None
