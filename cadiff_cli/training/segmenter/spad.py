r"""SPAD: first form, then borders, by what a training lets the network see of its image.

After Song et al., "Structure and Progress Aware Diffusion for Medical Image Segmentation" (arXiv
2603.07889).  Names and ideas are the paper's; laws and numbers are our reading of its abstract and
captions (``docs/method.md``).  Labels are denoised as ever; what is perturbed is the image that
conditions them, and only in training.

An image is (N, N, N) in [0, 1] with voxels of 1 mm, ``classes`` (N, N, N) are its labels, and an
intensity in [0, 1] says how strongly it is perturbed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor

from cadiff_cli.errors import UsageError
from cadiff_cli.nets.segmenter import CADiffNet
from cadiff_cli.training.segmenter.losses import Losses
from cadiff_cli.training.segmenter.objective import SegmenterObjective
from cadiff_cli.training.segmenter.patches import Patch

GREY = 0.5
"""Mean of the noise that replaces a target: the middle of an image's range."""
MAX_RADIUS_MM = 6.0
"""Of the band around borders: all voxels of a brain are as near to one."""
OWN_SEED = 2_500_003
"""From the seed of a step to that of its perturbation, which is of no other step or patch."""


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} is {value}", f"give a number from {low:g} to {high:g}")


@dataclass(frozen=True)
class Progress:
    r"""Progress-aware scheduler (PaS): the intensity falls with progress.

    ``of`` is what makes the progress: the "training", from its first step (0) to its last (1), or
    the diffusion "time" of the labels, from pure noise (t = 1, progress 0) to clean ones.

    .. math:: a = \max(0, 1 - progress / until)^{power}
    """

    of: str = "training"
    until: float = 0.8
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.of not in ("training", "time"):
            raise UsageError(f"progress is of {self.of!r}", "give training or time")
        _check("until", self.until, 0.01, 1)
        _check("power", self.power, 0.1, 10)

    def at(self, training: float, t_m: Tensor) -> Tensor:
        """Progress of each member of a batch, (B,), from the training's and their times."""
        return 1 - t_m if self.of == "time" else torch.full_like(t_m, training)

    def intensity(self, progress: Tensor) -> Tensor:
        """``a`` at ``progress`` in [0, 1], of any shape."""
        return (1 - progress / self.until).clamp(min=0) ** self.power


