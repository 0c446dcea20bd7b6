"""Weights files describe themselves, and damage is noticed."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from cadiff_cli.errors import DataError, MissingInputError
from cadiff_cli.io import models
from cadiff_cli.io.files import sha256
from cadiff_cli.io.models import PRIOR_STEP
from cadiff_cli.io.releases import BRAIN_FINDER, SEGMENTER, find_weights, weights_folder
from cadiff_cli.nets.models import AtlasModel, BrainModel, Model, ParcelModel, Trained
from cadiff_cli.nets.segmenter import CADiffNet


def test_a_round_trip_keeps_the_network(tiny_weights, tiny_net, tiny_config):
    model = models.load(Model, str(tiny_weights))
    assert model.net.config == tiny_config
    assert model.name == "tiny.safetensors"
    assert model.sha256 == sha256(tiny_weights)
    assert not model.net.training
    assert not any(p.requires_grad for p in model.net.parameters())
    stored = model.net.state_dict()
    for key, value in tiny_net.state_dict().items():
        if key == "prior.logits":
            torch.testing.assert_close(stored[key], value, rtol=0, atol=PRIOR_STEP / 2 + 1e-6)
        else:
            torch.testing.assert_close(stored[key], value.half().float(), rtol=0, atol=0)
    # Half precision: the file is about a third of what float32 would be.
    assert tiny_weights.stat().st_size < 2 * sum(v.numel() for v in stored.values())


def test_saving_what_was_loaded_changes_nothing(tiny_weights, tmp_path):
    model = models.load(Model, str(tiny_weights))
    again = tmp_path / "again.safetensors"
    assert models.save(again, replace(model, training={})) == sha256(again)
    first, second = load_file(tiny_weights), load_file(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_checksum_is_a_function_of_the_weights(tiny_net, parcellation, tmp_path):
    """Two exports of one network are one file: provenance names it by its checksum."""
    model, path = Model(tiny_net, parcellation=parcellation), tmp_path / "x.safetensors"
    digests = {models.save(path, model) for _ in range(8)}
    assert len(digests) == 1


@pytest.fixture
def copy(tiny_weights, tmp_path):
    """A copy of the file, with or without its checksum."""

    def make(record=True):
        path = tmp_path / "copy.safetensors"
        path.write_bytes(tiny_weights.read_bytes())
        if record:
            path.with_suffix(".sha256").write_text(f"{sha256(path)}  {path.name}\n")
        return path

    return make


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_record_without_a_checksum_is_named(copy, text):
    path = copy()
    path.with_suffix(".sha256").write_text(text)
    with pytest.raises(DataError, match=r"copy\.sha256 is empty"):
        models.load(Model, str(path))


def test_one_flipped_bit_is_noticed(copy):
    path = copy()
    models.load(Model, str(path))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="checksum") as caught:
        models.load(Model, str(path))
    assert caught.value.remedy


def test_a_truncated_file_is_noticed_without_a_checksum(copy):
    path = copy(record=False)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match="not a weights file"):
        models.load(Model, str(path))


def test_another_label_table_is_refused(copy):
    path = copy(record=False)
    described = {"format": "cadiff-1", "net": {}, "codes": [0, 1, 2], "training": {}}
    save_file(load_file(path), path, {"cadiff": json.dumps(described)})
    with pytest.raises(DataError, match="label table"):
        models.load(Model, str(path))


def test_a_network_of_another_number_of_classes_is_refused(tiny_net, lobes, tmp_path):
    path = tmp_path / "x.safetensors"
    models.save(path, Model(tiny_net, parcellation=lobes))
    with pytest.raises(DataError, match=r"x\.safetensors: .* 41 classes, .* lobes .* 6") as caught:
        models.load(Model, str(path))
    assert caught.value.remedy


def test_foreign_weights_are_refused(copy):
    path = copy(record=False)
    save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(DataError, match="format"):
        models.load(Model, str(path))


@pytest.mark.parametrize("name", ["no-such-release", "no/such/file.safetensors"])
def test_missing_weights_name_those_there_are(name):
    with pytest.raises(MissingInputError, match="no model") as caught:
        models.load(Model, name)
    assert "cadiff-malc" in caught.value.remedy


@pytest.mark.parametrize("name", ["cadiff-malc", "cadiff-synth"])
def test_the_release_is_what_its_record_says(released, name):
    model, folder = models.load(Model, name), weights_folder() / name
    assert model.name == name
    assert (folder / "model.sha256").read_text().split()[0] == model.sha256
    card = (folder / "README.md").read_text()
    assert f"{model.training['steps']:,} steps" in card
    assert (folder / "model.safetensors").stat().st_size < 25e6


def test_a_network_draws_what_it_was_taught():
    """FreeSurfer's label maps hold neither vermis nor basal forebrain."""
    malc, synth = models.load(Model, "cadiff-malc"), models.load(Model, "cadiff-synth")
    assert malc.structures == set(malc.parcellation.codes[1:].tolist())
    assert malc.structures - synth.structures == {91, 92, 630, 631, 632}


