"""What made a result: its provenance, as the sidecar of the label map holds it."""

import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from typing import Any, TypeVar

import cadiff_cli
from cadiff_cli import machine
from cadiff_cli.config import Config, Recipe, StripConfig, StripMethod, fingerprint
from cadiff_cli.errors import DataError
from cadiff_cli.io.bids.description import generated_by
from cadiff_cli.io.files import sha256
from cadiff_cli.io.releases import parcels_sha256, strip_weights_sha256
from cadiff_cli.io.templates import joint_name, own_contents
from cadiff_cli.io.volumes import about_expected_dice
from cadiff_cli.labels.parcellation import BASE
from cadiff_cli.machine import ITK_THREADS
from cadiff_cli.notes import Note, NoteCode, texts
from cadiff_cli.products import (
    Calibration,
    Citation,
    Condition,
    Person,
    Result,
    Scan,
    Sex,
    Stripped,
    Template,
    sound,
)


def make_recipe(
    config: Config,
    templates: Sequence[Template],
    model: str,
    weights_sha256: str,
    calibration: Calibration | None,
    ranges: str = "",
) -> Recipe:
    """The recipe of results that this installation makes, or has just made, with these settings."""
    return Recipe(
        config,
        joint_name(templates),
        model,
        weights_sha256,
        strip_weights_sha256(config.strip),
        fingerprint(calibration.as_dict()) if calibration else "",
        own_contents(templates),
        ranges,
        parcels_sha256(config.output),
    )


@dataclass(frozen=True)
class UsedTemplate:
    """A template of a result: how the scan was registered to it, and whether it is in the field.

    ``registration`` is the kind (``fast``, ``affine``...); ``none`` if the network found the field.
    ``source``, ``citation`` and ``condition`` are those of ``Template``, ``sha256`` its content's;
    results of older versions tell no checksum.
    """

    name: str
    registration: str
    source: str = ""
    score: float | None = None
    in_field: bool = True
    sha256: str = ""
    citation: Citation | None = None
    condition: Condition | None = None

    def entry(self) -> dict[str, Any]:
        """The template's entry in the sidecar."""
        cited = {} if self.citation is None else {"Citation": _citation_entry(self.citation)}
        return {
            "Name": self.name,
            "Source": self.source,
            **({"SHA256": self.sha256} if self.sha256 else {}),
            **cited,
            **({"Condition": self.condition.given} if self.condition else {}),
            "Registration": self.registration,
            "Score": self.score,
            "InField": self.in_field,
        }

    @classmethod
    def read(cls, told: "_Reader") -> "UsedTemplate":
        """The template of an entry in the sidecar."""
        return cls(
            told.required("Name", str),
            told.required("Registration", str),
            told.required("Source", str),
            told.optional("Score", float),
            told.required("InField", bool),
            told.optional("SHA256", str) or "",
            _read_citation(told),
            Condition.read(told.optional("Condition", dict)),
        )


def _citation_entry(citation: Citation) -> dict[str, Any]:
    """A citation under the keys of TemplateFlow's ``template_description.json``."""
    return {
        "Name": citation.title,
        "Authors": list(citation.authors),
        "ReferencesAndLinks": list(citation.links),
    }


def _read_citation(told: "_Reader") -> Citation | None:
    if told.optional("Citation", dict) is None:
        return None
    entry = told.inner("Citation")
    authors, links = (
        tuple(map(str, entry.optional(key, list) or ()))
        for key in ("Authors", "ReferencesAndLinks")
    )
    return Citation(entry.optional("Name", str) or "", authors, links)


def _read_person(told: "_Reader") -> Person:
    known: dict[str | None, Sex] = {"F": "F", "M": "M"}
    return Person(told.optional("AgeYears", float), known.get(told.optional("Sex", str)))


