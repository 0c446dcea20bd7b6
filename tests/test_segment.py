"""Labels from conditions: repeatable, tiled or whole, mirrored, and on the scan's own grid."""

import json
from dataclasses import replace
from functools import partial

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import awake, dense
from scipy import ndimage
from test_cli import TABLES, segmented_alone

from cadiff_cli.cli import guarded
from cadiff_cli.config import Config, OutputConfig, SampleConfig
from cadiff_cli.errors import UsageError
from cadiff_cli.metrics.overlap import dice
from cadiff_cli.nets.models import Model
from cadiff_cli.products import Scan
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.stages.sampling import (
    TILE,
    Denoiser,
    DiffusionState,
    brain_blocks,
    by_tiles,
    class_probabilities,
)
from cadiff_cli.stages.segment import segment
from cadiff_cli.stages.volumes import volumes_mm3

SPACINGS = {
    "RAS": 1.0,
    "LAS": (1.0, 1.1, 1.3),
    "LPS": (1.5, 0.9, 1.0),
    "oblique": (1.0, 1.0, 1.25),
}
LARGE = (2, 41, 3, 42)
PRIOR = SampleConfig(steps=0)


def labels_of(head, model, conditions, sample, device="auto", **output):
    mask = Volume(head.codes > 0, head.t1.grid)
    config = Config(sample=sample, output=OutputConfig(**output))
    return segment(Scan(head.t1, "sub-01_T1w.nii.gz"), conditions, mask, model, config, device)


@pytest.fixture(scope="module")
def small_conditions(conditions_of, small_head):
    return conditions_of(small_head)


@pytest.fixture(scope="module", params=["known", "unknown"])
def given(request, small_conditions):
    """Conditions with their field, and without: then it is denoised with the labels."""
    return small_conditions if request.param == "known" else replace(small_conditions, field=None)


@pytest.fixture(scope="module")
def drawn(tiny_model, given):
    """Probabilities of one run, to compare others with."""
    return class_probabilities(given, tiny_model, SampleConfig(steps=2, flip=False))[0].values


def test_a_seed_decides(tiny_model, given, drawn):
    config = SampleConfig(steps=2, flip=False)
    again, _ = class_probabilities(given, tiny_model, config)
    torch.testing.assert_close(again.values, drawn, rtol=0, atol=0)
    other = SampleConfig(steps=2, flip=False, seed=1)
    different, _ = class_probabilities(given, tiny_model, other)
    assert (different.values - drawn).abs().max() > 1e-4


def test_probabilities_sum_to_one(drawn):
    torch.testing.assert_close(drawn.sum(1), torch.ones(len(drawn)), rtol=0, atol=1e-4)
    assert drawn.min() >= 0


def test_tiles_agree_with_the_whole(tiny_model, given, drawn):
    """Away from tile borders the network sees the same; only pooled attention differs.

    An unknown field differs too, and labels that follow it.
    """
    config = SampleConfig(steps=2, flip=False, tile=64)
    tiled, tile = class_probabilities(given, tiny_model, config)
    assert tile == 64
    assert not torch.equal(tiled.values, drawn)
    inside = torch.from_numpy(given.mask.data.flatten())[tiled.voxels]
    alike = (tiled.values.argmax(1) == drawn.argmax(1))[inside].float().mean()
    assert alike > (0.97 if given.field is None else 0.99)


def test_flipping_asks_about_the_mirrored_brain_too(tiny_model, given, drawn):
    """A distribution still, and another one."""
    both = class_probabilities(given, tiny_model, SampleConfig(steps=2, flip=True))[0].values
    torch.testing.assert_close(both.sum(1), torch.ones(len(both)), rtol=0, atol=1e-4)
    assert (both - drawn).abs().max() > 1e-4


