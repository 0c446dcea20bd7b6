"""The volume tables of a result: structures with their expected Dice, and totals."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cadiff_cli.errors import DataError
from cadiff_cli.io.files import read_tsv
from cadiff_cli.labels.parcellation import BASE, base_volumes, load_parcellation
from cadiff_cli.products import Percentile, Result


def names_of(*codes: int) -> tuple[str, ...]:
    """Names of structures of ``BASE``."""
    return tuple(s.name for s in load_parcellation(BASE).structures if s.code in codes)


CORTEX, CEREBRAL_WHITE, CEREBELLAR_CORTEX = (3, 42), (2, 41), (8, 47, 630, 631, 632)
DEEP_GREY = (10, 49, 11, 50, 12, 51, 13, 52, 17, 53, 18, 54, 26, 58, 28, 60)
"""Codes of ``BASE``; FreeSurfer counts the ventral diencephalon too."""
SUMS: Mapping[str, tuple[str, ...]] = {
    "Total-Grey": names_of(*CORTEX, *DEEP_GREY, *CEREBELLAR_CORTEX),
    "Cortex": names_of(*CORTEX),
    "Subcortical-Grey": names_of(*DEEP_GREY),
    "Cerebral-White": names_of(*CEREBRAL_WHITE),
}
"""Sums that papers of volumes give: their structures of ``BASE``."""
ABSORBED = names_of(91, 92, 630, 631, 632)
"""Basal forebrain and vermis: where a network was never taught them, others take them in, and a sum
without them is whole."""
BRAIN, NOT_CSF = "Brain-Segmentation", "Brain-Segmentation-Not-CSF"
BRAIN_MASK, INTRACRANIAL = "Brain-Mask", "Intracranial-Volume"
TOTALS = {
    BRAIN: "All structures but vessels (the brain stem too, unlike BrainSegVol)",
    NOT_CSF: "The same without ventricles and CSF",
    BRAIN_MASK: "The brain mask, with fluid in sulci (MaskVol)",
    INTRACRANIAL: "What the inner skull holds: brain, fluid, vessels and dura, down to the lower"
    " end of the brain stem (FreeSurfer estimates it: EstimatedTotalIntraCranialVol)",
    "Total-Grey": "Cortex, deep grey matter, cortex of the cerebellum with vermis (TotalGrayVol)",
    "Cortex": "Cortex of the cerebrum (CortexVol)",
    "Subcortical-Grey": "Thalamus, caudate, putamen, pallidum, hippocampus, amygdala, accumbens,"
    " ventral diencephalon (SubCortGrayVol)",
    "Cerebral-White": "White matter of the cerebrum (CerebralWhiteMatterVol)",
}
"""Volumes that are no structures', with FreeSurfer's names for them: they have a table apart."""

ORDINALS = {"3rd": "third", "4th": "fourth", "5th": "fifth"}
PERCENTILE = {
    "percentile": "Per cent of people of the same age and sex in whom it is smaller, as a share of"
    " the brain (the brain itself: in mm3). n/a where the age is unknown or outside that of the"
    " people, and where nothing is known of the structure",
    "percentile_low": "Lower end of the percentile's 95 % confidence interval: few people were"
    " measured",
    "percentile_high": "Upper end of the percentile's 95 % confidence interval",
}
"""Columns of the volume tables."""


@dataclass(frozen=True)
class Row:
    """A line of a volume table; totals have no ``code``.

    ``mm3`` is None if the network never draws the structure, ``expected_dice`` if the structure is
    absent, ``usual_dice`` if it was not measured, ``sd_mm3`` if only one sample was drawn.
    """

    code: int | None
    name: str
    mm3: float | None
    expected_dice: float | None = None
    usual_dice: float | None = None
    sd_mm3: float | None = None


def column(name: str) -> str:
    """A structure's column, a name that formulas and attributes may have.

    >>> column("Left-Cerebral-White-Matter"), column("3rd-Ventricle")
    ('left_cerebral_white_matter', 'third_ventricle')
    """
    first, *others = name.lower().split("-")
    return "_".join([ORDINALS.get(first, first), *others])


def volume_rows(result: Result) -> Iterator[dict[str, object]]:
    """Rows of the table of structures.

    Missing values are left out; structures that the network never draws have no volume either.
    """
    segmentation, volumes = result.segmentation, result.volumes_mm3
    parcellation, calibrate = segmentation.parcellation, result.calibration
    brain = parcellation.brain_mm3(volumes)
    held = intracranial_mm3(result)
    for s in parcellation.structures:
        one = {"index": s.code, "name": s.name, "abbreviation": s.abbreviation}
        if (mm3 := result.mm3(s.code)) is None:
            yield one
            continue
        measured = {"volume_mm3": mm3, "percent_brain": 100 * mm3 / brain if brain else None}
        measured["percent_intracranial"] = 100 * mm3 / held if held else None
        # Calibrations are of whole structures: the Dice of a part is as the network expects it.
        known = None if s.is_part else calibrate
        measured["usual_dice"] = known.usual.get(s.name) if known else None
        if (raw := segmentation.expected_dice.get(s.code)) is not None:
            measured["expected_dice"] = known(s.name, raw) if known else raw
        measured["volume_sd_mm3"] = segmentation.volume_sd_mm3.get(s.code)
        shown = {key: f"{x:.3f}" for key, x in measured.items() if x is not None}
        yield one | shown | percentile_cells(result.percentiles.get(s.name))


def intracranial_mm3(result: Result) -> float | None:
    """Volume within the inner skull; None where it is not known."""
    held = result.intracranial
    return None if held is None else np.count_nonzero(held.data) * held.grid.voxel_volume_mm3


def whole_sum(volumes: Mapping[str, float], names: Sequence[str]) -> float | None:
    """The sum of some structures' volumes; None if one is unknown, unless others take it in."""
    known = [volumes[name] for name in names if name in volumes]
    whole = all(name in volumes or name in ABSORBED for name in names)
    return sum(known) if known and whole else None


