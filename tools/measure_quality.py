"""Measure ``cadiff_cli/data/calibration/cadiff-malc.json``: how expected Dice relates to true Dice.

    python tools/measure_quality.py CACHE_DIR --subjects 1014 1018 1107 1122 \\
        --table measured.tsv --write cadiff_cli/data/calibration/cadiff-malc.json

CACHE_DIR holds scans as ``cadiff train`` prepares them; ``--subjects`` are people whom the network
has never seen.  Each scan is segmented as it is and in ways that scans, masks and registrations go
wrong.  ``--table`` keeps the measurements of one model with one choice of ``--steps`` and
``--flip``: what is in it is not measured again.  ``--without`` names structures whose manual labels
cannot serve as truth.
"""

import argparse
import csv
import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.stats import spearmanr

from cadiff_cli.config import SampleConfig
from cadiff_cli.io import models
from cadiff_cli.io.releases import DEFAULT
from cadiff_cli.metrics.overlap import dice
from cadiff_cli.nets.models import Model
from cadiff_cli.products import CoordinateField
from cadiff_cli.quality.calibration import fit
from cadiff_cli.quality.expected import expected_dice
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.stages.condition import normalise
from cadiff_cli.stages.sampling import class_probabilities
from cadiff_cli.training.monitor import sample_conditions
from cadiff_cli.training.segmenter.data import load

WORDS = ("made_with", "person", "scan", "degradation", "structure")
NUMBERS = ("raw", "dice")


def with_image(conditions, image):
    """Other intensities, scaled as inference scales them."""
    image = normalise(image, conditions.mask.data, conditions.mask.grid.spacing_mm)
    return replace(conditions, image=Volume(image, conditions.image.grid))


def with_mask(conditions, mask):
    """Another brain mask; what it cuts off is black."""
    inside = replace(conditions, mask=Volume(mask, conditions.mask.grid))
    return with_image(inside, conditions.image.data)


def noise(conditions, rng, sd):
    image = conditions.image.data
    return with_image(conditions, image + rng.normal(0, sd, image.shape).astype(np.float32))


def motion(conditions, rng, mm):
    """The head lay in three places while it was scanned: half of the time in the first."""
    image = conditions.image.data
    moved = [ndimage.shift(image, s * mm * direction(rng), order=1) for s in (-1, 1)]
    return with_image(conditions, 0.5 * image + 0.25 * (moved[0] + moved[1]))


def erode(conditions, rng, mm):
    depth = ndimage.distance_transform_edt(conditions.mask.data)
    return with_mask(conditions, depth > mm)


def cut_pieces(conditions, rng, mm):
    """Two balls of radius ``mm`` around points of the border are missing."""
    mask = conditions.mask.data.copy()
    border = np.argwhere(mask & ~ndimage.binary_erosion(mask))
    for centre in border[rng.integers(len(border), size=2)]:
        away = np.indices(mask.shape) - centre.reshape(3, 1, 1, 1)
        mask[(away**2).sum(axis=0) < mm**2] = False
    return with_mask(conditions, mask)


def shift_field(conditions, rng, mm):
    field = conditions.field
    step = mm * direction(rng) / field.grid.spacing_mm
    moved = [ndimage.shift(x, step, order=1, mode="nearest") for x in field.data]
    return replace(conditions, field=CoordinateField(np.stack(moved), field.grid))


def bias(conditions, rng, strength):
    """Brightness changes smoothly, by a factor of ``exp(strength)`` from end to end."""
    scale = [np.linspace(-0.5, 0.5, n) for n in conditions.image.data.shape]
    ramp = sum(d * x for d, x in zip(direction(rng), np.meshgrid(*scale, indexing="ij")))  # noqa: B905
    return with_image(conditions, conditions.image.data * np.exp(strength * ramp))


def gamma(conditions, rng, power):
    return with_image(conditions, conditions.image.data**power)


def coarsen(conditions, rng, mm):
    """Voxels of ``mm``, interpolated back."""
    image, grid = conditions.image.data, conditions.image.grid
    thick = ndimage.uniform_filter(image, mm)[1::mm, 1::mm, 1::mm]
    at = [(np.arange(n) - 1) / mm for n in grid.shape]
    points = np.meshgrid(*at, indexing="ij")
    return with_image(conditions, ndimage.map_coordinates(thick, points, order=1, mode="nearest"))


