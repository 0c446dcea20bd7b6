"""Percentiles by age and sex: a known law is recovered, with honest uncertainty."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.special import ndtr, ndtri

from cadiff_cli.cli.ranges import command
from cadiff_cli.config import Config, Recipe, Request
from cadiff_cli.errors import CadiffError, DataError, MissingInputError, OutputError, UsageError
from cadiff_cli.io.cohorts import Cohort, parcellation_in, read_cohort
from cadiff_cli.io.volumes import column
from cadiff_cli.labels.parcellation import BASE, Parcellation, Structure
from cadiff_cli.products import Person
from cadiff_cli.quality.age_fit import PERCENTILES, Form, check, fit
from cadiff_cli.quality.age_ranges import (
    BRAIN,
    NOT_CSF,
    VENTRICLES,
    design,
    keep_age_ranges,
    load_age_ranges,
    percentiles,
    ranges_of,
    read_age_ranges,
    sizes,
    write_age_ranges,
)
from cadiff_cli.runner.execute import _ranges
from cadiff_cli.runner.job import Job, job_of

TOY = Parcellation(
    "toy",
    (
        Structure(3, "Left-Cortex", "L_CTX", "#111111", 8, 42),
        Structure(4, "Left-Ventricle", "L_LV", "#222222", 3, 43),
        Structure(17, "Left-Hippocampus", "L_HIP", "#333333", 2, 53),
        Structure(30, "Left-vessel", "L_VES", "#444444", 6, 62),
        Structure(42, "Right-Cortex", "R_CTX", "#111111", 8, 3),
        Structure(43, "Right-Ventricle", "R_LV", "#222222", 3, 4),
        Structure(53, "Right-Hippocampus", "R_HIP", "#333333", 2, 17),
        Structure(62, "Right-vessel", "R_VES", "#444444", 6, 30),
    ),
)
SEX_EFFECT = 0.06


def law(name, ages):
    """Mean and SD of the log share (per cent) of a structure; women have ``SEX_EFFECT`` more."""
    grown = np.asarray(ages, float) - 18
    if name.endswith("Ventricle"):
        return np.log(0.5) + 0.02 * grown, 0.3 + 0 * grown
    return np.log(0.3) - 0.00004 * grown**2, 0.06 * np.exp(0.01 * (grown - 32))


def people(n, seed=0, ages=(18, 90), source_sd=0.0, n_sources=1):
    """People whose shares of the brain follow the law exactly.

    Sources shift it by ``source_sd`` times the standard deviation of people.
    """
    rng = np.random.default_rng(seed)
    age, female = rng.uniform(*ages, n), rng.integers(0, 2, n)
    source = rng.integers(0, n_sources, n)
    shares = {}
    for name in ("Left-Ventricle", "Right-Ventricle", "Left-Hippocampus", "Right-Hippocampus"):
        mean, sd = law(name, age)
        shift = source_sd * rng.normal(0, 1, n_sources)[source]
        shares[name] = np.exp(mean + SEX_EFFECT * female + sd * (shift + rng.standard_normal(n)))
    rest = (100 - sum(shares.values())) / 2
    brain = rng.normal(1.1e6, 1e5, n)
    shares |= {"Left-Cortex": rest, "Right-Cortex": rest}
    return Cohort(
        tuple(f"{k:03d}" for k in range(n)),
        tuple(f"scanner {k}" for k in source),
        tuple(Person(float(a), "F" if f else "M") for a, f in zip(age, female, strict=True)),
        {name: tuple((share * brain / 100).tolist()) for name, share in shares.items()},
    )


def rearranged(cohort, order):
    return Cohort(
        *(tuple(values[k] for k in order) for values in (cohort.subjects, cohort.sources)),
        tuple(cohort.persons[k] for k in order),
        {name: tuple(values[k] for k in order) for name, values in cohort.mm3.items()},
    )


@pytest.fixture(scope="module")
def many():
    return fit(people(2000), TOY, "2000 phantoms")


@pytest.fixture(scope="module")
def few():
    return fit(people(130, seed=3), TOY)


@pytest.mark.parametrize("name", ["Left-Ventricle", "Right-Hippocampus"])
def test_the_law_is_recovered(many, name):
    ages = np.array([22.0, 40.0, 60.0, 75.0, 88.0])
    mean, sd = law(name, ages)
    for sex, shift in (("F", SEX_EFFECT), ("M", 0.0)):
        lines = np.log(many.lines(name, ages, Person(sex=sex), PERCENTILES))
        wanted = mean + shift + ndtri(np.array(PERCENTILES) / 100)[:, None] * sd
        assert abs((lines - wanted) / sd).max() < 0.35
    sex = many.curves[name].mean[1], np.sqrt(many.curves[name].mean_covariance[1][1])
    assert abs(sex[0] - SEX_EFFECT) < 3 * sex[1]
    assert many.ages == pytest.approx((18, 90), abs=0.5)


def test_a_percentile_is_the_share_of_people_who_have_less(many, few):
    fresh = people(800, seed=9)
    measured = sizes({name: np.array(v) for name, v in fresh.mm3.items()}, TOY)
    for ranges, tolerance in ((many, 5.0), (few, 10.0)):
        for name in ("Left-Ventricle", "Hippocampus", VENTRICLES, BRAIN):
            found = [
                ranges.percentile(name, float(size), person)
                for size, person in zip(measured[name], fresh.persons, strict=True)
            ]
            values = np.array([p.value for p in found if p])
            for level in PERCENTILES:
                assert 100 * (values < level).mean() == pytest.approx(level, abs=tolerance)


def test_the_interval_of_a_percentile_holds_the_true_one():
    """In about 95 % of cohorts of few people."""
    name, person = "Left-Hippocampus", Person(70.0, "F")
    mean, sd = (float(x) for x in law(name, 70.0))
    inside = []
    for seed in range(40):
        ranges = fit(people(80, seed=seed), TOY)
        for z in (-1.5, 0.0, 1.0):
            size = np.exp(mean + SEX_EFFECT + z * sd)
            found = ranges.percentile(name, size, person)
            inside.append(found.low <= 100 * ndtr(z) <= found.high)
            assert found.low < found.value < found.high
    assert 0.87 < np.mean(inside) < 1


def test_little_is_known_where_few_people_are():
    young, old = people(120, ages=(20, 45)), people(8, seed=1, ages=(45, 85))
    both = Cohort(
        *(getattr(young, x) + getattr(old, x) for x in ("subjects", "sources", "persons")),
        {name: young.mm3[name] + old.mm3[name] for name in young.mm3},
    )
    ranges = fit(both, TOY)
    ages, name = np.array([32.0, 50.0, 65.0, 80.0]), "Left-Hippocampus"
    middle = ranges.lines(name, ages, Person(sex="F"), [50.0])[0]
    found = [
        ranges.percentile(name, size, Person(age, "F"))
        for age, size in zip(ages, middle, strict=True)
    ]
    widths = [p.high - p.low for p in found]
    assert widths == sorted(widths)
    assert widths[-1] > 2 * widths[0]
    assert all(p.value == pytest.approx(50) for p in found)


def test_the_order_of_people_does_not_matter(few):
    cohort = people(130, seed=3)
    order = np.random.default_rng(1).permutation(130)
    assert fit(rearranged(cohort, order), TOY) == few
    forms = {"": Form()}
    assert check(cohort, TOY, forms) == check(rearranged(cohort, order), TOY, forms)


def test_a_scanner_does_not_pass_for_age():
    """Old people of another scanner, all of whose hippocampi look 15 % larger."""
    young, old = people(60, ages=(20, 50)), people(60, seed=1, ages=(45, 80))
    old = replace(old, sources=("other",) * 60, subjects=tuple(f"x{k}" for k in range(60)))
    name = "Left-Hippocampus"
    larger = tuple(1.15 * v for v in old.mm3[name])
    both = Cohort(
        *(getattr(young, x) + getattr(old, x) for x in ("subjects", "sources", "persons")),
        {k: young.mm3[k] + (larger if k == name else old.mm3[k]) for k in young.mm3},
    )

    def error(form):
        lines = fit(both, TOY, form=form).lines(name, np.array([25.0, 75.0]), Person(sex="M"), [50])
        true = law(name, [25.0, 75.0])[0]
        change = np.diff(np.log(lines[0]))[0] - np.diff(true)[0]
        return abs(change)

    assert error(Form()) < 0.7 * error(Form(of_source=False))
    assert fit(both, TOY).curves[name].source_sd > 0
    assert fit(young, TOY).curves[name].source_sd == 0


def test_new_scanners_are_covered():
    """People of sources that are left out lie within the percentiles all the same."""
    cohort = people(240, seed=5, source_sd=0.8, n_sources=12)
    fresh = people(600, seed=6, source_sd=0.8, n_sources=600)
    measured = sizes({name: np.array(v) for name, v in fresh.mm3.items()}, TOY)

    def outside(form):
        """Per cent of people below 5 or above 95, who should be 10."""
        ranges, name = fit(cohort, TOY, form=form), "Left-Hippocampus"
        found = [
            ranges.percentile(name, *x) for x in zip(measured[name], fresh.persons, strict=True)
        ]
        return 100 * np.mean([not 5 < p.value < 95 for p in found if p])

    assert outside(Form()) == pytest.approx(10, abs=5)
    assert outside(replace(Form(), of_source=False)) > outside(Form())


def test_age_and_sex_predict_better_than_neither():
    cohort = people(200, seed=2)
    forms = {"age": Form(), "none": Form(of_age=False, of_sex=False, spread_of_age=False)}
    found = check(cohort, TOY, forms)
    for group in ("all", "under 40", "over 65"):
        assert found["age"][group]["pinball"] < found["none"][group]["pinball"]
    assert found["age"]["over 65"]["coverage"] == pytest.approx(PERCENTILES, abs=8)


def test_a_source_that_holds_nearly_everybody_is_not_left_out():
    """Nothing can be fitted to the two others; tenths of all can be left out all the same."""
    cohort = people(20, seed=4)
    lopsided = replace(cohort, sources=("large",) * 18 + ("small",) * 2)
    found = check(lopsided, TOY, {"age": Form(of_age=False)})["age"]
    assert found["all"]["people"] == 20
    assert found["other sources"]["people"] == 2  # predicted from the large source
    alone = check(cohort, TOY, {"age": Form(of_age=False)})["age"]
    assert "other sources" not in alone


def test_two_knots_make_a_straight_line_and_three_bend_it():
    ages = np.linspace(0, 100, 101)
    straight = design(ages, 0 * ages, (10, 90))
    assert np.linalg.matrix_rank(np.stack([np.ones(101), ages, *straight.T])) == 2
    bent = design(ages, 0 * ages, (10, 50, 90))
    curvature = np.diff(bent @ [0, 0, 0, 1.0], 2)
    assert abs(curvature[ages[1:-1] < 10]).max() < 1e-12
    assert abs(curvature[ages[1:-1] > 91]).max() < 1e-12
    assert abs(curvature).max() > 1e-6


def test_who_has_no_percentile(few):
    volumes = {name: values[0] for name, values in people(1).mm3.items()}
    assert percentiles(few, volumes, TOY, Person(40.0, "F"))
    for person in (Person(), Person(sex="F"), Person(3.0, "F"), Person(95.0, "M")):
        assert percentiles(few, volumes, TOY, person) == {}
    assert percentiles(None, volumes, TOY, Person(40.0)) == {}
    never = volumes | {"Left-Ventricle": None}
    assert percentiles(few, never, TOY, Person(40.0)) == {}
    absent = percentiles(few, volumes | {"Left-Ventricle": 0.0}, TOY, Person(40.0))
    assert "Left-Ventricle" not in absent
    assert "Left-vessel" not in absent
    other = replace(TOY, name="other")
    assert percentiles(few, volumes, other, Person(40.0)) == {}


def test_an_unknown_sex_is_either(few):
    volumes = {name: values[0] for name, values in people(1).mm3.items()}
    both, woman, man = (
        percentiles(few, volumes, TOY, Person(40.0, sex))["Hippocampus"] for sex in (None, "F", "M")
    )
    assert both.value == pytest.approx((woman.value + man.value) / 2)
    for end in ("low", "high"):
        assert getattr(both, end) == pytest.approx(np.mean([getattr(x, end) for x in (woman, man)]))
    assert woman.value < man.value


@pytest.mark.parametrize("sex", [None, "F", "M"])
def test_so_many_per_cent_lie_below_a_line(few, sex):
    """What a page draws and what it says are the same law."""
    person = Person(40.0, sex)
    for name in ("Hippocampus", BRAIN):
        for wanted in (5.0, 50.0, 95.0):
            ((size,),) = few.lines(name, np.array([40.0]), person, [wanted])
            assert few.percentile(name, float(size), person).value == pytest.approx(
                wanted, abs=1e-6
            )


def test_what_is_small_among_ventricles_is_large_among_the_rest(few):
    volumes = {name: values[5] for name, values in people(9).mm3.items()}
    found = percentiles(few, volumes, TOY, Person(60.0, "M"))
    assert found[NOT_CSF].value == pytest.approx(100 - found[VENTRICLES].value)
    assert found[NOT_CSF].low < found[NOT_CSF].value < found[NOT_CSF].high
    larger = {name: 1.3 * v for name, v in volumes.items()}
    again = percentiles(few, larger, TOY, Person(60.0, "M"))
    assert again["Hippocampus"].value == pytest.approx(found["Hippocampus"].value)
    assert again[BRAIN].value > found[BRAIN].value


def test_a_structure_that_many_lack_has_no_curve():
    cohort = people(100)
    lacking = tuple(0.0 if k < 9 else v for k, v in enumerate(cohort.mm3["Left-Ventricle"]))
    found = fit(replace(cohort, mm3=cohort.mm3 | {"Left-Ventricle": lacking}), TOY)
    assert "Left-Ventricle" not in found.curves
    assert "Right-Ventricle" in found.curves
    one = tuple(0.0 if k < 1 else v for k, v in enumerate(cohort.mm3["Left-Ventricle"]))
    assert (
        "Left-Ventricle"
        in fit(replace(cohort, mm3=cohort.mm3 | {"Left-Ventricle": one}), TOY).curves
    )


@pytest.mark.parametrize(
    ("cohort", "why"),
    [
        (people(12), "12 people"),
        (people(50, ages=(30, 31)), "years old"),
        (replace(people(50), persons=(Person(),) * 50), "0 people"),
        (replace(people(50), sources=tuple(map(str, range(50)))), "50 sources of 50 people"),
        (replace(people(50), sources=(*"ab", *(str(k % 24) for k in range(48)))), "26 sources of"),
    ],
)
def test_too_few_people_are_refused(cohort, why):
    with pytest.raises(DataError, match=why):
        fit(cohort, TOY)


def of(cohort, ages, sexes=None):
    """The same people at other ages, and of other sexes."""
    sexes = sexes or [p.sex for p in cohort.persons]
    persons = (Person(float(a), s) for a, s in zip(ages, sexes, strict=True))
    return replace(cohort, persons=tuple(persons))


@pytest.mark.parametrize(
    ("ages", "sexes", "why"),
    [
        ([22] * 58 + [25, 28], None, "90 % of people are 22 to 22 years old"),
        ([22] * 57 + [25, 28, 31], None, "90 % of people are 22 to 22.15 years old"),
        ([20, 40] * 30, None, "60 people of 2 different ages"),
        ([22] * 56 + [50, 50, 80, 80], ["F"] * 56 + ["M"] * 4, None),
        ([22] * 18 + [50, 80], None, "20 people of 3 different ages"),
        ([20] * 20 + [30, 40] * 20, ["F"] * 20 + ["M"] * 40, "20 women and 40 men"),
        ([20, 30, 40] * 20, ["F", "F", "F", "M", "M", "M"] * 10, None),
    ],
)
def test_people_too_alike_to_tell_what_age_does_are_refused(ages, sexes, why):
    """None of these may end in a singular matrix, or in curves without numbers."""
    cohort = of(people(len(ages)), ages, sexes)
    if why is None:
        curves = fit(cohort, TOY).curves.values()
        assert all(np.isfinite([*c.mean, *c.spread, c.source_sd]).all() for c in curves)
        return
    for function in (fit, check):
        with pytest.raises(DataError, match=why) as caught:
            function(cohort, TOY)
        assert "needed" in caught.value.remedy or "add people" in caught.value.remedy


def test_a_structure_that_only_people_too_alike_have_has_no_curve():
    """Without the three old people two ages are left, which do not tell a curve."""
    cohort = of(people(60), [22] * 28 + [24] * 29 + [60, 70, 80])
    assert "Left-Ventricle" in fit(cohort, TOY).curves
    lacking = tuple(v if k < 57 else 0.0 for k, v in enumerate(cohort.mm3["Left-Ventricle"]))
    some = replace(cohort, mm3=cohort.mm3 | {"Left-Ventricle": lacking})
    found = fit(some, TOY).curves
    assert {*fit(cohort, TOY).curves} - {*found} == {"Left-Ventricle"}
    scores = check(some, TOY, {"": Form()})[""]["all"]
    assert np.isfinite([scores["pinball"], *scores["coverage"]]).all()


@pytest.mark.parametrize("rest", ["of one age", "of one sex"])
def test_sources_without_which_the_others_are_too_alike(rest):
    """Those of one age are no base to predict anybody; those of one sex tell nothing of sex."""
    cohort = people(60, seed=4)
    ages = [p.age_years for p in cohort.persons]
    if rest == "of one age":
        mixed = of(cohort, ages[:30] + [22.0] * 30)
    else:
        mixed = of(cohort, ages, ["F"] * 30 + ["M"] * 30)
    mixed = replace(mixed, sources=("a",) * 30 + ("b",) * 30)
    found = check(mixed, TOY, {"": Form()})[""]
    assert found["all"]["people"] == 60
    assert found["other sources"]["people"] == (30 if rest == "of one age" else 60)
    assert np.isfinite(
        [found["other sources"]["pinball"], *found["other sources"]["coverage"]]
    ).all()


def test_one_sex_alone_tells_nothing_of_the_other():
    cohort = people(60)
    men = replace(cohort, persons=tuple(replace(p, sex="M") for p in cohort.persons))
    found = fit(men, TOY).curves["Left-Hippocampus"]
    assert found.mean[1] == 0


def test_a_file_holds_the_same_ranges(few, tmp_path):
    path = tmp_path / "ranges.json"
    write_age_ranges(path, few)
    assert read_age_ranges(path) == few
    assert read_age_ranges(path).fingerprint == few.fingerprint
    assert replace(few, people="others").fingerprint != few.fingerprint
    whole = json.loads(path.read_text())
    for spoilt in (
        {**whole, "format": 99},
        {**whole, "knots": [1]},
        {**whole, "knots": whole["knots"][::-1]},
        {**whole, "ages": whole["ages"][::-1]},
        {**whole, "sources": [1]},
        {**whole, "curves": []},
        {**whole, "curves": {"x": {}}},
        {k: v for k, v in whole.items() if k != "ages"},
        [],
    ):
        path.write_text(json.dumps(spoilt))
        with pytest.raises(DataError, match="no age ranges"):
            read_age_ranges(path)
    path.write_text(json.dumps(whole).replace(str(few.curves[BRAIN].mean[0]), "NaN"))
    with pytest.raises(DataError, match="without numbers"):
        read_age_ranges(path)
    with pytest.raises(MissingInputError, match="cadiff ranges train"):
        read_age_ranges(tmp_path / "none.json")


@pytest.fixture
def table(tmp_path):
    """A table of people of ``cadiff40``-like columns, in the toy's structures."""

    def write(name="people.tsv", delimiter="\t", title=column, more=(), **changes):
        cohort = people(60)
        header = ["participant_id", "age", "sex", *(title(x) for x in cohort.mm3), *more]
        lines = [header]
        for k, subject in enumerate(cohort.subjects):
            person = cohort.persons[k]
            cells = [f"sub-{subject}", f"{person.age_years:.1f}", person.sex]
            cells += [f"{v[k]:.3f}" for v in cohort.mm3.values()]
            lines.append([*cells, *(more[x](k) for x in more)])
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(delimiter.join(map(str, line)) + "\n" for line in lines)
        for old, new in changes.items():
            text = text.replace(old, new)
        path.write_text(text)
        return path

    return write


