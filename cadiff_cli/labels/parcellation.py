"""Parcellations: ordered lists of the structures that a network draws.

Networks work with *classes* (0 is background, 1..n in the order of the list); files hold *codes*
(FreeSurfer aseg codes where one exists; 91/92 and 630-632 are Mindboggle's codes for the basal
forebrain and the vermal lobules).  ``Parcellation`` is the only place where the two meet.
"""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from scipy.spatial import KDTree

from cadiff_cli.data import shipped
from cadiff_cli.errors import DataError, MissingInputError, UsageError
from cadiff_cli.text import read_text

BASE = "cadiff40"
"""The parcellation of networks that name none; finer ones name its codes in ``parent``."""
OWN_SEGMENTATION = "cadiff"
"""What ``BASE`` is called in file names; others are called by their names."""
PAPER = "malc27"
"""The subset that the CA-Diff paper scores; other parcellations may name one so, too."""
CSF_TISSUE, NON_BRAIN_TISSUE = 3, 6
"""BIDS' standard tissue classes, column ``mapping`` of a table."""


FREESURFER = {91: 865, 92: 866, 630: 172, 631: 172, 632: 172}
"""Codes of ``BASE`` that are in no table of FreeSurfer -> those that are: left and right basal
forebrain, and one vermis.  ``aseg`` draws neither: it counts the vermis to the cerebellar cortex of
both sides, which no list of codes can do.
"""


class Tissue(IntEnum):
    """What brain mappers call tissue, with BIDS' numbers."""

    GM = 1
    WM = 2
    CSF = 3

    @property
    def in_words(self) -> str:
        """The tissue's full name."""
        return {1: "grey matter", 2: "white matter", 3: "fluid"}[self]


TISSUE_OF_CLASS: Mapping[int, Tissue] = {
    **dict.fromkeys((1, 8, 9, 11), Tissue.GM),  # grey matter; cortical; deep; of the cerebellum
    **dict.fromkeys((2, 10), Tissue.WM),  # white matter; brain stem, which is mostly white
    CSF_TISSUE: Tissue.CSF,
}
"""BIDS' standard tissue class -> tissue; others have none."""
TIE_MM = 1e-4
"""Distances that differ by less are equal."""
COLUMNS = ("index", "name", "abbreviation", "color", "mapping", "mirror")
"""Columns that a table must have; ``parent`` and ``subsets`` may follow."""
LEFT, RIGHT = "Left-", "Right-"
"""Names of a hemisphere's structures begin so."""
LEAST_CODE, GREATEST_CODE = 1, 32767
"""Label maps are stored as int16."""


@dataclass(frozen=True)
class Structure:
    """One row of a parcellation's table.

    ``tissue`` is BIDS' tissue class.  ``mirror`` is the code of the partner in the other
    hemisphere, its own in the middle.  ``parent`` is the code of the structure of ``BASE`` that
    this one is a part of; None in ``BASE`` itself, and where there is none.  ``subsets`` are
    names of selections that the structure belongs to.
    """

    code: int
    name: str
    abbreviation: str
    color: str
    tissue: int
    mirror: int
    parent: int | None = None
    subsets: tuple[str, ...] = ()

    @property
    def shared_name(self) -> str:
        """The name without its side, which the partner shares."""
        return self.name.removeprefix(LEFT).removeprefix(RIGHT)

    @property
    def title(self) -> str:
        """That name for people, as ``Cerebral White Matter``."""
        return self.shared_name.replace("-", " ")

    @property
    def is_part(self) -> bool:
        """Whether it is a part of a structure of ``BASE``, such as a parcel of the cortex."""
        return self.parent not in (None, self.code)

    @property
    def is_tissue(self) -> bool:
        """Part of the brain or of its fluid; vessels are not."""
        return self.tissue != NON_BRAIN_TISSUE

    @property
    def is_csf(self) -> bool:
        """Ventricles and the fluid around the brain."""
        return self.tissue == CSF_TISSUE


