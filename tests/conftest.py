"""A head that is known in millimetres, so that any grid can image it, and a network that knows it.

Everything is a factory: a test asks for the orientation, the spacing and the size it needs.
"""

import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from cadiff_cli import machine
from cadiff_cli.config import StripMethod
from cadiff_cli.io import models
from cadiff_cli.io.cohorts import Cohort
from cadiff_cli.io.images import save_volume
from cadiff_cli.io.releases import DEFAULT, weights_folder
from cadiff_cli.labels.parcellation import BASE, load_parcellation
from cadiff_cli.nets.blocks import channels_last
from cadiff_cli.nets.models import Model
from cadiff_cli.nets.segmenter import CADiffNet, NetConfig
from cadiff_cli.products import (
    Conditions,
    CoordinateField,
    Frame,
    Person,
    Registered,
    Scan,
    Stripped,
    Template,
    Transform,
)
from cadiff_cli.quality.age_fit import fit
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.spatial.probabilities import Probabilities
from cadiff_cli.spatial.resample import pool, resample
from cadiff_cli.stages.condition import brain_crop, normalise
from cadiff_cli.training.segmenter.data import Sample
from cadiff_cli.training.segmenter.patches import AugmentConfig
from cadiff_cli.training.segmenter.prior import count_prior
from cadiff_cli.training.segmenter.synthesis import SynthesisConfig

# On a busy machine threads wait for one another longer than tensors this small take.
torch.set_num_threads(1)


def probabilities_of(p):
    """Probabilities of every voxel of a volume (classes, X, Y, Z)."""
    shape = tuple(p.shape[1:])
    return Probabilities(p.flatten(1).T.contiguous(), torch.arange(math.prod(shape)), shape)


def dense(probabilities):
    """(classes, X, Y, Z): those of the whole volume."""
    p = torch.zeros(probabilities.n_classes, math.prod(probabilities.shape))
    p[0] = 1
    p[:, probabilities.voxels] = probabilities.values.T
    return p.reshape(-1, *probabilities.shape)


NO_CHANGE = AugmentConfig(
    flip=0,
    deform=0,
    together=0,
    field_error_mm=0,
    thick_slices=0,
    bad_mask=0,
    intensity=0,
    synthesis=SynthesisConfig(share=0),
)
"""Plain patches: pieces of the scans as they are."""

ROOT = Path(__file__).resolve().parents[1]
ORIENTATIONS = ("RAS", "LAS", "LPS", "oblique")

# The phantom's anterior commissure is the origin; the field's extents are those of the templates.
LOW_MM, HIGH_MM = np.array([-90.0, -120.0, -80.0]), np.array([90.0, 90.0, 100.0])
FOV_MM, CENTRE_MM = np.array([176.0, 208.0, 176.0]), np.array([0.0, -15.0, 10.0])
# (left code, right code, centre of the left one, radii, brightness); later ones cover earlier ones.
PAIRS = (
    (3, 42, (0, -15, 10), (65, 80, 60), 60.0),
    (2, 41, (0, -15, 10), (48, 62, 43), 100.0),
    (12, 51, (-30, 2, 2), (7, 16, 11), 75.0),
    (4, 43, (-13, -12, 24), (8, 28, 10), 20.0),
)
# (code, centre, radii, brightness): the thalami differ, so that left cannot pass for right.
SINGLES = (
    (10, (-14, -25, 0), (10, 14, 10), 80.0),
    (49, (18, -16, 4), (8, 10, 8), 80.0),
    (16, (0, -30, -32), (12, 12, 18), 90.0),
)
AXES = {
    "R": (1, 0, 0),
    "L": (-1, 0, 0),
    "A": (0, 1, 0),
    "P": (0, -1, 0),
    "S": (0, 0, 1),
    "I": (0, 0, -1),
}


