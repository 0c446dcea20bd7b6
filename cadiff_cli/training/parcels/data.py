"""Hemispheres to learn from, made of prepared scans; right ones are mirrored, and look left."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cadiff_cli.errors import DataError
from cadiff_cli.labels.parcellation import BASE, Parcellation, load_parcellation
from cadiff_cli.stages.parcels import (
    Hemisphere,
    cut,
    hemisphere,
    left_parcels,
    mirrored,
    mirrored_field,
)
from cadiff_cli.training.segmenter.data import Sample, sample_field

NOWHERE = -1
"""The parcel of a voxel that has none."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """A hemisphere as the network sees it, with the truth.

    ``parcels`` (X, Y, Z) int8 are numbers of ``left_parcels``, or ``NOWHERE``; ``fields``
    (templates, 3, X/4, Y/4, Z/4) are those of single templates.
    """

    subject: str
    seen: Hemisphere
    parcels: np.ndarray
    fields: np.ndarray

    @property
    def cortex(self) -> np.ndarray:
        """(n, 3) voxels that have a parcel."""
        return np.argwhere(self.parcels != NOWHERE)


def hemispheres(samples: Iterable[Sample], parcellation: Parcellation) -> list[Labelled]:
    """Both hemispheres of every sample, whose classes are those of ``parcellation``.

    Raises ``DataError`` for a sample without parcels.
    """
    base, left = load_parcellation(BASE), left_parcels(parcellation)
    number = np.full(parcellation.n_classes, NOWHERE, np.int8)
    number[[parcellation.class_of[code] for code in left]] = np.arange(len(left))
    parent = np.zeros(parcellation.n_classes, np.uint8)
    for code, k in parcellation.mapping_to(base).items():
        parent[parcellation.class_of[code]] = k
    found = []
    for sample in samples:
        both = sample_field(sample)
        for right in (False, True):
            drawn, turn = sample.classes, (mirrored_field if right else np.asarray)
            if right:
                drawn = mirrored(drawn, parcellation)
            parcels = number[drawn]
            if (parcels == NOWHERE).all():
                raise DataError(
                    f"{sample.name} has no parcels in its {'right' if right else 'left'} cortex",
                    "remove this scan, or give the scheme of its ids with --labels",
                )
            structures = parent[drawn]
            seen = hemisphere(structures, turn(both))
            shape = np.array(seen.classes.shape)
            single = [
                cut(structures, turn(field.astype(np.float32)), seen.start, shape).field
                for field in sample.fields.values()
            ]
            own = cut(parcels - NOWHERE, both, seen.start, shape).classes + NOWHERE
            found.append(Labelled(sample.subject, seen, own, np.stack(single)))
    return found
