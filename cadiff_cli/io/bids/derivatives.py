"""Write one scan's result as BIDS derivatives: images, transforms, tables, and their sidecars.

Every file appears under a temporary name and is renamed when it is complete.
"""

import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cadiff_cli.config import StripConfig
from cadiff_cli.io.bids.description import save_dataset_files
from cadiff_cli.io.bids.layout import Derivatives, Finished
from cadiff_cli.io.bids.names import (
    BRAIN,
    CONFIDENCE,
    DSEG,
    FIELD,
    FINER_MORPH,
    FREESURFER,
    HEAD,
    MASK,
    MORPH,
    OURS,
    PROBSEG,
    SKULL_MASK,
    TISSUE,
    TISSUES,
    TOTALS_MORPH,
    UNCERTAINTY,
    WORKING,
    standard_name,
    xfm_name,
)
from cadiff_cli.io.bids.tables import save_table, table_name
from cadiff_cli.io.files import read_json, replacing, sha256, write_json, write_tsv
from cadiff_cli.io.images import save_volume
from cadiff_cli.io.provenance import Provenance, mask_provenance, told
from cadiff_cli.io.templates import frame_as_dict
from cadiff_cli.io.volumes import (
    INTRACRANIAL,
    PERCENTILE,
    TOTALS,
    about_expected_dice,
    total_rows,
    volume_rows,
)
from cadiff_cli.labels.parcellation import BASE, load_parcellation
from cadiff_cli.notes import Note
from cadiff_cli.products import (
    CoordinateField,
    InSpace,
    MaskQuality,
    Registered,
    Result,
    Scan,
    Segmentation,
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
    aside: Executor | None = None,
) -> list[Path]:
    """Write everything a run produced; returns the paths.

    ``source`` is the BIDS URI of the scan (default: ``place_from``).  What an earlier run left
    under other names is removed.  Threads ``aside`` compress images while the rest is written.
    """
    prepared, segmentation = result.prepared, result.segmentation
    path, registrations = prepared.scan.path, prepared.registrations
    parcellation = segmentation.parcellation
    write = _Writer(Derivatives(out, path), source or place_from(out, path), aside)
    dseg = DSEG.format(parcellation.segmentation)
    mask, t1w = write.uri(MASK), write.uri(WORKING)
    to_scan = [write.place.uri(xfm_name(r.template.label, "T1w")) for r in registrations]
    segmented_from = [write.raw, t1w, mask, *to_scan]
    save_dataset_files(out)
    save_table(out, parcellation)
    for sidecar in write.place.sidecars:
        sidecar.unlink(missing_ok=True)

    write.heads(result)
    write.mask(result)
    for each in {
        r.template.name: r for r in (*registrations, *(s.registered for s in result.spaces))
    }.values():
        write.transforms(each, [t1w])
    if field is not None:
        write.field(field, registrations, to_scan, like=path)
    made = Provenance.of(result, write.raw, run_id=run_id or "")
    write.probabilities(segmentation, segmented_from, like=path)
    write.tissues(result, like=path)
    if result.config.output.codes == "freesurfer":
        write.freesurfer(segmentation, [write.uri(dseg)], like=path)
    maps = [dseg]
    if result.finer is not None:
        finer = result.finer.segmentation.parcellation
        save_table(out, finer)
        maps.append(DSEG.format(finer.segmentation))
        write.finer(result.finer, [write.uri(dseg), *to_scan])
    for space in result.spaces:
        write.standard(space, maps)
    write.volumes(result, [write.uri(dseg), mask])
    write.image(dseg, segmentation.labels.data, segmentation.labels.grid, like=path)
    write.wait()
    write.place.clear(keep=write.written)
    write.sidecar(
        dseg,
        segmented_from,
        Description=f"Brain structures; codes in {table_name(parcellation)}",
        Manual=False,
        **made.sidecar(),
    )
    return sorted(write.written)


def place_from(out: Path, scan: Path) -> str:
    """The path of a scan from ``out``, if it lies in the folder of ``out``; else its name.

    Longer paths tell more of somebody's machine than a result should: all of it lies in ``/``.
    """
    # A link's own place: git-annex keeps the file itself elsewhere.
    here, there = scan.absolute().parent.resolve() / scan.name, out.resolve()
    beside = there.parent
    if here.is_relative_to(there) or (
        here.is_relative_to(beside) and beside != Path(beside.anchor)
    ):
        return Path(os.path.relpath(here, there)).as_posix()
    return scan.name


