"""Load templates: by name, from TemplateFlow or nilearn's package, or from a folder.

A folder is laid out as TemplateFlow's own (``docs/templates.md``): ``tpl-NAME_T1w.nii.gz``,
``tpl-NAME_desc-brain_mask.nii.gz`` and ``template_description.json``.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cadiff_cli.data import read
from cadiff_cli.errors import CadiffError, DataError, MissingInputError, UsageError
from cadiff_cli.io.files import read_json
from cadiff_cli.io.images import load_displacement, load_volume
from cadiff_cli.io.intensities import finite
from cadiff_cli.io.templateflow import fetch, listed, packaged_json, templateflow_home
from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.products import Citation, Condition, Frame, FromBase, Template, template_label
from cadiff_cli.spatial.grid import Volume, border_value, faces
from cadiff_cli.spatial.resample import same_grid

log = logging.getLogger(__name__)

PREFERRED = "MNIColin27"
EMBEDDED = "MNI152NLin2009aSym"
NILEARN_BRAIN = "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
NAME = re.compile(r"([A-Za-z0-9]+)(?::cohort-([A-Za-z0-9]+))?")
"""A template's name with its cohort; whatever else is given is a folder."""
TEMPLATE_T1W = re.compile(
    r"(tpl-([A-Za-z0-9]+)(?:_cohort-([A-Za-z0-9]+))?(?:_res-(\d+))?)_T1w\.nii\.gz"
)
MASK, LABELS = "desc-brain_mask", "seg-cadiff_dseg"
DESCRIPTION = "template_description.json"
SEE = "see docs/templates.md for what a template's folder holds"
LITRES = (0.02, 2.5)
"""Every brain, from a preterm child's to a large adult's, is well within."""
BRAIN_LITRES = (0.02, 2.0)
"""Of a brain that no mask vouches for: the embedded one holds 1.89 l, a head in air of 0 more."""
MOST_CUT = 0.05
"""Share of a face of the field of view that a brain touches, or its spinal cord; a neck fills more
of the lowest one."""
LEAST_HEAD = 0.1
"""How much of a head lies outside its brain, as a share of the brain; far more in all of them."""


def registry() -> dict[str, dict[str, Any]]:
    """Shipped names and where their origin and extents lie (``data/templates.json``)."""
    text = read("templates.json")
    return dict(json.loads(text))


def load_templates(specs: str = "auto", *, offline: bool = False) -> tuple[Template, ...]:
    """Templates by name or folder, joined by ``+``; ``"auto"`` is Colin27 and the embedded one.

    Where Colin27 cannot be had, the embedded one carries a note and serves alone.  ``offline``
    forbids downloads.  Raises what ``load_template`` raises, ``UsageError`` for two of one name.
    """
    if specs != "auto":
        templates = tuple(load_template(spec, offline=offline) for spec in parse_specs(specs))
        names = [template.name for template in templates]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(
                f"two templates are called {', '.join(twice)}: their results would share names",
                "rename the files of one",
            )
        return templates
    embedded = load_template(EMBEDDED, offline=offline)
    try:
        return load_template(PREFERRED, offline=offline), embedded
    except CadiffError as error:
        reason = error.message
    text = (
        f"template {PREFERRED} is not available ({reason}); {EMBEDDED}, which comes with nilearn,"
        " serves alone: labels are a little less accurate"
    )
    log.warning(text)
    return (replace(embedded, notes=(Note(NoteCode.TEMPLATE_MISSING, text),)),)


def joint_name(templates: Iterable[Template]) -> str:
    """The names of templates, joined by ``+``."""
    return "+".join(template.name for template in templates)


def joint_spec(templates: Iterable[Template]) -> str:
    """``load_templates`` finds these templates by it, from any working directory."""
    return "+".join(spec_of(template.name, template.source) for template in templates)


def spec_of(name: str, source: str) -> str:
    """``load_template`` finds a template of this name and source by it."""
    return source if Path(source).is_absolute() else name


def own_contents(templates: Iterable[Template]) -> tuple[tuple[str, str], ...]:
    """(name, SHA-256) of the templates whose name alone does not tell their content.

    For one that the run itself makes, the checksum is that of its cause.
    """
    return tuple((t.name, t.cause or t.sha256) for t in templates if not _is_shipped(t))


