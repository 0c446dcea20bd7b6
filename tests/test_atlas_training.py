"""Conditional atlases learn a known law: brains whose ventricle grows with age."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.ndimage import map_coordinates

from cadiff_cli.atlas import deform, structure_volumes
from cadiff_cli.cli import atlas_evaluate, atlas_train
from cadiff_cli.errors import DataError, MissingInputError, UsageError
from cadiff_cli.io import models
from cadiff_cli.io.releases import DEFAULT_ATLAS, weights_folder
from cadiff_cli.io.templates import load_template
from cadiff_cli.nets.atlas import AtlasConfig, AtlasNet
from cadiff_cli.nets.condition import ConditionSpace, kernel_weights
from cadiff_cli.nets.models import AtlasModel
from cadiff_cli.products import Condition, Frame, Template
from cadiff_cli.spatial.deformation import exponential, jacobian
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.training.atlas import data, evaluate, scores
from cadiff_cli.training.atlas.config import PeopleConfig, Training
from cadiff_cli.training.atlas.data import (
    STRUCTURES,
    VENTRICLE_CODES,
    PreparedPerson,
    base_grid,
    held_out,
    known_people,
    scans_of,
    share_of,
)
from cadiff_cli.training.atlas.draws import PeopleDraws, mean_known
from cadiff_cli.training.atlas.objective import AtlasObjective
from cadiff_cli.training.atlas.regression import KernelRegression, _weights
from cadiff_cli.training.atlas.run import brain_weight, train_atlas
from cadiff_cli.training.atlas.structures import Shares, fit_structures, volumes_on
from cadiff_cli.training.atlas.velocity import fit_velocity, folded
from cadiff_cli.training.atlas.volumes import BaseVolumes
from cadiff_cli.training.batch import stack

SHAPE, SPACING = (16, 16, 16), 8.0
GRID = Grid(SHAPE, np.diag([SPACING, SPACING, SPACING, 1.0]))
CENTRE = np.array([60.0, 60.0, 60.0])
NET = AtlasConfig(shape=SHAPE, components=2, width=16, depth=1, heads=2, steps=2)
RUN = PeopleConfig(
    steps=140,
    decay=80,
    warmup=10,
    rate=8e-3,
    ema=0.96,
    batch=4,
    atlases=4,
    neighbours=6,
    jitter=0.02,
)


def growth(age):
    """The law: by how much lengths in the ventricle grow until ``age``."""
    return 1 + 0.4 * (age - 20) / 60


def ball(grid, radius_mm):
    world = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1)) - CENTRE
    return np.linalg.norm(world, axis=-1) < radius_mm


def velocity_of(scale, shift=0.0):
    """exp(v) scales lengths about the centre by ``scale``, fading out beyond the ventricle."""
    away = GRID.to_world(np.moveaxis(np.indices(SHAPE), 0, -1)) - CENTRE
    radius = np.linalg.norm(away, axis=-1, keepdims=True)
    fade = 1 / (1 + (radius / 48) ** 8)
    return np.moveaxis(np.log(scale) * away * fade, -1, 0) + shift


def volumes_of(age):
    """Volumes of ventricle and rest by the law, and a hippocampus that the base lacks."""
    moved = exponential(torch.from_numpy(velocity_of(growth(age)))[None].float(), [SPACING] * 3)
    change = jacobian(moved, [SPACING] * 3)[0].numpy()
    inside = ball(GRID, 24.0)
    return {4: change[inside].sum(), 17: 1.0, 2: change[ball(GRID, 56.0) & ~inside].sum()}


def sitter(k, age, sex="F"):
    """A person by the law, with a shape of its own that no condition explains."""
    rng = np.random.default_rng(k)
    small = Grid((2, 2, 2), np.eye(4))
    nothing = Volume(np.zeros((2, 2, 2), np.uint8), small)
    volumes = volumes_of(age)
    velocity = velocity_of(growth(age), rng.normal(0, 1.0)).astype(np.float16)
    return PreparedPerson(
        f"sub-{k:02}", "toys", velocity, volumes, nothing, nothing, 0.0, 0, True, str(k), age, sex
    )


@pytest.fixture(scope="module")
def people():
    rng = np.random.default_rng(0)
    return [sitter(k, float(age), "FM"[k % 2]) for k, age in enumerate(rng.uniform(20, 80, 40))]


@pytest.fixture(scope="module")
def base():
    """A brain of 56 mm with a ventricle of 24 mm."""
    inside = ball(GRID, 56.0)
    codes = np.where(ball(GRID, 24.0), 4, 2 * inside).astype(np.int16)
    frame = Frame((0.0,) * 3, (0.0,) * 3, (120.0,) * 3)
    return Template(
        "toy", Volume(inside.astype(np.float32), GRID), frame, labels=Volume(codes, GRID)
    )


@pytest.fixture(scope="module", params=[True, False], ids=["centred", "plain"])
def trained(people, base, tmp_path_factory, request):
    run = tmp_path_factory.mktemp("atlas")
    training = Training(net=NET, train=replace(RUN, centred=request.param))
    path = train_atlas(people, base, GRID, run, training, device="cpu")
    return models.load(AtlasModel, str(path))


def ventricle_growth(velocity):
    """By how much exp(v) enlarges a ventricle of 24 mm, as a length."""
    change = jacobian(exponential(torch.from_numpy(velocity)[None], [SPACING] * 3), [SPACING] * 3)
    return float(change[0][torch.from_numpy(ball(GRID, 24.0))].mean()) ** (1 / 3)


def test_the_law_is_learnt(trained):
    """The ventricle grows with age as in the people, in trend and in size."""
    ages = [30, 40, 50, 60, 70]
    sizes = [ventricle_growth(trained.velocity(Condition(age_years=age))) for age in ages]
    assert sizes == sorted(sizes)
    assert sizes == pytest.approx([growth(age) for age in ages], abs=0.06)


def test_a_person_left_out_may_be_like_nobody_else(people, base, tmp_path, caplog):
    """Ventricles that the others do not come near have no atlas: the rest is compared."""
    odd = replace(people[0], name="sub-odd", volumes_mm3={4: 1000.0, 17: 1.0, 2: 1000.0})
    train = replace(RUN, steps=2, decay=1, warmup=1, leave_out=("toys/sub-odd", people[1].label))
    path = train_atlas(
        [odd, *people], base, GRID, tmp_path, Training(net=NET, train=train), device="cpu"
    )
    rows = (path.parent / "held_out.tsv").read_text().splitlines()[1:]
    assert [row.split("\t")[0] for row in rows] == [people[1].label]
    assert "toys/sub-odd is left out: ventricles of" in caplog.text


def test_other_conditions_tell_the_same(trained):
    """Ventricles alone tell the shape, and no condition gives that of all people."""
    percent = share_of(volumes_of(70), VENTRICLE_CODES)
    told = ventricle_growth(trained.velocity(Condition(ventricles_percent=percent)))
    assert told == pytest.approx(growth(70), abs=0.06)
    assert ventricle_growth(trained.velocity(Condition())) == pytest.approx(growth(50), abs=0.08)


def test_samples_differ_by_seed_around_the_atlas(trained):
    """A seed draws one person, the same each time; their mean is near the atlas."""
    condition = Condition(age_years=50)
    draws = np.stack([trained.velocity(condition, seed) for seed in range(24)])
    assert (draws[0] == trained.velocity(condition, 0)).all()
    spread = draws.std(axis=0).mean()
    assert spread > 0.2
    assert abs(draws.mean(axis=0) - trained.velocity(condition)).mean() < spread


def test_kernel_regression_learns_the_law_too(people):
    regression = KernelRegression.of(people, ConditionSpace.of([p.condition for p in people]))
    sizes = [
        ventricle_growth(regression.velocity(Condition(age_years=age))) for age in (30, 50, 70)
    ]
    assert sizes == pytest.approx([growth(age) for age in (30, 50, 70)], abs=0.06)


def centred_net(people, space):
    """An untrained network with the centre of people, and its kernel regression."""
    net = AtlasNet(replace(NET, people=len(people), components=8))
    velocities = torch.from_numpy(np.stack([p.velocity_mm for p in people])).float()
    net.latent.fit(velocities)
    regression = KernelRegression.of(people, space)
    conditions = torch.from_numpy(regression.conditions)
    net.centre.fit(conditions, net.latent.encode(velocities), regression.widths)
    return net, regression, velocities


def test_a_centred_atlas_begins_as_kernel_regression(people):
    """What the latent space can say of it; people without age or sex are far, not lost."""
    people = [replace(people[0], age_years=None), replace(people[1], sex=None), *people[2:]]
    space = ConditionSpace.of([p.condition for p in people])
    net, regression, velocities = centred_net(people, space)
    for condition in (Condition(age_years=40), Condition(30, "F"), Condition()):
        asked = torch.from_numpy(space.scaled(condition))[None]
        found = net(torch.zeros(1, 8), asked)
        wanted = torch.from_numpy(regression.velocity(condition))[None]
        projected = net.latent.decode(net.latent.encode(wanted))
        assert torch.allclose(found, projected, atol=1e-3)
    asked = torch.from_numpy(regression.conditions)
    inside = net.latent.decode(net.latent.encode(velocities))
    assert torch.allclose(net.decode(net.encode(inside, asked), asked), inside, atol=1e-3)


def test_the_first_components_follow_volumes(people):
    """Two fields that grow with two numbers, and large noise: each direction is its own field."""
    rng = np.random.default_rng(0)
    fields = rng.normal(size=(2, *(3, *SHAPE))).astype(np.float32)
    numbers = rng.normal(size=(200, 2)).astype(np.float32)
    noise = rng.normal(size=(200, 4)) @ rng.normal(size=(4, 3 * 16**3)) * 3
    x = np.einsum("nk,k...->n...", numbers, fields) + noise.reshape(200, 3, *SHAPE)
    followed = torch.from_numpy(np.hstack([numbers, np.full((200, 1), np.nan, np.float32)]))
    net = AtlasNet(replace(NET, components=6))
    net.latent.fit(torch.from_numpy(x.astype(np.float32)), followed)
    found = net.latent.basis.reshape(6, -1).numpy()
    likeness = np.corrcoef(np.vstack([found[:2], fields.reshape(2, -1)]))[:2, 2:]
    assert abs(likeness[0, 0]) > 0.8
    assert abs(likeness[1, 1]) > 0.8
    z = net.latent.encode(torch.from_numpy(x.astype(np.float32)))
    assert z.std(dim=0) == pytest.approx(np.ones(6), abs=0.25)
    # Six components hold two fields and four of noise: nothing is lost.
    assert torch.allclose(net.latent.decode(z), torch.from_numpy(x).float(), atol=1e-2)
    assert z[:, 2:].T @ z[:, 2:] / 199 == pytest.approx(np.eye(4), abs=0.01)


def test_kernel_weights_count_what_is_asked():
    nan = torch.nan
    people = torch.tensor([[0.0, 0.0, 0.5], [0.4, 1.0, nan], [1.0, nan, 0.5]])
    asked = torch.tensor([[0.4, nan, nan], [nan, 0.0, nan], [nan, nan, nan], [nan, nan, 0.5]])
    w = kernel_weights(people, asked, torch.tensor([0.2, 0.5, 0.1]))
    assert torch.allclose(w.sum(dim=1), torch.ones(4))
    assert torch.allclose(w[2], torch.full((3,), 1 / 3))
    assert w[0, 1] / w[0, 0] == pytest.approx(np.exp(2.0), rel=1e-4)  # 0.4 is two widths away
    # Who tells nothing is as far as the other sex, and as the other end of the ventricles.
    assert w[1, 0] / w[1, 1] == pytest.approx(np.exp(2.0), rel=1e-4)
    assert w[1, 2] == pytest.approx(w[1, 1])
    assert w[3, 1] / w[3, 0] == pytest.approx(np.exp(-50.0), rel=1e-3)
    others = kernel_weights(
        people, asked, torch.tensor([0.2, 0.5, 0.1]), torch.tensor([1, 0, 2, 0])
    )
    assert [float(others[k, i]) for k, i in enumerate([1, 0, 2, 0])] == [0, 0, 0, 0]
    assert torch.allclose(others[2], torch.tensor([0.5, 0.5, 0.0]))


def run_of(people, base, folder, steps, **changes):
    """The tensors that a short run exports."""
    train = replace(RUN, steps=steps, decay=1, warmup=1, **changes)
    path = train_atlas(people, base, GRID, folder, Training(net=NET, train=train), device="cpu")
    return models.load(AtlasModel, str(path)).net.state_dict()


def test_going_on_is_the_uninterrupted_run(people, base, tmp_path):
    whole = run_of(people, base, tmp_path / "whole", 6)
    run_of(people, base, tmp_path / "parts", 3)
    parts = run_of(people, base, tmp_path / "parts", 6)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    with pytest.raises(UsageError, match="trained_on"):
        run_of(people[1:], base, tmp_path / "parts", 6)
    # People of folders that are named in another order are the same people.
    again = run_of(people[::-1], base, tmp_path / "again", 6)
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_the_papers_way_trains_too(people, base, tmp_path):
    """An autoencoder's latents, a U-Net with cross-attention, morphology in every sample."""
    pytest.importorskip("einops")
    net = replace(NET, latent="autoencoder", components=3, channels=(8, 8, 8))
    train = replace(RUN, steps=4, decay=1, batch=1, autoencoder_steps=2, preserve="samples")
    path = train_atlas(people, base, GRID, tmp_path, Training(net=net, train=train), device="cpu")
    velocity = models.load(AtlasModel, str(path)).velocity(Condition(age_years=50))
    assert velocity.shape == (3, *SHAPE)
    assert np.isfinite(velocity).all()


