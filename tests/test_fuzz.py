"""A short form of ``tools/fuzz.py``: whatever a file is, a result or one line that says why not."""

import fuzz
import pytest

N = len({*fuzz.KINDS})
"""Kinds that are drawn twice as often stand at the end again."""


@pytest.mark.slow
def test_any_input_gives_a_result_or_one_line():
    """Each kind of input, the last one in a process of its own too."""
    assert fuzz.fuzz(1, range(N), workers=1, apart_every=N) == {}


def test_an_input_is_made_again_from_its_seed_and_index(tmp_path):
    for index in range(N):
        one, again = (fuzz.Maker(7, index).into(tmp_path / f"{index}-{k}") for k in "ab")
        assert one.name == again.name
        if fuzz.KINDS[index % len(fuzz.KINDS)] != "thing":
            assert one.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(
    ("code", "said", "finding"),
    [
        (65, "cadiff: error: it is bad. Mend it\n", None),
        (0, "cadiff: WARNING look\ncadiff: brain of 1 l\n", None),
        (65, "", "0 error lines"),
        (1, "cadiff: error: unexpected KeyError. This is a bug: report it\n", "exit code 1"),
        (0, "x.py:3: RuntimeWarning: overflow\n", "RuntimeWarning"),
        (65, "cadiff: error: \x1b[31mred is bad\n", "not printable"),
    ],
)
def test_what_a_user_should_not_see_is_a_finding(code, said, finding):
    found = list(fuzz.wrong("mask", code, said))
    assert (not found) if finding is None else any(finding in text for text in found)