def _is_shipped(template: Template) -> bool:
    return template.name in registry() and not Path(template.source).is_absolute()


def parse_specs(specs: str) -> tuple[str, ...]:
    """The templates in ``SPEC[+SPEC...]`` or ``auto``, each once, as ``load_template`` wants them.

    A ``+`` may belong to a folder's path: the longest one that is there is meant.  Raises
    ``UsageError`` for an unknown name, ``MissingInputError`` for a folder that is not there or
    holds no template, ``DataError`` for one whose description cannot be read.
    """
    found: dict[str, None] = {}
    pieces = specs.split("+")
    while pieces:
        size = 1
        if not NAME.fullmatch(pieces[0]):
            folders = ("+".join(pieces[:n]) for n in range(len(pieces), 0, -1))
            size = next((f.count("+") + 1 for f in folders if f and Path(f).is_dir()), 0)
            if not size:
                raise _unknown("+".join(pieces), specs)
            folder = Path("+".join(pieces[:size]))
            _only_head(folder)
            _description(folder)
        elif pieces[0] == "auto":
            if specs != "auto":
                raise UsageError(f"auto is among others in {specs!r}", "give auto alone, or names")
        elif pieces[0] not in registry() and not _head(*folder_of(pieces[0])):
            raise _unknown(pieces[0], specs)
        found["+".join(pieces[:size])] = None
        pieces = pieces[size:]
    return tuple(found)


def _unknown(spec: str, specs: str) -> CadiffError:
    if Path(spec).is_file():
        return MissingInputError(
            f"{spec} is a file, not the folder of a template",
            "give the folder that holds it; its name there is tpl-NAME_T1w.nii.gz",
        )
    if "/" in spec:
        return MissingInputError(
            f"there is no template folder {spec}", "give a folder that holds tpl-NAME_T1w.nii.gz"
        )
    hint = f"; for the folder of that name write ./{spec}" if Path(spec).is_dir() else ""
    return UsageError(
        f"unknown template {spec!r} in {specs!r}",
        f"choose auto, {', '.join(registry())}, another of TemplateFlow's as NAME[:cohort-X], or a"
        f" folder, joined by +{hint}",
    )


def load_template(spec: str, *, offline: bool = False, anew: bool = False) -> Template:
    """A template: a shipped name, one of TemplateFlow's (``MNIInfant:cohort-2``), or a folder.

    ``offline`` forbids downloads; ``anew`` replaces files that are there already, such as damaged
    ones.  Raises ``UsageError`` for an unknown name, ``MissingInputError`` or ``DataError`` with
    the remedy when files are missing or damaged.
    """
    if not NAME.fullmatch(spec):
        return _from_folder(Path(spec).absolute())
    entry = registry().get(spec, {})
    if entry.get("source") == "nilearn":
        brain, mask = _nilearn_brain()
        return Template(spec, brain, _frame(entry), mask=mask, source="nilearn package data")
    folder, name = folder_of(spec)
    head = entry.get("head") or _head(folder, name)
    if head is None:
        raise _unknown(spec, spec)
    remedy = _refetch(spec)
    t1 = fetch(head, remedy, offline=offline, anew=anew)
    mask_name = head.replace("_T1w.", "_desc-brain_mask.")
    has_mask = Path(mask_name).name in listed(folder) or entry
    inside = fetch(mask_name, remedy, offline=offline, anew=anew) if has_mask else None
    if entry:
        return replace(_read(spec, t1, inside, {}, remedy, _frame(entry)), source="templateflow")
    packaged = packaged_json(f"{folder.split('/')[0]}/{DESCRIPTION}")
    told = packaged | _description(templateflow_home() / folder)
    template = _read(spec, t1, inside, told, remedy)
    return replace(template, source="templateflow", citation=_citation(spec, told))


def folder_of(spec: str) -> tuple[str, str]:
    """Where TemplateFlow keeps a template's files, and what their names begin with.

    >>> folder_of("MNIInfant:cohort-2")
    ('tpl-MNIInfant/cohort-2', 'tpl-MNIInfant_cohort-2')
    """
    match = NAME.fullmatch(spec)
    assert match is not None
    name, cohort = match.groups()
    if cohort is None:
        return f"tpl-{name}", f"tpl-{name}"
    return f"tpl-{name}/cohort-{cohort}", f"tpl-{name}_cohort-{cohort}"


