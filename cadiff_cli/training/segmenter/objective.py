"""What a training step minimises: how times are drawn, what is corrupted, which losses count.

``METHODS`` names the variants of the paper's ablation (Tables II to IV) and the plain U-Net; each
is a network configuration and an ``Objective``, and the loop does not know which one it runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cadiff_cli.diffusion.process import expand
from cadiff_cli.nets.unet import FIELD_STD, STRIDE, CADiffNet, NetConfig
from cadiff_cli.training.segmenter.losses import (
    SIMILARITIES,
    Consistency,
    Losses,
    central,
    crop_coarse,
    dice_ce,
    field_mse,
    fractions,
)
from cadiff_cli.training.segmenter.patches import AugmentConfig, Patch
from cadiff_cli.training.segmenter.synthesis import SynthesisConfig


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
class Objective:
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

    def __call__(self, net: CADiffNet, patch: Patch, generator: torch.Generator) -> Losses:
        """Losses of one batch; ``generator`` lives on the patch's device and decides everything."""
        k, device = net.config.n_classes, generator.device

        def noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, device=device)

        target = fractions(patch.classes, k, STRIDE)
        field_0, label_0 = 2 * patch.field - 1, 2 * target - 1
        t_d, t_m = self.times.draw(len(target), generator)
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
            label=dice_ce(central(logits, (self.rim,) * 3, kept), fractions(classes, k)),
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
        return field_1, 2 * first.logits.softmax(dim=1) - 1


@dataclass(frozen=True)
class Method:
    """One row of an ablation table: what the network is, and what it is trained on."""

    net: NetConfig = field(default_factory=NetConfig)
    objective: Objective = field(default_factory=Objective)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    prior_scans: int | None = None


def _methods() -> dict[str, Method]:
    plain = NetConfig(attention=False)
    blind = Objective(field_weight=0.0, consistency=None)
    joint = Objective(consistency=None)
    known = replace(blind, times=Times(known_field=1.0, lost_field=0.0))
    similar, dice = (replace(joint, consistency=Consistency(name, 0.1)) for name in SIMILARITIES)
    mild = AugmentConfig(
        deform=0.35,
        thick_slices=0.06,
        bad_mask=0.1,
        intensity=0.6,
        synthesis=SynthesisConfig(contrast=0.1),
    )
    any_contrast = AugmentConfig(synthesis=SynthesisConfig(share=1.0, random=0.4, contrast=0.1))
    printed = Objective(
        Times(0.0, 0.0, 0.0),
        recycle=0.0,
        focus=0.0,
        field_weight=FIELD_STD**2 / 4,
        consistency=Consistency(),
    )
    return {
        "cadiff": Method(),
        "finish": Method(augment=mild),
        "synth": Method(augment=any_contrast),
        "unet": Method(replace(plain, reads_field=False, reads_labels=False), blind),
        "diffusion": Method(replace(plain, reads_field=False), blind),
        "dual": Method(plain, known, prior_scans=0),
        "label": Method(replace(plain, reads_coordinates=False), known, prior_scans=1),
        "collaborative": Method(plain, joint, prior_scans=0),
        "consistency": Method(plain, similar, prior_scans=0),
        "consistency-dice": Method(plain, dice, prior_scans=0),
        "taca": Method(objective=similar, prior_scans=0),
        "paper": Method(objective=printed, prior_scans=0),
    }


METHODS = _methods()
"""``cadiff`` is what ships, and ``finish`` its last part, with milder augmentation; ``synth`` is
``cadiff`` with a new contrast in every patch, for painted scans.

The others take it apart, and none but ``label`` has a label prior: ``unet`` denoises nothing;
``diffusion`` has no field; ``dual`` has a field that is always known; ``label`` has one person's
labels, carried over through the template, in its place (Table V); ``collaborative`` diffuses the
field too; ``consistency`` adds eqs. 5-8 (Dice instead of cosine in ``consistency-dice``), and
``taca`` the attention.  ``paper`` is ``taca`` with both times uniform, nothing recycled, cubes that
lie anywhere, and field and consistency weighed as in eqs. 4 and 8; the 2 mm label loss stays."""
