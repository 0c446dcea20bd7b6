"""Measure how well ranges of all ages (``cadiff_cli/data/ranges``) fit people of known age.

    python tools/measure_age_ranges.py TABLE

TABLE is one of ``cadiff ranges train``, which prints the same figures of its curves for people who
were left out.  Ranges are mean and standard deviation of the logarithm, so they have percentiles.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy.special import ndtri

from cadiff_cli.io.cohorts import parcellation_in, read_cohort
from cadiff_cli.quality.age_fit import PERCENTILES
from cadiff_cli.quality.age_ranges import sizes
from cadiff_cli.quality.ranges import AGE_GROUPS, load_ranges


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    path = parser.parse_args().table
    parcellation = parcellation_in([path])
    cohort, ranges = read_cohort([path], parcellation), load_ranges(parcellation)
    ages = np.array([person.age_years for person in cohort.persons])
    measured = sizes({name: np.array(v) for name, v in cohort.mm3.items()}, parcellation)
    levels = np.array(PERCENTILES) / 100
    below, loss, far = [], [], np.zeros(len(ages), bool)
    for name, span in ranges.percent_brain.items():
        error = np.log(measured[name] / span.centre)[:, None] - ndtri(levels) * span.log_sd
        below.append(error < 0)
        loss.append(np.maximum(levels * error, (levels - 1) * error))
        far |= (measured[name] < span.low) | (measured[name] > span.high)
    for group, (low, high) in {"all": (0, np.inf), **AGE_GROUPS}.items():
        rows = (ages >= low) & (ages < high)
        coverage = " ".join(f"{100 * x:.1f}" for x in np.mean(below, axis=0)[rows].mean(axis=0))
        pinball, implausible = np.array(loss)[:, rows].mean(), 100 * far[rows].mean()
        print(f"{group}\t{rows.sum()}\t{coverage}\t{pinball:.4f}\t{implausible:.1f}")


if __name__ == "__main__":
    main()
