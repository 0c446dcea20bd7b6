"""Judgements: results compared with what is plausible, and scans of a group with each other."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cadiff_cli.io.bids.layout import Finished
from cadiff_cli.io.provenance import Provenance, UsedTemplate
from cadiff_cli.io.volumes import Row
from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.products import Person
from cadiff_cli.quality.age_ranges import load_age_ranges
from cadiff_cli.quality.group import FAR, outliers, robust_z
from cadiff_cli.quality.judgement import (
    FAR_BELOW,
    MOST_SPREAD,
    POOR_DICE,
    SAID_OTHERWISE,
    columns,
    judge,
)
from cadiff_cli.quality.ranges import WIDE, Range, Ranges, asymmetry, load_ranges, measure

NO_RANGES = Ranges("", {}, {})
MADE = Provenance("0" * 12, templates=(UsedTemplate("x", "fast", "y", 1.2),))


def judged(parcellation, ranges=NO_RANGES, dice=None, usual=None, **mm3):
    """What is said of these volumes (1 ml each but those given) and of these expected Dice."""
    dice, usual = dice or {}, usual or {}
    rows = [
        Row(s.code, s.name, mm3.get(a, 1000.0), dice.get(a), usual.get(a))
        for s in parcellation.structures
        for a in [s.abbreviation]
    ]
    rows += totals(rows, mm3.get("mask", 1.4e6))
    return judge(Finished("sub-01", Path(), MADE), rows, None, parcellation, ranges)


def totals(rows, mask_mm3=1.4e6):
    """Rows of totals, as every result has them."""
    brain = sum(row.mm3 for row in rows)
    return [Row(None, "Brain-Segmentation", brain), Row(None, "Brain-Mask", mask_mm3)]


def test_robust_distances_do_not_depend_on_the_unit():
    values = dict(enumerate(np.random.default_rng(0).lognormal(sigma=0.5, size=30)))
    z = robust_z(values, 0.03)
    assert robust_z({k: 1000 * v for k, v in values.items()}, 0.03) == pytest.approx(z)
    inverse = robust_z({k: 1 / v for k, v in values.items()}, 0.03)
    assert inverse == pytest.approx({k: -v for k, v in z.items()})
    worse = robust_z(values | {29: 1e6}, 0.03)
    assert worse.pop(29) > FAR
    assert worse == pytest.approx({k: v for k, v in z.items() if k != 29}, abs=0.5)
    assert set(robust_z(dict.fromkeys(range(9), 5.0), 0.03).values()) == {0.0}
    assert robust_z({"a": 1, "b": 2, "c": 90}, 0.03) == {}
    # What is absent is no outlier, nor is what the few have that others lack.
    assert robust_z({**dict.fromkeys(range(9), 0.0), "x": 3.0}, 0.03) == {}


def test_mirroring_a_brain_turns_its_asymmetry_round(parcellation):
    assert asymmetry(3, 2) == -asymmetry(2, 3)
    assert asymmetry(0, 0) is None
    one = judged(parcellation, L_HIP=1200.0)
    other = judged(parcellation, R_HIP=1200.0)
    assert one.largest_side.left == "Left-Hippocampus"
    assert one.largest_side.percent == pytest.approx(-other.largest_side.percent)


def test_what_is_suspicious_is_said(parcellation):
    assert judged(parcellation).fine
    assert judged(parcellation, L_VES=0.0).fine
    missing = judged(parcellation, L_HIP=0.0)
    assert missing.missing == ("Left-Hippocampus",)
    assert "Left-Hippocampus" in " ".join(missing.reasons)
    assert "2.90 l" in " ".join(judged(parcellation, mask=2.9e6).reasons)
    poor = replace(
        MADE,
        templates=(replace(MADE.templates[0], score=1.01),),
        notes=(Note(NoteCode.MASK_AT_EDGE, "the FOV cuts"),),
    )
    rows = [Row(s.code, s.name, 1.0) for s in parcellation.structures] + [
        Row(None, "Brain-Mask", 1.4e6)
    ]
    said = judge(Finished("sub-01", Path(), poor), rows, None, parcellation, NO_RANGES).reasons
    assert any("1.010" in text for text in said)
    assert "the FOV cuts" in said


def test_a_brain_without_any_structure_is_judged(parcellation):
    nothing = {s.abbreviation: 0.0 for s in parcellation.structures}
    empty = judged(parcellation, load_ranges(parcellation), **nothing)
    assert {*empty.missing} == {s.name for s in parcellation.structures if s.is_tissue}
    assert not empty.implausible
    assert empty.largest_side is None
    assert columns(empty)["verdict"] == "look"


def test_a_judgement_repeats_no_note_that_it_says_itself(parcellation):
    def reasons(made):
        rows = [Row(s.code, s.name, 1.0) for s in parcellation.structures]
        rows.append(Row(None, "Brain-Mask", 1.4e6))
        return judge(Finished("sub-01", Path(), made), rows, None, parcellation, NO_RANGES).reasons

    notes = tuple(Note(code, code.value) for code in NoteCode)
    assert {*reasons(replace(MADE, notes=notes))} == {*NoteCode} - {*SAID_OTHERWISE}
    # Sidecars of earlier versions hold no codes: all of their warnings are repeated.
    sidecar = replace(MADE, notes=notes).sidecar()
    del sidecar["WarningCodes"]
    assert {*reasons(Provenance.read(sidecar))} == {*NoteCode}


def test_a_structure_that_nobody_is_sure_of_is_named(parcellation):
    sure = {s.abbreviation: 0.9 for s in parcellation.structures}
    assert judged(parcellation, dice=sure).fine
    assert judged(parcellation, dice=sure).mean_expected_dice == pytest.approx(0.9)
    assert judged(parcellation, dice={**sure, "L_VES": 0.1}).fine
    unsure = judged(parcellation, dice={**sure, "L_HIP": POOR_DICE - 0.01})
    assert set(unsure.doubtful) == {"Left-Hippocampus"}
    assert any("Left-Hippocampus" in text for text in unsure.reasons)
    said = columns(unsure)
    assert said["least_expected"].startswith("Left-Hippocampus")
    assert said["expected_dice"] < 0.9
    # A structure that is hard in every scan is judged by what is usual for it.
    for usual, fine in ((POOR_DICE, True), (POOR_DICE + FAR_BELOW, False)):
        said = judged(parcellation, dice={**sure, "L_HIP": 0.55}, usual={"L_HIP": usual})
        assert said.fine == fine
    # What the calibration leaves out is not doubted.
    assert judged(parcellation, dice={**sure, "L_HIP": 0.1}, usual={"L_THA": 0.8}).fine
    # What is missing is said once.
    missing = judged(parcellation, dice={**sure, "L_HIP": 0.0}, L_HIP=0.0)
    assert len(missing.reasons) == 1
    assert columns(judged(parcellation))["expected_dice"] is None


def test_samples_that_disagree_are_said(parcellation):
    def said(sd_mm3):
        rows = [Row(s.code, s.name, 1000.0, sd_mm3=10.0) for s in parcellation.structures]
        rows[3] = replace(rows[3], sd_mm3=sd_mm3)
        return judge(Finished("x", Path(), MADE), rows, None, parcellation, NO_RANGES), rows[3].name

    calm, name = said(20.0)
    assert columns(calm)["largest_spread"] == f"{name} 2.0"
    assert not any("samples" in text for text in calm.reasons)
    loud, _ = said(10 * MOST_SPREAD + 10)
    assert any("between samples" in text and name in text for text in loud.reasons)
    assert columns(judged(parcellation))["largest_spread"] is None


def test_ranges_hold_the_people_they_were_measured_on(parcellation):
    rng = np.random.default_rng(0)
    people = [
        {s.name: 1000 * float(rng.lognormal(sigma=0.1)) for s in parcellation.structures}
        for _ in range(20)
    ]
    found = measure(people, parcellation, "tests")
    ranges = Ranges(
        "tests",
        {k: Range(*v) for k, v in found["percent_brain"].items()},
        {k: Range(*v) for k, v in found["asymmetry_percent"].items()},
    )
    assert "Left-Hippocampus" in ranges.percent_brain
    assert "Left-vessel" not in ranges.percent_brain
    by_abbreviation = {s.abbreviation: people[0][s.name] for s in parcellation.structures}
    assert judged(parcellation, ranges, **by_abbreviation).fine
    # Larger heads have the same shares.
    assert judged(parcellation, ranges, **{k: 1.3 * v for k, v in by_abbreviation.items()}).fine
    by_abbreviation["L_HIP"] *= 3
    strange = judged(parcellation, ranges, **by_abbreviation)
    assert set(strange.implausible) == {"Left-Hippocampus"}
    assert any("left and right differ" in text for text in strange.reasons)
    assert not measure(people[:3], parcellation, "few")["percent_brain"]


@pytest.mark.parametrize(
    ("age", "fine", "compared_with"),
    [(None, True, "adults of 18 to 90 years"), (30, True, ""), (3, False, ""), (97, False, "")],
)
def test_adults_ranges_are_not_everybodys(parcellation, age, fine, compared_with):
    ranges = Ranges("tests", {}, {}, (18.0, 90.0))
    rows = [Row(s.code, s.name, 1.0) for s in parcellation.structures] + [
        Row(None, "Brain-Mask", 1.4e6)
    ]
    result = Finished("sub-01", Path(), replace(MADE, person=Person(age)))
    said = judge(result, rows, None, parcellation, ranges)
    assert said.fine is fine
    assert said.compared_with == compared_with
    assert any(text.startswith(f"age {age}:") for text in said.reasons) is not fine
    assert columns(said)["age"] == age


def test_what_is_plausible_depends_on_the_age(parcellation, age_ranges):
    """Ventricles of old people are large in the young; of an unknown age they may be anybody's."""
    span = Range(0.1, 1.0, 99.0)
    anybody = Ranges("tests", dict.fromkeys(age_ranges.curves, span), {}, (18.0, 90.0))
    grown = 1000.0 * np.exp(0.03 * 58)

    rows = [
        Row(s.code, s.name, grown if "Lateral-Vent" in s.name else 1000.0)
        for s in parcellation.structures
    ]
    rows += totals(rows)

    def said(person, ranges=anybody):
        result = Finished("sub-01", Path(), replace(MADE, person=person))
        return judge(result, rows, None, parcellation, ranges, age_ranges)

    old, young, unknown, older = (said(Person(age, "M")) for age in (78.0, 25.0, None, 88.0))
    assert old.fine
    assert {*young.implausible} == {"Left-Lateral-Ventricle", "Right-Lateral-Ventricle"}
    assert young.percentiles["Left-Lateral-Ventricle"].value > 99.9
    assert 5 < old.percentiles["Ventricles"].value < 95
    assert unknown.fine
    assert not unknown.percentiles
    assert unknown.compared_with == older.compared_with == "adults of 18 to 90 years"
    assert (old.compared_with, old.by_age) == ("", "60 people of 20 to 80 years")
    assert young.plausible["Left-Thalamus"].low > span.low
    # The network, too, has learnt from people of some ages.
    young_only = replace(anybody, ages=(18.0, 30.0))
    (reason,) = said(Person(78.0, "M"), young_only).reasons
    assert reason == "age 78: what the network has learnt is of adults of 18 to 30 years"


