"""The network: shapes, times, and what it can know when."""

from dataclasses import replace

import pytest
import torch
from conftest import awake
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.profiler import ProfilerActivity, profile

from cadiff_cli.config import as_dict
from cadiff_cli.diffusion.process import PROCESSES, Cosine, Gaussian
from cadiff_cli.errors import DataError, UsageError
from cadiff_cli.io.models import settings_of
from cadiff_cli.nets.blocks import (
    ChannelNorm,
    Concatenate,
    Conv3d,
    DynamicConv1d,
    TimeAdaptedChannelAttention,
    TimeEmbedding,
    at_blocks,
    last,
    shuffle,
    unshuffle,
    upsampled,
)
from cadiff_cli.nets.segmenter import CADiffNet, LabelPrior, NetConfig

SPACE = (32, 16, 48)
HALF = tuple(n // 2 for n in SPACE)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture
def inputs(draw):
    return draw(1, 1, *SPACE).sigmoid(), draw(1, 3, *HALF), draw(1, 41, *HALF)


@pytest.fixture
def fresh_net(tiny_config):
    """As training begins, with a prior that is not flat."""
    torch.manual_seed(0)
    net = CADiffNet(tiny_config).eval().requires_grad_(False)
    net.prior.logits.normal_()
    return net


def at(t):
    return torch.full((1,), float(t))


def test_answers_have_the_promised_shapes(tiny_net, inputs):
    coarse, logits = tiny_net(*inputs, at(0), at(1))
    assert coarse.features.shape == (1, 8, *HALF)
    assert coarse.field.shape == (1, 3, *HALF)
    assert coarse.logits.shape == (1, 41, *HALF)
    assert logits.shape == (1, 41, *SPACE)
    assert logits.isfinite().all()


def test_convolutions_stay_channels_last(tiny_net, inputs):
    """Both the weights and what flows: a silent copy to the other layout costs half the speed."""
    assert tiny_net.stem.weight.is_contiguous(memory_format=torch.channels_last_3d)
    coarse, _ = tiny_net(*inputs, at(0), at(1))
    assert coarse.features.is_contiguous(memory_format=torch.channels_last_3d)


def test_shuffle_inverts_unshuffle(draw):
    image, blocks = draw(2, 1, 4, 6, 8), draw(2, 8, 2, 3, 4)
    torch.testing.assert_close(shuffle(unshuffle(image)), image, rtol=0, atol=0)
    torch.testing.assert_close(unshuffle(shuffle(blocks)), blocks, rtol=0, atol=0)


def test_unshuffled_voxels_stay_in_their_block(draw):
    image = draw(1, 1, 4, 6, 8)
    torch.testing.assert_close(unshuffle(image).mean(1), F.avg_pool3d(image, 2)[:, 0])


def test_config_survives_plain_values(tiny_config):
    assert settings_of(NetConfig, as_dict(tiny_config)) == tiny_config


def test_settings_of_older_weights_mean_the_whole_method(tiny_config):
    """Switches that a file does not know are on; its noise is Gaussian."""
    values = as_dict(tiny_config)
    for switch in ("reads_field", "reads_coordinates", "reads_labels", "attention"):
        assert values.pop(switch) is True
    assert PROCESSES[values.pop("process")] == Gaussian(Cosine())
    assert settings_of(NetConfig, values) == tiny_config


@pytest.mark.parametrize("which", ["field", "label"])
def test_both_times_matter(tiny_net, inputs, which):
    def answer(t):
        times = (at(t), at(0.5)) if which == "field" else (at(0.5), at(t))
        return tiny_net.trunk(*inputs, *times).features

    assert (answer(0.2) - answer(0.8)).abs().max() > 1e-3


def test_a_known_field_is_returned_as_it_is(tiny_net, fresh_net, inputs):
    """At t_d = 0 whatever the weights say is multiplied by zero."""
    image, d_t, m_t = inputs
    for net in (tiny_net, fresh_net):
        coarse = net.trunk(image, d_t, m_t, at(0), at(0.6))
        torch.testing.assert_close(coarse.field, d_t, rtol=0, atol=1e-6)


def test_pure_noise_tells_nothing_of_the_field(fresh_net, inputs, draw):
    """At t_d = 1 a fresh network says "the middle" whatever the noise is: no leak."""
    image, _, m_t = inputs
    one, two = (fresh_net.trunk(image, 3 * draw(1, 3, *HALF), m_t, at(1), at(1)) for _ in range(2))
    for coarse in (one, two):
        torch.testing.assert_close(coarse.field, torch.zeros_like(coarse.field), rtol=0, atol=1e-6)
    torch.testing.assert_close(one.logits, two.logits, rtol=0, atol=1e-4)


def test_a_fresh_network_answers_with_its_prior(fresh_net, inputs):
    image, d_t, m_t = inputs
    coarse, fine = fresh_net(image, d_t, m_t, at(0), at(1))
    prior = fresh_net.prior(d_t)
    # Points on their way through a Wiener filter of 1 lose a rounding error.
    close = {"atol": 1e-3, "rtol": 0}
    torch.testing.assert_close(coarse.logits, prior, **close)
    up = F.interpolate(prior, scale_factor=2, mode="trilinear")
    torch.testing.assert_close(fine, up, **close)


@pytest.fixture
def switched(tiny_config, draw):
    """A factory of networks with some switches off, every layer awake, the prior not flat."""
    prior = draw(1, 41, *tiny_config.prior_shape)

    def make(*off):
        net = awake(replace(tiny_config, **dict.fromkeys(off, False)))
        net.prior.logits.copy_(prior)
        return net.requires_grad_(False)

    return make


@pytest.mark.parametrize(
    ("off", "told"),
    [
        ((), {"d_t", "m_t", "t_d", "t_m"}),
        (("attention",), {"d_t", "m_t", "t_d", "t_m"}),
        (("reads_coordinates",), {"d_t", "m_t", "t_d", "t_m"}),
        (("reads_field",), {"m_t", "t_m"}),
        (("reads_labels",), {"d_t", "t_d"}),
        (("reads_field", "reads_labels"), set()),
        (("reads_field", "reads_labels", "attention"), set()),
    ],
    ids=["all", "no attention", "prior only", "no field", "no labels", "neither", "plain"],
)
def test_switches_decide_what_the_network_is_told(switched, inputs, draw, off, told):
    """Changing anything else changes nothing, to the last bit, at either resolution."""
    net = switched(*off)
    image, d_t, m_t = inputs
    given = {"d_t": d_t, "m_t": m_t, "t_d": at(0.3), "t_m": at(0.6)}
    other = {"d_t": draw(1, 3, *HALF), "m_t": draw(1, 41, *HALF), "t_d": at(0.7), "t_m": at(1)}
    coarse, logits = net(image, **given)
    for name in given:
        changed, fine = net(image, **given | {name: other[name]})
        assert torch.equal(fine, logits) is (name not in told), name
        assert torch.equal(changed.logits, coarse.logits) is (name not in told), name
    assert not torch.equal(net(image.flip(2), **given)[1], logits)


def test_without_coordinates_the_field_is_known_by_its_prior_alone(switched, inputs, draw):
    """Where every place says the same, all known fields look the same."""
    image, _, m_t = inputs
    for off, same in (((), False), (("reads_coordinates",), True)):
        net = switched(*off)
        net.prior.logits.zero_()
        here, there = (net(image, draw(1, 3, *HALF), m_t, at(0), at(0.5))[1] for _ in range(2))
        assert torch.equal(here, there) is same


def test_plain_skips_are_concatenated(draw):
    a, b, e = draw(2, 4, 3, 3, 3), draw(2, 5, 3, 3, 3), draw(2, 16)
    joined = Concatenate()(a, b, e, e)
    assert torch.equal(joined[:, :4], a)
    assert torch.equal(joined[:, 4:], b)


def test_the_prior_is_read_where_the_field_points():
    prior = LabelPrior(2, (5, 4, 3))
    prior.logits.normal_(generator=torch.Generator().manual_seed(0))
    cell = torch.tensor([3, 1, 2])
    state = (2 * cell / torch.tensor([4, 3, 2]) - 1).reshape(1, 3, 1, 1, 1)
    read = prior(state)[0, :, 0, 0, 0]
    torch.testing.assert_close(read, prior.logits[0, :, 3, 1, 2], atol=1e-5, rtol=1e-5)
    # Beyond the extents the border goes on.
    torch.testing.assert_close(
        prior(torch.full((1, 3, 1, 1, 1), 9.0))[0, :, 0, 0, 0], prior.logits[0, :, -1, -1, -1]
    )


def test_attention_with_silent_fusion_is_a_constant(draw):
    """sigmoid(0) = 1/2: every channel is multiplied by 1.5."""
    taca = TimeAdaptedChannelAttention(16, (3, 5)).requires_grad_(False)
    torch.nn.init.zeros_(taca.fuse.weight)
    torch.nn.init.zeros_(taca.fuse.bias)
    a, b, e = draw(2, 4, 3, 3, 3), draw(2, 4, 3, 3, 3), draw(2, 16)
    torch.testing.assert_close(taca(a, b, e, e), 1.5 * torch.cat([a, b], dim=1))


def test_attention_scales_channels_between_one_and_two(draw):
    torch.manual_seed(0)
    taca = TimeAdaptedChannelAttention(16, (3, 5)).requires_grad_(False)
    a, b = draw(2, 4, 3, 3, 3), draw(2, 4, 3, 3, 3)
    e_1, e_2 = draw(2, 16), draw(2, 16)
    joined = torch.cat([a, b], dim=1)
    factor = taca(a, b, e_1, e_2) / joined
    torch.testing.assert_close(factor, factor[:, :, :1, :1, :1].expand_as(factor))
    assert ((factor > 1) & (factor < 2)).all()
    assert (factor - taca(a, b, e_2, e_1) / joined).abs().max() > 1e-4


def test_a_mixture_of_equal_kernels_is_a_convolution(draw):
    """Whatever the time, and for each sample alone."""
    conv = DynamicConv1d(5, 16).requires_grad_(False)
    kernel = draw(5)
    conv.weight.copy_(kernel.expand(4, 5))
    conv.bias.fill_(0.3)
    pooled = draw(3, 20)
    plain = F.conv1d(pooled[:, None], kernel[None, None], padding=2)[:, 0] + 0.3
    torch.testing.assert_close(conv(pooled, draw(3, 16)), plain)


def test_each_sample_has_its_own_kernel(draw):
    torch.manual_seed(0)
    conv = DynamicConv1d(5, 16).requires_grad_(False)
    pooled, e = draw(1, 20).expand(2, 20), draw(2, 16)
    together = conv(pooled, e)
    assert (together[0] - together[1]).abs().max() > 1e-4
    for b in range(2):
        torch.testing.assert_close(together[b : b + 1], conv(pooled[b : b + 1], e[b : b + 1]))


def test_norm_is_per_voxel(draw):
    """So that a patch and the whole volume agree: a voxel's norm ignores its neighbours."""
    norm, x = ChannelNorm(6), draw(2, 6, 4, 4, 4)
    normed = norm(x)
    torch.testing.assert_close(norm(x[:, :, 1:3, :2]), normed[:, :, 1:3, :2])
    torch.testing.assert_close(normed.mean(1), torch.zeros(2, 4, 4, 4), atol=1e-5, rtol=0)


def test_time_embeddings_differ():
    torch.manual_seed(0)
    embedded = TimeEmbedding(16)(torch.linspace(0, 1, 11))
    assert torch.cdist(embedded, embedded)[~torch.eye(11, dtype=torch.bool)].min() > 1e-3


def test_channels_last_keeps_values(draw):
    x = draw(1, 3, 4, 4, 4)
    torch.testing.assert_close(last(x), x, rtol=0, atol=0)


@pytest.fixture
def part_net(tiny_config):
    """A network whose head works at 2 mm."""
    return awake(replace(tiny_config, head_stride=2)).eval().requires_grad_(False)


def test_a_head_at_2_mm_has_answers_at_1_mm(part_net, inputs):
    coarse, logits = part_net(*inputs, at(0), at(1))
    assert logits.shape == (1, 41, *SPACE)
    smooth = F.interpolate(coarse.logits, scale_factor=2, mode="trilinear")
    assert not torch.allclose(logits, smooth)
    for weights in (part_net.head_label.weight, part_net.head_label.bias):
        weights.zero_()
    torch.testing.assert_close(part_net.refine(inputs[0], coarse, at(0), at(1)), smooth)


def test_each_part_of_a_voxel_has_its_own_logits(part_net, inputs):
    """The part at (i, j, k) of every 2 mm voxel gets the bias of that part, and class by class."""
    part_net.head_label.weight.zero_()
    bias = part_net.head_label.bias.copy_(torch.arange(8 * 41.0)).reshape(2, 2, 2, 41)
    coarse, logits = part_net(*inputs, at(0), at(1))
    rest = logits - F.interpolate(coarse.logits, scale_factor=2, mode="trilinear")
    for i, j, k in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
        part = rest[0, :, i::2, j::2, k::2]
        expected = bias[i, j, k].reshape(-1, 1, 1, 1).expand_as(part)
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-3)


