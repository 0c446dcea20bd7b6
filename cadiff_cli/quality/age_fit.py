"""Fit age ranges to the volumes of people, and check them on people who were left out.

The logarithm of a size is normal.  Its mean is ``age_ranges.design`` times coefficients, plus an
intercept of the source (a scanner, a study), which is drawn from a normal distribution too: sources
differ in age, so an intercept of its own for each could hide what age does, and none at all could
pass a scanner for age.  The standard deviation is exponential in age.  Restricted maximum
likelihood: Henderson's equations for the mean, Smyth's (2002) scores for the spread, in turn.  How
much sources differ, relative to people, is drawn to one number for all structures, because few
sources say little about each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr

from cadiff_cli.errors import DataError, first_few
from cadiff_cli.io.cohorts import Cohort
from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.products import Person
from cadiff_cli.quality.age_ranges import (
    CODED,
    AgeRanges,
    Curve,
    design,
    sizes,
    spread_design,
)
from cadiff_cli.quality.ranges import AGE_GROUPS, WIDE

FEWEST_PEOPLE = 20
"""People without whom nothing is fitted."""
FEWEST_OF_A_SEX = 5
"""People of each sex without whom the sexes are not told apart."""
FEWEST_OF_A_SOURCE = 2
"""People a source, on average; with fewer, a source cannot be told from its person."""
ENDS = (5.0, 95.0)
"""Percentiles of the ages at which the spline has its first and last knot."""
LEAST_SPAN_YEARS = 2.0
"""Ages whose ``ENDS`` lie closer together are no range of ages."""
LEAST_FREE = 1e-6
"""A person whose residual is free by less decides a coefficient alone, and tells no spread."""
MOST_LACKING = 0.05
"""Share of people who may lack a structure that has a curve: it is of those who have it."""
RATIO_LOG_SD = 1.0
"""How far the ratios of structures may lie from that of all, as the SD of their logarithm."""
RATIOS = np.geomspace(1e-3, 4.0, 20)
"""Of the variances of sources and of people, that are tried."""
PERCENTILES = (5.0, 25.0, 50.0, 75.0, 95.0)
FOLDS = 10
LEAST_LEFT = 15
"""People to whom curves are fitted when others are left out; with fewer, nobody is predicted."""
DIGITS = 6


@dataclass(frozen=True, eq=False)
class _Table:
    """What is fitted: ``logs`` (n,) by name, NaN where a structure is absent."""

    ages: np.ndarray
    sexes: np.ndarray
    sources: np.ndarray
    logs: Mapping[str, np.ndarray]

    def part(self, rows: np.ndarray) -> "_Table":
        logs = {name: values[rows] for name, values in self.logs.items()}
        return _Table(self.ages[rows], _told_apart(self.sexes[rows]), self.sources[rows], logs)


@dataclass(frozen=True)
class Form:
    """How flexible curves are: the number of ``knots``, and what they depend on."""

    knots: int = 3
    of_age: bool = True
    of_sex: bool = True
    spread_of_age: bool = True
    of_source: bool = True


FORMS = {
    "by age and sex": Form(),
    "straight lines": Form(knots=2, spread_of_age=False),
    "all ages together": Form(of_age=False, of_sex=False, spread_of_age=False),
}
"""What curves are checked against."""


def fit(
    cohort: Cohort, parcellation: Parcellation, people: str = "", form: Form = Form()
) -> AgeRanges:
    """Fit curves to everything that ``age_ranges.sizes`` gives of a cohort.

    A structure has no curve if more than one in twenty lack it, or if those who have it are too
    alike.  ``people`` says who they are, in words.
    The order of rows does not matter.  Raises ``DataError`` for too few people, or ages, and where
    ages and sexes are too alike to tell what each does.
    """
    table = _table(cohort, parcellation)
    _check(table, form)
    return _fit(table, parcellation.name, people, form)


def check(
    cohort: Cohort, parcellation: Parcellation, forms: Mapping[str, Form] = FORMS
) -> dict[str, Any]:
    """Predict people who were left out, tenth by tenth, and whole sources.

    Form -> group of people -> the per cent of them below each predicted percentile (``coverage``:
    5, 25, 50, 75, 95 are right), the pinball loss (mean over structures, people and percentiles,
    in log units; lower is better), and the per cent who have an ``implausible`` size (``WIDE``).
    A source without which too few people remain, or people too alike to fit curves to, is not
    predicted.
    """
    table = _table(cohort, parcellation)
    for form in forms.values():
        _check(table, form)
    fold = np.random.default_rng(0).permutation(len(table.ages)) % FOLDS
    found = dict[str, Any]()
    for name, form in forms.items():
        found[name] = _scored(table, fold, form)
        if others := _scored(table, table.sources, form):
            found[name]["other sources"] = others["all"]
    return found


def _table(cohort: Cohort, parcellation: Parcellation) -> _Table:
    """The cohort's people of known age, in an order of their own."""
    order = sorted(range(len(cohort)), key=lambda k: (cohort.sources[k], cohort.subjects[k]))
    rows = [k for k in order if cohort.persons[k].age_years is not None]
    persons = [cohort.persons[k] for k in rows]
    measured = sizes(
        {name: np.asarray(v, float)[rows] for name, v in cohort.mm3.items()}, parcellation
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = {name: np.log(np.where(v > 0, v, np.nan)) for name, v in measured.items()}
    sexes = np.array([CODED[p.sex] if p.sex else 0.0 for p in persons])
    return _Table(
        np.array([p.age_years for p in persons], float),
        _told_apart(sexes),
        np.array([cohort.sources[k] for k in rows]),
        {name: v for name, v in logs.items() if np.isnan(v).sum() <= MOST_LACKING * len(v)},
    )


def _told_apart(sexes: np.ndarray) -> np.ndarray:
    """The coded sexes; 0 if there are too few of either to tell them apart."""
    few = min((sexes > 0).sum(), (sexes < 0).sum()) < FEWEST_OF_A_SEX
    return np.zeros(len(sexes)) if few else sexes


def _check(table: _Table, form: Form) -> None:
    if (n := len(table.ages)) < FEWEST_PEOPLE:
        raise DataError(
            f"{n} people of known age",
            f"at least {FEWEST_PEOPLE} are needed, and 100 or more for percentiles that tell much",
        )
    sources = len(np.unique(table.sources))
    if form.of_source and sources > 1 and sources > n / FEWEST_OF_A_SOURCE:
        raise DataError(
            f"{sources} sources of {n} people",
            f"a source (a scanner, a study, a folder) needs {FEWEST_OF_A_SOURCE} people on average:"
            " name larger ones in the column source, or leave the column out and give one table",
        )
    if not table.logs:
        raise DataError("no structure is there in most people", "look at their label maps")
    if alike := _alike(table, form):
        raise DataError(*alike)


def _alike(table: _Table, form: Form) -> tuple[str, str] | None:
    """Why people are too alike to fit curves to, and a remedy; None if they are not."""
    low, high = np.percentile(table.ages, ENDS)
    if high - low < LEAST_SPAN_YEARS:
        return (
            f"{ENDS[1] - ENDS[0]:g} % of people are {low:g} to {high:g} years old",
            f"the ages of these must differ by {LEAST_SPAN_YEARS:g} years at least: add people of"
            " other ages",
        )
    if not _decided(*_designs(table, _knots(table.ages, form), form)):
        ages = [f"{age:g}" for age in np.unique(table.ages)]
        sexes = f", {(table.sexes > 0).sum()} women and {(table.sexes < 0).sum()} men"
        return (
            f"{len(table.ages)} people of {len(ages)} different ages ({first_few(ages)} years)"
            f"{sexes if table.sexes.any() else ''} do not tell what age and sex do",
            f"ages of {form.knots + 1} years or more are needed, with several people of each and"
            " women and men at the same ages",
        )
    return None


def _decided(x: np.ndarray, s: np.ndarray) -> bool:
    """Whether people of these designs decide every coefficient of the mean and of the spread."""
    if np.linalg.matrix_rank(x) < x.shape[1]:
        return False
    free = 1 - (np.linalg.qr(x).Q ** 2).sum(axis=1)
    return bool(np.linalg.matrix_rank(s[free > LEAST_FREE]) == s.shape[1])


def _used(table: _Table, form: Form) -> tuple[list[int], list[int]]:
    """Columns of the designs of mean and spread that a form uses."""
    x_used = [0, *([1] if form.of_sex and table.sexes.any() else [])]
    x_used += [*range(2, form.knots + 1)] if form.of_age else []
    return x_used, [0, 1] if form.spread_of_age else [0]


def _designs(table: _Table, knots: tuple[float, ...], form: Form) -> tuple[np.ndarray, np.ndarray]:
    """Designs (n, p) of the mean and (n, r) of the spread: the columns that a form uses."""
    x_used, s_used = _used(table, form)
    x = design(table.ages, table.sexes, knots)
    return x[:, x_used], spread_design(table.ages, knots)[:, s_used]


def _fit(table: _Table, parcellation: str, people: str, form: Form) -> AgeRanges:
    knots = _knots(table.ages, form)
    names, of = np.unique(table.sources, return_inverse=True)
    (x, s), (x_used, s_used) = _designs(table, knots, form), _used(table, form)
    z = np.eye(len(names))[of] if form.of_source and len(names) > 1 else np.zeros((len(of), 0))
    logs = {
        name: y for name, y in table.logs.items() if _decided(x[np.isfinite(y)], s[np.isfinite(y)])
    }
    y = np.stack([*logs.values()])
    found = _likeliest(y, x, z, s)
    curves = {}
    for k, name in enumerate(logs):
        mean, mean_cov = _whole(found.mean[k], found.mean_covariance[k], x_used, form.knots + 1)
        spread, spread_cov = _whole(found.spread[k], found.spread_covariance[k], s_used, 2)
        parts = (mean, spread, found.source_sd[k], mean_cov, spread_cov)
        curves[name] = Curve(*map(_plain, parts))
    counts = {str(name): int((of == k).sum()) for k, name in enumerate(names)}
    sexes = {"F": int((table.sexes > 0).sum()), "M": int((table.sexes < 0).sum())}
    ages = (float(table.ages.min()), float(table.ages.max()))
    return AgeRanges(parcellation, people, counts, ages, knots, curves, sexes)


def _knots(ages: np.ndarray, form: Form) -> tuple[float, ...]:
    """Ages, evenly spaced between the percentiles ``ENDS``."""
    low, high = np.percentile(ages, ENDS)
    return tuple(round(float(x), 2) for x in np.linspace(low, high, form.knots))


@dataclass(frozen=True, eq=False)
class _Solution:
    """Of m sizes: ``mean`` (m, p) and ``spread`` (m, r) with covariances, and the likelihood."""

    mean: np.ndarray
    mean_covariance: np.ndarray
    spread: np.ndarray
    spread_covariance: np.ndarray
    source_sd: np.ndarray
    likelihood: np.ndarray


def _likeliest(y: np.ndarray, x: np.ndarray, z: np.ndarray, s: np.ndarray) -> _Solution:
    """Fit all sizes ``y`` (m, n), with the likeliest ratio of sources to people for each.

    It is the likeliest given that the ratios of all sizes lie around one.
    """
    if not z.shape[1]:
        return _solve(y, x, z, s, np.zeros(len(y)))
    tried = list[_Solution]()
    for ratio in RATIOS:
        begin = tried[-1].spread if tried else None
        tried.append(_solve(y, x, z, s, np.full(len(y), ratio), begin))
    likelihood = np.stack([one.likelihood for one in tried])
    logs = np.log(RATIOS)
    shared = logs[likelihood.sum(axis=1).argmax()]
    own = likelihood - (((logs - shared) / RATIO_LOG_SD) ** 2 / 2)[:, None]
    return _solve(y, x, z, s, RATIOS[own.argmax(axis=0)], tried[-1].spread)


def _solve(
    y: np.ndarray,
    x: np.ndarray,
    z: np.ndarray,
    s: np.ndarray,
    ratio: np.ndarray,
    begin: np.ndarray | None = None,
) -> _Solution:
    """Fit sizes ``y`` (m, n) on ``x`` (n, p), sources ``z`` (n, q), log spreads on ``s`` (n, r).

    ``ratio`` (m,) is the variance of sources over the mean variance of people.  NaN is left out.
    """
    has, c, p, q = np.isfinite(y), np.hstack([x, z]), x.shape[1], z.shape[1]
    y = np.where(has, y, 0)
    if begin is None:
        begin = np.zeros((len(y), s.shape[1]))
        begin[:, 0] = 0.5 * np.log(np.maximum(np.var(y, axis=1), 1e-12))
    spread, random = begin, range(p, p + q)
    for _ in range(100):
        variance = np.exp(2 * spread @ s.T)
        weight = has / variance
        source = ratio * variance.mean(axis=1)
        inner = (weight[:, None] * c.T) @ c
        inner[:, random, random] += 1 / source[:, None] if q else 0.0
        covariance = np.linalg.inv(inner)
        both = (covariance @ ((weight * y) @ c)[..., None])[..., 0]
        rest = has * (y - both @ c.T)
        free = has - weight * ((c @ covariance) * c).sum(axis=2)
        information = 2 * (free[:, None] * s.T) @ s
        score = (rest**2 * weight - free) @ s
        step = np.linalg.solve(information, score[..., None])[..., 0]
        spread = spread + np.clip(step, -1, 1)
        if abs(step).max() < 1e-6:
            break
    twice = (has * np.log(variance) + rest**2 * weight).sum(axis=1) + np.linalg.slogdet(inner)[1]
    if q:
        twice += q * np.log(source) + (both[:, p:] ** 2).sum(axis=1) / source
    return _Solution(
        both[:, :p],
        covariance[:, :p, :p],
        spread,
        np.linalg.inv(information),
        np.sqrt(source),
        -twice / 2,
    )


def _whole(
    values: np.ndarray, covariance: np.ndarray, used: Sequence[int], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of all columns, from those of the ``used`` ones; the others are 0."""
    all_values, all_covariance = np.zeros(size), np.zeros((size, size))
    all_values[used] = values
    all_covariance[np.ix_(used, used)] = covariance
    return all_values, all_covariance


def _plain(values: Any) -> Any:
    """Nested tuples of numbers with ``DIGITS`` significant digits."""
    if np.ndim(values) == 0:
        return float(f"{float(values):.{DIGITS}g}")
    return tuple(map(_plain, values))


def _scored(table: _Table, fold: np.ndarray, form: Form) -> dict[str, Any]:
    """Coverage and pinball loss over folds, each predicted from the others; empty if none is."""
    shape = (len(table.ages), len(table.logs), len(PERCENTILES))
    below, loss = np.full(shape, np.nan), np.full(shape, np.nan)
    far = np.zeros(len(table.ages), bool)
    levels, ends = np.array(PERCENTILES) / 100, 100 * ndtr([-WIDE, WIDE])
    for one in np.unique(fold):
        out = np.flatnonzero(fold == one)
        if len(fold) - len(out) < LEAST_LEFT:
            continue
        others = table.part(fold != one)
        if _alike(others, form):
            continue
        ranges = _fit(others, "", "", form)
        for k, (name, y) in enumerate(table.logs.items()):
            if name not in ranges.curves:
                continue
            for coded in np.unique(table.sexes[out]):
                rows = out[table.sexes[out] == coded]
                person = Person(sex=next((s for s, x in CODED.items() if x == coded), None))
                wanted = (*PERCENTILES, *ends)
                lines = np.log(ranges.lines(name, table.ages[rows], person, wanted)).T
                lines, (low, high) = lines[:, :-2], lines[:, -2:].T
                far[rows] |= (y[rows] < low) | (y[rows] > high)
                error = y[rows, None] - lines
                below[rows, k] = np.where(np.isnan(error), np.nan, error < 0)
                loss[rows, k] = np.maximum(levels * error, (levels - 1) * error)
    predicted = np.isfinite(below).any(axis=(1, 2))
    return {
        name: {
            "people": int(rows.sum()),
            "coverage": [round(100 * float(v), 1) for v in np.nanmean(below[rows], axis=(0, 1))],
            "pinball": round(float(np.nanmean(loss[rows])), 5),
            "implausible": round(100 * float(far[rows].mean()), 1),
        }
        for name, (low, high) in {"all": (0.0, np.inf), **AGE_GROUPS}.items()
        if (rows := predicted & (table.ages >= low) & (table.ages < high)).any()
    }