class Scale(nn.Module):
    """A network of one weight."""

    def __init__(self, start=0.0):
        super().__init__()
        self.config = ScaleConfig(start)
        self.weight = nn.Parameter(torch.full((1,), start))


@dataclass(frozen=True)
class ScaleConfig:
    """Where it begins."""

    start: float = 0.0


class ScaleModel(Trained[Scale]):
    """A third kind of network."""


def test_a_rare_class_keeps_its_prior(tiny_config, parcellation, tmp_path):
    """Beyond int8's reach: where there are many classes, the prior of each absent one is lower."""
    for least in (-7.9, -9.0):
        net = CADiffNet(tiny_config)
        net.prior.logits.data.fill_(least)
        model = Model(net, "rare", parcellation=parcellation)
        models.save(tmp_path / "rare.safetensors", model)
        found = models.load(Model, str(tmp_path / "rare.safetensors")).net.prior.logits
        assert float((found - least).abs().max()) < 0.04


def test_a_new_kind_of_network_needs_one_entry(monkeypatch, tmp_path, tiny_weights):
    kind = models.Kind("cadiff-scale-1", None, lambda settings: Scale(**settings))
    monkeypatch.setattr(models, "KINDS", {**models.KINDS, ScaleModel: kind})
    path = tmp_path / "scale.safetensors"
    digest = models.save(path, ScaleModel(Scale(0.5), training={"steps": 3}))
    model = models.load(ScaleModel, str(path))
    assert (model.name, model.sha256, model.training) == (path.name, digest, {"steps": 3})
    assert model.net.weight.item() == model.net.config.start == 0.5
    with pytest.raises(MissingInputError, match="'cadiff-scale-1' is released") as caught:
        models.load(ScaleModel)
    assert "safetensors" in caught.value.remedy
    for other, file in ((Model, path), (ScaleModel, tiny_weights)):
        with pytest.raises(DataError, match="has format"):
            models.load(other, str(file))


def test_a_network_of_another_kind_is_refused_before_it_is_read(tiny_weights):
    """A dataset fails once, not once a scan."""
    assert find_weights(str(tiny_weights), SEGMENTER)[0] == tiny_weights
    with pytest.raises(DataError, match=f"'{SEGMENTER}', not '{BRAIN_FINDER}'") as caught:
        find_weights(str(tiny_weights), BRAIN_FINDER)
    assert "brain-mask" in caught.value.remedy
    assert "cadiff-malc" not in caught.value.remedy


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1", b"\xff" * 99])
def test_a_file_of_something_else_is_no_weights_file(content, tmp_path):
    path = tmp_path / "pointer.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not a weights file"):
        models.load(BrainModel, str(path))
    other = tmp_path / "weights.pt"
    other.touch()
    with pytest.raises(MissingInputError, match=r"weights\.pt is no \.safetensors file"):
        models.load(BrainModel, str(other))


RELEASES = (
    (Model, "cadiff-malc"),
    (Model, "cadiff-synth"),
    (BrainModel, "brain-mask"),
    (AtlasModel, "cadiff-atlas"),
    (ParcelModel, "nmm138"),
)


@pytest.mark.parametrize(("kind", "name"), RELEASES)
def test_a_release_is_written_as_it_was_read(kind, name, tmp_path):
    """The format has not changed: the tensors are the same bytes."""
    again = tmp_path / "again.safetensors"
    models.save(again, models.load(kind, name))
    first, second = load_file(weights_folder() / name / "model.safetensors"), load_file(again)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize(("kind", "name"), RELEASES)
def test_weights_of_another_version_are_refused(kind, name, tmp_path):
    """A setting that is not known here, one that is missing, tensors of another size."""
    source, path = find_weights(name)[0], tmp_path / "other.safetensors"
    with safe_open(source, framework="pt") as stored:
        described = json.loads(stored.metadata()["cadiff"])
    tensors = load_file(source)
    first = next(iter(tensors))
    for facts, held in (
        (described | {"net": described["net"] | {"invented": 1}}, tensors),
        ({key: value for key, value in described.items() if key != "training"}, tensors),
        (described, tensors | {first: torch.zeros(7)}),
    ):
        save_file(held, path, {"cadiff": json.dumps(facts)})
        with pytest.raises(DataError, match=r"other\.safetensors holds a network") as caught:
            models.load(kind, str(path))
        assert "version" in caught.value.remedy
    save_file(tensors, path, {"cadiff": "{"})
    with pytest.raises(DataError, match="no JSON"):
        models.load(kind, str(path))
