"""What a page shows of a result: of one in memory, or read from its files.  Loads no torch."""

import glob
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cadiff_cli import machine
from cadiff_cli.errors import CadiffError, DataError
from cadiff_cli.io.bids.derivatives import read_mask_quality
from cadiff_cli.io.bids.description import raw_link
from cadiff_cli.io.bids.layout import Finished
from cadiff_cli.io.bids.names import HEAD, MASK, SKULL_MASK, UNCERTAINTY, WORKING, xfm_name
from cadiff_cli.io.files import sha256
from cadiff_cli.io.images import load_volume
from cadiff_cli.io.intensities import finite
from cadiff_cli.io.label_maps import load_classes
from cadiff_cli.io.provenance import UsedTemplate
from cadiff_cli.io.templates import load_template, spec_of
from cadiff_cli.io.volumes import Row, read_rows
from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.products import (
    CoordinateField,
    MaskQuality,
    Registered,
    Result,
    Transform,
    sound,
)
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import (
    bounding_box,
    resample,
    resample_labels,
    resample_mask,
    same_lattice,
)

MARGIN_MM = 8.0
"""Width of the margin shown around the brain."""
FIELD_COARSER = 4
"""The field is smooth: it is computed at every fourth voxel; pictures interpolate."""


@dataclass(frozen=True, eq=False)
class Views:
    """A scan and its labels on the working grid (RAS axes, 1 mm), as pictures need them.

    ``t1`` is the whole scan if it was found (``whole``), else its brain.  ``near`` is the grid
    around the brain.  ``registered`` is the first registration that contributes to the field.  Its
    template's brain, carried onto the scan (``template``), is on ``near``; the distance field
    (``coordinates``) has a coarser grid.  Where they are None, ``notes`` hold the reason.
    ``uncertainty`` is on ``near``, if the result has such a map.  ``parcels`` are codes of the
    finer parcellation, if it has one; ``intracranial`` is what the inner skull holds, if known.
    """

    t1: Volume
    mask: Volume
    labels: Volume
    near: Grid
    whole: bool = True
    registered: Registered | None = None
    template: Volume | None = None
    coordinates: CoordinateField | None = None
    uncertainty: Volume | None = None
    parcels: Volume | None = None
    intracranial: Volume | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def scan(self) -> Volume:
        """The scan on ``near``."""
        return resample(self.t1, self.near)

    @cached_property
    def brain(self) -> np.ndarray:
        """(X, Y, Z) bool: the brain on ``near``."""
        return resample(self.mask, self.near).data


@dataclass(frozen=True, eq=False)
class Case:
    """A result and everything that its page tells; ``finer_rows`` are volumes of parcels."""

    result: Finished
    rows: tuple[Row, ...]
    quality: MaskQuality | None
    finer_rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """The scan's entities."""
        return self.result.entities


def read_case(result: Finished) -> Case:
    """Read the tables and sidecars of ``result``.

    Raises ``CadiffError`` if the volumes cannot be read.
    """
    finer = result.finer
    return Case(
        result, result.rows(), read_mask_quality(result), read_rows(finer.morph) if finer else ()
    )


def views_of(result: Result) -> Views:
    """Those of a result that this process has made."""
    prepared, segmentation = result.prepared, result.segmentation
    masks = result.mask, result.intracranial
    views = _views(prepared.scan.t1, *masks, segmentation.labels, segmentation.parcellation)
    if segmentation.uncertainty is not None:
        map_of = Volume(segmentation.uncertainty, segmentation.labels.grid)
        views = replace(views, uncertainty=resample(map_of, views.near))
    if result.finer is not None:
        finer = result.finer.segmentation
        parcels = _on(views.t1.grid, finer.labels, finer.parcellation)
        views = replace(views, parcels=parcels)
    if not prepared.registrations:
        return views
    return replace(
        views,
        **_carried(prepared.registrations, views.near),
        coordinates=prepared.conditions.field,
    )


