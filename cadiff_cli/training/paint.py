"""Paint T1-weighted brains from label maps, to train on label maps without scans.

A painted brain looks enough like a T1-weighted image to be registered to a template; training then
gives its structures other contrasts, patch by patch (``training/segmenter/synthesis``).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from scipy import ndimage

from cadiff_cli.errors import DataError, MissingInputError, OutputError
from cadiff_cli.io.bids.description import BIDS_VERSION, generated_by
from cadiff_cli.io.files import check_writable, write_json
from cadiff_cli.io.formats import is_folder, stem
from cadiff_cli.io.images import save_volume
from cadiff_cli.io.label_maps import load_ids, say_once
from cadiff_cli.labels.parcellation import BASE, load_parcellation
from cadiff_cli.labels.schemes import load_scheme
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.spatial.resample import bounding_box
from cadiff_cli.training.brain_mask.target import LEAST_BRAIN_LITRES, closed, is_brain

FLUID = 0.22
CSF, CHOROID_PLEXUS, DARK_WHITE_MATTER = 24, 31, 77
T1_BRIGHTNESS: Mapping[int, float] = {
    2: 0.82,  # white matter
    3: 0.54,  # cortex
    4: FLUID,
    5: FLUID,
    7: 0.80,  # cerebellar white matter
    8: 0.52,  # cerebellar cortex
    10: 0.66,  # thalamus
    11: 0.57,  # caudate
    12: 0.61,  # putamen
    13: 0.72,  # pallidum
    14: FLUID,
    15: FLUID,
    16: 0.75,  # brain stem
    17: 0.54,  # hippocampus
    18: 0.53,  # amygdala
    CSF: FLUID,
    26: 0.56,  # accumbens
    28: 0.71,  # ventral diencephalon
    30: 0.40,  # vessel
    CHOROID_PLEXUS: 0.33,
    DARK_WHITE_MATTER: 0.62,
    85: 0.68,  # chiasm
    91: 0.60,  # basal forebrain
    630: 0.52,  # vermis
    631: 0.52,
    632: 0.52,
}
"""Brightness (0 to 1) in a T1-weighted image, by the code of the left or unpaired structure: the
usual order of tissues, not measured on a scan."""
UNLIKE_THEIR_STRUCTURE: Mapping[int, int] = {
    **dict.fromkeys((31, 63, 136, 137, 163, 164), CHOROID_PLEXUS),
    **dict.fromkeys((25, 57, 77, 78, 79), DARK_WHITE_MATTER),
}
"""Codes that are painted differently from the structure to which ``synthseg`` maps them."""
BETWEEN_PEOPLE, WITHIN, PATCHY = 0.02, 0.02, 0.02
"""Standard deviations of brightness: of a tissue's mean, of its voxels, of its regions."""
BLUR_MM, GRAIN_MM, REGION_MM = 0.7, 0.7, 6.0
"""Standard deviations of the Gaussians for borders, for the voxels' noise and for regions."""


def tissues() -> dict[int, int]:
    """Code of a label map -> code of the tissue that it is painted as (``T1_BRIGHTNESS``).

    Left and right, and all parcels of a structure, are one tissue.
    """
    parcellation = load_parcellation(BASE)
    structure = {
        code: parcellation.left_codes[int(parcellation.codes[abs(k)])]
        for code, k in load_scheme("synthseg", parcellation).items()
    }
    return structure | dict(UNLIKE_THEIR_STRUCTURE)


def whole_codes(dseg: Volume) -> np.ndarray:
    """(X, Y, Z) int32 codes of a label map; raises ``DataError`` unless they show a brain."""
    codes = np.rint(dseg.data).astype(np.int32)
    brain, tissue_of = is_brain(codes), tissues()
    if (litres := Volume(brain, dseg.grid).litres) < LEAST_BRAIN_LITRES:
        raise DataError(
            f"{litres:.3f} l of the label map are brain", "give label maps of whole brains"
        )
    present = np.unique(codes[brain]).tolist()
    unknown = [code for code in present if code not in tissue_of]
    if len(unknown) == len(present):
        raise DataError(f"FreeSurfer has no structures {unknown[:5]}", "translate its codes")
    if unknown:
        say_once(f"codes {unknown} are unknown: painted as fluid")
    return np.asarray(codes)


