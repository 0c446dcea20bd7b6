"""Settings of a training of the segmenter."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from cadiff_cli.errors import UsageError
from cadiff_cli.labels.parcellation import BASE, load_parcellation
from cadiff_cli.nets.segmenter import NetConfig
from cadiff_cli.training.loop import Schedule
from cadiff_cli.training.segmenter.objective import SegmenterObjective
from cadiff_cli.training.segmenter.patches import AugmentConfig
from cadiff_cli.training.segmenter.spad import Perturbed, Spad
from cadiff_cli.training.settings import load_training, overridden


@dataclass(frozen=True)
class TrainConfig(Schedule):
    """How to train CA-Diff: the schedule, the objective and what patches go through.

    Patches have ``patch`` voxels a side; a share ``also_share`` of them is from scans whose labels
    are trusted less (a machine's, of other scanners), if there are any.  The label prior is counted
    over ``prior_scans`` of the others, drawn by the seed, or over all of them (None); over none, it
    says nothing.  With ``head_only`` the trunk stays as it is.  With ``spad`` the network is shown
    perturbed images.
    """

    patch: int = 96
    head_only: bool = False
    also_share: float = 0.3
    prior_scans: int | None = None
    objective: SegmenterObjective = field(default_factory=SegmenterObjective)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    spad: Spad | None = None

    @property
    def minimised(self) -> SegmenterObjective | Perturbed:
        """The objective of a step, with what it is shown."""
        return Perturbed(self.objective, self.spad) if self.spad else self.objective

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch < 64 or self.patch % 32:
            # Below 64 the deepest level is 2 voxels wide, where torch's bfloat16 gradients fail.
            raise UsageError(f"patch is {self.patch}", "use 64 or more, a multiple of 32")
        if self.prior_scans is not None and self.prior_scans < 0:
            raise UsageError(
                f"prior_scans is {self.prior_scans}", "use 0 or more, or leave it out for all"
            )


@dataclass(frozen=True)
class Training:
    """A training of the segmenter as a file: its network, its run and its data.

    ``templates`` are those whose fields are trained on (names, folders or stripped scans);
    ``parcellation`` is drawn: a shipped name, or a TSV file of one.  ``labels`` is a known scheme
    of ids for it, or a TSV file of one.
    """

    kind: ClassVar[str] = "segmenter"
    command: ClassVar[str] = "cadiff train"
    net: NetConfig = field(default_factory=NetConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    templates: tuple[str, ...] = ("MNIColin27", "MNI152NLin2009aSym")
    parcellation: str = BASE
    labels: str = "neuromorphometrics"


FOLLOWS = 0
"""``n_classes`` of a file that names none: that of the parcellation."""


def load(
    name: str,
    *,
    common: str | None = None,
    synthetic: float | None = None,
    templates: Sequence[str] = (),
    parcellation: str | None = None,
    labels: str | None = None,
    steps: int | None = None,
    decay: int | None = None,
    **settings: Any,
) -> Training:
    """A training by name or from a ``.toml`` file; what else is given overrides the file.

    ``common`` is a second file, whose keys override those of the first.
    ``synthetic`` is the share of patches with resampled contrast.  ``net.n_classes`` follows the
    parcellation; a file that names another number is a ``UsageError``.
    """
    file = load_training(name, Training(net=NetConfig(n_classes=FOLLOWS)))
    if common:
        file = load_training(common, file)
    training = overridden(file, steps=steps, decay=decay, **settings)
    if synthetic is not None:
        augment = training.train.augment
        augment = replace(augment, synthesis=replace(augment.synthesis, share=synthetic))
        training = replace(training, train=replace(training.train, augment=augment))
    drawn = load_parcellation(parcellation or training.parcellation)
    if training.net.n_classes not in (FOLLOWS, drawn.n_classes):
        raise UsageError(
            f"net.n_classes is {training.net.n_classes}, but {drawn.name} has {drawn.n_classes}"
            " classes with background",
            "leave n_classes out, or train another parcellation",
        )
    if not (templates or training.templates):
        raise UsageError("templates is empty", "name one, or leave it out")
    return replace(
        training,
        net=replace(training.net, n_classes=drawn.n_classes),
        parcellation=parcellation or training.parcellation,
        templates=tuple(templates) or training.templates,
        labels=labels or training.labels,
    )


def templates_of(name: str) -> tuple[str, ...]:
    """The templates that a file names; none if it does not."""
    return load_training(name, Training(templates=())).templates
