"""People to learn from: each prepared once, by the very code that inference runs.

A person's structures are those of a label map beside its scan or, without one, of the released
network.  The velocity that a registration of the images gives is corrected so that structures meet
as well (``structures``): by images alone, large ventricles stay far too small.

A prepared person holds the velocity that makes its shape of the base brain, the volumes of its
structures, and its image and classes at 2 mm, to be registered to when an atlas is judged.
"""

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cadiff_cli.config import REVISION, Config, SampleConfig, fingerprint
from cadiff_cli.errors import DataError, MissingInputError, UsageError
from cadiff_cli.io import models
from cadiff_cli.io.bids.index import entities_of
from cadiff_cli.io.bids.names import source_entities
from cadiff_cli.io.bids.people import People, read_people
from cadiff_cli.io.files import files_below, names_in, sha256
from cadiff_cli.io.images import load_scan
from cadiff_cli.io.label_maps import load_classes
from cadiff_cli.io.releases import find_weights
from cadiff_cli.labels.parcellation import BASE, Parcellation, load_parcellation, shipped_names
from cadiff_cli.labels.schemes import load_scheme, scheme_names
from cadiff_cli.machine import work_folder
from cadiff_cli.nets.atlas import MULTIPLE
from cadiff_cli.nets.condition import ConditionSpace
from cadiff_cli.nets.models import Model
from cadiff_cli.pipeline import prepare
from cadiff_cli.products import Condition, Conditions, CoordinateField, Sex, Template
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.resample import (
    check_same_grid,
    pool,
    resample,
    resample_labels,
    resample_mask,
)
from cadiff_cli.stages.condition import FIELD_STRIDE, brain_crop, normalise
from cadiff_cli.stages.field import template_coordinates
from cadiff_cli.stages.sampling import class_probabilities
from cadiff_cli.training import store
from cadiff_cli.training.atlas.structures import Shares, fit_structures
from cadiff_cli.training.atlas.velocity import fit_velocity, velocity_grid

log = logging.getLogger(__name__)

FORMAT = 2
"""Increase when the preparation of people changes; older files are then prepared again."""
HOW = Config(sample=SampleConfig(steps=1, flip=False))
"""Brains are found and registered as a run with default options does it, labels drawn quickly."""
STRIDE = 2
"""The field is fitted at twice this many mm, and images are kept at so many."""
VENTRICLE_CODES = (4, 5, 14, 15, 43, 44)
"""Codes of the lateral ventricles with their inferior horns, the third and the fourth."""
STRUCTURES = {"ventricles": VENTRICLE_CODES, "hippocampi": (17, 53)}
"""Structures whose share of the brain an atlas follows, in training and when it is judged."""
TOGETHER = (
    VENTRICLE_CODES,
    (17, 18, 53, 54),
    (10, 11, 12, 13, 26, 49, 50, 51, 52, 58),
    (3, 42),
    (2, 7, 16, 28, 41, 46, 60),
    (8, 47, 630, 631, 632),
)
"""Structures that meet those of the base: ventricles; hippocampi and amygdalae; thalami, striata
and pallida; cerebral cortex; white matter and brain stem; cerebellar cortex."""
SCHEME = re.compile(r"_seg-([A-Za-z0-9]+)_dseg\.nii")


