"""Register images with ANTs.  The only module that imports ants.

ITK works in LPS millimetres; ``_to_ants`` and ``_empty`` are where the convention changes.
"""

import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import repeat
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cadiff_cli import machine
from cadiff_cli.config import RegisterConfig
from cadiff_cli.data import shipped
from cadiff_cli.errors import DataError, DiskError, OutputError, UsageError
from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.processes import Each, children, may_have_children
from cadiff_cli.products import Registered, Stripped, Template, Transform
from cadiff_cli.quality.limits import POOR_SCORE
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.information import normalised_information
from cadiff_cli.spatial.resample import all_voxels, corners, grid_around, resample

log = logging.getLogger(__name__)

ITK_ERRORS = (RuntimeError, ValueError, FileNotFoundError)
"""What ANTs raises where an image cannot be registered; the last for a transform not written."""
TRANSFORM_BYTES = 10_000_000
"""With less, a disk is full: the transforms of one registration take more."""
UNUSED = ("ants.deeplearn", "ants.learn", "ants.math", "ants.plotting")
"""Parts of ANTs that nothing here needs.  They import matplotlib, scikit-learn and statsmodels:
three quarters of the time that it takes to import ANTs, and 140 MB."""
OWN_SETTINGS = ("description", "spacing_mm", "margin_mm")
"""What ANTsPy's ``registration`` is not told."""
NAME = "found_"
"""How the files that ANTs writes begin."""
PLAIN = re.compile(r"[\w./@+-]+", re.ASCII)
"""Paths that mean the same to ANTs, which builds ``[A,B]`` of them, and to its glob patterns."""
PLAIN_PLACES = ("/tmp", "/var/tmp", "/dev/shm")
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])


def settings(name: str) -> dict[str, Any]:
    """Named registration settings (``data/registration/NAME.json``)."""
    folder = shipped("registration")
    path = folder.joinpath(f"{name}.json")
    if not path.is_file():
        known = sorted(p.name.removesuffix(".json") for p in folder.iterdir())
        raise UsageError(f"unknown registration {name!r}", f"choose from {', '.join(known)}")
    values = dict(json.loads(path.read_text(encoding="utf-8")))
    if first := values.pop("after", None):  # it begins with the stages of other settings
        values["stages"] = [*settings(first)["stages"], *values["stages"]]
    return values


def register(
    fixed: Volume,
    moving: Volume,
    config: RegisterConfig,
    folder: Path,
    name: str = "the moving image",
) -> Transform:
    """Register ``moving`` to ``fixed``: two images, 0 outside the object that both show.

    Transforms are written into ``folder``; ``name`` is what messages call the moving image.  If a
    deformable registration fails, the affine one is used, with a note.  Raises ``DataError`` if
    that fails too, ``DiskError`` on a full disk, ``UsageError`` for unknown settings.
    """
    notes: list[Note] = []
    folder.mkdir(parents=True, exist_ok=True)
    for kind in dict.fromkeys((config.name, "affine")):
        try:
            forward, inverse = _run(fixed, moving, settings(kind), config.seed, folder)
            break
        except ITK_ERRORS as error:
            if (free := shutil.disk_usage(folder).free) < TRANSFORM_BYTES:
                raise DiskError(
                    f"{folder} has {free / 1e6:.0f} MB left, and the registration failed",
                    "free some, or choose another folder (-w, or TMPDIR)",
                ) from error
            if kind == "affine":
                raise DataError(
                    f"{name} cannot be registered ({_first_line(error)})",
                    "is this a T1-weighted brain?",
                ) from error
            text = f"deformable registration failed ({_first_line(error)}); affine is used"
            notes.append(Note(NoteCode.AFFINE_ONLY, text))
    transform = Transform(forward, inverse, kind, 0.0)
    warped = warp(moving, transform, fixed.grid.coarsen(2))
    score = similarity(resample(fixed, warped.grid).data, warped.data)
    if score < POOR_SCORE:
        text = (
            f"the score {score:.3f} of the registration to {name} is below {POOR_SCORE}:"
            " look at the result with care"
        )
        notes.append(Note(NoteCode.POOR_SCORE, text))
    trusted = kind == config.name and score >= POOR_SCORE
    transform = Transform(forward, inverse, kind, score, trusted, tuple(notes))
    _tell(transform)
    return transform