def save_mask(
    scan: Scan,
    stripped: Stripped,
    mask: Volume,
    out: Path,
    config: StripConfig,
    intracranial: Volume | None = None,
) -> Path:
    """Write a brain mask and the stripped image on the scan's own grid; returns the mask's path.

    ``config`` are the settings that it was made with.  ``intracranial`` is the mask of what the
    inner skull holds, if it is known.
    """
    write = _Writer(Derivatives(out, scan.path), scan.path.name)
    notes = (*scan.notes, *stripped.notes)
    save_dataset_files(out)
    save_table(out, load_parcellation(BASE))  # as in every dataset of ours
    brain = np.where(mask.data, scan.t1.data, 0).astype(np.float32)
    write.image(BRAIN, brain, mask.grid, like=scan.path)
    write.sidecar(BRAIN, [write.raw, write.uri(MASK)], SkullStripped=True)
    write.image(MASK, mask.data, mask.grid, like=scan.path)
    about, made_by = about_mask(stripped, notes), mask_provenance(scan, stripped, config)
    write.sidecar(MASK, [write.raw], **about, **made_by)
    write.skull(intracranial, like=scan.path)
    write.place.clear(keep=write.written)
    return write.place.path(f"{MASK}.nii.gz")


def about_mask(stripped: Stripped, notes: Sequence[Note]) -> dict[str, Any]:
    """What a mask's sidecar tells: how it was made, how it looks, and its ``notes``."""
    return {
        "Description": f"Brain mask ({stripped.method})",
        "Type": "Brain",
        **({"Quality": stripped.quality.as_dict()} if stripped.quality else {}),
        **(told(notes) if notes else {}),
    }


def read_mask_quality(result: Finished) -> MaskQuality | None:
    """What the sidecar of a result's mask says of it; None for a mask that nobody judged."""
    path = result.sidecar.with_name(f"{result.entities}_{MASK}.json")
    quality = (read_json(path) or {}).get("Quality")
    return MaskQuality(**{key: float(value) for key, value in quality.items()}) if quality else None