def test_tables_are_read_by_names_or_codes(table):
    codes = {s.name: str(s.code) for s in TOY.structures}
    first = read_cohort([table()], TOY)
    assert len(first) == 60
    assert first.notes == ()
    again = read_cohort([table("codes.csv", ",", codes.get)], TOY)
    assert again.mm3 == first.mm3
    assert again.persons == first.persons
    assert {*again.sources} == {"codes"}


def test_several_scans_of_a_person_count_once(table):
    once = read_cohort([table()], TOY)
    path = table("twice.tsv", more={"source": lambda k: "a" if k < 30 else "b"})
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, *lines[1:]]) + "\n")
    twice = read_cohort([path], TOY)
    assert twice.mm3 == once.mm3
    assert "whose means count: 60" in twice.notes[0]
    assert {*twice.sources} == {"a", "b"}


@pytest.mark.parametrize("unknown", ["n/a", ""])
def test_a_source_that_is_not_known_is_the_tables_own(table, unknown):
    """Else people of several tables, who share their labels by chance, would be one person."""
    tables = [table(f"{name}.tsv", more={"source": lambda _: unknown}) for name in "ab"]
    cohort = read_cohort(tables, TOY)
    assert len(cohort) == 120
    assert {*cohort.sources} == {"a", "b"}


