"""What flows through cadiff, in the order in which it is made.

A scan is stripped, registered to a template, given a coordinate field, turned into the network's
conditions, and segmented.  Each product is immutable and carries the ones it was made from only
where a later stage needs them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cadiff_cli.config import Config, StripMethod
from cadiff_cli.labels.parcellation import Parcellation, Tissue
from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.spatial.grid import Grid, Volume

Sex = Literal["F", "M"]


@dataclass(frozen=True)
class Person:
    """Who was scanned, as far as it is known."""

    age_years: float | None = None
    sex: Sex | None = None


@dataclass(frozen=True)
class Percentile:
    """Per cent of people of the same age and sex in whom something is smaller.

    The true ``value`` lies between ``low`` and ``high`` with 95 % confidence: few were measured.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Scan:
    """A T1-weighted image as the user gave it: ``t1`` is 3-D, finite, on its own grid.

    ``sha256`` is the checksum of the file that was read, if it was read from one.
    """

    t1: Volume
    path: Path
    notes: tuple[Note, ...] = ()
    sha256: str = ""
    person: Person = Person()


@dataclass(frozen=True)
class Frame:
    """Where a template's coordinates begin and end, in mm.

    ``ac_mm`` is the anterior commissure in the template's world.  ``low_mm`` and ``high_mm`` are
    the extents, relative to it, that the distance field maps to 0 and 1; x is symmetric, so 0.5 is
    the midplane.
    """

    ac_mm: tuple[float, float, float]
    low_mm: tuple[float, float, float]
    high_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Citation:
    """How a template's makers want it to be cited; ``links`` are DOIs and web pages."""

    title: str
    authors: tuple[str, ...] = ()
    links: tuple[str, ...] = ()


