"""The files at the root of a derivative dataset, which tell its content and its owner."""

import os
import re
from pathlib import Path
from typing import Any

import cadiff_cli
from cadiff_cli.errors import OutputError
from cadiff_cli.io.bids.people import NOBODY, People, read_people
from cadiff_cli.io.bids.raw import LINK_KINDS, Dataset
from cadiff_cli.io.files import read_json, write_json, write_text

VERSION = re.compile(r"\.v\d+(\.\d+)*$")
"""The version that OpenNeuro appends to a dataset's DOI."""
BIDS_VERSION = "1.10.0"
BIDSIGNORE = (
    "*.html\nlog\nluts\nexport\n*_xfm.*\n*_morph.*\n*_field.*\ngroup_*\ntemplates\nage_ranges_*\n"
    # Cohorts are named as fMRIPrep names them; BIDS wants "space-" before "chunk-".
    "*_cohort-*\n*_chunk-*_space-*\n"
)
TEMPLATEFLOW_URL = "https://github.com/templateflow/templateflow"
README = """# cadiff derivatives

Brain structures and their volumes, segmented from T1-weighted scans by cadiff.

- `sub-*/[ses-*/]anat/*_seg-cadiff_desc-structures_dseg.nii.gz`: labels on the scan's own grid;
  codes in `seg-cadiff_dseg.tsv`
- `sub-*/[ses-*/]anat/*_dseg.nii.gz`: tissues (1 grey matter, 2 white matter, 3 fluid)
- `sub-*/[ses-*/]anat/*_desc-volumetric_morph.tsv`: volumes in mm3
- `luts/`: the colours of the codes for FreeView, FSLeyes, ITK-SNAP and others
- `sub-*.html`, `group.html`: pages to check the results with
- `group_morph.tsv`: one row a scan, written by `cadiff run BIDS_DIR OUT group`
- `logs/CITATION.md`: the text of a methods section, with references

Not for diagnosis.
"""


def generated_by() -> dict[str, Any]:
    """The entry for ``GeneratedBy``: cadiff, and its container if the image names itself."""
    entry: dict[str, Any] = {"Name": "cadiff", "Version": cadiff_cli.__version__}
    if tag := os.environ.get("CADIFF_DOCKER_TAG"):
        entry["Container"] = {"Type": "docker", "Tag": tag}
    elif uri := os.environ.get("CADIFF_SINGULARITY_URL"):
        entry["Container"] = {"Type": "singularity", "URI": uri}
    return entry


def save_dataset_files(out: Path, raw: Dataset | None = None, link: str | None = None) -> None:
    """Write ``dataset_description.json``, ``.bidsignore`` and ``README.md``.

    Existing files are kept, but missing links to the ``raw`` dataset are added.  ``link`` is the
    link to ``raw``, and replaces an earlier one (None: that, or ``Dataset.link``).  Raises
    ``OutputError`` if ``out`` is not cadiff's.
    """
    refuse_foreign(out)
    path = out / "dataset_description.json"
    existing = read_json(path)
    initial = {
        "Name": "cadiff - brain structures by anatomy diffusion",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [generated_by()],
        "HowToAcknowledge": "See logs/CITATION.md",
    }
    description = dict(existing or initial)
    if raw is not None:
        description["DatasetLinks"] = {
            "raw": link or raw.link(out),
            "templateflow": TEMPLATEFLOW_URL,
            **links(description),
            **({"raw": link} if link else {}),
        }
        if doi := raw.doi:
            description.setdefault("SourceDatasets", [{"DOI": f"doi:{doi}"}])
    if existing != description:
        write_json(path, description)
    if not (out / ".bidsignore").exists():
        write_text(out / ".bidsignore", BIDSIGNORE)
    if not (out / "README.md").exists():
        write_text(out / "README.md", README)


def refuse_other_source(out: Path, raw: Dataset, link: str | None = None) -> None:
    """Raise ``OutputError`` if ``out`` holds results of another dataset than ``raw``.

    Refuses only a link to another folder, or one that names another dataset.
    """
    stored = raw_link(out)
    here = link or raw.link(out)
    if not stored or VERSION.sub("", stored) == VERSION.sub("", here):
        return
    named = any(stored.startswith(kind) and here.startswith(kind) for kind in LINK_KINDS)
    linked = out / stored
    is_dataset = ":" not in stored and (linked / "dataset_description.json").exists()
    elsewhere = is_dataset and not linked.samefile(raw.root)
    if named or elsewhere:
        raise OutputError(
            f"{out} holds results of another dataset ({stored}), not of {raw.root}",
            "give each dataset an output folder of its own; if it is the same dataset, say so each"
            f" time with --dataset-links raw={stored}",
        )


def refuse_foreign(out: Path) -> None:
    """Raise ``OutputError`` if ``out`` is raw, another pipeline's, or has unreadable JSON."""
    path = out / "dataset_description.json"
    if not path.exists():
        return
    description = read_json(path)
    if description is None:
        raise OutputError(
            f"{path} is not readable JSON: the folder's owner is unknown",
            "mend or remove that file, or choose another output folder",
        )
    generators = description.get("GeneratedBy") or []
    entries = generators if isinstance(generators, list) else [generators]
    makers = [str(e.get("Name") if isinstance(e, dict) else e) for e in entries]
    if description.get("DatasetType", "raw") == "raw" or (makers and "cadiff" not in makers):
        owner = f"made by {', '.join(makers)}" if makers else "a raw dataset"
        raise OutputError(f"{out} is {owner}", "choose a folder of its own for cadiff")


def people_of(out: Path, scans: Path | None = None) -> People:
    """Ages and sexes that the folder ``scans`` tells, else ``out`` or the dataset it was made of.

    Where none tells any, those of the first that has a table or a note.
    """
    raw = raw_link(out)
    folders = (scans, out, out / raw if raw and ":" not in raw else None)
    first = NOBODY
    for folder in folders:
        if folder and _is_open_folder(folder):
            people = read_people(folder)
            if people.known():
                return people
            first = first or people
    return first


def _is_open_folder(path: Path) -> bool:
    """Whether ``path`` is a folder that this user may look into."""
    try:
        return path.is_dir() and os.access(path, os.R_OK | os.X_OK)
    except OSError:
        return False


def raw_link(out: Path) -> str:
    """Where an output folder says that its scans lie; empty if it does not say."""
    return links(read_json(out / "dataset_description.json") or {}).get("raw", "")


def links(description: dict[str, Any]) -> dict[str, str]:
    """The valid ``DatasetLinks``; another program may have written any value."""
    values = description.get("DatasetLinks")
    if not isinstance(values, dict):
        return {}
    return {name: link for name, link in values.items() if isinstance(link, str)}
