"""Settings for training the brain-mask network."""

from dataclasses import dataclass, field
from typing import ClassVar

from cadiff_cli.nets.brain_mask import BrainConfig
from cadiff_cli.training.loop import Schedule


@dataclass(frozen=True)
class HeadConfig(Schedule):
    """How to train the brain-mask network, and how to augment heads.

    ``patch`` is in voxels a side at 2 mm: a head with its neck; ``cube`` is the side of its part in
    which the border is learnt.  ``off_centre_mm`` is how far a patch's centre may lie from the
    brain's.  ``tilted`` is the share of heads with rotations of up to ``rotation_deg``; the others
    are tilted up to a quarter of that.  ``cut`` and ``deface`` are the shares of heads whose field
    of view ends within the head, and whose face is removed; ``shrunken`` that of brains with up to
    ``shrink_mm`` of CSF between brain and skull.  In the first ``coarse_steps`` only the network
    that locates the brain learns, from heads at 4 mm: such steps take a third of the time.  Without
    a number they are 700 for a new network, none for one that begins with weights.

    More shares: ``turned`` heads lie along other axes, as under a wrong header; ``small`` ones have
    a child's size, down to ``smallest`` of their own; ``bright_scalp`` ones have the contrast of a
    clinical spin echo, ``strong_bias`` ones that of a surface coil; ``stripped`` ones are brains
    alone.  Of the others, some have air of 0 (``zeroed_air``), or air with noise as bright as brain
    (``noisy_air``, MP2RAGE).  ``t1`` is the share of label maps painted like a T1-weighted image,
    and ``t1_spread`` scales how much these differ.  ``intensity`` scales how often images have
    thick slices, weak bias, noise, blur and another brightness.

    The inner skull is learnt in cubes of label maps alone, of ``cube`` voxels a side at 1 mm, which
    are seen at 2 mm.  ``moved_skull`` is the share of those whose inner skull lies up to
    ``moved_mm`` farther in or out, another way in each region, ``cut`` that of those at an end of
    the field of view.  ``tilted``, ``scale``, ``elastic_mm``, ``shrunken``, ``zeroed_air``,
    ``strong_bias``, ``t1`` and ``intensity`` with their amounts are as above; no other key is used.
    """

    coarse_steps: int | None = None
    patch: int = 128
    cube: int = 80
    rotation_deg: float = 45.0
    tilted: float = 0.2
    turned: float = 0.12
    scale: float = 0.15
    small: float = 0.1
    smallest: float = 0.65
    elastic_mm: float = 3.0
    off_centre_mm: float = 30.0
    real: float = 0.6
    cut: float = 0.2
    deface: float = 0.2
    shrunken: float = 0.25
    shrink_mm: float = 7.0
    moved_skull: float = 0.0
    moved_mm: float = 3.0
    empty: float = 0.12
    slice_mm: float = 8.0
    bright_scalp: float = 0.2
    strong_bias: float = 0.2
    stripped: float = 0.12
    zeroed_air: float = 0.25
    noisy_air: float = 0.1
    t1: float = 0.0
    t1_spread: float = 1.0
    intensity: float = 1.0


@dataclass(frozen=True)
class Training:
    """A training of the brain mask as a file: its network and its run."""

    kind: ClassVar[str] = "brain-mask"
    command: ClassVar[str] = "cadiff train-mask"
    net: BrainConfig = field(default_factory=BrainConfig)
    train: HeadConfig = field(default_factory=HeadConfig)