def test_too_few_steps_for_both_parts_are_refused(people, base, tmp_path):
    net = replace(NET, latent="autoencoder", components=3, channels=(8, 8, 8))
    train = replace(RUN, steps=2, decay=1, autoencoder_steps=2)
    with pytest.raises(UsageError, match="steps is 2, and in the first 2"):
        train_atlas(people, base, GRID, tmp_path, Training(net=net, train=train), device="cpu")


def test_labels_without_ventricles_tell_nothing_of_them(people):
    without = {
        code: mm3 for code, mm3 in people[0].volumes_mm3.items() if code not in VENTRICLE_CODES
    }
    known = replace(people[0], volumes_mm3=without).condition
    assert known.ventricles_percent is None
    assert known.age_years == people[0].age_years
    ConditionSpace.of([known, *(person.condition for person in people[1:])])


def test_each_person_is_predicted_from_the_others_however_far(people):
    """Weights of all others sum to 1: the error of a person at a distance is not that of 0."""
    space = ConditionSpace.of([person.condition for person in people])
    conditions = np.stack([space.scaled(person.condition) for person in people])
    w = _weights(conditions, conditions, (1e-3, 1e-3, 1e-3), np.arange(len(people)))
    assert np.allclose(w.sum(axis=1), 1)
    assert not np.diag(w).any()


