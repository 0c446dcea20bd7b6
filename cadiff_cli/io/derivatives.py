"""Write one scan's result as BIDS derivatives: names, sidecars, tables.

Every file appears under a temporary name and is renamed when it is complete.  The label map's
sidecar is written last: where it exists, everything else does.
"""

import platform
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import cadiff_cli
from cadiff_cli import machine
from cadiff_cli.config import Config, Recipe, fingerprint
from cadiff_cli.errors import OutputError
from cadiff_cli.io.bids import source_entities
from cadiff_cli.io.dataset import refuse_foreign, save_dataset_files
from cadiff_cli.io.nifti import check_writable, replacing, save_volume
from cadiff_cli.io.releases import sha256, strip_weights_sha256
from cadiff_cli.io.templates import joint_name
from cadiff_cli.io.text import read_json, write_json, write_tsv
from cadiff_cli.labels import load_table
from cadiff_cli.metrics.quality import Calibration, load_calibration
from cadiff_cli.products import (
    CoordinateField,
    InSpace,
    Registered,
    Result,
    Scan,
    Stripped,
    Template,
    sound,
)
from cadiff_cli.spatial.grid import Grid, Volume

T1W, MASK, FIELD = "desc-preproc_T1w", "desc-brain_mask", "desc-distance_field"
BRAIN = "desc-brain_T1w"
DSEG, PROBSEG, MORPH = "seg-cadiff_dseg", "seg-cadiff_probseg", "desc-volumetric_morph"
UNCERTAINTY = "seg-cadiff_desc-uncertainty_probseg"
OURS = (
    *(f"{name}.*" for name in (T1W, BRAIN, MASK, FIELD, DSEG, PROBSEG, UNCERTAINTY, MORPH)),
    *(f"space-*_{name}.*" for name in (T1W, MASK, DSEG)),
    "space-*_seg-cadiff_res-*_dseg.*",
    "from-*_mode-image_xfm.*",
)
"""What follows the source's entities in the names of the files that a run writes."""
CSF_MAPPING, NON_BRAIN_MAPPING = 3, 6


class Derivatives:
    """Where one scan's results go: ``out/sub-X[/ses-Y]/anat/sub-X..._<suffix>``."""

    def __init__(self, out: Path, source: Path) -> None:
        self.out = out
        self.stem = source_entities(source)
        folders = [p for p in self.stem.split("_") if p.startswith(("sub-", "ses-"))]
        self.folder = out.joinpath(*folders, "anat")

    def path(self, suffix: str) -> Path:
        """``suffix`` is what follows the source's entities, such as ``desc-brain_mask.nii.gz``."""
        return self.folder / f"{self.stem}_{suffix}"

    def uri(self, suffix: str) -> str:
        """The same file as a BIDS URI within this dataset."""
        return f"bids::{self.path(suffix).relative_to(self.out).as_posix()}"

    @property
    def commit(self) -> Path:
        """The file written last: where it exists, everything else does."""
        return self.path(f"{DSEG}.json")

    def existing(self) -> list[Path]:
        """Files that are there already under names that a run may write."""
        return sorted(p for name in OURS for p in self.folder.glob(f"{self.stem}_{name}"))

    def claim(self, *inputs: Path | None, overwrite: bool) -> None:
        """Make sure that results can be written, and that nothing is lost by it.

        The folder is nobody else's dataset (``refuse_foreign``).  Existing results are refused
        unless ``overwrite`` is set; ``inputs`` of the run are never overwritten.  Raises
        ``OutputError``.
        """
        for parent in (self.out, *self.out.parents):
            if parent.exists():
                if not parent.is_dir():
                    raise OutputError(f"{parent} is a file", "give another output folder")
                break
        refuse_foreign(self.out)
        for path in self.existing():
            if any(source is not None and path.samefile(source) for source in inputs):
                raise OutputError(
                    f"{path} is an input and would be overwritten", "choose another output folder"
                )
            if not overwrite:
                raise OutputError(
                    f"{path} is there already", "use --overwrite, or another output folder"
                )
        for folder in (self.out / "logs", self.folder):
            check_writable(folder)

    def clear(self, keep: Collection[Path] = ()) -> None:
        """Remove an earlier run's results but for ``keep``, the one that vouches first.

        What a killed run left under temporary names goes too: whoever calls holds the scan's lock.
        """
        self.commit.unlink(missing_ok=True)
        for path in self.existing():
            if path not in keep:
                path.unlink(missing_ok=True)
        for name in OURS:
            for path in self.folder.glob(f".{self.stem}_{name}"):
                path.unlink(missing_ok=True)


