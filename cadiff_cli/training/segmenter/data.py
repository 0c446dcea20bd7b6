"""Labelled scans to learn from: each prepared once, by the very code that inference runs.

A prepared scan holds the image crop as uint8, its classes, and the distance field of each
template at 4 mm in half precision (it is smooth).
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cadiff_cli.config import REVISION, Config, fingerprint
from cadiff_cli.errors import DataError, UsageError, first_few
from cadiff_cli.io.bids.labelled import LabelledScan, labelled_scans, load_labelled
from cadiff_cli.io.files import sha256
from cadiff_cli.io.formats import check_there
from cadiff_cli.io.templates import own_contents
from cadiff_cli.labels.parcellation import BASE, Parcellation, shipped_names
from cadiff_cli.labels.schemes import load_scheme
from cadiff_cli.machine import work_folder
from cadiff_cli.pipeline import prepare
from cadiff_cli.products import sound
from cadiff_cli.spatial.resample import pool, resample_labels
from cadiff_cli.stages.condition import FIELD_STRIDE
from cadiff_cli.stages.field import mean_field
from cadiff_cli.training import store
from cadiff_cli.training.templates import load_training_template, template_key

log = logging.getLogger(__name__)

FORMAT = 4
"""Counts changes of what a sample holds: older files are prepared again."""
HOW = Config()
"""Brains are found and registered as a run with default options does it."""
STORED_STRIDE = 4
"""Voxels between stored field values; the network's own field has twice as many."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A prepared training scan.

    ``image`` (X, Y, Z) uint8, 255 = 1.0; ``mask`` (X, Y, Z) bool; ``classes`` (X, Y, Z) of the
    parcellation's type; ``fields`` maps a template's name to (3, X/4, Y/4, Z/4) float16.
    ``labels`` is the fingerprint of the mapping that the classes were made with, ``drawn`` the
    classes that it can give, ``key`` tells files of other content apart.  ``contents`` maps its
    templates that are not shipped to their SHA-256.
    """

    name: str
    subject: str
    image: np.ndarray
    mask: np.ndarray
    classes: np.ndarray
    fields: dict[str, np.ndarray]
    labels: str = ""
    drawn: tuple[int, ...] = ()
    key: str = ""
    contents: Mapping[str, str] = field(default_factory=dict)

    def scored(self, classes: Sequence[int]) -> tuple[int, ...]:
        """Those of ``classes`` that somebody may have drawn."""
        return tuple(k for k in classes if not self.drawn or k in self.drawn)


LabelledDataset = tuple[list[LabelledScan], dict[int, int]]
"""Scans of a dataset, and the classes of its ids."""


def prepare_scans(
    scans: Sequence[LabelledScan],
    templates: Sequence[str],
    parcellation: Parcellation,
    mapping: dict[int, int],
    folder: Path,
) -> list[Sample]:
    """Prepare every scan once (kept in ``folder``) and load them all.

    ``mapping`` turns the ids of their label maps into classes of ``parcellation``.
    """
    # Whatever is wrong with one is said before the first scan.
    contents = dict(own_contents(load_training_template(name) for name in templates))
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for index, scan in enumerate(scans, start=1):
        log.info("preparing %s, %d of %d", scan.name, index, len(scans))
        sample = load(build(scan, templates, parcellation, mapping, folder))
        samples.append(replace(sample, contents=contents))
    return samples


def labelled_datasets(
    dataset: Path, labels: str, also: Sequence[tuple[Path, str]], parcellation: Parcellation
) -> list[LabelledDataset]:
    """Pair the scans of a dataset, and of those that are trusted less, with their labels.

    Raises ``UsageError`` if two of ``also`` share a subject.
    """
    datasets = [
        (labelled_scans(path), load_scheme(name, parcellation))
        for path, name in ((dataset, labels), *also)
    ]
    others = ({scan.subject for scan in scans} for scans, _ in datasets[1:])
    counted = Counter(name for group in others for name in group)
    if both := sorted(name for name, n in counted.items() if n > 1):
        raise UsageError(
            f"subjects of two --also datasets have the same label: {first_few(both)}",
            "rename those of one",
        )
    return datasets


def prepare_datasets(
    datasets: Sequence[LabelledDataset],
    templates: Sequence[str],
    parcellation: Parcellation,
    folder: Path,
) -> tuple[list[Sample], list[Sample]]:
    """``prepare_scans`` of the first dataset, and of all others, which are trusted less."""
    first, *others = (
        prepare_scans(scans, templates, parcellation, mapping, folder)
        for scans, mapping in datasets
    )
    return first, [sample for samples in others for sample in samples]


def sample_path(
    scan: LabelledScan,
    templates: Sequence[str],
    parcellation: Parcellation,
    mapping: dict[int, int],
    folder: Path,
) -> Path:
    """Where a scan's sample lies: all that decides its content is in its name."""
    for path in (scan.t1, scan.dseg):
        check_there(path)
    inputs = [sha256(path) for path in (scan.t1, scan.dseg)]
    frames = [template_key(name) for name in templates]
    content = [FORMAT, REVISION, sorted(mapping.items()), frames, inputs, store.made_by(HOW)]
    if parcellation.name != BASE:  # the names of its samples are older than other parcellations
        content.append(identity(parcellation))
    return store.stored_path(folder, scan.name, content)


