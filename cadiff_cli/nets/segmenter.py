"""The collaborative diffusion U-Net (paper, Fig. 2): image and noisy states -> clean states.

Field and labels are diffused at half resolution (``Trunk``); labels become 1 mm logits in a light
full-resolution ``head``, which only the last sampling step needs.

States: the field is stored in [0, 1] and diffused as ``2 D - 1``; labels are diffused as
``label_scale (2 P - 1)``, where P holds the fraction of each class in a 2 mm voxel.
"""

import logging
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.diffusion.process import DEFAULT, PROCESSES
from cadiff_cli.errors import DataError, UsageError
from cadiff_cli.nets.blocks import (
    ChannelNorm,
    Concatenate,
    Conv3d,
    ResidualBlock,
    TimeAdaptedChannelAttention,
    TimeEmbedding,
    at_blocks,
    check_process,
    last,
    plus,
    shuffle,
    silu,
    unshuffle,
    upsampled,
)

log = logging.getLogger(__name__)

STRIDE = 2
HEAD = "head"
"""The beginning of the names of the head's settings and weights."""
FIELD_STD = 0.35
"""Spread of the field's state over a brain: what is known of it before anything is seen."""


@dataclass(frozen=True)
class NetConfig:
    """Sizes of the network.  ``prior_shape`` is the label prior's grid over the field (x, y, z).

    The head works at ``head_stride`` mm: 1, or 2, where each voxel gives its eight parts logits of
    their own (sub-pixel convolution, Shi et al., 2016), with a third of the arithmetic.

    Switches take the method apart.  Without ``reads_field`` the network never sees the field (plain
    diffusion); without ``reads_coordinates`` it sees only the label prior there (a label-like
    condition); without ``reads_labels`` nothing is denoised (with neither: a plain U-Net).  Without
    ``attention`` skip connections are concatenated as they are, not weighted by TACA.

    ``process`` names the noise process (``diffusion.process.PROCESSES``) of the states.
    ``label_scale`` is the size of a clean label state beside noise of 1: the smaller it is, the
    less a noisy state tells of the labels at the same time (Chen et al., 2023, scale bits so).
    """

    n_classes: int = 41
    channels: tuple[int, ...] = (32, 64, 128, 192)
    head_channels: int = 32
    head_blocks: int = 2
    head_stride: int = 1
    time_channels: int = 128
    embed_channels: int = 24
    prior_shape: tuple[int, int, int] = (42, 52, 46)
    taca_sizes: tuple[int, ...] = (7, 11, 15)
    reads_field: bool = True
    reads_coordinates: bool = True
    reads_labels: bool = True
    attention: bool = True
    process: str = DEFAULT
    label_scale: float = 1.0

    def __post_init__(self) -> None:
        """Raise ``DataError`` for a noise process, a head or a scale that cannot be."""
        check_process(self.process)
        if self.head_stride not in (1, STRIDE):
            raise DataError(
                f"the network's head_stride is {self.head_stride}, not 1 or {STRIDE}",
                "use one of these; for weights, use the version of cadiff that wrote them",
            )
        if any(size % 2 == 0 or size < 1 for size in self.taca_sizes):
            raise DataError(
                f"the network's taca_sizes are {self.taca_sizes}",
                "give odd sizes: a middle is needed",
            )
        if not 0 < self.label_scale <= 1:
            raise DataError(
                f"the network's label_scale is {self.label_scale}", "give one above 0, at most 1"
            )

    @property
    def trunk(self) -> dict[str, Any]:
        """The settings that decide the trunk's weights: all but the head's and the states' scale.

        Networks with equal ones can begin with each other's weights.
        """
        settings = asdict(self).items()
        free = (HEAD, "label_scale")
        return {name: value for name, value in settings if not name.startswith(free)}

    @property
    def head(self) -> dict[str, Any]:
        """The settings of the head: equal for networks whose heads are alike."""
        return {name: value for name, value in asdict(self).items() if name.startswith(HEAD)}


@dataclass(frozen=True, eq=False)
class Coarse:
    """The trunk's answer at 2 mm.

    ``features`` (B, C, x, y, z); ``field`` (B, 3, x, y, z), the estimate of D_0 in [-1, 1];
    ``logits`` (B, classes, x, y, z).
    """

    features: Tensor
    field: Tensor
    logits: Tensor


@dataclass(frozen=True, eq=False)
class Prior:
    """The label prior at a field, (B, ..., x, y, z): ``logits``, and ``embedded`` features."""

    logits: Tensor
    embedded: Tensor


