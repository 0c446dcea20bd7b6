"""Networks as files: a safetensors file that describes itself.  ``releases`` says where."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cadiff_cli.config import as_dict
from cadiff_cli.errors import DataError
from cadiff_cli.io.nifti import replacing
from cadiff_cli.io.releases import DEFAULT, find_weights, sha256
from cadiff_cli.labels import LabelTable, load_table
from cadiff_cli.nets.unet import CADiffNet, NetConfig, channels_last

FORMAT = "cadiff-1"
METADATA_KEY = "cadiff"
"""The only key: safetensors writes several in changing order, and the checksum with them."""
PRIOR_STEP = 1 / 16
"""The label prior is stored as int8 in units of this (log-probability): error at most 0.03."""


@dataclass(frozen=True, eq=False)
class Model:
    """A network ready to run, and where it came from."""

    net: CADiffNet
    table: LabelTable
    name: str
    sha256: str
    metadata: Mapping[str, Any]


def load_model(name: str = DEFAULT) -> Model:
    """Load a released model by name, or a ``.safetensors`` file by path, and verify its checksum.

    Raises ``MissingInputError`` if it is not there, ``DataError`` if it is not what it should be.
    """
    path, label, got = find_weights(name)
    try:
        with safe_open(path, framework="pt") as stored:
            header = dict(stored.metadata() or {})
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a weights file ({error})", "reinstall cadiff") from error
    table = load_table()
    metadata = json.loads(header.get(METADATA_KEY, "{}"))
    if metadata.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {metadata.get('format')!r}, not {FORMAT!r}",
            "use weights written by cadiff train",
        )
    if metadata["codes"] != table.codes.tolist():
        raise DataError(
            f"{path} was trained on another label table", "use weights that fit this version"
        )
    net = CADiffNet(NetConfig.from_dict(metadata["net"]))
    tensors["prior.logits"] = tensors["prior.logits"].float() * PRIOR_STEP
    net.load_state_dict({key: value.float() for key, value in tensors.items()})
    net.requires_grad_(False).eval()
    return Model(channels_last(net), table, label, got, metadata)


def save_model(path: Path, net: CADiffNet, table: LabelTable, training: dict[str, Any]) -> str:
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
        "codes": table.codes.tolist(),
        "training": training,
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, {METADATA_KEY: json.dumps(described)})
    digest = sha256(path)
    with replacing(path.with_suffix(".sha256")) as temporary:
        temporary.write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    return digest
