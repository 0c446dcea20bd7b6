"""``cadiff mask`` and the learned method within ``strip``; the released network on real heads."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.ndimage import gaussian_filter
from synthetic_head import stored, synthetic_head

from cadiff_cli import pipeline
from cadiff_cli.cli.mask import command
from cadiff_cli.config import Config, Recipe, StripConfig, StripMethod
from cadiff_cli.errors import CadiffError, DataError, MissingInputError, OutputError
from cadiff_cli.io import models, releases, templates
from cadiff_cli.io.files import sha256
from cadiff_cli.io.images import load_scan, load_volume, save_volume
from cadiff_cli.io.templates import EMBEDDED, load_template
from cadiff_cli.nets.brain_mask import BrainConfig, BrainNet
from cadiff_cli.nets.models import BrainModel
from cadiff_cli.pipeline import strip_scan
from cadiff_cli.products import Scan
from cadiff_cli.runner import mask as runner_mask
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.stages.strip import (
    LARGE_LITRES,
    foreground,
    intracranial_on_scan,
    on_scan,
    stripped_brain,
)
from cadiff_cli.training.brain_mask.target import signed_distance


class Bright(BrainNet):
    """Takes whatever is brighter than 0.45 for brain, and sees the skull 5 mm outside."""

    def locate(self, head):
        return torch.nn.functional.avg_pool3d(self.refine(head, None), 2)

    def refine(self, head, _located):
        mask = head[0, 0].numpy() > 0.45
        return torch.from_numpy(signed_distance(mask, np.full(3, 2.0)))[None, None]

    def enclose(self, _head, distance):
        fine = torch.nn.functional.interpolate(distance, scale_factor=2, mode="trilinear")
        return (fine[:, 0] > -5).float()


BRIGHT = BrainModel(Bright(BrainConfig((8, 8), (8, 8), skull=True)), "bright")


@pytest.fixture
def bright(monkeypatch):
    monkeypatch.setattr(pipeline, "brain_model", lambda *_: BRIGHT)
    for module in (pipeline, runner_mask):
        monkeypatch.setattr(module, "strip_weights_sha256", lambda _config: "0" * 64)


@pytest.fixture
def head(phantom):
    """The phantom's brain, of one brightness, in a dim scalp and noisy air."""

    def make(orientation="RAS", spacing=3.0):
        brain = phantom(orientation, spacing)
        rng = np.random.default_rng(0)
        shape = np.array(brain.codes.shape)
        ijk = (np.indices(shape) - shape.reshape(3, 1, 1, 1) / 2) / (
            0.47 * shape.reshape(3, 1, 1, 1)
        )
        scalp = np.where((ijk**2).sum(0) < 1, 30.0, 0.0) + abs(rng.standard_normal(shape))
        data = np.where(brain.codes > 0, 100.0, scalp).astype(np.float32)
        return Volume(data, brain.t1.grid), brain.codes > 0

    return make