def test_people_without_a_label_are_not_one_person(table):
    cohort = read_cohort([table(**{"sub-000": "n/a", "sub-001": ""})], TOY)
    assert len(cohort) == 58
    assert "2 of 60 scans are left out" in cohort.notes[0]


def test_a_single_quotation_mark_swallows_nothing(table):
    notes = {"notes": lambda k: '"odd' if k == 40 else "even"}
    with pytest.raises(DataError, match="cannot be parted"):
        read_cohort([table(more=notes)], TOY)
    quoted = {"notes": lambda k: '"a, b"'}
    assert len(read_cohort([table("r.csv", ",", more=quoted)], TOY)) == 60


def test_a_column_that_comes_twice_is_refused(table):
    name = column(next(iter(people(1).mm3)))
    with pytest.raises(DataError, match=f"several columns {name}"):
        read_cohort([table(more={name: lambda k: 1})], TOY)


def test_cubic_centimetres_are_refused(table):
    path = table()
    header, *lines = (line.split("\t") for line in path.read_text().splitlines())
    small = [[*line[:3], *(str(float(x) / 1000) for x in line[3:])] for line in lines]
    path.write_text("".join("\t".join(line) + "\n" for line in [header, *small]))
    with pytest.raises(DataError, match="not cm3"):
        read_cohort([path], TOY)


