"""What a training step minimises: how times are drawn, what is corrupted, which losses count.

``METHODS`` names the variants of the paper's ablation (Tables II to IV) and the plain U-Net; each
is a network configuration and an ``Objective``, and the loop does not know which one it runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cadiff_cli.diffusion.process import corrupt, expand
from cadiff_cli.nets.unet import STRIDE, CADiffNet, NetConfig
from cadiff_cli.training.augment import AugmentConfig, Patch
from cadiff_cli.training.losses import (
    Consistency,
    Losses,
    central,
    crop_coarse,
    dice_ce,
    field_mse,
    fractions,
)
from cadiff_cli.training.synthesis import SynthesisConfig


@dataclass(frozen=True)
class Times:
    """How t_d and t_m are drawn, independently of each other (eq. 3).

    ``known_field`` and ``lost_field`` are the shares of t_d = 0 (inference with a registration) and
    t_d = 1 (inference without one); ``pure_noise`` is that of t_m = 1, where inference begins; the
    rest is uniform in [0, 1].  All zero is the paper's choice.
    """

    known_field: float = 0.7
    lost_field: float = 0.1
    pure_noise: float = 0.5

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

    The 1 mm label loss is taken in a random cube of ``fine`` voxels of the patch; ``coarse_weight``
    scales the label loss at 2 mm, which intermediate sampling steps rely on.  In a share
    ``recycle`` of the steps the states are made from the network's own prediction at t = 1 instead
    of the truth, as inference will make them (Fu et al., 2023).
    """

    times: Times = field(default_factory=Times)
    recycle: float = 0.5
    fine: int = 56
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
        d_t = corrupt(field_0, t_d, noise(field_0))
        m_t = corrupt(label_0, t_m, noise(label_0))

        coarse = net.trunk(patch.image, d_t, m_t, t_d, t_m)
        size = patch.image.shape[-1]
        fine = min(self.fine, size) // STRIDE * STRIDE
        room = (size - fine) // STRIDE + 1
        corner = torch.randint(room, (3,), generator=generator, device=device)
        start = tuple(STRIDE * int(n) for n in corner)
        logits = net.refine(
            central(patch.image, start, fine), crop_coarse(coarse, start, fine), t_d, t_m
        )
        classes = central(patch.classes[:, None], start, fine)[:, 0]
        shift = 1 + int(
            torch.randint(8 * len(target) - 1, (1,), generator=generator, device=device)
        )
        nothing = torch.zeros((), device=device)
        return Losses(
            label=dice_ce(logits, fractions(classes, k)),
            coarse=self.coarse_weight * dice_ce(coarse.logits, target),
            field=self.field_weight * field_mse(coarse.field, patch.field)
            if self.field_weight
            else nothing,
            consistency=self.consistency(coarse, shift) if self.consistency else nothing,
        )

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
        d_t = corrupt(field_0, lost, noise(field_0))
        first = net.trunk(patch.image, d_t, noise(label_0), lost, torch.ones_like(t_d))
        field_1 = torch.where(expand(lost, field_0) > 0, first.field, field_0)
        return field_1, 2 * first.logits.softmax(dim=1) - 1


@dataclass(frozen=True)
class Method:
    """One row of an ablation table: what the network is, and what it is trained on."""

    net: NetConfig = field(default_factory=NetConfig)
    objective: Objective = field(default_factory=Objective)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    prior_scans: int = 0


def _methods() -> dict[str, Method]:
    plain = NetConfig(attention=False)
    blind = Objective(field_weight=0.0, consistency=None)
    joint = Objective(consistency=None)
    known = replace(blind, times=Times(known_field=1.0, lost_field=0.0))
    mild = AugmentConfig(
        deform=0.35,
        thick_slices=0.06,
        bad_mask=0.1,
        intensity=0.6,
        synthesis=SynthesisConfig(contrast=0.1),
    )
    return {
        "cadiff": Method(),
        "finish": Method(objective=Objective(Times(0.85, 0.05, 0.7), recycle=0.3), augment=mild),
        "unet": Method(replace(plain, reads_field=False, reads_labels=False), blind),
        "diffusion": Method(replace(plain, reads_field=False), blind),
        "dual": Method(plain, known),
        "label": Method(replace(plain, reads_coordinates=False), known, prior_scans=1),
        "collaborative": Method(plain, joint),
        "consistency": Method(plain, replace(joint, consistency=Consistency())),
        "consistency-dice": Method(plain, replace(joint, consistency=Consistency("dice"))),
        "paper": Method(
            objective=Objective(Times(0.0, 0.0, 0.0), recycle=0.0, consistency=Consistency())
        ),
    }


METHODS = _methods()
"""``cadiff`` is what ships, and ``finish`` its last part, nearer to what inference meets: the field
mostly known, labels mostly from pure noise, milder augmentation.  ``unet`` denoises nothing;
``diffusion`` has no field; ``dual`` has a field that is always known; ``label`` has one person's
labels, carried over through the template, in its place (Table V); ``collaborative`` diffuses the
field too; ``consistency`` adds eqs. 5-8 (Dice instead of cosine in ``consistency-dice``); all of
these without TACA.  ``paper`` draws both times uniformly, weighs eq. 8 as printed and recycles
nothing."""
