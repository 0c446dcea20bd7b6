"""Which scans of a dataset are wanted: labels, lists of labels, filters as fMRIPrep has them."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cadiff_cli.errors import MissingInputError, UsageError
from cadiff_cli.io.files import read_text

SUFFIXES = T1W, UNIT1 = "T1w", "UNIT1"
"""Of what can be segmented; the second is the uniform image of an MP2RAGE."""
MAGNITUDE = ("mag", None)
"""Values of ``part``: phase, real and imaginary images show no anatomy."""
TAKEN: Mapping[str, tuple[str | None, ...]] = {
    "suffix": SUFFIXES,
    "extension": (".nii", ".nii.gz"),
    "datatype": ("anat",),
    "part": MAGNITUDE,
}
"""Entities of which a filter may ask for these values only."""


@dataclass(frozen=True)
class Selection:
    """Which scans of a dataset are wanted; empty means all T1w images.

    ``filters`` maps entities, as pybids calls them, to a value or a list of values; None asks for
    the entity's absence, ``"*"`` for any value of it.
    """

    participants: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    filters: Mapping[str, Any] | None = None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What is looked for."""
        return tuple(x for x in SUFFIXES if _is_one_of(x, self._wanted["suffix"]))

    def check(self, known: Collection[str]) -> None:
        """Raise ``UsageError`` for filters that cannot be honoured; ``known`` are all entities."""
        for name, wanted in self._wanted.items():
            if name not in known:
                near = get_close_matches(name, known, n=1)
                raise UsageError(
                    f"--bids-filter-file: {name!r} is no entity of BIDS",
                    f"did you mean {near[0]!r}?" if near else f"use {', '.join(known)}",
                )
            for value in _values(wanted) or [wanted]:
                if value is not None and type(value) not in (str, int):
                    raise UsageError(
                        f"--bids-filter-file: {name} is {json.dumps(value)}",
                        'give a value or a list of values; null is its absence, "*" any value',
                    )
                if name in TAKEN and value != "*" and not _is_one_of(value, TAKEN[name]):
                    allowed = ", ".join(json.dumps(x) for x in TAKEN[name])
                    raise UsageError(
                        f"--bids-filter-file asks for {name} {json.dumps(value)}",
                        f"cadiff segments {name} {allowed} only",
                    )

    def fits(self, entities: Mapping[str, Any]) -> bool:
        """Whether an image with these entities is wanted."""
        wanted = [*self._wanted.items()]
        if self.participants:
            wanted.append(("subject", self.participants))
        if self.sessions:
            wanted.append(("session", self.sessions))
        return all(_is_one_of(entities.get(name), values) for name, values in wanted)

    def of(self, suffix: str) -> "Selection":
        """The same of images with another suffix."""
        return replace(self, filters={**(self.filters or {}), "suffix": suffix})

    @property
    def _wanted(self) -> dict[str, Any]:
        found = {"suffix": T1W, **(self.filters or {})}
        if "extension" in found:  # with or without its dot
            found["extension"] = [
                f".{x.lstrip('.')}" if isinstance(x, str) and x != "*" else x
                for x in _values(found["extension"])
            ]
        return found


EVERYTHING = Selection()


def _values(wanted: Any) -> Sequence[Any]:
    return wanted if isinstance(wanted, list | tuple) else (wanted,)


def _is_one_of(found: Any, wanted: Any) -> bool:
    return any(_is(found, value) for value in _values(wanted))


def _is(found: Any, value: Any) -> bool:
    """A number in a filter is that of an entity, however many zeros are before it."""
    if found is None or value is None:
        return found is value
    if isinstance(value, int):
        return str(found).isdecimal() and int(found) == value
    return value in ("*", str(found))


def read_filters(path: Path) -> dict[str, Any]:
    """The ``t1w`` part of a ``--bids-filter-file``, as fMRIPrep reads it."""
    if not path.is_file():
        raise MissingInputError(f"no such file: {path}", "check --bids-filter-file")
    try:
        return dict(json.loads(read_text(path))["t1w"].items())
    except KeyError as error:
        raise UsageError(
            f"{path} says nothing of t1w", 'write {"t1w": {}} if every T1w image is wanted'
        ) from error
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(
            f"{path} is not a filter file ({error})", 'write {"t1w": {"acquisition": "mprage"}}'
        ) from error


def labels(words: Sequence[str], prefix: str, known: Collection[str]) -> tuple[str, ...]:
    """Labels without their prefix, each once; a word that names a file stands for its labels.

    A word that is one of the dataset's labels (``known``) is never taken for a file.  A table whose
    header begins with ``participant_id`` or ``session_id`` stands for its first column.  Raises
    ``UsageError`` for a file without a label: to ask for nobody is not to ask for all.
    """
    found: list[str] = []
    for word in (word.strip() for word in words):
        path = Path(word)
        is_list = word.removeprefix(prefix) not in known and path.is_file()
        lines = _listed(path, prefix) if is_list else [word]
        found.extend(line.removeprefix(prefix) for line in lines)
    return tuple(dict.fromkeys(found))


def _listed(path: Path, prefix: str) -> list[str]:
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a list ({error})", "one label a line") from error
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if lines and lines[0][0] in ("participant_id", "session_id"):
        lines = [line[:1] for line in lines[1:]]
    if not lines:
        raise UsageError(f"{path} names nobody", f"one label a line, as {prefix}01")
    return [label for line in lines for label in line]