@dataclass(frozen=True)
class Parcellation:
    """An ordered list of structures; class ``k`` (1-based) is ``structures[k - 1]``."""

    name: str
    structures: tuple[Structure, ...]

    def __len__(self) -> int:
        return len(self.structures)

    @property
    def n_classes(self) -> int:
        """Number of classes with background."""
        return len(self.structures) + 1

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """What holds every class: uint8, or int16 from 257 classes on."""
        return class_dtype(self.n_classes)

    @cached_property
    def codes(self) -> np.ndarray:
        """(n_classes,) int16: the code written for each class."""
        return np.array([0, *(s.code for s in self.structures)], dtype=np.int16)

    @cached_property
    def class_of(self) -> Mapping[int, int]:
        """Code -> class, without background."""
        return {s.code: k for k, s in enumerate(self.structures, start=1)}

    @cached_property
    def mirror_classes(self) -> np.ndarray:
        """(n_classes,) int64: the class that each class becomes when left and right swap."""
        return np.array([0, *(self.class_of[s.mirror] for s in self.structures)])

    @cached_property
    def pairs(self) -> tuple[tuple[Structure, Structure], ...]:
        """Left and right partners; structures in the middle have none.

        The left one is named so; where no name tells, it is that of the lower code.
        """
        by_code = {s.code: s for s in self.structures}
        pairs = ((s, by_code[s.mirror]) for s in self.structures if s.code < s.mirror)
        return tuple((b, a) if b.name.startswith(LEFT) else (a, b) for a, b in pairs)

    @cached_property
    def joined(self) -> tuple[tuple[Structure, ...], ...]:
        """In order: partners together, left first; the others alone."""
        pair = {min(left.code, right.code): (left, right) for left, right in self.pairs}
        return tuple(pair.get(s.code, (s,)) for s in self.structures if s.code <= s.mirror)

    @cached_property
    def left_codes(self) -> dict[int, int]:
        """Code -> that of the pair's left structure; its own in the middle."""
        own = {s.code: s.code for s in self.structures}
        return own | {right.code: left.code for left, right in self.pairs}

    @cached_property
    def tissues(self) -> Mapping[Tissue, tuple[int, ...]]:
        """Classes of each tissue; a structure with a parent is of its parent's tissue."""
        base = self if self.name == BASE else load_parcellation(BASE)
        of_parent = {s.code: s.tissue for s in base.structures}
        found = [
            TISSUE_OF_CLASS.get(of_parent.get(s.parent or 0, s.tissue)) for s in self.structures
        ]
        return {
            tissue: tuple(k for k, each in enumerate(found, start=1) if each is tissue)
            for tissue in Tissue
        }

    def tissue_map(self, codes: np.ndarray) -> np.ndarray:
        """A label map (codes) with every structure replaced by its ``Tissue``, uint8; 0 for none.

        Raises ``DataError`` for codes that are not its own.
        """
        lut = np.zeros(self.n_classes, dtype=np.uint8)
        for tissue, classes in self.tissues.items():
            lut[list(classes)] = tissue
        return np.asarray(lut[self.encode(codes, self.class_of)])

    @property
    def segmentation(self) -> str:
        """BIDS' entity ``seg-`` of its label maps."""
        return OWN_SEGMENTATION if self.name == BASE else self.name

    @property
    def has_parents(self) -> bool:
        """Whether structures of ``BASE`` can be put together from its own."""
        return any(s.parent is not None for s in self.structures)

    @property
    def subsets(self) -> tuple[str, ...]:
        """Names that ``subset`` knows."""
        return ("all", *dict.fromkeys(name for s in self.structures for name in s.subsets))

    @property
    def headline(self) -> str:
        """The subset by which a training is scored: the paper's, or all where there is none."""
        return PAPER if PAPER in self.subsets else "all"

    def subset(self, name: str) -> tuple[int, ...]:
        """Classes of a named subset: ``"all"``, or a name from the table.

        ``cadiff40`` has ``"malc27"``, the CA-Diff paper's 27.  Raises ``UsageError`` for others.
        """
        if name not in self.subsets:
            raise UsageError(
                f"unknown label subset {name!r} of {self.name}", f"use {_either(self.subsets)}"
            )
        return tuple(self.class_of[s.code] for s in self.structures if name in ("all", *s.subsets))

    def brain_mm3(self, volumes_mm3: Mapping[int, float]) -> float:
        """Sum of all structures but vessels, of volumes by code; absent ones have none."""
        return sum(volumes_mm3.get(s.code, 0.0) for s in self.structures if s.is_tissue)

    def encode(
        self,
        ids: np.ndarray,
        mapping: Mapping[int, int],
        spacing_mm: Sequence[float] | np.ndarray = (1.0, 1.0, 1.0),
    ) -> np.ndarray:
        """Turn a foreign label map (X, Y, Z) into classes (``dtype``); unmapped ids become 0.

        A negative class stands for itself or its mirror image, whichever is nearer in a map with
        voxels of ``spacing_mm``, for itself where both are as near: the callosum of FreeSurfer or
        DLMUSE has no sides, ours is left and right white matter.
        """
        if not np.issubdtype(ids.dtype, np.integer):
            if not np.isfinite(ids).all():
                raise DataError(
                    "label map holds NaN or infinite values", "labels are whole numbers"
                )
            ids = np.rint(ids).astype(np.int64)
        top = int(ids.max(initial=0))
        if ids.min(initial=0) < 0:
            raise DataError(f"label map holds {int(ids.min())}", "labels must not be negative")
        lut = np.zeros(top + 1, dtype=np.int32)
        for source, target in mapping.items():
            if source <= top:
                lut[source] = target
        classes = lut[ids]
        for either in sorted({k for k in mapping.values() if k < 0}):
            sides = -either, int(self.mirror_classes[-either])
            unsided = classes == either
            places = np.argwhere(unsided) * spacing_mm
            far = [_distances(places, np.argwhere(classes == k) * spacing_mm) for k in sides]
            # The tree rounds: what is as far on both sides must not depend on the axes' order.
            classes[unsided] = np.where(far[0] <= far[1] + TIE_MM, *sides)
        return np.asarray(classes.astype(self.dtype))

    def mapping_to(self, other: "Parcellation") -> dict[int, int]:
        """Code -> class of ``other``: of itself, or of ``BASE`` by the column ``parent``.

        A structure without a parent becomes background.  Raises ``DataError`` where ``other`` is
        neither, and where no structure has a parent.
        """
        if other == self:
            return dict(self.class_of)
        if other.name != BASE or not self.has_parents:
            known = (self.name, *([BASE] if self.has_parents else []))
            raise DataError(
                f"structures of {self.name} are no parts of those of {other.name}",
                f"compare with {' or '.join(known)}",
            )
        return {s.code: other.class_of.get(s.parent or 0, 0) for s in self.structures}

    def coarsen(self, codes: np.ndarray) -> np.ndarray:
        """A label map (codes) with every structure replaced by its parent, a code of ``BASE``.

        That of ``BASE`` stays as it is.
        """
        base = load_parcellation(BASE)
        return np.asarray(base.codes[base.encode(codes, self.mapping_to(base))])

    def freesurfer(self, codes: np.ndarray) -> np.ndarray:
        """A label map (codes) with codes of FreeSurfer's table alone (``FREESURFER``), int16.

        A finer parcellation becomes its parents.  Raises ``DataError`` where it has none.
        """
        found = self.coarsen(codes)
        for own, theirs in FREESURFER.items():
            found[found == own] = theirs
        return found

    def reached(self, mapping: Mapping[int, int]) -> set[int]:
        """Classes that a mapping from foreign ids can give."""
        either = {abs(k) for k in mapping.values()} - {0}
        mirrored = {int(self.mirror_classes[-k]) for k in mapping.values() if k < 0}
        return either | mirrored

    def as_tsv(self) -> str:
        """The text of its table, background included; ``parse`` reads it."""
        lines: list[tuple[object, ...]] = [
            (*COLUMNS, "parent", "subsets"),
            (0, "Background", "BG", "#000000", 0, 0, None, None),
        ]
        for s in self.structures:
            known = (s.code, s.name, s.abbreviation, s.color, s.tissue, s.mirror, s.parent)
            lines.append((*known, " ".join(s.subsets)))
        cells = (("n/a" if x in (None, "") else str(x) for x in line) for line in lines)
        return "".join("\t".join(line) + "\n" for line in cells)


