"""TemplateFlow's cache of files, and the client that fills it.

The client downloads with a bare connection error, or silently returns an empty list; files may be
0 bytes (never fetched) or half a download.  So files are looked up here, and the client is asked
only when a download is both needed and allowed.
"""

import io
import json
import logging
import os
import socket
import urllib.request
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cadiff_cli import machine
from cadiff_cli.errors import MissingInputError, in_a_line
from cadiff_cli.io.files import locked

log = logging.getLogger(__name__)

SERVER = "templateflow.s3.amazonaws.com"


def templateflow_home() -> Path:
    """The TemplateFlow cache: ``$TEMPLATEFLOW_HOME``, else the client's own default."""
    if home := os.environ.get("TEMPLATEFLOW_HOME"):
        return Path(home)
    base = os.environ.get("XDG_CACHE_HOME") or machine.home() / ".cache"
    return Path(base) / "templateflow"


def listed(folder: str) -> list[str]:
    """Names of the files that TemplateFlow has in a folder, such as ``tpl-MNIInfant/cohort-2``.

    They are those in the cache, downloaded or not, and those that the client knows of.
    """
    try:
        there = {path.name for path in (templateflow_home() / folder).iterdir()}
    except OSError:
        there = set()
    return sorted(there | {name for parent, name in _known() if parent == folder})


def packaged_json(relative: str) -> dict[str, Any]:
    """A JSON object of the client's package, such as a template's description; empty if absent."""
    folder, _, name = relative.rpartition("/")
    path = _skeleton()
    if path is None or (folder, name) not in _known():
        return {}
    with zipfile.ZipFile(path) as skeleton:
        return dict(json.loads(skeleton.read(relative)))


@cache
def _known() -> tuple[tuple[str, str], ...]:
    """(folder, name) of every file of the skeleton that the client's package carries."""
    path = _skeleton()
    if path is None:
        return ()
    with zipfile.ZipFile(path) as skeleton:
        parts = (name.rpartition("/") for name in skeleton.namelist())
        return tuple((folder, name) for folder, _, name in parts if name)


def _skeleton() -> Path | None:
    """An archive of the client's package with every file's name; descriptions are whole in it."""
    spec = find_spec("templateflow")
    folders = spec.submodule_search_locations if spec else None
    path = Path(next(iter(folders or ("",)))) / "conf" / "templateflow-skel.zip"
    return path if path.is_file() else None


def fetch(relative: str, remedy: str, *, offline: bool, anew: bool) -> Path:
    """Path of a non-empty file of the cache, downloaded if needed and allowed.

    ``relative`` is its place in the cache; ``anew`` replaces one that is there.  Raises
    ``MissingInputError`` with the ``remedy``.
    """
    path = templateflow_home() / relative
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
        raise MissingInputError(f"{path} {state} and downloads are forbidden (offline)", remedy)
    if not _reachable():
        raise MissingInputError(f"{path} {state} and there is no network", remedy)
    log.info("downloading %s", path.name)
    try:
        _download(query_of(path.name), path, anew)
    except Exception as error:  # the client raises bare Exception, RuntimeError, OSError...
        raise MissingInputError(
            f"{path} {state} and downloading it failed ({in_a_line(error)})", remedy
        ) from error
    return path


def query_of(name: str) -> dict[str, Any]:
    """The client's query for one file.

    >>> query = query_of("tpl-MNIInfant_cohort-2_res-1_desc-brain_mask.nii.gz")
    >>> query["template"], query["cohort"], query["resolution"], query["desc"], query["suffix"]
    ('MNIInfant', '2', 1, 'brain', 'mask')
    """
    stem, extension = name.split(".", 1)
    *pairs, suffix = stem.split("_")
    entities = dict(pair.split("-", 1) for pair in pairs)
    query: dict[str, Any] = {"template": entities["tpl"]}
    if cohort := entities.get("cohort"):
        query["cohort"] = cohort
    if resolution := entities.get("res"):
        query["resolution"] = int(resolution)
    others = {"desc": entities.get("desc"), "density": None}
    return query | others | {"suffix": suffix, "extension": f".{extension}"}


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
        machine.work_folder(".cadiff-", path.parent) as fresh,
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