@dataclass(frozen=True)
class Provenance:
    """What made a segmentation: enough to make it again, and to know that it need not be.

    Written to and read from the sidecar of the label map.  ``settings`` are those of the recipe.
    ``source`` is the scan's BIDS URI or file name, ``source_sha256`` its checksum.  ``seconds`` are
    by stage.  ``parcellation`` is a name.  ``gaps`` names the keys of the sidecar that could not be
    read.
    """

    fingerprint: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    weights_sha256: str = ""
    steps: int = 0
    seed: int = 0
    tile: int | None = None
    device: str = ""
    precision: str = ""
    parcellation: str = BASE
    registration_threads: int | None = None
    templates: tuple[UsedTemplate, ...] = ()
    skull_stripping: str = ""
    bias_ratio: float | None = None
    person: Person = Person()
    source: str = ""
    source_sha256: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    expected_dice: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    run_id: str = ""
    gaps: tuple[str, ...] = ()

    @classmethod
    def of(cls, result: Result, source: str, *, run_id: str = "") -> "Provenance":
        """The provenance of a result that this process has made."""
        prepared, segmentation = result.prepared, result.segmentation
        transforms = {r.template.name: r.transform for r in prepared.registrations}
        in_field = {r.template.name for r in sound(prepared.registrations)}
        recipe = make_recipe(
            result.config,
            prepared.templates,
            result.model.name,
            result.model.sha256,
            result.calibration,
            result.ranges,
        )
        return cls(
            fingerprint=recipe.fingerprint,
            settings=recipe.settings(),
            version=cadiff_cli.__version__,
            packages=software(),
            model=result.model.name,
            weights_sha256=result.model.sha256,
            steps=segmentation.steps,
            seed=segmentation.seed,
            tile=segmentation.tile,
            device=segmentation.device,
            precision=segmentation.precision,
            parcellation=segmentation.parcellation.name,
            registration_threads=registration_threads() if transforms else None,
            templates=tuple(
                UsedTemplate(
                    template.name,
                    transform.kind if transform else "none",
                    machine.without_home(template.source),
                    transform.score if transform else None,
                    template.name in in_field,
                    template.sha256,
                    template.citation,
                    template.condition,
                )
                for template in prepared.templates
                for transform in [transforms.get(template.name)]
            ),
            skull_stripping=prepared.stripped.method,
            bias_ratio=prepared.stripped.bias_ratio,
            person=prepared.scan.person,
            source=source,
            source_sha256=prepared.scan.sha256 or sha256(prepared.scan.path),
            seconds=dict(result.seconds),
            expected_dice=about_expected_dice(result),
            notes=result.notes,
            run_id=run_id,
        )

    @classmethod
    def read(cls, sidecar: Mapping[str, Any]) -> "Provenance | None":
        """The provenance that a sidecar tells; None if it has no fingerprint, so is not cadiff's.

        A value that is absent, or of another type, is empty and one of the ``gaps``: people edit
        sidecars by hand.
        """
        top = _Reader(sidecar)
        if not (fingerprint := top.optional("Fingerprint", str)):
            return None
        model = top.inner("Model")
        maker = next(iter(top.objects("GeneratedBy")), top.inner("GeneratedBy"))
        seconds = top.required("Seconds", dict).items()
        templates = tuple(map(UsedTemplate.read, top.objects("Templates")))
        return cls(
            fingerprint=fingerprint,
            settings=top.required("Settings", dict),
            version=maker.required("Version", str),
            packages=top.required("Packages", dict),
            model=model.required("Name", str),
            weights_sha256=model.required("WeightsSHA256", str),
            steps=top.required("Steps", int),
            seed=top.required("Seed", int),
            tile=top.optional("Tile", int),
            device=top.optional("Device", str) or "",
            precision=top.optional("Precision", str) or "",
            parcellation=top.optional("Parcellation", str) or BASE,
            registration_threads=top.optional("RegistrationThreads", int),
            templates=templates,
            skull_stripping=top.required("SkullStripping", str),
            bias_ratio=top.optional("BiasRatio", float),
            person=_read_person(top),
            source=top.optional("SpatialReference", str) or "",
            source_sha256=top.optional("SourceSHA256", str) or "",
            seconds={stage: s for stage, s in seconds if isinstance(s, int | float)},
            expected_dice=top.optional("ExpectedDice", dict) or {},
            notes=read_notes(sidecar),
            run_id=top.optional("RunId", str) or "",
            gaps=tuple(dict.fromkeys(top.gaps)),
        )

    def sidecar(self) -> dict[str, Any]:
        """The entries of the label map's sidecar; ``read`` gives the same provenance back."""
        return {
            "GeneratedBy": [generated_by() | {"Version": self.version}],
            "Packages": dict(self.packages),
            "Model": {"Name": self.model, "WeightsSHA256": self.weights_sha256},
            "Steps": self.steps,
            "Seed": self.seed,
            "Tile": self.tile,
            "Device": self.device,
            "Precision": self.precision,
            "Parcellation": self.parcellation,
            "RegistrationThreads": self.registration_threads,
            "Templates": [used.entry() for used in self.templates],
            "SkullStripping": self.skull_stripping,
            "BiasRatio": self.bias_ratio,
            "AgeYears": self.person.age_years,
            **({"Sex": self.person.sex} if self.person.sex else {}),
            "Settings": dict(self.settings),
            "Fingerprint": self.fingerprint,
            "SourceSHA256": self.source_sha256,
            "Seconds": dict(self.seconds),
            "ExpectedDice": dict(self.expected_dice),
            **told(self.notes),
            **({"RunId": self.run_id} if self.run_id else {}),
            "SpatialReference": self.source,
        }

    def check(self) -> None:
        """Raise ``DataError`` if the sidecar had gaps: do not state values that nobody knows."""
        if self.gaps:
            raise DataError(
                f"the sidecar of the label map lacks {', '.join(self.gaps)}",
                "restore it, or segment the scan again with --overwrite",
            )

    def differs(self, recipe: Recipe) -> str:
        """The settings in which ``recipe`` differs, as ``sample.steps 5 -> 1``; empty if none does.

        A result made with the user's own mask counts as the same if nothing but the mask and the
        standard spaces differs: a mask that was corrected by hand must not be lost.
        """
        if self.fingerprint == recipe.fingerprint:
            return ""
        made, wanted = dict(self.settings), recipe.settings()
        if not (self.has_own_mask and recipe.config.strip.mask is None):
            return "; ".join(_differences(made, wanted)[:3]) or "other settings"
        made |= {key: wanted[key] for key in ("strip", "strip_sha256", "output_spaces")}
        if made == wanted:
            return ""
        changes = [*_differences(made, wanted)[:3], "a mask of somebody's own would be lost"]
        return "; ".join(changes)

    @property
    def way(self) -> str:
        """The fingerprint, but alike for people who have atlases of their own (conditional)."""
        own = {used.name for used in self.templates if used.condition}
        if not own:
            return self.fingerprint
        contents = _Reader(self.settings).optional("template_sha256", dict) or {}
        return fingerprint(
            {
                **self.settings,
                "template": [None if x.name in own else x.name for x in self.templates],
                "template_sha256": {k: v for k, v in contents.items() if k not in own},
            }
        )

    @property
    def has_own_mask(self) -> bool:
        """Whether the user gave the brain mask."""
        return self.skull_stripping == StripMethod.MASK_FILE

    @property
    def is_registered(self) -> bool:
        """Whether the field comes from registrations, not from the network."""
        return any(used.registration != "none" for used in self.templates)

    @property
    def in_field(self) -> tuple[UsedTemplate, ...]:
        """The templates whose registrations share in the field."""
        return tuple(used for used in self.templates if used.in_field)

    @property
    def registration_score(self) -> float | None:
        """The lowest score of the registrations; None without any."""
        return min((x.score for x in self.templates if x.score is not None), default=None)

    @property
    def flip(self) -> bool:
        """Whether the last step was averaged with that of the mirrored brain."""
        return bool(_Reader(self.settings).inner("sample").optional("flip", bool))

    @property
    def samples(self) -> int:
        """Number of predictions that were averaged."""
        return _Reader(self.settings).inner("sample").optional("samples", int) or 1

    @property
    def ranges(self) -> str:
        """Fingerprint of the age ranges that the user gave; empty for those that ship."""
        return _Reader(self.settings).optional("ranges", str) or ""

    @property
    def finer(self) -> str:
        """The name of the finer parcellation whose labels lie beside the others; empty if none."""
        return _Reader(self.settings).optional("parcellation", str) or ""

    @property
    def output_spaces(self) -> tuple[str, ...]:
        """Standard spaces that the result was resampled to."""
        return tuple(map(str, _Reader(self.settings).optional("output_spaces", list) or ()))