def test_a_table_is_not_replaced_by_its_ranges(table, tmp_path):
    toy = tmp_path / "toy.tsv"
    toy.write_text(TOY.as_tsv())
    path = table()
    before = path.read_bytes()
    for out in (path, tmp_path):
        done = train(path, "-o", out, "--parcellation", toy, "--overwrite", "--no-check")
        assert isinstance(done.exception, OutputError)
    assert path.read_bytes() == before


def with_rows(path, delimiter=","):
    """The table as pandas writes it: the first column has no name, and numbers the rows."""
    header, *lines = path.read_text().splitlines()
    rows = [delimiter + header, *(f"{k}{delimiter}{line}" for k, line in enumerate(lines, 20))]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_column_without_a_name_is_nobody_s_age_or_source(table, tmp_path):
    once = read_cohort([table()], TOY)
    assert read_cohort([with_rows(table("rows.csv", ","))], TOY).persons == once.persons
    participants = tmp_path / "participants.tsv"
    participants.write_text(
        "participant_id\tage\tsex\n" + "".join(f"sub-{x}\t77\tM\n" for x in once.subjects)
    )
    bare = table("bare.csv", ",", sex="gone", age="years")
    lines = bare.read_text().splitlines()
    bare.write_text("\n".join([*lines, *lines[1:]]) + "\n")
    found = read_cohort([with_rows(bare)], TOY, participants)
    assert {person.age_years for person in found.persons} == {77.0}
    assert found.mm3 == once.mm3
    assert {*found.sources} == {"bare"}
    assert found.notes == ("people with several scans, whose means count: 60",)
    with pytest.raises(DataError, match="120 of 120 scans are left out: no age"):
        read_cohort([bare], TOY)