@dataclass(frozen=True, eq=False)
class PreparedPerson:
    """A prepared person.

    ``velocity_mm`` (3, X, Y, Z) float16 is on the base's velocity grid; ``volumes_mm3`` maps a code
    to the volume of a structure.  ``image`` (uint8, 255 = 1.0) and ``classes`` of ``BASE`` are at
    2 mm.  ``residual_mm`` is that of the registration's ``Fit``; ``folded`` counts voxels at which
    the velocity folds.  ``key`` is the checksum of the scan, or of the scan and its label map.
    """

    name: str
    source: str
    velocity_mm: np.ndarray
    volumes_mm3: Mapping[int, float]
    image: Volume
    classes: Volume
    residual_mm: float
    folded: int
    trusted: bool
    key: str
    age_years: float | None = None
    sex: Sex | None = None

    @property
    def label(self) -> str:
        """The person's name among those of several sources."""
        return f"{self.source}/{self.name}"

    @property
    def ventricles_percent(self) -> float:
        """Volume of the ventricles in per cent of the brain's."""
        return share_of(self.volumes_mm3, VENTRICLE_CODES)

    @property
    def log_shares(self) -> np.ndarray:
        """(K,): logarithm of the per cent of the brain of ``STRUCTURES``; NaN where absent."""
        percent = np.array([share_of(self.volumes_mm3, codes) for codes in STRUCTURES.values()])
        return np.asarray(np.log(np.where(percent > 0, percent, np.nan)))

    @cached_property
    def condition(self) -> Condition:
        """All that is known of the person."""
        # Labels without ventricles (a failed segmentation) tell nothing of their size.
        return Condition(self.age_years, self.sex, round(self.ventricles_percent, 3) or None)


def brain_of(volumes_mm3: Mapping[int, float]) -> float:
    """Sum of all structures of ``BASE`` but vessels, from volumes by code."""
    return load_parcellation(BASE).brain_mm3(volumes_mm3)


def share_of(volumes_mm3: Mapping[int, float], codes: Sequence[int]) -> float:
    """Volume of structures in per cent of the brain's."""
    return 100 * sum(volumes_mm3.get(code, 0.0) for code in codes) / brain_of(volumes_mm3)


def labels_beside(scan: Path) -> tuple[Path, str] | None:
    """The label map of a scan and the scheme of its ids, which its ``seg-`` names, or None.

    The first of a known scheme that is called like the scan and lies in its folder.
    """
    known = {*scheme_names(load_parcellation(BASE)), *shipped_names()}
    beginning = f"{source_entities(scan)}_seg-"
    for name in names_in(scan.parent):
        scheme = SCHEME.search(name)
        if scheme and name.startswith(beginning) and scheme[1] in known:
            return scan.parent / name, scheme[1]
    return None


def scans_of(folder: Path) -> dict[str, Path]:
    """One T1w scan of each person of a BIDS-like folder, the first, by the person's label.

    Raises ``MissingInputError`` if the folder is absent, ``DataError`` if it holds no scan.
    """
    if not folder.is_dir():
        raise MissingInputError(f"no folder {folder}", "give BIDS-like folders of T1w scans")
    scans: dict[str, Path] = {}
    for path in files_below(folder, "*_T1w.nii*", within="sub-"):
        entities = entities_of(path, folder, derived=True)
        if "space" not in entities:
            scans.setdefault(str(entities["subject"]), path)
    if not scans:
        raise DataError(
            f"{folder} holds no scans", "name them sub-X[/ses-Y]/anat/sub-X[_ses-Y]_T1w.nii.gz"
        )
    return scans


def known_people(folder: Path) -> People:
    """Ages and sexes of a folder; raises ``DataError`` where no age is known."""
    people = read_people(folder)
    for text in people.notes:
        log.warning("%s: %s", folder.name, text)
    if not people.ages and all(p.age_years is None for p in people.persons.values()):
        why = f" ({people.notes[0]})" if people.notes else ""
        raise DataError(
            f"{folder} tells nobody's age{why}",
            "write participants.tsv with the columns participant_id, age and sex",
        )
    return people