def test_blocks_are_upsampled_as_the_whole_is(draw):
    coarse = draw(1, 3, 4, 5, 6)
    blocks = torch.ones(4, 5, 6).nonzero()[torch.randperm(120)[:50]]
    whole = F.interpolate(coarse, scale_factor=2, mode="trilinear")[0].permute(1, 2, 3, 0)
    found = upsampled(coarse[0].permute(1, 2, 3, 0), blocks)
    torch.testing.assert_close(found, at_blocks(whole, blocks))


def test_voxels_of_blocks_are_ordered_as_unshuffled(draw):
    image = draw(1, 1, 4, 6, 8)
    blocks = torch.tensor([[1, 2, 3], [0, 0, 0], [1, 0, 2]])
    found = at_blocks(image[0].permute(1, 2, 3, 0), blocks)
    parts = unshuffle(image)[0].permute(1, 2, 3, 0)
    assert torch.equal(found[..., 0], parts[blocks.unbind(1)])


@pytest.mark.parametrize("name", ["tiny_net", "part_net"])
def test_some_blocks_are_refined_as_the_whole_is(name, inputs, request):
    net = request.getfixturevalue(name)
    with torch.no_grad():
        coarse = net.trunk(*inputs, at(0), at(1))
        whole = net.refine(inputs[0], coarse, at(0), at(1))[0].permute(1, 2, 3, 0)
        features = net.fine_features(inputs[0], coarse, at(0), at(1))
        blocks = torch.ones(coarse.logits.shape[2:]).nonzero()[::3]
        found = net.refine_blocks(features, coarse.logits, blocks)
    torch.testing.assert_close(found, at_blocks(whole, blocks), rtol=1e-4, atol=1e-4)