@dataclass(frozen=True)
class Condition:
    """The people that an atlas is made for; None is not known, and an atlas of all is made then.

    ``sex`` is as ``participants.tsv`` of BIDS spells it; ``ventricles_percent`` is the volume of
    the ventricles in per cent of the brain's.
    """

    age_years: float | None = None
    sex: Sex | None = None
    ventricles_percent: float | None = None

    @property
    def given(self) -> dict[str, float | str]:
        """The values that are known, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @staticmethod
    def read(told: object) -> "Condition | None":
        """What ``given`` gave; None if that cannot be read."""
        if not isinstance(told, Mapping):
            return None
        age, sex, ventricles = (
            told.get(name) for name in ("age_years", "sex", "ventricles_percent")
        )
        numbers = all(x is None or isinstance(x, int | float) for x in (age, ventricles))
        return Condition(age, sex, ventricles) if numbers and sex in (None, "F", "M") else None


def template_label(name: str) -> str:
    """A template's name as it stands in file names after ``from-`` and ``to-``.

    >>> template_label("MNIInfant:cohort-2")
    'MNIInfant+2'
    """
    return name.replace(":cohort-", "+")


@dataclass(frozen=True, eq=False)
class FromBase:
    """What a template was deformed from: its anatomy has the coordinates of the base's.

    ``frame`` is the base's.  ``to_base_mm`` (3, X, Y, Z) float32 in RAS mm takes points of the
    template to the base, given at the points of ``grid``.
    """

    frame: Frame
    to_base_mm: np.ndarray
    grid: Grid


@dataclass(frozen=True, eq=False)
class Template:
    """A brain to register: ``brain`` is skull-stripped, on a grid in the template's world.

    ``name`` is as TemplateFlow spells it, with the cohort where there are several
    (``MNIInfant:cohort-2``).  ``head`` and ``mask`` allow skull stripping; templates without a
    skull have ``head=None``.  ``labels`` are cadiff's codes (int16) on the brain's grid, where
    somebody drew them.  ``source`` is the folder that it was read from, or the library.
    ``citation`` is its makers' own; the shipped templates are cited from ``data/references.bib``.
    ``condition`` is that of an atlas, ``from_base`` what it was deformed from.  ``cause`` is set
    where a run makes the template by itself: a checksum of everything that decides its content,
    which settings hold in place of ``sha256``.
    """

    name: str
    brain: Volume
    frame: Frame
    head: Volume | None = None
    mask: Volume | None = None
    labels: Volume | None = None
    source: str = ""
    citation: Citation | None = None
    notes: tuple[Note, ...] = ()
    condition: Condition | None = None
    cause: str = ""
    from_base: FromBase | None = None

    @cached_property
    def label(self) -> str:
        """The name as it stands in file names (``template_label``)."""
        return template_label(self.name)

    @cached_property
    def sha256(self) -> str:
        """Checksum of the content: images with their grids, the frame, and the way to a base."""
        digest = hashlib.sha256(repr(self.frame).encode())
        for volume in (self.brain, self.head, self.mask, self.labels):
            if volume is None:
                digest.update(b"none")
                continue
            digest.update(repr(volume.grid.shape).encode())
            digest.update(volume.grid.affine.astype("<f8").tobytes())
            digest.update(np.ascontiguousarray(volume.data, "<f4").tobytes())
        if self.from_base:
            digest.update(repr(self.from_base.frame).encode())
            digest.update(np.ascontiguousarray(self.from_base.to_base_mm, "<f4").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Deformation:
    """A map of space that can be undone, as displacements (3, X, Y, Z) float32 in RAS mm.

    ``forward_mm`` takes points of a base brain to an atlas, ``backward_mm`` those of the atlas to
    the base; both are given at the points of ``grid``, whose axes are R, A and S.
    """

    forward_mm: np.ndarray
    backward_mm: np.ndarray
    grid: Grid


@dataclass(frozen=True, eq=False)
class Atlas:
    """The template of a ``condition``, which a network made by deforming a ``base``.

    ``base`` has labels, and so has ``template``.  ``log_jacobian`` lies on the deformation's grid,
    in the atlas: the logarithm of the factor by which a place is larger than in the base.
    ``volumes_mm3`` and ``base_volumes_mm3`` are by code.  ``seed`` is None for the centre of the
    condition's people, else the number of a possible person.  ``model`` and ``weights_sha256`` are
    the network's.
    """

    template: Template
    base: Template
    condition: Condition
    seed: int | None
    deformation: Deformation
    log_jacobian: Volume
    volumes_mm3: Mapping[int, float]
    base_volumes_mm3: Mapping[int, float]
    model: str
    weights_sha256: str


@dataclass(frozen=True)
class MaskQuality:
    """How a brain mask looks, whatever made it.

    ``largest_share`` is the share of its largest component; ``symmetry`` is the Dice of that
    component and its mirror image, left for right; ``at_edge`` is the share of its border that lies
    in the face of the field of view that cuts it most; ``in_air`` is the share of the mask outside
    the head, None where that was not looked at.
    """

    largest_share: float
    symmetry: float
    at_edge: float
    in_air: float | None = None

    def as_dict(self) -> dict[str, float]:
        """What was measured, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, eq=False)
class Stripped:
    """The scan's brain on the working grid (RAS axes, 1 mm): ``t1`` is 0 outside ``mask``.

    ``quality`` tells how the mask looks, if it was judged.  ``own`` is the mask on the scan's own
    grid, where somebody drew it or cut the brain out there.  ``t1`` is corrected for a receive
    bias; ``bias_ratio`` is that of the field's 95th and 5th percentiles in the brain.  ``head`` is
    the scan on its own grid with the intensities from which ``t1`` was cut (none negative or
    extreme), not corrected; ``log_bias`` is the logarithm of the field that was found.
    ``intracranial`` is what the inner skull holds, on the working grid; None where it was not found
    (``no_intracranial`` says why).  ``bare`` says that the scan was skull-stripped already,
    whatever found its brain.
    """

    t1: Volume
    mask: Volume
    method: StripMethod
    notes: tuple[Note, ...] = ()
    quality: MaskQuality | None = None
    own: Volume | None = None
    bias_ratio: float = 1.0
    head: Volume | None = None
    log_bias: Volume | None = None
    intracranial: Volume | None = None
    bare: bool = False

    @property
    def summary(self) -> str:
        """How large the brain is, and what found it."""
        return f"brain of {self.mask.litres:.2f} l by {self.method.found_by}"

    @property
    def no_intracranial(self) -> str:
        """Why ``intracranial`` is None; empty where it is not."""
        if self.intracranial is not None:
            return ""
        if self.bare:
            return "the scan is skull-stripped: it does not show the skull"
        if self.method is StripMethod.NET:
            return "the network that found the brain does not know the skull"
        return f"the brain is {self.method.found_by}; only the network finds the skull"