@dataclass(frozen=True, eq=False)
class Phantom:
    """A skull-stripped scan, its true label codes and how it was made from the canonical head."""

    t1: Volume
    codes: np.ndarray
    scale: float
    shift_mm: np.ndarray

    def field(self, grid: Grid) -> np.ndarray:
        """(3, X, Y, Z): the distance field of this head on ``grid``, in closed form."""
        world = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
        scaled = ((world - self.shift_mm) / self.scale - LOW_MM) / (HIGH_MM - LOW_MM)
        return np.clip(np.moveaxis(scaled, -1, 0), 0, 1).astype(np.float32)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def head_grid(orientation, spacing=2.0, scale=1.0, shift_mm=(0, 0, 0)):
    """A field of view around the head; ``spacing`` is a number or one per voxel axis."""
    if orientation == "oblique":
        axis, angle = np.array([1.0, 2.0, 3.0]) / np.sqrt(14), np.radians(12)
        cross = np.cross(np.eye(3), axis)
        directions = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
        extent = FOV_MM
    else:
        directions = np.array([AXES[letter] for letter in orientation], dtype=float).T
        extent = abs(directions.T) @ FOV_MM
    step = np.broadcast_to(np.asarray(spacing, dtype=float), 3)
    shape = np.round(extent * scale / step).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = directions * step
    affine[:3, 3] = CENTRE_MM * scale + shift_mm - affine[:3, :3] @ ((shape - 1) / 2)
    return Grid(tuple(shape), affine)


def make_phantom(orientation="RAS", spacing=2.0, scale=1.0, shift_mm=(0, 0, 0), noise=1.0):
    """Image the canonical head, scaled about its AC and shifted, on a grid."""
    grid = head_grid(orientation, spacing, scale, shift_mm)
    world = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    x, y, z = np.moveaxis((world - np.asarray(shift_mm)) / scale, -1, 0)
    codes, t1 = np.zeros(grid.shape, dtype=np.int16), np.zeros(grid.shape)

    def within(centre, radii):
        return sum(((p - c) / r) ** 2 for p, c, r in zip((x, y, z), centre, radii)) < 1  # noqa: B905

    for left, right, (cx, cy, cz), radii, brightness in PAIRS:
        for code, side, sign in ((left, x < 0, 1), (right, x >= 0, -1)):
            inside = within((sign * cx, cy, cz), radii) & side
            codes[inside], t1[inside] = code, brightness
    for code, centre, radii, brightness in SINGLES:
        inside = within(centre, radii)
        codes[inside], t1[inside] = code, brightness
    texture = 5 * np.sin(x / 6) * np.cos(y / 7 + 1) * np.sin(z / 5 + 2)
    rng = np.random.default_rng(0)
    t1 = np.clip(t1 + texture + noise * rng.standard_normal(grid.shape), 1, None)
    t1 = np.where(codes > 0, t1, 0).astype(np.float32)
    return Phantom(Volume(t1, grid), codes, scale, np.asarray(shift_mm, dtype=float))


def make_template(scale=1.0, shift_mm=(0, 0, 0), spacing=2.0):
    """The same head as an atlas that lies elsewhere: its AC is at ``shift_mm``."""
    return Template(
        "toy",
        make_phantom("RAS", spacing, scale, shift_mm).t1,
        Frame(tuple(map(float, shift_mm)), tuple(scale * LOW_MM), tuple(scale * HIGH_MM)),
        source="tests",
    )


