"""Read label maps: check their ids, and turn them into classes."""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from cadiff_cli.errors import DataError, first_few
from cadiff_cli.io.images import load_volume
from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.labels.schemes import load_scheme, scheme_names
from cadiff_cli.spatial.grid import Volume

log = logging.getLogger(__name__)

GREATEST_ID = 9_999_999
"""Greater values are an image's: no program's ids are so large."""
ENOUGH, ALL = 0.9, 0.98
"""Shares of the labelled voxels that a scheme knows: below the first it is the wrong one, if
another knows as much as the second.  Of whole heads none does: our schemes know the brain alone.
DLMUSE's and Neuromorphometrics' know a half of each other's."""
MANY_IDS = 500
"""More ids that nobody knows are an image's."""
ROUNDING = 1e-3
"""Largest distance of an id from a whole number: header scaling causes such errors."""


def load_classes(
    path: Path, parcellation: Parcellation, mapping: Mapping[int, int], *, option: str | None = None
) -> Volume:
    """Read a label map and turn its ids into classes (``Parcellation.dtype``).

    ``mapping`` must hold every id.  For a foreign map, whose scheme of ids the command line's
    ``option`` names, it must hold at least one; other ids become background, with a warning.
    Raises ``DataError``, also for a map whose ids are those of another scheme.
    """
    volume, stored = load_ids(path)
    ids = stored - {0}
    unknown = sorted(ids - set(mapping))
    if option and len(unknown) == len(ids):
        raise DataError(
            f"{path.name} holds no known label id (but {unknown[:5] or 'only 0'})",
            f"name the scheme of its ids with {option}",
        )
    if unknown and not option:
        raise DataError(
            f"{path.name} holds ids {unknown[:5]} that are not in the label table",
            "give a dseg written by cadiff",
        )
    if unknown:
        _refuse_other_scheme(volume, path.name, parcellation, mapping, option or "")
        some = first_few([str(id_) for id_ in unknown], 40)
        say_once(f"ids {some} are in no row of the mapping ({option}): they become background")
    classes = parcellation.encode(np.asarray(volume.data), mapping, volume.grid.spacing_mm)
    return Volume(classes, volume.grid)


def _refuse_other_scheme(
    volume: Volume, name: str, parcellation: Parcellation, mapping: Mapping[int, int], option: str
) -> None:
    """Raise ``DataError`` if a shipped scheme knows few of the voxels, and another all of them.

    A table of the user's own may name a few structures: it is not judged.
    """
    schemes = {name: load_scheme(name, parcellation) for name in scheme_names(parcellation)}
    if mapping not in schemes.values():
        return
    ids, counts = np.unique(volume.data[volume.data != 0], return_counts=True)

    def known(mapping: Mapping[int, int]) -> float:
        return float(counts[np.isin(np.rint(ids), list(mapping))].sum() / counts.sum())

    share = known(mapping)
    if share >= ENOUGH:
        return
    few = f"{100 * share:.0f} % of the labelled voxels of {name} have ids of the scheme"
    if fitting := [scheme for scheme, ids_of in schemes.items() if known(ids_of) > ALL]:
        remedy = f"name the scheme of its ids with {option}"
        raise DataError(f"{few}, {first_few(fitting)} would know all", remedy)
    if np.count_nonzero(~np.isin(np.rint(ids), list(mapping))) > MANY_IDS:
        raise DataError(few, f"give a label map, not an image, or a table of its ids ({option})")


def load_ids(path: Path) -> tuple[Volume, set[int]]:
    """Read a label map as it is stored, and the set of its ids.

    Raises ``DataError`` for values that are no ids, and the errors of ``load_volume``.
    """
    volume = load_volume(path)
    values = np.unique(volume.data).astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity less itself
        whole = np.isfinite(values) & (abs(values - np.rint(values)) < ROUNDING)
    if (odd := values[~whole | (values < -ROUNDING) | (values > GREATEST_ID)]).size:
        raise DataError(
            f"{path.name} holds {odd[0]:g}, which is no label id (0 to {GREATEST_ID})",
            "give a label map, not an image",
        )
    return volume, {round(value) for value in values}


def unknown_ids(path: Path, mapping: Mapping[int, int]) -> set[int]:
    """Ids of a label map that a ``mapping`` does not have: they become background."""
    _, ids = load_ids(path)
    return ids - {0, *mapping}


@cache
def say_once(text: str) -> None:
    """Warn once per text: most label maps of a dataset have the same fault."""
    log.warning(text)