def _head(folder: str, begin: str) -> str | None:
    """The T1w image of a template in TemplateFlow's cache, that of the finest resolution."""
    names = [m[0] for m in _heads(listed(folder)) if m[1].partition("_res-")[0] == begin]
    return f"{folder}/{names[0]}" if names else None


def _heads(names: Iterable[str]) -> list[re.Match[str]]:
    """Names of T1w images, in the order of their resolution's number; none comes first."""
    found = (match for name in names if (match := TEMPLATE_T1W.fullmatch(name)))
    return sorted(found, key=lambda match: int(match[4] or 0))


def _from_folder(folder: Path) -> Template:
    """The template whose files lie in ``folder`` (of a cohort, if there are several)."""
    name, begin = _only_head(folder)
    mask, labels = (folder / f"{begin}_{rest}.nii.gz" for rest in (MASK, LABELS))
    told = _description(folder)
    found = mask if mask.exists() else None
    template = _read(name, folder / f"{begin}_T1w.nii.gz", found, told, SEE)
    others = [] if found else sorted(path.name for path in folder.glob("*mask*.nii*"))
    text = f"template {name}: {', '.join(others)} is not read; its brain mask is called {mask.name}"
    return replace(
        template,
        labels=_labels(labels, template, SEE) if labels.exists() else None,
        source=str(folder),
        citation=_citation(name, told),
        condition=Condition.read(told.get("Condition")),
        from_base=_from_base(folder, begin, template, told.get("Base")),
        notes=(Note(NoteCode.TEMPLATE_MASK, text),) if others else (),
    )


def transform_name(start: str, end: str) -> str:
    """End of the name of a transform's file; ``start`` and ``end`` are labels of templates."""
    return f"from-{start}_to-{end}_mode-image_xfm.nii.gz"


def frame_as_dict(frame: Frame) -> dict[str, Any]:
    """A frame as a template's description holds it."""
    return {"OriginMm": frame.ac_mm, "LowMm": frame.low_mm, "HighMm": frame.high_mm}


def _from_base(folder: Path, begin: str, template: Template, told: object) -> FromBase | None:
    """What a template was deformed from; None if its description names no base with a frame."""
    if not (isinstance(told, Mapping) and "Frame" in told and template.mask):
        return None
    name = str(told.get("Name"))
    frame = _told_frame(name, told, template.mask)
    assert frame is not None
    path = folder / f"{begin}_{transform_name(template_label(name), template.label)}"
    try:
        return FromBase(frame, *load_displacement(path))
    except CadiffError as error:
        raise DataError(
            f"template file {path}: {error.message}", "copy the template's whole folder"
        ) from error


def _only_head(folder: Path) -> tuple[str, str]:
    """Name of the template in ``folder``, and what the names of its files begin with.

    Raises ``MissingInputError`` if there is none, or several.
    """
    try:
        files = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise MissingInputError(
            f"template folder {folder} cannot be read ({error.strerror})", SEE
        ) from error
    heads = _heads(files)
    names = sorted({f"{m[2]}:cohort-{m[3]}" if m[3] else m[2] for m in heads})
    if len(names) == 1:
        return names[0], heads[0][1]
    if names:
        remedy = f"give a folder that holds tpl-NAME_T1w.nii.gz of one template; {SEE}"
        raise MissingInputError(f"{folder} holds T1w images of {', '.join(names)}", remedy)
    images = [file for file in files if file.endswith((".nii", ".nii.gz"))]
    near = [image for image in images if "T1w" in image] or images
    but = f", but {', '.join(near[:3])}" if near else ""
    if cohorts := [file for file in files if file.startswith("cohort-")]:
        remedy = f"give one of its folders {', '.join(cohorts)}"
    elif near:
        remedy = f"call it so, NAME of letters and digits, and gzip it; {SEE}"
    else:
        remedy = f"give a folder that holds one; {SEE}"
    raise MissingInputError(f"{folder} holds no T1w image tpl-NAME_T1w.nii.gz{but}", remedy)


def _labels(path: Path, template: Template, remedy: str) -> Volume:
    labels = _checked(path, remedy)
    if not same_grid(labels.grid, template.brain.grid):
        raise DataError(f"{path.name} lies on another grid than the image", remedy)
    return Volume(labels.data.astype(np.int16), labels.grid)


