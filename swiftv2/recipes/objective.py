"""Masked modelling on batches of packed voxels: what one micro-batch costs, as the engine's module."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data import keyed
from swiftv2.data.samples.batch import Batch
from swiftv2.data.samples.masks import Shape3, expand_mask
from swiftv2.data.samples.normalise import gather, normalise, scatter
from swiftv2.models.simmim import SimMIMOutput
from swiftv2.models.visible import make_masked


def template_mask(voxels: Tensor, grid_shape: Shape3) -> Tensor:
    """(H, W, D) bool of a store's kept voxels, (V,) int64."""
    mask = torch.zeros(math.prod(grid_shape), dtype=torch.bool)
    mask[voxels] = True
    return mask.view(grid_shape)


class Objective(nn.Module):
    """Normalises a batch, makes dense volumes on the device and reconstructs what is hidden.

    Args:
        config: the whole configuration.
        voxels: (V,) int64, flat C-order indices of the kept voxels in the grid.
        grid_shape: (H, W, D).
    """

    def __init__(self, config: PretrainConfig, voxels: Tensor, grid_shape: Shape3) -> None:
        super().__init__()
        self.config = config
        self.grid_shape = grid_shape
        self.simmim = make_masked(config.objective, config.model, config.mask, config.loss, config.run.seed)
        if config.model.packing == "template":
            # What the store keeps is the template mask of its grid: one for all subjects.
            self.simmim.encoder.use_template(template_mask(voxels.cpu(), grid_shape))
        if config.model.variant == "swift_v1":
            # v1 keeps this norm and never applies it; under ZeRO a parameter without a gradient would decay.
            self.simmim.encoder.norm.requires_grad_(requires_grad=False)
        self.register_buffer("voxels", voxels, persistent=False)
        self.voxels: Tensor

    def forward(self, batch: Batch) -> Tensor:
        """Mean over the clips of a micro-batch of their losses: a float32 scalar."""
        output, _ = self._run(batch)
        return output.clip_loss.mean()

    def clip_losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What the model makes of a batch.

        Returns:
            Loss of each clip (B,) float32; the normalised signal and its reconstruction, both (B, T, V) float32.
        """
        output, signal = self._run(batch)
        return output.clip_loss, signal, gather(output.reconstruction, self.voxels)

    def _run(self, batch: Batch) -> tuple[SimMIMOutput, Tensor]:
        """What the model gives, and the normalised signal (B, T, V)."""
        signal, fill = normalise(batch, self.config.data.normalisation)
        volume = scatter(signal, self.voxels, self.grid_shape, fill)
        brain = scatter(batch.brain[:, None], self.voxels, self.grid_shape)[:, 0, ..., 0]
        output: SimMIMOutput = self.simmim(volume, batch.mask, brain, self._drop_path(batch))
        return output, signal

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden voxels of a batch, (B, T, V) bool."""
        cell, frames = self.config.mask.patch_size, self.config.clip.frames
        return expand_mask(batch.mask, self.voxels, self.grid_shape, cell, frames)

    def _drop_path(self, batch: Batch) -> Tensor | None:
        """Uniform numbers (B, branches) keyed by sample, so that no rank's running state decides what is dropped."""
        if not self.training or self.config.model.drop_path == 0.0:
            return None
        rows = [
            keyed.generator(self.config.run.seed, "drop_path", epoch, clip).random(self.simmim.encoder.branches)
            for epoch, clip in zip(batch.epoch.tolist(), batch.clip.tolist(), strict=True)
        ]
        return torch.from_numpy(np.stack(rows)).to(batch.mask.device, torch.float32)