def identity(parcellation: Parcellation) -> str:
    """Tells a parcellation from all others: its name, and of one's own the table's fingerprint."""
    own = parcellation.name not in shipped_names()
    return f"{parcellation.name}-{fingerprint(parcellation.as_tsv())}" if own else parcellation.name


def build(
    scan: LabelledScan,
    templates: Sequence[str],
    parcellation: Parcellation,
    mapping: dict[int, int],
    folder: Path,
) -> Path:
    """Prepare one scan with every template and write its sample; an existing one is kept.

    ``templates`` are what ``load_training_template`` takes.  Fields of registrations that look
    wrong are left out, as inference does.
    """
    return store.once(
        sample_path(scan, templates, parcellation, mapping, folder),
        scan.name,
        lambda: _arrays(scan, templates, parcellation, mapping),
    )


def _arrays(
    scan: LabelledScan,
    templates: Sequence[str],
    parcellation: Parcellation,
    mapping: dict[int, int],
) -> dict[str, Any]:
    loaded, classes = load_labelled(scan, parcellation, mapping)
    arrays: dict[str, Any] = {}
    with work_folder() as work:
        loaded_templates = [load_training_template(name) for name in templates]
        prepared = prepare(loaded, loaded_templates, HOW, Path(work))
        conditions, grid = prepared.conditions, prepared.conditions.image.grid
        for registered in sound(prepared.registrations):
            field = mean_field([registered], grid.coarsen(FIELD_STRIDE))
            pooled = pool(field.data, STORED_STRIDE // FIELD_STRIDE)
            arrays[f"field_{registered.template.name}"] = pooled.astype(np.float16)
    drawn = resample_labels(classes, grid).data
    if not drawn.any():
        raise DataError(
            f"{scan.dseg.name} has no labelled structure in its brain",
            "remove this scan, or repair its labels",
        )
    return arrays | {
        "image": np.round(conditions.image.data * 255).astype(np.uint8),
        "mask": conditions.mask.data.astype(bool),
        "classes": drawn,
        "name": scan.name,
        "subject": scan.subject,
        "labels": fingerprint(sorted(mapping.items())),
        "drawn": np.array(sorted(parcellation.reached(mapping)), parcellation.dtype),
        "key": fingerprint([sha256(path) for path in (scan.t1, scan.dseg)]),
    }


def load(path: Path) -> Sample:
    """Read a sample that ``build`` wrote."""
    stored = store.read(path)
    fields = {key.removeprefix("field_"): stored[key] for key in stored if key.startswith("field_")}
    return Sample(
        str(stored["name"]),
        str(stored["subject"]),
        stored["image"],
        stored["mask"],
        stored["classes"],
        fields,
        str(stored["labels"]),
        tuple(map(int, stored["drawn"])),
        str(stored["key"]),
    )


def structures(samples: Sequence[Sample], parcellation: Parcellation) -> set[int]:
    """Codes that the samples' labels hold: of others a network learns that they are nowhere."""
    present = np.zeros(parcellation.n_classes, dtype=bool)
    for sample in samples:
        present |= np.bincount(sample.classes.ravel(), minlength=parcellation.n_classes) > 0
    return set(parcellation.codes[1:][present[1:]].tolist())


def sample_field(sample: Sample) -> np.ndarray:
    """Mean over the templates of a sample's fields, (3, X/4, Y/4, Z/4) float32."""
    fields = [field.astype(np.float32) for field in sample.fields.values()]
    return np.asarray(sum(fields) / np.float32(len(fields)))