def test_a_prior_that_was_looked_up_is_that_of_the_field(fresh_net, inputs):
    image, d_0, m_t = inputs
    anew = fresh_net.trunk(image, d_0, m_t, at(0), at(1))
    known = fresh_net.trunk(image, d_0, m_t, at(0), at(1), fresh_net.look_up(d_0, at(0)))
    assert torch.equal(anew.logits, known.logits)
    other = fresh_net.trunk(image, d_0, m_t, at(0), at(1), fresh_net.look_up(-d_0, at(0)))
    assert not torch.allclose(anew.logits, other.logits, atol=0.1)


@pytest.mark.parametrize("name", ["tiny_net", "part_net"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_sums_in_place_are_sums(name, precision, inputs, request):
    """Inference overwrites what training must keep; both give the same answer."""
    net = request.getfixturevalue(name)
    image, d_0, m_t = inputs
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        prior = net.look_up(d_0, at(0))
        before = prior.logits.clone(), prior.embedded.clone(), image.clone(), m_t.clone()
        answers = []
        for wanted in (False, True):
            with torch.set_grad_enabled(wanted):
                coarse = net.trunk(image, d_0, m_t, at(0), at(1), prior)
                answers.append(net.refine(image, coarse, at(0), at(1)))
    assert torch.equal(*answers)
    after = prior.logits, prior.embedded, image, m_t
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("stride", [0, 3])
def test_a_head_of_another_stride_is_refused(stride, tiny_config):
    with pytest.raises(DataError, match=f"head_stride is {stride}"):
        CADiffNet(replace(tiny_config, head_stride=stride))


def test_a_network_begins_with_the_trunk_of_another(tiny_config, part_net):
    """Its own head stays where theirs has another shape, and is copied where it has the same."""
    torch.manual_seed(7)
    other = CADiffNet(tiny_config)
    with torch.no_grad():
        for weights in (*other.parameters(), other.prior.logits):
            weights.normal_()
    before = {name: p.clone() for name, p in part_net.head_parameters().items()}
    part_net.begin_with(other)
    theirs = other.state_dict()
    for name, weights in part_net.state_dict().items():
        assert torch.equal(weights, before[name] if name in before else theirs[name]), name
    same = CADiffNet(tiny_config)
    same.begin_with(other)
    assert all(torch.equal(w, theirs[name]) for name, w in same.state_dict().items())
    with pytest.raises(UsageError, match="another network"):
        CADiffNet(replace(tiny_config, time_channels=32)).begin_with(other)


@pytest.mark.parametrize(
    ("kernel", "stride", "rim", "shape"),
    [
        (3, 1, 1, (16, 12, 10)),
        (3, 1, 1, (2, 6, 5)),
        (2, 2, 0, (8, 6, 4)),
        (3, 1, 1, (7, 6, 5)),  # odd: no halves
        (2, 2, 0, (6, 6, 4)),
        (1, 1, 0, (8, 6, 4)),
    ],
)
def test_a_convolution_of_halves_is_the_convolution(draw, kernel, stride, rim, shape):
    plain, ours = nn.Conv3d(4, 6, kernel, stride, rim), Conv3d(4, 6, kernel, stride, rim)
    ours.load_state_dict(plain.state_dict())
    x = last(draw(1, 4, *shape))
    results = []
    for conv in (plain, ours):
        seen = x.clone().requires_grad_()
        out = conv(seen)
        out.square().sum().backward()
        results.append((out.detach(), seen.grad, conv.weight.grad, conv.bias.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_no_small_convolution_is_slow(tiny_config):
    """torch's own loop for a single volume in float32 costs up to 14 times oneDNN's."""
    net = CADiffNet(tiny_config)
    space = (32, 32, 32)
    half = tuple(n // 2 for n in space)
    image, field, label = (
        torch.rand(1, 1, *space),
        torch.rand(1, 3, *half),
        torch.rand(1, 41, *half),
    )
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        coarse, logits = net(image, field, label, at(0), at(1))
        (logits.mean() + coarse.logits.mean() + coarse.field.mean()).backward()
    wide = [
        event
        for event in seen.key_averages(group_by_input_shape=True)
        if event.key == "aten::slow_conv3d_forward" and event.input_shapes[1][-1] > 1
    ]
    assert not wide
