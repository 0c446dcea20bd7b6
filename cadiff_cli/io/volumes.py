"""The volume table: every structure of a result, the aggregates, and what Dice to expect."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from cadiff_cli.config import Config
from cadiff_cli.metrics.quality import Calibration, load_calibration
from cadiff_cli.products import Result

AGGREGATES = {
    "Brain-Segmentation": "Sum of all structures but vessels",
    "Brain-Segmentation-Not-CSF": "The same without ventricles and CSF",
    "Brain-Mask": "Volume of the brain mask, with sulcal CSF",
}


def volume_rows(result: Result) -> Iterator[dict[str, object]]:
    """Rows of the volume table: every structure, then the aggregates.

    Values that there are none of are left out: the volumes too of structures that the network never
    draws.
    """
    made, volumes = result.segmentation, result.volumes_mm3
    parcellation, calibrate = made.parcellation, calibration(result.config, result.model.sha256)
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


def calibration(config: Config, weights_sha256: str) -> Calibration | None:
    """What turns expected into true Dice for these weights, if it was measured.

    It was with a network that is given the field: the prior alone (``--steps 0``) and a field that
    the network has to find (``--registration none``) have probabilities of another kind.
    """
    alike = config.sample.steps and config.register.name != "none"
    return load_calibration(weights_sha256) if alike else None


def about_expected_dice(result: Result) -> dict[str, Any]:
    """What the column ``expected-dice`` holds."""
    found = calibration(result.config, result.model.sha256)
    return {
        "Description": "Dice to expect, from the probabilities of the network"
        + (", calibrated to true Dice" if found else "; not calibrated for these weights"),
        "Calibrated": found is not None,
        **({"MeasuredOn": found.people} if found else {}),
    }
