"""Select images of a raw dataset: ``Selection`` holds the criteria, ``select`` finds the images."""

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cadiff_cli.errors import (
    DataError,
    MissingInputError,
    SelectionError,
    UsageError,
    first_few,
    plural,
)
from cadiff_cli.io.bids.index import (
    anatomical_files,
    has_bids_name,
    indexed_images,
    known_entities,
    named_images,
)
from cadiff_cli.io.bids.raw import Dataset
from cadiff_cli.io.formats import stem
from cadiff_cli.text import read_text

SUFFIXES = T1W, UNIT1 = "T1w", "UNIT1"
"""Suffixes of images that can be segmented; UNIT1 is the uniform image of an MP2RAGE."""
MAX_NOTES = 5
"""Images or sessions that are named one by one."""
MAGNITUDE = ("mag", None)
"""Values of ``part``: phase, real and imaginary images show no anatomy."""
TAKEN: Mapping[str, tuple[str | None, ...]] = {
    "suffix": SUFFIXES,
    "extension": (".nii", ".nii.gz"),
    "datatype": ("anat",),
    "part": MAGNITUDE,
}
"""The allowed values of a filter for these entities."""


SHORT = {
    "subject": "sub",
    "session": "ses",
    "acquisition": "acq",
    "reconstruction": "rec",
    "ceagent": "ce",
}
"""How entities are written in file names, where pybids calls them otherwise."""
INDICES = ("run", "echo", "inv", "chunk")
"""Entities whose values are numbers, with or without leading zeros."""