@dataclass(frozen=True)
class TargetNoise:
    r"""Semantic-concentrated diffusion (ScD): targets lost in noise, but for anchors.

    Each structure of a patch is a target with probability ``share``, left and right by themselves.
    Cubes of ``block_mm``, on a grid at a random place, are anchors with a probability that rises
    from ``anchors`` at intensity 1 to 1 at intensity 0.  Voxels of targets outside anchors become

    .. math:: (1 - w) I + w (0.5 + sd \epsilon), \quad w = weight \cdot a

    at intensity a, with standard normal noise; all others stay as they are, to the bit.
    """

    share: float = 0.3
    anchors: float = 0.3
    block_mm: int = 4
    weight: float = 1.0
    sd: float = 0.25

    def __post_init__(self) -> None:
        for name in ("share", "anchors", "weight", "sd"):
            _check(name, getattr(self, name), 0, 1)
        _check("block_mm", self.block_mm, 1, 32)

    def __call__(
        self, image: Tensor, classes: Tensor, intensity: float, generator: torch.Generator
    ) -> Tensor:
        """The perturbed image; ``generator`` lives on its device and decides everything."""
        lost = chosen(classes, self.share, generator)[classes] & ~self.kept(
            image, intensity, generator
        )
        w = self.weight * intensity
        noise = GREY + self.sd * _noise(image, generator)
        return torch.where(lost, torch.lerp(image, noise, w), image)

    def kept(self, image: Tensor, intensity: float, generator: torch.Generator) -> Tensor:
        """Where anchors are, like ``image``."""
        edge, device = self.block_mm, generator.device
        share = 1 - (1 - self.anchors) * intensity
        blocks = [n // edge + 2 for n in image.shape]
        anchors = torch.rand(blocks, generator=generator, device=device) < share
        start = torch.randint(edge, (3,), generator=generator, device=device).tolist()
        for axis, (first, n) in enumerate(zip(start, image.shape, strict=True)):
            anchors = anchors.repeat_interleave(edge, dim=axis).narrow(axis, first, n)
        return anchors


@dataclass(frozen=True)
class BorderNoise:
    r"""Boundary-centralized diffusion (BcD): noise in a band around borders.

    Each structure of a patch has its border blurred with probability ``share``.  Voxels within r mm
    of a change of label there (``near_change``) become

    .. math:: I + s \epsilon, \quad s = sd \cdot a, \quad r = 1 + (radius - 1) a

    at intensity a: the last band holds the voxels on both sides of the border.
    """

    share: float = 1.0
    radius_mm: float = 3.0
    sd: float = 0.25

    def __post_init__(self) -> None:
        for name in ("share", "sd"):
            _check(name, getattr(self, name), 0, 1)
        _check("radius_mm", self.radius_mm, 1, MAX_RADIUS_MM)

    def __call__(
        self, image: Tensor, classes: Tensor, intensity: float, generator: torch.Generator
    ) -> Tensor:
        """The perturbed image; ``generator`` lives on its device and decides everything."""
        drawn = torch.where(chosen(classes, self.share, generator)[classes], classes, 0)
        radius = 1 + (self.radius_mm - 1) * intensity
        noise = self.sd * intensity * _noise(image, generator)
        return torch.where(near_change(drawn, radius), image + noise, image)


@dataclass(frozen=True)
class Spad:
    """What of an image is perturbed, and how strongly at which progress.

    ``targets`` or ``borders`` may be None; where both are there, borders are blurred last.
    """

    targets: TargetNoise | None = field(default_factory=TargetNoise)
    borders: BorderNoise | None = field(default_factory=BorderNoise)
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        if not (self.targets or self.borders):
            raise UsageError("spad has neither targets nor borders", "leave out [train.spad]")

    def __call__(
        self, image: Tensor, classes: Tensor, progress: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The progress-aware noise condition: ``image`` (B, 1, N, N, N) at ``progress`` (B,)."""
        shown = []
        intensities = self.progress.intensity(progress).tolist()
        for member, labels, intensity in zip(image[:, 0], classes, intensities, strict=True):
            for part in (self.targets, self.borders):
                if part and intensity > 0:
                    member = part(member, labels, intensity, generator)
            shown.append(member[None])
        return torch.stack(shown)


@dataclass(frozen=True)
class Perturbed:
    """An objective whose network is shown perturbed images; the rest of a step stays as it is.

    Times, noise and cubes are those of ``objective`` alone: the perturbation has a generator of its
    own, whose seed follows that of the step.
    """

    objective: SegmenterObjective
    spad: Spad

    def __call__(
        self, net: CADiffNet, patch: Patch, generator: torch.Generator, progress: float
    ) -> Losses:
        """Losses of one batch at the training's ``progress`` in [0, 1]."""
        times = self.objective.times.draw(len(patch.classes), generator)
        own = torch.Generator(generator.device)
        own.manual_seed(generator.initial_seed() + OWN_SEED)
        image = self.spad(
            patch.image, patch.classes, self.spad.progress.at(progress, times[1]), own
        )
        return self.objective.losses(net, replace(patch, image=image), times, generator)


def chosen(classes: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """(classes.max() + 1,) bool: structures drawn with probability ``share``, never background."""
    count = int(classes.max()) + 1
    drawn = torch.rand(count, generator=generator, device=generator.device) < share
    drawn[0] = False
    return drawn


def near_change(classes: Tensor, radius: float) -> Tensor:
    """Voxels with one of another class within ``radius`` voxels, from centre to centre: bool."""
    classes = classes.to(torch.int16)  # a quarter of the memory to read
    near = torch.zeros_like(classes, dtype=torch.bool)
    for offset in _offsets(radius):
        here = tuple(
            slice(max(0, -o), n - max(0, o)) for o, n in zip(offset, near.shape, strict=True)
        )
        there = tuple(
            slice(max(0, o), n - max(0, -o)) for o, n in zip(offset, near.shape, strict=True)
        )
        differs = classes[here] != classes[there]
        near[here] |= differs
        near[there] |= differs
    return near


def _offsets(radius: float) -> Iterator[tuple[int, int, int]]:
    """One of each two opposite steps of at most ``radius`` voxels."""
    reach = range(-int(radius), int(radius) + 1)
    for x, y, z in product(reach, reach, reach):
        if (x, y, z) > (0, 0, 0) and x * x + y * y + z * z <= radius * radius:
            yield x, y, z


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=generator.device)
