"""``cadiff atlas make``: from an age to a template that ``--template`` takes."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cadiff_cli.cli.options import PATH, SEED, Number, SexOption, not_empty
from cadiff_cli.errors import UsageError
from cadiff_cli.io.releases import DEFAULT_ATLAS

if TYPE_CHECKING:
    from cadiff_cli.products import Sex

MOST = 100
"""Atlases of one range: each takes about 10 MB."""
NUMBER = r"(\d+(?:\.\d+)?)"


def parse_ages(text: str) -> tuple[float, ...]:
    """The ages of ``72`` or ``FROM:TO:STEP``; both ends belong to a range.

    Raises ``UsageError`` for anything else.

    >>> parse_ages("20:50:10")
    (20.0, 30.0, 40.0, 50.0)
    """
    match = re.fullmatch(rf"{NUMBER}(?::{NUMBER}:{NUMBER})?", text.strip())
    if match is None:
        raise UsageError(
            f"--age {text} is no age and no range", "write 72, or FROM:TO:STEP as in 20:90:10"
        )
    if match[2] is None:
        return (float(match[1]),)
    start, stop, step = map(float, match.groups())
    if step == 0 or stop < start:
        raise UsageError(
            f"--age {text} holds no age", "write FROM:TO:STEP with FROM below TO, as in 20:90:10"
        )
    if step > stop - start > 0:
        raise UsageError(
            f"--age {text} steps over its own end", f"write a STEP of at most {stop - start:g}"
        )
    steps = (stop - start) / step + 1e-6
    if not steps < MOST:  # nor is a number too large for a float
        raise UsageError(f"--age {text} means over {MOST} atlases", "use longer steps")
    return tuple(round(start + k * step, 6) for k in range(int(steps) + 1))


@click.command(name="make")
@click.option("--age", metavar="YEARS", help="Age, or a range FROM:TO:STEP as 20:90:10.")
@click.option("--sex", type=SexOption(), help="Sex of the people [default: both].")
@click.option(
    "--ventricles",
    type=Number(0, 100, min_open=True),
    metavar="PERCENT",
    help="Volume of their ventricles in per cent of the brain [default: usual].",
)
@click.option("-o", "--out", type=PATH, required=True, help="Output folder.")
@click.option(
    "--samples",
    type=click.IntRange(2, 1000),
    help="Draw this many possible people: mean and spread of their volumes.",
)
@click.option(
    "--seed",
    type=SEED,
    help="Number of the first sample [default: 0]. Without --samples: the atlas of this possible"
    " person, not of the centre.",
)
@click.option(
    "--model",
    default=DEFAULT_ATLAS,
    show_default=True,
    callback=not_empty,
    help="Released atlas model, or a file.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier atlas of the same condition.")
@click.option("--report/--no-report", default=True, help="Write a page to look at [default: on].")
def command(
    age: str | None,
    sex: "Sex | None",
    ventricles: float | None,
    out: Path,
    samples: int | None,
    seed: int | None,
    model: str,
    overwrite: bool,
    report: bool,
) -> None:
    """Make a template of the people of an age, a sex or a size of the ventricles.

    The network deforms the MNI152 brain of the package. Writes a template's folder below OUT
    (T1w, brain mask, labels, transforms both ways, log-Jacobian, volumes, provenance) and a page,
    and prints their paths. --template takes the folder.

    Exit codes: 0 done, 1 failure, 64 usage, 65 bad data, 66 weights missing, 73 output cannot be
    created, 74 disk error, 130 interrupted, 143 terminated.
    """
    if age is None and sex is None and ventricles is None:
        raise UsageError("no condition is given", "give --age, --sex or --ventricles")
    ages = (None,) if age is None else parse_ages(age)
    from cadiff_cli.io import models
    from cadiff_cli.nets.models import AtlasModel
    from cadiff_cli.products import Condition
    from cadiff_cli.runner.atlases import make_atlases

    for path in make_atlases(
        models.load(AtlasModel, model),
        [Condition(years, sex, ventricles) for years in ages],
        out,
        samples=samples or 0,
        seed=seed,
        overwrite=overwrite,
        report=report,
    ):
        click.echo(path)