def test_lines_that_are_longer_than_the_header(table):
    """What is empty does not matter; else every cell may stand under the name of another."""
    once = read_cohort([table()], TOY)
    path = table("long.tsv")
    header, *lines = path.read_text().splitlines()
    for several in (lines[:1], lines):
        longer = [line + "\t" if line in several else line for line in lines]
        path.write_text("\n".join([header, *longer, "\t" * 9]) + "\n")
        found = read_cohort([path], TOY)
        assert (found.persons, found.mm3, found.notes) == (once.persons, once.mm3, ())
    path.write_text("\n".join([header, *(f"{k}\t{x}" for k, x in enumerate(lines, 1))]) + "\n")
    with pytest.raises(DataError, match=r"begins with 1, sub-000, ... has 10 cells, the header 9"):
        read_cohort([path], TOY)


def with_commas(path):
    """Numbers as most of Europe writes them."""
    path.write_text(path.read_text().replace(".", ","))
    return path


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_decimal_comma_is_read(table, delimiter):
    once = read_cohort([table()], TOY)
    found = read_cohort([with_commas(table("europe.csv", delimiter))], TOY)
    assert (found.persons, found.mm3, found.notes) == (once.persons, once.mm3, ())


def test_commas_that_may_part_thousands_are_refused(table):
    """Such a table could be read a thousand times too small."""
    path = table("thousands.tsv")
    header, *lines = (line.split("\t") for line in path.read_text().splitlines())
    rows = [[*x[:3], *(f"{float(cell):,.0f}" for cell in x[3:])] for x in lines]
    path.write_text("".join("\t".join(x) + "\n" for x in [header, *rows]))
    with pytest.raises(DataError, match="commas may part thousands or be decimal, in") as caught:
        read_cohort([path], TOY)
    assert "1234.5 or 1234,5" in caught.value.remedy


