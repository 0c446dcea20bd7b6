"""The order of the stages.  Inference, training and evaluation all begin with ``prepare``."""

from pathlib import Path

from cadiff_cli.config import Config
from cadiff_cli.products import Prepared, Scan, Template
from cadiff_cli.stages.condition import condition
from cadiff_cli.stages.register import register
from cadiff_cli.stages.strip import strip


def prepare(scan: Scan, template: Template, config: Config, work_dir: Path) -> Prepared:
    """Everything before the network; transforms are written into ``work_dir``."""
    stripped = strip(scan, template, config.strip, work_dir)
    registered = register(stripped, template, config.register, work_dir)
    return Prepared(scan, stripped, registered, condition(stripped, registered))
