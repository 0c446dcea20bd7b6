"""Where a person stands among people of the same age and sex: percentiles of structures' sizes.

A size is a structure's share of the brain in per cent; that of the brain itself is in mm^3.  For
each size a ``Curve`` says how its logarithm is spread: normally, around a mean that is a natural
cubic spline in age plus a difference of the sexes, with a standard deviation that is a power in
age (a Gaussian location-scale model, as in Rigby and Stasinopoulos, 2005, of few parameters).
``quality/age_fit`` fits them; this module alone reads and writes their file.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy.special import ndtr, ndtri

from cadiff_cli.config import fingerprint
from cadiff_cli.data import shipped
from cadiff_cli.errors import DataError, MissingInputError
from cadiff_cli.io.files import write_json
from cadiff_cli.io.volumes import BRAIN, NOT_CSF
from cadiff_cli.labels.parcellation import BASE, Parcellation, base_volumes, load_parcellation
from cadiff_cli.products import Percentile, Person, Sex
from cadiff_cli.quality.ranges import Range, brain_mm3, covers_base
from cadiff_cli.text import read_text

SIDED = 1.96
"""Standard errors on either side of a percentile: 95 % confidence."""
VENTRICLES = "Ventricles"
KEPT = "age_ranges_{}.json"
"""Name of a file in an output folder, by the ranges' fingerprint."""
HALVINGS = 50
"""Of an interval of logarithms: less is left of it than floats can tell apart."""
FORMAT = 1
"""Of the file: increase it when older versions could not read it."""

V = TypeVar("V", float, np.ndarray)


