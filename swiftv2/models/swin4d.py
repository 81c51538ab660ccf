"""Swin4D: the encoder of SwiFT v1, of v2's unified family and of its decoupled family.

SwiFT: Kim et al., "SwiFT: Swin 4D fMRI Transformer", NeurIPS 2023 (arXiv 2307.05916).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from swiftv2.config.load import build
from swiftv2.config.model import ModelConfig
from swiftv2.errors import SwiftError
from swiftv2.models.blocks import Block, DecoupledBlock, PatchMerging
from swiftv2.models.geometry import Grid, Partition, block_specs, partition, split_axes, stage_grids, untraced
from swiftv2.models.initialise import initialise
from swiftv2.models.swift_v1 import encoder_tensors, v1_tree


class PatchEmbed(nn.Module):
    """Cuts the volume into patches and maps each linearly; the flat patch is ordered (sH, sW, sD, sT, C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        h, w, d, t = config.patch_size
        self.fc = nn.Linear(h * w * d * t * config.in_channels, config.embed_dim)

    def forward(self, volume: Tensor) -> Tensor:
        """(B, C, H, W, D, T) -> (B, h, w, d, t, E); zeros are added on the right up to whole patches."""
        missing = [-n % p for n, p in zip(volume.shape[2:], self.patch, strict=True)]
        if any(missing):
            volume = functional.pad(volume, [size for m in reversed(missing) for size in (0, m)])
        cells = split_axes(volume, 2, self.patch)
        patches = cells.permute(0, 2, 4, 6, 8, 3, 5, 7, 9, 1).flatten(5)
        out: Tensor = self.fc(patches)
        return out


class PositionTables(nn.Module):
    """Learned absolute embeddings of place and, unless the family has rotary ones, of time."""

    def __init__(self, width: int, grid: Grid, with_time: bool) -> None:
        super().__init__()
        h, w, d, t = grid
        self.pos_embed = nn.Parameter(torch.zeros(1, width, h, w, d, 1))
        if with_time:
            self.time_embed = nn.Parameter(torch.zeros(1, width, 1, 1, 1, t))
        self.with_time = with_time

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, d, t, C) plus the tables, the time table cut to the clip's length."""
        x = x + self.pos_embed.permute(0, 2, 3, 4, 5, 1)
        if self.with_time:
            x = x + self.time_embed[..., : x.shape[4]].permute(0, 2, 3, 4, 5, 1)
        return x


class Stage(nn.Module):
    """The blocks of one resolution and the merging that ends it."""

    def __init__(self, config: ModelConfig, stage: int, drop_path: Sequence[float]) -> None:
        super().__init__()
        kind = DecoupledBlock if config.variant == "decoupled" else Block
        self.blocks = nn.ModuleList([kind(config, stage, probability) for probability in drop_path])
        self.downsample = PatchMerging(config.embed_dim * 2**stage) if stage + 1 < len(config.depths) else None
        self.recompute = stage in config.checkpoint_stages

    def forward(self, x: Tensor, cuts: Sequence[list[Partition]], uniforms: Tensor | None) -> Tensor:
        """(B, h, w, d, t, C) -> the next stage's input, or the same shape after the last stage.

        Args:
            x: tokens.
            cuts: window cuts of each block.
            uniforms: (B, blocks * branches) draws for drop path, or None.
        """
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        draws = [None] * len(self.blocks) if uniforms is None else uniforms.chunk(len(self.blocks), dim=1)
        for block, cut, draw in zip(self.blocks, cuts, draws, strict=True):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cut, draw, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cut, draw)
        x = x.view(shape)
        if self.downsample is not None:
            h, w, d, t = shape[1:5]
            x = self.downsample(x, (h, w, d, t))
        return x