def direction(rng):
    """(3,) a random unit vector."""
    vector = rng.normal(size=3)
    return vector / np.linalg.norm(vector)


DEGRADATIONS = {
    "none": lambda conditions, rng: conditions,
    **{f"noise {sd}": lambda c, rng, sd=sd: noise(c, rng, sd) for sd in (0.05, 0.1, 0.2)},
    **{f"motion {mm} mm": lambda c, rng, mm=mm: motion(c, rng, mm) for mm in (2, 5)},
    "mask eroded 3 mm": lambda c, rng: erode(c, rng, 3),
    "mask cut 25 mm": lambda c, rng: cut_pieces(c, rng, 25),
    **{f"field off {mm} mm": lambda c, rng, mm=mm: shift_field(c, rng, mm) for mm in (3, 6)},
    "bias 1.0": lambda c, rng: bias(c, rng, 1.0),
    "gamma 2": lambda c, rng: gamma(c, rng, 2.0),
    "voxels 3 mm": lambda c, rng: coarsen(c, rng, 3),
}


def made_with(model, config):
    """What measurements of one table share: weights and settings."""
    return f"{model.sha256[:12]} steps {config.steps}{' flip' if config.flip else ''}"


def measure(path, name, model, config):
    """A row for each structure of a degraded scan, but vessels."""
    sample = load(path)
    seed = zlib.crc32(f"{sample.name} {name}".encode())
    conditions = DEGRADATIONS[name](sample_conditions(sample), np.random.default_rng(seed))
    p, _ = class_probabilities(conditions, model, config)
    drawn = p.most_probable() * conditions.mask.data
    raw = expected_dice(p, drawn)
    true = dice(drawn, sample.classes, range(1, model.parcellation.n_classes))
    for s, *values in zip(model.parcellation.structures, raw, true, strict=True):
        if s.is_tissue and np.isfinite(values).all():
            known = made_with(model, config), sample.subject, sample.name
            yield (*known, name, s.name, *(f"{v:.4f}" for v in values))


@dataclass(frozen=True, eq=False)
class Measured:
    """Columns of the table, all (n,)."""

    made_with: np.ndarray
    person: np.ndarray
    scan: np.ndarray
    degradation: np.ndarray
    structure: np.ndarray
    raw: np.ndarray
    dice: np.ndarray

    def where(self, rows):
        return Measured(*(getattr(self, name)[rows] for name in (*WORDS, *NUMBERS)))


def read(table):
    with table.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    words = [np.array([row[name] for row in rows]) for name in WORDS]
    return Measured(*words, *(np.array([float(r[name]) for r in rows]) for name in NUMBERS))


def fitted(measured, **options):
    """A map of all measurements."""
    good = measured.degradation == "none"
    return fit(measured.structure, measured.raw, measured.dice, good, **options)


def left_out(measured, offsets):
    """(n,) expected and usual Dice of each person, by a map that was fitted to the others."""
    expected, usual = np.empty(len(measured.raw)), np.empty(len(measured.raw))
    for person in np.unique(measured.person):
        mine = measured.person == person
        calibrate, one = fitted(measured.where(~mine), offsets=offsets), measured.where(mine)
        expected[mine] = [calibrate(n, r) for n, r in zip(one.structure, one.raw, strict=True)]
        usual[mine] = [calibrate.usual.get(name, np.nan) for name in one.structure]
    return expected, usual


def of_means(measured, values, dice, rows):
    """Spearman's correlation of the means over structures of every scan and condition."""
    scans = np.char.add(np.char.add(measured.scan, " "), measured.degradation)
    each = [rows & (scans == scan) for scan in np.unique(scans[rows])]
    return spearmanr(*([v[one].mean() for one in each] for v in (values, dice))).statistic