def overlap(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def test_auto_uses_the_network_on_a_head(bright, head, orientation, tmp_path):
    t1, brain = head(orientation)
    scan = Scan(t1, tmp_path / "sub-01_T1w.nii.gz")
    stripped = strip_scan(scan, None, Config(StripConfig("auto")), tmp_path)
    assert stripped.method is StripMethod.NET
    assert set(stripped.quality.as_dict()) == {"largest_share", "symmetry", "at_edge", "in_air"}
    mask, held = on_scan(stripped, scan), intracranial_on_scan(stripped, scan)
    assert overlap(mask.data, brain) > 0.96
    assert not (mask.data & ~held.data).any()
    assert held.litres > 1.1 * mask.litres


def test_whether_a_scan_is_bare_does_not_depend_on_the_method(bright, head, phantom, tmp_path):
    """Only a whole head shows its skull, and may show a face."""
    given, bare, whole = tmp_path / "mask.nii.gz", phantom("RAS", 2.0), head()[0]
    save_volume(given, (bare.codes > 0).astype(np.uint8), bare.t1.grid)
    for config in (StripConfig("net"), StripConfig("none"), StripConfig(mask=given)):
        scan = Scan(bare.t1, tmp_path / "sub-01_T1w.nii.gz")
        stripped = strip_scan(scan, None, Config(config), tmp_path)
        assert stripped.bare
        assert stripped.intracranial is None
        assert "skull-stripped" in stripped.no_intracranial
    for config in (StripConfig("net"), StripConfig("none")):
        scan = Scan(whole, tmp_path / "sub-02_T1w.nii.gz")
        stripped = strip_scan(scan, None, Config(config), tmp_path)
        assert not stripped.bare
        assert (stripped.intracranial is None) is (config.method == "none")
        assert "skull-stripped" not in stripped.no_intracranial


def test_mask_writes_both_images_on_the_scans_grid(bright, head, tmp_path):
    t1, brain = head("LPS")
    path = tmp_path / "sub-01_T1w.nii.gz"
    save_volume(path, t1.data, t1.grid)
    out = tmp_path / "out"
    done = CliRunner().invoke(command, [str(path), "-o", str(out)], catch_exceptions=False)
    anat = out / "sub-01" / "anat"
    assert done.stdout.strip() == str(anat / "sub-01_desc-brain_mask.nii.gz")
    assert "by the network" in done.stderr
    mask, image = (nib.load(anat / f"sub-01_desc-brain_{kind}.nii.gz") for kind in ("mask", "T1w"))
    for written in (mask, image):
        assert written.shape == t1.grid.shape
        np.testing.assert_allclose(written.affine, t1.grid.affine, atol=1e-4)
    inside = np.asarray(mask.dataobj) > 0
    assert overlap(inside, brain) > 0.96
    np.testing.assert_allclose(
        np.asarray(image.dataobj), np.where(inside, t1.data, 0), rtol=1e-3, atol=1e-2
    )
    skull = nib.load(anat / "sub-01_desc-icv_mask.nii.gz")
    assert not (inside & (np.asarray(skull.dataobj) == 0)).any()
    sidecar = json.loads((anat / "sub-01_desc-brain_mask.json").read_text())
    assert sidecar["Quality"]["largest_share"] > 0.99
    assert sidecar["GeneratedBy"][0]["Name"] == "cadiff"
    assert sidecar["SourceSHA256"] == sha256(path)
    assert len(sidecar["WeightsSHA256"]) == 64
    with pytest.raises(OutputError, match="already"):
        CliRunner().invoke(command, [str(path), "-o", str(out)], catch_exceptions=False)
    again = [str(path), "-o", str(out), "--overwrite"]
    assert CliRunner().invoke(command, again, catch_exceptions=False).exit_code == 0
    # What an earlier method knew does not stay beside the mask of another one.
    assert (anat / "sub-01_desc-icv_mask.nii.gz").is_file()
    again += ["--skull-strip", "none"]
    assert CliRunner().invoke(command, again, catch_exceptions=False).exit_code == 0
    assert not list(anat.glob("*icv*"))


def test_what_a_killed_run_left_does_not_block_a_mask(bright, head, tmp_path):
    """Nor does it stay beside a mask that it was not made with."""
    t1, _ = head()
    path, out = tmp_path / "sub-01_T1w.nii.gz", tmp_path / "out"
    save_volume(path, t1.data, t1.grid)
    anat = out / "sub-01" / "anat"
    anat.mkdir(parents=True)
    (anat / "sub-01_seg-cadiff_dseg.nii.gz").write_text("half a run")
    with pytest.raises(OutputError, match="already"):
        CliRunner().invoke(command, [str(path), "-o", str(out)], catch_exceptions=False)
    mark = out / "logs" / "journal" / "sub-01.begun"
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    done = CliRunner().invoke(command, [str(path), "-o", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    assert not mark.exists()
    assert {p.name.split("_")[1] for p in anat.iterdir()} == {"desc-brain", "desc-icv"}


def test_a_segmentations_mask_is_not_replaced(bright, head, tmp_path):
    t1, _ = head()
    path = tmp_path / "sub-01_T1w.nii.gz"
    save_volume(path, t1.data, t1.grid)
    sidecar = tmp_path / "out" / "sub-01" / "anat" / "sub-01_seg-cadiff_dseg.json"
    sidecar.parent.mkdir(parents=True)
    sidecar.write_text("{}")
    with pytest.raises(OutputError, match="segmentation"):
        CliRunner().invoke(
            command, [str(path), "-o", str(tmp_path / "out"), "--overwrite"], catch_exceptions=False
        )


def test_no_template_is_sought_that_is_not_needed(head, phantom, tmp_path, monkeypatch):
    """None for a brain, or where there is a network; for a head, those that might strip it."""
    asked, weights = [], ""

    def load(name, *, offline):
        asked.append(name)
        raise MissingInputError(f"no {name}", "none")

    monkeypatch.setattr(runner_mask, "load_template", load)
    for module in (pipeline, runner_mask):
        monkeypatch.setattr(module, "strip_weights_sha256", lambda _config: weights)

    def run(t1, name):
        path = tmp_path / f"{name}_T1w.nii.gz"
        save_volume(path, t1.data, t1.grid)
        CliRunner().invoke(
            command, [str(path), "-o", str(tmp_path / "out")], catch_exceptions=False
        )

    run(phantom("RAS", 3.0).t1, "sub-brain")
    assert asked == []
    with pytest.raises(MissingInputError):
        run(head()[0], "sub-head")
    assert asked == [templates.PREFERRED]
    weights = "0" * 64
    monkeypatch.setattr(pipeline, "brain_model", lambda *_: BRIGHT)
    run(head()[0], "sub-net")
    assert len(asked) == 1


def test_another_network_may_find_the_brain(head, tmp_path, monkeypatch):
    """A file of one's own, whose checksum is told; a name that is not there is refused."""
    t1, _ = head()
    path, own = tmp_path / "sub-01_T1w.nii.gz", tmp_path / "own.safetensors"
    save_volume(path, t1.data, t1.grid)
    models.save(own, BrainModel(BrainNet(BrainConfig((8, 8), (8, 8))), "own"))
    asked = []
    monkeypatch.setattr(pipeline, "brain_model", lambda name, _sha256: asked.append(name) or BRIGHT)

    def run(name):
        options = [
            "-o",
            str(tmp_path / Path(name).stem),
            "--skull-strip",
            "net",
            "--strip-model",
            name,
        ]
        return CliRunner().invoke(command, [str(path), *options], catch_exceptions=False)

    assert run(str(own)).exit_code == 0
    assert asked == [str(own)]
    sidecar = tmp_path / "own" / "sub-01" / "anat" / "sub-01_desc-brain_mask.json"
    assert json.loads(sidecar.read_text())["WeightsSHA256"] == sha256(own)
    with pytest.raises(MissingInputError, match=r"(?s)no model at .*nobody.*use .*brain-mask"):
        run("nobody")


def test_a_network_that_was_replaced_meanwhile_is_refused(tmp_path):
    own = tmp_path / "own.safetensors"
    digest = models.save(own, BrainModel(BrainNet(BrainConfig((8, 8), (8, 8))), "own"))
    assert pipeline.brain_model(str(own), digest).sha256 == digest
    models.save(own, BrainModel(BrainNet(BrainConfig((8, 8), (8, 8))), "another"))
    with pytest.raises(DataError, match="changed while cadiff was running"):
        pipeline.brain_model(str(own), digest[::-1])


def test_a_network_of_another_kind_is_refused(head, tmp_path):
    scan = Scan(head()[0], tmp_path / "x.nii.gz")
    with pytest.raises(DataError, match="cadiff-brain-1"):
        strip_scan(scan, None, Config(StripConfig("net", model="cadiff-malc")), tmp_path)


def test_a_networks_content_counts_not_its_name():
    """And a result from before other networks could be named still counts as made so."""

    def settings(**strip):
        return Recipe(Config(strip=StripConfig(**strip)), "x", "m", "0" * 64).settings()["strip"]

    old = {"method": "auto", "mask": None}
    assert settings() == settings(model="/home/somebody/own.safetensors") == old


# --- the released network -------------------------------------------------------------------------


@pytest.fixture
def released_mask():
    from cadiff_cli.config import DEFAULT_BRAIN
    from cadiff_cli.io.releases import weights_folder

    if not (weights_folder() / DEFAULT_BRAIN / "model.safetensors").is_file():
        pytest.skip("no released brain-mask network")


@pytest.mark.parametrize("kind", ["noise", "speckle", "blob", "ramp"])
def test_no_brain_is_found_where_there_is_none(released_mask, kind, tmp_path, all_threads):
    shape = (90, 110, 90)
    rng = np.random.default_rng(0)
    ijk = np.indices(shape) / np.reshape(shape, (3, 1, 1, 1)) - 0.5
    images = {
        "noise": rng.random(shape),
        "speckle": gaussian_filter(rng.standard_normal(shape), 1),
        "blob": np.where((ijk**2).sum(0) < 0.16, 80 + 5 * rng.standard_normal(shape), 0)
        + rng.random(shape),
        "ramp": ijk[0] + 0.01 * rng.random(shape),
    }
    grid = Grid(shape, np.diag([2.0, 2.0, 2.0, 1.0]))
    scan = Scan(Volume(images[kind].astype(np.float32), grid), tmp_path / "x.nii.gz")
    with pytest.raises(DataError, match="brain"):
        strip_scan(scan, None, Config(StripConfig("net")), tmp_path)


@pytest.mark.parametrize("name", ["mass04", "mass07"])  # never trained on
def test_real_heads_are_stripped(released_mask, shared, name, tmp_path, all_threads):
    folder = shared(f"heads/mass/sub-{name}/anat")
    scan = load_scan(folder / f"sub-{name}_T1w.nii.gz")
    stripped = strip_scan(scan, None, Config(StripConfig()), tmp_path)
    assert stripped.method is StripMethod.NET
    assert not stripped.notes
    truth = np.asarray(load_volume(folder / f"sub-{name}_desc-brain_mask.nii.gz").data) > 0
    assert overlap(on_scan(stripped, scan).data, truth) > 0.915


@pytest.mark.parametrize("turned", [((0, 1, 2), (1, 1, 1)), ((2, 0, 1), (-1, 1, -1))])
def test_a_synthetic_head_is_stripped_however_it_is_stored(
    released_mask, turned, tmp_path, all_threads
):
    t1, brain = (stored(v.data, v.grid, *turned) for v in synthetic_head(seed=0))
    scan = Scan(t1, tmp_path / "sub-head_T1w.nii.gz")
    stripped = strip_scan(scan, None, Config(StripConfig()), tmp_path)
    assert stripped.method is StripMethod.NET
    assert not stripped.notes
    assert overlap(on_scan(stripped, scan).data, brain.data) > 0.9


def test_a_small_head_in_zeroed_air_is_no_brain(released_mask, tmp_path, all_threads):
    """As a child's, defaced: its volume is a brain's, and the network finds one inside."""
    t1, brain = synthetic_head(seed=0)
    low = int(np.argwhere(brain.data)[:, 2].min())
    data = np.where(t1.data > 150, t1.data, 0)
    data[:, :, : low - 2] = 0  # no neck, no jaw
    small = t1.grid.affine @ np.diag([0.86, 0.86, 0.86, 1])
    scan = Scan(Volume(data, Grid(t1.grid.shape, small)), tmp_path / "sub-child_T1w.nii.gz")
    assert foreground(scan.t1).litres > 1.7
    assert not stripped_brain(scan.t1)
    given = tmp_path / "mask.nii.gz"
    save_volume(given, brain.data.astype(np.uint8), scan.t1.grid)
    for config in (StripConfig(), StripConfig("net"), StripConfig(mask=given)):
        stripped = strip_scan(scan, None, Config(config), tmp_path)
        assert not stripped.bare
        assert overlap(on_scan(stripped, scan).data, brain.data) > 0.88


@pytest.mark.parametrize("voxels", [0, 2, 30])
def test_the_example_is_a_stripped_brain(voxels):
    """MNI152's brain holds 1.9 l, as many a child's whole head; air around it changes nothing."""
    brain = load_template(EMBEDDED).brain
    grid = brain.grid.crop((-voxels,) * 3, tuple(n + 2 * voxels for n in brain.grid.shape))
    found = stripped_brain(Volume(np.pad(brain.data, voxels), grid))
    assert found
    assert found.litres > LARGE_LITRES


def test_a_version_without_a_network_says_so(head, tmp_path, monkeypatch):
    monkeypatch.setattr(releases, "weights_folder", lambda: tmp_path)
    monkeypatch.setattr("cadiff_cli.io.models.find_weights", releases.find_weights)
    scan = Scan(head()[0], tmp_path / "x.nii.gz")
    with pytest.raises(MissingInputError, match="no network"):
        strip_scan(scan, None, Config(StripConfig("net")), tmp_path)
    # auto falls back on the template, and needs one.
    with pytest.raises(MissingInputError, match="no skull"):
        strip_scan(scan, None, Config(StripConfig("auto")), tmp_path)


def test_errors_are_ours(tmp_path):
    with pytest.raises(CadiffError):
        CliRunner().invoke(
            command, [str(tmp_path / "no.nii"), "-o", str(tmp_path)], catch_exceptions=False
        )
