"""cadiff: brain structures and their volumes from a T1-weighted scan, by anatomy diffusion.

The names below are what Python programs need; each is imported when it is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Config", "load_model", "load_scan", "load_templates", "segment"]

_MODULES = {"Config": "cadiff_cli.config", "load_templates": "cadiff_cli.io.templates"}
"""Where names of ``__all__`` come from; the others from ``api``."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "cadiff_cli.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
