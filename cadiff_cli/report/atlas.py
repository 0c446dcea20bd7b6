"""The page of one atlas, or of the atlases of several ages: made while the atlases are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage

from cadiff_cli.io.atlases import people_in_words
from cadiff_cli.io.files import write_text
from cadiff_cli.io.templates import folder_of
from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.products import Atlas
from cadiff_cli.report.case import around
from cadiff_cli.report.figures import (
    COLOURS,
    Outline,
    Plane,
    cut,
    grey,
    outline,
    outlined,
    planes,
)
from cadiff_cli.report.page import refuse_foreign_page
from cadiff_cli.report.render import render_page
from cadiff_cli.spatial.deformation import on_grid
from cadiff_cli.spatial.grid import Grid
from cadiff_cli.spatial.resample import resample

SLICES = 2
"""Of each orientation."""
LINES_MM = 10.0
"""Distance of the grid's lines in the base."""
MOST_CHANGE = 2.0
"""Factor by which a place is larger, or smaller, in the full colour."""
SMALLER, LARGER = np.array((40.0, 120.0, 255.0)), np.array((255.0, 70.0, 40.0))
CHART = ("Lateral Ventricle", "Hippocampus", "Cerebral Cortex", "Cerebral White Matter")
"""Structures of the curves over age, left and right together."""
WIDTH, HEIGHT = 560, 200
"""Of a curve's drawing area."""


@dataclass(frozen=True)
class Line:
    """A structure, left and right together, volumes in ml; ``sd_ml`` is the samples' spread."""

    name: str
    color: str
    base_ml: float
    ml: float
    mean_ml: float | None = None
    sd_ml: float | None = None

    @property
    def percent(self) -> float | None:
        """By how much the atlas is larger than the base."""
        return 100 * (self.ml / self.base_ml - 1) if self.base_ml else None


@dataclass(frozen=True)
class Panel:
    """What the page shows of one atlas."""

    name: str
    people: str
    folder: str
    age_years: float | None
    brain: list[Plane]
    lines: list[Plane]
    change: list[Plane]
    volumes: list[Line]
    facts: list[tuple[str, object]]


class AtlasPage:
    """Collects pictures and numbers of atlases of one base, and writes ``OUT/tpl-NAME_X.html``.

    ``names`` are those of the atlases.  Raises ``OutputError`` if another program's page has this
    name.
    """

    def __init__(self, out: Path, names: Sequence[str]) -> None:
        first = folder_of(names[0])[1]
        last = folder_of(names[-1])[1].rpartition("-")[2]
        self.path = out / (f"{first}.html" if len(names) == 1 else f"{first}_to-{last}.html")
        self.panels: list[Panel] = []
        self.base: list[Plane] = []
        self.base_name = ""
        refuse_foreign_page(self.path)

    def add(
        self,
        atlas: Atlas,
        parcellation: Parcellation,
        samples: Sequence[Mapping[int, float]] = (),
    ) -> None:
        """Take what the page shows of an atlas; nothing of its arrays is kept."""
        base, template = atlas.base, atlas.template
        assert base.labels is not None and base.mask is not None  # noqa: PT018
        assert template.labels is not None
        near = around(base.mask)
        inside = resample(base.mask, near, order=0).data
        before = grey(resample(base.brain, near), inside)
        if not self.base:
            self.base_name = base.name
            codes = resample(base.labels, near, order=0).data
            self.base = planes(before, near, inside, SLICES, outlined(codes, parcellation))
        codes = resample(template.labels, near, order=0).data
        image = grey(resample(template.brain, near), codes > 0)
        brain = planes(
            image, near, inside, SLICES, outlined(codes, parcellation), partial(cut, before)
        )
        change = np.where(codes > 0, resample(atlas.log_jacobian, near).data, 0)
        self.panels.append(
            Panel(
                template.name,
                people_in_words(atlas),
                folder_of(template.name)[0],
                atlas.condition.age_years,
                brain,
                _grid_lines(atlas, image, near, inside, codes > 0),
                planes(coloured(image, change), near, inside, SLICES, lambda _axis, _index: ()),
                volume_lines(atlas, parcellation, samples),
                _facts(atlas, len(samples)),
            )
        )

    def write(self) -> Path:
        """Write the page, and return its path."""
        text = render_page(
            "atlas.html.j2",
            title=self.panels[0].people if len(self.panels) == 1 else "Atlases by age",
            base=self.base,
            base_name=self.base_name,
            panels=self.panels,
            curves=volume_charts(self.panels),
            most_change=MOST_CHANGE,
            lines_mm=LINES_MM,
        )
        write_text(self.path, text)
        return self.path