class _Writer:
    """Files of one scan and their sidecars; ``written`` collects the paths of both."""

    def __init__(self, place: Derivatives, raw: str, aside: Executor | None = None) -> None:
        self.place, self.raw = place, raw
        self.written: set[Path] = set()
        self._aside, self._pending = aside, list[Future[None]]()

    def uri(self, name: str) -> str:
        return self.place.uri(f"{name}.nii.gz")

    def path(self, name: str) -> Path:
        """Where to write a file that follows the scan's entities in its ``name``.

        Raises ``ValueError`` for one that ``--overwrite`` would not find again.
        """
        if not OURS.fullmatch(name):
            raise ValueError(f"{name} is not in io/bids/names.OURS: add it to _NAMES")
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
        path = self.path(f"{name}.nii.gz")
        save = partial(save_volume, path, data, grid, like, code, labels=name.endswith("dseg"))
        if self._aside is None:
            save()
        else:
            self._pending.append(self._aside.submit(save))

    def wait(self) -> None:
        """Return when every image is on disk; raise what went wrong with one."""
        for image in self._pending:
            image.result()

    def sidecar(self, name: str, sources: Sequence[str], /, **values: Any) -> None:
        reference = {} if name.startswith("space-") else {"SpatialReference": self.raw}
        path = self.path(f"{name}.json")
        write_json(path, {**values, "Sources": list(sources), **reference})

    def heads(self, result: Result) -> None:
        """The brain as the network saw it, and the whole scan with even brightness."""
        prepared = result.prepared
        stripped, sources = prepared.stripped, [self.raw, self.uri(MASK)]
        self.image(WORKING, stripped.t1.data, stripped.t1.grid)
        self.sidecar(
            WORKING,
            sources,
            Description="The brain as the network saw it",
            Resolution="1 mm voxels, axes nearest to RAS",
            SkullStripped=True,
        )
        if result.head is not None:
            self.image(HEAD, result.head.data, result.head.grid, like=prepared.scan.path)
            self.sidecar(
                HEAD,
                sources,
                Description="The scan with even brightness: the field that N4 found in the brain",
                SkullStripped=stripped.bare,
            )

    def mask(self, result: Result) -> None:
        """The brain mask, and that of what the inner skull holds."""
        path, given = result.prepared.scan.path, result.config.strip.mask
        self.image(MASK, result.mask.data, result.mask.grid, like=path)
        known = {"MaskFile": {"Name": given.name, "SHA256": sha256(given)}} if given else {}
        stripped = result.prepared.stripped
        self.sidecar(MASK, [self.raw], **about_mask(stripped, stripped.notes), **known)
        self.skull(result.intracranial, like=path)

    def field(
        self,
        field: CoordinateField,
        registrations: Sequence[Registered],
        sources: Sequence[str],
        like: Path,
    ) -> None:
        """The distance field that the ``registrations`` give."""
        self.image(FIELD, np.moveaxis(field.data, 0, -1), field.grid, like=like)
        self.sidecar(
            FIELD,
            sources,
            Description="Distance field: x, y, z relative to the AC, extents scaled to 0..1",
            Templates=[
                {
                    "Name": r.template.name,
                    **frame_as_dict((r.template.from_base or r.template).frame),
                    "InField": r in sound(registrations),
                }
                for r in registrations
            ],
        )

    def probabilities(self, segmentation: Segmentation, sources: Sequence[str], like: Path) -> None:
        """Those of all structures, and their entropy, where they were asked for."""
        parcellation, grid = segmentation.parcellation, segmentation.labels.grid
        probseg, uncertainty = (
            name.format(parcellation.segmentation) for name in (PROBSEG, UNCERTAINTY)
        )
        if segmentation.posteriors is not None:
            self.image(probseg, np.moveaxis(segmentation.posteriors, 0, -1), grid, like=like)
            self.sidecar(
                probseg,
                sources,
                Description="Probability of each structure, background first",
                LabelMap=["BG", *(s.abbreviation for s in parcellation.structures)],
                Manual=False,
            )
        if segmentation.uncertainty is not None:
            self.image(uncertainty, segmentation.uncertainty, grid, like=like)
            self.sidecar(
                uncertainty,
                sources,
                Description="Entropy of the probabilities of all structures, over its greatest"
                " value: 0 is certain, 1 knows nothing; two equally likely structures give"
                f" {math.log(2) / math.log(parcellation.n_classes):.2f}",
                Manual=False,
            )

    def freesurfer(self, segmentation: Segmentation, sources: Sequence[str], like: Path) -> None:
        """A second label map, with FreeSurfer's codes alone."""
        parcellation, labels = segmentation.parcellation, segmentation.labels
        name = FREESURFER.format(parcellation.segmentation)
        self.image(name, parcellation.freesurfer(labels.data), labels.grid, like=like)
        self.sidecar(
            name,
            sources,
            Description="The labels with codes of FreeSurferColorLUT.txt: vermis 172, basal"
            " forebrain 865 and 866",
            Manual=False,
        )

    def skull(self, intracranial: Volume | None, like: Path) -> None:
        """The mask of what the inner skull holds, if it is known."""
        if intracranial is None:
            return
        self.image(SKULL_MASK, intracranial.data, intracranial.grid, like=like)
        self.sidecar(
            SKULL_MASK,
            [self.raw],
            Description="What the inner skull holds: brain, fluid, vessels and dura, down to the"
            " lower end of the brain stem",
            Type="ROI",
        )

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

    def standard(self, space: InSpace, maps: Sequence[str]) -> None:
        """Brain, mask and label maps (so called) on a template's grid."""
        template, described = space.registered.template, dict[str, Any]()
        if space.resolution:
            spacing = space.labels.grid.spacing_mm[0]
            times = f"{int(space.resolution)} times the template's"
            described["Resolution"] = f"{spacing:g} mm voxels, {times}"
        named = zip(maps, filter(None, (space.labels, space.parcels)), strict=True)
        parts: tuple[tuple[str, str, Volume, dict[str, Any]], ...] = (
            (BRAIN, WORKING, space.t1, {"SkullStripped": True}),
            (MASK, MASK, space.mask, {"Type": "Brain"}),
            *((name, name, labels, {"Manual": False}) for name, labels in named),
        )
        for name, source, volume, values in parts:
            standard = standard_name(name, template.name, space.resolution)
            self.image(standard, volume.data, volume.grid, code="mni")
            self.sidecar(
                standard,
                [self.uri(source), self.place.uri(xfm_name("T1w", template.label))],
                **values,
                **described,
            )

    def tissues(self, result: Result, like: Path) -> None:
        """Tissue classes of the labels and their probabilities, under names that sMRIPrep reads."""
        labels, parcellation = result.segmentation.labels, result.segmentation.parcellation
        sources = [self.uri(DSEG.format(parcellation.segmentation))]
        self.image(TISSUES, parcellation.tissue_map(labels.data), labels.grid, like=like)
        self.sidecar(
            TISSUES,
            sources,
            Description="Tissue classes of the labels; fluid in sulci has none",
            LabelMap={"1": "GM", "2": "WM", "3": "CSF"},
            Manual=False,
        )
        for tissue, p in result.segmentation.tissues.items():
            name = TISSUE.format(tissue.name)
            self.image(name, p, labels.grid, like=like)
            self.sidecar(
                name,
                sources,
                Description=f"Probability of all structures of {tissue.in_words}",
                Manual=False,
            )

    def finer(self, result: Result, sources: Sequence[str]) -> None:
        """A result in a finer parcellation, beside the one that it agrees with.

        Its sidecars vouch for nothing: that of the coarser label map does.
        """
        segmentation = result.segmentation
        path, parcellation = result.prepared.scan.path, segmentation.parcellation
        dseg, confidence, morph = (
            name.format(parcellation.segmentation) for name in (DSEG, CONFIDENCE, FINER_MORPH)
        )
        grid = segmentation.labels.grid
        model = {"Name": result.model.name, "WeightsSHA256": result.model.sha256}
        if segmentation.confidence is not None:
            self.image(confidence, segmentation.confidence, grid, like=path)
            self.sidecar(
                confidence,
                sources,
                Description="Probability of the parcel that was drawn, given that it is cortex",
                Manual=False,
            )
        self.volumes(result, [self.uri(dseg)], morph, totals=False)
        self.image(dseg, segmentation.labels.data, grid, like=path)
        self.sidecar(
            dseg,
            sources,
            Description="Brain structures, the cortex divided into parcels; codes in"
            f" {table_name(parcellation)}",
            Manual=False,
            Model=model,
        )

    def volumes(
        self, result: Result, sources: Sequence[str], name: str = MORPH, *, totals: bool = True
    ) -> None:
        """The tables of structures, called ``name``, and of totals."""
        parcellation = result.segmentation.parcellation
        names = {s.name: f"Label {s.code} ({s.abbreviation})" for s in parcellation.structures}
        volume: dict[str, Any] = {
            "Description": "Label count times voxel volume on the scan's own grid",
            "Units": "mm3",
        }
        share = {"Description": "Share of the total Brain-Segmentation", "Units": "%"}
        why = result.prepared.stripped.no_intracranial
        of_skull = {
            "Description": f"Share of the {INTRACRANIAL}" + (f". n/a: {why}" if why else ""),
            "Units": "%",
        }
        described: dict[str, dict[str, Any]] = {
            "index": {"Description": f"Code of the label, of {table_name(parcellation)}"},
            "name": {"Description": "Structure", "Levels": names},
            "abbreviation": {"Description": "Short name of the structure"},
            "volume_mm3": volume,
            "percent_brain": share,
            "percent_intracranial": of_skull,
            "expected_dice": about_expected_dice(result),
        }
        about_people = {"MeasuredOn": result.percentiles_of} if result.percentiles_of else {}
        percentiles = {
            name: {"Description": text, "Units": "%", **about_people}
            for name, text in PERCENTILE.items()
        }
        described |= percentiles
        if result.calibration:
            described["usual_dice"] = {"Description": "Dice to expect of it in a good scan"}
        if result.segmentation.volume_sd_mm3:
            described["volume_sd_mm3"] = {
                "Description": "Standard deviation of the volume, counted at 1 mm, over"
                f" {result.config.sample.samples} samples",
                "Units": "mm3",
            }
        self.table(name, volume_rows(result), described, sources)
        if not totals:
            return
        about_sums = TOTALS | ({INTRACRANIAL: f"{TOTALS[INTRACRANIAL]}. n/a: {why}"} if why else {})
        about_totals = {
            "name": {"Description": "What is summed", "Levels": about_sums},
            "volume_mm3": volume,
            "percent_brain": share,
            "percent_intracranial": of_skull,
            **percentiles,
        }
        self.table(TOTALS_MORPH, total_rows(result), about_totals, sources)

    def table(
        self,
        name: str,
        rows: Iterable[Mapping[str, object]],
        described: Mapping[str, object],
        sources: Sequence[str],
    ) -> None:
        """A table and what its columns mean."""
        cells = ([row.get(column) for column in described] for row in rows)
        write_tsv(self.path(f"{name}.tsv"), described, cells)
        self.sidecar(name, sources, **described)
