"""Find the brain: from a given mask, a scan that is stripped already, a network or a template."""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from scipy import ndimage

from cadiff_cli.config import Config, RegisterConfig, StripConfig, StripMethod
from cadiff_cli.errors import DataError, MissingInputError
from cadiff_cli.notes import Note, NoteCode
from cadiff_cli.products import Scan, Stripped, Template
from cadiff_cli.quality.limits import PLAUSIBLE_LITRES
from cadiff_cli.spatial.grid import Grid, Volume, border_value, faces
from cadiff_cli.spatial.resample import (
    all_voxels,
    bounding_box,
    resample,
    resample_in,
    resample_mask,
)
from cadiff_cli.stages.bias import evened, find_bias
from cadiff_cli.stages.masks import (
    SPACING_MM,
    closing,
    doubts,
    find_brain,
    find_head,
    judge_mask,
    skull_doubts,
    tidy,
)

if TYPE_CHECKING:
    from cadiff_cli.nets.models import BrainModel

log = logging.getLogger(__name__)

Network: TypeAlias = Callable[[], "BrainModel"]
"""A function that loads the network that finds the brain."""
STRIPPED_LITRES = (0.4, 2.3)
"""Range of a stripped brain's volume; most heads are larger, but not a child's in air of 0."""
LARGE_LITRES = 1.7
"""Few brains are larger."""
MOST_TOUCHED = 0.01
MOST_FILLED = 0.75
"""Largest share of a tight field of view that a brain fills."""
LEAST_KEPT = 0.8
"""Share of its brightness that a stripped brain keeps on ``FALL_MM`` inwards: 0.93 to 1 in 24
brains of four sources.  In a head, from the scalp to the bone, it keeps 0.62 or less (30 images of
13 heads in air of 0, whole and cut)."""
FALL_MM = 10
DEEPEST_MM = 32
"""Layers are compared down to this depth."""
CLOSING_MM = 8.0
"""Radius of the ball that closes an object: bone that was set to 0 lies within it."""
DARKEST = 1.0
"""Percentile that becomes 0 if some intensities are negative: a single wrapped or padded voxel must
not compress the range of all others."""
EXTREME = 0.1
"""Intensities may be extreme beyond this percentile at either end."""
LEAST_LITRES = 0.02
"""Volume of the smallest brain that is accepted."""
DARK = 1e-3
"""A brain's maximum exceeds this share of the scan's; ringing of splines in air of 0 does not."""
LEAST_SPREAD = 0.12
"""Standard deviation of a stripped brain's intensities, as a share of their mean."""
SPECK = 0.01
"""Pieces of a given mask, or of a stripped scan, below this share of the largest piece are noise:
they would enlarge the box that is segmented."""
RINGING = 0.03
"""Largest ringing of splines around a stripped brain, as a share of the scan's range."""
RINGS = 1.5
"""With its ringing a brain is at least so many times as large."""
STILL = 1e-4
"""The same for the median of the background; air is far noisier."""