def test_an_unknown_field_is_made_from_noise_with_the_labels(
    tiny_model, small_conditions, monkeypatch
):
    """Both times are the same, first pure noise; a known field is never noisy."""
    calls = []
    trunk = tiny_model.net.trunk

    def watched(image, d_t, m_t, t_d, t_m, prior):
        calls.append((d_t.clone(), float(t_d), float(t_m)))
        return trunk(image, d_t, m_t, t_d, t_m, prior)

    monkeypatch.setattr(tiny_model.net, "trunk", watched)
    config = SampleConfig(steps=2, flip=False)
    class_probabilities(replace(small_conditions, field=None), tiny_model, config)
    assert [(t_d, t_m) for _, t_d, t_m in calls] == [(1, 1), (0.5, 0.5)]
    first, second = (d_t for d_t, *_ in calls)
    assert float(first.mean()) == pytest.approx(0, abs=0.02)
    assert float(first.std()) == pytest.approx(1, abs=0.02)
    assert not torch.equal(first, second)
    calls.clear()
    class_probabilities(small_conditions, tiny_model, config)
    assert [(t_d, t_m) for _, t_d, t_m in calls] == [(0, 1), (0, 0.5)]
    state = torch.from_numpy(2 * small_conditions.field.data - 1)[None]
    for d_t, *_ in calls:
        torch.testing.assert_close(d_t, state)


def test_no_steps_need_a_field(tiny_model, small_conditions):
    with pytest.raises(UsageError) as caught:
        class_probabilities(replace(small_conditions, field=None), tiny_model, PRIOR)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError("Unable to allocate 9 GiB for an array"),
        MemoryError(),
    ],
    ids=["torch", "numpy", "python"],
)
def test_tiles_are_used_when_memory_runs_out(tiny_model, small_conditions, monkeypatch, error):
    tiles = []

    def denoise(net, image, field, blocks, steps, generator, device, tile=None, mirror=None):
        tiles.append(tile)
        if tile is None:
            raise error
        return torch.ones(8 * len(blocks), 41)

    monkeypatch.setattr("cadiff_cli.stages.sampling.denoise", denoise)
    _, tile = class_probabilities(small_conditions, tiny_model, SampleConfig(flip=False))
    assert tiles == [None, TILE]
    assert tile == TILE


