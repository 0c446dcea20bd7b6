"""Architecture: imports point downwards, and every foreign library has one door."""

import ast
import errno
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

from cadiff_cli import machine

PACKAGE = ROOT / "cadiff_cli"
RANKS = {
    **dict.fromkeys(
        ("data", "errors", "notes", "text", "labels", "config", "machine", "processes", "__init__"),
        0,
    ),
    "spatial": 1,
    "products": 2,
    **dict.fromkeys(("device", "io", "diffusion", "nets", "metrics"), 3),
    **dict.fromkeys(("stages", "quality"), 4),
    **dict.fromkeys(("pipeline", "fusion", "atlas", "evaluation"), 5),
    **dict.fromkeys(("training", "api"), 6),
    "report": 7,
    "runner": 8,
    **dict.fromkeys(("cli", "__main__"), 9),
}
DOORS = {
    "ants": ("stages/register.py",),
    "bids": ("io/bids/index.py",),
    "bids_validator": ("io/bids/index.py",),
    "pathspec": ("io/bids/selection.py",),
    "sqlalchemy": ("io/bids/index.py",),
    "templateflow": ("io/templateflow.py",),
    "nibabel": ("io/images.py", "spatial/grid.py"),
    "safetensors": ("io/models.py",),
    "distributed": ("runner/cluster.py",),
    "contourpy": ("report/figures.py",),
    "PIL": ("report/figures.py", "training/monitor.py"),
    "jinja2": ("report/render.py",),
    "click": ("cli/",),
    "rich": ("cli/",),
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """Names of every module that ``path`` imports, anywhere in it, if only for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rank(name):
    """Rank of ``cadiff_cli.<room>...``; the package itself holds only its version."""
    room = name.split(".")[1]
    return RANKS["__init__" if room.startswith("__version") else room]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    upward = [
        name
        for name in imported(path)
        if name.startswith("cadiff_cli.") and rank(name) > RANKS[here]
    ]
    assert not upward


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_foreign_libraries_come_through_their_door(path):
    place = path.relative_to(PACKAGE).as_posix()
    for name in imported(path):
        doors = DOORS.get(name.split(".")[0], ("",))
        assert place.startswith(doors), f"{place} imports {name}"


def test_every_door_is_used():
    """A door that nothing passes is a rule about a library that has left."""
    used = {name.split(".")[0] for path in MODULES for name in imported(path)}
    assert set(DOORS) <= used


def test_the_core_does_not_know_brains():
    """``diffusion`` is about tensors only."""
    for path in (PACKAGE / "diffusion").glob("*.py"):
        assert all(
            not name.startswith("cadiff_cli.") or name.startswith("cadiff_cli.diffusion.")
            for name in imported(path)
        )


def test_a_work_folder_that_cannot_be_removed_fails_no_scan(monkeypatch, caplog):
    """Network file systems keep files that are open; results are written before it is removed."""
    makers = [
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and "TemporaryDirectory" in ast.unparse(node.func)
    ]
    assert makers == ["machine.py"]

    def busy(*_args, **_more):
        raise OSError(errno.EBUSY, "open somewhere else")

    with machine.work_folder() as folder:
        monkeypatch.setattr("os.rmdir", busy)
    monkeypatch.undo()
    assert Path(folder).exists()
    assert folder in caplog.text
    Path(folder).rmdir()


def test_a_wheel_holds_the_package():
    """An editable installation works without, and hides that a user's does not."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["cadiff_cli"]
    assert wheel["force-include"] == {"weights": "cadiff_cli/weights"}


def test_stages_read_no_disk():
    """Files are read by whoever calls them: products come in, products go out."""
    for path in (PACKAGE / "stages").glob("*.py"):
        assert not [name for name in imported(path) if name.startswith("cadiff_cli.io")]