def page_path(out: Path, entities: str) -> Path:
    """A scan's page, where BIDS apps put it."""
    return out / f"{entities}.html"


@dataclass(frozen=True)
class Finished:
    """A complete result in an output folder: its ``entities`` (``sub-01_ses-a``) and sidecar."""

    entities: str
    commit: Path
    sidecar: dict[str, Any]

    @property
    def morph(self) -> Path:
        """The table of its volumes."""
        return self.commit.with_name(f"{self.entities}_{MORPH}.tsv")


def finished_result(place: Derivatives) -> Finished | None:
    """The complete result at ``place``, if there is one.

    Its sidecar, written last, vouches for the rest; labels and volumes that somebody has deleted
    since make it incomplete.
    """
    sidecar = read_json(place.commit)
    there = all(place.path(name).exists() for name in (f"{DSEG}.nii.gz", f"{MORPH}.tsv"))
    if not there or not sidecar or "Fingerprint" not in sidecar:
        return None
    return Finished(place.stem, place.commit, sidecar)


def finished(out: Path) -> Iterator[Finished]:
    """Every complete result below ``out``, sorted by path."""
    for path in sorted(out.glob(f"sub-*/**/anat/*_{DSEG}.json")):
        scan = path.name.replace(f"_{DSEG}.json", "_T1w.nii.gz")
        result = finished_result(Derivatives(out, Path(scan)))
        if result is not None and result.commit == path:
            yield result


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
    registrations, table = prepared.registrations, segmentation.table
    write = _Writer(Derivatives(out, path), source or path.name)
    mask, t1w, dseg = (write.uri(name) for name in (MASK, T1W, DSEG))
    to_scan = [
        write.place.uri(xfm_name(r.template.name, "T1w"))
        for r in registrations
        if r.from_template is not None  # else the network found the field
    ]
    save_dataset_files(out, table)
    write.place.commit.unlink(missing_ok=True)

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
                    "LowMm": r.template.low_mm,
                    "HighMm": r.template.high_mm,
                    "OriginMm": r.template.ac_mm,
                    "InField": r in sound(registrations),
                }
                for r in registrations
            ],
        )
    segmented_from = [write.raw, t1w, mask, *to_scan]
    if segmentation.posteriors is not None:
        write.image(PROBSEG, np.moveaxis(segmentation.posteriors, 0, -1), native, like=path)
        write.sidecar(
            PROBSEG,
            segmented_from,
            Description="Probability of each structure, background first",
            LabelMap=["BG", *(s.abbreviation for s in table.structures)],
            Manual=False,
        )
    if segmentation.uncertainty is not None:
        write.image(UNCERTAINTY, segmentation.uncertainty, native, like=path)
        write.sidecar(
            UNCERTAINTY,
            segmented_from,
            Description="Entropy of the probabilities of all structures, over its greatest value:"
            " 0 is certain, 1 knows nothing; two equally likely structures give 0.19",
            Manual=False,
        )
    for space in result.spaces:
        write.standard(space)
    write.volumes(result, [dseg, mask])
    write.image(DSEG, segmentation.labels.data, native, like=path)
    write.place.clear(keep=write.written)
    write.sidecar(
        DSEG,
        segmented_from,
        Description="Brain structures; codes in dseg.tsv",
        Manual=False,
        **provenance(result, field is not None),
        **({"RunId": run_id} if run_id else {}),
    )
    return sorted(write.written)


def save_mask(scan: Scan, stripped: Stripped, mask: Volume, out: Path) -> Path:
    """Write a brain mask and the stripped image on the scan's own grid; returns the mask's path."""
    write = _Writer(Derivatives(out, scan.path), scan.path.name)
    save_dataset_files(out, load_table())
    brain = np.where(mask.data, scan.t1.data, 0).astype(np.float32)
    write.image(BRAIN, brain, mask.grid, like=scan.path)
    write.sidecar(BRAIN, [write.raw, write.uri(MASK)], SkullStripped=True)
    write.image(MASK, mask.data, mask.grid, like=scan.path)
    write.sidecar(MASK, [write.raw], **about_mask(stripped))
    return write.place.path(f"{MASK}.nii.gz")


def about_mask(stripped: Stripped) -> dict[str, Any]:
    """What a mask's sidecar tells: how it was made, and how it looks."""
    return {
        "Description": f"Brain mask ({stripped.method})",
        "Type": "Brain",
        **({"Quality": dict(stripped.quality)} if stripped.quality else {}),
        **({"Warnings": list(stripped.warnings)} if stripped.warnings else {}),
    }