def strip(
    scan: Scan,
    template: Template | None,
    config: Config,
    work_dir: Path,
    given: Volume | None = None,
    network: Network | None = None,
) -> Stripped:
    """Find the brain on the working grid, 0 outside its mask; only method ``template`` needs one.

    ``given``, the user's mask (bool, on the scan's grid), takes precedence; ``network`` loads the
    network that finds brains.  The brain's brightness is evened out (``stages/bias``).
    """
    full = winsorized(scan.t1)
    working = full.grid.working()
    brain = stripped_brain(full)
    lifted = _lifted(full, brain)
    method, notes = _method(config.strip, given, network, stripped_already=brain is not None)
    # Who asks for "net" may know better, and a face must not pass for a bare brain.
    bare = brain is not None and (config.strip.method != "net" or brain.litres <= LARGE_LITRES)
    own, intracranial = given, None
    if method is StripMethod.AS_IS:
        if brain:
            _has_tissues(full, brain)
        own = brain or foreground(full)
    if own:
        mask = resample_mask(own, working)
    elif method is StripMethod.NET:
        mask, intracranial = _by_network(full, working, network, bare=bare)
        notes.extend(skull_doubts(intracranial) if intracranial else ())
    else:
        head = _cubic(lifted, working, all_voxels(working.shape))
        mask, registration = _from_template(head, template, config.register, work_dir)
        code = NoteCode.STRIP_REGISTRATION
        notes.extend(note.about("skull stripping", code) for note in registration)
    quality = judge_mask(mask, find_brain(brain, SPECK) if brain else find_head(full))
    log.info("brain mask (%s): %s", method, quality)
    notes.extend(note.about("skull stripping") for note in doubts(quality))
    # A user's mask or stripped brain keeps its pieces but for specks; one found here is one piece.
    whole = tidy(mask.data, SPECK if own else 1.0)
    if specks := np.count_nonzero(mask.data & ~whole):
        log.info("%d voxels of the mask are specks, left out", specks)
    mask = Volume(whole, working)
    notes.extend(_of_volume(mask, method))
    t1 = _cubic(lifted, working, bounding_box(mask.data))
    inside = Volume(np.where(mask.data, t1.data, 0).astype(np.float32), working)
    if inside.data.max() < DARK * lifted.data.max():
        raise DataError("the scan is dark everywhere inside the mask", "check --mask FILE")
    bias = find_bias(inside, mask)
    notes.extend(bias.notes)
    if method is StripMethod.AS_IS and brain and brain.litres > LARGE_LITRES:
        text = (
            f"{brain.litres:.2f} l are taken for a stripped brain: if it is a whole head, give"
            " --skull-strip net"
        )
        notes.append(Note(NoteCode.LARGE_BRAIN, text))
    for note in notes:
        log.warning(note.text)
    if own:
        own = Volume(tidy(own.data, SPECK), own.grid)
    t1 = evened(inside, bias)
    return Stripped(
        *(t1, mask, method, tuple(notes), quality, own, bias.ratio, lifted, bias.log, intracranial),
        bare=bare,
    )


def winsorized(t1: Volume) -> Volume:
    """Clip extreme voxels: a few of them would put all tissue into one histogram bin.

    Nothing changes within three times the range from percentile 0.1 to 99.9 of the foreground.
    """
    values = t1.data[t1.data != border_value(t1.data)]
    if not len(values):
        return t1
    low, high = np.percentile(values, [EXTREME, 100 - EXTREME])
    low, high = low - (high - low), high + (high - low)
    if low == high or (t1.data.min() >= low and t1.data.max() <= high):
        return t1
    extreme = np.count_nonzero((t1.data < low) | (t1.data > high))
    log.info("%d extreme voxels are clipped to %.4g and %.4g", extreme, low, high)
    air = border_value(t1.data)
    return Volume(np.where(t1.data == air, air, np.clip(t1.data, low, high)), t1.grid)


def _by_network(
    t1: Volume, working: Grid, network: Network | None, *, bare: bool
) -> tuple[Volume, Volume | None]:
    """The brain's mask, and what the inner skull holds: None if that is not known.

    A ``bare`` brain does not show its skull.
    """
    from cadiff_cli.stages.brain_mask import find_brain_in_head, find_skull, network_image

    if network is None:
        raise MissingInputError(
            "this version carries no network that finds the brain",
            "use --skull-strip template, or give --mask FILE",
        )
    model, head = network(), network_image(t1)
    mask, distance = find_brain_in_head(head, working, model)
    return mask, None if bare else find_skull(head, distance, working, model)


def _of_volume(mask: Volume, method: StripMethod) -> Iterator[Note]:
    """A doubt about a mask's volume; raises ``DataError`` for one that holds no brain."""
    if mask.litres < LEAST_LITRES:
        raise DataError(
            f"no brain found: the mask holds {mask.litres:.3g} l, at least {LEAST_LITRES} l are"
            " needed",
            "check the input, or give --mask FILE",
        )
    if not PLAUSIBLE_LITRES[0] <= mask.litres <= PLAUSIBLE_LITRES[1]:
        text = (
            f"the brain mask ({method}) holds {mask.litres:.2f} l, outside"
            f" {PLAUSIBLE_LITRES[0]} to {PLAUSIBLE_LITRES[1]} l: look at it"
        )
        yield Note(NoteCode.MASK_VOLUME, text)


