"""``cadiff ranges``: percentiles of one's own people."""

from cadiff_cli.cli import family


@family("ranges", "train")
def command() -> None:
    """Make percentiles of structures by age and sex, for --ranges of cadiff-seg and cadiff run."""