def test_an_average_person_of_any_known_age_looks_fine(parcellation):
    """Structures in the middle of what the released curves expect, and totals beside them."""
    released = load_age_ranges(parcellation)
    low, high = released.ages
    for sex in ("F", "M"):
        for age in np.linspace(low, high, 9):
            person = Person(float(age), sex)
            brain_mm3 = released.range("Brain-Segmentation", person, WIDE).centre
            rows = [
                Row(s.code, s.name, brain_mm3 * (span.centre if span else 0.1) / 100)
                for s in parcellation.structures
                for span in [released.range(s.name, person, WIDE)]
            ]
            rows += totals(rows)
            result = Finished("sub-01", Path(), replace(MADE, person=person))
            said = judge(result, rows, None, parcellation, NO_RANGES, released)
            assert said.by_age
            assert said.fine, said.reasons


def test_released_ranges_are_ordered_and_of_known_structures(parcellation):
    ranges = load_ranges(parcellation)
    assert ranges.people
    names = {s.name for s in parcellation.structures}
    for found in (ranges.percent_brain, ranges.asymmetry_percent):
        assert found
        assert set(found) <= names
        assert all(span.low < span.centre < span.high for span in found.values())


def test_a_group_names_who_stands_out(parcellation):
    rng, ranges = np.random.default_rng(0), load_ranges(parcellation)
    group = {
        f"sub-{k:02d}": judged(parcellation, L_HIP=1000 * rng.normal(1, 0.02), L_THA=1000.0)
        for k in range(9)
    }
    assert outliers(group, ranges) == {}
    group["sub-99"] = judged(parcellation, L_HIP=2500.0)
    found = outliers(group, ranges)
    assert set(found) == {"sub-99"}
    assert any("Left-Hippocampus" in text for text in found["sub-99"])
    assert outliers({name: group[name] for name in ("sub-01", "sub-99")}, ranges) == {}


@pytest.mark.parametrize("n", [5, 10, 40])
def test_a_healthy_group_has_hardly_any_outlier(parcellation, n):
    """People drawn from the ranges of known ones, however few they are."""
    rng, ranges = np.random.default_rng(1), load_ranges(parcellation)
    known = {s.abbreviation: ranges.percent_brain.get(s.name) for s in parcellation.structures}
    people = {
        k: {
            name: 1e3 * span.centre * float(np.exp(rng.normal(0, span.log_sd)))
            for name, span in known.items()
            if span
        }
        for k in range(200)
    }
    named = 0
    for first in range(0, 200, n):
        group = {str(k): judged(parcellation, **people[k]) for k in range(first, first + n)}
        named += len(outliers(group, ranges))
    assert named <= 10


def test_vessels_and_what_is_missing_have_no_asymmetry(parcellation):
    assert judged(parcellation, L_VES=0.0).largest_side.percent == 0
    alone = judged(parcellation, R_HIP=0.0, L_THA=1100.0)
    assert alone.largest_side.left == "Left-Thalamus"
