"""Networks as files: a safetensors file that describes itself.  ``releases`` finds released ones.

``KINDS`` lists all kinds of networks.  A new kind needs an entry there, and nothing else here.
"""

import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from cadiff_cli.config import DEFAULT_BRAIN, PARCELS, as_dict
from cadiff_cli.errors import DataError, MissingInputError, changed_meanwhile
from cadiff_cli.io.files import replacing, sha256
from cadiff_cli.io.releases import (
    BRAIN_FINDER,
    DEFAULT,
    DEFAULT_ATLAS,
    METADATA_KEY,
    SEGMENTER,
    find_weights,
)
from cadiff_cli.labels.parcellation import (
    BASE,
    Parcellation,
    load_parcellation,
    parse,
    shipped_names,
)
from cadiff_cli.nets.atlas import AtlasConfig, AtlasNet
from cadiff_cli.nets.blocks import channels_last
from cadiff_cli.nets.brain_mask import BrainConfig, BrainNet
from cadiff_cli.nets.condition import ConditionSpace
from cadiff_cli.nets.models import AtlasModel, BrainModel, Model, ParcelModel, Trained
from cadiff_cli.nets.parcels import ParcelConfig, ParcelNet
from cadiff_cli.nets.segmenter import CADiffNet, NetConfig
from cadiff_cli.spatial.grid import Grid, Volume

PRIOR_STEP = 1 / 16
"""The label prior is stored as int8 in units of this (log-probability): error at most 0.03.

Where its least value is below -8 (about 60 classes and more) it is stored in half precision.
"""

M = TypeVar("M", bound=Trained[Any])
T = TypeVar("T")


def settings_of(kind: type[T], values: Mapping[str, Any]) -> T:
    """Settings of a network from what ``config.as_dict`` made of them: JSON has no tuples.

    Those that a file does not name have their defaults.  Raises ``TypeError`` for unknown ones.
    """
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _no_facts(_: Any) -> dict[str, Any]:
    return {}


def _facts_of(model: Model | ParcelModel) -> dict[str, Any]:
    """The parcellation by name; one that is not shipped travels with its table."""
    parcellation = model.parcellation
    facts = {"parcellation": parcellation.name, "codes": parcellation.codes.tolist()}
    is_shipped = parcellation.name in shipped_names()
    return facts if is_shipped else {**facts, "table": parcellation.as_tsv()}


def _parcellation_of(metadata: Mapping[str, Any]) -> Parcellation:
    """The parcellation that the weights name; ``BASE`` if they are older than names."""
    name = metadata.get("parcellation", BASE)
    if "table" in metadata:
        parcellation = parse(name, metadata["table"])
    elif name in shipped_names():
        parcellation = load_parcellation(name)
    else:
        raise DataError(
            f"it draws the parcellation {name!r}, not {' or '.join(shipped_names())}",
            "use the version of cadiff that it was made for",
        )
    if metadata["codes"] != parcellation.codes.tolist():
        raise DataError("it was trained on another label table", "use weights for this version")
    return parcellation