def _read(
    name: str,
    head: Path,
    mask: Path | None,
    told: Mapping[str, Any],
    remedy: str,
    frame: Frame | None = None,
) -> Template:
    """A template from its files; ``told`` is its description, which may hold the frame."""
    t1 = _checked(head, remedy)
    outside = t1.data != border_value(t1.data)
    if mask is None:
        inside = Volume(outside, t1.grid)
        if doubt := _not_stripped(t1, inside):
            raise DataError(
                f"{head.name} is no stripped brain ({doubt}), and {name} has no brain mask",
                f"give {head.name.replace('_T1w', '_desc-brain_mask')}, or set the image to 0"
                " outside the brain",
            )
    else:
        inside = _checked(mask, remedy)
        if not same_grid(t1.grid, inside.grid):
            raise DataError(
                f"{name}: the grids of its image {t1.grid!r} and mask {inside.grid!r} differ",
                remedy,
            )
        inside = Volume(inside.data > 0.5, inside.grid)
        low, high = (0.8, 2.5) if name in registry() else LITRES
        if not low < inside.litres < high:
            raise DataError(
                f"{name}: its brain mask holds {inside.litres:.2f} l, a brain {low} to {high} l",
                remedy,
            )
    brain = Volume(np.where(inside.data, t1.data, 0).astype(np.float32), t1.grid)
    beyond = np.count_nonzero(outside & ~inside.data)
    whole = beyond > LEAST_HEAD * np.count_nonzero(inside.data)
    frame = frame or _told_frame(name, told, inside) or measured_frame(inside)
    return Template(name, brain, frame, head=t1 if whole else None, mask=inside)


def _not_stripped(t1: Volume, inside: Volume) -> str:
    """Why what is not background is no brain alone; empty if it may be one."""
    low, high = BRAIN_LITRES
    if (background := border_value(t1.data)) != 0:
        return f"its background is {background:g}, and 0 around a stripped brain"
    if not low < inside.litres < high:
        return f"{inside.litres:.2f} l are not 0, {low} to {high} l in a brain"
    touched = max(float(face.mean()) for face in faces(inside.data))
    if touched > MOST_CUT:
        return (
            f"{touched:.0%} of a face of its field of view are not 0, at most {MOST_CUT:.0%} where"
            " a brain touches it: is this a neck?"
        )
    return ""


def _description(folder: Path) -> dict[str, Any]:
    """What a template's description tells; that of a cohort goes before that of all cohorts."""
    found: dict[str, Any] = {}
    parents = [folder.parent] if folder.name.startswith("cohort-") else []
    for path in (parent / DESCRIPTION for parent in (*parents, folder)):
        if path.exists() and path.stat().st_size > 0:
            told = read_json(path)
            if told is None:
                raise DataError(f"{path} is no readable JSON object", "mend or remove that file")
            found |= told
    return found


def _told_frame(name: str, told: Mapping[str, Any], mask: Volume) -> Frame | None:
    """The frame of a description: ``{"Frame": {"OriginMm": .., "LowMm": .., "HighMm": ..}}``."""
    if "Frame" not in told:
        return None
    given, keys = told["Frame"], ("OriginMm", "LowMm", "HighMm")
    remedy = f"give each of {', '.join(keys)} as three numbers, or leave the frame out"
    if isinstance(given, Mapping) and (missing := [key for key in keys if key not in given]):
        raise DataError(f"the frame of {name} lacks {', '.join(missing)}", remedy)
    try:
        frame = Frame(*(_point(given[key]) for key in keys))
    except (TypeError, ValueError) as error:
        raise DataError(f"the frame of {name} cannot be read: {given!r}", remedy) from error
    numbers = (*frame.ac_mm, *frame.low_mm, *frame.high_mm)
    negative, positive = max(frame.low_mm) < 0, min(frame.high_mm) > 0
    symmetric = frame.low_mm[0] == -frame.high_mm[0]
    if not (all(map(math.isfinite, numbers)) and negative and positive and symmetric):
        raise DataError(
            f"the frame of {name} is {given!r}",
            "LowMm are negative, HighMm positive, and those of x alike: 0.5 is the midplane",
        )
    ends = mask.grid.to_world(np.argwhere(mask.data))
    if not ((ends.min(axis=0) < frame.ac_mm) & (frame.ac_mm < ends.max(axis=0))).all():
        raise DataError(
            f"the AC of {name} at {frame.ac_mm} mm lies outside its brain"
            f" ({ends.min(axis=0).round()} to {ends.max(axis=0).round()} mm)",
            "give OriginMm in the world of the template's image, RAS+ millimetres",
        )
    return frame


