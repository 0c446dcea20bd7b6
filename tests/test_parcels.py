"""Parcels of the cortex: a finer label map that agrees with the first, from network to page."""

import csv
import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from bids_dataset import here
from test_cli import one_line

from cadiff_cli.cli.train_parcels import command as train_command
from cadiff_cli.config import Config, OutputConfig, Recipe
from cadiff_cli.errors import DataError, MissingInputError, UsageError
from cadiff_cli.io import models
from cadiff_cli.io.bids.labelled import LabelledScan
from cadiff_cli.io.bids.layout import Derivatives, finished_result
from cadiff_cli.io.images import save_volume
from cadiff_cli.io.releases import find_weights
from cadiff_cli.labels.parcellation import load_parcellation
from cadiff_cli.labels.schemes import load_scheme
from cadiff_cli.nets.blocks import unshuffle
from cadiff_cli.nets.models import ParcelModel
from cadiff_cli.nets.parcels import STRIDE, ParcelConfig, ParcelNet, sampled
from cadiff_cli.products import Segmentation
from cadiff_cli.runner.group import known_scans, write_group
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.spatial.resample import resample
from cadiff_cli.stages.parcels import cut, hemisphere, mirrored, mirrored_field, parcellate
from cadiff_cli.stages.space import nearest_codes
from cadiff_cli.stages.volumes import volumes_mm3
from cadiff_cli.training.parcels.config import ParcelTrainConfig
from cadiff_cli.training.parcels.data import NOWHERE, hemispheres
from cadiff_cli.training.parcels.losses import parcel_losses
from cadiff_cli.training.parcels.patches import EXTENTS_MM, HemisphereDraws, moved_by
from cadiff_cli.training.parcels.prior import counted, log_prior, spread
from cadiff_cli.training.parcels.run import train_parcels

SMALL = ParcelConfig(
    n_parcels=2, channels=(8, 8, 8), own_channels=2, hidden=8, prior_shape=(6, 9, 8)
)


@pytest.fixture(scope="module")
def net():
    """A network in which whatever enters matters."""
    torch.manual_seed(0)
    net = ParcelNet(SMALL)
    with torch.no_grad():
        net.prior.normal_()
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return net.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def model(net, lobes, parcellation):
    """It divides each cortex of ``cadiff40`` into a front and a back."""
    others = [s for s in parcellation.structures if s.code not in (3, 42)]
    inner = [s for s in lobes.structures if s.parent in (3, 42)]
    finer = replace(
        lobes, name="halves", structures=(*(replace(s, parent=s.code) for s in others), *inner)
    )
    return ParcelModel(net, "halves", "1" * 64, parcellation=finer)


def segmented(head, parcellation):
    return Segmentation(Volume(head.codes, head.t1.grid), parcellation, steps=1, seed=0)


@pytest.fixture(scope="module", params=[("RAS", 1.0), ("LPS", (1.0, 1.4, 0.9)), ("oblique", 1.3)])
def head(request, phantom):
    return phantom(*request.param, scale=0.4)


@pytest.fixture(scope="module")
def fine(head, model, conditions_of, parcellation):
    given = segmented(head, parcellation)
    given = replace(given, posteriors=np.zeros((41, 1, 1, 1), np.float16))
    return parcellate(given, conditions_of(head), model)


def test_both_maps_agree_voxel_by_voxel(head, fine, model, parcellation):
    """On any grid: cortex, and only cortex, is divided, and by parcels of its own side."""
    assert (model.parcellation.coarsen(fine.labels.data) == head.codes).all()
    present = {*np.unique(fine.labels.data).tolist()}
    assert present & {1001, 1002}
    assert present & {2001, 2002}
    assert not present & {3, 42}
    volumes, before = volumes_mm3(fine), volumes_mm3(segmented(head, parcellation))
    for cortex, parts in ((3, (1001, 1002)), (42, (2001, 2002))):
        assert sum(volumes[k] for k in parts) == pytest.approx(before[cortex])