def _segmented(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The parcellation of a network that draws all of its classes."""
    parcellation = _parcellation_of(metadata)
    n_classes = settings_of(NetConfig, metadata["net"]).n_classes
    if n_classes != parcellation.n_classes:
        raise DataError(
            f"its network has {n_classes} classes, its parcellation {parcellation.name} with"
            f" background {parcellation.n_classes}",
            "export the network with the parcellation that it was trained on",
        )
    return {"parcellation": parcellation}


def _facts_of_atlas(model: AtlasModel) -> dict[str, Any]:
    """Grids, conditions, and the base's labels: compressed, they are a small text."""
    labels = np.asarray(model.labels.data, dtype="<i2")
    return {
        "base": model.base,
        "grid": _grid_as_dict(model.grid),
        "space": as_dict(model.space),
        "labels": b64encode(zlib.compress(labels.tobytes(), 9)).decode(),
        "labels_grid": _grid_as_dict(model.labels.grid),
    }


def _atlas_facts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    grid = _grid_of(metadata["labels_grid"])
    codes = np.frombuffer(zlib.decompress(b64decode(metadata["labels"])), dtype="<i2")
    return {
        "base": metadata["base"],
        "grid": _grid_of(metadata["grid"]),
        "space": ConditionSpace.from_dict(metadata["space"]),
        "labels": Volume(codes.reshape(grid.shape).astype(np.int16), grid),
    }


def _grid_as_dict(grid: Grid) -> dict[str, Any]:
    return {"shape": list(grid.shape), "affine": grid.affine.tolist()}


def _grid_of(values: Mapping[str, Any]) -> Grid:
    return Grid(tuple(values["shape"]), np.array(values["affine"]))


@dataclass(frozen=True)
class Kind:
    """How a kind of network is stored.

    ``format`` names the kind in the file; ``release`` is the released model that is loaded by
    default, None where none is released; ``network`` builds one from the settings that were
    stored.  Tensors are stored in half precision, those in ``int8_step`` as int8 in units of the
    given step if they fit.  ``facts`` are entries of the metadata beside network and training, and
    ``restore`` makes a model's fields of them.
    """

    format: str
    release: str | None
    network: Callable[[dict[str, Any]], nn.Module]
    int8_step: Mapping[str, float] = field(default_factory=dict)
    facts: Callable[[Any], dict[str, Any]] = _no_facts
    restore: Callable[[Mapping[str, Any]], dict[str, Any]] = _no_facts


KINDS: Mapping[type[Trained[Any]], Kind] = {
    Model: Kind(
        SEGMENTER,
        DEFAULT,
        lambda settings: CADiffNet(settings_of(NetConfig, settings)),
        int8_step={"prior.logits": PRIOR_STEP},
        facts=_facts_of,
        restore=_segmented,
    ),
    BrainModel: Kind(
        BRAIN_FINDER,
        DEFAULT_BRAIN,
        lambda settings: BrainNet(settings_of(BrainConfig, settings)),
    ),
    AtlasModel: Kind(
        "cadiff-atlas-1",
        DEFAULT_ATLAS,
        lambda settings: AtlasNet(settings_of(AtlasConfig, settings)),
        facts=_facts_of_atlas,
        restore=_atlas_facts,
    ),
    ParcelModel: Kind(
        "cadiff-parcels-1",
        PARCELS,
        lambda settings: ParcelNet(settings_of(ParcelConfig, settings)),
        int8_step={"prior": PRIOR_STEP},
        facts=_facts_of,
        restore=lambda metadata: {"parcellation": _parcellation_of(metadata)},
    ),
}


def load(model: type[M], name: str = "", planned_sha256: str = "") -> M:
    """Load a released model by name, or a ``.safetensors`` file by path, and verify its checksum.

    ``model`` is a class of ``nets/models``; without a ``name`` its default release is loaded.
    Raises ``MissingInputError`` if there is no such file, ``DataError`` if it is damaged, holds
    another kind of network, or is not the file of the ``planned_sha256`` any more.
    """
    kind = KINDS[model]
    if not (name := name or kind.release or ""):
        raise MissingInputError(
            f"no network of format {kind.format!r} is released", "give a .safetensors file"
        )
    path, label, digest = find_weights(name, kind.format)
    if planned_sha256 not in ("", digest):
        raise changed_meanwhile(f"the weights {name}")
    try:
        with safe_open(path, framework="pt") as stored:
            header = dict(stored.metadata() or {})
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a weights file ({error})", "reinstall cadiff") from error
    metadata = _metadata(header, path)
    if metadata.get("format") != kind.format:
        raise DataError(
            f"{path} has format {metadata.get('format')!r}, not {kind.format!r}",
            "use weights written by cadiff for this purpose",
        )
    try:
        facts, net = kind.restore(metadata), kind.network(metadata["net"])
        training = metadata["training"]
        net.load_state_dict(
            {
                key: value.float() * (kind.int8_step[key] if value.dtype == torch.int8 else 1)
                for key, value in tensors.items()
            }
        )
    except DataError as error:
        raise DataError(f"{path}: {error.message}", error.remedy) from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{path} holds a network that this version of cadiff cannot build ({error})",
            "use the version of cadiff that wrote it, or a newer one",
        ) from error
    net.requires_grad_(False).eval()
    channels_last(net)
    return model(net, label, digest, training, **facts)


def _metadata(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What a weights file says of itself; nothing if it is not cadiff's."""
    try:
        return dict(json.loads(header.get(METADATA_KEY, "{}")))
    except ValueError as error:
        raise DataError(
            f"{path} is damaged: its description is no JSON", "copy it again"
        ) from error


def save(path: Path, model: Trained[Any]) -> str:
    """Write weights with their description, and their checksum beside them; returns the SHA-256.

    The model's own name and checksum are not stored.
    """
    kind = KINDS[type(model)]
    tensors = {}
    for key, value in model.net.state_dict().items():
        stored = value.detach().half()
        if step := kind.int8_step.get(key):
            units = (value.detach() / step).round()
            if units.min() >= -128 and units.max() <= 127:
                stored = units.to(torch.int8)
        tensors[key] = stored.contiguous()
    metadata = {
        "format": kind.format,
        "net": as_dict(model.net.config),
        **kind.facts(model),
        "training": dict(model.training),
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, {METADATA_KEY: json.dumps(metadata)})
    digest = sha256(path)
    with replacing(path.with_suffix(".sha256")) as temporary:
        temporary.write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    return digest