def _method(
    config: StripConfig, given: Volume | None, network: Network | None, *, stripped_already: bool
) -> tuple[StripMethod, list[Note]]:
    """The method that finds the brain, and doubts about the one that the user asked for."""
    if given:
        return StripMethod.MASK_FILE, []
    if config.method == "auto":
        log.info("the scan %s skull-stripped already", "is" if stripped_already else "is not")
        if stripped_already:
            return StripMethod.AS_IS, []
        return StripMethod.NET if network else StripMethod.TEMPLATE, []
    method = StripMethod(config.method)
    if (method is StripMethod.AS_IS) == stripped_already:
        return method, []
    text = (
        "the scan looks skull-stripped already: --skull-strip none would keep its brain"
        if stripped_already
        else "the scan does not look skull-stripped, and --skull-strip none was asked for:"
        " labels will be unreliable outside the brain"
    )
    return method, [Note(NoteCode.STRIP_CHOICE, text)]


def _lifted(t1: Volume, brain: Volume | None) -> Volume:
    """Shift intensities to 0 and more; set them to 0 outside the ``brain`` of a stripped scan.

    The background may have any value: within the range of intensities in z-scored and MP2RAGE
    scans, far below in others.  It becomes 0 only if it lies a little below the range.
    """
    data = t1.data
    if data.min() < 0:
        low, high = np.percentile(data[brain.data] if brain else data, [DARKEST, 100 - DARKEST])
        background = border_value(data)
        near = 2 * low - high < background < low
        floor = min(float(background if near else low), 0.0)
        data = np.maximum(data, floor) - floor
    return Volume(np.where(brain.data, data, 0) if brain else data, t1.grid)


def _cubic(t1: Volume, working: Grid, box: tuple[slice, ...]) -> Volume:
    """``t1`` by splines in a box of the working grid, 0 elsewhere; clipped to the scan's range."""
    moved = resample_in(box, t1, working, order=3)
    return Volume(np.clip(moved.data, t1.data.min(), t1.data.max()), working)


def strip_template(templates: Sequence[Template]) -> Template:
    """The first template with a whole head, which can strip; without one, the first template."""
    return next((t for t in templates if t.head is not None), templates[0])


def on_scan(stripped: Stripped, scan: Scan) -> Volume:
    """The brain mask on the scan's own grid; a mask given on that grid stays as it is."""
    return stripped.own or resample_mask(stripped.mask, scan.t1.grid)


def intracranial_on_scan(stripped: Stripped, scan: Scan) -> Volume | None:
    """What the inner skull holds (bool), on the scan's own grid; None where it is not known."""
    held = stripped.intracranial
    return None if held is None else resample_mask(held, scan.t1.grid)


def stripped_brain(t1: Volume) -> Volume | None:
    """Find the brain (bool) of a scan that is stripped already; None for a whole head.

    In a stripped scan one constant value surrounds an object of a brain's size that keeps away from
    the faces of the field of view.  A large object may be a head in air that was set to 0, and so
    may one that is seen only without what is almost air: a head has bone below its surface.
    """
    plain = foreground(t1)
    if plain.data.mean() < MOST_FILLED and _is_like_a_brain(plain):
        found, doubtful = plain, plain.litres >= LARGE_LITRES
    elif (bright := _without_ringing(t1, plain)) and _is_like_a_brain(bright):
        found, doubtful = bright, True
    else:
        return None
    return None if doubtful and _has_skull(t1, found) else found


