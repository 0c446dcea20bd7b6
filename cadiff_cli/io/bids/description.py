"""The files at the root of a derivative dataset: what it is, and whose it is."""

import os
import re
from pathlib import Path
from typing import Any

import cadiff_cli
from cadiff_cli.errors import OutputError
from cadiff_cli.io.bids.raw import LINK_KINDS, Dataset
from cadiff_cli.io.files import read_json, write_json, write_text

VERSION = re.compile(r"\.v\d+(\.\d+)*$")
"""What OpenNeuro adds to a dataset's DOI."""
BIDS_VERSION = "1.10.0"
BIDSIGNORE = "*.html\nlog\n*_xfm.*\n*_morph.*\n*_field.*\ngroup_*\n"
TEMPLATEFLOW_URL = "https://github.com/templateflow/templateflow"
README = """# cadiff derivatives

Brain structures and their volumes, segmented from T1-weighted scans by cadiff.

- `sub-*/[ses-*/]anat/*_seg-cadiff_dseg.nii.gz`: labels on the scan's own grid; codes in `dseg.tsv`
- `sub-*/[ses-*/]anat/*_desc-volumetric_morph.tsv`: volumes in mm3
- `sub-*.html`, `group.html`: pages to judge them by
- `group_morph.tsv`: one row a scan, written by `cadiff run BIDS_DIR OUT group`
- `logs/CITATION.md`: what was run, in words for a methods section, with references

Not for diagnosis.
"""


def generated_by() -> dict[str, Any]:
    """The software, and the container that holds it if its image says so."""
    mark: dict[str, Any] = {"Name": "cadiff", "Version": cadiff_cli.__version__}
    if tag := os.environ.get("CADIFF_DOCKER_TAG"):
        mark["Container"] = {"Type": "docker", "Tag": tag}
    elif uri := os.environ.get("CADIFF_SINGULARITY_URL"):
        mark["Container"] = {"Type": "singularity", "URI": uri}
    return mark


def save_dataset_files(out: Path, raw: Dataset | None = None, link: str | None = None) -> None:
    """``dataset_description.json``, ``.bidsignore``, ``README.md``.

    Existing files are kept, but for links to the ``raw`` dataset that the description lacks.
    ``link`` says where ``raw`` is, if not as ``Dataset.link`` does.  Raises ``OutputError`` where
    ``out`` is not ours.
    """
    refuse_foreign(out)
    path = out / "dataset_description.json"
    found = read_json(path)
    ours = {
        "Name": "cadiff - brain structures by anatomy diffusion",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [generated_by()],
        "HowToAcknowledge": "See logs/CITATION.md",
    }
    description = dict(found or ours)
    if raw is not None:
        description["DatasetLinks"] = {
            "raw": link or raw.link(out),
            "templateflow": TEMPLATEFLOW_URL,
            **links(description),
        }
        if doi := raw.doi:
            description.setdefault("SourceDatasets", [{"DOI": f"doi:{doi}"}])
    if found != description:
        write_json(path, description)
    if not (out / ".bidsignore").exists():
        write_text(out / ".bidsignore", BIDSIGNORE)
    if not (out / "README.md").exists():
        write_text(out / "README.md", README)


def refuse_other_source(out: Path, raw: Dataset, link: str | None = None) -> None:
    """Raise ``OutputError`` if ``out`` holds results of another dataset than ``raw``.

    Only what can be told apart is: a link that leads to another folder, or names another dataset.
    """
    found = links(read_json(out / "dataset_description.json") or {}).get("raw")
    here = link or raw.link(out)
    if not found or VERSION.sub("", found) == VERSION.sub("", here):
        return
    named = any(found.startswith(kind) and here.startswith(kind) for kind in LINK_KINDS)
    there = out / found
    is_dataset = ":" not in found and (there / "dataset_description.json").exists()
    elsewhere = is_dataset and not there.samefile(raw.root)
    if named or elsewhere:
        raise OutputError(
            f"{out} holds results of another dataset ({found}), not of {raw.root}",
            "give each dataset an output folder of its own; if it is the same dataset, say so each"
            f" time with --dataset-links raw={found}",
        )


def refuse_foreign(out: Path) -> None:
    """Raise ``OutputError`` if ``out`` is a raw dataset, or another pipeline's, or cannot tell."""
    path = out / "dataset_description.json"
    if not path.exists():
        return
    found = read_json(path)
    if found is None:
        raise OutputError(
            f"{path} is not readable JSON, so whose folder it is cannot be told",
            "mend or remove that file, or choose another output folder",
        )
    told = found.get("GeneratedBy")
    entries = told if isinstance(told, list) else [told] if told else []
    makers = [str(e.get("Name") if isinstance(e, dict) else e) for e in entries]
    if found.get("DatasetType", "raw") == "raw" or (makers and "cadiff" not in makers):
        owner = f"made by {', '.join(makers)}" if makers else "a raw dataset"
        raise OutputError(f"{out} is {owner}", "choose a folder of its own for cadiff")


def links(description: dict[str, Any]) -> dict[str, str]:
    """``DatasetLinks`` that are links: another's may be anything."""
    found = description.get("DatasetLinks")
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}
