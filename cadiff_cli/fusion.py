"""Multi-atlas label fusion: labelled people are registered to the scan, and their labels vote.

The classical baseline that a network has to beat.  It knows no network and no training.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cadiff_cli.config import RegisterConfig
from cadiff_cli.errors import UsageError, first_few
from cadiff_cli.io.bids.labelled import LabelledScan, labelled_scans, load_labelled
from cadiff_cli.io.bids.names import source_entities
from cadiff_cli.io.label_maps import unknown_ids
from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.machine import work_folder
from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.processes import children
from cadiff_cli.products import Scan, Stripped
from cadiff_cli.spatial.grid import Volume
from cadiff_cli.spatial.resample import resample, resample_labels
from cadiff_cli.stages.condition import brain_crop, normalise
from cadiff_cli.stages.register import joint_vote, register, settings, warp
from cadiff_cli.stages.strip import foreground, stripped_brain, winsorized

log = logging.getLogger(__name__)

VOTES = {"joint": "jlf", "majority": "majority"}
"""Ways to vote, and their names in file names."""
RADIUS, SEARCH, BETA = 2, 2, 2.0
"""Joint label fusion: voxels of a patch and of the search for its best match, sharpness."""
HALO = RADIUS + SEARCH + RADIUS
"""How far a voxel's label reaches: a patch that covers it, moved by the search, and its patch."""


@dataclass(frozen=True, eq=False)
class Voter:
    """A labelled person on the scan's crop.

    ``image`` (X, Y, Z) float32 in [0, 1] and ``classes`` (X, Y, Z); ``score`` and ``kind``
    are the registration's.  ``unknown`` are ids of the label map that became background.
    """

    name: str
    image: np.ndarray
    classes: np.ndarray
    kind: str
    score: float
    notes: tuple[Note, ...] = ()
    unknown: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Fused:
    """Label codes (int16) on the scan's own grid, and who voted: name -> registration, score."""

    labels: Volume
    vote: str
    atlases: Mapping[str, tuple[str, float]]
    seconds: Mapping[str, float]
    notes: tuple[Note, ...] = ()


def choose_atlases(dataset: Path, t1: Path, exclude: Sequence[str] = ()) -> list[LabelledScan]:
    """The first labelled scan of every person of ``dataset`` who may label ``t1``.

    The person in ``t1``, known by the subject label in its name or by the file, never does; nor do
    the subjects of ``exclude``.  Raises ``MissingInputError``, ``DataError`` or ``UsageError`` if
    nobody is there or left.
    """
    scans = labelled_scans(dataset)
    people = {scan.subject: scan for scan in reversed(scans)}
    named = set(exclude)
    if unknown := sorted(named - set(people)):
        raise UsageError(
            f"--exclude names {first_few(unknown)}", f"there are {first_few(sorted(people), 20)}"
        )
    own = {source_entities(t1).split("_")[0].removeprefix("sub-")}
    own |= {scan.subject for scan in scans if scan.t1.resolve() == t1.resolve()}
    chosen = [people[subject] for subject in sorted(set(people) - named - own)]
    if not chosen:
        raise UsageError(
            f"nobody of {dataset} is left to label {t1.name}: {first_few(sorted(people))} are"
            " excluded or in the scan",
            "give more people with --atlases, or fewer --exclude",
        )
    return chosen


def check_vote(vote: str, people: int, config: RegisterConfig) -> None:
    """Raise ``UsageError`` for what could only fail after the first registrations."""
    if vote not in VOTES:
        raise UsageError(f"unknown --vote {vote!r}", f"choose from {', '.join(VOTES)}")
    if vote == "joint" and people < 2:
        raise UsageError(
            "joint label fusion needs at least two people, one is left", "use --vote majority"
        )
    settings(config.name)


