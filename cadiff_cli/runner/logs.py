"""Log files: the messages of a scan's segmentation."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOGGER = logging.getLogger("cadiff_cli")
ON_SCREEN = "cadiff: %(levelname)s: %(message)s"
"""Format of a message on a terminal, in every command."""


def warning(text: str) -> str:
    """Format ``text`` as a warning on a terminal, for messages outside the log."""
    return ON_SCREEN % {"levelname": "WARNING", "message": text}


def capture_warnings() -> None:
    """Send other libraries' warnings to the log instead of to the user."""
    logging.captureWarnings(True)
    warnings.simplefilter("default")


class _Quiet(logging.FileHandler):
    """A log file that prints no traceback for each line that a full disk refuses."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Ignore the error: the writer of results reports a full disk once."""


@contextmanager
def logged(path: Path, *screens: logging.Handler) -> Iterator[None]:
    """Write all messages of the block to ``path``; ``screens`` get those of cadiff alone.

    The traceback of an exception that leaves the block is in the file too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _Quiet(path, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    capture_warnings()
    LOGGER.setLevel(logging.DEBUG)
    added = [(LOGGER, handler) for handler in (file, *screens)]
    added.append((logging.getLogger("py.warnings"), file))
    for logger, handler in added:
        logger.propagate = False
        logger.addHandler(handler)
    try:
        yield
    except Exception:
        LOGGER.debug("the run failed", exc_info=True)
        raise
    finally:
        for logger, handler in added:
            logger.removeHandler(handler)
            handler.close()
