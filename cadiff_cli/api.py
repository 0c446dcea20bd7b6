"""The functions that the package shows to Python programs."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from cadiff_cli.config import Config, Request
from cadiff_cli.io import images
from cadiff_cli.io.templates import load_templates
from cadiff_cli.machine import work_folder
from cadiff_cli.pipeline import run
from cadiff_cli.products import Result, Scan, Template

if TYPE_CHECKING:
    from cadiff_cli.nets.models import Model


def load_scan(path: str | Path) -> Scan:
    """The T1-weighted scan in a NIfTI or MGH file, checked.

    Raises ``MissingInputError`` or ``DataError`` for a file that cannot be segmented.
    """
    return images.load_scan(Path(path))


def load_model(name: str = Request.model) -> "Model":
    """A released network by name, or one in a ``.safetensors`` file."""
    from cadiff_cli.io import models
    from cadiff_cli.nets.models import Model

    return models.load(Model, name)


def segment(
    scan: Scan,
    templates: Sequence[Template] = (),
    model: "Model | None" = None,
    config: Config | None = None,
    *,
    device: str = "auto",
    work_dir: Path | None = None,
) -> Result:
    """Segment a scan in memory: labels, volumes (mm3 by code), and everything they were made from.

    Without ``templates``, ``model`` and ``config`` those of ``cadiff-seg`` are taken.  No files are
    written but transforms in ``work_dir``, which are removed without one: of ``config.output`` only
    ``posteriors``, ``uncertainty`` and ``parcellation`` have an effect.  For the distance field,
    standard spaces and files use ``cadiff-seg``.  Raises ``UsageError`` for settings beyond
    their limits, or that contradict one another.
    """
    model = model or load_model()
    config = (config or Config()).for_model(model.info.name)
    config.check()
    with nullcontext(work_dir) if work_dir else work_folder() as folder:
        return run(
            scan,
            templates or load_templates(),
            model,
            config,
            Path(folder),
            device=device,
        )