def test_confidence_is_the_probability_of_the_parcel(head, fine):
    sure = fine.confidence
    assert fine.posteriors is None
    cortex = np.isin(head.codes, (3, 42))
    assert (sure[cortex] >= 0.499).all()
    assert not sure[~cortex].any()
    drawn = {*np.unique(fine.labels.data).tolist()} & {1001, 1002, 2001, 2002}
    assert all(0 < fine.expected_dice[code] <= 1 for code in drawn)


def test_a_mirrored_brain_has_mirrored_parcels(phantom, model, conditions_of, parcellation):
    head = phantom("RAS", 1.0, scale=0.4)
    conditions = conditions_of(head)
    crop = conditions.image.grid
    near = resample(Volume(head.codes, head.t1.grid), crop, order=0).data
    one = parcellate(as_segmentation(near, crop, parcellation), conditions, model)
    field = replace(conditions.field, data=mirrored_field(conditions.field.data))
    turned = mirrored(parcellation.encode(near, parcellation.class_of), parcellation)
    other = parcellate(
        as_segmentation(parcellation.codes[turned], crop, parcellation),
        replace(conditions, field=field),
        model,
    )
    finer = model.parcellation
    classes = finer.encode(one.labels.data, finer.class_of)
    assert (finer.codes[mirrored(classes, finer)] == other.labels.data).mean() > 0.9999


def as_segmentation(codes, grid, parcellation):
    return Segmentation(Volume(codes.astype(np.int16), grid), parcellation, steps=1, seed=0)


def test_what_has_no_field_or_other_structures_is_refused(
    small_head, model, lobes, conditions_of, parcellation
):
    conditions = conditions_of(small_head)
    given = segmented(small_head, parcellation)
    with pytest.raises(UsageError, match="distance field"):
        parcellate(given, replace(conditions, field=None), model)
    with pytest.raises(UsageError, match="not of lobes"):
        parcellate(replace(given, parcellation=lobes), conditions, model)


