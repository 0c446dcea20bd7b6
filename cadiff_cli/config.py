"""Settings, one frozen dataclass per stage.  ``fingerprint`` names a combination of them."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from cadiff_cli import __version__

REVISION = 8
"""Raise it whenever the same settings give other results: none of before are taken for theirs."""


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
class StripConfig:
    """How the brain is found: ``auto``, ``net``, ``template``, ``none``; a ``mask`` overrides."""

    method: str = "auto"
    mask: Path | None = None


@dataclass(frozen=True)
class RegisterConfig:
    """Which named settings (``data/registration/*.json``, or ``none``) and seed ANTs runs with."""

    name: str = "fast"
    seed: int = 0


@dataclass(frozen=True)
class SampleConfig:
    """How labels are denoised.

    ``steps`` DDIM steps from noise drawn with ``seed``.  ``flip`` averages the last step with that
    of the mirrored brain.  ``tile`` is the edge (voxels at 1 mm) of overlapping tiles, or None for
    the whole volume at once.  ``samples`` predictions, from noise of as many seeds, are averaged.
    ``uncertainty`` asks for a map of it, which several samples give unasked.
    """

    steps: int = 5
    seed: int = 0
    flip: bool = True
    tile: int | None = None
    device: str = "auto"
    posteriors: bool = False
    samples: int = 1
    uncertainty: bool = False


@dataclass(frozen=True)
class Config:
    """Everything that decides a segmentation, but for the template and the weights."""

    strip: StripConfig = StripConfig()
    register: RegisterConfig = RegisterConfig()
    sample: SampleConfig = SampleConfig()


@dataclass(frozen=True)
class Recipe:
    """What a result was, or will be, made with.  Results of equal recipes may share a dataset.

    ``template`` holds names, joined by ``+``, never ``auto``; ``template_sha256`` the (name,
    checksum) of those whose name does not tell their content.  ``strip_sha256`` is that of the
    network which may have found the brain, ``calibration`` the fingerprint of what calibrates the
    expected Dice; both are empty without one.  ``spaces`` are the standard spaces that results are
    carried into; ``field`` tells whether the distance field is written.
    """

    config: Config
    template: str
    model: str
    weights_sha256: str
    strip_sha256: str = ""
    calibration: str = ""
    spaces: tuple[str, ...] = ()
    field: bool = False
    template_sha256: tuple[tuple[str, str], ...] = ()

    def settings(self) -> dict[str, Any]:
        """Plain values that decide the result: neither the device nor where files lie."""
        plain = as_dict(self.config)
        plain["sample"].pop("device")
        if self.config.strip.mask is not None:
            plain["strip"]["mask"] = self.config.strip.mask.name
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
            "output_spaces": list(self.spaces),
            "field": self.field,
            **plain,
        }

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
