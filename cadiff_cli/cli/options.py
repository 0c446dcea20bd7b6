"""Options: types of their values, and options from the fields of dataclasses."""

import errno
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args, get_origin

import click

from cadiff_cli.config import MOST_SEED, Config, Option, flags_of
from cadiff_cli.errors import MissingInputError, UsageError

if TYPE_CHECKING:
    from cadiff_cli.products import Sex

    Converter = click.ParamType[int]
    AgeConverter = click.ParamType[float]
    SexConverter = click.ParamType[Sex]
else:
    Converter = AgeConverter = SexConverter = click.ParamType  # generic only in the newest versions

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class FilePath(click.Path):
    """A ``Path`` that the file system can look up; it need not be there unless ``exists``."""

    def __init__(self, *, exists: bool = False) -> None:
        super().__init__(exists=exists, path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The path; an empty one would mean the current folder.

        Raises ``MissingInputError`` for a link that leads to itself.
        """
        if not str(value):
            self.fail("the path is empty: a variable of the shell may not be set", param, ctx)
        try:
            os.stat(value)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                self.fail(f"the path {str(value)[:60]!r}... is too long", param, ctx)
            if error.errno == errno.ELOOP:
                raise MissingInputError(
                    f"the link {value} leads to itself", "correct the link"
                ) from error
        return super().convert(value, param, ctx)


PATH = FilePath()
SEED = click.IntRange(0, MOST_SEED)


class Number(click.FloatRange):
    """A number within a range; NaN, which is neither inside nor outside, is refused."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The number."""
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value!r} is no number", param, ctx)
        return number


def show_times() -> None:
    """Show log messages with their times: for commands that take hours."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")


def show_warnings() -> None:
    """Show warnings of the log as those of the command."""
    from cadiff_cli.runner.logs import ON_SCREEN

    logging.basicConfig(level=logging.WARNING, format=ON_SCREEN)


def not_empty(_context: Any, option: click.Parameter, value: str | None) -> str | None:
    """A name that is not empty: a callback of options whose absence means something else."""
    if value == "":
        raise click.BadParameter(
            "it is empty: a variable of the shell may not be set", param=option
        )
    return value


def without_prefix(_context: Any, _option: Any, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Subject labels without ``sub-``: a callback of options."""
    return tuple(label.removeprefix("sub-") for label in labels)


def stacked(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """A decorator that adds ``options`` in their order."""

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def options_of(kind: type, without: tuple[str, ...] = ()) -> Callable[[F], F]:
    """A decorator that adds every option of the dataclass ``kind``, in the order of its fields.

    Fields that are dataclasses add theirs.  ``without`` are parameters to leave out.
    """
    wanted = {name: field for name, field in _offered(kind) if name not in without}
    return stacked(*map(_click_option, wanted.values()))


def made(kind: type[T], values: Mapping[str, Any], **given: Any) -> T:
    """A dataclass of the ``kind`` from values of its options; fields without one may be given."""
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in given:
            continue
        if is_dataclass(field.type):
            given[field.name] = made(field.type, values)  # type: ignore[arg-type]
        elif "option" in field.metadata and _parameter(field) in values:
            given[field.name] = values[_parameter(field)]
    return kind(**given)


def check(config: Config) -> None:
    """Raise ``click.UsageError`` for settings that contradict one another."""
    try:
        config.check()
    except UsageError as error:
        raise click.UsageError(str(error)) from error


def _offered(kind: type) -> Iterator[tuple[str, "Field[Any]"]]:
    """(parameter, field) of every option; the same parameter may come twice."""
    for field in fields(kind):
        if is_dataclass(field.type):
            yield from _offered(field.type)  # type: ignore[arg-type]
        elif "option" in field.metadata:
            yield _parameter(field), field


def _parameter(field: "Field[Any]") -> str:
    """The option's name among a command's values: that of its first flag."""
    return flags_of(field)[0].lstrip("-").replace("-", "_")


def _click_option(field: "Field[Any]") -> Callable[[F], F]:
    about: Option = field.metadata["option"]
    flags, default = flags_of(field), field.default
    kinds = set(get_args(field.type)) or {field.type}
    more: dict[str, Any] = {"default": default, "help": about.help}
    if field.type is bool:
        if default:
            flags = tuple(f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags)
        else:
            more["is_flag"] = True
        return click.option(_parameter(field), *flags, **more)
    if get_origin(field.type) is tuple:
        return click.option(*flags, cls=Words, metavar=about.metavar, help=about.help)
    if about.choices:
        more["type"] = click.Choice(about.choices)
    elif int in kinds:
        more["type"] = click.IntRange(about.low, about.high)
    elif Path in kinds:
        more["type"] = PATH
    elif str in kinds and default != "":
        more["callback"] = not_empty
    return click.option(*flags, show_default=default is not None, **more)


class Words(click.Option):
    """An option that takes every word up to the next option: ``--participant-label 01 02``.

    click has no such thing; argparse, which other BIDS apps use, calls it ``nargs="+"``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "multiple": True})

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Register with the parser, then take the words that follow the first."""
        super().add_to_parser(parser, ctx)
        for name in self.opts:
            found = parser._long_opt.get(name) or parser._short_opt[name]
            found.process = _eater(found.process)


def _eater(process: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def eat(value: Any, state: Any) -> None:
        process(value, state)
        while state.rargs and not state.rargs[0].startswith("-"):
            process(state.rargs.pop(0), state)

    return eat


class Age(AgeConverter):
    """``72``, ``0.5``, ``89+`` or DICOM's ``018M`` -> years."""

    name = "YEARS"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Years of an age as a person writes it."""
        from cadiff_cli.io.bids.people import OLDEST_YEARS, age_of

        if (years := age_of(str(value))) is None:
            self.fail(f"{value!r} is no age of 0 to {OLDEST_YEARS} years: write 72", param, ctx)
        return years


class SexOption(SexConverter):
    """``F``, ``M``, ``female`` or ``male``."""

    name = "F|M"

    def convert(self, value: Any, param: Any, ctx: Any) -> "Sex":
        """The sex as a letter."""
        from cadiff_cli.io.bids.people import sex_of

        if (sex := sex_of(str(value))) is None:
            self.fail(f"{value!r} is neither F nor M", param, ctx)
        return sex


class Memory(Converter):
    """``16G``, ``16GB``, ``8000`` (MB) -> bytes."""

    name = "SIZE"
    units: ClassVar = {"B": 0, "K": 1, "M": 2, "G": 3, "T": 4}

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Bytes of a size as a person writes it."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B?)", str(value).strip(), re.I)
        if match is None:
            self.fail(f"{value!r} is not a size: write 16G or 8000 (MB)", param, ctx)
        unit = match[2].upper() or ("B" if match[3] else "M")
        return int(float(match[1]) * 1024 ** self.units[unit])
