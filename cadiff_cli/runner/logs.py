"""What is said while a scan is segmented goes to a file."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOGGER = logging.getLogger("cadiff_cli")
ON_SCREEN = "cadiff: %(levelname)s: %(message)s"
"""How a message looks on a terminal, in every command."""


def warning(text: str) -> str:
    """``text`` as a warning on a terminal, for what is said without the log."""
    return ON_SCREEN % {"levelname": "WARNING", "message": text}


def capture_warnings() -> None:
    """Send other libraries' warnings to the log instead of to the user."""
    logging.captureWarnings(True)
    warnings.simplefilter("default")


class _Quiet(logging.FileHandler):
    """A log that cannot be written, on a full disk, is no reason for a traceback a line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Say nothing: what the disk lacks is said once, by whoever writes results."""


@contextmanager
def logged(path: Path, *screens: logging.Handler) -> Iterator[None]:
    """Write all that is logged within the block to ``path``; ``screens`` hear cadiff alone.

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
