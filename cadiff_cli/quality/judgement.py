"""Numbers to judge a result by, and what they amount to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import inf
from statistics import mean
from typing import Any

from cadiff_cli.io.bids.layout import Finished
from cadiff_cli.io.provenance import Provenance
from cadiff_cli.io.volumes import BRAIN_MASK, Row
from cadiff_cli.labels.parcellation import Parcellation, base_volumes
from cadiff_cli.notes import NoteCode
from cadiff_cli.products import MaskQuality, Percentile, Person
from cadiff_cli.quality.age_ranges import AgeRanges, percentiles
from cadiff_cli.quality.limits import PLAUSIBLE_LITRES, POOR_SCORE
from cadiff_cli.quality.ranges import (
    WIDE,
    Range,
    Ranges,
    asymmetry,
    brain_mm3,
)

ANYTHING = Range(-inf, 0.0, inf)
FAR_BELOW = 0.15
"""How far a structure's expected Dice may lie below its usual one.

Measured on good and on spoilt scans of people left out (docs/report.md): at 0.15 none of 180
structures of good scans is doubted, and 56 % of those that should be.
"""
POOR_DICE = 0.6
"""Expected Dice that is doubtful without a calibration; in good scans it was 0.69 or more."""
MOST_SPREAD = 10.0
"""Per cent of its volume by which samples of a structure may differ (SD): a good scan's largest was
2.4 % (docs/report.md)."""
LEARNT_TOO = "the ranges, and what the network has learnt, are"
SAID_OTHERWISE = (
    NoteCode.TEMPLATE_MISSING,
    NoteCode.TEMPLATE_MASK,
    NoteCode.MASK_VOLUME,
    NoteCode.POOR_SCORE,
)
"""Notes that are not about the result, or that a judgement says in its own words.