@dataclass(frozen=True, eq=False)
class Transform:
    """A registration of a moving image to a fixed one.

    ``to_fixed`` and ``to_moving`` are ITK composite transforms (``.h5``) that resample moving
    images onto the fixed grid, and fixed images onto the moving one.  ``kind`` names the settings
    that succeeded.  ``score`` is the normalised mutual information where either image is not 0
    (1 to 2, higher is better).  ``trusted`` is False where the score is poor, or the wanted
    settings failed.
    """

    to_fixed: Path
    to_moving: Path
    kind: str
    score: float
    trusted: bool = True
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, eq=False)
class Registered:
    """A template and its transform: the scan is the fixed image, the template the moving one."""

    template: Template
    transform: Transform


def sound(registrations: Sequence[Registered]) -> tuple[Registered, ...]:
    """Those that share in the distance field: the trusted ones, or all where none is trusted."""
    return tuple(r for r in registrations if r.transform.trusted) or tuple(registrations)


@dataclass(frozen=True, eq=False)
class CoordinateField:
    """The distance field of section II-B: ``data`` (3, X, Y, Z) float32 in [0, 1] on ``grid``."""

    data: np.ndarray
    grid: Grid


@dataclass(frozen=True, eq=False)
class Conditions:
    """What the network is given: a crop around the brain.

    ``image`` (X, Y, Z) float32 in [0, 1] on a 1 mm grid, 0 outside ``mask``; ``field`` covers the
    same crop at ``field.grid``'s spacing, or is None for the network to find.  Sizes are multiples
    of 16.
    """

    image: Volume
    mask: Volume
    field: CoordinateField | None