def read_views(out: Path, result: Finished, scans: Path | None = None) -> Views:
    """Those of a result, read from its files.

    ``scans`` is the scan itself, or a folder that holds it.  Raises ``CadiffError`` if labels or
    mask cannot be read; any other missing file becomes a note.
    """
    notes = []
    scan = find_scan(out, result, scans)
    head, brain = (_beside(result, f"{name}.nii.gz") for name in (HEAD, WORKING))
    if scan is None and head.is_file() and brain.is_file():
        notes.append("the scan itself was not found: its copy with even brightness is shown")
        scan = head
    elif scan is None:
        notes.append("the scan itself was not found: only its brain is shown")
    # Up to revision 8 the brain had the head's name.
    t1 = load_volume(scan or (brain if brain.is_file() else head))
    parcellation, skull = result.parcellation, _beside(result, f"{SKULL_MASK}.nii.gz")
    views = _views(
        t1,
        load_volume(_beside(result, f"{MASK}.nii.gz")),
        load_volume(skull) if skull.is_file() else None,
        load_codes(result.sidecar.with_suffix(".nii.gz"), parcellation),
        parcellation,
    )
    views = replace(views, whole=scan is not None)
    path = _beside(result, UNCERTAINTY.format(parcellation.segmentation) + ".nii.gz")
    if path.is_file():
        views = replace(views, uncertainty=resample(load_volume(path), views.near))
    if (finer := result.finer) is not None:
        fine = load_codes(finer.dseg, finer.parcellation)
        views = replace(views, parcels=_on(views.t1.grid, fine, finer.parcellation))
    try:
        if result.provenance.is_registered:
            from cadiff_cli.stages.field import mean_field

            registrations = [_registered(result, used) for used in result.provenance.templates]
            field = mean_field(registrations, views.near.coarsen(FIELD_COARSER))
            views = replace(views, **_carried(registrations, views.near), coordinates=field)
    except CadiffError as error:
        notes.append(machine.without_home(f"the registration is not shown: {error.message}"))
    return replace(views, notes=tuple(notes))


def load_codes(path: Path, parcellation: Parcellation) -> Volume:
    """Read a label map of ours.  Raises ``DataError``."""
    classes = load_classes(path, parcellation, parcellation.class_of)
    return Volume(parcellation.codes[classes.data], classes.grid)


def _views(
    t1: Volume, mask: Volume, held: Volume | None, labels: Volume, parcellation: Parcellation
) -> Views:
    """Scan, brain mask, what the inner skull holds, and label codes, which share a grid."""
    working = labels.grid.working()
    codes = _on(working, labels, parcellation)
    inside = _inside(mask, working)
    return Views(
        resample(Volume(finite(t1.data), t1.grid), working),
        inside,
        codes,
        around(Volume(inside.data | (codes.data > 0), working)),
        intracranial=_inside(held, working) if held else None,
    )


def _inside(mask: Volume, grid: Grid) -> Volume:
    """A mask of any type on another grid, as bool."""
    return resample_mask(Volume(mask.data > 0, mask.grid), grid)


def _on(grid: Grid, labels: Volume, parcellation: Parcellation) -> Volume:
    """Label codes on another grid."""
    if same_lattice(labels.grid.voxel_map(grid)):
        return resample(labels, grid, order=0)
    classes = Volume(parcellation.encode(labels.data, parcellation.class_of), labels.grid)
    return Volume(parcellation.codes[resample_labels(classes, grid).data], grid)


def _carried(registrations: Sequence[Registered], near: Grid) -> dict[str, Any]:
    """Fields of ``Views``: the first registration of the field, and its template on the scan."""
    from cadiff_cli.stages.register import warp

    first = sound(registrations)[0]
    return {"registered": first, "template": warp(first.template.brain, first.transform, near)}


def find_scan(out: Path, result: Finished, scans: Path | None = None) -> Path | None:
    """Find the scan that ``result`` was made from, by its SHA-256; None if it is not there.

    A scan, or a folder, that this user may not read counts as not there.
    """
    source = result.provenance.source
    inner = source.removeprefix("bids:raw:")
    raw = raw_link(out)
    places = [] if scans is None else [scans]
    if scans is not None:
        name = Path(inner).name
        inside = scans / result.entities.split("_")[0]
        places += [scans / inner, scans / name]
        with suppress(OSError):
            places += sorted(inside.rglob(glob.escape(name)))
    places.append(out / raw / inner if inner != source else out / inner)
    checksum = result.provenance.source_sha256
    for place in places:
        with suppress(OSError):
            if place.is_file() and sha256(place) == checksum:
                return place
    return None


def around(mask: Volume, margin_mm: float = MARGIN_MM) -> Grid:
    """Crop the mask's grid to the mask, with a margin where the grid has room."""
    if not mask.data.any():
        raise DataError("the brain mask is empty", "segment the scan again")
    margin = np.ceil(margin_mm / mask.grid.spacing_mm).astype(int)
    return mask.grid.within(bounding_box(mask.data, margin))


def _registered(result: Finished, used: UsedTemplate) -> Registered:
    """Read a registration from its stored transform and its entry in the sidecar."""
    source = str(Path(used.source).expanduser())
    template = load_template(spec_of(used.name, source), offline=True)
    if used.sha256 not in ("", template.sha256):
        raise DataError(
            f"template {template.name} has changed since this result", "segment the scan again"
        )
    to_scan, to_template = (
        _beside(result, xfm_name(*ends))
        for ends in ((template.label, "T1w"), ("T1w", template.label))
    )
    if not to_scan.is_file():
        raise DataError(f"{to_scan.name} is not there", "segment the scan again")
    transform = Transform(
        to_scan, to_template, used.registration, used.score or 0.0, trusted=used.in_field
    )
    return Registered(template, transform)


def _beside(result: Finished, suffix: str) -> Path:
    return result.sidecar.with_name(f"{result.entities}_{suffix}")
