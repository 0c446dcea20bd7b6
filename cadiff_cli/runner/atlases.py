"""Make atlases: those a user asks for, and each person's own where a run wants it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from cadiff_cli.atlas import Generator, atlas_name, make_atlas, sample_volumes
from cadiff_cli.io.atlases import make_room, save_atlas
from cadiff_cli.io.files import check_writable
from cadiff_cli.io.templates import load_template
from cadiff_cli.labels.parcellation import BASE, load_parcellation
from cadiff_cli.products import Condition
from cadiff_cli.report.atlas import AtlasPage


def make_atlases(
    model: Generator,
    conditions: Sequence[Condition],
    out: Path,
    *,
    samples: int = 0,
    seed: int | None = None,
    overwrite: bool = False,
    report: bool = True,
) -> Iterator[Path]:
    """Make the atlas of each condition below ``out``; yields each folder, and the page.

    ``samples`` possible people, from ``seed`` (default 0) on, give the spread of volumes.  Without
    samples a ``seed`` gives the atlas of one possible person.  Everything is checked before the
    first atlas is made.  Raises ``UsageError`` for a condition that the model does not know,
    ``OutputError`` if files would be lost.
    """
    first, own = seed or 0, None if samples else seed
    for condition in conditions:
        model.check(condition)
    names = [atlas_name(model.name, condition, own) for condition in conditions]
    check_writable(out)
    for name in names:
        make_room(out, name, overwrite=overwrite)
    page = AtlasPage(out, names) if report else None
    base, parcellation = load_template(model.base), load_parcellation(BASE)
    for condition in conditions:
        atlas = make_atlas(model, base, condition, own)
        drawn = sample_volumes(model, base, condition, range(first, first + samples))
        yield save_atlas(out, atlas, parcellation, drawn)
        if page:
            page.add(atlas, parcellation, drawn)
    if page:
        yield page.write()