def test_why_no_scan_can_be_used_is_told(table):
    path = table()
    header, *lines = path.read_text().splitlines()
    spoilt = ["\t".join([*line.split("\t")[:3], *["12 mm3"] * 6]) for line in lines]
    path.write_text("\n".join([header, *spoilt]) + "\n")
    with pytest.raises(DataError, match="no scan can be used") as caught:
        read_cohort([path], TOY)
    for needed in ("60 of 60 scans are left out, without all volumes", "'12 mm3'", "sub-000"):
        assert needed in str(caught.value)
    zero = ["\t".join([*line.split("\t")[:3], *["0"] * 6]) for line in lines]
    path.write_text("\n".join([header, *zero]) + "\n")
    with pytest.raises(DataError, match="all are 0"):
        read_cohort([path], TOY)
    path.write_text(header + "\n")
    with pytest.raises(DataError, match="no line below its header"):
        read_cohort([path], TOY)


def test_ages_and_sexes_that_are_not_read_are_told(table):
    """Codes for sexes, and ages in months, were unknown without a word."""
    path = table("codes.tsv", **{"\tF\t": "\t2\t", "\tM\t": "\t1\t"})
    header, *lines = path.read_text().splitlines()
    first = lines[0].split("\t")
    first[1] = "412"
    path.write_text("\n".join([header, "\t".join(first), *lines[1:]]) + "\n")
    found = read_cohort([path], TOY)
    assert {person.sex for person in found.persons} == {None}
    age, sex, left_out = found.notes
    assert "age is taken for unknown in 1 of 60 scans (sub-000 412); years, 0 to 120 are" in age
    assert "sex is taken for unknown in 60 of 60 scans (sub-000 " in sex
    assert "F and M are read" in sex
    assert "1 of 60 scans are left out: no age" in left_out


