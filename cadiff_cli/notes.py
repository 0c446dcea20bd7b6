"""Notes: warnings that programs tell apart by a code, and people read as a text."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum


class NoteCode(StrEnum):
    """What a note is about.  Sidecars hold these values: do not change them."""

    # The file of a scan
    TRAILING_BYTES = "trailing-bytes"
    HEADER_ORIENTATION = "header-orientation"
    HEADER_SIZES = "header-sizes"
    BAD_VALUES = "bad-values"
    PADDING = "padding"
    COARSE_VOXELS = "coarse-voxels"
    # The brain
    STRIP_CHOICE = "strip-choice"
    STRIP_REGISTRATION = "strip-registration"
    LARGE_BRAIN = "large-brain"
    MASK_VOLUME = "mask-volume"
    MASK_PIECES = "mask-pieces"
    MASK_SYMMETRY = "mask-symmetry"
    MASK_AT_EDGE = "mask-at-edge"
    MASK_IN_AIR = "mask-in-air"
    SKULL_AT_EDGE = "skull-at-edge"
    BIAS = "bias"
    ORIENTATION = "orientation"
    # Templates and registrations
    TEMPLATE_MISSING = "template-missing"
    TEMPLATE_MASK = "template-mask"
    AFFINE_ONLY = "affine-only"
    POOR_SCORE = "poor-score"
    SPACE_REGISTRATION = "space-registration"
    NO_ATLAS = "no-atlas"
    ATLAS_NOT_STRIPPED = "atlas-not-stripped"
    UNKNOWN_IDS = "unknown-ids"
    # The machine
    DEVICE = "device"
    TILES = "tiles"
    NO_PAGE = "no-page"
    # A note of another version
    UNKNOWN = "unknown"

    @classmethod
    def _missing_(cls, value: object) -> "NoteCode":
        return cls.UNKNOWN


@dataclass(frozen=True)
class Note:
    """A warning: decisions look at ``code``, people read ``text``."""

    code: NoteCode
    text: str

    def about(self, subject: str, code: NoteCode | None = None) -> "Note":
        """The same note, as ``subject: text``; with another code where the subject matters."""
        return Note(code or self.code, f"{subject}: {self.text}")

    def coded(self, code: NoteCode) -> "Note":
        """The same text under another code."""
        return replace(self, code=code)


def codes_of(notes: Iterable[Note]) -> set[NoteCode]:
    """What the notes are about."""
    return {note.code for note in notes}


def texts(notes: Iterable[Note]) -> list[str]:
    """What people read."""
    return [note.text for note in notes]