@dataclass(frozen=True)
class Curve:
    """How the logarithm of one size is spread over ages and sexes.

    ``mean`` (p,) belongs to ``AgeRanges.design``, ``spread`` (2,) is the logarithm of the standard
    deviation and its slope over the design's scaled age; their covariances (p, p) and (2, 2) say
    how well they are known.  ``source_sd`` is the standard deviation between sources of scans.
    """

    mean: tuple[float, ...]
    spread: tuple[float, ...]
    source_sd: float
    mean_covariance: tuple[tuple[float, ...], ...]
    spread_covariance: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class AgeRanges:
    """Sizes of the structures of a ``parcellation`` by age and sex.

    ``people`` says in words who was measured and how, ``sources`` how many people each source of
    scans has.  ``ages`` are those of the youngest and the oldest.  ``knots`` are the spline's, in
    years.  ``check`` is how well people who were left out were predicted.
    """

    parcellation: str
    people: str
    sources: Mapping[str, int]
    ages: tuple[float, float]
    knots: tuple[float, ...]
    curves: Mapping[str, Curve]
    sexes: Mapping[str, int] = field(default_factory=dict)
    check: Mapping[str, Any] = field(default_factory=dict)

    @property
    def of_ages(self) -> str:
        """Whose they are, as ``102 people of 18 to 95.6 years``."""
        low, high = (round(age, 1) for age in self.ages)
        return f"{sum(self.sources.values())} people of {low:g} to {high:g} years"

    def covers(self, person: Person) -> bool:
        """Whether the person's age is known, and lies among those of the people."""
        age = person.age_years
        return age is not None and self.ages[0] <= age <= self.ages[1]

    def percentile(self, name: str, size: float, person: Person) -> Percentile | None:
        """Per cent of people of this age and sex in whom ``name`` is smaller.

        Of an unknown sex: of women and men in equal parts.  None where nobody can say.
        """
        curve = self.curves.get(name)
        if curve is None or not size > 0 or not self.covers(person):
            return None
        found = []
        for sex in sexes_of(person):
            mean, sd, mean_se, sd_se = self.moments(curve, np.array([person.age_years]), sex)
            z = float(((np.log(size) - mean) / np.hypot(sd, mean_se))[0])
            se = float(np.hypot(mean_se / sd, z * sd_se)[0])
            found.append([100 * float(ndtr(z + k * SIDED * se)) for k in (0, -1, 1)])
        value, low, high = np.transpose(found)
        return Percentile(float(value.mean()), float(low.mean()), float(high.mean()))

    def lines(
        self, name: str, ages: np.ndarray, person: Person, percentiles: Sequence[float]
    ) -> np.ndarray:
        """(percentiles, ages): sizes of ``name`` below which so many per cent lie.

        Of an unknown sex: of women and men in equal parts, as ``percentile`` counts them.
        """
        below = np.asarray(percentiles)[:, None] / 100
        sexes = [self.moments(self.curves[name], ages, sex)[:3] for sex in sexes_of(person)]
        normal = [(mean, np.hypot(sd, mean_se)) for mean, sd, mean_se in sexes]
        ends = [mean + ndtri(below) * sd for mean, sd in normal]
        low, high = np.min(ends, axis=0), np.max(ends, axis=0)
        # The answer lies between the sexes' own.
        for _ in range(HALVINGS if len(normal) > 1 else 0):
            middle = (low + high) / 2
            share = np.mean([ndtr((middle - mean) / sd) for mean, sd in normal], axis=0)
            low, high = np.where(share < below, middle, low), np.where(share < below, high, middle)
        return np.asarray(np.exp((low + high) / 2))

    def range(self, name: str, person: Person, wide: float) -> Range | None:
        """What is plausible at this age and sex: ``wide`` standard deviations around the centre."""
        if name not in self.curves or not self.covers(person):
            return None
        reach = 100 * ndtr([-wide, 0.0, wide])
        low, centre, high = self.lines(name, np.array([person.age_years]), person, reach)[:, 0]
        return Range(float(low), float(centre), float(high))

    def moments(
        self, curve: Curve, ages: np.ndarray, sex: Sex
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Mean and SD of the log size at these ages, the mean's standard error, the SD's relative.

        The SD is that of people and of the sources that they were scanned at.
        """
        x = design(ages, np.full(len(ages), CODED[sex]), self.knots)
        s = spread_design(ages, self.knots)
        own = np.exp(s @ curve.spread)
        sd = np.hypot(own, curve.source_sd)
        mean_se = np.sqrt(np.einsum("ni,ij,nj->n", x, np.array(curve.mean_covariance), x))
        own_se = np.sqrt(np.einsum("ni,ij,nj->n", s, np.array(curve.spread_covariance), s))
        return x @ curve.mean, sd, mean_se, own_se * (own / sd) ** 2

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a file or a fingerprint."""
        return dict(json.loads(json.dumps({"format": FORMAT, **asdict(self)})))

    @property
    def fingerprint(self) -> str:
        """Changes with anything that decides a percentile, or says whose it is."""
        return fingerprint({k: v for k, v in self.as_dict().items() if k != "check"})


CODED: Mapping[Sex, float] = {"F": 0.5, "M": -0.5}
"""The sexes as a number; 0 where it is unknown."""


def sexes_of(person: Person) -> tuple[Sex, ...]:
    """The person's sex, or both."""
    return (person.sex,) if person.sex else ("F", "M")


def scaled(ages: np.ndarray, knots: Sequence[float]) -> np.ndarray:
    """Ages from -1 at the first knot to 1 at the last."""
    return np.asarray((2 * ages - knots[0] - knots[-1]) / (knots[-1] - knots[0]))


def design(ages: np.ndarray, sexes: np.ndarray, knots: Sequence[float]) -> np.ndarray:
    """(n, len(knots) + 1): constant, sex, and the natural cubic spline with these knots.

    It is a straight line before the first knot and after the last (Harrell's restricted cubic
    spline); two knots make it one everywhere.
    """
    t, k = scaled(ages, knots), scaled(np.asarray(knots, float), knots)

    def cube(at: float) -> np.ndarray:
        return np.clip(t - at, 0, None) ** 3

    bent = [
        (cube(at) - (cube(k[-2]) * (k[-1] - at) - cube(k[-1]) * (k[-2] - at)) / (k[-1] - k[-2])) / 4
        for at in k[:-2]
    ]
    return np.stack([np.ones_like(t), sexes, t, *bent], axis=1)


def spread_design(ages: np.ndarray, knots: Sequence[float]) -> np.ndarray:
    """(n, 2): constant and age, for the logarithm of the standard deviation."""
    t = scaled(ages, knots)
    return np.stack([np.ones_like(t), t], axis=1)


def sizes(volumes: Mapping[str, V], parcellation: Parcellation) -> dict[str, V]:
    """Sizes by name, from volumes in mm^3: structures, pairs together, ventricles, the brain.

    Everything is in per cent of all structures but vessels; those themselves are in mm^3.
    """
    tissue = [s for s in parcellation.structures if s.is_tissue]
    brain: V = sum((volumes[s.name] for s in tissue[1:]), start=volumes[tissue[0].name])
    found = {s.name: 100 * volumes[s.name] / brain for s in tissue}
    for left, right in parcellation.pairs:
        if left.is_tissue:
            found[left.shared_name] = found[left.name] + found[right.name]
    fluid = [found[s.name] for s in tissue if s.is_csf]
    if fluid:
        found[VENTRICLES] = sum(fluid[1:], start=fluid[0])
    return {**found, BRAIN: brain}


def percentiles(
    ranges: AgeRanges | None,
    volumes: Mapping[str, float | None],
    parcellation: Parcellation,
    person: Person,
) -> dict[str, Percentile]:
    """Percentiles by name, of everything that has one.

    None where a network never draws some structure (its volume is None): what it draws in its
    place makes shares of the brain other ones.
    """
    if ranges is None or not ranges.covers(person):
        return {}
    known = {name: mm3 for name, mm3 in volumes.items() if mm3 is not None}
    if len(known) < len(volumes):
        return {}
    measured = sizes_in(ranges, known, parcellation)
    each = ((name, ranges.percentile(name, size, person)) for name, size in measured.items())
    found = {name: percentile for name, percentile in each if percentile is not None}
    if fluid := found.get(VENTRICLES):  # what has more fluid has less of everything else
        found[NOT_CSF] = Percentile(100 - fluid.value, 100 - fluid.high, 100 - fluid.low)
    return found


def sizes_in(
    ranges: AgeRanges, volumes: Mapping[str, float], parcellation: Parcellation
) -> dict[str, float]:
    """Sizes of the structures that ``ranges`` are of; those of a finer parcellation are summed."""
    if not brain_mm3(volumes, parcellation):
        return {}
    if ranges.parcellation == parcellation.name:
        return sizes(volumes, parcellation)
    if not fits(ranges, parcellation):
        return {}
    base = load_parcellation(BASE)
    names = {s.name for s in base.structures}
    whole = base_volumes(volumes, parcellation)
    return sizes({name: whole.get(name, 0.0) for name in names}, base)


def fits(ranges: AgeRanges, parcellation: Parcellation) -> bool:
    """Whether results of a parcellation can be compared with these ranges."""
    if ranges.parcellation == parcellation.name:
        return True
    return ranges.parcellation == BASE and covers_base(parcellation)


@cache
def load_age_ranges(parcellation: Parcellation) -> AgeRanges | None:
    """The ranges that ship for a parcellation: its own, else those of ``BASE`` where it fits."""
    for name in (parcellation.name, BASE):
        path = shipped(f"age_ranges/{name}.json")
        if path.is_file():
            found = _of_dict(json.loads(path.read_text(encoding="utf-8")))
            return found if fits(found, parcellation) else None
    return None


def keep_age_ranges(out: Path, ranges: AgeRanges) -> None:
    """Write the user's own ranges into an output folder, so that its pages need no other file."""
    path = out / KEPT.format(ranges.fingerprint)
    if not path.exists():
        write_age_ranges(path, ranges)


def ranges_of(out: Path, fingerprint: str, parcellation: Parcellation) -> AgeRanges | None:
    """The ranges of a result in ``out``: those with the ``fingerprint``, or those that ship."""
    if not fingerprint:
        return load_age_ranges(parcellation)
    path = out / KEPT.format(fingerprint)
    return _kept(path) if path.is_file() else None


def read_age_ranges(path: Path) -> AgeRanges:
    """Read a file of ``cadiff ranges train``.

    Raises ``MissingInputError`` or ``DataError``.
    """
    if not path.is_file():
        raise MissingInputError(f"no such file: {path}", "make it with cadiff ranges train")
    try:
        return _of_dict(json.loads(read_text(path)))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} holds no age ranges ({error})", "make it with cadiff ranges train"
        ) from error