class Swin4D(nn.Module):
    """A hierarchical 4-D transformer over fMRI clips.

    Args:
        config: architecture; the decoder's part of it is ignored here.
        seed: where the first values of the parameters come from, and they alone; None leaves them to a model around it.

    Raises:
        SwiftError: the configuration asks for what SwiFT v1 cannot do.
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        grids = stage_grids(config)
        depth = sum(config.depths)
        rates = [config.drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.patch_embed = PatchEmbed(config)
        tables, stages = [], []
        for stage, blocks in enumerate(config.depths):
            first = sum(config.depths[:stage])
            stages.append(Stage(config, stage, rates[first : first + blocks]))
            if config.absolute_position:
                with_time = config.variant != "decoupled"
                tables.append(PositionTables(config.embed_dim * 2**stage, grids[stage], with_time))
        self.pos_embeds = nn.ModuleList(tables)
        self.layers = nn.ModuleList(stages)
        # SwiFT v1 carries this norm in its weights and never applies it.
        self.norm = nn.LayerNorm(self.width)
        if seed is not None:
            initialise(self, seed)

    @property
    def width(self) -> int:
        """Channels of the output."""
        width: int = self.config.embed_dim * 2 ** (len(self.config.depths) - 1)
        return width

    @property
    def branches(self) -> int:
        """Draws a sample that drop path takes: one for each residual branch of each block."""
        a_block = DecoupledBlock.branches if self.config.variant == "decoupled" else Block.branches
        return a_block * sum(self.config.depths)

    def forward(
        self,
        volume: Tensor,
        drop_path: Tensor | None = None,
        hidden: Tensor | None = None,
        token: Tensor | None = None,
    ) -> Tensor:
        """Encode clips.

        Args:
            volume: (B, C, H, W, D, T), any floating format; computed in that of the weights.
            drop_path: (B, `branches`) uniform draws in [0, 1); needed in training where the configured
                `drop_path` is above 0, ignored otherwise.
            hidden: (B, h, w, d, t) bool; these patch embeddings are replaced by `token` before the position tables.
            token: (E,) what replaces them.

        Returns:
            (B, C_last, h, w, d, t): features of the last stage.

        Raises:
            SwiftError: the clip does not fit the model, or the draws for drop path are missing.
        """
        grids = self._grids(volume)
        uniforms = self._uniforms(volume, drop_path)
        x = self.patch_embed(volume.to(self.patch_embed.fc.weight.dtype))
        if hidden is not None and token is not None:
            x = torch.where(hidden[..., None], token.to(x.dtype), x)
        cuts = self._cuts(grids, x.shape[0], x.device, x.dtype)
        for stage, layer in enumerate(self.layers):
            if self.config.absolute_position:
                x = self.pos_embeds[stage](x)
            x = layer(x, cuts[stage], uniforms[stage])
        if self.config.variant != "swift_v1":
            x = self.norm(x)
        features: Tensor = x.permute(0, 5, 1, 2, 3, 4).contiguous()
        return features

    @untraced
    def _cuts(self, grids: list[Grid], batch: int, device: torch.device, dtype: torch.dtype) -> list[list[list[Partition]]]:
        """Window cuts by stage, block and attention."""
        return [
            [
                [partition(spec, batch, device, dtype) for spec in block_specs(self.config, stage, block, grid)]
                for block in range(self.config.depths[stage])
            ]
            for stage, grid in enumerate(grids)
        ]

    def _grids(self, volume: Tensor) -> list[Grid]:
        if volume.ndim != 6 or volume.shape[1] != self.config.in_channels:
            expected = f"(B, {self.config.in_channels}, H, W, D, T)"
            raise SwiftError(f"clips of shape {tuple(volume.shape)} do not fit the model: it takes {expected}")
        size, frames = tuple(volume.shape[2:5]), volume.shape[5]
        if self.config.absolute_position and size != self.config.image_size:
            raise SwiftError(
                f"clips on a grid of {size} voxels do not fit the model's position tables, made for "
                f"{self.config.image_size}: set model.image_size or bring the clips to that grid"
            )
        if self.config.variant != "decoupled" and frames > self.config.frames:
            raise SwiftError(
                f"clips of {frames} frames are longer than the model's time tables, made for "
                f"{self.config.frames}: shorten the clips or set model.frames"
            )
        return stage_grids(self.config, volume.shape[2:])

    def _uniforms(self, volume: Tensor, drop_path: Tensor | None) -> list[Tensor | None]:
        stages = len(self.config.depths)
        if not self.training or self.config.drop_path == 0.0:
            return [None] * stages
        expected = (volume.shape[0], self.branches)
        if drop_path is None or tuple(drop_path.shape) != expected:
            given = "none" if drop_path is None else str(tuple(drop_path.shape))
            raise SwiftError(f"training with model.drop_path > 0 needs uniform draws of shape {expected}, got {given}")
        branches = self.branches // sum(self.config.depths)
        return list(torch.split(drop_path, [branches * depth for depth in self.config.depths], dim=1))

    @classmethod
    def from_swift_v1(cls, state_dict: Mapping[str, Tensor | np.ndarray[Any, Any]], **config: Any) -> Self:
        """A SwiFT v1 encoder with published weights, float32 on the CPU.

        Feed it clips in LAS voxel order: v1 never reorients, and its published weights were trained that way.

        Args:
            state_dict: the encoder's tensors, or a Lightning checkpoint's; heads are left out.
            **config: `img_size` (H, W, D, T), `embed_dim`, `first_window_size`, `window_size`, `patch_size`, `depths`,
                `num_heads` and `last_layer_full_MSA`, none of which is guessed; `in_chans` (1), `mlp_ratio` (4.0),
                `qkv_bias` (True), `patch_norm` (False) and `c_multiplier` (2) where they differ.

        Raises:
            SwiftError: a keyword is missing, unknown or unsupported, or the tensors do not fit the architecture.
        """
        model = cls(build(ModelConfig, v1_tree(config), where="SwiFT v1 configuration"))
        tensors = encoder_tensors(state_dict)
        own = model.state_dict()
        for problem, keys in (("missing", own.keys() - tensors.keys()), ("unknown", tensors.keys() - own.keys())):
            if keys:
                raise SwiftError(
                    f"SwiFT v1 weights do not fit the configuration: {problem} {min(keys)}"
                    f"{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}; check depths, embed_dim and qkv_bias"
                )
        for key, tensor in tensors.items():
            if tensor.shape != own[key].shape:
                raise SwiftError(
                    f"SwiFT v1 weights do not fit the configuration: {key} has shape {tuple(tensor.shape)}, "
                    f"the configuration wants {tuple(own[key].shape)}"
                )
        model.load_state_dict(tensors)
        return model