def told(notes: Iterable[Note]) -> dict[str, Any]:
    """Entries of a sidecar: ``Warnings`` for people, ``WarningCodes`` in the same order.

    Nobody's home is told.
    """
    notes = list(notes)
    return {
        "Warnings": [machine.without_home(text) for text in texts(notes)],
        "WarningCodes": [note.code.value for note in notes],
    }


def read_notes(sidecar: Mapping[str, Any]) -> tuple[Note, ...]:
    """The notes of a sidecar; all of unknown code where it has no codes, as before them."""
    top = _Reader(sidecar)
    warnings = top.optional("Warnings", list) or []
    codes = top.optional("WarningCodes", list) or []
    if len(codes) != len(warnings):
        codes = [NoteCode.UNKNOWN] * len(warnings)
    return tuple(
        Note(NoteCode(code), str(text)) for code, text in zip(codes, warnings, strict=True)
    )


T = TypeVar("T")


class _Reader:
    """Values of a JSON object by type; ``gaps`` collects the required ones that it lacks."""

    def __init__(self, values: object, within: str = "", gaps: list[str] | None = None) -> None:
        self.values = values if isinstance(values, Mapping) else {}
        self.within = within
        self.gaps = [] if gaps is None else gaps

    def optional(self, key: str, kind: type[T]) -> T | None:
        """A value of this type; None if there is none."""
        value = self.values.get(key)
        if kind is float and type(value) is int:
            value = float(value)
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value if isinstance(value, kind) else None

    def required(self, key: str, kind: type[T]) -> T:
        """A value of this type; an empty one, and a gap, if there is none."""
        if (value := self.optional(key, kind)) is not None:
            return value
        self.gaps.append(f"{self.within}{key}")
        return kind()

    def inner(self, key: str) -> "_Reader":
        """The object under ``key``."""
        return _Reader(self.values.get(key), f"{self.within}{key}.", self.gaps)

    def objects(self, key: str) -> list["_Reader"]:
        """The objects of the list under ``key``."""
        return [_Reader(x, f"{key}.", self.gaps) for x in self.required(key, list)]


