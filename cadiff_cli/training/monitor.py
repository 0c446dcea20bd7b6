"""Monitor a training: TensorBoard curves, Dice of held-out scans, and a picture of one."""

import csv
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from cadiff_cli.config import SampleConfig
from cadiff_cli.io.files import replacing
from cadiff_cli.labels.luts import rgb
from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.metrics.overlap import dice
from cadiff_cli.nets.models import Model
from cadiff_cli.nets.segmenter import CADiffNet
from cadiff_cli.products import Conditions, CoordinateField
from cadiff_cli.spatial.grid import Grid, Volume
from cadiff_cli.stages.sampling import class_probabilities
from cadiff_cli.training.loop import Interval, TrainingState
from cadiff_cli.training.segmenter.data import Sample, sample_field
from cadiff_cli.training.segmenter.spad import Spad

log = logging.getLogger(__name__)


class RunMonitor:
    """Writes ``validation.tsv``, ``validation/*.png`` and TensorBoard events into ``folder``.

    Every ``minutes`` the averaged network segments the next scan of ``held_out``, from its cached
    conditions, and is scored at 1 mm.  With ``spad`` another picture shows what a network sees of
    that scan as training goes on.  TensorBoard is optional: without it there are no curves.
    """

    def __init__(
        self,
        folder: Path,
        held_out: Sequence[Sample],
        parcellation: Parcellation,
        minutes: float = 15.0,
        sampling: SampleConfig | None = None,
        device: str = "auto",
        spad: Spad | None = None,
    ) -> None:
        self.folder, self.held_out, self.parcellation = folder, held_out, parcellation
        self.minutes = minutes
        self.sampling, self.device = sampling or SampleConfig(flip=False), device
        self.spad = spad
        self.last = time.monotonic()
        self.turn = 0
        self.board = _board(folder / "tensorboard")

    def interval(self, step: int, report: Interval) -> None:
        """Add a point to each curve."""
        if self.board:
            for name, value in report.losses.items():
                self.board.add_scalar(f"loss/{name}", value, step)
            self.board.add_scalar("rate", report.rate, step)
            self.board.add_scalar("seconds_per_step", report.seconds_per_step, step)
            self.board.add_scalar("data_share", report.data_share, step)

    def step_done(self, state: TrainingState[CADiffNet]) -> None:
        """Validate on the next held-out scan when it is time."""
        if self.held_out and time.monotonic() - self.last > 60 * self.minutes:
            self.validate(state)

    def validate(self, state: TrainingState[CADiffNet]) -> float:
        """Score the next held-out scan; returns the mean Dice of the ``headline`` structures."""
        sample = self.held_out[self.turn % len(self.held_out)]
        self.turn += 1
        predicted = segment_sample(state.ema, sample, self.parcellation, self.sampling, self.device)
        classes = (
            sample.scored(self.parcellation.subset(self.parcellation.headline)) or sample.drawn
        )
        score = float(np.nanmean(dice(predicted, sample.classes, classes)))
        log.info("step %d  %s  Dice %.4f", state.step, sample.name, score)
        self._record(state, sample.name, score)
        pictures = {"held_out": overlay(sample, predicted, self.parcellation)}
        if self.spad:
            pictures["shown"] = shown(sample, self.spad)
        for kind, pixels in pictures.items():
            suffix = "" if kind == "held_out" else f"_{kind}"
            name = f"{state.step:06d}_{sample.name}{suffix}.png"
            _save_picture(self.folder / "validation" / name, pixels)
            if self.board:
                self.board.add_image(kind, pixels, state.step, dataformats="HWC")
        if self.board:
            self.board.add_scalar(f"dice/{sample.name}", score, state.step)
        self.last = time.monotonic()
        return score

    def close(self) -> None:
        """Close TensorBoard, which writes its last events."""
        if self.board:
            self.board.close()

    def _record(self, state: TrainingState[CADiffNet], name: str, score: float) -> None:
        path = self.folder / "validation.tsv"
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
            if new:
                writer.writerow(("step", "hours", "scan", "dice"))
            writer.writerow((state.step, f"{state.seconds / 3600:.3f}", name, f"{score:.4f}"))


def segment_sample(
    net: CADiffNet,
    sample: Sample,
    parcellation: Parcellation,
    config: SampleConfig,
    device: str = "auto",
) -> np.ndarray:
    """Segment a cached scan with the code of inference: classes (X, Y, Z) on its 1 mm crop."""
    conditions = sample_conditions(sample)
    model = Model(net, parcellation=parcellation)
    p, _ = class_probabilities(conditions, model, config, device_name=device)
    return np.asarray(p.most_probable() * sample.mask)


def sample_conditions(sample: Sample) -> Conditions:
    """The network's input of a cached scan; the field is the mean of its templates' fields."""
    shape = sample.image.shape
    grid = Grid((shape[0], shape[1], shape[2]), np.eye(4))
    stored = torch.from_numpy(sample_field(sample))[None]
    field = F.interpolate(stored, scale_factor=2, mode="trilinear")[0].numpy()
    return Conditions(
        Volume(sample.image.astype(np.float32) / 255, grid),
        Volume(sample.mask, grid),
        CoordinateField(field, grid.coarsen(2)),
    )


def overlay(sample: Sample, predicted: np.ndarray, parcellation: Parcellation) -> np.ndarray:
    """Image, prediction and manual labels in the middle slice of each plane: (H, W, 3) uint8."""
    colours = np.array([(0, 0, 0), *map(rgb, parcellation.structures)], dtype=np.float64)
    grey = middle_slices(sample.image)
    rows = [grey]
    for labels in (predicted, sample.classes):
        ink = colours[middle_slices(labels)[..., 0]]
        rows.append(np.where(ink.any(axis=2, keepdims=True), 0.5 * grey + 0.5 * ink, grey))
    return np.asarray(np.concatenate(rows), dtype=np.uint8)


def shown(sample: Sample, spad: Spad) -> np.ndarray:
    """What a network is shown of a scan, in the middle slice of each plane: (H, W, 3) uint8.

    A row for each quarter of progress from 0 to 1, perturbed with the same seed.
    """
    image = torch.from_numpy(sample.image)[None, None].float() / 255
    classes = torch.from_numpy(sample.classes.astype(np.int64))[None]
    rows = []
    for progress in torch.linspace(0, 1, 5):
        seen = spad(image, classes, progress[None], torch.Generator().manual_seed(0))[0, 0]
        rows.append(middle_slices((seen.clamp(0, 1) * 255).round().byte().numpy()))
    return np.concatenate(rows)


def middle_slices(volume: np.ndarray) -> np.ndarray:
    """The middle slices of each plane of (X, Y, Z), side by side: (H, W, 3) of its type."""
    slices = [np.rot90(np.take(volume, n // 2, axis=a)) for a, n in enumerate(volume.shape)]
    height = max(len(each) for each in slices)
    row = [np.pad(each, ((0, height - len(each)), (0, 0))) for each in slices]
    return np.repeat(np.concatenate(row, axis=1)[..., None], 3, axis=2)


def _save_picture(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("TensorBoard is not installed (pip install tensorboard): no curves are written")
        return None
    return SummaryWriter(str(folder))