def paint_t1(dseg: Volume, draw: np.random.Generator) -> tuple[Volume, Volume]:
    """Paint a stripped T1-weighted image; return it and the labels in its mask, on the map's grid.

    ``dseg`` (X, Y, Z) holds FreeSurfer's codes, and codes of 500 to 999 for tissue around a brain.
    The mask is the labelled brain, ``closed``.  The image (X, Y, Z) is int16: 1 to 1000 in the
    mask, 0 outside.  Labels (X, Y, Z) are int32.  Raises the errors of ``whole_codes``.
    """
    codes, spacing_mm, tissue_of = whole_codes(dseg), dseg.grid.spacing_mm, tissues()
    brain = is_brain(codes)
    mask = closed(brain, spacing_mm)
    box = bounding_box(mask)
    present, index = np.unique(np.where(brain, codes, CSF)[box], return_inverse=True)
    of_code = [tissue_of.get(int(code), CSF) for code in present]
    level = {
        k: T1_BRIGHTNESS[k] + BETWEEN_PEOPLE * draw.standard_normal() for k in sorted(set(of_code))
    }
    means = np.array([level[k] for k in of_code])[index].reshape(mask[box].shape)
    image = ndimage.gaussian_filter(means, BLUR_MM / spacing_mm)
    for strength, width_mm in ((WITHIN, GRAIN_MM), (PATCHY, REGION_MM)):
        noise = ndimage.gaussian_filter(draw.standard_normal(image.shape), width_mm / spacing_mm)
        image += strength * noise / noise.std()
    painted = np.zeros(mask.shape, dtype=np.int16)
    # Even the darkest voxel of a brain is above 0, the background.
    painted[box] = np.where(mask[box], np.rint(1000 * image.clip(0.001, 1)), 0)
    labels = np.where(mask & (brain | (codes == CSF)), codes, 0)
    return Volume(painted, dseg.grid), Volume(labels, dseg.grid)


def paint_dataset(label_maps: Path, dataset: Path, seed: int = 0) -> Iterator[Path]:
    """Paint every NIfTI label map of a folder; yields each image's path when it is written.

    ``dataset`` gets ``sub-NAME/anat/sub-NAME_T1w.nii.gz`` and ``..._dseg.nii.gz``; NAME is the
    label map's name, letters and digits only.  All label maps are checked before any file is
    written.  Raises ``MissingInputError``, ``DataError``, or ``OutputError`` if ``dataset`` is not
    empty.
    """
    if not is_folder(label_maps):
        raise MissingInputError(f"no folder {label_maps}", "check the path")
    sources: dict[str, Path] = {}
    for path in sorted(label_maps.glob("[!.]*.nii*")):
        name = "".join(c for c in stem(path) if c.isascii() and c.isalnum())
        if not name or name in sources:
            beside = f" and {sources[name].name}" if name else ""
            raise DataError(
                f"{path.name}{beside} would be sub-{name}", "rename it: letters and digits count"
            )
        sources[name] = path
    if not sources:
        raise DataError(f"{label_maps} holds no label maps", "give a folder of NIfTI files")
    if is_folder(dataset) and any(dataset.iterdir()):
        raise OutputError(f"{dataset} is not empty", "give a new folder")
    for path in sources.values():
        dseg, _ = load_ids(path)
        try:
            whole_codes(dseg)
        except DataError as error:
            raise DataError(f"{path.name}: {error.message}", error.remedy) from error
    check_writable(dataset)
    description = {
        "Name": f"Brains painted from the label maps of {label_maps.name}, seed {seed}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        # Not named as segmentations are, so that both are never mixed (``refuse_foreign``).
        "GeneratedBy": [generated_by() | {"Name": "cadiff paint"}],
    }
    write_json(dataset / "dataset_description.json", description)
    for number, (name, path) in enumerate(sources.items()):
        dseg, _ = load_ids(path)
        painted, labels = paint_t1(dseg, np.random.default_rng([seed, number]))
        folder = dataset / f"sub-{name}" / "anat"
        for volume, suffix in ((labels, "dseg"), (painted, "T1w")):
            path = folder / f"sub-{name}_{suffix}.nii.gz"
            save_volume(path, volume.data, volume.grid, labels=suffix == "dseg")
        yield folder / f"sub-{name}_T1w.nii.gz"
