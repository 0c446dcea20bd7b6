"""Scans of a group compared with each other: which of them stand out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import median
from typing import Any

from cadiff_cli.io.volumes import Row
from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.quality.judgement import Judgement
from cadiff_cli.quality.ranges import Ranges

FAR = 3.5
"""Robust standard deviations from the group's median that make an outlier (Iglewicz, Hoaglin)."""
FEWEST = 5
"""Scans without which a group has no outliers."""
MASK_LOG_SD = 0.1
"""Spread of mask volumes that a group is at least credited with: that of adult brains."""
SCORE_LOG_SD = 0.03
"""The same for registration scores."""
SCORE = "registration score"


@dataclass(frozen=True)
class Group:
    """What the group table at ``path`` holds: results of one ``parcellation``.

    ``rows`` are column -> value, ``judged`` is by scan; ``missing`` tells why a scan has no result.
    ``parcels`` are the finer parcellation of a scan, if it has one, and its volumes.
    """

    path: Path
    parcellation: Parcellation
    rows: tuple[dict[str, Any], ...]
    judged: dict[str, Judgement]
    missing: dict[str, str]
    notes: tuple[str, ...]
    parcels: dict[str, tuple[str, tuple[Row, ...]]]

    @property
    def scans(self) -> tuple[str, ...]:
        """Entities of the scans in the table."""
        return tuple(sorted(row["scan"] for row in self.rows))


def outliers(judged: Mapping[str, Judgement], ranges: Ranges) -> dict[str, list[str]]:
    """Why a scan stands out from the group; scans that do not are absent.

    Shares of the brain, mask volume and registration score (``robust_z``); a group's spread counts
    as no smaller than that of known people.  Fewer than five scans have no outliers.
    """
    found: dict[str, list[str]] = {}
    for what, unit, values, least in _measures(judged, ranges):
        for scan, z in robust_z(values, least).items():
            if abs(z) > FAR and not (what == SCORE and z > 0):
                middle = median(value for value in values.values() if value)
                text = f"{what} {values[scan]:.3g}{unit}, median {middle:.3g}"
                found.setdefault(scan, []).append(f"{text} ({z:+.1f} SD)")
    return found


def _measures(
    judged: Mapping[str, Judgement], ranges: Ranges
) -> Iterator[tuple[str, str, dict[str, float], float]]:
    """What a group is compared by: name, unit, value by scan, least standard deviation (log)."""
    for name in dict.fromkeys(name for j in judged.values() for name in j.percent_brain):
        yield name, " %", shares(judged, name), ranges.log_sd(name)
    yield "brain mask", " l", {scan: j.mask_litres for scan, j in judged.items()}, MASK_LOG_SD
    scores = {scan: j.registration_score or 0.0 for scan, j in judged.items()}
    yield SCORE, "", scores, SCORE_LOG_SD


def shares(judged: Mapping[str, Judgement], name: str) -> dict[str, float]:
    """Per cent of the brain that the structure ``name`` takes in each scan that has it."""
    return {scan: j.percent_brain[name] for scan, j in judged.items() if name in j.percent_brain}


def robust_z(values: Mapping[str, float], least_log_sd: float) -> dict[str, float]:
    """Distance of each scan from the median, in standard deviations that outliers cannot move.

    On a logarithmic scale, as sizes are spread (a ventricle may double, not vanish).  1.4826 times
    the median absolute deviation is the standard deviation of normal values; few scans may lie
    close together by luck, so at least ``least_log_sd`` is taken.  Values of 0 are left out, and
    where fewer than five are left so are all.

    >>> found = robust_z({"a": 10, "b": 11, "c": 9, "d": 10, "e": 30, "f": 0}, 0.1)
    >>> {scan: round(z, 1) for scan, z in found.items()}
    {'a': 0.0, 'b': 0.7, 'c': -0.7, 'd': 0.0, 'e': 7.8}
    """
    logs = {scan: log(value) for scan, value in values.items() if value > 0}
    if len(logs) < FEWEST:
        return {}
    centre = median(logs.values())
    spread = 1.4826 * median(abs(value - centre) for value in logs.values())
    return {scan: (value - centre) / max(spread, least_log_sd) for scan, value in logs.items()}