def write_age_ranges(path: Path, ranges: AgeRanges) -> None:
    """Write a file for ``read_age_ranges``: parameters of curves, no person's values."""
    write_json(path, ranges.as_dict())


_kept = cache(read_age_ranges)
"""Files that are named after their content."""


def _of_dict(values: Mapping[str, Any]) -> AgeRanges:
    values = dict(values)
    if (format := values.pop("format")) != FORMAT:
        raise ValueError(f"format {format!r}, {FORMAT} is known")
    low, high = map(float, values.pop("ages"))
    knots, curves = tuple(map(float, values.pop("knots"))), values.pop("curves")
    if not (np.isfinite(knots).all() and (np.diff(knots) > 0).all() and low <= high):
        raise ValueError("ages or knots that do not rise")
    sources = {str(name): int(n) for name, n in dict(values.pop("sources")).items()}
    found = AgeRanges(ages=(low, high), knots=knots, sources=sources, curves={}, **values)
    return replace(found, curves={name: _curve(one, len(knots)) for name, one in curves.items()})


def _curve(values: Mapping[str, Any], n_knots: int) -> Curve:
    arrays = {key: np.asarray(value, float) for key, value in values.items()}
    shapes = {
        "mean": (n_knots + 1,),
        "spread": (2,),
        "source_sd": (),
        "mean_covariance": (n_knots + 1, n_knots + 1),
        "spread_covariance": (2, 2),
    }
    if {key: array.shape for key, array in arrays.items()} != shapes:
        raise ValueError("a curve of another form")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError("a curve without numbers")
    return Curve(**{key: _tuples(array.tolist()) for key, array in arrays.items()})


def _tuples(values: Any) -> Any:
    return tuple(map(_tuples, values)) if isinstance(values, list) else values
