"""Segment a scan: the network's probabilities become label codes on the scan's own grid."""

import numpy as np

from cadiff_cli.config import Config
from cadiff_cli.device import enough_memory, precision, usable_device
from cadiff_cli.labels.parcellation import Parcellation, Tissue
from cadiff_cli.nets.models import Model
from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.products import Conditions, Scan, Segmentation
from cadiff_cli.quality.expected import expected_dice
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.spatial.probabilities import Probabilities, on_native
from cadiff_cli.spatial.resample import resample, same_lattice
from cadiff_cli.stages.sampling import class_probabilities


def segment(
    scan: Scan,
    conditions: Conditions,
    mask: Volume,
    model: Model,
    config: Config,
    device_name: str = "auto",
) -> Segmentation:
    """Label codes on the scan's own grid, 0 outside ``mask`` (which is on the scan's grid).

    ``config.sample`` tells how, ``config.output`` what is wanted besides labels.
    """
    sample, output = config.sample, config.output
    parcellation, inside = model.parcellation, conditions.mask.data
    grid, native = conditions.image.grid, scan.t1.grid
    volumes: list[np.ndarray] = []

    def count(p: Probabilities) -> None:
        counts = np.bincount(p.most_probable()[inside], minlength=parcellation.n_classes)
        volumes.append(counts * grid.voxel_volume_mm3)

    several = sample.samples > 1
    device, trouble = usable_device(device_name)
    with enough_memory():
        each = count if several else None
        p, tile = class_probabilities(conditions, model, sample, each, str(device))
    best = p.most_probable()
    drawn = best * inside
    groups = [*parcellation.tissues.values()]
    posteriors = None
    if output.posteriors or not same_lattice(grid.voxel_map(native)):
        carried = on_native(p, grid, native, mask.data, groups, posteriors=output.posteriors)
        classes, tissues, posteriors = carried.classes, carried.sums, carried.posteriors
    else:  # nothing lies between voxels
        classes = resample(Volume(best, grid), native, order=0).data
        of_tissues = (Volume(x, grid) for x in p.sums(groups))
        copies = (resample(x, native, order=0).data for x in of_tissues)
        tissues = tuple((x * mask.data).astype(np.float16) for x in copies)
    entropy = None
    if output.uncertainty or several:
        entropy = resample(Volume(p.uncertainty(), grid), native).data
        entropy = np.where(mask.data, entropy, 0).astype(np.float32)
    notes: tuple[Note, ...] = (Note(NoteCode.DEVICE, trouble),) if trouble else ()
    if tile is not None and tile != sample.tile:
        text = f"memory was short: the volume was segmented in tiles of {tile} voxels"
        notes += (Note(NoteCode.TILES, text),)
    return Segmentation(
        Volume(np.where(mask.data, parcellation.codes[classes], 0).astype(np.int16), native),
        parcellation,
        steps=sample.steps,
        seed=sample.seed,
        device=str(device),
        precision=str(precision(device)).removeprefix("torch."),
        tile=tile,
        posteriors=posteriors,
        notes=notes,
        expected_dice=by_code(parcellation, of_drawn(expected_dice(p, drawn), drawn)),
        volume_sd_mm3=by_code(parcellation, np.std(volumes, axis=0, ddof=1)[1:]) if several else {},
        uncertainty=entropy,
        tissues=dict(zip(Tissue, tissues, strict=True)),
    )


def by_code(parcellation: Parcellation, values: np.ndarray) -> dict[int, float]:
    """Code -> value of (classes - 1,) values; NaN are left out."""
    pairs = zip(parcellation.structures, values, strict=True)
    return {s.code: float(value) for s, value in pairs if np.isfinite(value)}


def of_drawn(values: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """(classes - 1,) values, NaN for classes that ``drawn`` (X, Y, Z) does not hold."""
    counts = np.bincount(drawn.ravel(), minlength=len(values) + 1)[1:]
    return np.where(counts > 0, values, np.nan)