def coloured(image: np.ndarray, log_jacobian: np.ndarray) -> np.ndarray:
    """(X, Y, Z, 3) uint8: a grey image, blue where the atlas is smaller and red where larger."""
    share = np.clip(log_jacobian / math.log(MOST_CHANGE), -1, 1)[..., None].astype(np.float32)
    colour = np.where(share < 0, SMALLER, LARGER)
    weight = np.sqrt(abs(share)) * 0.85
    return np.asarray(((1 - weight) * image[..., None] + weight * colour).astype(np.uint8))


def _grid_lines(
    atlas: Atlas, image: np.ndarray, near: Grid, inside: np.ndarray, brain: np.ndarray
) -> list[Plane]:
    """A grid that is straight in the base, as it lies in the atlas."""
    backward = on_grid(atlas.deformation.backward_mm, atlas.deformation.grid, near)
    world = np.moveaxis(near.to_world(np.moveaxis(np.indices(near.shape), 0, -1)), -1, 0)
    places = world + backward
    drawn_in = ndimage.binary_dilation(brain, iterations=3)

    def drawn(axis: int, index: int) -> list[Outline]:
        found, shown = [], cut(drawn_in, axis, index)
        for channel in (a for a in range(3) if a != axis):
            values = np.where(shown, cut(places[channel], axis, index), np.nan)
            if not np.isfinite(values).any():
                continue
            low, high = (np.ceil(f(values) / LINES_MM) for f in (np.nanmin, np.nanmax))
            levels = LINES_MM * np.arange(low, high)
            path = "".join(outline(values, float(level)) for level in levels)
            found.append(Outline("xyz"[channel], COLOURS[channel], path))
        return found

    return planes(image, near, inside, SLICES, drawn)


def volume_lines(
    atlas: Atlas, parcellation: Parcellation, samples: Sequence[Mapping[int, float]] = ()
) -> list[Line]:
    """Volumes of the structures, left and right together, in ml."""
    lines = []
    for members in parcellation.joined:
        codes = [s.code for s in members if s.code in atlas.volumes_mm3]
        if not codes:
            continue
        ml, base_ml = (
            sum(volumes[code] for code in codes) / 1000
            for volumes in (atlas.volumes_mm3, atlas.base_volumes_mm3)
        )
        drawn = [sum(sample[code] for code in codes) / 1000 for sample in samples]
        mean, sd = (float(np.mean(drawn)), float(np.std(drawn, ddof=1))) if drawn else (None, None)
        lines.append(Line(members[0].title, members[0].color, base_ml, ml, mean, sd))
    return lines


def _facts(atlas: Atlas, samples: int) -> list[tuple[str, object]]:
    frame = atlas.template.frame
    forward = atlas.deformation.forward_mm
    return [
        ("Template", atlas.template.name),
        ("SHA-256", atlas.template.sha256),
        ("Base", f"{atlas.base.name} ({atlas.base.source})"),
        ("Network", f"{atlas.model}, SHA-256 {atlas.weights_sha256}"),
        (
            "Seed",
            "none: the centre of the condition's people" if atlas.seed is None else atlas.seed,
        ),
        ("Samples", samples),
        ("AC in the atlas, mm", ", ".join(f"{x:g}" for x in frame.ac_mm)),
        ("Largest displacement, mm", f"{np.linalg.norm(forward, axis=0).max():.1f}"),
    ]


@dataclass(frozen=True)
class VolumeChart:
    """Volume over age as an SVG line: ``dots`` are (x, y, text)."""

    name: str
    path: str
    dots: list[tuple[float, float, str]]
    low: str
    high: str
    base_y: float


def volume_charts(panels: Sequence[Panel]) -> list[VolumeChart]:
    """A curve for each structure of ``CHART``; none without several ages."""
    ages = [panel.age_years for panel in panels if panel.age_years is not None]
    if len(set(ages)) < 2:
        return []
    found = []
    for wanted in CHART:
        lines = [line for panel in panels for line in panel.volumes if line.name == wanted]
        if len(lines) != len(ages):
            continue
        values = np.array([line.ml for line in lines])
        low, high = min(values.min(), lines[0].base_ml), max(values.max(), lines[0].base_ml)
        span = max(high - low, 1e-6)
        x = WIDTH * (np.array(ages) - min(ages)) / (max(ages) - min(ages))
        y = HEIGHT * (high - values) / span
        points = [(round(float(a), 1), round(float(b), 1)) for a, b in zip(x, y, strict=True)]
        found.append(
            VolumeChart(
                lines[0].name,
                "M" + "L".join(f"{a} {b}" for a, b in points),
                [
                    (a, b, f"{age:g} years: {ml:.4g} ml")
                    for (a, b), age, ml in zip(points, ages, values, strict=True)
                ],
                f"{low:.4g} ml",
                f"{high:.4g} ml",
                round(float(HEIGHT * (high - lines[0].base_ml) / span), 1),
            )
        )
    return found
