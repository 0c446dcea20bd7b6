"""A training step's question: which times, which states, which losses, for every method."""

from dataclasses import replace

import pytest
import torch
from conftest import NO_CHANGE, TINY, awake, seeded
from torch.nn.functional import one_hot

from cadiff_cli.device import autocast
from cadiff_cli.nets.blocks import channels_last
from cadiff_cli.training.batch import stack
from cadiff_cli.training.segmenter.config import Training, load
from cadiff_cli.training.segmenter.losses import Losses
from cadiff_cli.training.segmenter.objective import SegmenterObjective, Times
from cadiff_cli.training.segmenter.patches import Patch, draw_patch
from cadiff_cli.training.settings import shipped_configs

MANY = 40_000
UNIFORM = Times(0.0, 0.0, 0.0)
PARTS = tuple(Losses.__dataclass_fields__)

METHODS = shipped_configs(Training.kind)


def net_of(name):
    """A method's network in small, every layer awake."""
    sizes = ("channels", "head_channels", "head_blocks", "time_channels", "embed_channels")
    small = {key: getattr(TINY, key) for key in (*sizes, "prior_shape", "taca_sizes")}
    return channels_last(awake(replace(load(name).net, **small)))


def objective_of(name, **settings):
    return replace(load(name).train.objective, fine=32, **settings)


@pytest.fixture(scope="module")
def patch(toy_sample, mirror):
    return draw_patch(toy_sample, 64, mirror, NO_CHANGE, seeded())


@pytest.fixture(scope="module")
def other(toy_sample, mirror):
    """The same image with other labels and another field."""
    drawn = draw_patch(toy_sample, 64, mirror, NO_CHANGE, seeded())
    return Patch(drawn.image, drawn.classes.flip(1, 2, 3), 1 - drawn.field)


