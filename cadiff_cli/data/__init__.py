"""Files that ship with the package."""

from importlib.resources import files
from importlib.resources.abc import Traversable


def shipped(name: str) -> Traversable:
    """A file or folder of this package, such as ``labels/cadiff40.tsv``; it need not be there."""
    return files(__name__).joinpath(name)


def read(name: str) -> str:
    """The text of a file."""
    return shipped(name).read_text(encoding="utf-8")
