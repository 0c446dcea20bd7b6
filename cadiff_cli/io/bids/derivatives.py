"""Write one scan's result as BIDS derivatives: images, transforms, tables, and their sidecars.

Every file appears under a temporary name and is renamed when it is complete.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from cadiff_cli import machine
from cadiff_cli.io.bids.description import save_dataset_files
from cadiff_cli.io.bids.layout import Derivatives, Finished
from cadiff_cli.io.bids.names import (
    BRAIN,
    DSEG,
    FIELD,
    MASK,
    MORPH,
    OURS,
    PROBSEG,
    T1W,
    UNCERTAINTY,
    standard_name,
    xfm_name,
)
from cadiff_cli.io.bids.tables import save_table, table_name
from cadiff_cli.io.files import read_json, replacing, sha256, write_json, write_tsv
from cadiff_cli.io.images import save_volume
from cadiff_cli.io.provenance import Provenance, mask_provenance, told
from cadiff_cli.io.volumes import AGGREGATES, PERCENTILE, about_expected_dice, volume_rows
from cadiff_cli.labels.parcellation import BASE, load_parcellation
from cadiff_cli.products import (
    CoordinateField,
    InSpace,
    MaskQuality,
    Registered,
    Result,
    Scan,
    Stripped,
    sound,
)
from cadiff_cli.spatial.grid import Grid, Volume


def save_result(
    result: Result,
    out: Path,
    field: CoordinateField | None = None,
    *,
    source: str | None = None,
    run_id: str | None = None,
) -> list[Path]:
    """Write everything a run produced; returns the paths.

    ``source`` is the BIDS URI of the scan (default: its file name).  What an earlier run left under
    other names is removed.
    """
    prepared, segmentation = result.prepared, result.segmentation
    path, native = prepared.scan.path, prepared.scan.t1.grid
    registrations, parcellation = prepared.registrations, segmentation.parcellation
    write = _Writer(Derivatives(out, path), source or path.name)
    dseg, probseg, uncertainty = (
        name.format(parcellation.segmentation) for name in (DSEG, PROBSEG, UNCERTAINTY)
    )
    mask, t1w = write.uri(MASK), write.uri(T1W)
    to_scan = [write.place.uri(xfm_name(r.template.label, "T1w")) for r in registrations]
    save_dataset_files(out)
    save_table(out, parcellation)
    for commit in write.place.commits:
        commit.unlink(missing_ok=True)

    write.image(T1W, prepared.stripped.t1.data, prepared.stripped.t1.grid)
    write.sidecar(
        T1W,
        [write.raw, mask],
        Description="Skull-stripped T1w on the working grid: RAS axes, 1 mm",
        SkullStripped=True,
    )
    write.image(MASK, result.mask.data, native, like=path)
    given = result.config.strip.mask
    known = {"MaskFile": {"Name": given.name, "SHA256": sha256(given)}} if given else {}
    write.sidecar(MASK, [write.raw], **about_mask(prepared.stripped), **known)
    for each in {
        r.template.name: r for r in (*registrations, *(s.registered for s in result.spaces))
    }.values():
        write.transforms(each, [t1w])
    if field is not None:
        write.image(FIELD, np.moveaxis(field.data, 0, -1), field.grid, like=path)
        write.sidecar(
            FIELD,
            to_scan,
            Description="Distance field: x, y, z relative to the AC, extents scaled to 0..1",
            Templates=[
                {
                    "Name": r.template.name,
                    "LowMm": r.template.frame.low_mm,
                    "HighMm": r.template.frame.high_mm,
                    "OriginMm": r.template.frame.ac_mm,
                    "InField": r in sound(registrations),
                }
                for r in registrations
            ],
        )
    made = Provenance.of(result, write.raw, run_id=run_id or "")
    segmented_from = [write.raw, t1w, mask, *to_scan]
    if segmentation.posteriors is not None:
        write.image(probseg, np.moveaxis(segmentation.posteriors, 0, -1), native, like=path)
        write.sidecar(
            probseg,
            segmented_from,
            Description="Probability of each structure, background first",
            LabelMap=["BG", *(s.abbreviation for s in parcellation.structures)],
            Manual=False,
        )
    if segmentation.uncertainty is not None:
        write.image(uncertainty, segmentation.uncertainty, native, like=path)
        write.sidecar(
            uncertainty,
            segmented_from,
            Description="Entropy of the probabilities of all structures, over its greatest value:"
            " 0 is certain, 1 knows nothing; two equally likely structures give 0.19",
            Manual=False,
        )
    for space in result.spaces:
        write.standard(space, dseg)
    write.volumes(result, [write.uri(dseg), mask])
    write.image(dseg, segmentation.labels.data, native, like=path)
    write.place.clear(keep=write.written)
    write.sidecar(
        dseg,
        segmented_from,
        Description=f"Brain structures; codes in {table_name(parcellation)}",
        Manual=False,
        **made.sidecar(),
    )
    return sorted(write.written)


def save_mask(scan: Scan, stripped: Stripped, mask: Volume, out: Path) -> Path:
    """Write a brain mask and the stripped image on the scan's own grid; returns the mask's path."""
    write = _Writer(Derivatives(out, scan.path), scan.path.name)
    notes = [
        replace(note, text=machine.without_home(note.text))
        for note in (*scan.notes, *stripped.notes)
    ]
    save_dataset_files(out)
    save_table(out, load_parcellation(BASE))  # as in every dataset of ours
    brain = np.where(mask.data, scan.t1.data, 0).astype(np.float32)
    write.image(BRAIN, brain, mask.grid, like=scan.path)
    write.sidecar(BRAIN, [write.raw, write.uri(MASK)], SkullStripped=True)
    write.image(MASK, mask.data, mask.grid, like=scan.path)
    about = about_mask(stripped) | (told(notes) if notes else {})
    write.sidecar(MASK, [write.raw], **about, **mask_provenance(scan, stripped))
    return write.place.path(f"{MASK}.nii.gz")


def about_mask(stripped: Stripped) -> dict[str, Any]:
    """What a mask's sidecar tells: how it was made, and how it looks."""
    return {
        "Description": f"Brain mask ({stripped.method})",
        "Type": "Brain",
        **({"Quality": stripped.quality.as_dict()} if stripped.quality else {}),
        **(told(stripped.notes) if stripped.notes else {}),
    }


