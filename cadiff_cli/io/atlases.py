"""Atlases as folders: TemplateFlow's layout, so that every program can use them as templates."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cadiff_cli.errors import OutputError, first_few
from cadiff_cli.io.bids.description import generated_by
from cadiff_cli.io.bids.names import MORPH
from cadiff_cli.io.bids.tables import write_table
from cadiff_cli.io.files import read_json, write_json, write_tsv
from cadiff_cli.io.images import save_displacement, save_volume
from cadiff_cli.io.templates import (
    DESCRIPTION,
    LABELS,
    MASK,
    folder_of,
    frame_as_dict,
    transform_name,
)
from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.machine import work_folder
from cadiff_cli.products import Atlas

LOG_JACOBIAN = "desc-logjacobian_map"
CAUSE = "Cause"
UNFINISHED = ""
"""The cause of an atlas whose files are being moved to their places."""


def place_of(out: Path, name: str) -> Path:
    """The folder of the atlas with this name below ``out``."""
    return out / folder_of(name)[0]


def holds(folder: Path, cause: str) -> bool:
    """Whether the complete atlas of this ``cause`` lies in ``folder``."""
    return (read_json(folder / DESCRIPTION) or {}).get(CAUSE) == cause


def make_room(out: Path, name: str, *, overwrite: bool) -> None:
    """Raise ``OutputError`` if an atlas of this name would replace files that are there.

    With ``overwrite`` those of an earlier atlas may be replaced, but no others.
    """
    folder = place_of(out, name)
    if folder.parent.exists() and not folder.parent.is_dir():
        raise OutputError(f"{folder.parent} is a file", "choose another output folder")
    if folder.is_dir():
        files = sorted(path.name for path in folder.iterdir())
    elif folder.exists():
        files = [folder.name]
    else:
        return
    if not files:
        return
    told = (read_json(folder / DESCRIPTION) if folder.is_dir() else None) or {}
    if CAUSE not in told:
        raise OutputError(
            f"{folder} holds {first_few(files, 3)}, which cadiff did not write",
            "choose another output folder (-o)",
        )
    if told[CAUSE] != UNFINISHED and not overwrite:
        raise OutputError(
            f"{folder} holds an atlas already", "choose another output folder (-o), or --overwrite"
        )


def save_atlas(
    out: Path,
    atlas: Atlas,
    parcellation: Parcellation,
    samples: Sequence[Mapping[int, float]] = (),
) -> Path:
    """Write the atlas as a template's folder below ``out``, and return the folder.

    ``samples`` are volumes (mm3 by code) of possible people.  Files that are there and have other
    names stay.  ``template_description.json`` is written last: with it the atlas is complete.
    """
    template, deformation = atlas.template, atlas.deformation
    folder, begin = folder_of(template.name)
    final = out / folder
    final.parent.mkdir(parents=True, exist_ok=True)
    # Built aside: a killed process leaves no half-written atlas in its place.
    with work_folder(f".{final.name}.", final.parent) as aside:
        new = Path(aside)
        assert template.mask is not None and template.labels is not None  # noqa: PT018
        for name, volume in (
            ("T1w", template.brain),
            (MASK, template.mask),
            (LABELS, template.labels),
            (LOG_JACOBIAN, atlas.log_jacobian),
        ):
            path = new / f"{begin}_{name}.nii.gz"
            save_volume(path, volume.data, volume.grid, code="mni", labels=name == LABELS)
        base, own = atlas.base.label, template.label
        for start, end, displacement in (
            (base, own, deformation.backward_mm),
            (own, base, deformation.forward_mm),
        ):
            path = new / f"{begin}_{transform_name(start, end)}"
            save_displacement(path, displacement, deformation.grid)
        write_table(new / f"{begin}_{LABELS}.tsv", parcellation)
        write_volumes(new / f"{begin}_{MORPH}.tsv", atlas, parcellation, samples)
        final.mkdir(exist_ok=True)
        # What is there is no complete atlas from here on, until the new description stands.
        write_json(final / DESCRIPTION, {CAUSE: UNFINISHED})
        for path in sorted(new.iterdir()):
            path.replace(final / path.name)
        write_json(final / DESCRIPTION, description(atlas, parcellation, len(samples)))
    return final


def write_volumes(
    path: Path,
    atlas: Atlas,
    parcellation: Parcellation,
    samples: Sequence[Mapping[int, float]] = (),
) -> None:
    """Write the volumes of structures in atlas and base, and those of samples with their spread."""
    more = ("samples_mean_mm3", "samples_sd_mm3") if samples else ()
    each = [f"sample_{k}_mm3" for k in range(1, len(samples) + 1)]
    rows = []
    for s in parcellation.structures:
        if s.code not in atlas.volumes_mm3:
            continue
        drawn = [sample[s.code] for sample in samples]
        spread = (
            [np.mean(drawn), np.std(drawn, ddof=1) if len(drawn) > 1 else None] if drawn else []
        )
        values = [atlas.volumes_mm3[s.code], atlas.base_volumes_mm3[s.code], *spread, *drawn]
        rows.append((s.code, s.name, *(None if v is None else f"{v:.1f}" for v in values)))
    write_tsv(path, ("index", "name", "volume_mm3", "base_volume_mm3", *more, *each), rows)


def description(atlas: Atlas, parcellation: Parcellation, samples: int) -> dict[str, Any]:
    """``template_description.json``: TemplateFlow's keys, the frame, and what made the atlas."""
    template, citation = atlas.template, atlas.template.citation
    assert citation is not None
    return {
        "Name": citation.title,
        "Authors": list(citation.authors),
        "ReferencesAndLinks": list(citation.links),
        "Description": f"Atlas of {people_in_words(atlas)}: {atlas.base.name}, deformed by the"
        f" network {atlas.model}. Intensities are the base's.",
        "Identifier": template.name,
        "Condition": atlas.condition.given,
        "Seed": atlas.seed,
        "Samples": samples,
        "Base": {
            "Name": atlas.base.name,
            "Source": atlas.base.source,
            "Frame": frame_as_dict(atlas.base.frame),
        },
        "Model": {"Name": atlas.model, "WeightsSHA256": atlas.weights_sha256},
        "Parcellation": parcellation.name,
        "Frame": frame_as_dict(template.frame),
        "SHA256": template.sha256,
        CAUSE: template.cause,
        "GeneratedBy": [generated_by()],
    }


def people_in_words(atlas: Atlas) -> str:
    """The condition in words.

    >>> from types import SimpleNamespace as Any
    >>> from cadiff_cli.products import Condition
    >>> people_in_words(Any(condition=Condition(72, "F"), seed=None))
    'women of 72 years'
    """
    condition = atlas.condition
    nouns = {None: ("people", "person"), "F": ("women", "woman"), "M": ("men", "man")}
    many, one = nouns[condition.sex]
    words = [many if atlas.seed is None else f"a possible {one} (seed {atlas.seed})"]
    if condition.age_years is not None:
        words.append(f"of {condition.age_years:g} years")
    if condition.ventricles_percent is not None:
        words.append(f"with ventricles of {condition.ventricles_percent:g} % of the brain")
    return " ".join(words)