def test_weights_hold_all_that_an_atlas_needs(trained, base):
    assert (trained.labels.data == base.labels.data).all()
    assert trained.base == "toy"
    assert (trained.grid.affine == GRID.affine).all()
    assert np.ptp(trained.space.age_years) > 50
    assert len(trained.seen) == 32  # a fifth of 40 people was left out


def test_a_fifth_of_every_source_is_left_out_over_all_ages(people):
    others = [replace(p, source="others") for p in people[:10]]
    out = held_out([*people, *others], 0.2)
    assert [sum(label.startswith(s) for label in out) for s in ("toys", "others")] == [8, 2]
    ages = sorted(p.age_years for p in people if p.label in out)
    assert ages[0] < 35 and ages[-1] > 65  # noqa: PT018
    assert held_out(people, 0.0) == set()
    named = held_out([*people, *others], 0.2, ["toys/sub-03"])
    assert sum(label.startswith("toys") for label in named) == 1
    assert len(named) == 3
    with pytest.raises(UsageError, match="toys/sub-99"):
        held_out(people, 0.2, ["toys/sub-99"])


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (Condition(age_years=5), "20 to 80 years"),
        (Condition(age_years=95), "20 to 80 years"),
        (Condition(ventricles_percent=30), "1 to 5"),
        (Condition(age_years=20, ventricles_percent=5), "contradict age 20"),
    ],
)
def test_conditions_of_nobody_are_refused(condition, words):
    ages = np.linspace(20, 80, 13)
    wobble = np.where(np.arange(13) % 2, 1.02, 0.98)
    law = [
        Condition(a, "F", float(np.exp(np.log(5) * (a - 20) / 60) * w))
        for a, w in zip(ages, wobble, strict=True)
    ]
    space = replace(ConditionSpace.of(law), ventricles_percent=(1.0, 5.0))
    with pytest.raises(UsageError, match=words):
        space.check(condition)
    space.check(Condition(age_years=83))  # within the margin: as the oldest
    assert space.scaled(Condition(age_years=83))[0] == 1
    assert np.isnan(space.scaled(Condition())).all()