def prepare_people(
    folders: Sequence[Path], base: Template, spacing_mm: float, cache: Path, device: str = "auto"
) -> list[PreparedPerson]:
    """Prepare one scan of every person once (kept in ``cache``) and load them all.

    ``base`` has labels; the ``device`` labels people.  People of unknown age serve as well: a
    network learns from missing conditions.  Left out, with a warning, are those whose registration
    is not trusted, or whose velocity folds.
    """
    # Whatever is wrong with a folder is said before the first scan.
    names = [folder.resolve().name for folder in folders]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            f"two folders are called {twice[0]!r}", "rename one: people are named after them"
        )
    told = [(scans_of(folder), known_people(folder)) for folder in folders]
    grid = base_grid(base, spacing_mm)
    cache.mkdir(parents=True, exist_ok=True)
    people, bad = list[PreparedPerson](), list[str]()
    for source, (scans, about) in zip(names, told, strict=True):
        for index, (label, path) in enumerate(scans.items(), start=1):
            log.info("preparing sub-%s of %s, %d of %d", label, source, index, len(scans))
            person = about.of_scan(source_entities(path))
            sitter = load(build(path, f"sub-{label}", base, grid, cache, device), grid)
            sitter = replace(sitter, source=source, age_years=person.age_years, sex=person.sex)
            if sitter.trusted and not sitter.folded:
                people.append(sitter)
            else:
                bad.append(sitter.label)
    if bad:
        log.warning("left out, being registered badly: %s", ", ".join(bad))
    return people


def base_grid(base: Template, spacing_mm: float) -> Grid:
    """The grid of velocities of a base template."""
    return velocity_grid(Volume(brain_mask(base), base.brain.grid), spacing_mm, MULTIPLE)


def base_labels(base: Template, model: Model, device: str = "auto") -> Volume:
    """The structures of the base, as codes (int16) on its brain's grid, drawn by ``model``.

    Its field is exact: it is registered to itself.
    """
    own = base.brain.grid
    mask = resample_mask(Volume(brain_mask(base), own), own.working())
    grid = brain_crop(mask)
    inside = resample(mask, grid)
    image = normalise(resample(base.brain, grid).data, inside.data, grid.spacing_mm)
    half = grid.coarsen(FIELD_STRIDE)
    field = np.stack([resample(each, half).data for each in template_coordinates(base)])
    conditions = Conditions(
        Volume(image, grid), inside, CoordinateField(field.clip(0, 1).astype(np.float32), half)
    )
    p, _ = class_probabilities(conditions, model, SampleConfig(), device_name=device)
    classes = resample(Volume(p.most_probable() * inside.data, grid), own, order=0)
    return Volume(model.parcellation.codes[classes.data], own)


def known_to(space: ConditionSpace, people: Sequence[PreparedPerson]) -> list[PreparedPerson]:
    """Those of the people whose condition an atlas knows; a warning names the others."""
    known = []
    for person in people:
        try:
            space.check(person.condition)
            known.append(person)
        except UsageError as error:
            log.warning("%s is left out: %s", person.label, error.message)
    return known


def brain_mask(base: Template) -> np.ndarray:
    """(X, Y, Z) bool: the base's brain, where its mask or, without one, its image is not 0."""
    return np.asarray(base.brain.data > 0 if base.mask is None else base.mask.data > 0.5)


def build(
    scan: Path, name: str, base: Template, grid: Grid, cache: Path, device: str = "auto"
) -> Path:
    """Prepare one scan and write it into ``cache``; an existing file is kept.

    ``base`` has labels.
    """
    assert base.labels is not None
    given = labels_beside(scan)
    key = sha256(scan) if given is None else fingerprint([sha256(scan), sha256(given[0])])
    shape = [*grid.shape, *grid.affine.ravel().tolist()]
    content = [FORMAT, REVISION, store.made_by(HOW), base.sha256, shape, key]
    content.append(given[1] if given else find_weights()[2])
    return store.once(
        store.stored_path(cache, name, content),
        name,
        lambda: _arrays(scan, name, base, grid, key, device),
    )


@cache
def labeller() -> Model:
    """The released network: one definition of structures for all people."""
    return models.load(Model)


