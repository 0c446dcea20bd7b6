"""``--template conditional``: each person's own atlas, made when a scan first needs it."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from cadiff_cli.errors import UsageError, changed_meanwhile
from cadiff_cli.io.atlases import holds, place_of, save_atlas
from cadiff_cli.io.files import locked
from cadiff_cli.io.templates import load_template
from cadiff_cli.labels.parcellation import BASE, load_parcellation
from cadiff_cli.products import Condition, Person, Template
from cadiff_cli.runner.logs import LOGGER

if TYPE_CHECKING:
    from cadiff_cli.nets.models import AtlasModel

WORD = "conditional"
FOLDER = "templates"
"""Of an output folder: where the atlases of its people lie."""


@dataclass(frozen=True)
class PersonalAtlas:
    """The atlas of a condition: ``model`` is what ``io.models.load`` takes, ``cause`` its checksum.

    ``name`` is the template's.
    """

    model: str
    condition: Condition
    name: str
    cause: str

    def folder(self, out: Path) -> Path:
        """Where it lies in an output folder."""
        return place_of(out / FOLDER, self.name)

    def provide(self, out: Path) -> None:
        """Make it, unless it is there; processes that want the same one wait for the first."""
        folder = self.folder(out)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock"), wait=True):
            if holds(folder, self.cause):
                return
            from cadiff_cli.atlas import make_atlas

            LOGGER.info("making the atlas %s", self.name)
            model = _network(self.model)
            atlas = make_atlas(model, load_template(model.base), self.condition)
            if atlas.template.cause != self.cause:
                raise changed_meanwhile(f"the weights {self.model}")
            save_atlas(out / FOLDER, atlas, load_parcellation(BASE))

    def mark(self, template: Template) -> Template:
        """The template, known by its cause if it is this atlas."""
        return replace(template, cause=self.cause) if template.name == self.name else template


@dataclass(frozen=True)
class Conditional:
    """The wish for atlases of people's ages and sexes, by the network ``model``.

    ``alone``: the atlas serves in place of other templates, not beside them.
    """

    model: str
    alone: bool

    def of(self, person: Person) -> PersonalAtlas:
        """The person's atlas; ages are whole years, so that people share atlases.

        Raises ``UsageError`` for an age that is unknown, or that the network does not know.
        """
        from cadiff_cli.atlas import atlas_name, cause

        if person.age_years is None:
            raise UsageError("the age is unknown", "give --age")
        condition = Condition(float(math.floor(person.age_years + 0.5)), person.sex)
        model = _network(self.model)
        model.check(condition)
        name = atlas_name(model.name, condition)
        return PersonalAtlas(self.model, condition, name, cause(model.sha256, condition))


@lru_cache(maxsize=1)
def _network(name: str) -> "AtlasModel":
    """Loaded once per process."""
    from cadiff_cli.io import models
    from cadiff_cli.nets.models import AtlasModel

    return models.load(AtlasModel, name)


def split(specs: str) -> tuple[str, bool]:
    """The templates that ``conditional`` stands beside, or falls back to; and whether it is there.

    >>> split("MNIColin27+conditional"), split("conditional"), split("auto")
    (('MNIColin27', True), ('auto', True), ('auto', False))
    """
    pieces = specs.split("+")
    others = [piece for piece in pieces if piece != WORD]
    return "+".join(others) or "auto", len(others) < len(pieces)
