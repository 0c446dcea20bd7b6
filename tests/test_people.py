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


def test_a_json_that_cannot_be_read_explains_no_age(people, tmp_path):
    """A comma too many: months must not become years."""
    (tmp_path / "participants.json").write_text('{"age": {"Units": "months",}}')
    found = people("participant_id\tage\tsex\nsub-01\t18\tF\n")
    assert ages(found) == {}
    assert found.persons["01"].sex == "F"
    (note,) = found.notes
    assert "participants.json cannot be read" in note


def test_only_line_breaks_part_lines(people):
    found = people("participant_id\tage\tsex\tnotes\nsub-01\t34\tF\ta\x0bb\u2028c\nsub-02\t5.\tM\n")
    assert ages(found) == {"01": 34, "02": 5}
    assert [found.persons[x].sex for x in found.persons] == ["F", "M"]


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


@pytest.mark.parametrize("units", ["", "  ", None, [], ["years"], [""], ["Years"]])
def test_units_that_say_nothing_are_years_and_one_in_a_list_is_itself(people, units):
    found = people("participant_id\tage\tsex\nsub-01\t18\tF", {"age": {"Units": units}})
    assert ages(found) == {"01": 18.0}
    assert not found.notes
    months = people("participant_id\tage\tsex\nsub-01\t18\tF", {"age": {"Units": ["months"]}})
    assert ages(months) == {"01": 1.5}


def test_levels_in_other_words_do_not_hide_what_a_cell_says(people):
    table = "participant_id\tage\tsex\n01\t9\tF\n02\t9\tmale\n03\t9\t1"
    levels = {"F": "f\u00e9minin", "male": {"Description": "M\u00e4nner"}, "1": "f\u00e9minin"}
    found = people(table, {"sex": {"Levels": levels}})
    assert [found.of(label).sex for label in ("01", "02", "03")] == ["F", "M", None]
    assert "sex 1 is taken for unknown" in "".join(found.notes)
    # Words that are known count first, whatever the code looks like.
    assert people(table, {"sex": {"Levels": {"F": "male"}}}).of("01").sex == "M"


@pytest.mark.parametrize("place", ["age", "sex", "comment"])
def test_no_cell_is_too_long(people, place):
    cells = {"age": "34", "sex": "F", "comment": "", place: "x" * 200_000}
    found = people("participant_id\t" + "\t".join(cells) + "\nsub-01\t" + "\t".join(cells.values()))
    known = Person(*(None if place == name else v for name, v in (("age", 34.0), ("sex", "F"))))
    assert found.of("01") == known
    assert all(len(note) < 300 for note in found.notes)


@pytest.fixture
def sessions(tmp_path):
    """What is read where ``sub-01`` and others have sessions, with tables of those named."""

    def read(folders, about=None, **tables):
        for name in folders:
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for label, table in tables.items():
            folder = tmp_path / f"sub-{label[1:]}"
            (folder / f"{folder.name}_sessions.tsv").write_text(table)
        for name, units in (about or {}).items():
            (tmp_path / name).write_text(json.dumps({"age": {"Units": units}}))
        return read_people(tmp_path)

    return read


def test_a_session_may_have_an_age_of_its_own(sessions, people):
    people("participant_id\tage\tsex\nsub-01\t30\tF\nsub-02\tn/a\tM")
    found = sessions(
        ("sub-01/ses-a", "sub-01/ses-b", "sub-02/ses-a"),
        s01="session_id\tacq_time\tAge\nses-a\tx\tn/a\nb\tx\t34,5",
        s02="session_id\tage\nses-a\t018M",
    )
    assert found.of_scan("sub-01_ses-a_T1w") == found.of("sub-01") == Person(30.0, "F")
    assert found.of_scan("sub-01_ses-b_run-1") == Person(34.5, "F")
    assert found.of_scan("sub-02_ses-a") == Person(1.5, "M")
    assert found.of_scan("sub-02") == Person(None, "M")
    assert found.of_scan("sub-03_ses-a") == Person()
    assert not found.notes


def test_sessions_need_no_participants_table(sessions):
    found = sessions(("sub-01/ses-a",), s01="session_id\tage\nses-a\t40")
    assert found
    assert found.of_scan("sub-01_ses-a") == Person(40.0)
    assert not sessions(("sub-01/ses-a",), s01="session_id\tacq_time\nses-a\tx")


def test_sessions_that_are_not_there_and_ages_that_do_not_count_are_told(sessions):
    found = sessions(("sub-01/ses-1",), s01="session_id\tage\nses-01\t40\nses-1\t300")
    assert found.of_scan("sub-01_ses-1") == Person()
    absent, absurd = found.notes
    assert "sessions that are not there: sub-01 ses-01" in absent
    assert "ages of participants.tsv count in their place" in absurd


