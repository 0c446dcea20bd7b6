"""Write a result as BIDS derivatives: names, sidecars, tables.

Every file appears under a temporary name and is renamed when it is complete.  The label map's
sidecar is written last: where it exists, everything else does.
"""

import csv
import io
import json
import logging
import platform
import shutil
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import cadiff_cli
from cadiff_cli.config import as_dict, fingerprint
from cadiff_cli.errors import OutputError
from cadiff_cli.io.bids import source_entities
from cadiff_cli.io.nifti import replacing, save_volume
from cadiff_cli.labels import LabelTable
from cadiff_cli.products import CoordinateField, Result
from cadiff_cli.spatial.grid import Volume

log = logging.getLogger(__name__)

BIDS_VERSION = "1.10.0"
BIDSIGNORE = "*.html\nfigures\nlog\n*_xfm.*\n*_morph.*\n*_field.*\ngroup_*\n"
CODE_URL = "https://pypi.org/project/cadiff/"
OURS = (
    "seg-cadiff_dseg.*",
    "seg-cadiff_probseg.*",
    "desc-preproc_T1w.*",
    "desc-brain_mask.*",
    "desc-volumetric_morph.*",
    "desc-distance_field.*",
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

    @property
    def commit(self) -> Path:
        """The file written last: where it exists, everything else does."""
        return self.path("seg-cadiff_dseg.json")

    def existing(self) -> list[Path]:
        """Files that are there already under names that a run may write."""
        return sorted(p for name in OURS for p in self.folder.glob(f"{self.stem}_{name}"))

    def claim(self, *inputs: Path | None, overwrite: bool) -> None:
        """Make sure that results can be written, and that nothing is lost by it.

        Existing results are refused unless ``overwrite`` is set; ``inputs`` of the run are never
        overwritten.  Raises ``OutputError``.
        """
        for parent in (self.out, *self.out.parents):
            if parent.exists():
                if not parent.is_dir():
                    raise OutputError(f"{parent} is a file", "give a folder with -o")
                break
        for path in self.existing():
            if any(source is not None and path.samefile(source) for source in inputs):
                raise OutputError(
                    f"{path} is an input and would be overwritten", "choose another folder with -o"
                )
            if not overwrite:
                raise OutputError(
                    f"{path} is there already", "use --overwrite, or another folder with -o"
                )
        for folder in (self.out / "logs", self.folder):
            with replacing(folder / ".writable"):
                pass
            (folder / ".writable").unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove an earlier run's results, the one that vouches for the others first."""
        self.commit.unlink(missing_ok=True)
        for path in self.existing():
            path.unlink(missing_ok=True)


def save_result(result: Result, out: Path, field: CoordinateField | None = None) -> list[Path]:
    """Write everything a run produced; returns the paths."""
    prepared, segmentation = result.prepared, result.segmentation
    scan, table = prepared.scan, segmentation.table
    template = prepared.registered.template.name
    place = Derivatives(out, scan.path)
    native = scan.t1.grid
    written: list[Path] = []

    def volume(suffix: str, volume: Volume, like: Path | None, **sidecar: Any) -> None:
        path = place.path(suffix)
        save_volume(path, volume.data, volume.grid, like=like)
        _json(path.with_name(path.name.replace(".nii.gz", ".json")), sidecar)
        written.append(path)

    about = {"Sources": [scan.path.name], "SpatialReference": scan.path.name}
    place.clear()
    save_dataset_files(out, table)
    volume(
        "desc-preproc_T1w.nii.gz",
        prepared.stripped.t1,
        None,
        Description="Skull-stripped T1w on the working grid: RAS axes, 1 mm",
        SkullStripped=True,
        **about,
    )
    volume(
        "desc-brain_mask.nii.gz",
        result.mask,
        scan.path,
        Description=f"Brain mask ({prepared.stripped.method})",
        Type="Brain",
        **about,
    )
    for source, target, path in (
        (template, "T1w", prepared.registered.from_template),
        ("T1w", template, prepared.registered.to_template),
    ):
        if path is None:
            continue
        name = place.path(f"from-{source}_to-{target}_mode-image_xfm.h5")
        with replacing(name) as temporary:
            shutil.copyfile(path, temporary)
        _json(
            name.with_suffix(".json"),
            {
                "Description": f"ITK composite transform; resamples {source} images onto {target}",
                "Sources": [scan.path.name],
                "Registration": prepared.registered.kind,
                "Score": prepared.registered.score,
            },
        )
        written.append(name)
    if field is not None:
        name = place.path("desc-distance_field.nii.gz")
        save_volume(name, np.moveaxis(field.data, 0, -1), field.grid, like=scan.path)
        _json(
            name.with_name(name.name.replace(".nii.gz", ".json")),
            {
                "Description": "Distance field: x, y, z relative to the AC, extents scaled to 0..1",
                "Template": template,
                "LowMm": prepared.registered.template.low_mm,
                "HighMm": prepared.registered.template.high_mm,
                "OriginMm": prepared.registered.template.ac_mm,
                **about,
            },
        )
        written.append(name)
    if segmentation.posteriors is not None:
        volume4d = place.path("seg-cadiff_probseg.nii.gz")
        save_volume(volume4d, np.moveaxis(segmentation.posteriors, 0, -1), native, like=scan.path)
        _json(
            volume4d.with_name(volume4d.name.replace(".nii.gz", ".json")),
            {
                "Description": "Probability of each structure, background first",
                "LabelMap": ["BG", *(s.abbreviation for s in table.structures)],
                "Manual": False,
                **about,
            },
        )
        written.append(volume4d)
    morph = place.path("desc-volumetric_morph.tsv")
    _tsv(morph, ("index", "name", "abbreviation", "volume-mm3", "percent-brain"), _rows(result))
    _json(
        morph.with_suffix(".json"),
        {
            "volume-mm3": {
                "Description": "Label count times voxel volume on the scan's own grid",
                "Units": "mm3",
            },
            "percent-brain": {"Description": "Share of the row Brain-Segmentation", "Units": "%"},
            **{name: {"Description": text} for name, text in AGGREGATES.items()},
        },
    )
    written.append(morph)
    volume(
        "seg-cadiff_dseg.nii.gz",
        segmentation.labels,
        scan.path,
        Description="Brain structures; codes in dseg.tsv",
        Manual=False,
        **about,
        **provenance(result),
    )
    return written


AGGREGATES = {
    "Brain-Segmentation": "Sum of all structures but vessels",
    "Brain-Segmentation-Not-CSF": "The same without ventricles and CSF",
    "Brain-Mask": "Volume of the brain mask, with sulcal CSF",
}


def _rows(result: Result) -> Iterable[tuple[object, ...]]:
    table, volumes = result.segmentation.table, result.volumes_mm3
    brain = sum(volumes[s.code] for s in table.structures if s.mapping != NON_BRAIN_MAPPING)
    csf = sum(volumes[s.code] for s in table.structures if s.mapping == CSF_MAPPING)
    mask = np.count_nonzero(result.mask.data) * result.mask.grid.voxel_volume_mm3

    def row(index: object, name: str, abbreviation: str, mm3: float) -> tuple[object, ...]:
        share = f"{100 * mm3 / brain:.3f}" if brain else "n/a"
        return index, name, abbreviation, f"{mm3:.3f}", share

    for s in table.structures:
        yield row(s.code, s.name, s.abbreviation, volumes[s.code])
    for name, mm3 in zip(AGGREGATES, (brain, brain - csf, mask), strict=True):
        yield row("n/a", name, "n/a", mm3)


def provenance(result: Result) -> dict[str, Any]:
    """What made this segmentation: enough to make it again."""
    registered, config = result.prepared.registered, result.config
    settings = as_dict(config)
    if config.strip.mask is not None:
        settings["strip"]["mask"] = config.strip.mask.name  # paths may tell more than they should
    model = {"Name": result.model.name, "WeightsSHA256": result.model.sha256}
    return {
        "GeneratedBy": [{"Name": "cadiff", "Version": cadiff_cli.__version__}],
        "SoftwareVersions": software(),
        "Model": model,
        "Steps": result.segmentation.steps,
        "Seed": result.segmentation.seed,
        "Tile": result.segmentation.tile,
        "Template": {
            "Name": registered.template.name,
            "Source": registered.template.source,
            "Registration": registered.kind,
            "Score": registered.score,
        },
        "SkullStripping": result.prepared.stripped.method,
        "Settings": settings,
        "Fingerprint": fingerprint([settings, model, registered.template.name]),
        "Seconds": dict(result.seconds),
        "Warnings": list(result.warnings),
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


def save_dataset_files(out: Path, table: LabelTable) -> None:
    """``dataset_description.json``, ``.bidsignore``, ``dseg.tsv``; existing ones are kept."""
    description = {
        "Name": "cadiff - brain structures by anatomy diffusion",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "cadiff", "Version": cadiff_cli.__version__, "CodeURL": CODE_URL}],
    }
    if not (out / "dataset_description.json").exists():
        _json(out / "dataset_description.json", description)
    if not (out / ".bidsignore").exists():
        with replacing(out / ".bidsignore") as temporary:
            temporary.write_text(BIDSIGNORE, encoding="utf-8")
    if not (out / "dseg.tsv").exists():
        _tsv(
            out / "dseg.tsv",
            ("index", "name", "abbreviation", "color", "mapping"),
            [
                (0, "Background", "BG", "#000000", 0),
                *((s.code, s.name, s.abbreviation, s.color, s.mapping) for s in table.structures),
            ],
        )


def _json(path: Path, values: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _tsv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
