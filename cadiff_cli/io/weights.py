"""Networks as files: a safetensors file that describes itself.  ``releases`` says where."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from cadiff_cli.config import as_dict
from cadiff_cli.errors import DataError
from cadiff_cli.io.files import replacing, sha256
from cadiff_cli.io.releases import DEFAULT, DEFAULT_BRAIN, find_weights
from cadiff_cli.labels.parcellation import BASE, Parcellation, load_parcellation
from cadiff_cli.nets.blocks import channels_last
from cadiff_cli.nets.brain import BrainConfig, BrainNet
from cadiff_cli.nets.unet import CADiffNet, NetConfig

FORMAT = "cadiff-1"
BRAIN_FORMAT = "cadiff-brain-1"
METADATA_KEY = "cadiff"
"""The only key: safetensors writes several in changing order, and the checksum with them."""
PRIOR_STEP = 1 / 16
"""The label prior is stored as int8 in units of this (log-probability): error at most 0.03."""


@dataclass(frozen=True, eq=False)
class Model:
    """A network ready to run, and where it came from."""

    net: CADiffNet
    parcellation: Parcellation
    name: str
    sha256: str
    metadata: Mapping[str, Any]

    @property
    def structures(self) -> frozenset[int]:
        """Codes that its training labels held; it was taught never to draw the others."""
        training = self.metadata.get("training", {})
        return frozenset(training.get("structures") or self.parcellation.codes[1:].tolist())


@dataclass(frozen=True, eq=False)
class BrainModel:
    """A brain-mask network ready to run, and where it came from."""

    net: BrainNet
    name: str
    sha256: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class _Stored:
    """A weights file as read."""

    path: Path
    label: str
    sha256: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


def load_model(name: str = DEFAULT) -> Model:
    """Load a released model by name, or a ``.safetensors`` file by path, and verify its checksum.

    Raises ``MissingInputError`` if it is not there, ``DataError`` if it is not what it should be.
    """
    stored = _read(name, FORMAT)
    parcellation = load_parcellation(BASE)
    if stored.metadata["codes"] != parcellation.codes.tolist():
        raise DataError(
            f"{stored.path} was trained on another label table", "use weights that fit this version"
        )
    net = CADiffNet(NetConfig.from_dict(stored.metadata["net"]))
    tensors = dict(stored.tensors)
    tensors["prior.logits"] = tensors["prior.logits"].float() * PRIOR_STEP
    _fill(net, tensors)
    return Model(net, parcellation, stored.label, stored.sha256, stored.metadata)


def load_brain_model(name: str = DEFAULT_BRAIN) -> BrainModel:
    """The same for a brain-mask network."""
    stored = _read(name, BRAIN_FORMAT)
    net = BrainNet(BrainConfig.from_dict(stored.metadata["net"]))
    _fill(net, stored.tensors)
    return BrainModel(net, stored.label, stored.sha256, stored.metadata)


def seen_by(model: Model | BrainModel | None) -> set[str]:
    """Everyone (people, or sources of heads) whom a model, or one it began with, was trained on."""
    training = model.metadata["training"] if model else {}
    kinds = ("trained_on", "also_on", "seen_by_init")
    return {name for kind in kinds for name in training.get(kind, ())}


def _fill(net: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    net.load_state_dict({key: value.float() for key, value in tensors.items()})
    net.requires_grad_(False).eval()
    channels_last(net)


def _read(name: str, wanted: str) -> _Stored:
    """Everything in a weights file of the ``wanted`` format, checked."""
    path, label, got = find_weights(name)
    try:
        with safe_open(path, framework="pt") as stored:
            header = dict(stored.metadata() or {})
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a weights file ({error})", "reinstall cadiff") from error
    metadata = json.loads(header.get(METADATA_KEY, "{}"))
    if metadata.get("format") != wanted:
        raise DataError(
            f"{path} has format {metadata.get('format')!r}, not {wanted!r}",
            "use weights written by cadiff for this purpose",
        )
    return _Stored(path, label, got, metadata, tensors)


def save_model(
    path: Path, net: CADiffNet, parcellation: Parcellation, training: dict[str, Any]
) -> str:
    """Write half-precision weights with their description and checksum; returns the sha256."""
    tensors = {
        key: value.detach().half().contiguous()
        for key, value in net.state_dict().items()
        if key != "prior.logits"
    }
    steps = (net.prior.logits / PRIOR_STEP).round().clamp(-128, 127)
    tensors["prior.logits"] = steps.to(torch.int8).contiguous()
    described = {
        "format": FORMAT,
        "net": as_dict(net.config),
        "codes": parcellation.codes.tolist(),
        "training": training,
    }
    return _write(path, tensors, described)


def save_brain_model(path: Path, net: BrainNet, training: dict[str, Any]) -> str:
    """The same for a brain-mask network."""
    tensors = {key: value.detach().half().contiguous() for key, value in net.state_dict().items()}
    described = {"format": BRAIN_FORMAT, "net": as_dict(net.config), "training": training}
    return _write(path, tensors, described)


def _write(path: Path, tensors: dict[str, torch.Tensor], described: dict[str, Any]) -> str:
    with replacing(path) as temporary:
        save_file(tensors, temporary, {METADATA_KEY: json.dumps(described)})
    digest = sha256(path)
    with replacing(path.with_suffix(".sha256")) as temporary:
        temporary.write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    return digest
