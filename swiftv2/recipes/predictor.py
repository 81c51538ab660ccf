"""Fine-tuning on batches of packed voxels: what one micro-batch costs, as the engine's module, and what it predicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from swiftv2.config.finetune import FinetuneConfig
from swiftv2.config.task import TargetConfig
from swiftv2.data import keyed
from swiftv2.data.samples.augment import Augment
from swiftv2.data.samples.batch import Batch
from swiftv2.data.samples.masks import Shape3
from swiftv2.data.samples.normalise import normalise, scatter
from swiftv2.downstream.targets import Scale, class_weights
from swiftv2.models.heads import Predictor
from swiftv2.models.swin4d import Swin4D

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Output:
    """One target among a head's outputs.

    Attributes:
        target: its configuration.
        classes: in order; none for numbers.
        place: first of its outputs.
        weights: of the classes; empty for numbers.
        scale: of numbers; None for classes.
    """

    target: TargetConfig
    classes: tuple[str, ...]
    place: int
    weights: tuple[float, ...]
    scale: Scale | None

    @property
    def size(self) -> int:
        """How many outputs are its."""
        return len(self.classes) or 1


def make_outputs(targets: Sequence[TargetConfig], classes: Sequence[tuple[str, ...]], truth: Floats) -> tuple[Output, ...]:
    """Lay out a head's outputs; weights and scales come from the training truth alone.

    Args:
        targets: in order.
        classes: of each target.
        truth: (training units or clips, targets), NaN missing.
    """
    outputs, place = [], 0
    for number, (target, names) in enumerate(zip(targets, classes, strict=True)):
        known = truth[:, number][~np.isnan(truth[:, number])]
        balanced = names and target.class_weights == "balanced"
        weights = tuple(class_weights(known, names, target.column).tolist()) if balanced else (1.0,) * len(names)
        scale = None if names else Scale.fit(known, target.column) if target.scale == "standard" else Scale()
        outputs.append(Output(target, names, place, weights, scale))
        place += outputs[-1].size
    return tuple(outputs)


class Finetuned(nn.Module):
    """Normalises a batch, makes dense volumes on the device, augments and predicts.

    Args:
        config: of the run.
        encoder: its weights loaded.
        outputs: what is predicted.
        truth: (training clips, targets) in the labels' units, NaN missing.
        voxels: (V,) int64, flat C-order indices of the kept voxels in the grid.
        grid_shape: (H, W, D).
        augment: changes training clips; None leaves them as they are.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        encoder: Swin4D,
        outputs: tuple[Output, ...],
        truth: Floats,
        voxels: Tensor,
        grid_shape: Shape3,
        augment: Augment | None,
    ) -> None:
        super().__init__()
        self.config, self.outputs, self.grid_shape, self.augment = config, outputs, grid_shape, augment
        self.predictor = Predictor(encoder, config.head, sum(one.size for one in outputs), config.run.seed)
        scaled = [
            truth[:, number] if one.scale is None else one.scale.apply(truth[:, number]) for number, one in enumerate(outputs)
        ]
        self.register_buffer("voxels", voxels, persistent=False)
        self.voxels: Tensor
        # No buffer: engines bring those to the weights' number format.
        self._truth = torch.tensor(np.stack(scaled, axis=1), dtype=torch.float32)

    def forward(self, batch: Batch) -> Tensor:
        """Mean over the clips of a micro-batch of their losses: a float32 scalar.

        A clip's loss is the mean over targets of cross-entropy, or of the square error in deviations; a missing one costs 0.
        """
        self._truth = self._truth.to(self.voxels.device)
        truth, total = self._truth[batch.clip], torch.zeros((), device=self.voxels.device)
        raw = self.raw(batch)
        for number, one in enumerate(self.outputs):
            wanted, own = truth[:, number], raw[:, one.place : one.place + one.size]
            known = ~torch.isnan(wanted)
            if one.scale is None:
                # What is missing is asked as class 0 and counts for nothing.
                classes = torch.where(known, wanted, 0).long()
                weight = torch.tensor(one.weights, device=own.device)[classes]
                losses = functional.cross_entropy(own, classes, reduction="none") * weight
            else:
                losses = (own[:, 0] - torch.where(known, wanted, 0)).square()
            total = total + torch.where(known, losses, 0).mean() / len(self.outputs)
        return total

    def volumes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the encoder sees: (B, 1, H, W, D, T) float32 and the brain (B, H, W, D) bool; augmented in training."""
        signal, fill = normalise(batch, self.config.task.data.normalisation)
        volume = scatter(signal, self.voxels, self.grid_shape, fill)
        brain = scatter(batch.brain[:, None], self.voxels, self.grid_shape)[:, 0, ..., 0]
        if self.training and self.augment is not None:
            volume, brain = self.augment(volume, brain, fill, batch.epoch, batch.clip)
        return volume, brain

    def raw(self, batch: Batch) -> Tensor:
        """The head's outputs, (B, outputs) float32."""
        volume, brain = self.volumes(batch)
        encoder, pooled = self.predictor.encoder, self.predictor.pool.width
        drop_path = self._draws("drop_path", batch, encoder.branches) if encoder.config.drop_path > 0 else None
        dropout = self._draws("dropout", batch, pooled) if self.config.head.dropout > 0 else None
        out: Tensor = self.predictor(volume, brain, drop_path, dropout)
        return out

    def _draws(self, purpose: str, batch: Batch, size: int) -> Tensor | None:
        """Uniform numbers (B, size) keyed by sample, so that no rank's running state decides what is dropped."""
        if not self.training:
            return None
        rows = [
            keyed.generator(self.config.run.seed, purpose, epoch, clip).random(size)
            for epoch, clip in zip(batch.epoch.tolist(), batch.clip.tolist(), strict=True)
        ]
        return torch.from_numpy(np.stack(rows)).to(self.voxels.device, torch.float32)

    def scores(self, raw: NDArray[Any]) -> list[Floats]:
        """Of each target: probabilities (n, classes), or predictions (n, 1) in the label's units, of raw outputs."""
        found = []
        for one in self.outputs:
            own = np.asarray(raw[:, one.place : one.place + one.size], dtype=np.float64)
            if one.scale is None:
                odds = np.exp(own - own.max(axis=1, keepdims=True))
                found.append(odds / odds.sum(axis=1, keepdims=True))
            else:
                found.append(one.scale.undo(own))
        return found