class _Writer:
    """Files of one scan and their sidecars; ``written`` collects both."""

    def __init__(self, place: Derivatives, raw: str) -> None:
        self.place, self.raw = place, raw
        self.written: set[Path] = set()

    def uri(self, name: str) -> str:
        return self.place.uri(f"{name}.nii.gz")

    def image(
        self,
        name: str,
        data: np.ndarray,
        grid: Grid,
        *,
        like: Path | None = None,
        code: str = "scanner",
    ) -> None:
        path = self.place.path(f"{name}.nii.gz")
        save_volume(path, data, grid, like, code)
        self.written.add(path)

    def sidecar(self, name: str, sources: Sequence[str], **values: Any) -> None:
        path = self.place.path(f"{name}.json")
        reference = {} if name.startswith("space-") else {"SpatialReference": self.raw}
        write_json(path, {**values, "Sources": list(sources), **reference})
        self.written.add(path)

    def transforms(self, registered: Registered, sources: Sequence[str]) -> None:
        """Both directions, as ITK composite transforms."""
        template = registered.template.name
        for start, end, path in (
            (template, "T1w", registered.from_template),
            ("T1w", template, registered.to_template),
        ):
            if path is None:
                continue
            name = xfm_name(start, end)
            with replacing(self.place.path(name)) as temporary:
                shutil.copyfile(path, temporary)
            self.written.add(self.place.path(name))
            self.sidecar(
                name.removesuffix(".h5"),
                sources,
                Description=f"ITK composite transform; resamples {start} images onto {end}",
                From=start,
                To=end,
                Registration=registered.kind,
                Score=registered.score,
                **({"Warnings": list(registered.warnings)} if registered.warnings else {}),
            )

    def standard(self, space: InSpace) -> None:
        """Brain, mask and labels on a template's grid."""
        template, described = space.registered.template.name, dict[str, Any]()
        if space.resolution:
            spacing = space.labels.grid.spacing_mm[0]
            times = f"{int(space.resolution)} times the template's"
            described["Resolution"] = f"{spacing:g} mm voxels, {times}"
        parts: tuple[tuple[str, Volume, dict[str, Any]], ...] = (
            (T1W, space.t1, {"SkullStripped": True}),
            (MASK, space.mask, {"Type": "Brain"}),
            (DSEG, space.labels, {"Manual": False}),
        )
        for name, volume, values in parts:
            standard = standard_name(name, template, space.resolution)
            self.image(standard, volume.data, volume.grid, code="mni")
            self.sidecar(
                standard,
                [self.uri(name), self.place.uri(xfm_name("T1w", template))],
                **values,
                **described,
            )

    def volumes(self, result: Result, sources: Sequence[str]) -> None:
        """The volume table and what its columns mean."""
        path = self.place.path(f"{MORPH}.tsv")
        described: dict[str, dict[str, Any]] = {
            "volume-mm3": {
                "Description": "Label count times voxel volume on the scan's own grid",
                "Units": "mm3",
            },
            "percent-brain": {"Description": "Share of the row Brain-Segmentation", "Units": "%"},
            "expected-dice": about_expected_dice(result),
        }
        if calibration(result.config, result.model.sha256):
            described["usual-dice"] = {"Description": "Dice to expect of it in a good scan"}
        if result.segmentation.volume_sd_mm3:
            described["volume-sd-mm3"] = {
                "Description": "Standard deviation of the volume, counted at 1 mm, over"
                f" {result.config.sample.samples} samples",
                "Units": "mm3",
            }
        header = ("index", "name", "abbreviation", *described)
        write_tsv(path, header, ([row.get(name) for name in header] for row in volume_rows(result)))
        self.written.add(path)
        aggregates = {name: {"Description": text} for name, text in AGGREGATES.items()}
        self.sidecar(MORPH, sources, **described, **aggregates)


def standard_name(name: str, template: str, resolution: str = "") -> str:
    """``name`` in a template's space, with entities in BIDS' order.

    >>> standard_name("seg-cadiff_dseg", "MNIColin27", "2")
    'space-MNIColin27_seg-cadiff_res-2_dseg'
    >>> standard_name("desc-brain_mask", "MNIColin27", "2")
    'space-MNIColin27_res-2_desc-brain_mask'
    """
    entity, suffix = name.split("_")
    res = [f"res-{resolution}"] if resolution else []
    middle = [entity, *res] if entity.startswith("seg-") else [*res, entity]
    return "_".join([f"space-{template}", *middle, suffix])


def xfm_name(start: str, end: str) -> str:
    """What a transform that resamples ``start`` images onto ``end`` is called."""
    return f"from-{start}_to-{end}_mode-image_xfm.h5"


