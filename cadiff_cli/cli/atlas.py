"""``cadiff atlas``: templates of the people that a lab scans."""

import click

from cadiff_cli.cli import Lazy

COMMANDS = ("make", "train", "evaluate")


@click.group(
    name="atlas",
    cls=Lazy,
    names=COMMANDS,
    prefix="atlas_",
    context_settings={"help_option_names": ["-h", "--help"]},
)
def command() -> None:
    """Conditional atlases: a template for an age, a sex or a size of the ventricles."""