Results of versions that stored no codes repeat them.
"""
COLUMNS = {
    "verdict": "'fine', or 'look' where something is suspicious",
    "age": "Age in years, of participants.tsv or --age",
    "sex": "Sex (F, M), of participants.tsv or --sex",
    "compared_with": "Whose sizes were plausible: people of the same age and sex, or, where the age"
    " is unknown or outside theirs, adults of all ages",
    "reasons": "What is suspicious",
    "mask_litres": "Volume of the brain mask in litres",
    "mask_largest_share": "Share of the largest component in the mask as it was found or given",
    "mask_symmetry": "Dice of the brain mask and its mirror image, left for right",
    "mask_at_edge": "Share of the mask's border that lies on one face of the field of view",
    "mask_in_air": "Share of the brain mask outside the head",
    "missing": "Structures (but vessels) that were not found",
    "largest_asymmetry": "Pair (but vessels) that differs most between left and right",
    "largest_asymmetry_percent": "Its difference in per cent of its mean, left minus right",
    "expected_dice": "Mean Dice to expect of the structures (docs/report.md)",
    "least_expected": "Structure of which the lowest Dice is expected, and how much",
    "largest_spread": "Structure whose volume differs most between samples, SD in per cent of it",
    "implausible": "Structures outside the range of the people of column compared_with",
}
"""What the group table says of quality, besides what it always did."""


@dataclass(frozen=True)
class Side:
    """Left and right of one structure, ``name`` without its side.

    ``percent`` is (left - right) in per cent of their mean.
    """

    left: str
    right: str
    name: str
    percent: float
    plausible: bool


@dataclass(frozen=True)
class Judgement:
    """What can be said of a result without the truth.  ``reasons`` to look; none: looks fine.

    ``compared_with`` names the people whose ranges were used where the person's own age is not
    known to lie among those of the age ranges; where it does, ``by_age`` names their people.
    ``plausible`` are the ranges that were used; ``percentiles`` are by name of ``sizes``.
    Mappings are by structure, but vessels.  ``spread_percent`` is the standard deviation of volumes
    over samples, in per cent; empty where one was drawn.  ``doubtful`` ones were found, but a low
    Dice is to be expected of them.
    """

    mask_litres: float
    mask_quality: MaskQuality | None
    registration_score: float | None
    missing: tuple[str, ...]
    sides: tuple[Side, ...]
    percent_brain: Mapping[str, float]
    expected_dice: Mapping[str, float]
    doubtful: Mapping[str, str]
    spread_percent: Mapping[str, float]
    implausible: Mapping[str, str] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    compared_with: str = ""
    by_age: str = ""
    person: Person = Person()
    plausible: Mapping[str, Range] = field(default_factory=dict)
    percentiles: Mapping[str, Percentile] = field(default_factory=dict)

    @property
    def fine(self) -> bool:
        """Whether nothing is suspicious."""
        return not self.reasons

    @property
    def largest_side(self) -> Side | None:
        """The most asymmetric pair, but vessels; of which both are there."""
        both = (
            side
            for side in self.sides
            if side.left in self.percent_brain and not {side.left, side.right} & {*self.missing}
        )
        return max(both, key=lambda side: abs(side.percent), default=None)

    @property
    def mean_expected_dice(self) -> float | None:
        """Mean over structures; None where nothing is expected (somebody else's sidecar)."""
        return mean(self.expected_dice.values()) if self.expected_dice else None

    @property
    def largest_spread(self) -> tuple[str, float] | None:
        """The structure whose volume differs most between samples, and how much."""
        return max(self.spread_percent.items(), key=lambda item: item[1], default=None)

    @property
    def least_expected(self) -> tuple[str, float] | None:
        """The structure of which the lowest Dice is expected, and that Dice."""
        return min(self.expected_dice.items(), key=lambda item: item[1], default=None)


def fitting(ranges: Ranges, rows: Sequence[Row]) -> Ranges:
    """``ranges``, or none for the results of a network that never draws some of the structures.

    What it draws in their place makes shares of the brain other ones.
    """
    never = any(row.mm3 is None for row in rows if row.code is not None)
    return Ranges("", {}, {}) if never else ranges


def judge(
    result: Finished,
    rows: Sequence[Row],
    mask_quality: MaskQuality | None,
    parcellation: Parcellation,
    ranges: Ranges,
    age_ranges: AgeRanges | None = None,
) -> Judgement:
    """Compare a result with what is plausible, and expected with usual Dice.

    Sizes are compared with those of people of the same age and sex, where ``age_ranges`` cover the
    age, else with ``ranges``.
    """
    ranges, made = fitting(ranges, rows), result.provenance
    volumes = {row.name: row.mm3 for row in rows if row.mm3 is not None}
    unknown = {row.name for row in rows if row.mm3 is None}
    tissue = [s.name for s in parcellation.structures if s.is_tissue and s.name not in unknown]
    of_tissue = [row for row in rows if row.name in tissue]
    brain = brain_mm3(volumes, parcellation)
    found = Judgement(
        mask_litres=volumes.get(BRAIN_MASK, 0.0) / 1e6,
        mask_quality=mask_quality,
        registration_score=made.registration_score,
        missing=tuple(name for name in tissue if not volumes.get(name)),
        sides=tuple(_sides(volumes, parcellation, ranges)),
        percent_brain={n: 100 * volumes.get(n, 0.0) / brain if brain else 0.0 for n in tissue},
        expected_dice={r.name: r.expected_dice for r in of_tissue if r.expected_dice is not None},
        doubtful=dict(_doubtful(of_tissue)),
        spread_percent={
            r.name: 100 * r.sd_mm3 / r.mm3 for r in of_tissue if r.sd_mm3 is not None and r.mm3
        },
    )
    drawn = {row.name: row.mm3 for row in rows if row.code is not None}
    # Totals have no share: the age ranges of the whole brain are in mm^3.
    known_mm3 = {name: mm3 for name, mm3 in drawn.items() if mm3 is not None}
    sizes = base_volumes(known_mm3, parcellation) if brain else {}
    present = {name: 100 * mm3 / brain for name, mm3 in sizes.items() if mm3}
    percentile = percentiles(age_ranges, drawn, parcellation, made.person)
    plausible = dict(ranges.percent_brain)
    if age_ranges and percentile:
        at_age = {name: age_ranges.range(name, made.person, WIDE) for name in present}
        plausible |= {name: span for name, span in at_age.items() if span}
    known = made.person.age_years is not None
    unlike = age_ranges is not None or not known
    found = replace(
        found,
        implausible=dict(_implausible(present, plausible)),
        person=made.person,
        plausible=plausible,
        percentiles=percentile,
        by_age=age_ranges.of_ages if age_ranges and percentile else "",
        compared_with=ranges.of_ages if unlike and not percentile else "",
    )
    return replace(found, reasons=tuple(_reasons(found, ranges, made)))


def _sides(
    volumes: Mapping[str, float], parcellation: Parcellation, ranges: Ranges
) -> Iterator[Side]:
    """Every pair of which at least one was found."""
    for left, right in parcellation.pairs:
        percent = asymmetry(volumes.get(left.name, 0.0), volumes.get(right.name, 0.0))
        if percent is not None:
            span = ranges.asymmetry_percent.get(left.name, ANYTHING)
            yield Side(left.name, right.name, left.shared_name, percent, percent in span)


def _implausible(
    shares: Mapping[str, float], plausible: Mapping[str, Range]
) -> Iterator[tuple[str, str]]:
    """Structures that are there, but smaller or larger than in anybody known; and by how much.

    ``shares`` are in per cent of the brain.
    """
    for name, span in plausible.items():
        share = shares.get(name)
        if share is not None and share not in span:
            yield (
                name,
                f"{share:.3g} % of the brain, {span.low:.3g} to {span.high:.3g} % expected",
            )


def _doubtful(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Structures that were found with a low Dice to expect of them; and how low.

    What a calibration leaves out, being drawn too variably to be measured, is not doubted.
    """
    calibrated = any(row.usual_dice is not None for row in rows)
    for row in rows:
        if row.expected_dice is None or not row.mm3:
            continue
        if not calibrated:  # raw values, of weights that nobody has measured
            if row.expected_dice < POOR_DICE:
                yield row.name, f"{row.expected_dice:.2f}"
        elif row.usual_dice is not None and row.expected_dice < row.usual_dice - FAR_BELOW:
            yield row.name, f"{row.expected_dice:.2f}, {row.usual_dice:.2f} is usual"


def _reasons(found: Judgement, ranges: Ranges, made: Provenance) -> Iterator[str]:
    """Everything that is suspicious, in words; the result's own warnings last."""
    age = made.person.age_years
    if ranges.ages and age is not None and not ranges.ages[0] <= age <= ranges.ages[1]:
        what = "what the network has learnt is" if found.by_age else LEARNT_TOO
        yield f"age {age:g}: {what} of {ranges.of_ages}"
    low, high = PLAUSIBLE_LITRES
    if not low <= found.mask_litres <= high:
        yield f"the brain mask holds {found.mask_litres:.2f} l, {low} to {high} l expected"
    if found.registration_score is not None and found.registration_score < POOR_SCORE:
        yield f"the registration score {found.registration_score:.3f} is below {POOR_SCORE}"
    if found.missing:
        yield f"not found: {', '.join(found.missing)}"
    for name, text in found.implausible.items():
        yield f"{name}: {text}"
    if found.doubtful:
        named = "; ".join(f"{name} ({text})" for name, text in found.doubtful.items())
        yield f"a low Dice is expected: {named}"
    spread = found.spread_percent.items()
    if apart := [f"{name} ({sd:.0f} %)" for name, sd in spread if sd > MOST_SPREAD]:
        yield f"volumes differ between samples: {', '.join(apart)}"
    for side in found.sides:
        if not side.plausible and not {side.left, side.right} & {*found.missing}:
            span = ranges.asymmetry_percent[side.left]
            yield (
                f"{side.name}: left and right differ by"
                f" {side.percent:+.0f} %, {span.low:+.0f} to {span.high:+.0f} % expected"
            )
    yield from (note.text for note in made.notes if note.code not in SAID_OTHERWISE)


def columns(judgement: Judgement) -> dict[str, Any]:
    """The group table's values (``COLUMNS``)."""
    side, quality = judgement.largest_side, judgement.mask_quality
    of_mask = quality.as_dict() if quality else {}
    dice, least = judgement.mean_expected_dice, judgement.least_expected
    apart = judgement.largest_spread
    return {
        "verdict": "fine" if judgement.fine else "look",
        "age": judgement.person.age_years,
        "sex": judgement.person.sex,
        "compared_with": judgement.by_age or judgement.compared_with or None,
        "reasons": "; ".join(judgement.reasons) or None,
        "mask_litres": round(judgement.mask_litres, 3),
        **{f"mask_{each.name}": of_mask.get(each.name) for each in fields(MaskQuality)},
        "missing": ", ".join(judgement.missing) or None,
        "largest_asymmetry": side.name if side else None,
        "largest_asymmetry_percent": round(side.percent, 1) if side else None,
        "expected_dice": round(dice, 3) if dice is not None else None,
        "least_expected": f"{least[0]} {least[1]:.2f}" if least else None,
        "largest_spread": f"{apart[0]} {apart[1]:.1f}" if apart else None,
        "implausible": ", ".join(judgement.implausible) or None,
    }