def test_units_of_sessions_are_those_of_the_nearest_json(sessions, people):
    """Of the table's own, of all such tables, else of ``participants.tsv``."""
    table = "participant_id\tage\tsex\nsub-01\t12\tF"
    people(table, {"age": {"Units": "months"}})
    names, own = ("sub-01/ses-a",), {"s01": "session_id\tage\nses-a\t24"}
    assert sessions(names, **own).of_scan("sub-01_ses-a").age_years == 2
    assert (
        sessions(names, {"sessions.json": "years"}, **own).of_scan("sub-01_ses-a").age_years == 24
    )
    found = sessions(names, {"sub-01/sub-01_sessions.json": ["months"]}, **own)
    assert found.of_scan("sub-01_ses-a").age_years == 2
    strange = sessions(names, {"sub-01/sub-01_sessions.json": "moons"}, **own)
    assert strange.of_scan("sub-01_ses-a") == strange.of("01") == Person(1.0, "F")
    assert "'moons'" in strange.notes[0]


def test_odd_ages_of_sessions_are_told_as_those_of_participants(sessions, people):
    people("participant_id\tage\tsex\nsub-01\t30\tF\nsub-02\t30\tF")
    found = sessions(
        ("sub-01/ses-a", "sub-02/ses-a/anat"),
        s01="session_id\tage\nses-a\t412\nses-b\told\nses-c\t8\nses-c\t9",
    )
    told = "\n".join(found.notes)
    assert "sub-X_sessions.tsv: ages above 120 years are ignored (sub-01_ses-a 412)" in told
    assert "into sessions.json" in told
    assert "not numbers are ignored (sub-01_ses-b old)" in told
    assert "sub-X_sessions.tsv gives different ages of one person: sub-01_ses-c" in told
    assert found.of_scan("sub-01_ses-a") == Person(30.0, "F")


def test_odd_sessions_never_end_a_run(sessions, people):
    """A name that BIDS does not allow, and the empty last line that a spreadsheet leaves."""
    found = sessions(("sub-01/ses-a",), s01="session_id\tage\nses-bl_1\t40\nses-a\t31\n\t\n")
    assert found.of_scan("sub-01_ses-a").age_years == 31
    assert found.notes == (
        "sub-X_sessions.tsv tells of sessions that are not there: sub-01 ses-bl_1",
    )


def test_one_participant_is_not_one_participants(sessions, people):
    people("participant_id\tage\tsex\nsub-01\t30\tF")
    notes = "; ".join(sessions(("sub-01/ses-a", "sub-01/ses-b", "sub-02/anat")).notes)
    assert "1 participant has no line in participants.tsv: sub-02" in notes
    assert "several sessions of 1 participant (sub-01)" in notes


def test_a_table_of_sessions_that_cannot_be_read_costs_only_its_ages(sessions, people, tmp_path):
    people("participant_id\tage\tsex\nsub-01\t30\tF\nsub-02\t30\tF")
    names = ("sub-01/ses-a", "sub-02/ses-a")
    sessions(names, s01="session_id\tage\nses-a\t32")
    (tmp_path / "sub-02" / "sub-02_sessions.tsv").write_bytes(b"session_id\tage\nses-\xc4\t40")
    found = sessions(names)
    assert [found.of_scan(f"sub-0{k}_ses-a").age_years for k in (1, 2)] == [32, 30]
    assert "sub-02_sessions.tsv cannot be read" in found.notes[0]


def test_one_age_for_several_sessions_is_told(sessions, people):
    lines = "".join(f"sub-{k:02}\t30\tF\n" for k in range(1, 12))
    people(f"participant_id\tage\tsex\n{lines}sub-12\tn/a\tF\n")
    both = [f"sub-{k:02}/ses-{x}" for k in range(1, 13) for x in "ab"]
    (note,) = sessions((*both, "sub-05/anat")).notes
    assert "participants.tsv for several sessions of 11 participants (sub-01, " in note
    assert "sub-X_sessions.tsv" in note
    assert "sub-08, ...)" in note  # a long list is cut
    tables = {f"s{k:02}": "session_id\tage\nses-b\t31" for k in range(1, 12)}
    assert not sessions((), **tables).notes


def test_who_has_no_line_is_told_where_ages_are(sessions, people):
    folders = [f"sub-{k:02}/anat" for k in range(1, 13)]
    assert not sessions(folders).notes
    people("participant_id\tage\tsex\nsub-01\tn/a\tF")
    assert not sessions(folders).notes
    people("participant_id\tage\tsex\n01\t30\tF\nsub-12\tn/a\tn/a")
    (note,) = sessions(folders).notes
    assert note.startswith("10 participants have no line in participants.tsv: sub-02, sub-03, ")
    assert note.endswith("sub-09, ...")


def test_a_table_without_the_columns_says_what_it_has(people, tmp_path):
    found = people("participant_id\tgroup\nsub-01\tcontrol")
    assert found.of("sub-01") == Person()
    assert found.notes == (
        "participants.tsv has no column age and no column sex (its columns: participant_id, group)",
    )
    assert "no column participant_id" in people("participant_id,age\n01,3").notes[0]
    (tmp_path / "mine.tsv").write_text("participant_id\tage\tsex\n01\t3\t1\n02\t300\tF\n")
    text = "; ".join(read_people(tmp_path, "mine.tsv").notes)
    assert "participants" not in text.replace("participants have", "")
    assert text.count("mine.tsv: ") == text.count("mine.json") == 2
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