def _differences(made: object, wanted: object, name: str = "") -> list[str]:
    """The leaves in which two nested dictionaries differ."""
    if isinstance(made, dict) and isinstance(wanted, dict):
        return [
            text
            for key in {**wanted, **made}
            for text in _differences(made.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if made == wanted else [f"{name} {' -> '.join(_apart(str(made), str(wanted)))}"]


def _apart(*texts: str, longest: int = 24) -> list[str]:
    """Texts that differ; of long ones the part that begins shortly before they do."""
    alike = sum(1 for _ in takewhile(lambda at: len(set(at)) == 1, zip(*texts, strict=False)))
    start = max(0, alike - longest // 3) if max(map(len, texts)) > longest else 0
    end = start + longest
    before = "..." if start else ""
    return [f"{before}{text[start:end]}{'...' if text[end:] else ''}" for text in texts]


def mask_provenance(scan: Scan, stripped: Stripped, config: StripConfig) -> dict[str, Any]:
    """What made a brain mask that stands alone, with the settings of ``config``."""
    learned = stripped.method is StripMethod.NET
    return {
        "GeneratedBy": [generated_by()],
        "Packages": software(),
        "BiasRatio": stripped.bias_ratio,
        **({"WeightsSHA256": strip_weights_sha256(config)} if learned else {}),
        "SourceSHA256": scan.sha256 or sha256(scan.path),
    }


def registration_threads() -> int | None:
    """Threads of ANTs' registration; more than one make it change in the last digits."""
    number = os.environ.get(ITK_THREADS, "")
    return int(number) if number.isdigit() else None


def software() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "antspyx", "nibabel", "numpy", "scipy", "monai"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