def test_other_errors_are_not_taken_for_lack_of_memory(tiny_model, small_conditions, monkeypatch):
    def denoise(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("cadiff_cli.stages.sampling.denoise", denoise)
    with pytest.raises(RuntimeError, match="mat1"):
        class_probabilities(small_conditions, tiny_model, SampleConfig(flip=False))


@pytest.mark.parametrize("flip", [False, True])
def test_steps_are_few_network_calls(tiny_model, small_conditions, monkeypatch, flip):
    """The last step is the fine one, so n steps call the trunk n times and the head once.

    The mirrored brain is another call of the trunk, at the last time, and none of the head.
    """
    calls = []
    net = tiny_model.net
    trunk, fine = net.trunk, net.fine_features
    monkeypatch.setattr(net, "trunk", lambda *a: (calls.append(float(a[4])), trunk(*a))[1])
    monkeypatch.setattr(net, "fine_features", lambda *a: (calls.append("head"), fine(*a))[1])
    class_probabilities(small_conditions, tiny_model, SampleConfig(steps=3, flip=flip))
    last = [pytest.approx(1 / 3)] * (2 if flip else 1)
    assert calls == [1, pytest.approx(2 / 3), *last, "head"]


@pytest.mark.parametrize(("flip", "looks"), [(False, 1), (True, 2)])
def test_the_prior_at_a_known_field_is_looked_up_once(
    tiny_model, small_conditions, monkeypatch, flip, looks
):
    """And once more at that of the mirrored brain; a look at every step gives the same answer."""
    calls = []
    net = tiny_model.net
    trunk, look_up = net.trunk, net.look_up
    monkeypatch.setattr(net, "look_up", lambda *a: (calls.append(a), look_up(*a))[1])
    config = SampleConfig(steps=3, flip=flip)
    once, _ = class_probabilities(small_conditions, tiny_model, config)
    assert len(calls) == looks
    monkeypatch.setattr(net, "trunk", lambda *a: trunk(*a[:5]))
    each, _ = class_probabilities(small_conditions, tiny_model, config)
    assert len(calls) > 2 * looks
    assert torch.equal(once.values, each.values)


def test_a_network_that_denoises_nothing_is_asked_once(tiny_config, small_conditions, parcellation):
    """More steps of a plain U-Net are the same step again, so they are not taken."""
    net = awake(replace(tiny_config, reads_field=False, reads_labels=False))
    model = Model(net.requires_grad_(False), "plain", parcellation=parcellation)
    answers = [
        class_probabilities(conditions, model, SampleConfig(steps=steps, seed=seed, flip=False))[0]
        for conditions, steps, seed in (
            (small_conditions, 1, 0),
            (replace(small_conditions, field=None), 4, 1),
        )
    ]
    assert torch.equal(*(p.values for p in answers))


def test_every_voxel_that_a_label_may_need_is_asked_about():
    """All of the mask, and of what lies within two voxels of it; of the rest little."""
    mask = np.zeros((16, 12, 20), bool)
    mask[5:9, 4, 7:13] = True
    asked = np.zeros(mask.shape, bool)
    for i, j, k in 2 * brain_blocks(mask).numpy():
        asked[i : i + 2, j : j + 2, k : k + 2] = True
    assert asked[ndimage.binary_dilation(mask, np.ones((3, 3, 3)), iterations=2)].all()
    assert not asked[~ndimage.binary_dilation(mask, np.ones((3, 3, 3)), iterations=3)].any()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("flip", [False, True], ids=["straight", "flip"])
def test_some_voxels_have_the_probabilities_that_all_have(
    tiny_config, parcellation, small_conditions, stride, flip
):
    """Whether the rest of the box is asked about changes nothing."""
    net = awake(replace(tiny_config, head_stride=stride)).eval().requires_grad_(False)
    model, config = Model(net, parcellation=parcellation), SampleConfig(steps=1, flip=flip)
    near, _ = class_probabilities(small_conditions, model, config)
    whole = np.ones(small_conditions.mask.data.shape, bool)
    everything = replace(small_conditions, mask=Volume(whole, small_conditions.mask.grid))
    all_of_it, _ = class_probabilities(everything, model, config)
    p = dense(all_of_it).flatten(1)[:, near.voxels].T
    assert len(near.voxels) < whole.size
    torch.testing.assert_close(near.values, p, rtol=0, atol=1e-3)


@pytest.fixture
def state(parcellation):
    """Any state of a brain of 8 x 6 x 4 voxels."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return DiffusionState(
        draw(1, 1, 8, 6, 4), draw(1, 3, 4, 3, 2), draw(1, parcellation.n_classes, 4, 3, 2)
    )


def parts(state):
    return state.image, state.field, state.labels


def test_mirroring_is_an_involution(state, mirror):
    flipped = state.mirrored(mirror)
    assert torch.equal(flipped.image, state.image.flip(2))
    for there_and_back, part in zip(parts(flipped.mirrored(mirror)), parts(state), strict=True):
        assert torch.equal(there_and_back, part)


def test_a_packed_state_is_unpacked_into_its_parts(state):
    for unpacked, part in zip(
        parts(DiffusionState.unpacked(state.packed())), parts(state), strict=True
    ):
        assert torch.equal(unpacked, part)


def test_tiles_keep_every_part_in_its_place(state):
    """Blended tiles of an answer that does not depend on the tile are the whole answer."""
    for tile in (4, 6):
        tiled = by_tiles(lambda part: (part.field.clone(), part.labels.clone()), state, tile)
        for blended, part in zip(tiled, (state.field, state.labels), strict=True):
            torch.testing.assert_close(blended, part)
        torch.testing.assert_close(
            by_tiles(lambda part: part.image.clone(), state, tile), state.image
        )


@pytest.fixture
def phantom_state(small_conditions, mirror):
    """The phantom with its field, and labels that say nothing."""
    field = torch.from_numpy(small_conditions.field.data.copy())[None]
    image = torch.from_numpy(small_conditions.image.data.copy())[None, None]
    return DiffusionState(image, 2 * field - 1, torch.zeros(1, len(mirror), *field.shape[2:]))


def test_the_prior_of_a_mirrored_brain_is_the_mirrored_prior(tiny_net, phantom_state, mirror):
    straight = tiny_net.prior(phantom_state.field)
    there = tiny_net.prior(phantom_state.mirrored(mirror).field)
    torch.testing.assert_close(there.flip(2)[:, mirror], straight, rtol=0, atol=1e-3)


@pytest.mark.parametrize("known", [True, False])
def test_the_answer_at_2_mm_does_not_depend_on_the_side(tiny_config, phantom_state, mirror, known):
    """Asked about the mirrored brain, the network says the mirror image of what it said."""
    denoiser = Denoiser(awake(tiny_config).eval(), known, torch.device("cpu"), mirror=mirror)
    alone = replace(denoiser, mirror=None)

    def difference(asked):
        with torch.no_grad():
            here, there = (
                asked.answer(state, 0.5)[0].logits.softmax(dim=1)
                for state in (phantom_state, phantom_state.mirrored(mirror))
            )
        return float((there.flip(2)[:, mirror] - here).abs().max())

    assert difference(denoiser) < 1e-4
    assert difference(alone) > 0.01


@pytest.fixture(scope="module")
def prior_labels(phantom, conditions_of, tiny_model):
    """Phantom and its segmentation by the prior, once for each orientation."""
    made = {}

    def get(orientation):
        if orientation not in made:
            head = phantom(orientation, SPACINGS[orientation], scale=0.5)
            made[orientation] = head, labels_of(head, tiny_model, conditions_of(head), PRIOR)
        return made[orientation]

    return get


def test_labels_lie_on_the_scan_in_any_orientation(prior_labels, orientation, parcellation):
    """With the true field the prior draws the phantom it was counted on; left stays left."""
    head, segmentation = prior_labels(orientation)
    assert segmentation.labels.grid is head.t1.grid
    assert segmentation.labels.data.dtype == np.int16
    drawn, truth = (
        parcellation.encode(codes, parcellation.class_of)
        for codes in (segmentation.labels.data, head.codes)
    )
    large = [int(np.flatnonzero(parcellation.codes == code)[0]) for code in LARGE]
    assert dice(drawn, truth, large).min() > 0.85
    assert (segmentation.labels.data[head.codes == 0] == 0).all()


def test_orientation_does_not_change_volumes(prior_labels, orientation):
    """Both sides together: voxels astride the midplane fall to one side or the other."""
    reference, volumes = (volumes_mm3(prior_labels(o)[1]) for o in ("RAS", orientation))
    for left, right in ((2, 41), (3, 42)):
        expected = reference[left] + reference[right]
        assert volumes[left] + volumes[right] == pytest.approx(expected, rel=0.03)


def test_volumes_are_counts_times_the_voxel(prior_labels, orientation, parcellation):
    head, segmentation = prior_labels(orientation)
    volumes = volumes_mm3(segmentation)
    assert set(volumes) == {s.code for s in parcellation.structures}
    voxel = np.prod(SPACINGS[orientation] * np.ones(3))
    for code, mm3 in volumes.items():
        assert mm3 == pytest.approx(np.count_nonzero(segmentation.labels.data == code) * voxel)
    assert sum(volumes.values()) == pytest.approx(np.count_nonzero(head.codes) * voxel, rel=0.03)


@pytest.mark.parametrize("steps", [0, 1])
def test_posteriors_are_probabilities_whose_best_is_the_label(
    phantom, conditions_of, tiny_model, parcellation, steps
):
    head = phantom("oblique", (2.0, 2.0, 2.5), scale=0.5)
    config = SampleConfig(steps=steps, flip=False)
    segmentation = labels_of(head, tiny_model, conditions_of(head), config, posteriors=True)
    posteriors = segmentation.posteriors
    assert posteriors.shape == (41, *head.t1.grid.shape)
    np.testing.assert_allclose(posteriors.astype(np.float32).sum(0), 1, atol=5e-3)
    outside = head.codes == 0
    assert (posteriors[0, outside] == 1).all()
    # Half precision makes ties of what was nearly one: the label is among the best.
    classes = parcellation.encode(segmentation.labels.data, parcellation.class_of)[None]
    chosen = np.take_along_axis(posteriors, classes.astype(np.intp), axis=0)[0]
    np.testing.assert_array_equal(chosen[~outside], posteriors.max(axis=0)[~outside])
    plain = labels_of(head, tiny_model, conditions_of(head), config)
    # Half precision may turn a tie the other way.
    assert (plain.labels.data == segmentation.labels.data).mean() > 0.999


def test_labels_do_not_leave_the_mask(small_head, small_conditions, tiny_model):
    half = Volume((small_head.codes > 0) & (small_head.codes < 40), small_head.t1.grid)
    scan = Scan(small_head.t1, "x.nii")
    segmentation = segment(scan, small_conditions, half, tiny_model, Config(sample=PRIOR))
    assert segmentation.labels.data[half.data].any()
    assert not segmentation.labels.data[~half.data].any()


@pytest.mark.parametrize(
    ("config", "device"),
    [(PRIOR, "abacus"), (PRIOR, "cuda:99")],
    ids=["device", "cuda"],
)
def test_senseless_requests_are_usage_errors(
    small_head, small_conditions, tiny_model, config, device
):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError) as caught:
        labels_of(small_head, tiny_model, small_conditions, config, device)
    assert caught.value.remedy


@pytest.fixture(scope="module")
def unregistered(phantom, tiny_weights, tmp_path_factory):
    """One real run from file to files that never looks for a registration."""
    folder = tmp_path_factory.mktemp("unregistered")
    head = phantom("LPS", (1.5, 1.8, 1.5), scale=0.6)
    source, out = segmented_alone(head, folder, tiny_weights, "--no-flip")
    return source, out / "sub-01" / "anat"


def test_without_registration_there_are_labels_but_no_transforms(unregistered):
    source, anat = unregistered
    names = {p.name.removeprefix("sub-01_").split(".")[0] for p in anat.iterdir()}
    images = {"desc-preproc_T1w", "desc-brain_mask", "res-1_desc-brain_T1w", "dseg"}
    images |= {f"label-{tissue}_probseg" for tissue in ("GM", "WM", "CSF")}
    assert names == {*images, "seg-cadiff_desc-structures_dseg", *TABLES}
    image = nib.load(anat / "sub-01_seg-cadiff_desc-structures_dseg.nii.gz")
    scan = nib.load(source)
    assert image.shape == scan.shape
    np.testing.assert_array_equal(image.affine, scan.affine)
    labels = np.asarray(image.dataobj)
    brain = np.asarray(nib.load(anat / "sub-01_desc-brain_mask.nii.gz").dataobj) > 0
    assert (brain == (np.asarray(scan.dataobj) > 0)).mean() > 0.99
    assert labels[brain].any()
    assert not labels[~brain].any()


def test_the_sidecar_says_that_nothing_was_registered(unregistered):
    _, anat = unregistered
    sidecar = json.loads((anat / "sub-01_seg-cadiff_desc-structures_dseg.json").read_text())
    assert sidecar["Templates"][0]["Registration"] == "none"
    assert sidecar["Templates"][0]["Score"] is None
    assert sidecar["Settings"]["register"]["name"] == "none"


@pytest.mark.parametrize("wish", [["--save-field"], ["--steps", "0"]], ids=" ".join)
def test_what_needs_a_registration_is_refused_without(wish, tmp_path, capsys):
    from cadiff_cli.cli.seg import command

    arguments = ["scan.nii", "-o", str(tmp_path / "out"), "--registration", "none", *wish]
    run = {"prog_name": "cadiff-seg", "standalone_mode": False}
    assert guarded(lambda: command.main(arguments, **run)) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert "registration" in line
    assert not (tmp_path / "out").exists()