def class_dtype(n_classes: int) -> np.dtype[np.integer]:
    """The type of class maps: uint8 where it holds the greatest class, else int16."""
    return np.dtype(np.uint8 if n_classes <= 256 else np.int16)


def load_parcellation(name: str | Path) -> Parcellation:
    """Read a parcellation that ships with the package, or a table (TSV) of your own by its path.

    A table has the columns ``COLUMNS`` of BIDS' ``dseg.tsv`` and ours, and perhaps ``parent`` and
    ``subsets`` (names, separated by spaces).  ``NAME.tsv`` and ``seg-NAME_dseg.tsv`` name the
    parcellation.  Raises ``MissingInputError`` if there is none, ``DataError`` if it is not a
    table.
    """
    if name in shipped_names():
        return _shipped(str(name))
    path = Path(name)
    if not os.path.isfile(path):  # which takes names that are too long
        raise MissingInputError(
            f"no parcellation {str(name)!r}", f"use {', '.join(shipped_names())}, or a TSV"
        )
    own = path.stem.removeprefix("seg-").removesuffix("_dseg")
    if own in (OWN_SEGMENTATION, *shipped_names()):
        raise DataError(f"{path}: the name {own} is taken", "rename the file")
    try:
        text = read_text(path)
    except ValueError as error:
        raise DataError(f"{path} is not a table ({error})", "save it as TSV in UTF-8") from error
    return parse(own, text)


