"""Options that ``cadiff seg`` and ``cadiff run`` share, so that they cannot drift apart."""

import json
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

from cadiff_cli.errors import MissingInputError, UsageError
from cadiff_cli.io.files import read_text

if TYPE_CHECKING:
    from cadiff_cli.config import Config

    Converter = click.ParamType[int]
else:
    Converter = click.ParamType  # generic only in the newest versions

F = TypeVar("F", bound=Callable[..., Any])

SKULL_STRIP = click.option(
    "--skull-strip",
    type=click.Choice(["auto", "net", "template", "none"]),
    default="auto",
    show_default=True,
    help="auto leaves a stripped scan alone and strips a whole head with the network.",
)
SEGMENTATION = (
    SKULL_STRIP,
    click.option(
        "--template",
        "--atlas",
        default="auto",
        show_default=True,
        help="MNIColin27, MNI152NLin2009aSym (embedded), another of TemplateFlow's such as"
        " MNIPediatricAsym:cohort-5, or a folder in its layout; several, joined by +, share in the"
        " field. auto: Colin27, if it can be had, and the embedded one.",
    ),
    click.option(
        "--registration",
        type=click.Choice(["fast", "fine", "affine", "none"]),
        default="fast",
        show_default=True,
        help="fast: affine and SyN at 2 mm. fine: more iterations, three times as long. none: the"
        " network finds the field together with the labels.",
    ),
    click.option("--offline", is_flag=True, help="Never try to download a template."),
    click.option(
        "--model",
        default="cadiff-malc",
        show_default=True,
        help="cadiff-malc; cadiff-synth, for any contrast; or a file.",
    ),
    click.option(
        "--steps",
        type=click.IntRange(0, 1000),
        default=5,
        show_default=True,
        help="Diffusion steps. 0 skips the network: labels from the registered prior alone.",
    ),
    click.option(
        "--seed",
        "--random-seed",
        type=click.IntRange(0, 2**31 - 2),
        default=0,
        show_default=True,
        help="Of registration and noise.",
    ),
    click.option(
        "--samples",
        type=click.IntRange(1, 100),
        default=1,
        show_default=True,
        help="Average predictions from this many noises; tells how far volumes vary.",
    ),
    click.option(
        "--flip/--no-flip",
        default=True,
        help="Average the last step with the mirrored brain's [on].",
    ),
    click.option(
        "--tile", type=click.IntRange(32), help="Tile edge in mm (default: whole volume)."
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1..."),
    click.option("--posteriors", is_flag=True, help="Also write the 4-D probseg."),
    click.option(
        "--uncertainty",
        is_flag=True,
        help="Also write a map of uncertainty (--samples 2 and more always do).",
    ),
    click.option("--save-field", is_flag=True, help="Also write the distance field."),
)
"""What decides a segmentation."""
CONFIG = (
    *("skull_strip", "registration", "steps", "seed", "samples", "flip", "tile", "device"),
    *("posteriors", "uncertainty", "save_field"),
)
"""Those of them that ``make_config`` takes."""


def segmentation_options(command: F) -> F:
    """Add them to a command, in this order."""
    for option in reversed(SEGMENTATION):
        command = option(command)
    return command


def make_config(
    *,
    skull_strip: str,
    registration: str,
    steps: int,
    seed: int,
    samples: int,
    flip: bool,
    tile: int | None,
    device: str,
    posteriors: bool,
    uncertainty: bool,
    save_field: bool = False,
    mask: Any = None,
) -> "Config":
    """Settings from the values of these options."""
    from cadiff_cli.config import Config, RegisterConfig, SampleConfig, StripConfig

    if tile is not None and tile % 32:
        raise click.BadParameter(f"{tile} is not a multiple of 32", param_hint="--tile")
    if samples > 1 and not steps:
        raise click.UsageError("--samples needs a step: the prior (--steps 0) gives one answer")
    if registration == "none" and (save_field or not steps):
        raise click.UsageError("--save-field and --steps 0 need a registration")
    return Config(
        strip=StripConfig(skull_strip, mask),
        register=RegisterConfig(registration, seed),
        sample=SampleConfig(steps, seed, flip, tile, device, posteriors, samples, uncertainty),
    )


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
        path = Path(word)
        is_list = word.removeprefix(prefix) not in known and path.is_file()
        lines = _listed(path, prefix) if is_list else [word]
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
