"""Where one scan's results lie, and which of them are complete.

The label map's sidecar is written last: where it exists, everything else does.
"""

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cadiff_cli.errors import DataError, OutputError, first_few
from cadiff_cli.io.bids.description import refuse_foreign
from cadiff_cli.io.bids.index import anat_folders
from cadiff_cli.io.bids.names import (
    DSEG,
    FINER_MORPH,
    LABEL_MAP,
    MORPH,
    OURS,
    TOTALS_MORPH,
    source_entities,
)
from cadiff_cli.io.bids.people import People
from cadiff_cli.io.bids.tables import is_ours, parcellation_of
from cadiff_cli.io.files import check_writable, folders_in, is_among, names_in, read_json
from cadiff_cli.io.provenance import Provenance
from cadiff_cli.io.volumes import INTRACRANIAL, SUMS, TOTALS, Row, read_rows
from cadiff_cli.labels.parcellation import Parcellation, load_parcellation
from cadiff_cli.products import Person

MAX_STEM_BYTES = 160
"""Longest name of a scan: file systems allow 255, results and temporary files add to it."""


BEGUN = re.compile(rf"{OURS.pattern}\.[a-z0-9_]{{8}}\..+")
"""Temporary files of output names (``files.replacing``)."""


class Derivatives:
    """Where one scan's results go: ``out/sub-X[/ses-Y]/anat/sub-X..._<suffix>``."""

    def __init__(self, out: Path, source: Path) -> None:
        self.out = out
        self.stem = source_entities(source)
        folders = [p for p in self.stem.split("_") if p.startswith(("sub-", "ses-"))]
        self.folder = out.joinpath(*folders, "anat")

    def path(self, suffix: str) -> Path:
        """``suffix`` is what follows the source's entities, such as ``desc-brain_mask.nii.gz``."""
        return self.folder / f"{self.stem}_{suffix}"

    def uri(self, suffix: str) -> str:
        """The same file as a BIDS URI within this dataset."""
        return f"bids::{self.path(suffix).relative_to(self.out).as_posix()}"

    @property
    def sidecars(self) -> list[Path]:
        """Sidecars of label maps, each written last of its result: everything else is there."""
        begun = f"{self.stem}_seg-"
        named = (path for path in self.existing() if path.name.startswith(begun))
        return [path for path in named if path.suffix == ".json" and LABEL_MAP.search(path.name)]

    def existing(self) -> list[Path]:
        """Files that are there already under names that a run may write."""
        return [*self._found(OURS)]

    def check_free(self, *inputs: Path | None, overwrite: bool) -> None:
        """Make sure that results can be written, and that nothing is lost by it.

        Refuses the dataset of another program (``refuse_foreign``), existing results unless
        ``overwrite`` is set, and to overwrite the run's ``inputs``.  Raises ``OutputError`` or
        ``DiskError``.
        """
        for parent in (self.out, *self.out.parents):
            if parent.exists():
                if not parent.is_dir():
                    raise OutputError(f"{parent} is a file", "give another output folder")
                break
        if len(os.fsencode(self.stem)) > MAX_STEM_BYTES:
            raise OutputError(
                f"the name {self.stem} is too long for those of its results",
                f"at most {MAX_STEM_BYTES} bytes: rename the scan",
            )
        refuse_foreign(self.out)
        for path in self.existing():
            if is_among(path, inputs):
                raise OutputError(
                    f"{path} is an input and would be overwritten", "choose another output folder"
                )
            if not overwrite and not path.exists():
                raise OutputError(
                    f"{path} is a link to a file that is absent",
                    "fetch it (datalad get), use --overwrite, or another output folder",
                )
            if not overwrite:
                raise OutputError(
                    f"{path} is there already", "use --overwrite, or another output folder"
                )
        for folder in (self.out / "logs", self.folder):
            check_writable(folder)

    def clear(self, keep: Collection[Path] = ()) -> None:
        """Remove an earlier run's results except ``keep``, and first the sidecar that vouches.

        Also removes temporary files of a killed run: the caller holds the scan's lock.
        """
        for path in (*self.sidecars, *self.existing()):
            if path not in keep:
                path.unlink(missing_ok=True)
        for path in self._found(BEGUN, "."):
            path.unlink(missing_ok=True)

    def _found(self, names: re.Pattern[str], begun: str = "") -> Iterator[Path]:
        """Files of ours, sorted, of which ``names`` matches what follows the scan's entities."""
        begun += f"{self.stem}_"
        for name in names_in(self.folder):
            path = self.folder / name
            fits = name.startswith(begun) and names.fullmatch(name, len(begun))
            if fits and is_ours(self.out, path):
                yield path


@dataclass(frozen=True)
class Finer:
    """Files of a result in a finer parcellation, called ``name``: labels and table of volumes."""

    name: str
    dseg: Path
    morph: Path

    @property
    def parcellation(self) -> Parcellation:
        """What they are of."""
        return load_parcellation(self.name)