def _tell(transform: Transform) -> None:
    """Log the score and the notes of a registration."""
    log.info("registration score (normalised mutual information) %.3f", transform.score)
    for note in transform.notes:
        log.warning(note.text)


def register_template(
    stripped: Stripped, template: Template, config: RegisterConfig, work_dir: Path
) -> Registered:
    """Register a template's brain to the scan's; transforms go into a folder of its name."""
    folder = work_dir / template.label
    transform = register(stripped.t1, template.brain, config, folder, template.name)
    return Registered(template, transform)


def register_templates(
    stripped: Stripped,
    templates: Sequence[Template],
    config: RegisterConfig,
    work_dir: Path,
    each: Each | None = None,
) -> tuple[Registered, ...]:
    """Register every template; side by side with the ``each`` of ``registrars``.

    The transforms are the same to the bit either way: every process uses one ITK thread.
    """
    if each is None:
        return tuple(register_template(stripped, t, config, work_dir) for t in templates)
    transforms = each(
        register,
        repeat(stripped.t1),
        [template.brain for template in templates],
        repeat(config),
        [work_dir / template.label for template in templates],
        [template.name for template in templates],
    )
    registrations = tuple(map(Registered, templates, transforms))
    for registered in registrations:
        _tell(registered.transform)
    return registrations


@contextmanager
def registrars(jobs: int) -> Iterator[Each | None]:
    """Processes that register ``jobs`` templates at a time; they import ANTs at once.

    Gives None for a single one, where this process may have no children, and where the user wants
    several ITK threads.
    """
    if jobs < 2 or not may_have_children() or os.environ.get(machine.ITK_THREADS, "1") != "1":
        yield None
        return
    with children(jobs, begin=import_ants) as each:
        yield each


def warp(
    volume: Volume,
    transform: Transform,
    grid: Grid,
    *,
    inverse: bool = False,
    fill: float = 0.0,
    interpolator: str = "linear",
) -> Volume:
    """Resample an image in the moving world onto ``grid`` in the fixed world; ``inverse`` reverses.

    Label maps want ``interpolator="genericLabel"``: the label that weighs most at each point.
    ITK knows no sheared grids: they are reached, and left, by way of an orthogonal one.
    """
    ants = _ants()
    path = transform.to_moving if inverse else transform.to_fixed
    order = 0 if interpolator == "genericLabel" else 1
    if volume.grid.is_sheared:
        volume = resample(volume, upright(volume.grid), order=order, fill=fill)
    if grid.is_sheared:
        options: dict[str, Any] = {"inverse": inverse, "fill": fill, "interpolator": interpolator}
        near = warp(volume, transform, upright(grid), **options)
        return resample(near, grid, order=order, fill=fill)
    with plainly(path.parent) as folder, _quiet():
        moved = ants.apply_transforms(
            _empty(grid),
            _to_ants(volume),
            [str(folder / path.name)],
            interpolator=interpolator,
            defaultvalue=fill,
        )
    return Volume(moved.numpy(), grid)


def upright(grid: Grid) -> Grid:
    """The working grid of a sheared one, as large as it takes to hold every voxel's centre."""
    working = grid.working()
    ends = corners(all_voxels(grid.shape), working.voxel_map(grid))
    start = np.floor(ends.min(axis=1)).astype(int)
    x, y, z = np.ceil(ends.max(axis=1)).astype(int) - start + 1
    return working.crop(tuple(start), (int(x), int(y), int(z)))


def rigid(fixed: Volume, moving: Volume, seed: int = 0) -> np.ndarray:
    """(4, 4) motion between two images of one brain: RAS mm of ``fixed`` -> RAS mm of ``moving``.

    Found at 2 mm by mutual information: 0.02 mm of a known motion was left on a 1 mm brain.  A
    search that ended at 4 mm left up to 3 mm where a brain is nearly round.  Raises ``DataError``
    if ANTs fails.
    """
    wanted = {"type_of_transform": "Rigid", "spacing_mm": 2.0}
    with machine.work_folder() as work:
        try:
            forward, _ = _run(fixed, moving, wanted, seed, Path(work))
            with plainly(forward.parent) as folder:
                transform = _ants().read_transform(str(folder / forward.name))
        except ITK_ERRORS as error:
            raise DataError(
                f"the two scans cannot be aligned ({_first_line(error)})",
                "are they T1-weighted images of one brain?",
            ) from error
    # Where the origin and the ends of the axes go says everything about a linear map.
    ends = np.vstack([np.eye(3), np.zeros(3)]) @ RAS_TO_LPS
    x, y, z, origin = np.array([transform.apply_to_point(tuple(p)) for p in ends]) @ RAS_TO_LPS
    motion = np.eye(4)
    motion[:3] = np.stack([x - origin, y - origin, z - origin, origin], axis=1)
    return motion