def test_people_of_one_age_teach_nothing(people):
    with pytest.raises(DataError, match="1 different values of age"):
        ConditionSpace.of([replace(p.condition, age_years=30.0) for p in people])
    alone = [
        replace(p.condition, **{"age_years" if i % 2 else "ventricles_percent": None})
        for i, p in enumerate(people)
    ]
    with pytest.raises(DataError, match="known of 0 people"):
        ConditionSpace.of(alone)


def test_neighbours_are_drawn_as_kernel_regression_weighs_them(people):
    """The mean of many neighbourhoods is the regression of displacements and of volumes."""
    space = ConditionSpace.of([p.condition for p in people])
    regression = replace(KernelRegression.of(people, space), widths=(0.1, 0.5, 0.2))
    draws = PeopleDraws(people, regression, [SPACING] * 3, replace(RUN, neighbours=2000, jitter=0))
    drawn = draws[3]
    w = kernel_weights(draws.conditions, drawn.wanted, draws.widths)
    assert torch.allclose(drawn.log_shares, w @ draws.log_shares)
    mean = torch.einsum("bn,n...->b...", w, draws.displacements.float())
    assert torch.allclose(drawn.neighbours, mean, atol=0.2)


def test_atlases_are_made_for_rare_conditions_too(people):
    """One person in ten is old: conditions of old and young are drawn about as often."""
    crowd = [replace(p, age_years=30 + k / 10) for k, p in enumerate(people[:36])]
    some = [*crowd, *(replace(p, age_years=75.0) for p in people[36:])]
    space = ConditionSpace.of([p.condition for p in some])
    regression = replace(KernelRegression.of(some, space), widths=(0.05, 1e3, 1e3))
    draws = PeopleDraws(some, regression, [SPACING] * 3, replace(RUN, hidden=0.0, jitter=0.0))
    old = [float(draws[k].wanted[0, 0]) > 0.5 for k in range(60)]
    assert 0.3 < np.mean(old) < 0.7


def test_who_lacks_a_structure_has_no_say_in_its_mean():
    values = torch.tensor([[1.0, torch.nan, torch.nan], [3.0, 5.0, torch.nan]])
    found = mean_known(values, torch.tensor([0.25, 0.75]))
    assert found[:2].tolist() == pytest.approx([2.5, 5.0])
    assert found[2].isnan()


