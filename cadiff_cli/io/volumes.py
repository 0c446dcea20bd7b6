"""The volume table: the structures of a result with their expected Dice, and the aggregates."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cadiff_cli.errors import DataError
from cadiff_cli.products import Percentile, Result

AGGREGATES = {
    "Brain-Segmentation": "Sum of all structures but vessels",
    "Brain-Segmentation-Not-CSF": "The same without ventricles and CSF",
    "Brain-Mask": "Volume of the brain mask, with sulcal CSF",
}

PERCENTILE = {
    "percentile": "Per cent of people of the same age and sex in whom it is smaller, as a share of"
    " the brain (the brain itself: in mm3). n/a where the age is unknown or outside that of the"
    " people, and where nothing is known of the structure",
    "percentile_low": "Lower end of the percentile's 95 % confidence interval: few people were"
    " measured",
    "percentile_high": "Upper end of the percentile's 95 % confidence interval",
}
"""Columns of the volume table."""


@dataclass(frozen=True)
class Row:
    """A line of the volume table; aggregates have no ``code``.

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
    """A structure's column: ``Left-Cerebral-White-Matter`` -> ``left_cerebral_white_matter``."""
    return name.lower().replace("-", "_")


def volume_rows(result: Result) -> Iterator[dict[str, object]]:
    """Rows of the volume table: every structure, then the aggregates.

    Missing values are left out; structures that the network never draws have no volume either.
    """
    segmentation, volumes = result.segmentation, result.volumes_mm3
    parcellation, calibrate = segmentation.parcellation, result.calibration
    drawable = result.model.structures
    brain = sum(volumes[s.code] for s in parcellation.structures if s.is_tissue)
    csf = sum(volumes[s.code] for s in parcellation.structures if s.is_csf)
    mask = np.count_nonzero(result.mask.data) * result.mask.grid.voxel_volume_mm3

    def row(name: str, mm3: float, **values: object) -> dict[str, object]:
        share = f"{100 * mm3 / brain:.3f}" if brain else None
        return {
            "name": name,
            "volume-mm3": f"{mm3:.3f}",
            "percent-brain": share,
            **percentile_cells(result.percentiles.get(name)),
            **values,
        }

    for s in parcellation.structures:
        if s.code not in drawable and not volumes[s.code]:
            yield {"name": s.name, "index": s.code, "abbreviation": s.abbreviation}
            continue
        measured = {"usual-dice": calibrate.usual.get(s.name) if calibrate else None}
        if (raw := segmentation.expected_dice.get(s.code)) is not None:
            measured["expected-dice"] = calibrate(s.name, raw) if calibrate else raw
        measured["volume-sd-mm3"] = segmentation.volume_sd_mm3.get(s.code)
        shown = {key: f"{x:.3f}" for key, x in measured.items() if x is not None}
        yield row(s.name, volumes[s.code], index=s.code, abbreviation=s.abbreviation, **shown)
    for name, mm3 in zip(AGGREGATES, (brain, brain - csf, mask), strict=True):
        yield row(name, mm3)


def percentile_cells(found: Percentile | None, prefix: str = "") -> dict[str, str]:
    """Cells of the columns ``PERCENTILE``, whose names begin with ``prefix``; empty without one."""
    if found is None:
        return {}
    values = (found.value, found.low, found.high)
    names = (f"{prefix}{name}" for name in PERCENTILE)
    return {name: f"{x:.1f}" for name, x in zip(names, values, strict=True)}


def about_expected_dice(result: Result) -> dict[str, Any]:
    """The sidecar's description of the column ``expected-dice``."""
    calibration = result.calibration
    return {
        "Description": "Dice to expect, from the probabilities of the network"
        + (", calibrated to true Dice" if calibration else "; not calibrated for these weights"),
        "Calibrated": calibration is not None,
        **({"MeasuredOn": calibration.people} if calibration else {}),
    }


def read_rows(path: Path) -> tuple[Row, ...]:
    """Read the rows of a volume table.  Raises ``DataError`` if the file is none."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            return tuple(
                Row(
                    None if line["index"] == "n/a" else int(line["index"]),
                    line["name"],
                    _number(line["volume-mm3"]),
                    *(
                        _number(line.get(name, "n/a"))
                        for name in ("expected-dice", "usual-dice", "volume-sd-mm3")
                    ),
                )
                for line in csv.DictReader(stream, delimiter="\t")
            )
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} is not a volume table ({error})",
            "delete it and run the participant level again",
        ) from error


def _number(cell: str) -> float | None:
    return None if cell == "n/a" else float(cell)
