"""Whole heads to train the brain mask on: label maps that become images, and real scans."""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cadiff_cli.errors import DataError, MissingInputError, UsageError
from cadiff_cli.io.files import files_below, names_in, sha256
from cadiff_cli.io.formats import check_there, stem
from cadiff_cli.io.images import load_scan, load_volume
from cadiff_cli.io.label_maps import load_ids
from cadiff_cli.labels.parcellation import BASE, load_parcellation
from cadiff_cli.nets.brain_mask import SPACING_MM, HeadTissue
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.spatial.resample import check_same_grid, pool, resample, resample_labels
from cadiff_cli.stages.brain_mask import normalise_head
from cadiff_cli.stages.masks import filled
from cadiff_cli.training import store
from cadiff_cli.training.brain_mask.target import (
    LEAST_BRAIN_LITRES,
    closed,
    distance_at_2mm,
    intracranial,
    is_brain,
)
from cadiff_cli.training.paint import FLUID, T1_BRIGHTNESS, tissues

log = logging.getLogger(__name__)

FORMAT = 6
"""Increase when the preparation of heads changes; older files are then prepared again."""
T1_FLUID = (0.30, 0.07)
"""Brightness of all fluid in a head, as those of ``T1_HEAD``.  In 11 heads of IXI and NiChart
ventricles had 0.25 to 0.50 of the brightness of white matter; bone is far darker, and so the skull
can be seen."""
T1_HEAD: Mapping[int, tuple[float, float]] = {
    0: (0.0, 0.0),
    506: (0.12, 0.05),  # eyes
    512: (0.65, 0.08),  # spinal cord
    514: (0.25, 0.15),  # veins and sinuses
    515: (0.06, 0.02),  # cortical bone
    516: (0.55, 0.20),  # marrow
}
"""Brightness as in ``paint.T1_BRIGHTNESS``, with spread, of labels around the brain; all others
(skin, fat, muscles, vessels) are of medium brightness and vary."""


@dataclass(frozen=True, eq=False)
class Head:
    """A head on a 2 mm RAS grid.

    ``distance`` (X, Y, Z) float16 is the signed distance (mm, inside positive) to the mask's
    border.  ``image`` (X, Y, Z) uint8 is a real scan.  Without one ``labels`` (2X, 2Y, 2Z) uint8,
    eight in each voxel, are turned into images; then ``t1`` (labels, 2) float32 is the mean and the
    spread between people of each label's brightness in a T1-weighted image, and ``tissue`` (labels)
    uint8 its ``HeadTissue``.  ``held`` is like ``labels``, 1 within the inner skull, and ``skull``
    like ``distance``, to its border.
    """

    name: str
    source: str
    distance: np.ndarray
    image: np.ndarray | None = None
    labels: np.ndarray | None = None
    t1: np.ndarray | None = None
    tissue: np.ndarray | None = None
    held: np.ndarray | None = None
    skull: np.ndarray | None = None

    @cached_property
    def centre(self) -> np.ndarray:
        """(3,) float32: the middle of the brain, in voxels."""
        middle: np.ndarray = np.argwhere(self.distance > 0).mean(axis=0)
        return middle.astype(np.float32)

    @cached_property
    def fluid(self) -> int | None:
        """The label of the fluid around the brain; None if it is not known."""
        if self.labels is None or self.t1 is None:
            return None
        around = (self.distance < 0) & (self.distance > -SPACING_MM)
        count = np.bincount(self.labels[::2, ::2, ::2][around], minlength=len(self.t1))
        count[~np.isclose(self.t1[:, 0], T1_FLUID[0])] = 0
        return int(count.argmax()) if count.any() else None

    @cached_property
    def bone(self) -> int | None:
        """The label of cortical bone; None if there is none."""
        if self.tissue is None:
            return None
        bones = np.flatnonzero(self.tissue == HeadTissue.BONE)
        return int(bones[0]) if len(bones) else None