def test_a_structure_that_nobody_has_is_not_asked_for(people, base):
    """Shares of the others count; the loss and its slope stay finite."""
    some = [replace(p, volumes_mm3={4: p.volumes_mm3[4], 2: p.volumes_mm3[2]}) for p in people]
    space = ConditionSpace.of([p.condition for p in some])
    draws = PeopleDraws(some, KernelRegression.of(some, space), [SPACING] * 3, RUN)
    batch = stack([draws[k] for k in range(4)])
    assert batch.log_shares[:, 0].isfinite().all()
    assert batch.log_shares[:, 1].isnan().all()
    net = AtlasNet(NET)
    net.latent.fit(draws.velocities.float())
    brain = torch.from_numpy(brain_weight(base, GRID))
    volumes = BaseVolumes.of(base, list(STRUCTURES.values()), GRID)
    objective = AtlasObjective(RUN, brain, volumes, [SPACING] * 3)
    losses = objective(net, batch, torch.Generator().manual_seed(0))
    losses.volumes.backward()
    assert net.denoiser.leave.grad.isfinite().all()
    assert net.denoiser.leave.grad.abs().max() > 0


@pytest.mark.parametrize("scale", [0.8, 1.0, 1.3])
def test_volumes_in_training_are_those_by_which_an_atlas_is_judged(base, scale):
    velocity = velocity_of(scale)
    volumes = BaseVolumes.of(base, list(STRUCTURES.values()), GRID)
    batch = torch.from_numpy(velocity)[None].float()
    factors = jacobian(exponential(batch, [SPACING] * 3), [SPACING] * 3)
    found = volumes.log_shares(batch, factors).exp()[0]
    deformed = deform(base.brain.grid, velocity.astype(np.float32), GRID)
    shares = share_of(structure_volumes(base, deformed), VENTRICLE_CODES)
    assert found[0] == pytest.approx(shares, rel=0.02)
    assert found[1].isnan()  # the base has no hippocampi


def test_volumes_are_counted_where_they_lie():
    """On a shifted, coarser grid: all of a structure, in the voxels that are nearest to it."""
    fine = Grid((20, 24, 16), np.diag([1.0, 1.5, 2.0, 1.0]))
    codes = np.zeros(fine.shape, np.int16)
    codes[3:9, 4:12, 2:6], codes[15, 20, 10] = 4, 17
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = -5.0, -7.0, -3.0
    coarse = Grid((8, 14, 10), affine)
    found = volumes_on(coarse, Volume(codes, fine), [(4,), (17,), (99,)])
    assert found.sum(axis=(1, 2, 3)) == pytest.approx([6 * 8 * 4 * 3.0, 3.0, 0.0])
    place = np.rint(np.linalg.inv(coarse.affine) @ [15.0, 30.0, 20.0, 1.0])[:3].astype(int)
    assert found[(1, *place)] == 3.0


def test_volumes_pull_an_atlas(people, base, tmp_path):
    """Label volumes that disagree with the shapes: the atlas's ventricle moves towards them."""
    larger = [replace(p, volumes_mm3={**p.volumes_mm3, 4: 1.3 * p.volumes_mm3[4]}) for p in people]
    asked = torch.from_numpy(ConditionSpace.of([p.condition for p in larger]).scaled(Condition(50)))
    sizes = []
    for weight in (0.0, 1000.0):
        train = replace(RUN, steps=60, decay=20, warmup=1, volumes=weight)
        training = Training(net=NET, train=train)
        path = train_atlas(larger, base, GRID, tmp_path / f"{weight}", training, device="cpu")
        net = models.load(AtlasModel, str(path)).net
        sizes.append(ventricle_growth(net(torch.zeros(1, 2), asked[None])[0].detach().numpy()))
    assert sizes[1] > sizes[0] + 0.03


def test_a_person_is_not_its_own_neighbour(people):
    """Residuals are those from a centre without the person, as for people never seen."""
    space = ConditionSpace.of([p.condition for p in people])
    net, _, velocities = centred_net(people, space)
    asked = net.centre.conditions
    z = net.encode(velocities[:1], asked[:1], torch.tensor([0]))
    alone = AtlasNet(replace(NET, people=len(people) - 1, components=8))
    alone.latent.load_state_dict(net.latent.state_dict())
    alone.centre.fit(asked[1:], net.centre.latents[1:], net.centre.widths.tolist())
    assert torch.allclose(z, alone.encode(velocities[:1], asked[:1]), atol=1e-4)
    assert z.norm() > net.encode(velocities[:1], asked[:1]).norm()


def test_weights_without_a_centre_still_load(people, base, tmp_path):
    """Those of versions that knew of none name no people."""
    train = replace(RUN, steps=2, decay=1, warmup=1, centred=False)
    path = train_atlas(people, base, GRID, tmp_path, Training(net=NET, train=train), device="cpu")
    with safe_open(path, "pt") as stored:
        about = json.loads(stored.metadata()["cadiff"])
    del about["net"]["people"]
    path.with_suffix(".sha256").unlink()
    save_file(load_file(path), path, {"cadiff": json.dumps(about)})
    assert models.load(AtlasModel, str(path)).net.centre is None


def read_at(field, points):
    """A field (3, X, Y, Z) on the velocity grid at points (3, ...) in mm."""
    return np.stack([map_coordinates(x, points / SPACING, order=1, mode="nearest") for x in field])