def _arrays(
    scan: Path, name: str, base: Template, grid: Grid, key: str, device: str
) -> dict[str, Any]:
    given, loaded = labels_beside(scan), load_scan(scan)
    parcellation = load_parcellation(BASE)
    with work_folder() as work:
        prepared = prepare(loaded, [base], HOW, Path(work))
    conditions = prepared.conditions
    image, inside = conditions.image, conditions.mask.data
    if given:
        path, scheme = given
        mapping = load_scheme(scheme, parcellation)
        drawn = load_classes(path, parcellation, mapping, option=f"seg-{scheme}")
        check_same_grid(path.name, drawn.grid, scan.name, loaded.t1.grid)
        classes = resample_labels(drawn, image.grid)
    else:
        p, _ = class_probabilities(conditions, labeller(), HOW.sample, device_name=device)
        classes = Volume(p.most_probable() * inside, image.grid)
    if not classes.data.any():
        raise DataError("no structure is labelled in the brain", "remove this scan's label map")
    assert conditions.field is not None
    trusted = prepared.registrations[0].transform.trusted
    return {"name": name, "key": key, "trusted": trusted} | arrays_of(
        image, classes, pool(conditions.field.data, STRIDE), parcellation, base, grid
    )


def arrays_of(
    image: Volume,
    classes: Volume,
    field: np.ndarray,
    parcellation: Parcellation,
    base: Template,
    grid: Grid,
) -> dict[str, Any]:
    """What is stored of a person's ``image`` and ``classes`` at 1 mm and field at 4 mm.

    ``base`` has labels.
    """
    fine, coarse = image.grid, image.grid.coarsen(2 * STRIDE)
    mask = pool((classes.data > 0)[None].astype(np.float32), 2 * STRIDE)[0] > 0.5
    assert base.labels is not None
    fit = fit_velocity(field.astype(np.float32), mask, coarse, base.frame, grid)
    codes = Volume(parcellation.codes[classes.data], fine)
    own, theirs = (Shares.of(labels, TOGETHER) for labels in (codes, base.labels))
    velocity, folded = fit_structures(fit.velocity_mm, fit.affine, own, theirs, grid)
    counts = np.bincount(classes.data.ravel(), minlength=parcellation.n_classes)[1:]
    small = fine.coarsen(STRIDE)
    return {
        "velocity": velocity.astype(np.float16),
        "residual_mm": fit.residual_mm,
        "folded": folded,
        "codes": parcellation.codes[1:],
        "volumes_mm3": counts * fine.voxel_volume_mm3,
        "image": np.round(resample(image, small).data * 255).astype(np.uint8),
        "classes": resample_labels(classes, small).data.astype(np.uint8),
        "affine": small.affine,
    }


def load(path: Path, grid: Grid) -> PreparedPerson:
    """Read a person that ``build`` wrote."""
    stored = store.read(path)
    small = Grid(stored["image"].shape, stored["affine"])
    volumes = zip(stored["codes"].tolist(), stored["volumes_mm3"].tolist(), strict=True)
    assert stored["velocity"].shape[1:] == grid.shape
    return PreparedPerson(
        str(stored["name"]),
        "",
        stored["velocity"],
        dict(volumes),
        Volume(stored["image"], small),
        Volume(stored["classes"], small),
        float(stored["residual_mm"]),
        int(stored["folded"]),
        bool(stored["trusted"]),
        str(stored["key"]),
    )


def held_out(
    people: Sequence[PreparedPerson], share: float, named: Collection[str] = ()
) -> set[str]:
    """Labels of the people to leave out: a share of each source, evenly spread over age.

    Sources with people in ``named`` (labels) leave out those alone.  Raises ``UsageError`` for a
    name that nobody has.
    """
    if unknown := sorted(set(named) - {p.label for p in people}):
        raise UsageError(
            f"leave_out names {', '.join(unknown)}", f"people are named as {people[0].label}"
        )
    chosen = set(named)
    for source in sorted({p.source for p in people} - {label.split("/")[0] for label in named}):
        mine = [p for p in people if p.source == source]
        mine.sort(key=lambda p: (p.age_years is None, p.age_years or 0.0, p.name))
        # The middle of each stretch of 1 / share people: neither the youngest nor the oldest.
        count = round(len(mine) * share)
        chosen |= {mine[int((k + 0.5) * len(mine) / count)].label for k in range(count)}
    return chosen
