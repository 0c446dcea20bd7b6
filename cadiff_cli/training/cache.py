"""A training set on disk: each scan prepared once, by the very code that inference runs.

One small ``.npz`` a scan: the image crop as uint8, classes as uint8, and the distance field of each
template at 4 mm in half precision (it is smooth).  A cache travels to another machine as it is.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cadiff_cli.config import Config, RegisterConfig, fingerprint
from cadiff_cli.errors import DataError
from cadiff_cli.io.bids import LabelledScan
from cadiff_cli.io.nifti import load_scan, load_volume, replacing
from cadiff_cli.io.releases import sha256
from cadiff_cli.io.templates import load_template
from cadiff_cli.labels import LabelTable
from cadiff_cli.products import sound
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.spatial.resample import resample_labels
from cadiff_cli.stages.condition import FIELD_STRIDE as NETWORK_STRIDE
from cadiff_cli.stages.condition import condition
from cadiff_cli.stages.register import register
from cadiff_cli.stages.strip import strip, strip_template

FORMAT = 3
"""Counts changes of what a sample holds: older files are prepared again."""
FIELD_STRIDE = 4
"""Voxels between stored field values; the network's own field has twice as many."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A prepared training scan.

    ``image`` (X, Y, Z) uint8, 255 = 1.0; ``mask`` (X, Y, Z) bool; ``classes`` (X, Y, Z) uint8;
    ``fields`` maps a template's name to (3, X/4, Y/4, Z/4) float16.  ``labels`` is the fingerprint
    of the mapping that the classes were made with.
    """

    name: str
    subject: str
    image: np.ndarray
    mask: np.ndarray
    classes: np.ndarray
    fields: dict[str, np.ndarray]
    labels: str = ""


def cached_path(
    scan: LabelledScan, templates: Sequence[str], mapping: dict[int, int], folder: Path
) -> Path:
    """Where a scan's sample lies: another mapping, template list or input is another file."""
    inputs = [sha256(path) for path in (scan.t1, scan.dseg)]
    key = fingerprint([FORMAT, sorted(mapping.items()), list(templates), scan.t1.name, inputs])
    return folder / f"{scan.name}_{key}.npz"


def build(
    scan: LabelledScan,
    templates: Sequence[str],
    table: LabelTable,
    mapping: dict[int, int],
    folder: Path,
) -> Path:
    """Prepare one scan with every template and write its sample; an existing one is kept.

    The brain is found once, so that all fields share one crop.  Fields of registrations that look
    wrong are left out, as inference does.
    """
    path = cached_path(scan, templates, mapping, folder)
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
    arrays: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as work:
        atlases = [load_template(name, offline=True) for name in templates]
        stripped = strip(loaded, strip_template(atlases), Config(), Path(work))
        made = [register(stripped, atlas, RegisterConfig(), Path(work)) for atlas in atlases]
        for registered in sound(made):
            conditions = condition(stripped, [registered])
            assert conditions.field is not None  # RegisterConfig() registers
            field = pool(conditions.field.data, FIELD_STRIDE // NETWORK_STRIDE)
            arrays[f"field_{registered.template.name}"] = field.astype(np.float16)
    grid = conditions.image.grid
    arrays["image"] = np.round(conditions.image.data * 255).astype(np.uint8)
    arrays["mask"] = conditions.mask.data.astype(bool)
    arrays["classes"] = resample_labels(classes, grid).data
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(
            stream,
            name=scan.name,
            subject=scan.subject,
            labels=fingerprint(sorted(mapping.items())),
            **arrays,  # type: ignore[arg-type]
        )
    return path


def load(path: Path) -> Sample:
    """Read a sample written by ``build``."""
    with np.load(path, allow_pickle=False) as stored:
        fields = {
            key.removeprefix("field_"): stored[key] for key in stored if key.startswith("field_")
        }
        return Sample(
            str(stored["name"]),
            str(stored["subject"]),
            stored["image"],
            stored["mask"],
            stored["classes"],
            fields,
            str(stored["labels"]),
        )


def mean_field(sample: Sample) -> np.ndarray:
    """Mean over the templates of a sample's fields, (3, X/4, Y/4, Z/4) float32."""
    fields = [field.astype(np.float32) for field in sample.fields.values()]
    return np.asarray(sum(fields) / np.float32(len(fields)))


def pool(data: np.ndarray, factor: int) -> np.ndarray:
    """Mean over blocks of ``factor``^3 voxels of (C, X, Y, Z)."""
    c, x, y, z = (n // f for n, f in zip(data.shape, (1, factor, factor, factor), strict=True))
    blocks = data.reshape(c, x, factor, y, factor, z, factor)
    return np.asarray(blocks.mean(axis=(2, 4, 6)))