def registered(affine, velocity, shape=(20, 20, 20), spacing=8.0):
    """The field of a person: base place of each voxel, exp(-v) after ``affine``, as a fraction."""
    grid = Grid(shape, np.diag([spacing, spacing, spacing, 1.0]))
    world = grid.to_world(np.moveaxis(np.indices(shape), 0, -1)) @ affine[:3, :3].T + affine[:3, 3]
    back = exponential(-torch.from_numpy(velocity)[None].float(), [SPACING] * 3)[0].numpy()
    points = np.moveaxis(world, -1, 0)
    moved = points + read_at(back, points)
    inside = np.linalg.norm(world - CENTRE, axis=-1) < 50
    low, high = np.full((3, 1, 1, 1), -100.0), np.full((3, 1, 1, 1), 250.0)
    return (moved - low) / (high - low), inside, grid


FRAME = Frame((0.0,) * 3, (-100.0,) * 3, (250.0,) * 3)


def test_the_affine_part_of_a_field_leaves_no_velocity():
    affine = np.array([[0.9, 0.1, 0, 3], [-0.1, 1.1, 0, -4], [0, 0, 1.05, 2], [0, 0, 0, 1.0]])
    field, inside, grid = registered(affine, np.zeros((3, *SHAPE)))
    fit = fit_velocity(field, inside, grid, FRAME, GRID)
    assert abs(fit.velocity_mm).max() < 1e-3
    assert fit.residual_mm == pytest.approx(0, abs=1e-3)


def test_the_velocity_of_a_field_is_found_again():
    """A twist about the centre: no affine map is any part of it."""
    away = np.moveaxis(GRID.to_world(np.moveaxis(np.indices(SHAPE), 0, -1)) - CENTRE, -1, 0)
    wave = 3 * np.sin(away / 12)
    twist = np.stack([wave[1], wave[2], wave[0]]) * np.exp(
        -((np.linalg.norm(away, axis=0) / 45) ** 4)
    )
    field, inside, grid = registered(np.eye(4), twist)
    fit = fit_velocity(field, inside, grid, FRAME, GRID)
    assert folded(torch.from_numpy(fit.velocity_mm)[None], GRID.spacing_mm.tolist()) == 0
    assert fit.residual_mm < 0.1
    low, high = np.array(FRAME.low_mm), np.array(FRAME.high_mm)
    base_mm = np.moveaxis(field, 0, -1)[inside] * (high - low) + low
    ones = np.ones((int(inside.sum()), 1))
    person = np.hstack([grid.to_world(np.argwhere(inside).astype(float)), ones])
    aligned = (person @ np.linalg.lstsq(person, base_mm, rcond=None)[0]).T
    back = exponential(-torch.from_numpy(fit.velocity_mm)[None], [SPACING] * 3)[0].numpy()
    error = aligned + read_at(back, aligned) - base_mm.T
    assert np.sqrt((error**2).sum(axis=0).mean()) < 0.3
    assert np.sqrt(((aligned - base_mm.T) ** 2).sum(axis=0).mean()) > 1.0


def test_structures_meet_where_a_registration_left_them_apart(base):
    """A ventricle of twice the base's volume is reached from no deformation at all."""
    codes = np.where(ball(GRID, 24.0 * 2 ** (1 / 3)), 4, 2 * ball(GRID, 56.0)).astype(np.int16)
    person, theirs = (Shares.of(v, [[4], [2]]) for v in (Volume(codes, GRID), base.labels))
    still = np.zeros((3, *SHAPE), np.float32)
    velocity, folds = fit_structures(still, np.eye(4), person, theirs, GRID)
    assert folds == 0
    before, after = (structure_volumes(base, deform(GRID, v, GRID)) for v in (still, velocity))
    assert after[4] / before[4] == pytest.approx(
        (codes == 4).sum() / (base.labels.data == 4).sum(), rel=0.1
    )
    # The brain's outline is alike in both, and stays.
    assert sum(after.values()) == pytest.approx(sum(before.values()), rel=0.02)


def test_structures_that_meet_already_stay(base):
    shares = Shares.of(base.labels, [[4], [2]])
    still = np.zeros((3, *SHAPE), np.float32)
    velocity, folds = fit_structures(still, np.eye(4), shares, shares, GRID)
    assert folds == 0
    assert np.sqrt((velocity**2).mean()) < 0.1


def test_shares_keep_volumes():
    codes = Volume(np.where(ball(GRID, 30.0), 17, 0).astype(np.int16), GRID)
    shares = Shares.of(codes, [[4, 17], [2]])
    assert shares.data[0].sum() * shares.grid.voxel_volume_mm3 == pytest.approx(
        (codes.data > 0).sum() * SPACING**3, rel=0.05
    )
    assert not shares.data[1].any()


