"""The structures that cadiff draws: one table, read from ``data/labels.tsv``.

Networks work with *classes* (0 is background, 1..n in table order); files hold *codes* (FreeSurfer
aseg codes where one exists; 91/92 and 630-632 are Mindboggle's codes for the basal forebrain and
the vermal lobules).  ``LabelTable`` is the only place where the two meet.
"""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np
from scipy.spatial import KDTree

from cadiff_cli.errors import DataError, MissingInputError, UsageError

FREESURFER_EXTRAS = {31: 4, 63: 43, 72: 14, 78: 2, 79: 41}
"""FreeSurfer codes beside ours: choroid plexus, fifth ventricle, hypointensities."""
FREESURFER_PARCELS = {
    3: (range(1000, 2000), range(11100, 11200)),
    42: (range(2000, 3000), range(12100, 12200)),
    2: (range(3000, 4000), [5001]),
    41: (range(4000, 5000), [5002]),
}
"""Cortex of either side, and the white matter below it, as ``aparc+aseg`` and ``wmparc`` parcel
them."""
SYNTHSEG_EXTRAS = {25: 2, 57: 41, 136: 4, 163: 43, 137: 5, 164: 44}
"""Codes of SynthSeg's label maps beside FreeSurfer's: dark white matter, choroid plexus."""
FREESURFER_UNSIDED = (77, 251, 252, 253, 254, 255)
"""White matter of either side: hypointensities, callosum."""
CSF_MAPPING, NON_BRAIN_MAPPING = 3, 6
"""BIDS' standard tissue classes, column ``mapping`` of the table."""


@dataclass(frozen=True)
class Structure:
    """One row of the table.  ``mirror`` is the code of its partner in the other hemisphere."""

    code: int
    name: str
    abbreviation: str
    color: str
    mapping: int
    mirror: int
    neuromorphometrics: str
    malc27: bool

    @property
    def is_tissue(self) -> bool:
        """Part of the brain or of its fluid; vessels are not."""
        return self.mapping != NON_BRAIN_MAPPING

    @property
    def is_csf(self) -> bool:
        """Ventricles and the fluid around the brain."""
        return self.mapping == CSF_MAPPING


@dataclass(frozen=True)
class LabelTable:
    """An ordered list of structures; class ``k`` (1-based) is ``structures[k - 1]``."""

    structures: tuple[Structure, ...]

    def __len__(self) -> int:
        return len(self.structures)

    @property
    def n_classes(self) -> int:
        """Number of classes with background."""
        return len(self.structures) + 1

    @cached_property
    def codes(self) -> np.ndarray:
        """(n_classes,) int16: the code written for each class."""
        return np.array([0, *(s.code for s in self.structures)], dtype=np.int16)

    @cached_property
    def mirror_classes(self) -> np.ndarray:
        """(n_classes,) int64: the class that each class becomes when left and right swap."""
        of_code = {int(code): k for k, code in enumerate(self.codes)}
        return np.array([0, *(of_code[s.mirror] for s in self.structures)])

    @cached_property
    def left_codes(self) -> dict[int, int]:
        """Code -> that of the pair's left structure; its own in the middle."""
        return {s.code: min(s.code, s.mirror) for s in self.structures}

    def subset(self, name: str) -> tuple[int, ...]:
        """Classes of a named subset: ``"all"`` or ``"malc27"`` (the CA-Diff paper's 27)."""
        if name not in ("all", "malc27"):
            raise UsageError(f"unknown label subset {name!r}", "use 'all' or 'malc27'")
        return tuple(k for k, s in enumerate(self.structures, start=1) if name == "all" or s.malc27)

    def encode(self, codes: np.ndarray, mapping: Mapping[int, int]) -> np.ndarray:
        """Turn a foreign label map (X, Y, Z) into classes (uint8); ids not in ``mapping`` become 0.

        A negative class stands for itself or its mirror image, whichever is nearer (in voxels): the
        callosum of FreeSurfer or DLMUSE has no sides, ours is left and right white matter.
        """
        if not np.isfinite(codes).all():
            raise DataError("label map holds NaN or infinite values", "labels are whole numbers")
        codes = np.rint(codes).astype(np.int64)
        top = int(codes.max(initial=0))
        if codes.min(initial=0) < 0:
            raise DataError(f"label map holds {int(codes.min())}", "labels must not be negative")
        lut = np.zeros(top + 1, dtype=np.int16)
        for source, target in mapping.items():
            if source <= top:
                lut[source] = target
        classes = lut[codes]
        for either in sorted({k for k in mapping.values() if k < 0}):
            unsided = classes == either
            sided = np.isin(classes, (-either, self.mirror_classes[-either]))
            classes[unsided] = -either
            if unsided.any() and sided.any():
                _, nearest = KDTree(np.argwhere(sided)).query(np.argwhere(unsided))
                classes[unsided] = classes[sided][nearest]
        return np.asarray(classes.astype(np.uint8))

    def reached(self, mapping: Mapping[int, int]) -> set[int]:
        """Classes that a mapping from foreign ids can give."""
        either = {abs(k) for k in mapping.values()} - {0}
        mirrored = {int(self.mirror_classes[-k]) for k in mapping.values() if k < 0}
        return either | mirrored

    def neuromorphometrics_mapping(self) -> dict[int, int]:
        """Neuromorphometrics id -> class.  Cortical parcels (>= 100): odd left, even right."""
        parcels = {"odd>=100": range(101, 208, 2), "even>=100": range(100, 208, 2)}
        return {
            int(source): k
            for k, s in enumerate(self.structures, start=1)
            for source in parcels.get(s.neuromorphometrics, [s.neuromorphometrics])
        }

    def dlmuse_mapping(self) -> dict[int, int]:
        """DLMUSE (MUSE) id -> class: Neuromorphometrics', but for CSF and parcelled white matter.

        Lobes and capsules are odd on the right and even on the left; the callosum has no sides.
        """
        mapping = self.neuromorphometrics_mapping()
        right, left = mapping[44], mapping[45]
        lobes = {muse: right if muse % 2 else left for muse in range(81, 95)}
        return {**mapping, **lobes, 1: 0, 95: -left}

    def freesurfer_mapping(self) -> dict[int, int]:
        """FreeSurfer code (aseg, aparc+aseg, wmparc) -> class: ours, and what lies within them."""
        ours = self.identity_mapping()
        extras = {code: ours[like] for code, like in FREESURFER_EXTRAS.items()}
        parcels = {
            code: ours[like]
            for like, series in FREESURFER_PARCELS.items()
            for codes in series
            for code in codes
        }
        return {**ours, **extras, **parcels, **dict.fromkeys(FREESURFER_UNSIDED, -ours[2])}

    def synthseg_mapping(self) -> dict[int, int]:
        """Code of SynthSeg's training label maps -> class: FreeSurfer's, and what those split."""
        ours = self.identity_mapping()
        extras = {code: ours[like] for code, like in SYNTHSEG_EXTRAS.items()}
        return {**self.freesurfer_mapping(), **extras}

    def identity_mapping(self) -> dict[int, int]:
        """Code (as this package writes it) -> class."""
        return {int(code): k for k, code in enumerate(self.codes) if k}