def make_conditions(head: Phantom) -> Conditions:
    """What the network is given when registration is perfect."""
    working = head.t1.grid.working()
    t1 = resample(head.t1, working)
    mask = resample(Volume((head.codes > 0).astype(np.float32), head.t1.grid), working).data > 0.5
    grid = brain_crop(Volume(mask, working))
    image, inside = resample(t1, grid).data, resample(Volume(mask, working), grid)
    half = grid.coarsen(2)
    return Conditions(
        Volume(normalise(image, inside.data, grid.spacing_mm), grid),
        inside,
        CoordinateField(head.field(half), half),
    )


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no core waits for the last of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def my_cores():
    """Cores for this process: processes that each used all of them would wait for one another."""
    return max(1, machine.cores() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


@contextmanager
def threads():
    """As many as this process has cores: a full network on a whole brain is worth them."""
    few = torch.get_num_threads()
    torch.set_num_threads(my_cores())
    try:
        yield
    finally:
        torch.set_num_threads(few)


@pytest.fixture
def all_threads():
    """For a test that runs a full network on a whole brain."""
    with threads():
        yield


@pytest.fixture(scope="session")
def parcellation():
    return load_parcellation(BASE)


LOBES = """index	name	abbreviation	color	mapping	mirror	parent	subsets
1001	Left-Front	L_F	#cd3e4e	8	2001	3	frontal
1002	Left-Back	L_B	#781286	8	2002	3	n/a
2001	Right-Front	R_F	#cd3e4f	8	1001	42	frontal
2002	Right-Back	R_B	#781287	8	1002	42	n/a
16	Brain-Stem	BS	#779fb0	10	16	16	n/a
"""
"""A second parcellation: the cortex in four parts, and the brain stem."""


@pytest.fixture(scope="session")
def lobes(tmp_path_factory):
    """``LOBES``, read from a file as a user would have it."""
    path = tmp_path_factory.mktemp("parcellation") / "lobes.tsv"
    path.write_text(LOBES)
    return load_parcellation(path)


@pytest.fixture(scope="session")
def mirror(parcellation):
    """(n_classes,): the class that each class becomes when left and right swap."""
    return torch.from_numpy(parcellation.mirror_classes)


@pytest.fixture(scope="session")
def phantom():
    return make_phantom


@pytest.fixture(scope="session")
def grid_of():
    return head_grid


@pytest.fixture(scope="session")
def toy_template():
    return make_template


@pytest.fixture(scope="session")
def conditions_of():
    return make_conditions


@pytest.fixture(params=ORIENTATIONS)
def orientation(request):
    return request.param


@pytest.fixture(scope="session")
def small_head():
    """A head of 0.4 times the size at 1 mm: quick to segment."""
    return make_phantom("RAS", 1.0, scale=0.4)


@pytest.fixture(scope="session")
def toy_sample(small_head, parcellation):
    """``small_head`` as a training sample, registered to two templates."""
    conditions = make_conditions(small_head)
    codes = resample(Volume(small_head.codes, small_head.t1.grid), conditions.image.grid, order=0)
    return Sample(
        "sub-toy",
        "toy",
        np.round(conditions.image.data * 255).astype(np.uint8),
        conditions.mask.data.copy(),
        parcellation.encode(codes.data, parcellation.class_of),
        {
            "toy": pool(conditions.field.data, 2).astype(np.float16),
            # A registration that errs by half a millimetre.
            "other": pool(conditions.field.data + 0.003, 2).astype(np.float16),
        },
    )


@pytest.fixture(scope="session")
def ramp():
    """A sample whose field is linear: x, y and z of the voxel, scaled."""
    shape = np.array((64, 48, 80))
    # Stored cells are centred in blocks of 4 voxels.
    ijk = np.indices(shape // 4) * 4 + 1.5
    rng = np.random.default_rng(0)
    # The brain keeps away from the border, where the stored field ends.
    inside = (abs(np.indices(shape) - shape.reshape(3, 1, 1, 1) / 2) < 8).all(axis=0)
    return Sample(
        "sub-ramp",
        "ramp",
        rng.integers(0, 256, shape, dtype=np.uint8),
        np.ones(shape, dtype=bool),
        (rng.integers(1, 41, shape) * inside).astype(np.uint8),
        {"toy": (ijk / shape.reshape(3, 1, 1, 1)).astype(np.float32)},
    )


TINY = NetConfig(
    channels=(8, 8, 8, 8),
    head_channels=4,
    head_blocks=1,
    time_channels=16,
    embed_channels=4,
    prior_shape=(36, 42, 36),
    taca_sizes=(3, 5),
)


def awake(config):
    """A network in which nothing is zero any more, so that whatever enters matters."""
    torch.manual_seed(1)
    net = CADiffNet(config)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return net


@pytest.fixture(scope="session")
def tiny_config():
    return TINY


@pytest.fixture(scope="session")
def tiny_net(toy_sample, parcellation):
    """A network that starts from the phantom's prior, with every layer awake.

    Noise, times and image must all matter, or a test of seeds or tiles could not fail.
    """
    net = awake(TINY)
    net.prior.logits.copy_(count_prior([toy_sample], parcellation, TINY.prior_shape))
    return channels_last(net).requires_grad_(False).eval()


@pytest.fixture(scope="session")
def tiny_model(tiny_net, parcellation):
    return Model(tiny_net, "tiny", "0" * 64, parcellation=parcellation)


@pytest.fixture(scope="session")
def age_ranges(parcellation):
    """Ranges of made-up people of 20 to 80 years: ventricles grow, women have larger thalami."""
    rng, n = np.random.default_rng(0), 60
    ages, female = np.linspace(20, 80, n), np.arange(n) % 2
    mm3 = {s.name: 1000 * rng.lognormal(0, 0.1, n) for s in parcellation.structures if s.is_tissue}
    for side in ("Left", "Right"):
        mm3[f"{side}-Lateral-Ventricle"] *= np.exp(0.03 * (ages - 20))
        mm3[f"{side}-Thalamus"] *= np.exp(0.1 * female)
    persons = tuple(Person(float(a), "F" if f else "M") for a, f in zip(ages, female, strict=True))
    subjects = tuple(f"{k:02d}" for k in range(n))
    cohort = Cohort(subjects, ("x",) * n, persons, {k: tuple(v) for k, v in mm3.items()})
    return fit(cohort, parcellation, "60 made-up people")


@pytest.fixture(scope="session")
def tiny_weights(tiny_net, parcellation, tmp_path_factory):
    """The same network as a file, fit for ``--model``."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    models.save(path, Model(tiny_net, parcellation=parcellation))
    return path


@pytest.fixture(scope="session")
def identity(tmp_path_factory):
    """A factory of registrations that move nothing: ITK's identity in a file."""
    import ants

    path = tmp_path_factory.mktemp("identity") / "identity.mat"
    ants.write_transform(ants.new_ants_transform(dimension=3), str(path))
    return lambda template: Registered(template, Transform(path, path, "identity", 2.0))


@pytest.fixture
def scan_of(tmp_path):
    """Write a phantom as NIfTI and hand it over as the ``Scan`` that a reader would make of it."""

    def write(head, name="sub-01_T1w.nii.gz"):
        path = tmp_path / name
        save_volume(path, head.t1.data, head.t1.grid)
        return Scan(head.t1, path)

    return write


@pytest.fixture
def write_image(tmp_path):
    """Write any array as an image with any affine, without the checks of ``save_volume``."""

    def write(data, affine=None, name="sub-01_T1w.nii.gz"):
        path = tmp_path / name
        image = nib.Nifti1Image(data, np.eye(4) if affine is None else affine)
        nib.save(image, path)
        return path

    return write


@pytest.fixture(scope="session")
def stripped_of():
    """A phantom on the working grid with its true mask."""

    def make(head):
        working = head.t1.grid.working()
        t1 = resample(head.t1, working)
        return Stripped(t1, Volume(t1.data > 0, working), StripMethod.AS_IS, bare=True)

    return make


@pytest.fixture(scope="session")
def shared():
    """Find real data, or skip: it is too large (and not ours) to live in the repository."""
    folder = Path(os.environ.get("CADIFF_SHARED_DATA") or ROOT.parent / "shared" / "data")

    def find(relative):
        path = folder / relative
        if not path.exists():
            pytest.skip(f"real data: no {relative} in {folder} (set CADIFF_SHARED_DATA)")
        return path

    return find


@pytest.fixture(scope="session")
def released():
    """Path of the released weights, or skip."""
    path = weights_folder() / DEFAULT / "model.safetensors"
    if not path.exists():
        pytest.skip(f"no released weights at {path}")
    return path
