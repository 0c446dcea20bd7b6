"""How large structures are in the people the network was trained on.

``data/ranges/PARCELLATION.json`` is written by ``tools/measure_plausible.py`` from their manual
labels.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean, stdev

from cadiff_cli.data import shipped
from cadiff_cli.labels.parcellation import BASE, Parcellation, load_parcellation

ADULT_YEARS = 18
AGE_GROUPS = {"under 40": (0.0, 40.0), "40 to 65": (40.0, 65.0), "over 65": (65.0, 999.0)}
"""Least age, and the age that is too old."""
WIDE = 3.5
"""Standard deviations that are still plausible: one in two thousand measures lies outside."""
LEAST_ASYMMETRY = 10.0
"""Per cent by which any pair may differ: a network errs more than the hand that drew labels."""
UNKNOWN_LOG_SD = 0.2
"""Spread of a size, as that of its logarithm, where nobody was measured."""
FEWEST = 5
"""People without whom a spread means nothing."""


@dataclass(frozen=True)
class Range:
    """From ``low`` to ``high``, around ``centre``."""

    low: float
    centre: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    @property
    def log_sd(self) -> float:
        """Standard deviation of the logarithms of sizes that ``measure`` gave this range."""
        return math.log(self.high / self.low) / (2 * WIDE)


@dataclass(frozen=True)
class Ranges:
    """Plausible values by structure name; empty where nothing was measured.

    ``percent_brain`` is the share of all structures but vessels; ``asymmetry_percent`` is listed
    under the left structure.  ``people`` says who was measured, ``ages`` how old the youngest and
    the oldest of them were.
    """

    people: str
    percent_brain: Mapping[str, Range]
    asymmetry_percent: Mapping[str, Range]
    ages: tuple[float, float] | None = None

    @property
    def of_ages(self) -> str:
        """Whose ranges they are, as ``adults of 18 to 90 years``; empty if that is unknown."""
        if self.ages is None:
            return ""
        low, high = self.ages
        people = "adults" if low >= ADULT_YEARS else "people"
        return f"{people} of {low:.0f} to {high:.0f} years"

    def log_sd(self, name: str) -> float:
        """Spread of a structure's size among known people, as that of its logarithm.

        Where nothing was measured, because somebody lacked it, it is that of the most variable.
        """
        if name in self.percent_brain:
            return self.percent_brain[name].log_sd
        return max((span.log_sd for span in self.percent_brain.values()), default=UNKNOWN_LOG_SD)


def brain_mm3(volumes: Mapping[str, float], parcellation: Parcellation) -> float:
    """Sum of all structures but vessels."""
    return sum(volumes.get(s.name, 0.0) for s in parcellation.structures if s.is_tissue)


def asymmetry(left: float, right: float) -> float | None:
    """Difference of left and right in per cent of their mean; None if both are absent.

    >>> asymmetry(3.0, 1.0)
    100.0
    """
    return 200 * (left - right) / (left + right) if left + right else None


def load_ranges(parcellation: Parcellation) -> Ranges:
    """The ranges of a parcellation, if it was measured.

    For a finer one that has all of ``BASE``'s brain they are those of ``BASE``; ``base_volumes``
    brings its volumes there.
    """
    own = _stored(parcellation.name)
    if own.percent_brain:
        return own
    return _stored(BASE) if covers_base(parcellation) else own


def covers_base(parcellation: Parcellation) -> bool:
    """Whether the structures of ``BASE`` can be put together from this one's, but for vessels."""
    tissue = {s.code for s in load_parcellation(BASE).structures if s.is_tissue}
    return parcellation.name == BASE or {s.parent for s in parcellation.structures} >= tissue


@cache
def _stored(name: str) -> Ranges:
    """The ranges of the package for the parcellation ``name``; empty ones if it has none."""
    path = shipped(f"ranges/{name}.json")
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def read(key: str) -> dict[str, Range]:
        return {name: Range(*values) for name, values in found.get(key, {}).items()}

    ages = (float(found["ages"][0]), float(found["ages"][1])) if found.get("ages") else None
    return Ranges(found.get("people", ""), read("percent_brain"), read("asymmetry_percent"), ages)


def measure(
    scans: Iterable[Mapping[str, float]],
    parcellation: Parcellation,
    people: str,
    ages: Sequence[float] = (),
) -> dict[str, object]:
    """Content of ``data/ranges`` from volumes (mm^3 by name), one mapping a person.

    Sizes are spread evenly on a logarithmic scale (a ventricle may double, not vanish), asymmetries
    on a linear one.  A structure that somebody lacks gets no range.
    """
    volumes = list(scans)
    shares = [
        {n: 100 * v / brain_mm3(one, parcellation) for n, v in one.items()} for one in volumes
    ]
    sizes, sides = dict[str, list[float]](), dict[str, list[float]]()
    for s in parcellation.structures:
        values = [one.get(s.name, 0.0) for one in shares]
        tissue = s.is_tissue
        if tissue and len(values) >= FEWEST and min(values) > 0:
            logs = [math.log(value) for value in values]
            centre, reach = mean(logs), WIDE * stdev(logs)
            sizes[s.name] = [_short(math.exp(centre + k * reach)) for k in (-1, 0, 1)]
    for left, right in parcellation.pairs:
        if left.name in sizes and right.name in sizes:
            found = [asymmetry(one[left.name], one[right.name]) or 0.0 for one in volumes]
            centre, reach = mean(found), WIDE * stdev(found)
            low = min(centre - reach, -LEAST_ASYMMETRY)
            high = max(centre + reach, LEAST_ASYMMETRY)
            sides[left.name] = [_short(value) for value in (low, centre, high)]
    span = [min(ages), max(ages)] if ages else None
    return {"people": people, "ages": span, "percent_brain": sizes, "asymmetry_percent": sides}


def _short(value: float) -> float:
    return float(f"{value:.4g}")
