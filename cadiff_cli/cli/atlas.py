"""``cadiff atlas``: templates of the people that a lab scans."""

from cadiff_cli.cli import family


@family("atlas", "make", "train", "evaluate")
def command() -> None:
    """Make conditional atlases: a template for an age, a sex or a size of the ventricles."""
