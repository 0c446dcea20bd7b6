"""Settings, one frozen dataclass per stage.  ``fingerprint`` names a combination of them."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from cadiff_cli import __version__
from cadiff_cli.errors import UsageError

REVISION = 11
"""Increase when unchanged settings give other results; older results then count as outdated."""


TOLERANCE_MM = 1.0
"""Surfaces that lie so near to each other agree (NSD)."""
DEFAULT_BRAIN = "brain-mask"
BRAIN_FOR = {"cadiff-synth": "brain-mask-synth"}
"""The network that finds the brain in a head, and those for labels of any contrast: like these they
learnt from label maps alone, and are free for all use."""
PARCELS = "nmm138"
"""The finer parcellation that ``--parcellation`` offers, and the release of its network."""


class StripMethod(StrEnum):
    """What found the brain.  Files hold these values: do not change them."""

    NET = "net"
    TEMPLATE = "template"
    AS_IS = "none"
    MASK_FILE = "mask file"

    @property
    def found_by(self) -> str:
        """The method in words."""
        return {
            StripMethod.NET: "the network",
            StripMethod.TEMPLATE: "the template's mask",
            StripMethod.AS_IS: "what is not background: nothing was stripped",
            StripMethod.MASK_FILE: "the mask that was given",
        }[self]


@dataclass(frozen=True)
class Option:
    """How a command line offers a field.

    ``names`` are its flags (default: the field's own name).  Numbers lie between ``low`` and
    ``high``; a word is one of ``choices``.
    """

    help: str
    names: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    low: int | None = None
    high: int | None = None
    metavar: str | None = None

    def refuse(self, flag: str, value: Any) -> None:
        """Raise ``UsageError`` unless the option called ``flag`` allows ``value``."""
        if self.choices and value not in self.choices:
            raise UsageError(f"{flag} is {value!r}", f"use {', '.join(self.choices)}")
        if self.low is not None and value < self.low:
            raise UsageError(f"{flag} is {value}", f"use {self.low} or more")
        if self.high is not None and value > self.high:
            raise UsageError(f"{flag} is {value}", f"use {self.high} or less")


def option(default: Any, help: str, *names: str, **limits: Any) -> Any:
    """A dataclass field that is an option of the command line too (``cli/options``)."""
    return field(default=default, metadata={"option": Option(help, names, **limits)})


def flags_of(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The flags of a field that is an option."""
    about: Option = field.metadata["option"]
    return about.names or (f"--{field.name.replace('_', '-')}",)


MOST_SEED = 2**31 - 2
"""The largest seed that every generator of random numbers takes."""


def seed_option() -> Any:
    """The seed is one option for registration and noise."""
    names = ("--seed", "--random-seed")
    return option(0, "Seed of registration and noise.", *names, low=0, high=MOST_SEED)


@dataclass(frozen=True)
class StripConfig:
    """How the brain is found: ``auto``, ``net``, ``template``, ``none``; a ``mask`` overrides.

    ``model`` names the network, None the one that suits the labels' (``for_model``).
    """

    method: str = option(
        "auto",
        "auto: strip a whole head with the network, leave a stripped scan. net: always strip with"
        " the network. template: use the mask of Colin27. none: the scan is stripped already.",
        "--skull-strip",
        choices=("auto", "net", "template", "none"),
    )
    mask: Path | None = option(None, "Your own brain mask (T1's grid).")
    model: str | None = option(
        None,
        "The network that finds the brain: a released name, or a file of cadiff train-mask"
        " [default: brain-mask; with --model cadiff-synth brain-mask-synth, for any contrast].",
        "--strip-model",
    )

    def __post_init__(self) -> None:
        """Take a mask's name for its path."""
        if self.mask is not None:
            object.__setattr__(self, "mask", Path(self.mask))

    @property
    def network(self) -> str:
        """The network that finds the brain."""
        return self.model or DEFAULT_BRAIN


@dataclass(frozen=True)
class RegisterConfig:
    """Which named settings (``data/registration/*.json``, or ``none``) and seed ANTs runs with."""

    name: str = option(
        "fast",
        "fast: affine and SyN. fine: iterations at 2 mm too, about three times as slow. affine: no"
        " SyN, less accurate. none: no registration, a quick look: the network finds the field;"
        " Dice is 0.04 to 0.05 lower, and 0.1 where a head lies tilted by 30 degrees.",
        "--registration",
        choices=("fast", "fine", "affine", "none"),
    )
    seed: int = seed_option()

    @property
    def wanted(self) -> bool:
        """Whether the brain is registered to templates; if not, the network finds the field."""
        return self.name != "none"

    @property
    def elsewhere(self) -> "RegisterConfig":
        """How to register for another purpose than the field: the usual way if none is wanted."""
        return self if self.wanted else RegisterConfig(seed=self.seed)


@dataclass(frozen=True)
class SampleConfig:
    """How labels are denoised.

    ``steps`` DDIM steps from noise drawn with ``seed``.  ``flip`` asks the trunk about the mirrored
    brain too in the last step.  ``tile`` is the edge (voxels at 1 mm) of overlapping tiles, or None
    for the whole volume at once: tiles change probabilities a little, so they belong here, not to
    ``Machine``.  ``samples`` predictions, from noise of as many seeds, are averaged.
    """

    steps: int = option(
        5,
        "Diffusion steps. 0: registration only, without the network; the most frequent label at"
        " each position.",
        low=0,
        high=1000,
    )
    seed: int = seed_option()
    samples: int = option(
        1,
        "Average predictions from this many starts of random noise; also writes how far the volumes"
        " of these vary.",
        low=1,
        high=100,
    )
    flip: bool = option(
        True,
        "In the last step, also predict the mirrored brain and take the mean [default: on].",
    )
    tile: int | None = option(
        None,
        "Compute in cubes of this edge, in mm (a multiple of 32): less memory [default: whole"
        " volume; cubes of 96 where memory is short].",
        low=32,
    )


@dataclass(frozen=True)
class OutputConfig:
    """The files that a run writes besides label map, mask, brain, transforms and volumes.

    ``codes`` may ask for a second label map; ``posteriors`` is the 4-D probseg; ``uncertainty`` the
    entropy of the probabilities, which several samples give unasked; ``parcellation`` names a finer
    one, whose labels lie beside the others; ``field`` is the distance field; ``spaces`` are
    standard spaces (``NAME[:res-N]``) that results are resampled to; ``report`` is the page.
    """

    codes: str = option(
        "cadiff",
        "freesurfer: also write the labels with codes of FreeSurfer's table alone.",
        choices=("cadiff", "freesurfer"),
    )
    posteriors: bool = option(False, "Also write the probabilities of all structures (4-D).")
    uncertainty: bool = option(
        False, "Also write a map of uncertainty (--samples 2 and more always do)."
    )
    parcellation: str | None = option(
        None,
        "Also divide the cortex: nmm138 writes a second label map with 98 parcels.",
        choices=(PARCELS,),
    )
    field: bool = option(
        False, "Also write the distance field: each voxel's place in the template.", "--save-field"
    )
    spaces: tuple[str, ...] = option(
        (),
        "Also resample results to MNI152NLin2009cAsym, MNIColin27...",
        "--output-spaces",
        metavar="SPACE[:res-N]...",
    )
    report: bool = option(True, "Write pages to look at (OUT/SCAN.html) [default: on].")

    def __post_init__(self) -> None:
        """Each space is wanted once."""
        object.__setattr__(self, "spaces", tuple(dict.fromkeys(self.spaces)))


@dataclass(frozen=True)
class Config:
    """Everything that decides a result, but for the template and the weights."""

    strip: StripConfig = StripConfig()
    register: RegisterConfig = RegisterConfig()
    sample: SampleConfig = SampleConfig()
    output: OutputConfig = OutputConfig()

    def for_model(self, model: str) -> "Config":
        """The same with the network that finds brains for ``model``, unless one is named."""
        if self.strip.model or model not in BRAIN_FOR:
            return self
        return dataclasses.replace(
            self, strip=dataclasses.replace(self.strip, model=BRAIN_FOR[model])
        )

    def check(self) -> None:
        """Raise ``UsageError`` for settings beyond their limits, or that contradict one another."""
        for part in (self.strip, self.register, self.sample, self.output):
            for offered in dataclasses.fields(part):
                about, value = offered.metadata.get("option"), getattr(part, offered.name)
                if about and value is not None:
                    about.refuse(flags_of(offered)[0], value)
        sample = self.sample
        if sample.tile is not None and sample.tile % 32:
            raise UsageError(f"--tile is {sample.tile}", "use a multiple of 32")
        if sample.samples > 1 and not sample.steps:
            raise UsageError(
                "--samples needs a step", "the prior (--steps 0) gives one answer: leave one out"
            )
        if self.register.wanted:
            return
        if self.output.field or not sample.steps:
            raise UsageError(
                "--save-field and --steps 0 need a registration", "leave --registration none out"
            )
        if self.output.parcellation:
            raise UsageError(
                "--parcellation needs a registration: the field finds the parcels",
                "leave --registration none out",
            )


@dataclass(frozen=True)
class Machine:
    """Where a scan is computed.  It never decides a result: fingerprints do not know it."""

    device: str = option("auto", "auto (CUDA if present, else cpu), cpu, cuda, cuda:1...")
    threads: int | None = option(None, "CPU threads for the network.", low=1)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A wish to segment, whichever scans: the settings, and names that are not looked up yet.

    ``work_dir`` is the folder for temporary files (default: the system's).
    """

    config: Config = Config()
    template: str = option(
        "auto",
        "MNIColin27, MNI152NLin2009aSym (embedded), another of TemplateFlow's such as"
        " MNIPediatricAsym:cohort-5, or a folder in its layout; of several, joined by +, the field"
        " is the mean. auto: Colin27, if it is available, and the embedded one. conditional: the"
        " atlas of the person's age and sex.",
        "--template",
        "--atlas",
    )
    atlas_model: str = option("cadiff-atlas", "Makes the atlases of --template conditional.")
    model: str = option("cadiff-malc", "cadiff-malc; cadiff-synth, for any contrast; or a file.")
    offline: bool = option(False, "Never try to download a template.")
    ranges: Path | None = option(
        None,
        "Percentiles by age of your own people: a file of cadiff ranges train [default: those that"
        " ship].",
    )
    machine: Machine = Machine()
    work_dir: Path | None = option(
        None, "Folder for temporary files [default: the system's].", "--work-dir", "-w"
    )
    overwrite: bool = option(
        False,
        "Replace earlier results, and files of others that have their names; cadiff run: results of"
        " other settings alone.",
    )


@dataclass(frozen=True)
class Recipe:
    """What a result was, or will be, made with.  Results of equal recipes may share a dataset.

    ``template`` holds names, joined by ``+``, never ``auto``; ``template_sha256`` the (name,
    checksum) of those whose name does not tell their content.  ``strip_sha256`` is that of the
    network which may have found the brain, ``calibration`` the fingerprint of what calibrates the
    expected Dice, ``parcels_sha256`` the checksum of the network that names parcels; all are empty
    without one.  ``ranges`` is the fingerprint of age ranges that the user gave, empty for those
    that ship.
    """

    config: Config
    template: str
    model: str
    weights_sha256: str
    strip_sha256: str = ""
    calibration: str = ""
    template_sha256: tuple[tuple[str, str], ...] = ()
    ranges: str = ""
    parcels_sha256: str = ""

    def settings(self) -> dict[str, Any]:
        """Plain values that decide the result; neither its page nor where files lie.

        Keys and their places stay as they are: results that are finished hold a checksum of them.
        """
        plain = as_dict(self.config)
        if self.config.strip.mask is not None:
            plain["strip"]["mask"] = self.config.strip.mask.name
        del plain["strip"]["model"]  # strip_sha256 tells its content, by whatever name
        sample, output = plain["sample"], plain.pop("output")
        sample |= {
            "posteriors": output["posteriors"],
            "samples": sample.pop("samples"),
            "uncertainty": output["uncertainty"],
        }
        return {
            "version": __version__,
            "revision": REVISION,
            "template": self.template,
            # Absent for shipped ones, so that results from before it was told are still known.
            **({"template_sha256": dict(self.template_sha256)} if self.template_sha256 else {}),
            "model": self.model,
            "weights_sha256": self.weights_sha256,
            "strip_sha256": self.strip_sha256,
            "calibration": self.calibration,
            **({"ranges": self.ranges} if self.ranges else {}),
            "output_spaces": sorted(output["spaces"]),
            "field": output["field"],
            **({"codes": output["codes"]} if output["codes"] != OutputConfig.codes else {}),
            **(
                {"parcellation": output["parcellation"], "parcels_sha256": self.parcels_sha256}
                if output["parcellation"]
                else {}
            ),
            **plain,
        }

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hex digits that change when any of the settings changes."""
        return fingerprint(self.settings())


def as_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of a settings object, fit for JSON."""
    plain = dataclasses.asdict(config)
    return dict(json.loads(json.dumps(plain, default=str)))


def fingerprint(values: Any) -> str:
    """Twelve hex digits that change when any of these plain values changes."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