def total_rows(result: Result) -> Iterator[dict[str, object]]:
    """Rows of the table of totals; a sum has no volume if a part of it was never taught."""
    volumes, parcellation = result.volumes_mm3, result.segmentation.parcellation
    brain, mask = parcellation.brain_mm3(volumes), result.mask
    held = intracranial_mm3(result)
    csf = sum(volumes[s.code] for s in parcellation.structures if s.is_csf)
    totals: dict[str, float | None] = {
        BRAIN: brain,
        NOT_CSF: brain - csf,
        BRAIN_MASK: np.count_nonzero(mask.data) * mask.grid.voxel_volume_mm3,
        INTRACRANIAL: held,
    }
    own = parcellation.name == BASE
    taught = {
        s.name: mm3
        for s in parcellation.structures
        if (own or s.parent is not None) and (mm3 := result.mm3(s.code)) is not None
    }
    known = base_volumes(taught, parcellation)
    totals |= {name: whole_sum(known, names) for name, names in SUMS.items()}
    for name in TOTALS:
        mm3 = totals[name]
        yield {
            "name": name,
            "volume_mm3": None if mm3 is None else f"{mm3:.3f}",
            "percent_brain": f"{100 * mm3 / brain:.3f}" if brain and mm3 is not None else None,
            "percent_intracranial": f"{100 * mm3 / held:.3f}" if held and mm3 is not None else None,
            **percentile_cells(result.percentiles.get(name)),
        }


def percentile_cells(found: Percentile | None, prefix: str = "") -> dict[str, str]:
    """Cells of the columns ``PERCENTILE``, whose names begin with ``prefix``; empty without one."""
    if found is None:
        return {}
    values = (found.value, found.low, found.high)
    names = (f"{prefix}{name}" for name in PERCENTILE)
    return {name: f"{x:.1f}" for name, x in zip(names, values, strict=True)}


def about_expected_dice(result: Result) -> dict[str, Any]:
    """The sidecar's description of the column ``expected_dice``."""
    calibration = result.calibration
    return {
        "Description": "Dice to expect, from the probabilities of the network"
        + (", calibrated to true Dice" if calibration else "; not calibrated for these weights"),
        "Calibrated": calibration is not None,
        **({"MeasuredOn": calibration.people} if calibration else {}),
    }


def read_rows(structures: Path, totals: Path | None = None) -> tuple[Row, ...]:
    """Read the rows of the tables of a result: structures, then totals.

    Up to revision 8 one table held both, and had ``-`` in the names of columns.  Raises
    ``DataError`` if a file is no such table.
    """
    found = [*_read(structures)]
    if totals is not None and totals.is_file():
        found += _read(totals)
    return tuple(found)


def _read(path: Path) -> Iterator[Row]:
    try:
        for line in read_tsv(path):
            cells = {key.replace("-", "_"): value for key, value in line.items()}
            code = cells.get("index", "n/a")
            yield Row(
                None if code == "n/a" else int(code),
                cells["name"],
                _number(cells["volume_mm3"]),
                *(
                    _number(cells.get(name, "n/a"))
                    for name in ("expected_dice", "usual_dice", "volume_sd_mm3")
                ),
            )
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} is not a volume table ({error})",
            "delete it and run the participant level again",
        ) from error


def _number(cell: str) -> float | None:
    if cell == "n/a":
        return None
    if not 0 <= (value := float(cell)) < np.inf:
        raise ValueError(f"{cell} is no volume, share or Dice")
    return value
