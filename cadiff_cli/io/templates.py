"""Find templates: in TemplateFlow's cache, by its client, or inside nilearn's package.

The TemplateFlow client downloads with a bare connection error, or silently returns an empty list;
files may be 0 bytes (never fetched) or half a download.  So files are looked up and checked here,
and the client is asked only when a download is both needed and allowed.
"""

import io
import json
import logging
import os
import socket
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from cadiff_cli import machine
from cadiff_cli.errors import CadiffError, DataError, MissingInputError, UsageError, in_a_line
from cadiff_cli.io.files import locked
from cadiff_cli.io.images import load_volume
from cadiff_cli.products import Frame, Template
from cadiff_cli.spatial.grid import Grid, Volume

log = logging.getLogger(__name__)

PREFERRED = "MNIColin27"
EMBEDDED = "MNI152NLin2009aSym"
SERVER = "templateflow.s3.amazonaws.com"
PARTS: dict[str, dict[str, Any]] = {
    "head": {"suffix": "T1w", "desc": None},
    "mask": {"suffix": "mask", "desc": "brain"},
}
"""Which files of a TemplateFlow template are needed."""


def registry() -> dict[str, dict[str, Any]]:
    """Known templates and where their origin and extents lie (``data/templates.json``)."""
    text = files("cadiff_cli").joinpath("data/templates.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def templateflow_home() -> Path:
    """The TemplateFlow cache: ``$TEMPLATEFLOW_HOME``, else the client's own default."""
    if home := os.environ.get("TEMPLATEFLOW_HOME"):
        return Path(home)
    base = os.environ.get("XDG_CACHE_HOME") or machine.home() / ".cache"
    return Path(base) / "templateflow"


def load_templates(names: str = "auto", *, offline: bool = False) -> tuple[Template, ...]:
    """Templates by name, joined by ``+``; ``"auto"`` is Colin27 and the embedded one.

    Where Colin27 cannot be had, the embedded one carries a warning and serves alone.  ``offline``
    forbids downloads.  Raises what ``load_template`` raises.
    """
    if names != "auto":
        return tuple(load_template(name, offline=offline) for name in parse_names(names))
    embedded = load_template(EMBEDDED, offline=offline)
    try:
        return load_template(PREFERRED, offline=offline), embedded
    except CadiffError as error:
        reason = error.message
    warning = (
        f"template {PREFERRED} is not available ({reason}); {EMBEDDED}, which comes with nilearn,"
        " serves alone: labels are a little less accurate"
    )
    log.warning(warning)
    return (replace(embedded, warnings=(warning,)),)


def joint_name(templates: Sequence[Template]) -> str:
    """What ``load_templates`` finds these by."""
    return "+".join(template.name for template in templates)


def parse_names(names: str) -> tuple[str, ...]:
    """The names in ``NAME[+NAME...]`` or ``auto``, each once; ``UsageError`` for an unknown one."""
    parts = tuple(dict.fromkeys(names.split("+")))
    known = ("auto", *registry())
    for name in parts:
        if name not in known or (name == "auto" and len(parts) > 1):
            raise UsageError(
                f"unknown template {name!r} in {names!r}",
                f"choose auto, or one or more of {', '.join(known[1:])}, joined by +",
            )
    return parts


def load_template(name: str, *, offline: bool = False, anew: bool = False) -> Template:
    """The template called ``name``.

    ``offline`` forbids downloads; ``anew`` replaces files that are there already, such as damaged
    ones.  Raises ``UsageError`` for an unknown name, ``MissingInputError`` or ``DataError`` with
    the remedy when its files cannot be had or are damaged.
    """
    known = registry()
    if name not in known:
        raise UsageError(f"unknown template {name!r}", f"choose from {', '.join(known)}")
    entry = known[name]
    head: Volume | None
    if entry["source"] == "nilearn":
        brain, mask, head, source = (*_nilearn_brain(), None, "nilearn package data")
    else:
        head, mask = (
            _checked(_fetch(name, entry, part, offline, anew), name) for part in ("head", "mask")
        )
        if head.grid.shape != mask.grid.shape:
            raise DataError(
                f"{name}: image {head.grid.shape} and mask {mask.grid.shape} differ",
                _refetch(name, templateflow_home()),
            )
        mask = Volume(mask.data > 0.5, mask.grid)
        if not 0.8 < mask.litres < 2.5:
            raise DataError(
                f"{name}: its brain mask holds {mask.litres:.2f} l, a brain 0.8 to 2.5 l",
                _refetch(name, templateflow_home()),
            )
        brain = Volume(np.where(mask.data, head.data, 0).astype(np.float32), head.grid)
        source = "templateflow"
    return Template(name, brain, _frame(entry), head=head, mask=mask, source=source)


def _frame(entry: Mapping[str, Any]) -> Frame:
    ac, low, high = (_point(entry[key]) for key in ("ac_mm", "low_mm", "high_mm"))
    return Frame(ac, low, high)


def _point(values: Sequence[float]) -> tuple[float, float, float]:
    x, y, z = map(float, values)
    return x, y, z


@cache
def _nilearn_brain() -> tuple[Volume, Volume]:
    from nilearn.datasets import load_mni152_template

    image = load_mni152_template(resolution=1)
    data = np.asarray(image.dataobj, dtype=np.float32)
    grid = Grid(data.shape, image.affine)
    return Volume(data, grid), Volume(data > 0, grid)


def _fetch(name: str, entry: dict[str, Any], part: str, offline: bool, anew: bool) -> Path:
    """Path of a non-empty file of the template, downloaded if needed and allowed."""
    home = templateflow_home()
    path = home / str(entry[part])
    try:
        there = _is_there(path)
        state = "is damaged" if there else "is empty" if path.exists() else "is not there"
    except OSError as error:
        raise MissingInputError(
            f"{path} cannot be read ({error.strerror})", "set TEMPLATEFLOW_HOME to a cache of yours"
        ) from error
    if there and not anew:
        return path
    if offline:
        raise MissingInputError(
            f"{path} {state} and downloads are forbidden (offline)", _refetch(name, home)
        )
    if not _reachable():
        raise MissingInputError(f"{path} {state} and there is no network", _refetch(name, home))
    log.info("downloading template %s", name)
    query = dict(entry["query"], extension=".nii.gz") | PARTS[part]
    try:
        _download(query, path, anew)
    except Exception as error:  # the client raises bare Exception, RuntimeError, OSError...
        raise MissingInputError(
            f"{path} {state} and downloading it failed ({in_a_line(error)})", _refetch(name, home)
        ) from error
    return path


def _is_there(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _download(query: dict[str, Any], path: Path, anew: bool) -> None:
    """Fetch the one file that ``query`` finds, to ``path`` in the cache, whole or not at all.

    The client writes straight into its cache, where others would read half of it: it gets a cache
    of its own for the time, and whoever else wants the file waits.
    """
    home = templateflow_home()
    os.environ["TEMPLATEFLOW_HOME"] = str(home)
    from templateflow.client import TemplateFlowClient

    if not home.is_dir() or not any(home.iterdir()):
        # The client does so itself in an empty folder, and in no other.
        TemplateFlowClient(root=home, use_datalad=False).cache.ensure()
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        locked(path.with_name(f".{path.name}.lock"), wait=True),
        tempfile.TemporaryDirectory(prefix=".cadiff-", dir=path.parent) as fresh,
    ):
        if _is_there(path) and not anew:
            return  # somebody else's by now
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            client = TemplateFlowClient(root=Path(fresh), use_datalad=False)
            got = client.get(raise_empty=True, **query)
        if isinstance(got, list):
            raise ValueError(f"templateflow has {len(got)} such files")
        Path(got).replace(path)


def _reachable(timeout_s: float = 3.0) -> bool:
    """Whether TemplateFlow's server answers; the client itself would try for most of a minute."""
    if urllib.request.getproxies():
        return True  # only the client knows how to ask a proxy
    try:
        with socket.create_connection((SERVER, 443), timeout=timeout_s):
            return True
    except OSError:
        return False


def _checked(path: Path, name: str) -> Volume:
    try:
        volume = load_volume(path)
    except CadiffError as error:
        raise DataError(
            f"template file {path}: {error.message}", _refetch(name, templateflow_home())
        ) from error
    if min(volume.grid.shape) < 32 or volume.data.max() <= volume.data.min():
        raise DataError(
            f"template file {path} is not a head (shape {volume.grid.shape})",
            _refetch(name, templateflow_home()),
        )
    return volume


def _refetch(name: str, home: Path) -> str:
    return (
        "on a machine with a network run"
        f" 'TEMPLATEFLOW_HOME={home} cadiff fetch {name}', or use --atlas {EMBEDDED}"
    )