def n4(image: Volume, mask: Volume) -> np.ndarray:
    """(X, Y, Z) float32: logarithm of the bias that N4 finds in ``image`` within a bool ``mask``.

    Splines of 4 elements a side at the finest of three levels (Tustison 2010).  Both are on one
    coarse grid: nothing is shrunk.
    """
    ants = _ants()
    with _quiet():
        field = ants.n4_bias_field_correction(
            _to_ants(image),
            mask=_to_ants(mask),
            shrink_factor=1,
            convergence={"iters": [50, 50, 50], "tol": 1e-7},
            return_bias_field=True,
        )
    return np.asarray(np.log(np.maximum(field.numpy(), 1e-6)))


def joint_vote(
    image: np.ndarray,
    mask: np.ndarray,
    atlas_images: Sequence[np.ndarray],
    atlas_classes: Sequence[np.ndarray],
    *,
    radius: int,
    search: int,
    beta: float,
) -> np.ndarray:
    """(X, Y, Z): the class that joint label fusion gives each voxel of ``mask``, 0 outside.

    Everything is on one grid; at least two atlases.  ``radius`` and ``search`` are in voxels.
    """
    ants, grid = _ants(), Grid(image.shape, np.eye(4))

    def itk(data: np.ndarray) -> Any:
        return _to_ants(Volume(data, grid))

    with (
        machine.work_folder() as work,
        plainly(Path(work)) as folder,
        _quiet(),
    ):
        fused = ants.joint_label_fusion(
            itk(image),
            itk(mask),
            [itk(data) for data in atlas_images],
            # ANTs never votes for label 0: one more makes background a candidate like any other.
            label_list=[itk(data.astype(np.float32) + 1) for data in atlas_classes],
            rad=radius,
            r_search=search,
            beta=beta,
            output_prefix=f"{folder}/",  # else probabilities of every label stay in /tmp
        )
    labels = fused["segmentation"].numpy()
    return np.where(mask, labels - 1, 0).astype(atlas_classes[0].dtype)


def similarity(a: np.ndarray, b: np.ndarray, bins: int = 32) -> float:
    """Normalised mutual information (H(a) + H(b)) / H(a, b) where either is non-zero; 1 to 2."""
    inside = (a > 0) | (b > 0)
    if np.count_nonzero(inside) < 100:
        return 1.0

    def level(x: np.ndarray) -> np.ndarray:
        top = np.percentile(x, 99.5)
        return np.asarray(np.clip(x / max(top, 1e-6), 0, 1))

    joint, _, _ = np.histogram2d(level(a[inside]), level(b[inside]), bins=bins)
    return round(normalised_information(joint), 4)


def _run(
    fixed: Volume, moving: Volume, wanted: dict[str, Any], seed: int, work_dir: Path
) -> tuple[Path, Path]:
    ants = _ants()
    images = [_to_ants(_seen(volume, wanted)) for volume in (fixed, moving)]
    ants.config._random_seed = seed + 1  # ITK takes 0 as "seed from the clock"
    with plainly(work_dir) as folder, _quiet():
        if stages := wanted.get("stages"):
            ants.registration(_arguments(images, stages, seed + 1, str(folder / NAME)), None)
        else:
            options = {key: value for key, value in wanted.items() if key not in OWN_SETTINGS}
            ants.registration(
                *images, outprefix=str(folder / NAME), write_composite_transform=True, **options
            )
    forward, inverse = work_dir / "to_fixed.h5", work_dir / "to_moving.h5"
    shutil.move(work_dir / f"{NAME}Composite.h5", forward)
    shutil.move(work_dir / f"{NAME}InverseComposite.h5", inverse)
    return forward, inverse


