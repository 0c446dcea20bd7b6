"""New contrasts for labelled brains: every structure gets intensities of its own.

A scan keeps its anatomy, texture and partial volumes; what changes is how bright each structure is.
With ``contrast`` small the result still looks T1-weighted; at random means it may look like any
sequence (Billot et al., 2023, train on such images alone).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.training.transforms import uniform


@dataclass(frozen=True)
class SynthesisConfig:
    """How often and how far images are recoloured structure by structure.

    ``share`` of the patches are synthetic; of these ``random`` have means drawn from all of [0, 1],
    ``curve`` the scan's own means changed by a random curve, the others the scan's own.  Means that
    are not random are also moved by ``contrast`` (standard deviation, of the image's range).
    ``texture`` is the most that a structure's own variation is scaled by, ``noise`` the largest
    standard deviation of what is added.
    """

    share: float = 0.1
    random: float = 0.3
    curve: float = 0.0
    contrast: float = 0.06
    texture: float = 1.5
    noise: float = 0.04


def resynthesise(
    image: Tensor,
    mask: Tensor,
    classes: Tensor,
    mirror: Tensor,
    config: SynthesisConfig,
    generator: torch.Generator,
) -> Tensor:
    """``image`` (X, Y, Z) in [0, 1] with new mean and texture per structure, 0 outside ``mask``.

    ``classes`` (X, Y, Z) int64; ``mirror`` (n_classes,) pairs left with right, which share their
    intensities.  Unlabelled tissue inside the brain is a structure like the others.
    """
    n = len(mirror)
    pair = torch.minimum(torch.arange(n), mirror)[classes]
    flat, values = pair[mask], image[mask]
    count = torch.bincount(flat, minlength=n).clamp(min=1)
    mean = torch.bincount(flat, weights=values.double(), minlength=n).float() / count
    change = config.contrast * torch.randn(n, generator=generator)
    anywhere = torch.rand(n, generator=generator)
    kind = uniform(generator)
    if kind < config.random:
        moved = anywhere
    elif kind < config.random + config.curve:
        moved = _curved(mean, torch.unique(flat), generator) + change
    else:
        moved = mean + change
    scale = torch.rand(n, generator=generator) * (config.texture - 0.5) + 0.5
    # Borders between structures stay as smooth as the scan's: the change is blurred, not the scan.
    shift = torch.zeros_like(image)
    shift[mask] = (moved - mean)[flat] + (scale - 1)[flat] * (values - mean[flat])
    shift = F.avg_pool3d(F.pad(shift[None, None], (1,) * 6, mode="replicate"), 3, 1)[0, 0]
    level = config.noise * torch.rand(1, generator=generator)
    noise = level * torch.randn(image.shape, generator=generator)
    return (image + shift + noise).clamp(0, 1) * mask


def _curved(mean: Tensor, present: Tensor, generator: torch.Generator) -> Tensor:
    """Means (n,) changed by a random curve of four knots from the darkest to the brightest.

    Structures of one tissue stay alike, as in every sequence: a curve that falls looks
    T2-weighted, one that rises and falls like FLAIR.
    """
    knots = torch.rand(4, generator=generator)
    darkest, brightest = mean[present].aminmax()
    place = 3 * ((mean - darkest) / (brightest - darkest).clamp(min=1e-6)).clamp(0, 1)
    below = place.floor().clamp(max=2).long()
    return torch.lerp(knots[below], knots[below + 1], place - below)