def test_a_scan_has_the_age_of_its_session(table, tmp_path):
    path = table("two.tsv", age="years", more={"session_id": lambda k: f"ses-{k % 2}"})
    for k in range(60):
        (tmp_path / f"sub-{k:03}" / "ses-1").mkdir(parents=True)
        (tmp_path / f"sub-{k:03}" / f"sub-{k:03}_sessions.tsv").write_text(
            "session_id\tage\nses-1\t50\n"
        )
    participants = tmp_path / "people.tsv"
    participants.write_text(
        "participant_id\tage\tsex\n" + "".join(f"sub-{k:03}\t40\tM\n" for k in range(60))
    )
    found = read_cohort([path], TOY, participants)
    assert [person.age_years for person in found.persons[:4]] == [40, 50, 40, 50]
    # Other projects' labels have underscores; sessions may lack their prefix.
    renamed = path.read_text().replace("sub-", "OAS1_").replace("ses-", "")
    path.write_text(renamed)
    participants.write_text(participants.read_text().replace("sub-", "OAS1_"))
    found = read_cohort([path], TOY, participants)
    assert {(person.age_years, person.sex) for person in found.persons} == {(40, "M"), (40, "F")}


def test_what_a_table_lacks_is_told(table, tmp_path):
    path = table(more={"verdict": lambda k: "look" if k < 3 else "fine"})
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace("sub-000\t", "sub-000\tn/a\t").rsplit("\t", 2)[0]
    lines[2] = "\t".join("n/a" if k == 1 else x for k, x in enumerate(lines[2].split("\t")))
    path.write_text("\n".join(lines) + "\n")
    found = read_cohort([path], TOY)
    assert len(found) == 58
    text = "; ".join(found.notes)
    for needed in ("sub-000", "1 of 59 scans are left out: no age", "verdict 'look'"):
        assert needed in text
    participants = tmp_path / "participants.tsv"
    participants.write_text("participant_id\tage\tsex\nsub-001\t33\tF\n")
    assert len(read_cohort([path], TOY, participants)) == 59
    for text, why in (("a\tb\n1\t2\n", "no column participant_id"), ("", "no column")):
        path.write_text(text)
        with pytest.raises(DataError, match=why):
            read_cohort([path], TOY)
    path.write_text("subject\tage\n1\t2\n")
    with pytest.raises(DataError, match="no column left_cortex"):
        read_cohort([path], TOY)
    with pytest.raises(MissingInputError, match="group"):
        read_cohort([tmp_path], TOY)
    with pytest.raises(UsageError, match="twice"):
        read_cohort([path, path], TOY)