@dataclass(frozen=True)
class Selection:
    """Criteria for images of a dataset; an empty selection means all T1w images.

    ``filters`` maps entities, as pybids calls them, to a value or a list of values; None asks for
    the entity's absence, ``"*"`` for any value of it.  ``"ses-a"`` is the session ``"a"``, and
    ``"1"`` the run ``"01"``.
    """

    participants: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    filters: Mapping[str, Any] | None = None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The selected suffixes."""
        return tuple(x for x in SUFFIXES if _is_one_of(x, self._wanted["suffix"]))

    def check(self, known: Collection[str]) -> None:
        """Raise ``UsageError`` for filters that cannot be applied; ``known`` are all entities."""
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
        """Whether an image with these entities is selected."""
        wanted = [*self._wanted.items()]
        if self.participants:
            wanted.append(("subject", self.participants))
        if self.sessions:
            wanted.append(("session", self.sessions))
        return all(_is_one_of(entities.get(name), values) for name, values in wanted)

    def of(self, suffix: str) -> "Selection":
        """The same selection of images with another suffix."""
        return replace(self, filters={**(self.filters or {}), "suffix": suffix})

    @property
    def _wanted(self) -> dict[str, Any]:
        wanted = {"suffix": T1W, **(self.filters or {})}
        return {name: [_meant(name, x) for x in _values(wanted[name])] for name in wanted}


EVERYTHING = Selection()


@dataclass(frozen=True)
class Selected:
    """The chosen images of a dataset, sorted, and notes on the choice for the user."""

    images: tuple[Path, ...]
    notes: tuple[str, ...]


def select(
    dataset: Dataset, selection: Selection = EVERYTHING, database: Path | None = None
) -> Selected:
    """Find the selected images, with notes on omitted images and surprises.

    Leaves out images that are no magnitude (``part``) or that ``.bidsignore`` names.  ``database``
    is a folder for pybids' index, written once and then never updated.  Raises ``SelectionError``
    for absent participants or sessions, and if no image fits.
    """
    root = dataset.root
    dataset.require(selection.participants, selection.sessions)
    selection.check([*known_entities()])
    chosen = selection.participants or dataset.participants()
    files = [path for label in sorted(chosen) for path in anatomical_files(root / f"sub-{label}")]
    kinds = TAKEN["suffix"], TAKEN["extension"]
    if database:
        named = indexed_images(root, {*chosen}, *kinds, database)
    else:
        named = named_images(root, files, *kinds)
    is_ignored = _ignored(root)

    fitting = [path for path, entities in named.items() if selection.fits(entities)]
    ignored = [path for path in fitting if is_ignored(path)]
    others = [path for path in fitting if named[path].get("part") not in MAGNITUDE]
    left = {*ignored, *others}
    images = {path: named[path] for path in fitting if path not in left}
    odd = [
        path
        for path in files
        if any(x in path.name for x in selection.suffixes)
        if path not in named and not is_ignored(path)
        # A mask of a T1w image, say, is no T1w image.
        if stem(path).endswith(selection.suffixes) or not has_bids_name(path, root)
    ]
    lacking = set(chosen) - {entities["subject"] for entities in images.values()}
    unit1 = selection.of(UNIT1)
    instead = {
        entities["subject"]
        for path, entities in named.items()
        if unit1.fits(entities) and entities["subject"] in lacking and not is_ignored(path)
    }

    suffix = " or ".join(selection.suffixes)
    why = "has no BIDS name" + (f", or {database} is older" if database else "")
    unnamed = _at_most(
        [f"{path.relative_to(root).as_posix()} {why}: ignored" for path in odd],
        "images without a BIDS name that are ignored, not named here: {}",
    )
    left_out = [
        *_left_out(suffix, ignored, "by .bidsignore"),
        *_left_out(suffix, others, "as no magnitude"),
        *_unit1(instead),
    ]
    if not images:
        raise SelectionError(
            "; ".join((f"no {suffix} image of {root} fits", *left_out, *unnamed[:1])),
            "check --participant-label, --session-label and --bids-filter-file; segment other"
            " files one by one with cadiff-seg",
        )
    absent = _at_most(
        [f"sub-{label} has no {suffix} image that fits" for label in sorted(lacking)],
        f"participants without a {suffix} image that fits, not named here: {{}}",
    )
    notes = (*unnamed, *absent, *left_out, *_several(images, suffix))
    return Selected(tuple(sorted(images)), notes)


def _at_most(notes: Sequence[str], more: str) -> list[str]:
    """The first ``MAX_NOTES``, and the number of the others in the words of ``more``."""
    others = len(notes) - MAX_NOTES
    return [*notes[:MAX_NOTES], *([more.format(others)] if others > 0 else [])]


def _ignored(root: Path) -> Callable[[Path], bool]:
    """A test whether ``.bidsignore``, in the syntax of ``.gitignore``, names an image."""
    from pathspec import GitIgnoreSpec

    path = root / ".bidsignore"
    if not path.is_file():
        return lambda image: False
    try:
        lines = read_text(path).splitlines()
        spec = GitIgnoreSpec.from_lines(lines)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})", "correct or remove it") from error
    return lambda image: spec.match_file(image.relative_to(root).as_posix())


def _left_out(suffix: str, paths: Collection[Path], why: str) -> list[str]:
    """A note on all images that are left out for one reason, if any."""
    names = first_few(sorted(path.name for path in paths))
    return [f"{plural(len(paths), f'{suffix} image')} left out {why}: {names}"] if paths else []


def _unit1(participants: Collection[str]) -> list[str]:
    """A note on participants who have only a UNIT1 image, if any."""
    if not participants:
        return []
    have = "has" if len(participants) == 1 else "have"
    return [
        f"{first_few(sorted(f'sub-{label}' for label in participants))} {have} a UNIT1 (MP2RAGE)"
        ' image: ask for it with a --bids-filter-file of {"t1w": {"suffix": "UNIT1"}}'
    ]


def _several(images: Mapping[Path, Mapping[str, Any]], suffix: str) -> list[str]:
    """Notes on sessions of which more than one image is segmented."""
    by_session: dict[str, set[str]] = {}
    for path, entities in images.items():
        session = f" ses-{entities['session']}" if "session" in entities else ""
        by_session.setdefault(f"sub-{entities['subject']}{session}", set()).add(stem(path))
    notes = [
        f"{session} has {len(names)} {suffix} images: {first_few(sorted(names))}; all are"
        " segmented, choose with --bids-filter-file"
        for session, names in by_session.items()
        if len(names) > 1
    ]
    return _at_most(notes, f"{{}} more sessions have several {suffix} images")


def _meant(name: str, value: Any) -> Any:
    """The value of the entity ``name`` that a person means by ``value``."""
    if not isinstance(value, str) or value == "*":
        return value
    if name == "extension":  # with or without its dot
        return f".{value.lstrip('.')}"
    label = value.removeprefix(f"{SHORT.get(name, name)}-")
    return int(label) if name in INDICES and label.isdecimal() else label


def _values(wanted: Any) -> Sequence[Any]:
    return wanted if isinstance(wanted, list | tuple) else (wanted,)


def _is_one_of(actual: Any, wanted: Any) -> bool:
    return any(_is(actual, value) for value in _values(wanted))


def _is(actual: Any, value: Any) -> bool:
    """Whether an entity has this value; numbers are equal with or without leading zeros."""
    if actual is None or value is None:
        return actual is value
    if isinstance(value, int):
        return str(actual).isdecimal() and int(actual) == value
    return value in ("*", str(actual))


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


def entity_labels(words: Sequence[str], prefix: str, known: Collection[str]) -> tuple[str, ...]:
    """Labels without their prefix, each once; a word that names a file stands for its labels.

    A word that is one of the dataset's labels (``known``) is never taken for a file.  A table whose
    header begins with ``participant_id`` or ``session_id`` stands for its first column.  Raises
    ``UsageError`` for a file without a label: an empty list must not select everybody.
    """
    labels: list[str] = []
    for word in (word.strip() for word in words):
        # Unlike Path.is_file, this takes words that are too long for a file's name.
        is_list = word.removeprefix(prefix) not in known and os.path.isfile(word)
        lines = _listed(Path(word), prefix) if is_list else [word]
        labels.extend(line.removeprefix(prefix) for line in lines)
    return tuple(dict.fromkeys(labels))


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