@cache
def _shipped(name: str) -> Parcellation:
    path = shipped(f"labels/{name}.tsv")
    return parse(name, path.read_text(encoding="utf-8"))


@cache
def shipped_names() -> tuple[str, ...]:
    """Parcellations that ship with the package."""
    folder = shipped("labels")
    names = (Path(each.name) for each in folder.iterdir())
    return tuple(sorted(path.stem for path in names if path.suffix == ".tsv"))


def base_volumes(volumes: Mapping[str, float], parcellation: Parcellation) -> Mapping[str, float]:
    """Volumes by name, and those of ``BASE``'s structures as the sums of their parts.

    A structure of which a part is not known is absent.
    """
    names = {s.code: s.name for s in load_parcellation(BASE).structures}
    parts = dict[str, list[str]]()
    for s in parcellation.structures:
        if s.parent is not None:
            parts.setdefault(names[s.parent], []).append(s.name)
    sums = {
        name: sum(volumes[part] for part in of_it)
        for name, of_it in parts.items()
        if all(part in volumes for part in of_it)
    }
    return {**volumes, **sums}


def parse(name: str, text: str) -> Parcellation:
    """A parcellation from the text of its table, checked; raises ``DataError``."""
    lines = csv.DictReader(text.splitlines(), delimiter="\t")
    try:
        structures = tuple(
            Structure(
                code=int(line["index"]),
                name=line["name"],
                abbreviation=line["abbreviation"],
                color=line["color"],
                tissue=int(line["mapping"]),
                mirror=int(line["mirror"]),
                parent=int(parent) if (parent := _cell(line, "parent")) else None,
                subsets=tuple(_cell(line, "subsets").split()),
            )
            for line in lines
            if line["index"] != "0"  # background, which BIDS' tables list
        )
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(
            f"the table of {name} cannot be read ({error})",
            f"columns {', '.join(COLUMNS)}; index, mapping and mirror are whole numbers",
        ) from error
    parcellation = Parcellation(name, structures)
    for trouble in _troubles(parcellation):
        raise DataError(f"parcellation {name}: {trouble}", "correct its table")
    return parcellation


def _distances(places: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of each place (n, 3) to the nearest of others (m, 3); infinite without others."""
    if not len(places) or not len(others):
        return np.full(len(places), np.inf)
    distances: np.ndarray = KDTree(others).query(places)[0]
    return distances


def _cell(line: Mapping[str, str | None], column: str) -> str:
    """A cell that may be absent, or hold BIDS' ``n/a``: empty then."""
    text = line.get(column) or ""
    return "" if text == "n/a" else text


def _troubles(parcellation: Parcellation) -> Iterable[str]:
    """Why a table makes no parcellation."""
    name, structures = parcellation.name, parcellation.structures
    if not (name.isascii() and name.isalnum()):
        yield "its name, which becomes a part of file names, must be letters and digits"
    if not structures:
        yield "the table has no rows"
    for attribute in ("code", "name", "abbreviation"):
        values = [getattr(s, attribute) for s in structures]
        if several := sorted({value for value in values if values.count(value) > 1}):
            yield f"{attribute} {several[0]} is given to several structures"
    columns = [str(s.name).lower().replace("_", "-") for s in structures]
    if alike := [i for i, name in enumerate(columns) if columns.count(name) > 1]:
        first, second = (structures[i].name for i in alike[:2])
        yield f"{first} and {second} would be one column of the group table"
    mirror = {s.code: s.mirror for s in structures}
    for s in structures:
        if empty := [key for key in ("name", "abbreviation", "color") if not getattr(s, key)]:
            yield f"the {empty[0]} of {s.code} is empty"
        elif '"' in s.name + s.abbreviation:
            yield f"the name of {s.code} has a quotation mark"
        if not LEAST_CODE <= s.code <= GREATEST_CODE:
            yield f"index is {s.code}, not {LEAST_CODE} to {GREATEST_CODE}"
        if mirror.get(s.mirror) != s.code:
            yield f"{s.name} mirrors {s.mirror}, which does not mirror {s.code}"
        if s.parent is not None and s.parent not in load_parcellation(BASE).class_of:
            yield f"the parent of {s.name} is {s.parent}, which is no code of {BASE}"


def _either(names: Iterable[str]) -> str:
    return " or ".join(map(repr, names))
