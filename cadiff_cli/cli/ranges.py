"""``cadiff ranges``: percentiles of one's own people."""

import click

from cadiff_cli.cli import Lazy

COMMANDS = ("train",)


@click.group(
    name="ranges",
    cls=Lazy,
    names=COMMANDS,
    prefix="ranges_",
    context_settings={"help_option_names": ["-h", "--help"]},
)
def command() -> None:
    """Percentiles of structures by age and sex, for --ranges of cadiff-seg and cadiff run."""