def train(*words):
    return CliRunner().invoke(command, ["train", *map(str, words)])


def test_ranges_are_trained_from_tables_and_folders(table, tmp_path):
    """A folder's group table, and the dataset's ages."""
    toy = tmp_path / "toy.tsv"
    toy.write_text(TOY.as_tsv())
    group = table("study/group_morph.tsv", age="years")
    (tmp_path / "study" / "participants.tsv").write_text(
        group.read_text().replace("years", "age"), encoding="utf-8"
    )
    out = tmp_path / "ranges.json"
    done = train(group.parent, table(), "-o", out, "--parcellation", toy, "--no-check")
    assert done.exit_code == 0, done.output
    found = read_age_ranges(out)
    assert found.sources == {"study": 60, "people": 60}
    assert found.people == "120 people (people 60, study 60)"
    assert str(tmp_path) not in out.read_text()
    again = train(table(), "-o", out, "--parcellation", toy, "--no-check")
    assert isinstance(again.exception, CadiffError)
    done = train(table(), "-o", out, "--parcellation", toy, "--overwrite", "--people", "us")
    assert done.exit_code == 0, done.output
    assert "by age and sex, over 65" in done.output
    assert read_age_ranges(out).people == "us"
    assert read_age_ranges(out).check["by age and sex"]["all"]["people"] == 60


def test_a_parcellation_is_named_or_that_of_the_results(tmp_path):
    assert parcellation_in([tmp_path]).name == BASE
    assert parcellation_in([], "cadiff40").name == BASE
    with pytest.raises(MissingInputError, match="no parcellation"):
        parcellation_in([], "none")


def test_released_ranges_cover_the_parcellation(parcellation):
    ranges = load_age_ranges(parcellation)
    assert ranges is not None
    names = {s.name for s in parcellation.structures if s.is_tissue}
    assert names <= set(ranges.curves)
    assert ranges.ages[0] < 20
    assert ranges.ages[1] > 90
    ages = np.linspace(*ranges.ages, 20)
    for name in ranges.curves:
        lines = ranges.lines(name, ages, Person(), PERCENTILES)
        assert (np.diff(lines, axis=0) > 0).all()
    finer = replace(TOY, name="finer")
    assert load_age_ranges(finer) is None


def test_ranges_of_other_structures_are_refused(few, tiny_model, tmp_path):
    """Before anything costly begins; and a file that changes meanwhile."""
    path = tmp_path / "ranges.json"
    write_age_ranges(path, few)
    recipe = Recipe(Config(), "x", "m", "0" * 64, ranges=few.fingerprint)
    job = Job(tmp_path / "t1.nii", tmp_path, "", recipe, "x", "m", ranges=path)
    with pytest.raises(UsageError, match="are of toy, tiny draws cadiff40"):
        _ranges(job, tiny_model)
    with pytest.raises(DataError, match="changed while"):
        _ranges(replace(job, recipe=replace(recipe, ranges="other")), tiny_model)
    with pytest.raises(MissingInputError, match="cadiff ranges train"):
        job_of(Request(ranges=tmp_path / "none.json"), tmp_path)


def test_an_output_folder_keeps_the_ranges_that_were_given(few, parcellation, tmp_path):
    keep_age_ranges(tmp_path, few)
    assert ranges_of(tmp_path, few.fingerprint, TOY) == few
    assert ranges_of(tmp_path, "other", TOY) is None
    assert ranges_of(tmp_path, "", parcellation) == load_age_ranges(parcellation)