def read_mask_quality(result: Finished) -> MaskQuality | None:
    """What the sidecar of a result's mask says of it; None for a mask that nobody judged."""
    path = result.commit.with_name(f"{result.entities}_{MASK}.json")
    quality = (read_json(path) or {}).get("Quality")
    return MaskQuality(**{key: float(value) for key, value in quality.items()}) if quality else None


class _Writer:
    """Files of one scan and their sidecars; ``written`` collects the paths of both."""

    def __init__(self, place: Derivatives, raw: str) -> None:
        self.place, self.raw = place, raw
        self.written: set[Path] = set()

    def uri(self, name: str) -> str:
        return self.place.uri(f"{name}.nii.gz")

    def path(self, name: str) -> Path:
        """Where to write a file that follows the scan's entities in its ``name``.

        Raises ``ValueError`` for one that ``--overwrite`` would not find again.
        """
        if not any(fnmatchcase(name, pattern) for pattern in OURS):
            raise ValueError(f"{name} matches no pattern of io/bids/names.OURS: add one")
        path = self.place.path(name)
        self.written.add(path)
        return path

    def image(
        self,
        name: str,
        data: np.ndarray,
        grid: Grid,
        *,
        like: Path | None = None,
        code: str = "scanner",
    ) -> None:
        save_volume(self.path(f"{name}.nii.gz"), data, grid, like, code)

    def sidecar(self, name: str, sources: Sequence[str], **values: Any) -> None:
        reference = {} if name.startswith("space-") else {"SpatialReference": self.raw}
        path = self.path(f"{name}.json")
        write_json(path, {**values, "Sources": list(sources), **reference})

    def transforms(self, registered: Registered, sources: Sequence[str]) -> None:
        """Both directions, as ITK composite transforms."""
        template, transform = registered.template.label, registered.transform
        for start, end, path in (
            (template, "T1w", transform.to_fixed),
            ("T1w", template, transform.to_moving),
        ):
            name = xfm_name(start, end)
            with replacing(self.path(name)) as temporary:
                shutil.copyfile(path, temporary)
            self.sidecar(
                name.removesuffix(".h5"),
                sources,
                Description=f"ITK composite transform; resamples {start} images onto {end}",
                From=start,
                To=end,
                Registration=transform.kind,
                Score=transform.score,
                **(told(transform.notes) if transform.notes else {}),
            )

    def standard(self, space: InSpace, dseg: str) -> None:
        """Brain, mask and labels (called ``dseg``) on a template's grid."""
        template, described = space.registered.template, dict[str, Any]()
        if space.resolution:
            spacing = space.labels.grid.spacing_mm[0]
            times = f"{int(space.resolution)} times the template's"
            described["Resolution"] = f"{spacing:g} mm voxels, {times}"
        parts: tuple[tuple[str, Volume, dict[str, Any]], ...] = (
            (T1W, space.t1, {"SkullStripped": True}),
            (MASK, space.mask, {"Type": "Brain"}),
            (dseg, space.labels, {"Manual": False}),
        )
        for name, volume, values in parts:
            standard = standard_name(name, template.name, space.resolution)
            self.image(standard, volume.data, volume.grid, code="mni")
            self.sidecar(
                standard,
                [self.uri(name), self.place.uri(xfm_name("T1w", template.label))],
                **values,
                **described,
            )

    def volumes(self, result: Result, sources: Sequence[str]) -> None:
        """The volume table and what its columns mean."""
        described: dict[str, dict[str, Any]] = {
            "volume-mm3": {
                "Description": "Label count times voxel volume on the scan's own grid",
                "Units": "mm3",
            },
            "percent-brain": {"Description": "Share of the row Brain-Segmentation", "Units": "%"},
            "expected-dice": about_expected_dice(result),
        }
        about_people = {"MeasuredOn": result.percentiles_of} if result.percentiles_of else {}
        described |= {
            name: {"Description": text, "Units": "%", **about_people}
            for name, text in PERCENTILE.items()
        }
        if result.calibration:
            described["usual-dice"] = {"Description": "Dice to expect of it in a good scan"}
        if result.segmentation.volume_sd_mm3:
            described["volume-sd-mm3"] = {
                "Description": "Standard deviation of the volume, counted at 1 mm, over"
                f" {result.config.sample.samples} samples",
                "Units": "mm3",
            }
        header = ("index", "name", "abbreviation", *described)
        rows = ([row.get(name) for name in header] for row in volume_rows(result))
        write_tsv(self.path(f"{MORPH}.tsv"), header, rows)
        aggregates = {name: {"Description": text} for name, text in AGGREGATES.items()}
        self.sidecar(MORPH, sources, **described, **aggregates)