def _has_skull(t1: Volume, candidate: Volume) -> bool:
    """Whether an object (bool) is a head: on the way inwards from its surface it becomes darker.

    Medians of layers of 2 mm in its upper half are compared: cuts and faces are below.  A stripped
    T1-weighted brain becomes brighter, from fluid to white matter, or hardly darker.
    """
    grid = candidate.grid.working(SPACING_MM, tolerance=0.0)
    object_ = resample_mask(candidate, grid)
    box = bounding_box(object_.data)
    whole = np.pad(closing(object_.data[box], grid.spacing_mm, CLOSING_MM), 1)
    depth = ndimage.distance_transform_edt(whole, sampling=SPACING_MM)[(slice(1, -1),) * 3]
    upper = object_.data[box].sum(axis=(0, 1)).cumsum()
    depth[:, :, : int(np.searchsorted(upper, upper[-1] / 2))] = 0
    background = border_value(t1.data)
    bright = resample(t1, grid, fill=background).data[box] - background
    edges = np.arange(1, DEEPEST_MM, SPACING_MM)
    layers = [bright[(depth > a) & (depth <= b)] for a, b in pairwise(edges)]
    medians = [float(np.median(layer)) for layer in layers if len(layer)]
    reach = int(FALL_MM / SPACING_MM)
    kept = [
        min(medians[i : i + 1 + reach]) / medians[i] for i in range(len(medians)) if medians[i] > 0
    ]
    log.info("brightness falls to %.2f on %d mm inwards", min(kept, default=1.0), FALL_MM)
    return min(kept, default=1.0) < LEAST_KEPT


def _is_like_a_brain(candidate: Volume) -> bool:
    """Whether an object (bool) has a brain's size and touches hardly any face of the image.

    A brain touches one or two faces of a tight field of view, never most of them.
    """
    low, high = STRIPPED_LITRES
    touched = np.median([face.mean() for face in faces(candidate.data)])
    return bool(touched < MOST_TOUCHED and low < candidate.litres < high)


def _without_ringing(t1: Volume, plain: Volume) -> Volume | None:
    """What is clearly brighter or darker than the background (bool), in a scan that rings.

    Splines that moved a stripped scan ring around the brain and leave few equal values; a few
    centimetres away the ringing has faded.  Air is noisy everywhere.  ``plain`` is all that differs
    from the background: in a scan that rings it is mostly ringing, in a head in air of 0 it is not.
    """
    low, high = np.percentile(t1.data, [1, 99.5])
    away = abs(t1.data - border_value(t1.data)) / max(float(high - low), 1e-30)
    quiet = away < RINGING
    if not quiet.any() or np.median(away[quiet]) > STILL or quiet.mean() < 1 - MOST_FILLED:
        return None
    bright = Volume(~quiet, t1.grid)
    return bright if RINGS * bright.litres < plain.litres else None


def _has_tissues(t1: Volume, brain: Volume) -> None:
    """Raise ``DataError`` for an object of uniform brightness: a phantom, not a brain.

    In 26 stripped scans of two scanners the spread is 0.28 to 0.40 of the mean.
    """
    inside = t1.data[brain.data] - min(border_value(t1.data), 0.0)
    spread = float(inside.std() / abs(float(inside.mean()) or np.inf))
    if spread < LEAST_SPREAD:
        raise DataError(
            f"no brain found: the foreground is uniform (spread {spread:.2f} of its"
            f" mean, at least {LEAST_SPREAD} in a brain)",
            "is this a T1-weighted brain? --skull-strip net searches for one anyway",
        )


def foreground(t1: Volume) -> Volume:
    """Voxels (bool) that differ from the background at the image's faces: a stripped brain."""
    return Volume(t1.data != border_value(t1.data), t1.grid)


def _from_template(
    t1: Volume, template: Template | None, config: RegisterConfig, work_dir: Path
) -> tuple[Volume, tuple[Note, ...]]:
    """Register the template's whole head and carry its brain mask over; mask and notes."""
    from cadiff_cli.stages.register import register, warp

    if template is None or template.head is None or template.mask is None:
        name = template.name if template else "none"
        raise MissingInputError(
            f"the scan is a whole head, and template {name} has no skull to strip it by",
            "use --template auto or MNIColin27+..., with TEMPLATEFLOW_HOME a cache that holds"
            " MNIColin27 ('cadiff fetch MNIColin27' on a machine with internet), or give --mask"
            " FILE",
        )
    transform = register(
        t1, template.head, config.elsewhere, work_dir / template.label, template.name
    )
    inside = Volume(template.mask.data.astype(np.float32), template.mask.grid)
    mask = Volume(warp(inside, transform, t1.grid).data > 0.5, t1.grid)
    return mask, transform.notes
