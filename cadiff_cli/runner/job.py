"""A scan to segment, and what came of it.  Both travel between processes and machines."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cadiff_cli.config import Machine, Recipe, Request
from cadiff_cli.errors import OutputError, UsageError
from cadiff_cli.io.bids.layout import Derivatives, Finished
from cadiff_cli.io.bids.names import JOURNAL, page_path, source_entities
from cadiff_cli.io.checksums import checksums
from cadiff_cli.io.files import sha256
from cadiff_cli.io.provenance import make_recipe
from cadiff_cli.io.releases import SEGMENTER, find_weights
from cadiff_cli.io.templates import joint_spec, load_template, load_templates, parse_space
from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.products import Person, Template
from cadiff_cli.quality.age_ranges import read_age_ranges
from cadiff_cli.quality.calibration import calibration
from cadiff_cli.runner.personal import WORD, Conditional, PersonalAtlas, split

RECORD = f"{JOURNAL}/inputs.tsv"
"""Where an output folder keeps the checksums of its inputs."""


@dataclass(frozen=True)
class Job:
    """One scan: all that a worker needs to know, with absolute paths.

    ``source`` is the scan's BIDS URI. ``templates`` is what ``load_templates`` takes,
    ``weights`` what ``io.models.load`` does. ``notes`` are about the template.
    ``ranges`` is a file of the user's own age ranges.
    ``overwrite`` allows it to replace a result of other settings. A job that finds another
    process at its scan comes back as ``busy``, or waits if ``wait`` is set. ``source`` and
    ``run_id`` are empty for a scan that is not segmented as part of a dataset.

    A job for no scan in particular may wish for a ``conditional`` atlas: ``personal`` turns it into
    one for a person, with the person's ``atlas``.
    """

    t1: Path
    out: Path
    source: str
    recipe: Recipe
    templates: str
    weights: str
    run_id: str = ""
    work_dir: Path | None = None
    machine: Machine = Machine()
    notes: tuple[Note, ...] = ()
    overwrite: bool = False
    wait: bool = False
    person: Person = Person()
    ranges: Path | None = None
    conditional: Conditional | None = None
    atlas: PersonalAtlas | None = None

    def personal(self, person: Person) -> "Job":
        """The same job for a scan of this person: with the person's atlas, if one is wanted.

        Who has none gets the templates that it would stand beside or replace, with a note.
        """
        job = replace(self, person=person, conditional=None)
        if self.conditional is None:
            return job
        try:
            atlas = self.conditional.of(person)
        except UsageError as error:
            text = f"no atlas of the person's own ({error.message}): {self.recipe.template} serves"
            return replace(job, notes=(*self.notes, Note(NoteCode.NO_ATLAS, text)))
        folder, content = str(atlas.folder(self.out)), (atlas.name, atlas.cause)
        recipe = self.recipe
        if self.conditional.alone:
            recipe = replace(recipe, template=atlas.name, template_sha256=(content,))
            return replace(job, recipe=recipe, templates=folder, notes=(), atlas=atlas)
        recipe = replace(
            recipe,
            template=f"{recipe.template}+{atlas.name}",
            template_sha256=(*recipe.template_sha256, content),
        )
        return replace(job, recipe=recipe, templates=f"{self.templates}+{folder}", atlas=atlas)

    @property
    def specs(self) -> str:
        """What a later run takes for ``--template``."""
        if self.conditional is None:
            return self.templates
        return WORD if self.conditional.alone else f"{self.templates}+{WORD}"

    def of(self, t1: Path, source: str) -> "Job":
        """The same job for another scan."""
        return replace(self, t1=t1, source=source)

    @property
    def place(self) -> Derivatives:
        """Where its results go."""
        return Derivatives(self.out, self.t1)

    @property
    def entities(self) -> str:
        """Its name in tables and journals, such as ``sub-01_ses-a``."""
        return source_entities(self.t1)

    @property
    def log_dir(self) -> Path:
        """Where its log and crash file go."""
        return self.out / self.entities.split("_")[0] / "log" / self.run_id

    def outdated(self, result: Finished) -> str:
        """Why ``result`` is not what this job would make; empty if it is."""
        made = result.provenance
        if changed := made.differs(self.recipe):
            return changed
        if not self.has_changed(made.source_sha256):
            return ""
        before = Path(made.source).name
        if before not in ("", self.t1.name):
            return f"of {before}, not of {self.t1.name}"
        return f"{self.t1.name} has changed since"

    def has_changed(self, checksum: str) -> bool:
        """Whether the input is another than that of ``checksum``.

        One that is not there any more (``datalad drop``), or that nobody may read now, is not.
        """
        try:
            return not checksums(self.out / RECORD).fits(self.t1, checksum)
        except OSError:
            return False

    def input_sha256(self) -> str:
        """Checksum of the input; empty if it cannot be read."""
        try:
            return sha256(self.t1)
        except OSError:
            return ""

    def is_finished(self, result: Finished | None) -> bool:
        """Whether the complete ``result`` that is there, if any, is current.

        Raises ``OutputError`` for one that was made otherwise.
        """
        if result is None:
            return False
        why = self.outdated(result)
        if not self.overwrite:
            self.refuse(self.entities, why)
        return not why

    def lacks_page(self) -> bool:
        """Whether a page is wanted that is not there: a run may be killed before it writes one."""
        return self.recipe.config.output.report and not page_path(self.out, self.entities).exists()

    def refuse(self, entities: str, why: str) -> None:
        """Raise ``OutputError`` for a result that was made otherwise, if there is a ``why``."""
        if why:
            raise OutputError(
                f"{self.out} holds {entities}, made otherwise ({why})",
                "use another output folder, the same settings (--config-file with a file of its"
                " logs), or --overwrite to make the selected scans again",
            )


def job_of(request: Request, out: Path, run_id: str = "") -> tuple[Job, tuple[Template, ...]]:
    """A job for no scan in particular, and its templates, downloaded if need be.

    Raises ``MissingInputError`` or ``DataError`` for weights, templates and age ranges that cannot
    be had.
    """
    config = request.config.for_model(request.model)
    strip = replace(config.strip, model=_anywhere(config.strip.network))
    config = replace(config, strip=strip)
    ranges = read_age_ranges(request.ranges) if request.ranges else None
    _, label, checksum = find_weights(request.model, SEGMENTER)
    specs, conditional = split(request.template)
    templates = load_templates(specs, offline=request.offline)
    spaces = {parse_space(text, templates)[0] for text in config.output.spaces}
    for name in spaces - {template.name for template in templates}:
        load_template(name, offline=request.offline)
    wish = Conditional(_anywhere(request.atlas_model), request.template == WORD)
    job = Job(
        t1=Path(),
        out=out,
        source="",
        recipe=make_recipe(
            config,
            templates,
            label,
            checksum,
            calibration(config, checksum),
            ranges.fingerprint if ranges else "",
        ),
        templates=joint_spec(templates),
        weights=_anywhere(request.model),
        run_id=run_id,
        work_dir=request.work_dir,
        machine=request.machine,
        notes=templates[0].notes,
        overwrite=request.overwrite,
        conditional=wish if conditional else None,
        ranges=request.ranges.absolute() if request.ranges else None,
    )
    return job, templates


def _anywhere(model: str) -> str:
    """A released name, or a file by a path that stays valid in another working directory."""
    return str(Path(model).absolute()) if Path(model).suffix else model


@dataclass(frozen=True)
class Outcome:
    """What became of a job; ``message`` and ``crash_file`` tell of a failure.

    An ``unsuitable`` scan can never be segmented: it is not tried again while its input has
    ``input_sha256`` and the recipe this ``fingerprint``.
    """

    entities: str
    status: Literal["done", "failed", "busy", "unsuitable"]
    seconds: float = 0.0
    message: str = ""
    exit_code: int = 0
    crash_file: str = ""
    warnings: tuple[Note, ...] = ()
    input_sha256: str = ""
    fingerprint: str = ""
