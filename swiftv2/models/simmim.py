"""SimMIM over fMRI clips: hide cells, encode everything, reconstruct, compare where hidden.

Xie et al., "SimMIM: a Simple Framework for Masked Image Modeling", CVPR 2022 (arXiv 2111.09886).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from swiftv2.config.model import LossConfig, MaskConfig, ModelConfig
from swiftv2.errors import SwiftError
from swiftv2.models.decoders import make_decoder
from swiftv2.models.geometry import Grid, as_grid, patches_with_brain, token_grid
from swiftv2.models.initialise import initialise
from swiftv2.models.swin4d import Swin4D


class SimMIMOutput(NamedTuple):
    """What a forward pass gives."""

    reconstruction: Tensor
    """(B, C, H, W, D, T) float32, cropped to the input."""
    clip_loss: Tensor
    """(B,) float32: per clip the mean over its masked positions that count, 0 where there are none."""


class MaskedModel(nn.Module, ABC):
    """An encoder whose clips are hidden in part, and are judged where they were: what all objectives share.

    Args:
        model: architecture of encoder and decoder.
        mask: only its cell size matters here; which cells are hidden comes with the batch.
        loss: distance and the positions that count.

    Raises:
        SwiftError: mask cells are no multiple of the model's patch, or the loss counts what packing leaves out.
    """

    def __init__(self, model: ModelConfig, mask: MaskConfig, loss: LossConfig) -> None:
        super().__init__()
        if any(c % p for c, p in zip(mask.patch_size, model.patch_size, strict=True)):
            raise SwiftError(
                f"mask.patch_size={mask.patch_size} must be a multiple of model.patch_size={model.patch_size} on every axis"
            )
        if model.packing != "none" and loss.over == "everywhere":
            raise SwiftError(
                f"loss.over=everywhere counts background, which model.packing={model.packing} leaves out: "
                "take loss.over=brain_voxels or brain_tokens"
            )
        self.config, self.mask_config, self.loss_config = model, mask, loss
        self.encoder = Swin4D(model, seed=None)

    def forward(self, volume: Tensor, mask: Tensor, brain: Tensor, drop_path: Tensor | None = None) -> SimMIMOutput:
        """Reconstruct clips from what is not hidden.

        Args:
            volume: (B, C, H, W, D, T) normalised BOLD, any floating format.
            mask: (B, h, w, d, t) bool in mask cells of the padded clip, True = hidden.
            brain: (B, H, W, D) bool, the voxels inside each subject's brain.
            drop_path: draws for stochastic depth, see `Swin4D.forward`.

        Raises:
            SwiftError: shapes do not fit one another or the model.
        """
        self._check(volume, mask, brain)
        cells_per_token = as_grid([c // p for c, p in zip(self.mask_config.patch_size, self.config.patch_size, strict=True)])
        padded = self.reconstruct(volume, enlarge(mask, cells_per_token), brain, drop_path)
        _, _, h, w, d, t = volume.shape
        reconstruction = padded[:, :, :h, :w, :d, :t].float()
        counts = self.counted(mask, brain, t)
        return SimMIMOutput(reconstruction, clip_loss(reconstruction, volume, counts, self.loss_config))

    @abstractmethod
    def reconstruct(self, volume: Tensor, hidden: Tensor, brain: Tensor, drop_path: Tensor | None) -> Tensor:
        """(B, C, H, W, D, T) of the padded clip; `hidden` is (B, h, w, d, t) bool in tokens, the others as of `forward`."""

    def counted(self, mask: Tensor, brain: Tensor, frames: int) -> Tensor:
        """(B, H, W, D, T) bool: the masked positions that the loss counts, from cells (B, h, w, d, t) and (B, H, W, D)."""
        _, h, w, d = brain.shape
        hidden = enlarge(mask, self.mask_config.patch_size)[:, :h, :w, :d, :frames]
        if self.loss_config.over == "everywhere":
            return hidden
        if self.loss_config.over == "brain_tokens":
            brain = _whole_patches(brain, self.config.patch_size[:3])
        return hidden & brain[..., None]

    def _check(self, volume: Tensor, mask: Tensor, brain: Tensor) -> None:
        if volume.ndim != 6:
            raise SwiftError(f"clips of shape {tuple(volume.shape)} do not fit the model: it takes (B, C, H, W, D, T)")
        tokens = token_grid(self.config, volume.shape[2:])
        padded = [n * p for n, p in zip(tokens, self.config.patch_size, strict=True)]
        cell = self.mask_config.patch_size
        if any(n % c for n, c in zip(padded, cell, strict=True)):
            raise SwiftError(f"mask.patch_size={cell} must divide the padded clip {tuple(padded)} on every axis")
        expected = (volume.shape[0], *(n // c for n, c in zip(padded, cell, strict=True)))
        if tuple(mask.shape) != expected:
            raise SwiftError(f"mask of shape {tuple(mask.shape)} does not fit: these clips have {expected} mask cells")
        expected = (volume.shape[0], *volume.shape[2:5])
        if tuple(brain.shape) != expected:
            raise SwiftError(f"brain of shape {tuple(brain.shape)} does not fit: these clips have {expected} voxels")


class SimMIM(MaskedModel):
    """An encoder, a mask token and a decoder: hidden patches are replaced by the token, and all tokens are encoded.

    Args:
        model: architecture of encoder and decoder.
        mask: only its cell size matters here; which cells are hidden comes with the batch.
        loss: distance and the positions that count.
        seed: where the first values of the parameters come from.

    Raises:
        SwiftError: see `MaskedModel`.
    """

    def __init__(self, model: ModelConfig, mask: MaskConfig, loss: LossConfig, seed: int = 0) -> None:
        super().__init__(model, mask, loss)
        self.mask_token = nn.Parameter(torch.zeros(model.embed_dim))
        self.decoder = make_decoder(model, self.encoder.width)
        initialise(self, model, seed)

    def reconstruct(self, volume: Tensor, hidden: Tensor, brain: Tensor, drop_path: Tensor | None) -> Tensor:
        """(B, C, H, W, D, T) of the padded clip, from tokens of which the hidden ones are the mask token."""
        features = self.encoder(volume, drop_path, hidden, self.mask_token, brain)
        out: Tensor = self.decoder(features)
        return out


def enlarge(cells: Tensor, factors: Grid) -> Tensor:
    """(B, h, w, d, t) -> (B, h*fH, w*fW, d*fD, t*fT), every value repeated over its cell."""
    if factors == (1, 1, 1, 1):
        return cells
    batch, h, w, d, t = cells.shape
    fh, fw, fd, ft = factors
    wide = cells[:, :, None, :, None, :, None, :, None].expand(batch, h, fh, w, fw, d, fd, t, ft)
    return wide.reshape(batch, h * fh, w * fw, d * fd, t * ft)


def clip_loss(reconstruction: Tensor, target: Tensor, counted: Tensor, loss: LossConfig) -> Tensor:
    """Per clip the mean distance over counted positions, 0 where there are none, in float32.

    Args:
        reconstruction: (B, C, H, W, D, T).
        target: (B, C, H, W, D, T).
        counted: (B, H, W, D, T) bool; holds for all channels.
        loss: which distance.

    Returns:
        (B,) float32.
    """
    distance = _distance(reconstruction.float(), target.float(), loss)
    total = torch.where(counted[:, None], distance, 0.0).flatten(1).sum(dim=1)
    positions = counted.flatten(1).count_nonzero(dim=1) * target.shape[1]
    return total / positions.clamp(min=1)


def _distance(reconstruction: Tensor, target: Tensor, loss: LossConfig) -> Tensor:
    if loss.kind == "l1":
        return functional.l1_loss(reconstruction, target, reduction="none")
    if loss.kind == "smooth_l1":
        return functional.smooth_l1_loss(reconstruction, target, reduction="none", beta=loss.delta)
    if loss.kind == "huber":
        return functional.huber_loss(reconstruction, target, reduction="none", delta=loss.delta)
    return functional.mse_loss(reconstruction, target, reduction="none")


def _whole_patches(brain: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, H, W, D) bool: every voxel of a patch that holds any brain voxel."""
    _, h, w, d = brain.shape
    ph, pw, pd = patch
    return enlarge(patches_with_brain(brain, patch)[..., None], (ph, pw, pd, 1))[:, :h, :w, :d, 0]
