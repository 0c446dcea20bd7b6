"""Measure ``cadiff_cli/data/ranges/cadiff40.json`` on the manual labels of training people.

    python tools/measure_plausible.py DATASET --leave-out 1014 1018 1107 1122 \\
        > cadiff_cli/data/ranges/cadiff40.json

DATASET is a folder as ``cadiff train`` takes it.  Of a person with several scans the first counts.
Only means and spreads over people are written.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from cadiff_cli.io.bids.labelled import labelled_scans
from cadiff_cli.io.bids.raw import Dataset
from cadiff_cli.io.images import load_volume
from cadiff_cli.labels.parcellation import BASE, load_parcellation
from cadiff_cli.labels.schemes import load_scheme
from cadiff_cli.quality.ranges import measure


def volumes(path, parcellation):
    """mm^3 by name of a Neuromorphometrics label map."""
    labels = load_volume(path)
    classes = parcellation.encode(
        np.asarray(labels.data), load_scheme("neuromorphometrics", parcellation)
    )
    counts = np.bincount(classes.ravel(), minlength=parcellation.n_classes)[1:]
    mm3 = counts * labels.grid.voxel_volume_mm3
    return {s.name: float(v) for s, v in zip(parcellation.structures, mm3, strict=True)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--leave-out", nargs="*", default=[])
    wanted, parcellation = parser.parse_args(), load_parcellation(BASE)
    first: dict[str, Path] = {}
    for scan in labelled_scans(wanted.dataset):
        if scan.subject not in wanted.leave_out:
            first.setdefault(scan.subject, scan.dseg)
    people = f"{len(first)} people of {wanted.dataset.name}, manual labels"
    people_of = Dataset(wanted.dataset).people.of
    ages = [people_of(subject).age_years for subject in first]
    found = measure(
        (volumes(path, parcellation) for path in first.values()),
        parcellation,
        people,
        [age for age in ages if age is not None],
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
