"""A training set on disk: each scan prepared once, by the very code that inference runs.

One small ``.npz`` a scan: the image crop as uint8, classes as uint8, and the distance field of each
template at 4 mm in half precision (it is smooth).  A cache travels to another machine as it is.
"""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cadiff_cli.config import Config, RegisterConfig, StripConfig
from cadiff_cli.errors import DataError, MissingInputError
from cadiff_cli.io.bids import LabelledScan
from cadiff_cli.io.nifti import load_scan, load_volume, replacing
from cadiff_cli.io.templates import load_template
from cadiff_cli.labels import LabelTable
from cadiff_cli.pipeline import prepare
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.spatial.resample import resample

log = logging.getLogger(__name__)

FIELD_STRIDE = 4


@dataclass(frozen=True, eq=False)
class Sample:
    """A prepared training scan.

    ``image`` (X, Y, Z) uint8, 255 = 1.0; ``classes`` (X, Y, Z) uint8; ``fields`` maps a template's
    name to (3, X/4, Y/4, Z/4) float16.
    """

    name: str
    subject: str
    image: np.ndarray
    classes: np.ndarray
    fields: dict[str, np.ndarray]


def cached_name(scan: LabelledScan) -> str:
    """File name of a scan's sample."""
    return f"{scan.name}.npz"


def build(
    scan: LabelledScan,
    templates: Sequence[str],
    table: LabelTable,
    mapping: dict[int, int],
    folder: Path,
) -> Path:
    """Prepare one scan with every template and write its sample; an existing one is kept."""
    path = folder / cached_name(scan)
    if path.exists():
        return path
    loaded = load_scan(scan.t1)
    dseg = load_volume(scan.dseg)
    if dseg.grid.shape != loaded.t1.grid.shape:
        raise DataError(
            f"{scan.dseg.name} is {dseg.grid.shape}, {scan.t1.name} is {loaded.t1.grid.shape}",
            "an image and its labels must share a grid",
        )
    classes = Volume(table.encode(np.asarray(dseg.data), mapping), dseg.grid)
    config = Config(strip=StripConfig("auto"), register=RegisterConfig("fast"))
    arrays: dict[str, np.ndarray] = {}
    for name in templates:
        with tempfile.TemporaryDirectory() as work:
            prepared = prepare(loaded, load_template(name, offline=True), config, Path(work))
        conditions = prepared.conditions
        arrays[f"field_{name}"] = pool(conditions.field.data, FIELD_STRIDE // 2).astype(np.float16)
    grid = conditions.image.grid
    arrays["image"] = np.round(conditions.image.data * 255).astype(np.uint8)
    arrays["classes"] = resample(classes, grid, order=0).data
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, name=scan.name, subject=scan.subject, **arrays)  # type: ignore[arg-type]
    log.info("prepared %s (registration score %.3f)", scan.name, prepared.registered.score)
    return path


def load(path: Path) -> Sample:
    """Read a sample written by ``build``."""
    with np.load(path, allow_pickle=False) as stored:
        fields = {
            key.removeprefix("field_"): stored[key] for key in stored if key.startswith("field_")
        }
        return Sample(
            str(stored["name"]), str(stored["subject"]), stored["image"], stored["classes"], fields
        )


def load_all(folder: Path) -> list[Sample]:
    """Every sample of a cache folder, in name order."""
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise MissingInputError(f"no prepared scans in {folder}", "run cadiff train DATASET first")
    return [load(path) for path in paths]


def pool(data: np.ndarray, factor: int) -> np.ndarray:
    """Mean over blocks of ``factor``^3 voxels of (C, X, Y, Z)."""
    c, x, y, z = (n // f for n, f in zip(data.shape, (1, factor, factor, factor), strict=True))
    blocks = data.reshape(c, x, factor, y, factor, z, factor)
    return np.asarray(blocks.mean(axis=(2, 4, 6)))
