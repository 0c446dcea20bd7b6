"""The entities of a dataset's images, and their index.  The only module that imports pybids."""

import re
from collections.abc import Callable, Collection, Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from cadiff_cli.errors import DataError
from cadiff_cli.io.files import folders_in, names_in
from cadiff_cli.machine import work_folder

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
    return _entities(_within(path, root), derived=derived)


def _entities(within: str, *, derived: bool = False) -> dict[str, Any]:
    """The entities of a path from the root of a dataset."""
    file = SimpleNamespace(path=within)  # all that pybids asks of a file
    values = {
        name: entity.match_file(file) for name, entity in known_entities(derived=derived).items()
    }
    return {name: value for name, value in values.items() if value is not None}


def anat_folders(person: Path) -> list[Path]:
    """Where the anat folders of a participant are, if there are any: its own, and its sessions'."""
    return [person / "anat", *(person / name / "anat" for name in folders_in(person, "ses-"))]


def anatomical_files(folder: Path) -> list[Path]:
    """NIfTI images of a participant or session in anat, whatever their names; sorted.

    No other folder is read: some are for a few people's eyes.  Raises ``MissingInputError`` for one
    that cannot be read.
    """
    images = (place / name for place in anat_folders(folder) for name in names_in(place))
    return sorted(path for path in images if ".nii" in path.name and path.name[0] != ".")


def named_images(
    root: Path,
    files: Iterable[Path],
    suffixes: Collection[str | None],
    extensions: Collection[str | None],
) -> dict[Path, dict[str, Any]]:
    """Entities of those ``files`` that have a valid BIDS name with such a suffix and extension.

    Without an index: pybids needs several seconds for one of some thousand images.
    """
    ends = tuple(f"_{suffix}{extension}" for suffix in suffixes for extension in extensions)
    likely = (path for path in files if path.name.endswith(ends))
    return {path: _entities(_within(path, root)) for path in likely if has_bids_name(path, root)}


def has_bids_name(path: Path, root: Path) -> bool:
    """Whether a file of a dataset has a name that BIDS knows."""
    from bids_validator import BIDSValidator

    return bool(BIDSValidator.is_bids(_within(path, root)))


def indexed_images(
    root: Path,
    participants: Collection[str],
    suffixes: Iterable[str | None],
    extensions: Iterable[str | None],
    database: Path,
) -> dict[Path, dict[str, Any]]:
    """The same of all anatomical images of the participants, from the index in ``database``.

    The index is pybids': written once, then never updated.  Raises ``DataError`` if it is of
    another dataset or unreadable.
    """
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    # Walk only through folders that can hold such images: seconds, not minutes.
    pattern = r"^/(sub-[^/]+(/ses-[^/]+)?(/anat(/[^/]*)?)?|dataset_description\.json)$"
    indexer = BIDSLayoutIndexer(
        validate=True, index_metadata=False, ignore=[re.compile(f"(?!{pattern})^/.")]
    )

    def layout_at(folder: Path | None) -> BIDSLayout:
        # Not validated: pybids refuses a description with a byte order mark.
        return BIDSLayout(root, database_path=folder, indexer=indexer, validate=False)

    layout = _kept_index(layout_at, database)
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


def _within(path: Path, root: Path) -> str:
    """The path from the root of a dataset, with a slash before it, as pybids wants it."""
    return f"/{path.relative_to(root).as_posix()}"


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
        with work_folder(".cadiff-", database) as folder:
            layout.save(folder, replace_connection=False)
            (Path(folder) / INDEX).replace(database / INDEX)
        return layout
    except FileExistsError as error:
        raise DataError(
            f"--bids-database-dir {database} is a file", "name a folder for the index"
        ) from error
    except ValueError as error:  # pybids: the folder that it was made of is gone
        raise DataError(
            f"{database / INDEX} is the index of a dataset that is not here now"
            f" ({' '.join(str(error).split())[:200]})",
            "remove this file after a dataset was moved, or name another folder",
        ) from error
    except SQLAlchemyError as error:
        raise DataError(
            f"{database / INDEX} is not an index ({' '.join(str(error).split())[:200]})",
            "remove this file, or name another folder",
        ) from error
