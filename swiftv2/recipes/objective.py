"""Masked modelling on batches of packed voxels: what one micro-batch costs, as the engine's module."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swiftv2.config.model import ModelConfig
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data import keyed
from swiftv2.data.samples.batch import Batch
from swiftv2.data.samples.masks import Shape3, expand_mask
from swiftv2.data.samples.normalise import gather, normalise, scatter
from swiftv2.models.flops import encoder_flops, placing_flops, simmim_decoder_flops
from swiftv2.models.geometry import patches_with_brain, token_grid
from swiftv2.models.routes import Route, Work
from swiftv2.models.simmim import SimMIMOutput, clip_loss
from swiftv2.models.visible import make_masked
from swiftv2.plan.run import BACKWARD
from swiftv2.recipes.baselines import time_interpolation, visible_mean

BASELINE_STEPS = 10
"""Steps of which one looks at what copying would lose: in every step it would cost a small model a tenth of its time."""


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
        self.counts: dict[str, Tensor | float] = {}
        self._counting: CountedWork | None = None
        self._compared = False

    def count(self) -> None:
        """From now on leave in `counts`, after each forward pass in training, what the engine sums up beside the loss.

        `clips`; `brain_tokens`, patches that hold any voxel of the clip's own brain, over all frames; `flops` of the products
        that the forward pass made and the backward pass will make, recomputation left out; `baseline/visible_mean` and
        `baseline/time_interpolation`: the sum over clips of what these copies lose where the model's loss is counted, in the
        first step and then in every `BASELINE_STEPS`-th, or so that logged steps have them.
        """
        self._counting = self.simmim.encoder.work = CountedWork(self.simmim.encoder.config, self.config.clip.frames)
        if self.config.objective == "visible_only":
            self.simmim.get_submodule("decoder").register_forward_pre_hook(self._counting.note_decoder)

    def begin_step(self, step: int) -> None:
        """The engine tells which step of the run the next forward passes belong to."""
        every = self.config.train.log_every
        self._compared = step == 1 or step % (math.ceil(BASELINE_STEPS / every) * every) == 0

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
        drop_path = self._drop_path(batch)
        if self._counting is None or not self.training:
            return self.simmim(volume, batch.mask, brain, drop_path), signal
        # Before the model's own activations are there, so that its peak of memory stays what it is.
        copying = self._copying(signal, batch, brain) if self._compared else {}
        output: SimMIMOutput = self.simmim(volume, batch.mask, brain, drop_path)
        patch = self.config.model.patch_size
        tokens = patches_with_brain(brain, patch).sum() * token_grid(self.config.model, volume.shape[2:])[3]
        self.counts = {"clips": float(len(signal)), "brain_tokens": tokens, "flops": self._flops(len(signal)), **copying}
        return output, signal

    @torch.no_grad()
    def _copying(self, signal: Tensor, batch: Batch, brain: Tensor) -> dict[str, Tensor]:
        """What copying loses on a batch, summed over its clips: float64 scalars."""
        loss = self.config.loss
        hidden = self.hidden(batch)
        counted, share = hidden & batch.brain[:, None], None
        if loss.over != "brain_voxels":
            # What the store does not keep is constant: a copy of it is right, and counts as such.
            dense = self.simmim.counted(batch.mask, brain, signal.shape[1])
            counted = gather(dense[:, None], self.voxels)
            share = counted.flatten(1).sum(1) / dense.flatten(1).sum(1).clamp(min=1)
        found = {}
        for name, predict in (("visible_mean", visible_mean), ("time_interpolation", time_interpolation)):
            lost = clip_loss(predict(signal, hidden, batch.brain)[:, None], signal[:, None], counted, loss).double()
            found[f"baseline/{name}"] = (lost if share is None else lost * share).sum()
        return found

    def _flops(self, clips: int) -> float:
        if self._counting is None:
            raise AssertionError("FLOPs are asked for by what counts them")
        flops, visible = self._counting.flops, self.config.objective == "visible_only"
        self._counting.flops = 0
        return float((1 + BACKWARD) * (flops if visible else flops + simmim_decoder_flops(self._counting.config, clips)))

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


class CountedWork(Work):
    """Counts FLOPs of forward passes too, by the tokens that each of them computes.

    Args:
        config: of the encoder.
        frames: of a clip.
    """

    def __init__(self, config: ModelConfig, frames: int) -> None:
        super().__init__()
        self.config = config.model_copy(update={"frames": frames})
        self.flops = 0

    def note(self, route: Route) -> None:
        """Count a forward pass of the encoder."""
        super().note(route)
        self.flops += encoder_flops(self.config, route)

    def note_decoder(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Count a forward pass of the decoder that places mask tokens; a hook before it."""
        if module.training:
            features, _, visible, route, _ = inputs
            self.flops += placing_flops(self.config, route, len(features), len(visible))
