"""Fill the templates of this package.  The only module with jinja2."""

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import cadiff_cli
from cadiff_cli.errors import plural

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """Fill a template; in HTML every value is escaped."""
    return _environment().get_template(template).render(**values)


def render_page(template: str, **values: Any) -> str:
    """Fill a page's template, with the script of the same name and the script's checksum."""
    script = _script(template)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    version = cadiff_cli.__version__
    return render(template, version=version, script=script, script_sha256=digest, **values)


def counted(items: Iterable[Any], text_of: Callable[[Any], str]) -> str:
    """The text that all items share, or every text with the number of items it holds for."""
    counts = Counter(" ".join(text_of(item).split()) for item in items)
    if len(counts) == 1:
        return next(iter(counts))
    return ", or ".join(f"{text} (n = {n})" for text, n in counts.most_common())


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("cadiff_cli.report"),
        autoescape=lambda name: name is not None and ".html." in name,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["counted"] = counted
    environment.filters["html"] = escape
    environment.filters["plural"] = plural
    environment.filters["zip"] = lambda a, b: list(zip(a, b, strict=True))
    environment.filters["transpose"] = lambda rows: list(zip(*rows, strict=True))
    environment.filters["link"] = lambda name: quote(str(name))
    environment.globals["number"] = lambda x, digits=3: "n/a" if x is None else f"{x:.{digits}f}"
    return environment


@cache
def _script(template: str) -> str:
    """The page's only script: the template of the same name with ``.js``."""
    name = re.sub(r"\.html\.j2$", ".js", template)
    text = files("cadiff_cli.report").joinpath("templates", name).read_text(encoding="utf-8")
    if "</script" in text.lower():
        raise ValueError(f"{name} would end itself")
    return text
