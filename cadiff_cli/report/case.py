"""Read a finished result back from its files, as a page needs it.  Loads no torch."""

import glob
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cadiff_cli import machine
from cadiff_cli.errors import CadiffError, DataError
from cadiff_cli.io.bids.derivatives import read_mask_quality
from cadiff_cli.io.bids.description import links
from cadiff_cli.io.bids.layout import Finished
from cadiff_cli.io.bids.names import HEAD, MASK, UNCERTAINTY, WORKING, xfm_name
from cadiff_cli.io.files import read_json, sha256
from cadiff_cli.io.images import load_volume
from cadiff_cli.io.intensities import finite
from cadiff_cli.io.label_maps import load_classes
from cadiff_cli.io.provenance import UsedTemplate
from cadiff_cli.io.templates import load_template, spec_of
from cadiff_cli.io.volumes import Row, read_rows
from cadiff_cli.products import CoordinateField, MaskQuality, Registered, Transform, sound
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import bounding_box, resample, resample_labels, resample_mask

log = logging.getLogger(__name__)

MARGIN_MM = 8.0
"""Width of the margin shown around the brain."""
FIELD_COARSER = 4
"""The field is smooth: compute it at every fourth voxel and interpolate between them."""


@dataclass(frozen=True, eq=False)
class Case:
    """A scan and its labels on the working grid (RAS axes, 1 mm).

    ``t1`` is the whole scan if it was found (``whole``), else its brain.  ``near`` is the grid
    around the brain.  ``registered`` is the first registration that contributes to the field.  Its
    template's brain, carried onto the scan (``template``), and the distance field (``coordinates``)
    are on ``near``; where they are None, ``notes`` hold the reason.  ``uncertainty`` is on ``near``
    too, if the result has such a map.  ``parcels`` are codes of the finer parcellation, and
    ``finer_rows`` its volumes, if it has one.
    """

    result: Finished
    rows: tuple[Row, ...]
    t1: Volume
    whole: bool
    mask: Volume
    labels: Volume
    near: Grid
    quality: MaskQuality | None
    registered: Registered | None = None
    template: Volume | None = None
    coordinates: CoordinateField | None = None
    uncertainty: Volume | None = None
    parcels: Volume | None = None
    finer_rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The scan's entities."""
        return self.result.entities


def read_case(out: Path, result: Finished, scans: Path | None = None) -> Case:
    """Read everything that a page of ``result`` shows.

    ``scans`` is the scan itself, or a folder that holds it.  Raises ``CadiffError`` if labels,
    mask or volumes cannot be read; any other missing file becomes a note.
    """
    parcellation = result.parcellation
    labels = load_classes(result.commit.with_suffix(".nii.gz"), parcellation, parcellation.class_of)
    mask = load_volume(_beside(result, f"{MASK}.nii.gz"))
    working = labels.grid.working()
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
    shown = resample(Volume(finite(t1.data), t1.grid), working)
    inside = resample_mask(Volume(mask.data > 0, mask.grid), working)
    codes = Volume(parcellation.codes[resample_labels(labels, working).data], working)
    case = Case(
        result,
        result.rows(),
        shown,
        scan is not None,
        inside,
        codes,
        around(Volume(inside.data | (codes.data > 0), working)),
        read_mask_quality(result),
    )
    path = _beside(result, UNCERTAINTY.format(parcellation.segmentation) + ".nii.gz")
    if path.is_file():
        case = replace(case, uncertainty=resample(load_volume(path), case.near))
    if (finer := result.finer) is not None:
        fine = load_classes(finer.dseg, finer.parcellation, finer.parcellation.class_of)
        parcels = finer.parcellation.codes[resample_labels(fine, working).data]
        case = replace(case, parcels=Volume(parcels, working), finer_rows=read_rows(finer.morph))
    try:
        return replace(case, **_registration(case), notes=tuple(notes))
    except CadiffError as error:
        notes.append(machine.without_home(f"the registration is not shown: {error.message}"))
        return replace(case, notes=tuple(notes))


def find_scan(out: Path, result: Finished, scans: Path | None = None) -> Path | None:
    """Find the scan that ``result`` was made from, by its SHA-256; None if it is not there."""
    source = result.provenance.source
    inner = source.removeprefix("bids:raw:")
    raw = links(read_json(out / "dataset_description.json") or {}).get("raw", "")
    places = [scans] if scans is not None and scans.is_file() else []
    if scans is not None:
        name = Path(inner).name
        inside = scans / result.entities.split("_")[0]
        places += [scans / inner, scans / name, *sorted(inside.rglob(glob.escape(name)))]
    places.append(out / raw / inner if inner != source else out / inner)
    checksum = result.provenance.source_sha256
    for place in places:
        if place.is_file() and sha256(place) == checksum:
            return place
    return None


def around(mask: Volume, margin_mm: float = MARGIN_MM) -> Grid:
    """Crop the mask's grid to the mask, with a margin where the grid has room."""
    if not mask.data.any():
        raise DataError("the brain mask is empty", "segment the scan again")
    margin = np.ceil(margin_mm / mask.grid.spacing_mm).astype(int)
    box = bounding_box(mask.data)
    low = np.maximum([s.start for s in box] - margin, 0)
    high = np.minimum([s.stop for s in box] + margin, mask.grid.shape)
    return mask.grid.crop(tuple(low), tuple(high - low))


def _registration(case: Case) -> dict[str, Any]:
    """The fields of a ``Case`` about its registrations; empty without a registration."""
    if not case.result.provenance.is_registered:
        return {}
    from cadiff_cli.stages.field import mean_field
    from cadiff_cli.stages.register import warp

    result = case.result
    registrations = [_registered(result, used) for used in result.provenance.templates]
    coarse = mean_field(registrations, case.near.coarsen(FIELD_COARSER))
    channels = [resample(Volume(x, coarse.grid), case.near, fill=np.nan).data for x in coarse.data]
    first = sound(registrations)[0]
    return {
        "registered": first,
        "template": warp(first.template.brain, first.transform, case.near),
        "coordinates": CoordinateField(np.stack(channels), case.near),
    }


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
    return result.commit.with_name(f"{result.entities}_{suffix}")
