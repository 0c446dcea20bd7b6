"""Settings, one frozen dataclass per stage.  ``fingerprint`` names a combination of them."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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

    ``steps`` DDIM steps from noise drawn with ``seed``.  ``flip`` averages the prediction with that
    of the mirrored brain.  ``tile`` is the edge (voxels at 1 mm) of overlapping tiles, or None for
    the whole volume at once.
    """

    steps: int = 5
    seed: int = 0
    flip: bool = True
    tile: int | None = None
    device: str = "auto"
    posteriors: bool = False


@dataclass(frozen=True)
class Config:
    """Everything that decides a segmentation, but for the template and the weights."""

    strip: StripConfig = StripConfig()
    register: RegisterConfig = RegisterConfig()
    sample: SampleConfig = SampleConfig()


def as_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of a settings object, fit for JSON."""
    plain = dataclasses.asdict(config)
    return dict(json.loads(json.dumps(plain, default=str)))


def fingerprint(values: Any) -> str:
    """Twelve hex digits that change when any of these plain values changes."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