def part_of(patch, size):
    """The middle of a patch, where the brain is."""
    fine, coarse = (slice((n - m) // 2, (n + m) // 2) for n, m in ((64, size), (32, size // 2)))
    return Patch(
        patch.image[..., fine, fine, fine],
        patch.classes[..., fine, fine, fine],
        patch.field[..., coarse, coarse, coarse],
    )


@torch.no_grad()
def values(objective, net, patch, seed=0):
    with autocast(torch.device("cpu")):
        losses = objective(net, patch, seeded(seed))
    return {part: float(getattr(losses, part)) for part in PARTS}


class Spy:
    """Notes what a network's trunk is asked, and lets it answer."""

    def __init__(self, net, monkeypatch):
        self.calls = []
        trunk = net.trunk

        def watched(image, d_t, m_t, t_d, t_m):
            self.calls.append((torch.is_grad_enabled(), d_t, m_t, t_d, t_m))
            return trunk(image, d_t, m_t, t_d, t_m)

        monkeypatch.setattr(net, "trunk", watched)


def near(share, expected):
    """Within four standard errors of a share of ``MANY`` draws."""
    error = (expected * (1 - expected) / MANY) ** 0.5
    return abs(float(share.float().mean()) - expected) <= 4 * error


@pytest.mark.parametrize(
    "times", [Times(), UNIFORM, Times(0.2, 0.3, 0.9), Times(1.0, 0.0, 0.0)], ids=str
)
def test_times_come_in_the_promised_shares(times):
    t_d, t_m = times.draw(MANY, seeded())
    assert t_d.shape == t_m.shape == (MANY,)
    assert near(t_d == 0, times.known_field)
    assert near(t_d == 1, times.lost_field)
    assert near(t_m == 1, times.pure_noise)
    assert not (t_m == 0).any()
    for t in (t_d, t_m):
        rest = t[(t > 0) & (t < 1)]
        if len(rest):
            quarters = torch.histc(rest, 4, 0, 1) / len(rest)
            assert (quarters - 0.25).abs().max() < 0.03


def test_the_two_times_are_independent():
    times = Times()
    t_d, t_m = times.draw(MANY, seeded())
    assert near((t_d == 0) & (t_m == 1), times.known_field * times.pure_noise)
    assert near((t_d == 1) & (t_m == 1), times.lost_field * times.pure_noise)
    both = torch.stack(UNIFORM.draw(MANY, seeded(1)))
    assert abs(float(torch.corrcoef(both)[0, 1])) < 4 / MANY**0.5


def test_the_members_of_a_batch_have_times_of_their_own():
    draws = torch.stack([torch.cat(Times().draw(2, seeded(s))) for s in range(200)])
    d_1, d_2, m_1, m_2 = draws.T
    assert 26 < ((d_1 == 0) != (d_2 == 0)).sum() < 76  # 2 * 0.85 * 0.15 of 200
    assert 38 < ((m_1 == 1) != (m_2 == 1)).sum() < 90  # 2 * 0.8 * 0.2 of 200


def test_a_dual_field_is_always_known():
    t_d, t_m = load("dual").train.objective.times.draw(MANY, seeded())
    assert not t_d.any()
    assert t_m.std() > 0.1


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_every_layer_it_uses(name, patch):
    """Also when the state is recycled, where a cast of the weights could outlive ``no_grad``."""
    net, objective = net_of(name), objective_of(name)
    if objective.recycle:
        objective = replace(objective, recycle=1.0, times=replace(objective.times, pure_noise=0.0))
    with autocast(torch.device("cpu")):
        losses = objective(net, stack([patch, patch]), seeded(3))
    for part in PARTS:
        assert getattr(losses, part).shape == ()
        assert getattr(losses, part).isfinite()
    assert losses.label > 0
    assert losses.coarse > 0
    assert bool(losses.field) == bool(objective.field_weight)
    assert bool(losses.consistency) == (objective.consistency is not None)
    losses.total.backward()
    gradients = {key: p.grad for key, p in net.named_parameters()}
    untouched = {key for key, g in gradients.items() if g is None}
    field_counts = bool(objective.field_weight or objective.consistency)
    assert untouched == (set() if field_counts else {"to_field.weight", "to_field.bias"})
    for key, gradient in gradients.items():
        if key not in untouched:
            assert gradient.isfinite().all(), key
    # Every stage of the network learns: one convolution of each.
    for key in ("stem", "encoder.3.0.conv_1", "decoder.0.conv_1", "head.0.conv_1", "head_label"):
        assert gradients[f"{key}.weight"].any(), key


def test_a_plain_unet_is_told_neither_field_nor_noise(patch, other):
    """Another field, another noise, other times: the same answer.  The 2 mm loss has no cube."""
    elsewhere = Patch(patch.image, patch.classes, other.field)
    for name, answers in (("unet", 1), ("cadiff", 4)):
        net, objective = net_of(name), objective_of(name, recycle=0.0, times=UNIFORM)
        losses = [values(objective, net, p, seed) for p in (patch, elsewhere) for seed in (0, 1)]
        assert len({loss["coarse"] for loss in losses}) == answers


def test_plain_diffusion_is_told_the_noise_but_not_the_field(patch, other):
    elsewhere = Patch(patch.image, patch.classes, other.field)
    for name, same in (("diffusion", True), ("dual", False)):
        net, objective = net_of(name), objective_of(name)
        here, there = (values(objective, net, p) for p in (patch, elsewhere))
        assert (here == there) is same
        assert values(objective, net, patch, 1)["coarse"] != here["coarse"]


def test_a_seed_decides_the_losses(patch):
    net, objective = net_of("cadiff"), objective_of("cadiff")
    assert values(objective, net, patch, 2) == values(objective, net, patch, 2)
    assert values(objective, net, patch, 2) != values(objective, net, patch, 3)


def test_recycling_asks_once_without_a_gradient(patch, monkeypatch):
    """First at pure noise, to find out what the network believes; then the step itself."""
    net = net_of("cadiff")
    spy = Spy(net, monkeypatch)
    objective = objective_of("cadiff", recycle=1.0, times=Times(1.0, 0.0, 0.0))
    objective(net, patch, seeded())
    (first, second) = spy.calls
    grad, d_t, _, t_d, t_m = first
    assert not grad
    assert (float(t_d), float(t_m)) == (0, 1)
    torch.testing.assert_close(d_t, 2 * patch.field - 1)
    grad, d_t, m_t, t_d, t_m = second
    assert grad
    assert 0 < t_m < 1
    torch.testing.assert_close(d_t, 2 * patch.field - 1)
    assert not m_t.requires_grad


@pytest.mark.parametrize(
    ("name", "recycle", "times"),
    [
        ("cadiff", 0.0, UNIFORM),
        ("cadiff", 1.0, Times(0.5, 0.5, 1.0)),
        ("unet", 1.0, UNIFORM),
    ],
    ids=["never", "pure noise", "no labels"],
)
def test_where_there_is_nothing_to_recycle_nothing_is(patch, monkeypatch, name, recycle, times):
    net = net_of(name)
    spy = Spy(net, monkeypatch)
    objective_of(name, recycle=recycle, times=times)(net, patch, seeded())
    assert len(spy.calls) == 1


def test_recycled_states_are_innocent_of_the_truth(patch, other, monkeypatch):
    """Nothing that the network is shown depends on the labels, or on a field that is not known."""
    net = net_of("cadiff")

    def shown(truth, recycle):
        with monkeypatch.context() as patched:
            spy = Spy(net, patched)
            values(objective_of("cadiff", recycle=recycle, times=UNIFORM), net, truth)
        return [x for _, *call in spy.calls for x in call]

    one, two = shown(patch, 1.0), shown(other, 1.0)
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
    given, turned = shown(patch, 0.0), shown(other, 0.0)
    assert not torch.equal(given[0], turned[0])
    assert not torch.equal(given[1], turned[1])


def test_recycling_happens_in_its_share(patch, monkeypatch):
    """Half of the steps ask twice.  The answers do not matter here."""
    net = net_of("cadiff")
    small = part_of(patch, 16)
    objective = objective_of("cadiff", recycle=0.5, times=UNIFORM)
    twice = 0
    for seed in range(40):
        with monkeypatch.context() as patched, torch.no_grad():
            spy = Spy(net, patched)
            objective(net, small, seeded(seed))
        twice += len(spy.calls) == 2
    assert 10 < twice < 30


def test_the_one_millimetre_loss_sees_a_cube_and_its_own_labels(patch, monkeypatch):
    """An oracle that reads the labels off the image: right wherever the cube was cut."""
    net, objective = net_of("cadiff"), objective_of("cadiff", recycle=0.0)
    drawn = part_of(patch, 48)
    image = drawn.classes[:, None] / 64
    cubes = []

    def refine(cube, coarse, t_d, t_m):
        assert cube.shape[2:] == (32, 32, 32)
        assert coarse.logits.shape[2:] == (16, 16, 16)
        cubes.append(cube)
        classes = (cube[:, 0] * 64).round().long()
        return 40 * one_hot(classes, 41).permute(0, 4, 1, 2, 3).float()

    monkeypatch.setattr(net, "refine", refine)
    for seed in range(4):
        told = Patch(image, drawn.classes, drawn.field)
        assert values(objective, net, told, seed)["label"] < 1e-3
    assert not all(torch.equal(cube, cubes[0]) for cube in cubes)


def test_the_rim_of_the_cube_does_not_count(patch, monkeypatch):
    """What stands there may be anything; one voxel further in, it may not."""
    net, objective = net_of("cadiff"), objective_of("cadiff", recycle=0.0, rim=3)
    answer = torch.zeros(1, 41, 32, 32, 32)
    monkeypatch.setattr(net, "refine", lambda *_: answer.clone())
    small = part_of(patch, 48)
    before = values(objective, net, small)["label"]
    for depth, same in ((3, True), (4, False)):
        answer.zero_()
        answer[:, 7] = 5.0
        inner = slice(depth, -depth)
        answer[:, :, inner, inner, inner] = 0
        assert (values(objective, net, small)["label"] == before) == same


@pytest.mark.parametrize(("focus", "often"), [(0.0, False), (1.0, True)])
def test_focus_finds_the_smallest_structure(focus, often):
    """8 voxels of 100,000: met as often as the other two structures, where wanted."""
    classes = torch.ones(1, 48, 48, 48, dtype=torch.long)
    classes[:, 24:] = 2
    classes[:, 40:42, 40:42, 40:42] = 3
    objective = SegmenterObjective(focus=focus)
    met = 0
    for seed in range(60):
        x, y, z = objective._cube(classes, 24, seeded(seed))
        assert all(n % 2 == 0 and 0 <= n <= 24 for n in (x, y, z))
        met += bool((classes[:, x : x + 24, y : y + 24, z : z + 24] == 3).any())
    assert (met > 18) == often


def test_weights_weigh(patch):
    """Twice the weight is twice the part, and no part knows of the others."""
    net, objective = net_of("cadiff"), objective_of("cadiff")
    heavy = replace(
        objective,
        coarse_weight=2 * objective.coarse_weight,
        field_weight=2 * objective.field_weight,
        consistency=replace(objective.consistency, weight=2 * objective.consistency.weight),
    )
    before, after = values(objective, net, patch), values(heavy, net, patch)
    assert after["label"] == before["label"]
    for part in ("coarse", "field", "consistency"):
        assert after[part] == pytest.approx(2 * before[part], rel=1e-5)
