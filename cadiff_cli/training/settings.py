"""A training as a file: TOML of the whole tree of its settings.

Shipped configs lie in ``data/configs``.  Absent keys keep their defaults; unknown keys and values
of another type are errors.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_origin, get_type_hints

from cadiff_cli.data import shipped
from cadiff_cli.errors import CadiffError, MissingInputError, UsageError
from cadiff_cli.text import read_text
from cadiff_cli.training.loop import Schedule

CONFIGS = Path(str(shipped("configs")))


class Training(Protocol):
    """Settings of one kind of training: its network, its schedule and all that goes with it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    kind: ClassVar[str]
    command: ClassVar[str]

    @property
    def train(self) -> Schedule:
        """Settings of the run."""


T = TypeVar("T", bound=Training)


def load_training(name: str, defaults: T) -> T:
    """A training by the name of a shipped config, or from a ``.toml`` file.

    The key ``kind`` must be that of ``defaults``.  Raises ``MissingInputError`` if there is no such
    file; ``UsageError`` if it is not TOML, of another kind, or holds an unknown key or a value of
    another type.
    """
    path = Path(name) if name.endswith(".toml") else CONFIGS / f"{name}.toml"
    try:
        values = tomllib.loads(read_text(path))
    except OSError as error:
        raise MissingInputError(
            f"cannot read the config {path} ({error.strerror})", _usable(defaults.kind)
        ) from error
    except ValueError as error:
        raise UsageError(f"{path} is not TOML ({error})", "correct it") from error
    if (kind := values.pop("kind", None)) != defaults.kind:
        raise UsageError(
            f"{path} has kind {kind!r}, but {defaults.command} takes {defaults.kind!r}",
            f"{_usable(defaults.kind)}, or use the command of its kind",
        )
    training: T = _changed(defaults, values, f"{path}: ")
    return training


def shipped_configs(kind: str) -> list[str]:
    """Names of the shipped configs of one kind of training."""
    files = {path.stem: path.read_text(encoding="utf-8") for path in CONFIGS.glob("*.toml")}
    return sorted(name for name, text in files.items() if tomllib.loads(text).get("kind") == kind)


def _usable(kind: str) -> str:
    return f"use {', '.join([*shipped_configs(kind), 'a .toml file'])} of kind {kind!r}"


def load(name: str, defaults: T, **settings: Any) -> T:
    """As ``load_training``; what ``settings`` give overrides the file (``overridden``)."""
    return overridden(load_training(name, defaults), **settings)


def overridden(
    training: T, *, steps: int | None = None, decay: int | None = None, **settings: Any
) -> T:
    """``training`` with other settings of its schedule; None keeps the file's.

    With other ``steps`` alone, the ``decay`` of a shorter run shrinks in proportion.
    """
    train = training.train
    if steps and not decay:
        decay = max(1, min(train.decay, train.decay * steps // train.steps))
    wanted = {"steps": steps, "decay": decay, **settings}
    changes = {key: value for key, value in wanted.items() if value is not None}
    return replace(training, train=replace(train, **changes))


def _changed(defaults: Any, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass with some fields changed to plain ``values``; ``where`` begins the errors."""
    types = get_type_hints(type(defaults))
    known = [f.name for f in fields(defaults)]
    changes = {}
    for key, value in values.items():
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise UsageError(
                f"{where}{key} is unknown, the nearest key is {near!r}", f"use {', '.join(known)}"
            )
        changes[key] = _value(value, types[key], getattr(defaults, key), f"{where}{key}")
    try:
        return replace(defaults, **changes)
    except CadiffError as error:
        raise UsageError(f"{where.rstrip('.: ')}: {error.message}", error.remedy) from error


def _value(value: object, wanted: Any, default: object, where: str) -> Any:
    """``value`` as the type ``wanted``; tables change the ``default``."""
    options = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
    for option in options:
        if option is NoneType and value == "none":
            return None
        if isinstance(option, type) and is_dataclass(option) and isinstance(value, dict):
            return _changed(default if is_dataclass(default) else option(), value, f"{where}.")
        if get_origin(option) is tuple and isinstance(value, list):
            inner = get_args(option)
            inner = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
            if len(inner) == len(value):
                pairs = zip(value, inner, strict=True)
                return tuple(_value(v, t, None, f"{where}[{i}]") for i, (v, t) in enumerate(pairs))
        if option is float and type(value) is int:
            return float(value)
        if type(value) is option:
            return value
    allowed = " or ".join(map(_called, options))
    raise UsageError(f"{where} is {value!r}", f"give {allowed}")


def _called(option: Any) -> str:
    if option is NoneType:
        return '"none"'
    if is_dataclass(option):
        return "a table"
    return f"a value of {option.__name__ if isinstance(option, type) else option}"
