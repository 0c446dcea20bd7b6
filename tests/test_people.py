"""Ages and sexes of ``participants.tsv``, as people write them."""

import json

import click
import pytest
from click.testing import CliRunner

from cadiff_cli.cli.options import Age, SexOption
from cadiff_cli.io.bids.people import read_people
from cadiff_cli.products import Person

AGES = {
    "plain": ("sub-01\t34.5\nsub-02\tn/a\nsub-03\t30", {"01": 34.5, "03": 30.0}),
    "without the prefix, unsorted": ("02\t40\n01\t30", {"01": 30.0, "02": 40.0}),
    "a quote": ('sub-01\t30\tF\t"tall\nsub-02\t40\tM', {"01": 30.0, "02": 40.0}),
    "a short line": ("sub-01\nsub-02\t40", {"02": 40.0}),
    "DICOM": ("sub-01\t034Y\nsub-02\t018M\nsub-03\t007D", {"01": 34.0, "02": 1.5, "03": 0.019}),
    "a comma": ("sub-01\t34,5", {"01": 34.5}),
    "repeats": ("sub-01\t9\nsub-01\t9", {"01": 9.0}),
    "nobody": ("", {}),
}
TOLD = {
    "the oldest": ("sub-03\t89+", {"03": 89.0}, "with + count as they stand (sub-03 89+)"),
    "a code": ("sub-01\t999\nsub-02\t9", {"02": 9.0}, "above 120 years are ignored (sub-01 999)"),
    "words": ("sub-01\t30-35\nsub-02\told", {}, "not numbers are ignored (sub-01 30-35, sub-02"),
    "negative": ("sub-01\t-1", {}, "not numbers are ignored (sub-01 -1)"),
    "one person twice": ("sub-01\t8\nsub-01\t20", {}, "different ages of one person: sub-01"),
}


@pytest.fixture
def people(tmp_path):
    """What is read of a table and its JSON."""

    def read(table, about=None, encoding="utf-8"):
        path = tmp_path / "participants.tsv"
        path.write_text(table, encoding=encoding, newline="\r\n")
        if about is not None:
            path.with_suffix(".json").write_text(json.dumps(about), encoding="utf-8")
        return read_people(tmp_path)

    return read


def ages(people):
    return {
        label: round(person.age_years, 3)
        for label, person in people.persons.items()
        if person.age_years is not None
    }


@pytest.mark.parametrize("rows", AGES)
def test_ages_are_read_as_people_write_them(people, rows):
    lines, wanted = AGES[rows]
    found = people(f"\ufeffparticipant_id\tage\tsex\n{lines}")
    assert ages(found) == wanted
    assert not found.notes


@pytest.mark.parametrize("rows", TOLD)
def test_ages_that_are_not_plain_numbers_are_told(people, rows):
    lines, wanted, note = TOLD[rows]
    found = people(f"participant_id\tage\tsex\n{lines}")
    assert ages(found) == wanted
    (text,) = found.notes
    assert note in text


def test_units_are_those_of_the_json(people):
    table = "participant_id\tAge\tsex\nsub-01\t18\tF\nsub-02\t150\tM"
    for units, years in (("months", 1.5), ("Weeks", 0.345), ("days", 0.049), ("yr", 18.0)):
        assert ages(people(table, {"Age": {"Units": units}}))["01"] == years
    assert ages(people(table, {"age": {"Units": "months"}}))["02"] == 12.5
    assert ages(people(table, {"age": "of the mother"})) == {"01": 18.0}
    strange = people(table, {"age": {"Units": "moons"}})
    assert not ages(strange)
    assert "'moons'" in strange.notes[0]
    assert "months" in people(table, {}).notes[0]


def test_sexes_are_words_letters_or_explained_codes(people):
    cells = ("Female", "m", "1", "O", "n/a", "2")
    table = "participant_id\tage\tsex\n" + "".join(
        f"0{k}\t9\t{cell}\n" for k, cell in enumerate(cells, 1)
    )
    found = people(table)
    assert [found.of(f"sub-0{k}").sex for k in range(1, 7)] == ["F", "M", None, None, None, None]
    (text,) = found.notes
    assert "sex 1, 2 is taken for unknown" in text
    for levels in ({"1": "male", "2": "female"}, {"1": {"Description": "Male"}, "2": "F"}):
        found = people(table, {"sex": {"Levels": levels}})
        assert (found.of("03").sex, found.of("06").sex) == ("M", "F")
        assert not found.notes
    assert people(table.replace("sex", "gender")).of("01") == Person(9.0, "F")


def test_a_table_without_the_columns_says_what_it_has(people, tmp_path):
    found = people("participant_id\tgroup\nsub-01\tcontrol")
    assert found.of("sub-01") == Person()
    assert found.notes == (
        "participants.tsv has no column age and no column sex (its columns: participant_id, group)",
    )
    assert "no column participant_id" in people("participant_id,age\n01,3").notes[0]
    assert "no column participant_id" in people("").notes[0]
    assert "cannot be read" in people("participant_id\tÄlter", encoding="latin-1").notes[0]
    nothing = read_people(tmp_path / "none")
    assert (nothing.of("01"), nothing.notes) == (Person(), ())
    assert people("participant_id\tage\tsex\n01\t3\tF", encoding="utf-16").of("01").sex == "F"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--age", "72"], (72.0, None)),
        (["--age", "018M", "--sex", "male"], (1.5, "M")),
        (["--age", "89+", "--sex", "f"], (89.0, "F")),
        ([], (None, None)),
        (["--age", "old"], "'old' is no age of 0 to 120 years: write 72"),
        (["--age", "860"], "'860' is no age"),
        (["--sex", "x"], "'x' is neither F nor M"),
    ],
)
def test_options_take_what_tables_hold(words, wanted):
    made = []

    @click.command()
    @click.option("--age", type=Age())
    @click.option("--sex", type=SexOption())
    def command(age, sex):
        made.append((age, sex))

    answer = CliRunner().invoke(command, words)
    if isinstance(wanted, str):
        assert answer.exit_code == 2
        assert wanted in answer.output
    else:
        assert made == [wanted]
