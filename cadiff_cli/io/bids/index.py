"""The entities of a dataset's images, and their index.  The only module that imports pybids."""

import re
import tempfile
from collections.abc import Callable, Collection, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadiff_cli.errors import DataError

if TYPE_CHECKING:
    from bids.layout import BIDSLayout

INDEX = "layout_index.sqlite"
"""pybids' name of its index."""


@cache
def known_entities(*, derived: bool = False) -> dict[str, Any]:
    """All entities of pybids by name, with those of derivatives if ``derived``."""
    from bids.layout import Config

    entities = dict(Config.load("bids").entities)
    return entities | Config.load("derivatives").entities if derived else entities


def entities_of(path: Path, root: Path, *, derived: bool = False) -> dict[str, Any]:
    """Read the entities from the path of an image below ``root``.

    Folders above ``root`` are ignored, even if they are called sub-study or anat.
    """
    from bids.layout import parse_file_entities

    within = f"/{path.relative_to(root).as_posix()}"  # pybids wants a slash before a key
    entities = known_entities(derived=derived).values()
    return dict(parse_file_entities(within, entities=[*entities]))


def named_images(
    root: Path,
    participants: Collection[str],
    suffixes: Iterable[str | None],
    extensions: Iterable[str | None],
    database: Path | None = None,
) -> dict[Path, dict[str, Any]]:
    """Entities of the participants' anatomical images that have a valid BIDS name.

    ``database`` is a folder for the index: written once, then never updated.  Raises
    ``DataError`` if its index is of another dataset or unreadable.
    """
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    # Walk only through folders that can hold such images: seconds, not minutes.
    subject = "[^/]+" if database else f"({'|'.join(map(re.escape, participants))})"
    pattern = rf"^/(sub-{subject}(/ses-[^/]+)?(/anat(/[^/]*)?)?|dataset_description\.json)$"
    indexer = BIDSLayoutIndexer(
        validate=True, index_metadata=False, ignore=[re.compile(f"(?!{pattern})^/.")]
    )

    def layout_at(folder: Path | None) -> BIDSLayout:
        # Not validated: pybids refuses a description with a byte order mark.
        return BIDSLayout(root, database_path=folder, indexer=indexer, validate=False)

    layout = layout_at(None) if database is None else _kept_index(layout_at, database)
    if not Path(layout.root).samefile(root):
        raise DataError(
            f"--bids-database-dir {database} is the index of {layout.root}, not of {root}",
            "give each dataset a folder of its own",
        )
    # pybids also reads entities from folders above the dataset: ask only for suffix and extension.
    names = layout.get(suffix=[*suffixes], extension=[*extensions], return_type="filename")
    # An index may know the dataset under another mount, and participants who are not chosen.
    paths = sorted(root / Path(name).relative_to(layout.root) for name in names)
    images = {path: entities_of(path, root) for path in paths}
    return {path: each for path, each in images.items() if each["subject"] in participants}


def _kept_index(layout_at: Callable[[Path | None], "BIDSLayout"], database: Path) -> "BIDSLayout":
    """Open the index of pybids in a folder, or write it there once it is complete.

    pybids writes its index while it walks, and would trust the part that a killed run left.
    """
    from sqlalchemy.exc import SQLAlchemyError

    try:
        if (database / INDEX).exists():
            return layout_at(database)
        database.mkdir(parents=True, exist_ok=True)
        layout = layout_at(None)
        with tempfile.TemporaryDirectory(prefix=".cadiff-", dir=database) as folder:
            layout.save(folder, replace_connection=False)
            (Path(folder) / INDEX).replace(database / INDEX)
        return layout
    except FileExistsError as error:
        raise DataError(
            f"--bids-database-dir {database} is a file", "name a folder for the index"
        ) from error
    except SQLAlchemyError as error:
        raise DataError(
            f"{database / INDEX} is not an index ({' '.join(str(error).split())[:200]})",
            "remove this file, or name another folder",
        ) from error