def measured_frame(mask: Volume) -> Frame:
    """The frame of a brain whose AC nobody has marked, to 0.1 mm.

    The centre and the spread (standard deviation) of its ``mask`` along each axis are laid over
    those of the embedded template.  Done so, Colin27's frame errs by 1.6 mm (root mean square over
    the brain, against an affine registration), as the one that people measured; the frames of four
    people in their scanners' pose by 4 to 7 mm, as a frame does not tilt.
    """
    known = load_template(EMBEDDED)
    assert known.mask is not None
    ours, theirs = (v.grid.to_world(np.argwhere(v.data)) for v in (mask, known.mask))
    scale = ours.std(axis=0) / theirs.std(axis=0)
    ac = ours.mean(axis=0) + scale * (np.array(known.frame.ac_mm) - theirs.mean(axis=0))
    extents = (scale * values for values in (known.frame.low_mm, known.frame.high_mm))
    return Frame(*(_point(np.round(values, 1)) for values in (ac, *extents)))


def _citation(name: str, told: Mapping[str, Any]) -> Citation | None:
    """Who made a template, as its description tells; None if it does not."""

    def texts(key: str) -> tuple[str, ...]:
        found = told.get(key) or ()
        return tuple(map(str, [found] if isinstance(found, str) else found))

    authors, links = texts("Authors"), texts("ReferencesAndLinks")
    if not (authors or links):
        return None
    return Citation(str(told.get("Name") or name), authors, links)


@cache
def _nilearn_brain() -> tuple[Volume, Volume]:
    image = load_volume(_nilearn_file())
    data = image.data.astype(np.float32)
    data /= data.max()
    return Volume(data, image.grid), Volume(data > 0, image.grid)


def _nilearn_file() -> Path:
    """The brain of ``nilearn.datasets.load_mni152_template``; to import that takes a second."""
    package = find_spec("nilearn")
    if package is None or package.origin is None:
        raise MissingInputError("the package nilearn is not installed", "pip install nilearn")
    return Path(package.origin).parent / "datasets" / "data" / NILEARN_BRAIN


def _frame(entry: Mapping[str, Any]) -> Frame:
    return Frame(*(_point(entry[key]) for key in ("ac_mm", "low_mm", "high_mm")))


def _point(values: Sequence[float]) -> tuple[float, float, float]:
    x, y, z = map(float, values)
    return x, y, z


def _checked(path: Path, remedy: str) -> Volume:
    try:
        volume = load_volume(path)
    except CadiffError as error:
        raise DataError(f"template file {path}: {error.message}", remedy) from error
    low, high = volume.data.min(), volume.data.max()
    if high <= low:
        raise DataError(f"template file {path} is empty: all its voxels are {low:g}", remedy)
    if min(volume.grid.shape) < 32:
        raise DataError(f"template file {path} is not a head (shape {volume.grid.shape})", remedy)
    if not np.isfinite(volume.data).all():
        return Volume(finite(volume.data), volume.grid)
    return volume


def _refetch(name: str) -> str:
    return (
        "on a machine with internet run"
        f" 'TEMPLATEFLOW_HOME={templateflow_home()} cadiff fetch {name}'; commands with"
        f" --template can use {EMBEDDED} without a download"
    )


def parse_space(text: str, templates: Sequence[Template] = ()) -> tuple[str, str]:
    """``NAME[:cohort-X][:res-N]`` -> (template's name, ``N`` or nothing).

    The template is a shipped one, or one of the run's own ``templates``.

    >>> parse_space("MNI152NLin2009cAsym:res-2")
    ('MNI152NLin2009cAsym', '2')
    """
    match = re.fullmatch(rf"({NAME.pattern})(?::res-(0?[1-4]))?", text)
    known = tuple(dict.fromkeys((*registry(), *(template.name for template in templates))))
    if match is None or match[1] not in known:
        raise UsageError(
            f"unknown output space {text!r}",
            f"use {', '.join(known)}, with :res-2 for voxels of twice the size",
        )
    return match[1], match[4] or ""
