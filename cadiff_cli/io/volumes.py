"""The volume table: every structure of a result, the aggregates, and what Dice to expect."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cadiff_cli.errors import DataError
from cadiff_cli.products import Result

AGGREGATES = {
    "Brain-Segmentation": "Sum of all structures but vessels",
    "Brain-Segmentation-Not-CSF": "The same without ventricles and CSF",
    "Brain-Mask": "Volume of the brain mask, with sulcal CSF",
}


@dataclass(frozen=True)
class Row:
    """A line of the volume table; aggregates have no ``code``.

    ``mm3`` is None where the network never draws the structure, ``expected_dice`` where a structure
    is absent, ``usual_dice`` where it was not measured, ``sd_mm3`` where one sample was drawn.
    """

    code: int | None
    name: str
    mm3: float | None
    expected_dice: float | None = None
    usual_dice: float | None = None
    sd_mm3: float | None = None


def volume_rows(result: Result) -> Iterator[dict[str, object]]:
    """Rows of the volume table: every structure, then the aggregates.

    Values that there are none of are left out: the volumes too of structures that the network never
    draws.
    """
    made, volumes = result.segmentation, result.volumes_mm3
    parcellation, calibrate = made.parcellation, result.calibration
    taught = result.model.structures
    brain = sum(volumes[s.code] for s in parcellation.structures if s.is_tissue)
    csf = sum(volumes[s.code] for s in parcellation.structures if s.is_csf)
    mask = np.count_nonzero(result.mask.data) * result.mask.grid.voxel_volume_mm3

    def row(name: str, mm3: float, **values: object) -> dict[str, object]:
        share = f"{100 * mm3 / brain:.3f}" if brain else None
        return {"name": name, "volume-mm3": f"{mm3:.3f}", "percent-brain": share, **values}

    for s in parcellation.structures:
        if s.code not in taught and not volumes[s.code]:
            yield {"name": s.name, "index": s.code, "abbreviation": s.abbreviation}
            continue
        measured = {"usual-dice": calibrate.usual.get(s.name) if calibrate else None}
        if (raw := made.expected_dice.get(s.code)) is not None:
            measured["expected-dice"] = calibrate(s.name, raw) if calibrate else raw
        measured["volume-sd-mm3"] = made.volume_sd_mm3.get(s.code)
        shown = {key: f"{x:.3f}" for key, x in measured.items() if x is not None}
        yield row(s.name, volumes[s.code], index=s.code, abbreviation=s.abbreviation, **shown)
    for name, mm3 in zip(AGGREGATES, (brain, brain - csf, mask), strict=True):
        yield row(name, mm3)


def about_expected_dice(result: Result) -> dict[str, Any]:
    """What the column ``expected-dice`` holds."""
    found = result.calibration
    return {
        "Description": "Dice to expect, from the probabilities of the network"
        + (", calibrated to true Dice" if found else "; not calibrated for these weights"),
        "Calibrated": found is not None,
        **({"MeasuredOn": found.people} if found else {}),
    }


def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a volume table.  Raises ``DataError`` if it is not one."""
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
