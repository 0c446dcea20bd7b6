"""The order of the stages.  Inference and training both begin with ``prepare``."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from cadiff_cli.config import Config
from cadiff_cli.io.images import given_mask
from cadiff_cli.io.releases import strip_weights_sha256
from cadiff_cli.products import Prepared, Result, Scan, Segmentation, Stripped, Template
from cadiff_cli.quality.age_ranges import AgeRanges, load_age_ranges, percentiles
from cadiff_cli.quality.calibration import calibration
from cadiff_cli.stages.bias import evened_head
from cadiff_cli.stages.condition import condition
from cadiff_cli.stages.orientation import verified
from cadiff_cli.stages.register import register_templates, registrars
from cadiff_cli.stages.strip import intracranial_on_scan, on_scan, strip, strip_template
from cadiff_cli.stages.volumes import volumes_mm3

if TYPE_CHECKING:
    from cadiff_cli.nets.models import BrainModel, Model, ParcelModel

Announce = Callable[[str], None]
"""Called with a stage's name when it begins."""


class Stopwatch:
    """Seconds per stage, announced as they begin."""

    def __init__(self, announce: Announce | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._announce = announce or (lambda _name: None)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block under ``name``."""
        self._announce(name)
        begun = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begun, 3)


def strip_scan(scan: Scan, template: Template | None, config: Config, work_dir: Path) -> Stripped:
    """``strip`` with the mask that the user names, or the released network."""
    mask, sha256 = config.strip.mask, strip_weights_sha256(config.strip)
    return strip(
        scan,
        template,
        config,
        work_dir,
        given_mask(mask, scan) if mask else None,
        partial(brain_model, config.strip.network, sha256) if sha256 else None,
    )


@cache
def brain_model(name: str, sha256: str) -> "BrainModel":
    """The network ``name`` that finds the brain, loaded once per process and content."""
    from cadiff_cli.io import models
    from cadiff_cli.nets.models import BrainModel

    return models.load(BrainModel, name, sha256)


@cache
def parcel_model(name: str) -> "ParcelModel":
    """The released network that names the parcels of ``name``, loaded once per process."""
    from cadiff_cli.io import models
    from cadiff_cli.nets.models import ParcelModel

    return models.load(ParcelModel, name)


def prepare(
    scan: Scan,
    templates: Sequence[Template],
    config: Config,
    work_dir: Path,
    watch: Stopwatch | None = None,
    jobs: int = 1,
) -> Prepared:
    """Everything before the network; transforms are written into ``work_dir``.

    The first of the ``templates`` that is a whole head may also serve to find the brain.  With
    ``jobs``, so many templates are registered at a time, in processes of their own; the result
    does not depend on it.
    """
    watch = watch or Stopwatch()
    wanted = templates if config.register.wanted else ()
    with registrars(min(jobs, len(wanted))) as each:
        with watch.stage("strip"):
            stripped = verified(
                scan, strip_scan(scan, strip_template(templates), config, work_dir), templates[0]
            )
        with watch.stage("register"):
            registrations = register_templates(stripped, wanted, config.register, work_dir, each)
    with watch.stage("field"):
        conditions = condition(stripped, registrations)
    return Prepared(scan, stripped, registrations, conditions, tuple(templates))


def run(
    scan: Scan,
    templates: Sequence[Template],
    model: "Model",
    config: Config,
    work_dir: Path,
    announce: Announce | None = None,
    gate: AbstractContextManager[object] | None = None,
    device: str = "auto",
    jobs: int = 1,
    ranges: AgeRanges | None = None,
) -> Result:
    """From a scan to labels and volumes; nothing is written but the transforms in ``work_dir``.

    ``gate`` is entered for the inference on the ``device``, where several processes share a GPU.
    ``jobs`` registrations are done at a time.  ``ranges`` are the user's own, in place of those
    that ship.
    """
    from cadiff_cli.stages.parcels import parcellate
    from cadiff_cli.stages.segment import segment

    watch = Stopwatch(announce)
    prepared = prepare(scan, templates, config, work_dir, watch, jobs)
    namer: ParcelModel | None = None
    with gate or nullcontext():
        with watch.stage("segment"):
            mask = on_scan(prepared.stripped, scan)
            segmentation = segment(scan, prepared.conditions, mask, model, config, device)
        if config.output.parcellation:
            with watch.stage("parcels"):
                namer = parcel_model(config.output.parcellation)
                parcels = parcellate(segmentation, prepared.conditions, namer, device)
    known = ranges or load_age_ranges(model.parcellation)
    result = Result(
        prepared,
        mask,
        segmentation,
        volumes_mm3(segmentation),
        model.info,
        config,
        watch.seconds,
        calibration=calibration(config, model.sha256),
        percentiles_of=known.people if known else "",
        ranges=ranges.fingerprint if ranges else "",
        head=evened_head(prepared.stripped),
        intracranial=intracranial_on_scan(prepared.stripped, scan),
    )
    sizes = {s.name: result.mm3(s.code) for s in model.parcellation.structures}
    found = percentiles(known, sizes, model.parcellation, scan.person)
    result = replace(result, percentiles=found)
    return replace(result, finer=_finer(result, parcels, namer)) if namer else result


def _finer(result: Result, parcels: Segmentation, namer: "ParcelModel") -> Result:
    """The same result with the ``parcels`` that ``namer`` found."""
    inner = {s.code for s in namer.parcellation.structures if s.is_part}
    return replace(
        result,
        segmentation=parcels,
        volumes_mm3=volumes_mm3(parcels),
        model=replace(namer.info, structures=result.model.structures | inner),
    )