def half(head: Head) -> Head:
    """A head with voxels twice as large, for the brain's border: it knows no inner skull."""
    shape = [size // 2 for size in head.distance.shape]

    # The first and the last of four labels in a row: their centre is that of the four.
    kept = np.ix_(*(np.arange(4 * size).reshape(size, 4)[:, [0, 3]].ravel() for size in shape))
    return replace(
        head,
        distance=pool(head.distance[None], 2)[0].astype(np.float16),
        image=None if head.image is None else pool(head.image[None], 2)[0].round().astype(np.uint8),
        labels=None if head.labels is None else head.labels[kept],
        held=None,
        skull=None,
    )


def from_labels(name: str, source: str, dseg: Volume) -> Head:
    """Make a head without an image: ``dseg`` holds FreeSurfer's codes, and 5xx around the brain."""
    codes = np.rint(dseg.data).astype(np.int32)
    brain = closed(is_brain(codes), dseg.grid.spacing_mm)
    distance = distance_at_2mm(Volume(brain, dseg.grid))
    labels, of_label = paintable(codes)
    held = intracranial(codes, dseg.grid)
    eighths = distance.grid.working(SPACING_MM / 2, tolerance=0.0)  # of the same field of view
    labels_1mm, held_1mm = (
        resample_labels(Volume(data, dseg.grid), eighths).data.copy()
        for data in (labels, held.astype(np.uint8))
    )
    return Head(
        name,
        source,
        distance.data.astype(np.float16),
        labels=labels_1mm,
        t1=np.array([t1_brightness(code) for code in of_label], dtype=np.float32),
        tissue=np.array([tissue_of(code) for code in of_label], dtype=np.uint8),
        held=held_1mm,
        skull=distance_at_2mm(Volume(held, dseg.grid)).data.astype(np.float16),
    )


def paintable(codes: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Turn FreeSurfer's ``codes`` into labels (X, Y, Z) uint8, and the code of each label.

    Left and right share their intensities, so they share a label; 0 is air.
    """
    left = load_parcellation(BASE).left_codes
    present = np.unique(np.append(codes, 0))  # air is label 0, even if the map calls it otherwise
    of_pair, paired = np.unique(
        [left.get(int(code), int(code)) for code in present], return_inverse=True
    )
    if paired.max() > 255:
        raise DataError(f"{paired.max()} different labels", "give a label map of at most 255")
    of_code = np.zeros(present[-1] - present[0] + 1, dtype=np.uint8)
    of_code[present - present[0]] = paired
    return of_code[codes - present[0]], [int(code) for code in of_pair]


def tissue_of(code: int) -> HeadTissue:
    """The tissue that FreeSurfer's ``code`` is, where it lies outside the inner skull.

    Inside, all is brain or fluid.
    """
    if is_brain(np.array(code)):
        return HeadTissue.BRAIN
    return {0: HeadTissue.AIR, 515: HeadTissue.BONE, 516: HeadTissue.MARROW}.get(
        code, HeadTissue.SOFT
    )


def t1_brightness(code: int) -> tuple[float, float]:
    """Mean and spread between people of a label's brightness (0 to 1) in a T1-weighted image."""
    tissue = tissues().get(code, code)
    if T1_BRIGHTNESS.get(tissue) == FLUID:
        return T1_FLUID
    if tissue in T1_BRIGHTNESS:
        return T1_BRIGHTNESS[tissue], 0.04
    return T1_HEAD.get(code, (0.45, 0.15))


def from_scan(name: str, source: str, t1: Volume, brain: Volume, *, close: bool) -> Head:
    """Make a head of a scan and its brain; ``close`` the brain if it ends at the cortex."""
    mask = np.asarray(brain.data) > 0.5
    litres = Volume(mask, brain.grid).litres
    if litres < LEAST_BRAIN_LITRES:
        raise DataError(f"the brain mask holds {litres:.3f} l", "is it one of the brain?")
    if close:
        mask = closed(mask, brain.grid.spacing_mm)
    distance = distance_at_2mm(Volume(filled(mask), brain.grid))
    image = normalise_head(resample(t1, distance.grid).data)
    return Head(
        name, source, distance.data.astype(np.float16), np.round(image * 255).astype(np.uint8)
    )


def prepare_heads(
    label_maps: Sequence[Path], datasets: Sequence[Path], cache: Path
) -> dict[str, list[Head]]:
    """Prepare each head once, keep it in ``cache``, and return heads by source (a folder's name).

    ``label_maps`` are folders of whole-head label maps; ``datasets`` are BIDS-like folders of heads
    with a brain ``mask`` (used unchanged) or a ``dseg`` of the brain (closed).
    """
    sources: dict[str, list[tuple[Path, Path]]] = {}
    for folder in (*label_maps, *datasets):
        if not folder.is_dir():
            raise MissingInputError(f"no folder {folder}", "check the path")
        if folder.name in sources:
            raise UsageError(f"two folders are called {folder.name!r}", "rename one")
        if folder in label_maps:
            maps = (folder / name for name in names_in(folder) if not name.startswith("."))
            pairs = [(path, path) for path in maps if ".nii" in path.name]
        else:
            scans = files_below(folder, "*_T1w.nii*", within="sub-")
            pairs = [(path, brain_of(path)) for path in scans]
        if not pairs:
            raise DataError(f"{folder} holds no heads", "see cadiff train-mask --help")
        sources[folder.name] = pairs
    cache.mkdir(parents=True, exist_ok=True)
    heads = {}
    for source, pairs in sources.items():
        paths = [build(path, brain, source, cache) for path, brain in pairs]
        heads[source] = [load(path) for path in paths]
        log.info("%d heads of %s", len(paths), source)
    return heads


def build(path: Path, brain: Path, source: str, cache: Path) -> Path:
    """Prepare a T1-weighted head with its ``brain``, or a label map that is both; keep the file."""
    for file in (path, brain):
        check_there(file)

    def prepare() -> dict[str, Any]:
        if path == brain:
            head = from_labels(stem(path), source, load_ids(path)[0])
        else:
            head = _real_head(path, brain, source)
        return arrays(head)

    content = (FORMAT, sha256(path), sha256(brain))
    kept = store.stored_path(cache, f"{source}_{stem(path)}", content)
    return store.once(kept, path.name, prepare)


def arrays(head: Head) -> dict[str, Any]:
    """The parts of a head that are not None, by name."""
    values = ((field.name, getattr(head, field.name)) for field in fields(head))
    return {name: value for name, value in values if value is not None}


def load(path: Path) -> Head:
    """Read a head that ``build`` wrote."""
    stored = store.read(path)
    return Head(
        str(stored["name"]),
        str(stored["source"]),
        stored["distance"],
        **{field.name: stored.get(field.name) for field in fields(Head) if field.default is None},
    )


def brain_of(t1: Path) -> Path:
    """Find the mask beside a head, else its dseg: of this scan, not of another run."""
    scan = re.escape(t1.name.split("_T1w")[0])
    # A mask of a lesion or of grey matter is no brain mask.
    for suffix, entities in (
        ("mask", "(_(desc|label)-brain)?"),
        ("dseg", r"(_(atlas|desc|label|seg)-\w+)*"),
    ):
        name = re.compile(rf"{scan}{entities}_{suffix}\.nii(\.gz)?", re.ASCII)
        brains = sorted(path for path in t1.parent.iterdir() if name.fullmatch(path.name))
        if len(brains) > 1:
            names = ", ".join(path.name for path in brains)
            raise DataError(f"{t1.name} has {len(brains)} brains: {names}", "leave one of them")
        if brains:
            return brains[0]
    raise DataError(
        f"{t1} has neither brain mask nor dseg beside it",
        "add a mask, desc-brain_mask, label-brain_mask or dseg, or remove the scan",
    )


def _real_head(t1: Path, brain: Path, source: str) -> Head:
    name = t1.name.split("_T1w")[0]
    image, (inside, ends_at_cortex) = load_scan(t1).t1, load_brain(brain)
    check_same_grid(brain.name, inside.grid, t1.name, image.grid)
    return from_scan(name, source, image, inside, close=ends_at_cortex)


def load_brain(path: Path) -> tuple[Volume, bool]:
    """The brain (bool) of a mask or a dseg, and whether it ends at the cortex, as labels do."""
    volume, ends_at_cortex = load_volume(path), "_dseg." in path.name
    inside = is_brain(volume.data) if ends_at_cortex else np.asarray(volume.data) > 0.5
    return Volume(inside, volume.grid), ends_at_cortex


def content(head: Head) -> str:
    """A text that identifies a head with all that is learnt from it."""
    digest = hashlib.sha256()
    for name, part in arrays(head).items():
        digest.update(name.encode() + np.asarray(part).tobytes())
    return f"{head.source} {head.name} {digest.hexdigest()}"