def test_a_network_begins_as_the_prior():
    net = ParcelNet(SMALL).eval()
    net.prior.normal_()
    shape = (16, 16, 32)
    detail = torch.rand(1, 3, *shape)
    cells = [n // STRIDE for n in shape]
    field, at = torch.full((1, 3, *cells), 0.3), torch.rand(7, 3) * 15
    logits = net(detail, torch.rand(1, 41, *cells), field, at)
    torch.testing.assert_close(logits, net.prior_at(torch.full((7, 3), 0.3)))


def test_a_cell_holds_its_voxels_in_order():
    x = torch.rand(1, 2, 8, 4, 12)
    cells = unshuffle(x, STRIDE)
    i, j, k = 5, 2, 11
    part = ((i % STRIDE) * STRIDE + j % STRIDE) * STRIDE + k % STRIDE
    seen = cells[0, [part, STRIDE**3 + part], i // STRIDE, j // STRIDE, k // STRIDE]
    assert torch.equal(seen, x[0, :, i, j, k])


def test_a_hemisphere_knows_where_it_is(parcellation):
    """Its field is D at its cells, also where its box leaves the volume."""
    shape = np.array((48, 32, 32))
    middles = (np.indices(shape // 2) + 0.5) / (shape // 2).reshape(3, 1, 1, 1)
    classes = np.zeros(shape, np.uint8)
    classes[4:14, 10:20, 10:20] = parcellation.class_of[3]
    seen = hemisphere(classes, middles.astype(np.float32))
    assert (seen.classes > 0).sum() == (classes > 0).sum()
    assert not np.mod(seen.classes.shape, 16).any()
    at = np.argwhere(seen.classes)[0]
    assert classes[tuple(at + seen.start)]
    cell = at // STRIDE
    middle = (cell * STRIDE + (STRIDE - 1) / 2 + seen.start + 0.5) / shape
    np.testing.assert_allclose(seen.field[(slice(None), *cell)], middle, atol=1e-5)
    inner = cut(classes, middles.astype(np.float32), np.array((4, 4, 4)), np.array((16, 16, 16)))
    assert (inner.classes == classes[4:20, 4:20, 4:20]).all()


def test_the_nearest_code_fills_what_is_around():
    codes, where = np.array([[[0, 7, 0, 0, 9, 0]]]), np.array([[[0, 1, 0, 0, 1, 0]]], bool)
    assert nearest_codes(codes, where).tolist() == [[[7, 7, 7, 9, 9, 9]]]


def test_a_model_is_stored_with_its_parcellation(model, tmp_path):
    path = tmp_path / "halves.safetensors"
    models.save(path, model)
    again = models.load(ParcelModel, str(path))
    assert again.parcellation == model.parcellation
    assert again.net.config == SMALL
    torch.testing.assert_close(again.net.prior, model.net.prior, rtol=0, atol=1 / 32)


# Training


@pytest.fixture(scope="module")
def sample(toy_sample, model, parcellation):
    """The toy's cortex in a front and a back, by its field."""
    finer = model.parcellation
    codes = parcellation.codes[toy_sample.classes]
    y = np.indices(codes.shape)[1] > codes.shape[1] // 2
    for cortex, (front, back) in ((3, (1001, 1002)), (42, (2001, 2002))):
        codes = np.where(codes == cortex, np.where(y, front, back), codes)
    return replace(toy_sample, classes=finer.encode(codes, finer.class_of))


def test_both_hemispheres_look_left(sample, model):
    left, right = hemispheres([sample], model.parcellation)
    for one in (left, right):
        assert one.seen.field[0][one.seen.field[1] < 2].min() >= 0
        voxels = one.cortex
        assert len(voxels) > 1000
        cells = voxels // STRIDE
        assert one.seen.field[(0, *cells.T)].mean() < 0.5
        assert one.parcels.max() == 1
    # The toy's cortex is symmetric.
    assert len(left.cortex) == pytest.approx(len(right.cortex), rel=0.05)


def test_a_sample_without_parcels_is_refused(toy_sample, model):
    bare = replace(toy_sample, classes=np.zeros_like(toy_sample.classes))
    with pytest.raises(DataError, match="no parcels"):
        hemispheres([bare], model.parcellation)


def test_draws_are_functions_of_their_number(sample, model):
    config = ParcelTrainConfig(points=500, moved=1.0)
    draws = HemisphereDraws(hemispheres([sample], model.parcellation), config)
    one, again, other = draws[3], draws[3], draws[4]
    assert torch.equal(one.detail, again.detail)
    assert torch.equal(one.at, again.at)
    assert not torch.equal(one.at, other.at)
    torch.testing.assert_close(one.shares.sum(1), torch.ones_like(one.shares[:, 0]))
    # At (nearly) all of the points is cortex, however the brain was moved.
    i, j, k = one.at[0].long().T
    assert one.detail[0, 0, i, j, k].mean() > 0.9


@pytest.mark.parametrize("elastic_mm", [0.0, 4.0])
def test_moving_keeps_field_and_parcels_together(sample, model, elastic_mm):
    """Front and back differ in D_y: a draw that lost one of them would mix them."""
    config = ParcelTrainConfig(points=2000, moved=0.5, field_error_mm=0, elastic_mm=elastic_mm)
    draws = HemisphereDraws(hemispheres([sample], model.parcellation), config)
    for index in range(4):
        patch = draws[index]
        where = (patch.at[0] + 0.5) / torch.tensor(patch.detail.shape[2:])
        y = sampled(patch.field, where, corners=False)[:, 1]
        front = patch.parcels[0] == 0
        assert y[front].mean() > y[~front].mean() + 0.1
        middle = (y[front].quantile(0.02) + y[~front].quantile(0.98)) / 2
        assert ((y > middle) == front).float().mean() > 0.95


def test_bending_moves_by_millimetres(sample, model):
    """The same voxel of a bent and of a straight hemisphere differ by the bend alone."""
    still = {"points": 2000, "moved": 1.0, "rotation_deg": 0, "scale": 0, "field_error_mm": 0}
    straight, bent = (
        HemisphereDraws(
            hemispheres([sample], model.parcellation),
            ParcelTrainConfig(**still, together=1.0, elastic_mm=elastic_mm),
        )[0]
        for elastic_mm in (0.0, 2.0)
    )
    inside = (straight.shares[0, 1:].sum(0) > 0.9) & (bent.shares[0, 1:].sum(0) > 0.9)
    moved_mm = (bent.field - straight.field)[0] * torch.tensor(EXTENTS_MM)[:, None, None, None]
    # Linear between knots: a standard deviation of 0.55 to 1 of theirs.
    assert 0.6 < moved_mm[:, inside].std() < 2.6


def test_a_shift_reads_what_is_beside():
    volume = np.arange(24).reshape(2, 3, 4)
    moved = moved_by(volume, np.array((1, -1, 2)), NOWHERE)
    assert moved[0, 1, 0] == volume[1, 0, 2]
    assert (moved[1] == NOWHERE).all()
    assert (moved[:, 0] == NOWHERE).all()


def test_the_prior_is_counted_without_the_person(sample, model):
    own = hemispheres([sample], model.parcellation)
    votes = counted(own, 2, SMALL.prior_shape)
    assert votes.sum() == sum(len(one.cortex) for one in own)
    p = log_prior(spread(votes)).exp()
    torch.testing.assert_close(p.sum(1), torch.ones_like(p[:, 0]))
    assert p.min() > 0.005  # nothing is impossible
    other = spread(votes + 1)
    np.testing.assert_allclose(other - spread(votes), spread(np.ones_like(votes)), atol=1e-9)
    cells = votes.argmax(axis=0)[votes.sum(axis=0) > 100]
    assert (p[0].argmax(0).numpy()[votes.sum(axis=0) > 100] == cells).mean() > 0.9


def test_losses_vanish_for_the_truth_alone():
    truth = torch.tensor([0, 1, 1, 2])
    right = 50 * torch.nn.functional.one_hot(truth, 4).float()
    assert parcel_losses(right, truth, 1.0).total < 1e-6
    wrong = right.roll(1, dims=1)
    assert parcel_losses(wrong, truth, 1.0).dice > 0.99
    assert parcel_losses(wrong, truth, 0.0).dice == 0


def test_a_training_learns_and_resumes(sample, model, tmp_path):
    config = ParcelTrainConfig(steps=4, decay=1, warmup=1, points=500)
    others = [sample, replace(sample, subject="other", name="sub-other")]

    def train(run, steps, **more):
        now = replace(config, steps=steps)
        return train_parcels(
            others, run, now, model.parcellation, net_config=SMALL, device="cpu", **more
        )

    whole = models.load(ParcelModel, str(train(tmp_path / "a", 4, hold_out=["other"])))
    with (tmp_path / "a" / "held_out.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["hemisphere"] for row in rows] == ["left", "right"]
    assert min(float(row["dice"]) for row in rows) > 0.8  # the prior of its twin
    train(tmp_path / "b", 2, hold_out=["other"])
    resumed = models.load(ParcelModel, str(train(tmp_path / "b", 4, hold_out=["other"])))
    for name, value in whole.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], value), name
    with pytest.raises(UsageError, match="--init was trained on toy"):
        train(tmp_path / "c", 4, hold_out=["toy"], init=whole)
    with pytest.raises(UsageError, match="held out"):
        train(tmp_path / "c", 4, hold_out=["other", "toy"])
    with pytest.raises(UsageError, match="names nobody"):
        train(tmp_path / "c", 4, hold_out=["nobody"])


@pytest.mark.parametrize(("name", "refused"), [("sub-01", False), ("01", False), ("02", True)])
def test_a_wrong_name_is_told_before_scans_are_prepared(name, refused, tmp_path, monkeypatch):
    def prepared(*_):
        raise InterruptedError

    scans = [LabelledScan(f"sub-{n}", n, tmp_path, tmp_path) for n in ("01", "03")]
    monkeypatch.setattr("cadiff_cli.io.bids.labelled.labelled_scans", lambda _: scans)
    monkeypatch.setattr("cadiff_cli.training.segmenter.data.prepare_scans", prepared)
    arguments = ["parcels", str(tmp_path), "-o", str(tmp_path / "run"), "--hold-out", name]
    with pytest.raises(UsageError if refused else InterruptedError):
        train_command.main(arguments, standalone_mode=False)


# The shipped parcellation


def test_the_shipped_table_is_neuromorphometrics():
    finer, base = load_parcellation("nmm138"), load_parcellation("cadiff40")
    parcels = finer.subset("parcels")
    assert len(parcels) == 98
    assert len(finer) == len(base) - 2 + 98
    for k in parcels:
        s = finer.structures[k - 1]
        assert 100 <= s.code <= 207
        # Right ones are even in this protocol.
        assert (s.code % 2 == 0) == s.name.startswith("Right-") == (s.parent == 42)
        assert s.mirror == s.code ^ 1
    kept = {s.code for s in finer.structures} - {s.code for s in base.structures}
    assert len(kept) == 98
    scheme = load_scheme("neuromorphometrics", finer)
    assert finer.structures[scheme[101] - 1].abbreviation == "L_ACgG"
    coarse = load_scheme("neuromorphometrics", base)
    to_base = finer.mapping_to(base)
    assert all(to_base[int(finer.codes[k])] == coarse[source] for source, k in scheme.items() if k)


def test_without_parcels_the_settings_are_as_they_were():
    """Finished results hold a checksum of them."""
    plain = Recipe(Config(), "x", "m", "0" * 64).settings()
    assert not {"parcellation", "parcels_sha256"} & {*plain}
    wanted = Config(output=OutputConfig(parcellation="nmm138"))
    settings = Recipe(wanted, "x", "m", "0" * 64, parcels_sha256="1" * 64).settings()
    assert settings == plain | {"parcellation": "nmm138", "parcels_sha256": "1" * 64}


def test_parcels_need_a_registration(tmp_path):
    scan = tmp_path / "sub-01_T1w.nii.gz"
    done = here(
        *("seg", str(scan), "-o", str(tmp_path / "out")),
        *("--parcellation", "nmm138", "--registration", "none"),
    )
    assert done.returncode == 64
    assert "--parcellation needs a registration" in one_line(done)


@pytest.fixture(scope="module")
def out(phantom, released, tmp_path_factory):
    """The folder of one run with parcels, from file to files."""
    try:
        find_weights("nmm138")
    except MissingInputError:
        pytest.skip("no released weights of nmm138")
    folder = tmp_path_factory.mktemp("parcels")
    head = phantom("RAS", (2.0, 2.0, 2.0), scale=0.5)
    save_volume(folder / "sub-01_T1w.nii.gz", head.t1.data, head.t1.grid)
    done = here(
        *("seg", str(folder / "sub-01_T1w.nii.gz"), "-o", str(folder / "out")),
        *("--template", "MNI152NLin2009aSym", "--offline"),
        *("--registration", "affine", "--skull-strip", "none", "--steps", "0", "--threads", "1"),
        *(
            "--parcellation",
            "nmm138",
            "--posteriors",
            "--output-spaces",
            "MNI152NLin2009aSym:res-4",
        ),
    )
    assert done.returncode == 0, done.stderr
    return folder / "out"


def codes_of(out, name):
    return np.asarray(nib.load(out / "sub-01" / "anat" / f"sub-01_{name}.nii.gz").dataobj)


def test_files_lie_beside_the_structures_and_agree(out):
    finer = load_parcellation("nmm138")
    space = "space-MNI152NLin2009aSym_seg-{}_res-4_desc-structures_dseg"
    for name in ("seg-{}_desc-structures_dseg", space):
        coarse, fine = (codes_of(out, name.format(x)) for x in ("cadiff", "nmm138"))
        assert (finer.coarsen(fine) == coarse).all()
        assert np.isin(fine, [*range(100, 208)]).any()
    assert codes_of(out, "seg-nmm138_desc-confidence_probseg").max() <= 1
    assert load_parcellation("nmm138").as_tsv() == (out / "seg-nmm138_dseg.tsv").read_text()
    anat = out / "sub-01" / "anat"
    told = json.loads((anat / "sub-01_seg-nmm138_desc-structures_dseg.json").read_text())
    assert told["Model"]["WeightsSHA256"] == find_weights("nmm138")[2]
    tables = []
    for name in ("desc-volumetric_morph", "seg-nmm138_desc-volumetric_morph"):
        with (anat / f"sub-01_{name}.tsv").open() as stream:
            tables.append({r["name"]: r for r in csv.DictReader(stream, delimiter="\t")})
    coarse, fine = tables
    for side in ("Left", "Right"):
        parts = [
            s.name
            for s in finer.structures
            if s.name.startswith(side) and s.code in range(100, 208)
        ]
        total = sum(float(fine[name]["volume_mm3"]) for name in parts)
        assert total == pytest.approx(float(coarse[f"{side}-Cerebral-Cortex"]["volume_mm3"]))
    assert fine["Left-Thalamus"]["volume_mm3"] == coarse["Left-Thalamus"]["volume_mm3"]


def test_a_result_without_its_parcels_is_not_finished(out):
    place = Derivatives(out, out / "sub-01_T1w.nii.gz")
    result = finished_result(place)
    assert result.parcellation.name == "cadiff40"
    moved = result.finer.morph.rename(result.finer.morph.with_suffix(".away"))
    assert finished_result(place) is None
    moved.rename(result.finer.morph)
    assert finished_result(place) is not None


def test_page_and_group_show_parcels(out):
    page = (out / "sub-01.html").read_text()
    assert "Parcels of the cortex" in page
    assert "Precuneus" in page
    assert not write_group(out, known_scans(out)).missing
    with (out / "group_seg-nmm138_morph.tsv").open() as stream:
        (row,) = csv.DictReader(stream, delimiter="\t")
    assert row["scan"] == row["participant_id"] == "sub-01"
    assert {"left_precuneus", "right_temporal_pole", "left_thalamus"} <= {*row}
    assert "left_cerebral_cortex" not in row


def test_damaged_parcels_cost_a_scan_its_parcels_alone(out, tmp_path):
    """And no table stays of an earlier group."""
    out = shutil.copytree(out, tmp_path / "out")
    table = out / "group_seg-nmm138_morph.tsv"
    table.write_text("an earlier one")
    table.with_suffix(".json").write_text("{}")
    mine = out / "group_seg-mine_morph.tsv"
    mine.write_text("somebody's own")
    (morph,) = out.rglob("sub-01_seg-nmm138_desc-volumetric_morph.tsv")
    morph.unlink()
    morph.symlink_to("gone")  # as git-annex leaves it
    group = write_group(out, known_scans(out))
    assert [row["scan"] for row in group.rows] == ["sub-01"]
    assert "sub-01 is not among nmm138" in "; ".join(group.notes)
    assert not table.exists()
    assert not table.with_suffix(".json").exists()
    assert mine.exists()


def test_evaluate_takes_the_map_that_is_named(out, tmp_path):
    reference = tmp_path / "ref" / "sub-01"
    reference.mkdir(parents=True)
    source = out / "sub-01" / "anat" / "sub-01_seg-nmm138_desc-structures_dseg.nii.gz"
    (reference / "sub-01_seg-nmm138_dseg.nii.gz").write_bytes(source.read_bytes())

    def scored(*labels):
        done = here(
            *("evaluate", str(out), str(reference.parent), "-o", str(tmp_path)),
            *("--reference-labels", "cadiff", "--overwrite", *labels),
        )
        assert done.returncode == 0, done.stderr
        with (tmp_path / "evaluation.tsv").open() as stream:
            return {r["structure"]: r["dice"] for r in csv.DictReader(stream, delimiter="\t")}

    finer = load_parcellation("nmm138")
    assert len(scored("--labels", "nmm138")) == len(finer)
    parcels = scored("--labels", "parcels")
    assert len(parcels) == 98
    assert {*parcels.values()} <= {"1.0000", "n/a"}
    assert scored()["Left-Cerebral-Cortex"] == "1.0000"