def test_a_label_map_beside_a_scan_is_found_by_the_scheme_in_its_name(tmp_path):
    scan = tmp_path / "sub-1_ses-1_desc-brain_T1w.nii.gz"
    assert data.labels_beside(scan) is None
    for name in ("seg-somebodys", "space-MNI_seg-dlmuse", "seg-dlmuse_desc-x"):
        (tmp_path / f"sub-1_ses-1_{name}_dseg.nii.gz").touch()
    (tmp_path / "sub-1_ses-2_seg-dlmuse_dseg.nii.gz").touch()
    assert data.labels_beside(scan) is None
    known = tmp_path / "sub-1_ses-1_seg-freesurfer_dseg.nii.gz"
    known.touch()
    assert data.labels_beside(scan) == (known, "freesurfer")


def test_scores_of_a_case_with_known_answers(people):
    """People moved by 2 and by 4 mm along x: the base is 3 mm off, an atlas of 3 mm is not."""
    shifted = []
    for person, mm in zip(people[:2], (2.0, 4.0), strict=True):
        velocity = np.zeros((3, *SHAPE), np.float16)
        velocity[0] = mm
        shifted.append(replace(person, velocity_mm=velocity))
    middle = np.zeros((3, *SHAPE), np.float32)
    middle[0] = 3.0
    brain = torch.ones(SHAPE)
    score = {
        name: scores.score_group("all", shifted, name, lambda _c, v=v: v, GRID, brain, ["sex"])
        for name, v in (("base", 0 * middle), ("atlas", middle))
    }
    assert score["base"].centrality_mm == pytest.approx(3)
    assert score["atlas"].centrality_mm == pytest.approx(0, abs=1e-4)
    assert score["base"].distance_mm == pytest.approx(3)
    assert score["atlas"].distance_mm == pytest.approx(1)
    for one in score.values():  # a variance of 2 mm^2 over two people
        assert (one.people, one.folded, one.roughness) == (2, 0, pytest.approx(0, abs=1e-5))
        assert one.chance_mm == pytest.approx(0.921, abs=1e-3)  # a mean length, not a root


def test_dice_is_that_of_people_spread_over_a_group(people, base, monkeypatch):
    """Of three people, five are asked for: each is registered once."""
    seen = []
    monkeypatch.setattr(scores, "carried_dice", lambda p, _atlas: seen.append(p.label) or 0.5)
    monkeypatch.setattr("cadiff_cli.atlas.SPACING_MM", SPACING)
    score = scores.GroupScore("all", "base", 3, 0, 0.0, 0.0, 0.0, 0.0)
    still = np.zeros((3, *SHAPE), np.float32)
    options = (people[:3], lambda _c: still, base, GRID, ["sex"])
    done = scores.register_some(score, *options, 5)
    assert sorted(seen) == sorted(p.label for p in people[:3])
    assert (done.dice, done.registered) == (0.5, 3)


def test_people_of_whom_the_model_knows_nothing_are_named(trained, people, caplog):
    old = replace(people[0], age_years=110.0, name="sub-old")
    assert data.known_to(trained.space, [people[1], old]) == [people[1]]
    assert "toys/sub-old is left out: age 110" in caplog.text


def test_volumes_follow_the_jacobian(base):
    still, grown = (
        structure_volumes(base, deform(GRID, velocity_of(scale).astype(np.float32), GRID))
        for scale in (1.0, 1.2)
    )
    assert still[4] == pytest.approx(float((base.labels.data == 4).sum()) * SPACING**3)
    assert grown[4] / still[4] == pytest.approx(1.2**3, rel=0.05)


def test_folds_are_counted():
    rng = np.random.default_rng(0)
    wild = torch.from_numpy(rng.normal(0, 60, (1, 3, *SHAPE))).float()
    assert scores.count_folds(wild, [SPACING] * 3) > 0
    assert scores.count_folds(torch.zeros(1, 3, *SHAPE), [SPACING] * 3) == 0


def test_a_curve_fits_its_law_and_widens_with_noise():
    ages = np.linspace(20, 90, 40)
    law = np.exp(0.3 + 0.02 * (ages - 50) + 2e-4 * (ages - 50) ** 2)
    middle, low, high, *_ = scores.Trend.of(ages, law).at(70)
    assert (middle, low, high) == pytest.approx((np.exp(0.3 + 0.4 + 0.08),) * 3)
    noisy = law * np.exp(np.random.default_rng(0).normal(0, 0.2, 40))
    middle, low, high, least, most = scores.Trend.of(ages, noisy).at(70)
    assert least < low < np.exp(0.78) < high < most
    assert np.log(most / middle) == pytest.approx(1.96 * 0.2, rel=0.3)