def fuse(
    scan: Scan,
    stripped: Stripped,
    atlases: Sequence[LabelledScan],
    parcellation: Parcellation,
    mapping: Mapping[int, int],
    config: RegisterConfig,
    vote: str = "joint",
    jobs: int = 1,
) -> Fused:
    """Label ``scan`` by the votes of ``atlases``, within the brain mask.

    ``mapping`` turns the ids of their label maps into classes.  Work is done in ``jobs`` processes;
    the result does not depend on their number.  Raises ``UsageError`` (``check_vote``).
    """
    check_vote(vote, len(atlases), config)
    grid = brain_crop(stripped.mask)
    mask = resample(stripped.mask, grid)
    image = normalise(resample(stripped.t1, grid).data, mask.data, grid.spacing_mm)
    begun = time.perf_counter()
    with children(jobs) as each:
        carried: list[Voter] = []
        task = partial(
            registered_voter,
            target=Volume(image, grid),
            parcellation=parcellation,
            mapping=mapping,
            config=config,
        )
        for person in each(task, atlases):
            carried.append(person)
            log.info("%d of %d atlases registered: %s", len(carried), len(atlases), person.name)
        registered = time.perf_counter()
        votes = [person.classes for person in carried]
        if vote == "majority":
            classes = np.where(mask.data, majority(votes), 0).astype(parcellation.dtype)
        else:
            log.info("joint label fusion of %d atlases", len(votes))
            classes = joint(image, mask.data, [p.image for p in carried], votes, jobs, each)
    ended = time.perf_counter()
    told = [note.about(person.name) for person in carried for note in person.notes]
    if unknown := sorted(set().union(*(person.unknown for person in carried))):
        ids = first_few([str(id_) for id_ in unknown])
        text = f"ids {ids} of the atlases are in no row of --labels: they count as background"
        told.append(Note(NoteCode.UNKNOWN_IDS, text))
    for note in told:  # those of a child process are heard of here only
        log.warning(note.text)
    native = resample_labels(Volume(classes, grid), scan.t1.grid)
    return Fused(
        Volume(parcellation.codes[native.data], native.grid),
        vote,
        {person.name: (person.kind, person.score) for person in carried},
        {"register": round(registered - begun, 3), "fuse": round(ended - registered, 3)},
        (*scan.notes, *stripped.notes, *told),
    )


def registered_voter(
    atlas: LabelledScan,
    target: Volume,
    parcellation: Parcellation,
    mapping: Mapping[int, int],
    config: RegisterConfig,
) -> Voter:
    """Register a labelled, skull-stripped person (0 outside the brain) to ``target``, a brain."""
    scan, labels = load_labelled(atlas, parcellation, mapping)
    grid = scan.t1.grid
    notes = [*scan.notes]
    brain = stripped_brain(winsorized(scan.t1))
    if brain is None:
        brain = foreground(scan.t1)
        text = "does not look skull-stripped, as atlases have to be"
        notes.append(Note(NoteCode.ATLAS_NOT_STRIPPED, text))
    crop = brain_crop(brain)
    image = resample(Volume(normalise(scan.t1.data, brain.data, grid.spacing_mm), grid), crop)
    with work_folder() as work:
        transform = register(target, image, config, Path(work), atlas.name)
        moved = warp(image, transform, target.grid)
        carried = warp(
            resample(labels, crop, order=0), transform, target.grid, interpolator="genericLabel"
        )
    return Voter(
        atlas.name,
        moved.data.astype(np.float32),
        np.rint(carried.data).astype(parcellation.dtype),
        transform.kind,
        transform.score,
        (*notes, *transform.notes),
        frozenset(unknown_ids(atlas.dseg, mapping)),
    )


def majority(votes: Sequence[np.ndarray]) -> np.ndarray:
    """(X, Y, Z): the class that most atlases give each voxel; the smallest one of equals.

    >>> majority([np.array([1, 2]), np.array([1, 3]), np.array([0, 3])])
    array([1, 3])
    """
    stack = np.stack(votes)
    counts = [(stack == k).sum(axis=0, dtype=np.uint16) for k in range(int(stack.max()) + 1)]
    return np.asarray(np.argmax(counts, axis=0), dtype=stack.dtype)


def joint(
    image: np.ndarray,
    mask: np.ndarray,
    images: Sequence[np.ndarray],
    votes: Sequence[np.ndarray],
    slabs: int = 1,
    each: Callable[..., Any] = map,
) -> np.ndarray:
    """(X, Y, Z): joint label fusion (Wang et al., IEEE TPAMI 35(3), 2013) inside ``mask``.

    An atlas counts by how like the scan its patches are, and less where others err like it.  The
    brain is fused in ``slabs`` of equal work with halos that make them exact; ``each`` maps a
    function over them.
    """
    done = np.cumsum(np.count_nonzero(mask, axis=(0, 1)))
    ends = np.searchsorted(done, np.arange(slabs + 1) / slabs * done[-1])
    ends[0], ends[-1] = 0, mask.shape[2]
    spans = [(low, high) for low, high in pairwise(ends) if mask[:, :, low:high].any()]
    tasks = []
    for low, high in spans:
        halo = slice(max(low - HALO, 0), high + HALO)
        # Votes for the slab are cast by patches around its own voxels and a radius beyond.
        voters = mask.copy()
        voters[:, :, : max(low - RADIUS, 0)] = voters[:, :, high + RADIUS :] = False
        cut = [[data[:, :, halo] for data in stack] for stack in (images, votes)]
        tasks.append((image[:, :, halo], voters[:, :, halo], *cut))
    work = partial(joint_vote, radius=RADIUS, search=SEARCH, beta=BETA)
    fused = np.zeros(mask.shape, dtype=votes[0].dtype)
    for (low, high), slab in zip(spans, each(work, *zip(*tasks, strict=True)), strict=True):
        start = low - max(low - HALO, 0)
        fused[:, :, low:high] = slab[:, :, start : start + high - low]
    return fused
