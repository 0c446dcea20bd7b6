"""What a training step minimises: how times are drawn, what is corrupted, which losses count."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cadiff_cli.diffusion.process import expand
from cadiff_cli.errors import UsageError
from cadiff_cli.nets.segmenter import STRIDE, CADiffNet
from cadiff_cli.spatial.probabilities import fractions
from cadiff_cli.training.segmenter.losses import (
    Consistency,
    Losses,
    central,
    crop_coarse,
    dice_ce,
    dice_ce_of_classes,
    field_mse,
)
from cadiff_cli.training.segmenter.patches import Patch


@dataclass(frozen=True)
class Times:
    """How t_d and t_m are drawn, independently of each other (eq. 3).

    ``known_field`` and ``lost_field`` are the shares of t_d = 0 (inference with a registration) and
    t_d = 1 (inference without one); ``pure_noise`` is that of t_m = 1, where inference begins; the
    rest is uniform in [0, 1].  All zero is the paper's choice.
    """

    known_field: float = 0.85
    lost_field: float = 0.05
    pure_noise: float = 0.8

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(t_d, t_m), each (batch,), on the generator's device."""

        def mixed(zero: float, one: float) -> Tensor:
            kind, t = torch.rand(2, batch, generator=generator, device=generator.device)
            t = torch.where(kind < zero + one, 1.0, t)
            return torch.where(kind < zero, 0.0, t)

        return mixed(self.known_field, self.lost_field), mixed(0.0, self.pure_noise)


@dataclass(frozen=True)
class SegmenterObjective:
    """Eq. 8, and how its inputs are made.

    The 1 mm head sees a cube of ``fine`` voxels of the patch.  In a share ``focus`` of the steps it
    lies around a random voxel of a random structure, so that small structures are met as often as
    large ones; in the others anywhere.  Its loss leaves out ``rim`` voxels at each face: the head
    lacks their surroundings, which inference always has.  ``coarse_weight`` scales the label loss
    at 2 mm, which intermediate sampling steps rely on.  In a share ``recycle`` of the steps
    whose labels are not pure noise, the states are made from the network's own prediction at t = 1
    instead of the truth, as inference will make them (Fu et al., 2023).
    """

    times: Times = field(default_factory=Times)
    recycle: float = 0.3
    fine: int = 56
    focus: float = 0.6
    rim: int = 3
    coarse_weight: float = 0.5
    field_weight: float = 0.3
    consistency: Consistency | None = field(default_factory=lambda: Consistency(weight=0.1))

    def __post_init__(self) -> None:
        """Raise ``UsageError`` where nothing is left of the head's cube."""
        if self.rim < 0 or self.fine // STRIDE * STRIDE <= 2 * self.rim:
            raise UsageError(
                f"fine is {self.fine} and rim is {self.rim}",
                f"use {2 * self.rim + STRIDE} or more for fine, or a narrower rim",
            )

    def __call__(
        self, net: CADiffNet, patch: Patch, generator: torch.Generator, _progress: float = 1.0
    ) -> Losses:
        """Losses of one batch; ``generator`` lives on the patch's device and decides everything."""
        return self.losses(net, patch, self.times.draw(len(patch.classes), generator), generator)

    def losses(
        self,
        net: CADiffNet,
        patch: Patch,
        times: tuple[Tensor, Tensor],
        generator: torch.Generator,
    ) -> Losses:
        """Losses of one batch at ``times`` (t_d, t_m), each (B,)."""
        k, device = net.config.n_classes, generator.device

        def noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, device=device)

        target = fractions(patch.classes, k, STRIDE)
        field_0, label_0 = 2 * patch.field - 1, net.label_state(target)
        t_d, t_m = times
        recycled = torch.rand(1, generator=generator, device=device) < self.recycle
        if net.config.reads_labels and bool(recycled & (t_m < 1).any()):
            field_0, label_0 = self._recycle(net, patch, field_0, label_0, t_d, noise)
        d_t = net.process.corrupt(field_0, t_d, noise(field_0))
        m_t = net.process.corrupt(label_0, t_m, noise(label_0))

        coarse = net.trunk(patch.image, d_t, m_t, t_d, t_m)
        fine = min(self.fine, patch.image.shape[-1]) // STRIDE * STRIDE
        start = self._cube(patch.classes, fine, generator)
        logits = net.refine(
            central(patch.image, start, fine), crop_coarse(coarse, start, fine), t_d, t_m
        )
        inner, kept = tuple(n + self.rim for n in start), fine - 2 * self.rim
        classes = central(patch.classes[:, None], inner, kept)[:, 0]
        shift = 1 + int(
            torch.randint(8 * len(target) - 1, (1,), generator=generator, device=device)
        )
        nothing = torch.zeros((), device=device)
        return Losses(
            label=dice_ce_of_classes(central(logits, (self.rim,) * 3, kept), classes),
            coarse=self.coarse_weight * dice_ce(coarse.logits, target),
            field=self.field_weight * field_mse(coarse.field, patch.field)
            if self.field_weight
            else nothing,
            consistency=self.consistency(coarse, shift) if self.consistency else nothing,
        )

    def _cube(self, classes: Tensor, size: int, generator: torch.Generator) -> tuple[int, int, int]:
        """First voxel (even) of the cube of ``size`` voxels that the 1 mm head sees.

        ``classes`` is (B, N, N, N); all patches of a batch share the cube.
        """

        def below(n: int) -> int:
            return int(torch.randint(n, (1,), generator=generator, device=generator.device))

        room = classes.shape[-1] - size
        start = [below(room + 1) for _ in range(3)]
        focused = torch.rand(1, generator=generator, device=generator.device) < self.focus
        found = torch.bincount(classes.flatten())[1:].nonzero()[:, 0] + 1
        if bool(focused) and len(found):
            where = (classes == found[below(len(found))]).nonzero()
            centre = where[below(len(where))][1:].tolist()
            # The structure may lie anywhere in the middle half.
            start = [c - size // 4 - below(size // 2 + 1) for c in centre]
        x, y, z = (min(max(n, 0), room) // STRIDE * STRIDE for n in start)
        return x, y, z

    @torch.no_grad()
    def _recycle(
        self,
        net: CADiffNet,
        patch: Patch,
        field_0: Tensor,
        label_0: Tensor,
        t_d: Tensor,
        noise: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """What the network makes of pure noise: labels, and the field where it is not known."""
        lost = (t_d > 0).to(t_d.dtype)
        d_t = net.process.corrupt(field_0, lost, noise(field_0))
        m_t = net.process.start(noise(label_0))
        first = net.trunk(patch.image, d_t, m_t, lost, torch.ones_like(t_d))
        field_1 = torch.where(expand(lost, field_0) > 0, first.field, field_0)
        return field_1, net.label_state(first.logits.softmax(dim=1))