def report(measured):
    """Print how far expected Dice can be believed; returns whether offsets help."""
    errors = {o: abs(left_out(measured, o)[0] - measured.dice).mean() for o in (False, True)}
    helps = errors[True] < errors[False]
    print(f"mean error {errors[False]:.4f}, with an offset for each structure {errors[True]:.4f}")
    (expected, usual), dice = left_out(measured, helps), measured.dice
    print(f"{'degradation':18} {'true':>7} {'raw':>7} {'expected':>8} {'error':>7} {'Spearman':>8}")
    for name in dict.fromkeys(measured.degradation):
        rows = measured.degradation == name
        rho = spearmanr(expected[rows], dice[rows]).statistic
        means = [v[rows].mean() for v in (dice, measured.raw, expected, abs(expected - dice))]
        print("{:18} {:7.3f} {:7.3f} {:8.3f} {:7.3f} {:8.3f}".format(name, *means, rho))
    for what, values in (("raw", measured.raw), ("expected", expected)):
        rho = spearmanr(values, dice).statistic
        within = np.mean(
            [
                spearmanr(values[rows], dice[rows]).statistic
                for name in np.unique(measured.structure)
                if (rows := measured.structure == name).sum() > 2
            ]
        )
        people = [measured.person == person for person in np.unique(measured.person)]
        everybody = of_means(measured, values, dice, np.full(len(dice), True))
        one = np.mean([of_means(measured, values, dice, rows) for rows in people])
        print(
            f"{what}: Spearman {rho:.3f} over structures, {within:.3f} within a structure,"
            f" {everybody:.3f} of scan means, {one:.3f} of those of one person;"
            f" mean error {abs(values - dice).mean():.3f}"
        )
    good = measured.degradation == "none"
    each = list(zip(measured.scan, measured.structure, dice, strict=True))
    reached = {(scan, name): value for (scan, name, value), g in zip(each, good, strict=True) if g}
    lost = np.array([reached.get((scan, name), np.nan) - value for scan, name, value in each])
    for far in (0.1, 0.15, 0.2, 0.25):
        doubted = expected < usual - far
        print(
            f"{far} below usual: {doubted[good].sum()} of {good.sum()} in scans as they are,"
            f" {doubted[lost > 0.15].mean():.0%} of those that lost more than 0.15,"
            f" {doubted[lost < 0.05].mean():.1%} of those that lost less than 0.05"
        )
    return bool(helps)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--subjects", nargs="+", required=True)
    parser.add_argument("--degradations", nargs="+", choices=DEGRADATIONS, default=[*DEGRADATIONS])
    parser.add_argument("--without", nargs="*", default=[], help="Structures not to fit to.")
    parser.add_argument("--model", default=DEFAULT, help="Released name or .safetensors file.")
    parser.add_argument("--steps", type=int, default=SampleConfig().steps)
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--write", type=Path, help="Where to write the map, fitted to everybody.")
    parser.add_argument(
        "--serves", help="Weights of the same recipe, trained on everybody, that the map is for."
    )
    wanted = parser.parse_args()
    if len(set(wanted.subjects)) < 2:
        parser.error("two people at least: each is predicted from the others")
    model = models.load(Model, wanted.model)
    config = SampleConfig(steps=wanted.steps, flip=wanted.flip)
    new = not wanted.table.exists()
    known = read(wanted.table) if not new else None
    if known and set(known.made_with) != {made_with(model, config)}:
        parser.error(
            f"{wanted.table} was made with {', '.join(set(known.made_with))}: give another"
        )
    done = set(zip(known.scan, known.degradation, strict=True)) if known else set()
    with wanted.table.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        if new:
            writer.writerow((*WORDS, *NUMBERS))
        for subject in wanted.subjects:
            for path in sorted(wanted.cache.glob(f"sub-{subject}_*.npz")):
                scan = path.stem.rsplit("_", 1)[0]
                for name in dict.fromkeys(["none", *wanted.degradations]):
                    if (scan, name) not in done:
                        writer.writerows(measure(path, name, model, config))
                        stream.flush()
    measured = read(wanted.table)
    measured = measured.where(~np.isin(measured.structure, wanted.without))
    helps = report(measured)
    if wanted.write:
        n = len(np.unique(measured.scan))
        people = (
            f"{n} scans of {len(np.unique(measured.person))} people whom the network has not seen,"
            f" each in {len(np.unique(measured.degradation))} conditions;"
            f" steps: {config.steps}, mirrored: {'yes' if config.flip else 'no'}"
        )
        weights = model.sha256
        if wanted.serves:
            weights = models.load(Model, wanted.serves).sha256
            people += "; measured with a network of the same recipe that was trained without them"
        found = fitted(measured, offsets=helps, weights_sha256=weights, people=people)
        wanted.write.write_text(json.dumps(found.as_dict(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
