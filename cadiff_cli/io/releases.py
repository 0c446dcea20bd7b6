"""Released models on disk: where they live and whether they are whole.  Loads no torch.

A release is a folder ``weights/NAME/`` with ``model.safetensors``, ``model.sha256`` and
``README.md``.  It is packed into the wheel, so that a run needs no network.
"""

import json
import os
from pathlib import Path

from cadiff_cli.config import DEFAULT_BRAIN, OutputConfig, Request, StripConfig
from cadiff_cli.errors import DataError, MissingInputError
from cadiff_cli.io.files import sha256

METADATA_KEY = "cadiff"
"""The only key: safetensors writes several in changing order, and the checksum with them."""
SEGMENTER = "cadiff-1"
"""The format of networks that ``--model`` takes."""
DEFAULT: str = Request.model
BRAIN_FINDER = "cadiff-brain-1"
"""The format of networks that ``--strip-model`` takes."""
DEFAULT_ATLAS: str = Request.atlas_model


def weights_folder() -> Path:
    """Where releases live: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "weights"
    return installed if installed.is_dir() else package.parent / "weights"


def find_weights(name: str = DEFAULT, format_: str = "") -> tuple[Path, str, str]:
    """A released model by name, or a ``.safetensors`` file by path: (path, label, SHA-256).

    ``format_`` is that of the wanted kind of network, as its files name it.  Raises
    ``MissingInputError`` if it is not there, ``DataError`` if it is of another kind, its checksum
    is not the one on record, or the record is empty.
    """

    def known() -> str:
        released = sorted(weights_folder().glob("*/model.safetensors"))
        fitting = (p.parent.name for p in released if format_ in ("", _format(p)))
        return f"use {', '.join(fitting) or 'a released name'}, or a .safetensors file"

    given = Path(name)
    is_file = given.suffix == ".safetensors"
    path = given if is_file else weights_folder() / name / "model.safetensors"
    if not os.path.isfile(path):  # which takes names that are too long
        if os.path.isfile(given):
            raise MissingInputError(f"{given} is no .safetensors file", known())
        raise MissingInputError(f"no model at {path}", known())
    got = sha256(path)
    record = path.with_suffix(".sha256")
    if record.is_file():
        want = next(iter(record.read_text(encoding="utf-8-sig").split()), "")
        if not want:
            raise DataError(f"{record} is empty", "reinstall cadiff, or remove this file")
        if got != want:
            raise DataError(
                f"{path} has checksum {got[:12]}, its record says {want[:12]}",
                "the file is damaged or was replaced: reinstall cadiff",
            )
    elif not is_file:
        raise DataError(f"{record} is missing", "reinstall cadiff")
    if format_ and (kind := _format(path)) and kind != format_:
        raise DataError(f"{path} has format {kind!r}, not {format_!r}", known())
    return path, path.name if is_file else path.parent.name, got


def _format(path: Path) -> str:
    """The kind of network that a weights file holds, in its own words; empty if unknown."""
    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > path.stat().st_size:  # any text begins with a great number
                return ""
            told = json.loads(stream.read(size))["__metadata__"][METADATA_KEY]
        return str(json.loads(told)["format"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def parcels_sha256(output: OutputConfig) -> str:
    """Checksum of the network that names parcels; empty if none are wanted."""
    return find_weights(output.parcellation)[2] if output.parcellation else ""


def strip_weights_sha256(strip: StripConfig) -> str:
    """Checksum of the network that may find the brain; empty if none may, or none is installed.

    Raises ``MissingInputError`` if the user named one that is not there.
    """
    if strip.mask is not None or strip.method not in ("auto", "net"):
        return ""
    try:
        return find_weights(strip.network, BRAIN_FINDER)[2]
    except MissingInputError:
        if strip.network != DEFAULT_BRAIN:
            raise
        return ""