AGGREGATES = {
    "Brain-Segmentation": "Sum of all structures but vessels",
    "Brain-Segmentation-Not-CSF": "The same without ventricles and CSF",
    "Brain-Mask": "Volume of the brain mask, with sulcal CSF",
}


def volume_rows(result: Result) -> Iterator[dict[str, object]]:
    """Rows of the volume table: every structure, then the aggregates; what is absent is ``n/a``."""
    made, volumes = result.segmentation, result.volumes_mm3
    table, calibrate = made.table, calibration(result.config, result.model.sha256)
    brain = sum(volumes[s.code] for s in table.structures if s.mapping != NON_BRAIN_MAPPING)
    csf = sum(volumes[s.code] for s in table.structures if s.mapping == CSF_MAPPING)
    mask = np.count_nonzero(result.mask.data) * result.mask.grid.voxel_volume_mm3

    def row(name: str, mm3: float, **values: object) -> dict[str, object]:
        share = f"{100 * mm3 / brain:.3f}" if brain else None
        return {"name": name, "volume-mm3": f"{mm3:.3f}", "percent-brain": share, **values}

    for s in table.structures:
        measured = {"usual-dice": calibrate.usual.get(s.name) if calibrate else None}
        if (raw := made.expected_dice.get(s.code)) is not None:
            measured["expected-dice"] = calibrate(s.name, raw) if calibrate else raw
        measured["volume-sd-mm3"] = made.volume_sd_mm3.get(s.code)
        shown = {key: f"{x:.3f}" for key, x in measured.items() if x is not None}
        yield row(s.name, volumes[s.code], index=s.code, abbreviation=s.abbreviation, **shown)
    for name, mm3 in zip(AGGREGATES, (brain, brain - csf, mask), strict=True):
        yield row(name, mm3)


def calibration(config: Config, weights_sha256: str) -> Calibration | None:
    """What turns expected into true Dice for these weights, if it was measured.

    It was with a network that is given the field: the prior alone (``--steps 0``) and a field that
    the network has to find (``--registration none``) have probabilities of another kind.
    """
    alike = config.sample.steps and config.register.name != "none"
    return load_calibration(weights_sha256) if alike else None


def about_expected_dice(result: Result) -> dict[str, Any]:
    """What the column ``expected-dice`` holds."""
    found = calibration(result.config, result.model.sha256)
    return {
        "Description": "Dice to expect, from the probabilities of the network"
        + (", calibrated to true Dice" if found else "; not calibrated for these weights"),
        "Calibrated": found is not None,
        **({"MeasuredOn": found.people} if found else {}),
    }


def make_recipe(
    config: Config,
    templates: Sequence[Template],
    model: str,
    weights_sha256: str,
    spaces: Sequence[str] = (),
    field: bool = False,
) -> Recipe:
    """The recipe of results that this installation makes, or has just made, with these settings."""
    calibrate = calibration(config, weights_sha256)
    return Recipe(
        config,
        joint_name(templates),
        model,
        weights_sha256,
        strip_weights_sha256(config.strip),
        fingerprint(calibrate.as_dict()) if calibrate else "",
        tuple(spaces),
        field,
    )


def provenance(result: Result, field: bool = False) -> dict[str, Any]:
    """What made this segmentation: enough to make it again, and to know that it need not be."""
    registrations = result.prepared.registrations
    recipe = make_recipe(
        result.config,
        [r.template for r in registrations],
        result.model.name,
        result.model.sha256,
        [space.name for space in result.spaces],
        field,
    )
    home = str(machine.home())  # where somebody lives is nobody's business
    return {
        "GeneratedBy": [{"Name": "cadiff", "Version": cadiff_cli.__version__}],
        "Packages": software(),
        "Model": {"Name": result.model.name, "WeightsSHA256": result.model.sha256},
        "Steps": result.segmentation.steps,
        "Seed": result.segmentation.seed,
        "Tile": result.segmentation.tile,
        "Device": result.segmentation.device,
        "Templates": [
            {
                "Name": r.template.name,
                "Source": r.template.source,
                "Registration": r.kind,
                "Score": r.score,
                "InField": r.from_template is not None and r in sound(registrations),
            }
            for r in registrations
        ],
        "SkullStripping": result.prepared.stripped.method,
        "Settings": recipe.settings(),
        "Fingerprint": recipe.fingerprint(),
        "SourceSHA256": result.prepared.scan.sha256 or sha256(result.prepared.scan.path),
        "Seconds": dict(result.seconds),
        "ExpectedDice": about_expected_dice(result),
        "Warnings": [text.replace(home, "~") for text in result.warnings],
    }


def software() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "antspyx", "nibabel", "numpy", "scipy", "monai"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