class LabelPrior(nn.Module):
    """How likely each class is at each position of the field: a grid of log-probabilities.

    Counted over the training people (``training/segmenter/prior``) and then fixed: the paper's
    idea, that a position in the field predicts an anatomy, written down as the network's starting
    point.
    """

    def __init__(self, n_classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.zeros(1, n_classes, *shape))
        self.logits: Tensor

    def forward(self, state: Tensor) -> Tensor:
        """Field state (B, 3, x, y, z) in [-1, 1] -> logits (B, classes, x, y, z)."""
        points = state.float().permute(0, 2, 3, 4, 1).flip(-1)
        grid = self.logits.float().expand(state.shape[0], -1, -1, -1, -1)
        return F.grid_sample(grid, points, padding_mode="border", align_corners=True)


class CADiffNet(nn.Module):
    """phi_theta of eq. 3: (D_td, M_tm, I, t_d, t_m) -> (D_0, M_0)."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config, self.process = config, PROCESSES[config.process]
        c, e, k = config.channels, config.time_channels, config.n_classes
        self.time_field, self.time_label = TimeEmbedding(e), TimeEmbedding(e)
        self.prior = LabelPrior(k, config.prior_shape)
        self.embed_prior = Conv3d(k, config.embed_channels, 1)
        self.embed_label = Conv3d(k, config.embed_channels, 1)
        self.stem = Conv3d(STRIDE**3 + 3 + 2 * config.embed_channels, c[0], 3, padding=1)
        self.encoder = nn.ModuleList(
            nn.ModuleList([ResidualBlock(n, n, e), ResidualBlock(n, n, e)]) for n in c
        )
        self.down = nn.ModuleList(Conv3d(a, b, 2, stride=2) for a, b in pairwise(c))
        self.up = nn.ModuleList(Conv3d(b, a, 1) for a, b in pairwise(c))
        self.taca = nn.ModuleList(
            TimeAdaptedChannelAttention(e, config.taca_sizes) if config.attention else Concatenate()
            for _ in c[:-1]
        )
        self.decoder = nn.ModuleList(ResidualBlock(2 * n, n, e) for n in c[:-1])
        self.out_norm = ChannelNorm(c[0])
        self.to_field = Conv3d(c[0], 3, 3, padding=1)
        self.to_label = Conv3d(c[0], k, 1)
        h = config.head_channels
        parts = config.head_stride**3
        self.head_image = Conv3d(parts, h, 3, padding=1)
        self.head_features = Conv3d(c[0], h, 1)
        self.head = nn.ModuleList(ResidualBlock(h, h, e) for _ in range(config.head_blocks))
        self.head_norm = ChannelNorm(h)
        self.head_label = Conv3d(h, k * parts, 1)
        for layer in (self.to_field, self.to_label, self.head_label):
            nn.init.zeros_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The weights that ``refine`` alone uses, by name."""
        return {name: p for name, p in self.named_parameters() if name.startswith(HEAD)}

    def begin_with(self, other: "CADiffNet") -> None:
        """Copy the weights of ``other``; a head of another size begins anew.

        Raises ``UsageError`` if the trunks differ.
        """
        if other.config.trunk != self.config.trunk:
            raise UsageError(
                "the weights to begin with are of another network",
                "use a config of their network; only its head and label_scale may differ",
            )
        weights = other.state_dict()
        same = other.config.head == self.config.head
        if not same:
            log.warning("the head of the weights is of another size: a new head begins")
            weights = {name: w for name, w in weights.items() if not name.startswith(HEAD)}
        self.load_state_dict(weights, strict=same)

    def label_state(self, p: Tensor) -> Tensor:
        """The clean state of class fractions or probabilities ``p``, of any shape."""
        return (2 * self.config.label_scale * p).sub_(self.config.label_scale)

    def look_up(self, d_t: Tensor, t_d: Tensor) -> Prior:
        """The label prior at what a field's state (B, 3, x, y, z) at ``t_d`` (B,) tells alone."""
        if not self.config.reads_field:
            d_t, t_d = torch.zeros_like(d_t), torch.ones_like(t_d)
        guess, _ = self.process.guess(d_t, t_d, FIELD_STD)
        logits = last(self.prior(guess))
        return Prior(logits, self.embed_prior(logits.softmax(dim=1)))

    def trunk(
        self,
        image: Tensor,
        d_t: Tensor,
        m_t: Tensor,
        t_d: Tensor,
        t_m: Tensor,
        known: Prior | None = None,
    ) -> Coarse:
        """Estimate both clean states at 2 mm.

        ``image`` (B, 1, 2x, 2y, 2z) in [0, 1]; ``d_t`` (B, 3, x, y, z) and ``m_t``
        (B, classes, x, y, z) are noisy states at times ``t_d`` and ``t_m`` (B,).  ``known`` is
        ``look_up(d_t, t_d)``, for a field that is asked about several times.
        """
        if not self.config.reads_field:
            d_t, t_d = torch.zeros_like(d_t), torch.ones_like(t_d)
        if not self.config.reads_labels:
            m_t, t_m = torch.zeros_like(m_t), torch.ones_like(t_m)
        e_d, e_m = self.time_field(t_d), self.time_label(t_m)
        guess, deviation = self.process.guess(d_t, t_d, FIELD_STD)
        prior = known or self.look_up(d_t, t_d)  # it must not see more than the noisy field tells
        coordinates = d_t if self.config.reads_coordinates else torch.zeros_like(d_t)
        label = self.embed_label(last(m_t))
        seen = [2 * unshuffle(image) - 1, coordinates, label, prior.embedded]
        x = self._unet(torch.cat([last(part.to(label.dtype)) for part in seen], dim=1), e_d, e_m)
        field = guess + deviation * self.to_field(x).float()
        logits = prior.logits
        if self.config.reads_field and (t_d > 0).any():
            logits = last(self.prior(field.detach()))
        return Coarse(x, field, plus(self.to_label(x).float(), logits))

    def _unet(self, x: Tensor, e_d: Tensor, e_m: Tensor) -> Tensor:
        """Features (B, C, x, y, z) of what the trunk is shown, and of the embedded times."""
        x = self.stem(last(x))
        skips = []
        for level, blocks in enumerate(self.encoder):
            if level:
                x = self.down[level - 1](x)
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, e_d, e_m)
            skips.append(x)
        for level in reversed(range(len(self.decoder))):
            x = F.interpolate(self.up[level](x), scale_factor=2, mode="nearest")
            x = self.taca[level](skips[level], x, e_d, e_m)
            x = self.decoder[level](x, e_d, e_m)
        return silu(self.out_norm(x))

    def refine(self, image: Tensor, coarse: Coarse, t_d: Tensor, t_m: Tensor) -> Tensor:
        """1 mm logits (B, classes, 2x, 2y, 2z) from the trunk's answer and the image."""
        out = self.head_label(self.fine_features(image, coarse, t_d, t_m))
        up = F.interpolate(last(coarse.logits).to(out.dtype), scale_factor=STRIDE, mode="trilinear")
        fine: Tensor = up + (shuffle(out) if self.config.head_stride == STRIDE else out)
        return fine

    def fine_features(self, image: Tensor, coarse: Coarse, t_d: Tensor, t_m: Tensor) -> Tensor:
        """Features (B, C, ...) that the head's last layer reads, on the head's grid."""
        if not self.config.reads_field:
            t_d = torch.ones_like(t_d)
        if not self.config.reads_labels:
            t_m = torch.ones_like(t_m)
        e_d, e_m = self.time_field(t_d), self.time_label(t_m)
        x, features = last(2 * image - 1), self.head_features(coarse.features)
        if self.config.head_stride == STRIDE:
            x = plus(features, self.head_image(last(unshuffle(x))))
        else:
            up = F.interpolate(features, scale_factor=STRIDE, mode="trilinear")
            x = plus(up, self.head_image(x))
        for block in self.head:
            x = block(x, e_d, e_m)
        return silu(self.head_norm(x))

    def refine_blocks(self, features: Tensor, logits: Tensor, blocks: Tensor) -> Tensor:
        """1 mm logits (n, 8, classes) of some 2 mm voxels: what ``refine`` says of one brain there.

        ``features`` are its ``fine_features``, ``logits`` the coarse ones, ``blocks`` (n, 3) the
        voxels' indices.  A brain fills a third of its box: two thirds of the work are not done.
        """
        rows = features[0].permute(1, 2, 3, 0)
        if self.config.head_stride == STRIDE:
            rows = rows[blocks.unbind(1)]
        else:
            rows = at_blocks(rows, blocks)
        layer = self.head_label
        out = F.linear(rows, layer.weight.flatten(1), layer.bias)
        up = upsampled(logits[0].permute(1, 2, 3, 0).to(out.dtype), blocks)
        return plus(up, out.reshape(up.shape))

    def forward(
        self, image: Tensor, d_t: Tensor, m_t: Tensor, t_d: Tensor, t_m: Tensor
    ) -> tuple[Coarse, Tensor]:
        """Both resolutions: (``Coarse``, 1 mm logits)."""
        coarse = self.trunk(image, d_t, m_t, t_d, t_m)
        return coarse, self.refine(image, coarse, t_d, t_m)