@dataclass(frozen=True, eq=False)
class Segmentation:
    """Label codes (int16) on the scan's own grid.

    ``device`` is where the network ran; ``tile`` the edge of the tiles that it saw, None for the
    whole volume.
    ``posteriors`` (classes, X, Y, Z) float16, background first, when they were asked for; then
    parcels have a ``confidence`` (X, Y, Z) float16 in their place: the probability of the parcel
    that was drawn, 0 outside the cortex.
    ``expected_dice`` maps a code to the expected Dice from the raw (uncalibrated) probabilities (a
    ``Calibration`` corrects it); a structure that is absent is not in it.
    ``volume_sd_mm3`` is the standard deviation of each volume over the samples, empty for a single
    one.  ``uncertainty`` (X, Y, Z) float32 is the entropy of the probabilities, 0 to 1, 0 outside
    the mask, when it was asked for.  ``tissues`` are (X, Y, Z) float16 probabilities, 0 outside the
    mask.
    """

    labels: Volume
    parcellation: Parcellation
    steps: int
    seed: int
    device: str = "cpu"
    precision: str = "float32"
    tile: int | None = None
    posteriors: np.ndarray | None = None
    confidence: np.ndarray | None = None
    notes: tuple[Note, ...] = ()
    expected_dice: Mapping[int, float] = field(default_factory=dict)
    volume_sd_mm3: Mapping[int, float] = field(default_factory=dict)
    uncertainty: np.ndarray | None = None
    tissues: Mapping[Tissue, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything before the network.

    ``registrations`` are to the ``templates``, in their order; the field is the mean of the
    ``sound`` ones.  There are none where the network finds the field.
    """

    scan: Scan
    stripped: Stripped
    registrations: tuple[Registered, ...]
    conditions: Conditions
    templates: tuple[Template, ...]


@dataclass(frozen=True)
class Calibration:
    """What Dice was reached where a raw one was expected, with the weights ``weights_sha256``.

    A monotone line through the knots (``raw``, ``dice``), constant beyond them, and for each
    structure (by name) what it lies above that line, if that was found to help (``offsets``).
    ``usual`` is the Dice to expect of each structure in a good scan.  ``people`` says who was
    measured, and how.
    """

    weights_sha256: str
    people: str
    raw: tuple[float, ...]
    dice: tuple[float, ...]
    offsets: Mapping[str, float] = field(default_factory=dict)
    usual: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, name: str, raw: float) -> float:
        """The Dice of the structure ``name`` to expect, in [0, 1]."""
        line = float(np.interp(raw, self.raw, self.dice))
        return float(np.clip(line + self.offsets.get(name, 0.0), 0.0, 1.0))

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Calibration":
        """What ``as_dict`` gave."""
        knots = {key: tuple(values[key]) for key in ("raw", "dice")}
        return Calibration(**{**values, **knots})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a file or a fingerprint."""
        return {
            "weights_sha256": self.weights_sha256,
            "people": self.people,
            "raw": [round(value, 4) for value in self.raw],
            "dice": [round(value, 4) for value in self.dice],
            "offsets": {name: round(value, 4) for name, value in self.offsets.items()},
            "usual": {name: round(value, 4) for name, value in self.usual.items()},
        }


@dataclass(frozen=True)
class ModelInfo:
    """The network behind a result: its name, the SHA-256 of its file, and the codes it can draw."""

    name: str
    sha256: str
    structures: frozenset[int]


@dataclass(frozen=True, eq=False)
class Result:
    """Everything a run produced.

    ``mask`` is the brain on the scan's own grid; ``volumes_mm3`` maps a code to mm^3, and to 0.0
    too if it is not in ``model.structures``, those that the network was taught; ``seconds`` maps a
    stage to its wall time; ``spaces`` are the standard spaces it was carried into; ``calibration``
    corrects the expected Dice, if one was measured for the model and settings.  ``percentiles`` are
    by name, of what has one at the person's age, among the people that ``percentiles_of`` names;
    ``ranges`` is the fingerprint of age ranges that the user gave, empty for those that ship.
    ``head`` is the scan with even brightness, on its own grid.  ``intracranial`` is like ``mask``,
    for what the inner skull holds, or None.
    ``finer`` is the same result in a finer parcellation, if one was asked for.
    """

    prepared: Prepared
    mask: Volume
    segmentation: Segmentation
    volumes_mm3: Mapping[int, float]
    model: ModelInfo
    config: Config
    seconds: Mapping[str, float] = field(default_factory=dict)
    spaces: tuple["InSpace", ...] = ()
    calibration: Calibration | None = None
    percentiles: Mapping[str, Percentile] = field(default_factory=dict)
    percentiles_of: str = ""
    ranges: str = ""
    head: Volume | None = None
    intracranial: Volume | None = None
    finer: "Result | None" = None

    def mm3(self, code: int) -> float | None:
        """Volume of a structure; None for one that was never taught to the network, nor drawn."""
        drawn = self.volumes_mm3[code]
        return drawn if drawn or code in self.model.structures else None

    @property
    def notes(self) -> tuple[Note, ...]:
        """Everything a user should know, in the order in which it happened."""
        p = self.prepared
        # One registration may serve several resolutions, or the labels as well.
        others = {
            space.registered.template.name: space.registered
            for space in self.spaces
            if space.registered not in p.registrations
        }
        return (
            *p.scan.notes,
            *(note for template in p.templates for note in template.notes),
            *p.stripped.notes,
            *(note for r in p.registrations for note in r.transform.notes),
            *self.segmentation.notes,
            *(
                n.coded(NoteCode.SPACE_REGISTRATION)
                for r in others.values()
                for n in r.transform.notes
            ),
        )


@dataclass(frozen=True, eq=False)
class InSpace:
    """A result carried onto a template's grid: brain, mask and label codes.

    ``resolution`` is TemplateFlow's ``res-`` label of that grid, empty for the template's own.
    ``parcels`` are codes of the finer parcellation, if the result has one.
    """

    registered: Registered
    t1: Volume
    mask: Volume
    labels: Volume
    resolution: str = ""
    parcels: Volume | None = None

    @property
    def name(self) -> str:
        """As ``--output-spaces`` wants it: ``MNI152NLin2009cAsym:res-2``."""
        name = self.registered.template.name
        return f"{name}:res-{self.resolution}" if self.resolution else name