def _seen(volume: Volume, wanted: dict[str, Any]) -> Volume:
    """The image that ANTs registers: of another spacing, cut to a box around what is not 0."""
    spacing = float(wanted["spacing_mm"])
    grid = volume.grid.working(spacing, tolerance=0.0)
    coarse = resample(volume, grid)
    if "margin_mm" not in wanted:
        return coarse
    margin = round(float(wanted["margin_mm"]) / spacing)
    return resample(coarse, grid_around(coarse.data != 0, grid, margin))


def _arguments(
    images: Sequence[Any], stages: Sequence[dict[str, str]], seed: int, prefix: str
) -> list[str]:
    """Arguments of ``antsRegistration``: the centres of mass, then one stage after the other."""
    from ants.internal import get_pointer_string

    both = ",".join(map(get_pointer_string, images))
    arguments = {
        "dimensionality": "3",
        "float": "1",
        "random-seed": str(seed),
        "initial-moving-transform": f"[{both},1]",
        "write-composite-transform": "1",
        "output": prefix,
    }
    listed = [arguments, *stages]
    pairs = ((key, value) for stage in listed for key, value in stage.items())
    return [part for key, value in pairs for part in (f"--{key}", value.replace("{images}", both))]


def _to_ants(volume: Volume) -> Any:
    ants = _ants()
    lps = RAS_TO_LPS @ volume.grid.affine[:3, :3]
    spacing = np.linalg.norm(lps, axis=0)
    return ants.from_numpy(
        np.ascontiguousarray(volume.data, dtype=np.float32),
        origin=tuple(RAS_TO_LPS @ volume.grid.affine[:3, 3]),
        spacing=tuple(spacing),
        direction=_orthonormal(lps / spacing),
    )


def _empty(grid: Grid) -> Any:
    return _to_ants(Volume(np.zeros(grid.shape, dtype=np.float32), grid))


def _orthonormal(matrix: np.ndarray) -> np.ndarray:
    """The nearest rotation or reflection: ITK refuses directions that are off by rounding."""
    u, _, v = np.linalg.svd(matrix)
    return np.asarray(u @ v)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def import_ants() -> None:
    """Import ANTs now: that takes seconds."""
    _ants()


def _ants() -> Any:
    """The ants module, imported with one ITK thread unless the user set another number.

    ITK reads the number once per process.  With more threads its sums are added in changing order,
    and the same seed gives slightly different transforms.
    """
    os.environ.setdefault(machine.ITK_THREADS, "1")
    if "ants" not in sys.modules:
        sys.modules.update({part: ModuleType(part) for part in UNUSED})
        try:
            import ants
        finally:
            for part in UNUSED:
                del sys.modules[part]
        ants.__getattr__ = _other_part
    return sys.modules["ants"]


def _other_part(name: str) -> Any:
    """A name of the ants module in one of the parts that were left out, for other users of it."""
    ants = sys.modules["ants"]
    if name.startswith("__"):
        raise AttributeError(name)
    for part in UNUSED:
        module = vars(import_module(part))
        vars(ants).update({k: v for k, v in module.items() if not k.startswith("_")})
    vars(ants).pop("__getattr__", None)
    return getattr(ants, name)


@contextmanager
def plainly(folder: Path) -> Iterator[Path]:
    """``folder`` under a name without ANTs' own signs: its own, or a link's for the time being.

    A batch system's ``TMPDIR`` may be ``/scratch/1234[5].server``.
    """
    if PLAIN.fullmatch(str(folder)):
        yield folder
        return
    places = [place for place in (tempfile.gettempdir(), *PLAIN_PLACES) if PLAIN.fullmatch(place)]
    place = next((place for place in places if os.access(place, os.W_OK | os.X_OK)), None)
    if place is None:
        raise OutputError(
            f"ANTs cannot write to {folder}, nor can a link to it be made in any of {places}",
            "set TMPDIR to a folder of letters, digits and ./_@+- only",
        )
    with machine.work_folder(where=place) as here:
        link = Path(here) / "link"
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield link


@contextmanager
def _quiet() -> Iterator[None]:
    """ANTs writes progress to the process's stdout; keep ours for results."""
    sys.stdout.flush()
    saved = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)