def test_the_commands_train_and_compare(people, base, tmp_path, monkeypatch):
    """Options in, tables out; the people need not be prepared from scans again."""
    folder = tmp_path / "toys"
    config = tmp_path / "tiny.toml"
    config.write_text(
        'kind = "atlas"\nbase = "toy"\nspacing_mm = 8\n'
        "[net]\ncomponents = 2\nwidth = 16\ndepth = 1\nheads = 2\n"
        "[train]\nsteps = 3\nbatch = 2\nneighbours = 4\n"
    )
    prepared_on: list[str] = []
    monkeypatch.setattr(data, "prepare_people", lambda *a: prepared_on.append(a[-1]) or people)
    monkeypatch.setattr(evaluate, "prepare_people", lambda *_: people)
    monkeypatch.setattr(evaluate, "load_training_template", lambda _: base)
    monkeypatch.setattr(data, "base_grid", lambda *_: GRID)
    monkeypatch.setattr("cadiff_cli.atlas.SPACING_MM", SPACING)
    monkeypatch.setattr("cadiff_cli.training.templates.load_training_template", lambda _: base)
    run = tmp_path / "run"
    options = [str(folder), str(config), "-o", str(run), "--device", "cpu"]
    done = CliRunner().invoke(atlas_train.command, options, catch_exceptions=False)
    assert done.exit_code == 0
    assert prepared_on == ["cpu"]
    table = (run / "held_out.tsv").read_text().splitlines()
    assert table[0].split("\t") == ["person", "age", "base", "regression", "atlas"]
    assert len(table) == 1 + 8
    model = str(run / "model.safetensors")
    options = [model, str(folder), "-o", str(tmp_path / "scores"), "--given", "age"]
    done = CliRunner().invoke(atlas_evaluate.command, options, catch_exceptions=False)
    assert done.exit_code == 0
    groups = (tmp_path / "scores" / "atlas_groups.tsv").read_text().splitlines()
    assert len(groups) == 1 + 3 * 3
    assert sum(int(line.split("\t")[2]) for line in groups[1:]) == 3 * 8
    ages = (tmp_path / "scores" / "atlas_ages.tsv").read_text().splitlines()
    assert ages[0].split("\t")[-3:] == ["base", "regression", "atlas"]
    with pytest.raises(UsageError, match="height"):
        CliRunner().invoke(
            atlas_evaluate.command, [*options[:-1], "height"], catch_exceptions=False
        )


def test_a_base_is_a_name(tmp_path):
    """A folder would be looked up by the name of its template, which may be another's."""
    config = tmp_path / "own.toml"
    config.write_text('kind = "atlas"\nbase = "./tpl-Mine"\n')
    with pytest.raises(UsageError, match=r"base is './tpl-Mine'"):
        CliRunner().invoke(
            atlas_train.command,
            [str(tmp_path), str(config), "-o", str(tmp_path / "run"), "--device", "cpu"],
            catch_exceptions=False,
        )


def test_folders_of_one_name_are_refused(base, tmp_path):
    """Both would have a person ``bids/sub-01``."""
    folders = [tmp_path / "a" / "bids", tmp_path / "b" / "bids"]
    with pytest.raises(UsageError, match="two folders are called 'bids'"):
        data.prepare_people(folders, base, SPACING, tmp_path / "cache")


def test_one_scan_of_each_person_is_taken(tmp_path):
    for name in (
        "sub-1/ses-a/anat/sub-1_ses-a",
        "sub-1/ses-b/anat/sub-1_ses-b",
        "sub-2/anat/sub-2",
    ):
        path = tmp_path / f"{name}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        path.touch()
    assert {k: p.name for k, p in scans_of(tmp_path).items()} == {
        "1": "sub-1_ses-a_T1w.nii.gz",
        "2": "sub-2_T1w.nii.gz",
    }
    with pytest.raises(MissingInputError):
        scans_of(tmp_path / "none")
    with pytest.raises(DataError, match="nobody's age"):
        known_people(tmp_path)
    (tmp_path / "participants.tsv").write_text("participant_id\tsex\nsub-1\tF\n")
    with pytest.raises(DataError, match="no column age"):
        known_people(tmp_path)
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-1\t90+\nsub-2\tn/a\n")
    assert known_people(tmp_path).of("1").age_years == 90


def test_the_brain_is_weighed_on_the_velocity_grid(base):
    assert (brain_weight(base, GRID) == (base.brain.data > 0)).all()


def test_the_released_atlas_ages(monkeypatch):
    """Ventricles grow with age as in people, and hippocampi shrink in the old."""
    if not (weights_folder() / DEFAULT_ATLAS / "model.safetensors").exists():
        pytest.skip(f"no released weights {DEFAULT_ATLAS}")
    monkeypatch.setattr("cadiff_cli.atlas.SPACING_MM", 4.0)
    model = models.load(AtlasModel)
    base = replace(load_template(model.base, offline=True), labels=model.labels)
    assert model.grid.shape == base_grid(base, 4.0).shape
    volumes = [
        structure_volumes(
            base, deform(base.brain.grid, model.velocity(Condition(age_years=age)), model.grid)
        )
        for age in (30, 50, 70, 90)
    ]
    ventricles = [share_of(v, VENTRICLE_CODES) for v in volumes]
    assert ventricles == sorted(ventricles)
    assert ventricles[2] > 1.7 * ventricles[0]  # people's regression 2.1
    hippocampi = [share_of(v, (17, 53)) for v in volumes]
    assert hippocampi[3] < 0.97 * hippocampi[2] < 0.96 * hippocampi[1]  # people's 0.88, 0.95
    assert not model.seen & set(model.training["held_out"])