@dataclass(frozen=True)
class Finished:
    """A complete result in an output folder: its ``entities`` (``sub-01_ses-a``), what made it.

    ``sidecar`` is the file that holds the ``provenance``.
    """

    entities: str
    sidecar: Path
    provenance: Provenance

    def known_as(self, people: People) -> "Finished":
        """The same result with the age and sex that ``people`` know now, where they do."""
        return self.of(people.of_scan(self.entities))

    def of(self, now: Person) -> "Finished":
        """The same result with the age and sex that are known of the person now, where they are."""
        then = self.provenance.person
        age = then.age_years if now.age_years is None else now.age_years
        person = Person(age, now.sex or then.sex)
        return replace(self, provenance=replace(self.provenance, person=person))

    @property
    def morph(self) -> Path:
        """The table of its structures' volumes."""
        return self.sidecar.with_name(f"{self.entities}_{MORPH}.tsv")

    def rows(self) -> tuple[Row, ...]:
        """Its volumes: structures, then totals.  Raises ``DataError``, also where some are not."""
        totals = self.sidecar.with_name(f"{self.entities}_{TOTALS_MORPH}.tsv")
        rows = read_rows(self.morph, totals)
        # Up to revision 8 there were no sums; a stripped scan does not show the skull.
        names = {*(s.name for s in self.parcellation.structures), *TOTALS} - {*SUMS, INTRACRANIAL}
        if lacking := sorted(names - {row.name for row in rows}):
            raise DataError(
                f"{self.morph.name} lacks {first_few(lacking, 3)}",
                "delete it and run the participant level again",
            )
        return rows

    @property
    def parcellation(self) -> Parcellation:
        """What its label map and its table of volumes are of."""
        return parcellation_of(self.sidecar)

    @property
    def finer(self) -> "Finer | None":
        """Its label map and its volumes in a finer parcellation, if it was made with one."""
        if not (name := self.provenance.finer):
            return None
        return Finer(name, *map(self.sidecar.with_name, _finer_names(self.entities, name)))


@dataclass(frozen=True)
class Candidate:
    """A sidecar that vouches for a result of the scan ``entities``, as it is written last.

    ``beside`` are the names of all files in its folder.
    """

    entities: str
    path: Path
    beside: Collection[str]

    def is_whole(self, finer: str) -> bool:
        """Whether labels and volumes are there, also those of the parcellation ``finer`` if any.

        A link to nothing is a file that git-annex has dropped, not one that was deleted.
        """
        made = [f"{self.path.stem}.nii.gz", f"{self.entities}_{MORPH}.tsv"]
        if "_desc-" in self.path.name:  # up to revision 8 one table held the totals too
            made.append(f"{self.entities}_{TOTALS_MORPH}.tsv")
        if finer:
            made += _finer_names(self.entities, finer)
        return all(name in self.beside for name in made)

    def result(self) -> Finished | None:
        """The result that it vouches for, if its labels and volumes are there."""
        provenance = Provenance.read(read_json(self.path) or {})
        if provenance is None or not self.is_whole(provenance.finer):
            return None
        return Finished(self.entities, self.path, provenance)


def _finer_names(entities: str, name: str) -> tuple[str, str]:
    """Names of the label map and of the table of volumes in the finer parcellation ``name``."""
    return f"{entities}_{DSEG.format(name)}.nii.gz", f"{entities}_{FINER_MORPH.format(name)}.tsv"


def finished_result(place: Derivatives) -> Finished | None:
    """The complete result at ``place``, if there is one.

    Its sidecar, written last, vouches for the rest; labels and volumes that somebody has deleted
    since make it incomplete.
    """
    beside = {*names_in(place.folder)}
    results = (Candidate(place.stem, path, beside).result() for path in place.sidecars)
    return next(filter(None, results), None)


def finished(out: Path) -> Iterator[Finished]:
    """Every complete result below ``out``, sorted by path."""
    last = None
    for candidate in candidates(out):
        if candidate.entities != last and (result := candidate.result()):
            last = candidate.entities
            yield result


def candidates(out: Path) -> Iterator[Candidate]:
    """Every sidecar below ``out`` that may vouch for a result, sorted by path."""
    for subject in folders_in(out, "sub-"):
        for folder in anat_folders(out / subject):
            beside = {*names_in(folder)}
            sidecars = (name for name in beside if name.endswith("_dseg.json"))
            for name in sorted(x for x in sidecars if LABEL_MAP.search(x) and "_space-" not in x):
                place = Derivatives(out, Path(LABEL_MAP.sub("_T1w", name)))
                path = folder / name
                if place.folder == folder and is_ours(out, path):
                    yield Candidate(place.stem, path, beside)
