"""Templates to train with: by name or folder, or one person (the paper's Table VI)."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cadiff_cli.config import fingerprint
from cadiff_cli.errors import DataError
from cadiff_cli.io.files import sha256
from cadiff_cli.io.formats import IMAGE_SUFFIXES, stem
from cadiff_cli.io.images import load_scan
from cadiff_cli.io.templates import PREFERRED, load_template, registry
from cadiff_cli.products import Frame, Template
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.spatial.resample import bounding_box
from cadiff_cli.stages.strip import stripped_brain


def is_person(name: str) -> bool:
    """Whether a template is given as somebody's scan."""
    return name.endswith(IMAGE_SUFFIXES)


def template_key(name: str) -> str:
    """Identifies a template: its name, content and coordinates."""
    if is_person(name):
        return fingerprint([stem(Path(name)), sha256(Path(name))])
    if name in registry():
        return fingerprint([name, registry()[name]])
    return fingerprint([name, load_training_template(name).sha256])


@lru_cache(maxsize=4)
def load_training_template(name: str) -> Template:
    """A template that ``load_template`` knows (never downloaded), or a stripped scan by its path.

    Raises what ``load_template`` and ``load_scan`` raise, ``DataError`` for a whole head.
    """
    return template_of_person(Path(name)) if is_person(name) else load_template(name, offline=True)


def template_of_person(path: Path) -> Template:
    """One person's brain as a template.

    Nobody has marked its AC: its brain's bounding box is laid over that of Colin27's extents, which
    puts the origin within a centimetre or so of it, and the midplane halfway between the sides.
    """
    t1 = load_scan(path).t1
    inside = stripped_brain(t1)
    if inside is None:
        raise DataError(f"{path.name} is not skull-stripped", "give a stripped brain as a template")
    box = bounding_box(inside.data)
    ends = t1.grid.to_world(np.array([[s.start, s.stop - 1] for s in box], dtype=float).T)
    extents: dict[str, Any] = {
        key: tuple(map(float, registry()[PREFERRED][key])) for key in ("low_mm", "high_mm")
    }
    middle = np.mean(list(extents.values()), axis=0)
    x, y, z = (float(v) for v in ends.mean(axis=0) - middle)
    brain = Volume(np.where(inside.data, t1.data, 0).astype(np.float32), t1.grid)
    return Template(stem(path), brain, Frame((x, y, z), **extents), source="person")