MAPPINGS: Mapping[str, Callable[[LabelTable], dict[int, int]]] = {
    "neuromorphometrics": LabelTable.neuromorphometrics_mapping,
    "freesurfer": LabelTable.freesurfer_mapping,
    "dlmuse": LabelTable.dlmuse_mapping,
    "synthseg": LabelTable.synthseg_mapping,
    "cadiff": LabelTable.identity_mapping,
}
"""Foreign label ids that are known by name."""


def load_table() -> LabelTable:
    """Read the table that ships with the package."""
    text = files("cadiff_cli").joinpath("data/labels.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines(), delimiter="\t")
    return LabelTable(
        tuple(
            Structure(
                code=int(row["index"]),
                name=row["name"],
                abbreviation=row["abbreviation"],
                color=row["color"],
                mapping=int(row["mapping"]),
                mirror=int(row["mirror"]),
                neuromorphometrics=row["neuromorphometrics"],
                malc27=row["malc27"] == "1",
            )
            for row in rows
        )
    )


def label_mapping(name: str, table: LabelTable) -> dict[int, int]:
    """Source id -> class: a mapping of this name (``MAPPINGS``), or a TSV.

    ``cadiff`` are our own codes.  A TSV has columns ``source`` (the id in your label maps) and
    ``index`` (our code, see dseg.tsv; with a minus, its mirror image where that is nearer).
    """
    if name in MAPPINGS:
        return MAPPINGS[name](table)
    path, ours = Path(name), table.identity_mapping()
    if not path.is_file():
        raise MissingInputError(
            f"no mapping {name!r}",
            f"use {', '.join(MAPPINGS)}, or a TSV with source and index",
        )
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:  # Excel's begins with a mark
            rows = list(csv.DictReader(stream, delimiter="\t"))
        pairs = [(int(row["source"]), int(row["index"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{name} is not a mapping ({error})", "columns source and index, whole numbers"
        ) from error
    if negative := sorted({source for source, _ in pairs if source < 0}):
        raise DataError(f"{name} maps ids {negative}", "label maps hold no negative ids")
    last = dict(pairs)
    if several := sorted({source for source, code in pairs if last[source] != code}):
        raise DataError(f"{name} maps ids {several} to several codes", "give each id one row")
    if unknown := sorted({code for _, code in pairs if code and abs(code) not in ours}):
        raise DataError(f"{name} maps to unknown codes {unknown}", "see dseg.tsv for the codes")
    return {source: ours.get(abs(code), 0) * (-1 if code < 0 else 1) for source, code in pairs}
