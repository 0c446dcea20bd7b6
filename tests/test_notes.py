"""Notes: decisions look at their codes, never at what people read."""

import ast

import pytest
from conftest import ROOT

from cadiff_cli.notes import Note, NoteCode

PACKAGE = ROOT / "cadiff_cli"
SEARCHES = (
    *("startswith", "endswith", "find", "index", "count", "search", "match", "fullmatch"),
    *("removeprefix", "removesuffix", "partition", "split", "__contains__"),
)


def reads_text(node, names=()):
    """Whether an expression holds the text of a note: ``note.text``, ``texts(...)``, a name."""
    return any(
        (isinstance(part, ast.Attribute) and part.attr == "text")
        or (isinstance(part, ast.Call) and getattr(part.func, "id", "") == "texts")
        or (isinstance(part, ast.Name) and part.id in names)
        or (isinstance(part, ast.Constant) and part.value == "Warnings")
        for part in ast.walk(node)
    )


def decisions(node, names=()):
    """Lines that compare or search the text of a note, in or outside of a loop over texts."""
    loops = getattr(node, "generators", [node] if isinstance(node, ast.For) else [])
    for loop in loops:
        if reads_text(loop.iter, names):
            names = (*names, *(n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name)))
    if isinstance(node, ast.Compare):
        parts = [node.left, *node.comparators]
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in SEARCHES:
        parts = [node.func.value, *node.args]
    else:
        parts = []
    if any(reads_text(part, names) for part in parts):
        yield node.lineno
    for child in ast.iter_child_nodes(node):
        yield from decisions(child, names)


@pytest.mark.parametrize(
    "source",
    [
        "x = [n for n in notes if 'serves alone' in n.text]",
        "x = note.text.startswith('skull stripping:')",
        "x = [t for t in texts(notes) if t not in known]",
        "for t in sidecar['Warnings']:\n    if re.search('score', t): pass",
    ],
)
def test_a_decision_on_a_text_is_seen(source):
    assert list(decisions(ast.parse(source)))


@pytest.mark.parametrize("source", ["log.warning(note.text)", "x = note.code in CODES"])
def test_what_is_no_decision_is_not(source):
    assert not list(decisions(ast.parse(source)))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_no_decision_looks_at_the_text_of_a_note(path):
    assert not list(decisions(ast.parse(path.read_text(encoding="utf-8"))))


def test_every_code_is_used():
    """By its member, not its value: a code that no module gives is no code."""
    sources = [p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py")]
    for code in NoteCode:
        assert any(f"NoteCode.{code.name}" in text for text in sources), code


def test_codes_of_other_versions_are_unknown():
    assert NoteCode("a code of next year") is NoteCode.UNKNOWN
    assert NoteCode("bias") is NoteCode.BIAS


def test_a_note_tells_whom_it_is_about():
    note = Note(NoteCode.POOR_SCORE, "the score is low")
    assert note.about("sub-1") == Note(NoteCode.POOR_SCORE, "sub-1: the score is low")
    assert note.about("strip", NoteCode.STRIP_REGISTRATION).code is NoteCode.STRIP_REGISTRATION
