"""Swin4D: the encoder of SwiFT v1, of v2's unified family and of its decoupled family.

SwiFT: Kim et al., "SwiFT: Swin 4D fMRI Transformer", NeurIPS 2023 (arXiv 2307.05916).
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from swiftv2.config.load import build
from swiftv2.config.model import ModelConfig
from swiftv2.errors import SwiftError
from swiftv2.models.blocks import Block, DecoupledBlock, PatchMerging
from swiftv2.models.geometry import Grid, patches_with_brain, split_axes, stage_grids, token_grid
from swiftv2.models.initialise import initialise
from swiftv2.models.mup import Embedding
from swiftv2.models.routes import Move, Route, StageRoute, Step, Work, sample_route, shared_route
from swiftv2.models.swift_v1 import encoder_tensors, v1_tree


class PatchEmbed(nn.Module):
    """Cuts the volume into patches and maps each linearly; the flat patch is ordered (sH, sW, sD, sT, C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        h, w, d, t = config.patch_size
        self.fc = Embedding(h * w * d * t * config.in_channels, config.embed_dim)

    def forward(self, volume: Tensor, voxels: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """(B, C, H, W, D, T) -> (cells * B, E); zeros are added on the right up to whole patches.

        Args:
            volume: clips.
            voxels: flat voxels of the patches to embed, in the padded grid; None embeds all.
            rows: rows of (cell, sample) to embed; None embeds all.
        """
        missing = [-n % p for n, p in zip(volume.shape[2:], self.patch, strict=True)]
        if any(missing):
            volume = functional.pad(volume, [size for m in reversed(missing) for size in (0, m)])
        batch, channels = volume.shape[:2]
        if voxels is None:
            patches = split_axes(volume, 2, self.patch).permute(2, 4, 6, 8, 0, 3, 5, 7, 9, 1)
        else:
            of_a_patch, frames = math.prod(self.patch[:3]), self.patch[3]
            taken = volume.reshape(batch, channels, -1, volume.shape[-1]).index_select(2, voxels)
            patches = taken.view(batch, channels, -1, of_a_patch, volume.shape[-1] // frames, frames).permute(2, 4, 0, 3, 5, 1)
        patches = patches.reshape(-1, self.fc.in_features)
        out: Tensor = self.fc(patches if rows is None else patches.index_select(0, rows))
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

    def forward(self, x: Tensor, route: StageRoute, times: int) -> Tensor:
        """(slots, batch, C) plus the tables at the slots' cells, the time table cut to the clip's length in tokens."""
        width = x.shape[-1]
        # Channels last before the sum: its backward pass then adds whole rows.
        table = self.pos_embed.view(width, -1).t().contiguous()[:, None]
        if self.with_time:
            table = table + self.time_embed.view(width, -1)[:, :times].t().contiguous()
        rows = table.expand(-1, times, -1).reshape(-1, width)
        if route.positions is not None:
            return x + route.positions(rows)[:, None]
        if route.cells is not None:
            return x + functional.embedding(route.cells, rows)[:, None]
        raise AssertionError("a route for a model without position tables")


_ATTENTION = [
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,  # noqa: SLF001 (names of operators)
    torch.ops.aten._scaled_dot_product_flash_attention.default,  # noqa: SLF001
    torch.ops.aten._scaled_dot_product_efficient_attention.default,  # noqa: SLF001
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,  # noqa: SLF001
]
KEPT: dict[str, list[Any]] = {
    "nothing": [],
    "attention": _ATTENTION,
    "products": [*_ATTENTION, torch.ops.aten.mm.default, torch.ops.aten.addmm.default],
}
"""Operators whose results a checkpointed block keeps."""


class Stage(nn.Module):
    """The blocks of one resolution and the merging that ends it."""

    def __init__(self, config: ModelConfig, stage: int) -> None:
        super().__init__()
        kind = DecoupledBlock if config.variant == "decoupled" else Block
        self.blocks = nn.ModuleList([kind(config, stage) for _ in range(config.depths[stage])])
        self.downsample = PatchMerging(config.embed_dim * 2**stage) if stage + 1 < len(config.depths) else None
        self.recompute = stage in config.checkpoint_stages
        self.keep = KEPT[config.checkpoint_keep]

    def forward(self, x: Tensor, route: StageRoute, factors: Tensor | None, children: Move | None) -> Tensor:
        """(slots, batch, C) -> the next stage's slots, or those of the last attention after the last stage.

        Args:
            x: tokens in the order of the first attention.
            route: attentions of each block.
            factors: (samples, blocks * branches) of the residual branches, by drop path, or None.
            children: brings tokens to their parents in the next stage; None after the last.
        """
        draws = [None] * len(self.blocks) if factors is None else factors.chunk(len(self.blocks), dim=1)
        for block, steps, draw in zip(self.blocks, route.blocks, draws, strict=True):
            apply = self._recomputed if self.recompute and torch.is_grad_enabled() else _applied
            x = apply(block, x, steps, draw)
        if self.downsample is not None and children is not None:
            x = self.downsample(x, children)
        return x

    def _recomputed(self, block: nn.Module, x: Tensor, steps: tuple[Step, ...], draw: Tensor | None) -> Tensor:
        if self.keep:
            contexts = partial(create_selective_checkpoint_contexts, self.keep)
            out: Tensor = checkpoint(block, x, steps, draw, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        else:
            out = checkpoint(block, x, steps, draw, use_reentrant=False, preserve_rng_state=False)
        return out


def _on_grid(rows: Tensor, grid: Grid, batch: int) -> Tensor:
    """Rows of (cell, sample) as (batch, C, h, w, d, t)."""
    return rows.reshape(*grid, batch, -1).permute(4, 5, 0, 1, 2, 3).contiguous()


def _applied(block: nn.Module, x: Tensor, steps: tuple[Step, ...], draw: Tensor | None) -> Tensor:
    out: Tensor = block(x, steps, draw)
    return out


class Swin4D(nn.Module):
    """A hierarchical 4-D transformer over fMRI clips.

    Args:
        config: architecture; the decoder's part of it is ignored here.
        seed: where the first values of the parameters come from, and they alone; None leaves them to a model around it.
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        grids = stage_grids(config)
        self.patch_embed = PatchEmbed(config)
        tables, stages = [], []
        for stage in range(len(config.depths)):
            stages.append(Stage(config, stage))
            if config.absolute_position:
                with_time = config.variant != "decoupled"
                tables.append(PositionTables(config.embed_dim * 2**stage, grids[stage], with_time))
        self.pos_embeds = nn.ModuleList(tables)
        self.layers = nn.ModuleList(stages)
        # SwiFT v1 carries this norm in its weights and never applies it.
        self.norm = nn.LayerNorm(self.width)
        if config.packing == "template":
            self.register_buffer("template", torch.zeros(grids[0][:3], dtype=torch.bool))
            self.template: Tensor
        self._template_bytes: bytes | None = None
        self.work = Work()
        self.register_load_state_dict_post_hook(_forget_template)  # type: ignore[no-untyped-call]
        if seed is not None:
            initialise(self, config, seed)

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
        brain: Tensor | None = None,
    ) -> Tensor:
        """Encode clips.

        Args:
            volume: (B, C, H, W, D, T), any floating format; computed in that of the weights.
            drop_path: (B, `branches`) uniform draws in [0, 1); needed in training where the configured
                `drop_path` is above 0, ignored otherwise.
            hidden: (B, h, w, d, t) bool; these patch embeddings are replaced by `token` before the position tables.
            token: (E,) what replaces them.
            brain: (B, H, W, D) bool, needed with packing=subject.

        Returns:
            (B, C_last, h, w, d, t): features of the last stage; with packing, 0 where a token holds no brain.

        Raises:
            SwiftError: the clip does not fit the model, or the draws for drop path are missing.
        """
        self._check(volume)
        route = self.route(volume, brain)
        x = self._embed(volume, route)
        if (hidden is None) != (token is None):
            raise SwiftError("hidden patches need a token that replaces them, and a token needs hidden patches: give both")
        if hidden is not None and token is not None:
            cells = hidden.permute(1, 2, 3, 4, 0).reshape(-1, len(volume))
            cells = cells if route.cells is None else cells[route.cells]
            cells = cells.reshape(-1) if route.rows is None else cells.reshape(-1)[route.rows]
            x = torch.where(cells[:, None], token.to(x.dtype), x)
        return self._encode(x, route, volume, drop_path)

    def encode_visible(
        self, volume: Tensor, visible: Tensor, drop_path: Tensor | None = None, brain: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode clips of which only some tokens are there, by the definition of packing: others are never computed.

        Args:
            volume: (B, C, H, W, D, T), as in `forward`; only visible patches are read.
            visible: (B, h, w, d, t) bool; of these, packing leaves those that hold brain.
            drop_path: see `forward`.
            brain: see `forward`.

        Returns:
            Features as of `forward`, 0 where no visible token lies under them; the embeddings (n, E) of the visible
            patches; and their rows (n,) among those of (cell, sample).

        Raises:
            SwiftError: a clip has no visible token, or as in `forward`.
        """
        self._check(volume)
        if self.config.variant == "swift_v1":
            raise SwiftError("variant=swift_v1 attends to every token: encoding visible ones alone needs another variant")
        grid = token_grid(self.config, volume.shape[2:])
        if tuple(visible.shape) != (len(volume), *grid):
            raise SwiftError(
                f"visible tokens of shape {tuple(visible.shape)} do not fit: these clips have {(len(volume), *grid)}"
            )
        kept = self.tokens(volume, brain) & visible.cpu()
        empty = (~kept.flatten(1).any(1)).sum()
        if empty:
            raise SwiftError(f"{empty} of {len(volume)} clips have no visible token to encode: lower mask.ratio")
        dtype = self.patch_embed.fc.weight.dtype
        route = sample_route(self.config, kept.numpy(), volume.device, dtype)
        x = self._embed(volume, route)
        if route.rows is None:
            raise AssertionError("tokens of each sample's own have rows of their own")
        return self._encode(x, route, volume, drop_path), x, route.rows

    def stages(self, volume: Tensor, brain: Tensor | None = None) -> tuple[Tensor, ...]:
        """Features of every stage, without drop path.

        Args:
            volume: as in `forward`.
            brain: as in `forward`.

        Returns:
            (B, C_s, h_s, w_s, d_s, t) of each stage s after its last block and before its merging; with packing, 0 where a
            token holds no brain. The last is what `forward` gives.
        """
        self._check(volume)
        route = self.route(volume, brain)
        x = self._embed(volume, route)
        x = route.enter(x.view(-1, route.batch, x.shape[-1]))
        times = -(-volume.shape[-1] // self.config.patch_size[3])
        grids = stage_grids(self.config, volume.shape[2:])
        features = []
        for index, (layer, stage, grid) in enumerate(zip(self.layers, route.stages, grids, strict=True)):
            if self.config.absolute_position:
                x = self.pos_embeds[index](x, stage, times)
            x = layer(x, stage, None, None)
            last = index + 1 == len(self.layers)
            if last and self.config.variant != "swift_v1":
                x = self.norm(x)
            leave = route.leave if last else self.route(volume, brain, self._ending_with(index)).leave
            features.append(_on_grid(leave(x), grid, len(volume)))
            if not last:
                merging: nn.Module = layer.get_submodule("downsample")
                x = merging(x, route.stages[index + 1].merge)
        return tuple(features)

    def _ending_with(self, stage: int) -> ModelConfig:
        """This architecture cut off after a stage: its way in, as far as it goes, is this one's."""
        kept = {"depths": self.config.depths[: stage + 1], "num_heads": self.config.num_heads[: stage + 1]}
        return self.config.model_copy(update={**kept, "last_layer_full_msa": False})

    def _embed(self, volume: Tensor, route: Route) -> Tensor:
        out: Tensor = self.patch_embed(volume.to(self.patch_embed.fc.weight.dtype), route.voxels, route.rows)
        return out

    def _encode(self, x: Tensor, route: Route, volume: Tensor, drop_path: Tensor | None) -> Tensor:
        factors = self._factors(volume, drop_path)
        if self.training:
            self.work.note(route)
        x = route.enter(x.view(-1, route.batch, x.shape[-1]))
        merges = [stage.merge for stage in route.stages[1:]]
        times = -(-volume.shape[-1] // self.config.patch_size[3])
        for index, (layer, stage, merge) in enumerate(zip(self.layers, route.stages, [*merges, None], strict=True)):
            if self.config.absolute_position:
                x = self.pos_embeds[index](x, stage, times)
            x = layer(x, stage, factors[index], merge)
        if self.config.variant != "swift_v1":
            x = self.norm(x)
        grid = stage_grids(self.config, volume.shape[2:])[-1]
        return _on_grid(route.leave(x), grid, len(volume))

    def use_template(self, brain: Tensor) -> None:
        """Compute only tokens that hold a voxel of this mask, from now on and wherever the weights go.

        Args:
            brain: (H, W, D) bool, one for all subjects: a mask of their own would give away the size of their heads.

        Raises:
            SwiftError: the model does not pack by a template, or the mask is of another grid or empty.
        """
        if self.config.packing != "template":
            raise SwiftError(f"a template mask needs model.packing=template, this model has {self.config.packing}")
        if tuple(brain.shape) != self.config.image_size or not bool(brain.any()):
            raise SwiftError(
                f"a template mask of shape {tuple(brain.shape)} with {int(brain.sum())} voxels does not fit a model for "
                f"{self.config.image_size}: give the brain mask of the grid"
            )
        self.template.copy_(patches_with_brain(brain[None], self.config.patch_size)[0])
        self._template_bytes = None

    def tokens(self, volume: Tensor, brain: Tensor | None = None) -> Tensor:
        """(B, h, w, d, t) bool on the CPU: the first stage's tokens that packing leaves in; arguments as of `forward`."""
        config, grid = self.config, token_grid(self.config, volume.shape[2:])
        if config.packing == "subject":
            places = self._subject_places(volume, brain)
        elif config.packing == "template":
            kept = np.frombuffer(self._settled_template(), dtype=np.bool_).reshape(1, *grid[:3])
            places = torch.from_numpy(kept.copy())
        else:
            places = torch.ones(1, *grid[:3], dtype=torch.bool)
        return places[..., None].expand(len(volume), *grid)

    def route(self, volume: Tensor, brain: Tensor | None = None, config: ModelConfig | None = None) -> Route:
        """The way of these tokens through this model, or through one of that configuration on the same first grid."""
        config, dtype = config or self.config, self.patch_embed.fc.weight.dtype
        if config.packing == "subject":
            return sample_route(config, self.tokens(volume, brain).numpy(), volume.device, dtype)
        template = self._settled_template() if config.packing == "template" else None
        return shared_route(config, tuple(volume.shape[2:]), template, len(volume), volume.device, dtype)

    def _subject_places(self, volume: Tensor, brain: Tensor | None) -> Tensor:
        """(B, h, w, d) bool on the CPU: patches with brain."""
        if brain is None or tuple(brain.shape) != (len(volume), *volume.shape[2:5]):
            given = "none" if brain is None else str(tuple(brain.shape))
            raise SwiftError(f"model.packing=subject needs a brain mask of each clip, (B, H, W, D); got {given}")
        places = patches_with_brain(brain, self.config.patch_size)
        if not bool(places.flatten(1).any(1).all()):
            raise SwiftError("model.packing=subject: a clip has no brain voxel, so no token to compute")
        return places.cpu()

    def _settled_template(self) -> bytes:
        if self._template_bytes is None:
            self._template_bytes = self.template.cpu().numpy().tobytes()
        if not any(self._template_bytes):
            raise SwiftError("model.packing=template: the model has no template mask yet: call use_template(brain)")
        return self._template_bytes

    def _check(self, volume: Tensor) -> None:
        if volume.ndim != 6 or volume.shape[1] != self.config.in_channels:
            expected = f"(B, {self.config.in_channels}, H, W, D, T)"
            raise SwiftError(f"clips of shape {tuple(volume.shape)} do not fit the model: it takes {expected}")
        size, frames = tuple(volume.shape[2:5]), volume.shape[5]
        if (self.config.absolute_position or self.config.packing == "template") and size != self.config.image_size:
            raise SwiftError(
                f"clips on a grid of {size} voxels do not fit the model's position tables, made for "
                f"{self.config.image_size}: set model.image_size or bring the clips to that grid"
            )
        if self.config.variant != "decoupled" and frames > self.config.frames:
            raise SwiftError(
                f"clips of {frames} frames are longer than the model's time tables, made for "
                f"{self.config.frames}: shorten the clips or set model.frames"
            )

    def _factors(self, volume: Tensor, drop_path: Tensor | None) -> list[Tensor | None]:
        stages = len(self.config.depths)
        if not self.training or self.config.drop_path == 0.0:
            return [None] * stages
        expected = (volume.shape[0], self.branches)
        if drop_path is None or tuple(drop_path.shape) != expected:
            given = "none" if drop_path is None else str(tuple(drop_path.shape))
            raise SwiftError(f"training with model.drop_path > 0 needs uniform draws of shape {expected}, got {given}")
        blocks, dtype = sum(self.config.depths), self.patch_embed.fc.weight.dtype
        branches = self.branches // blocks
        dropped = torch.linspace(0.0, self.config.drop_path, blocks, device=drop_path.device).repeat_interleave(branches)
        # Kept branches are scaled to keep the mean.
        factors = ((drop_path >= dropped) / (1.0 - dropped)).to(dtype)
        return list(torch.split(factors, [branches * depth for depth in self.config.depths], dim=1))

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


def _forget_template(model: nn.Module, _: object) -> None:
    """Look at the template mask again: other weights may bring another one."""
    if isinstance(model, Swin4D):
        model._template_bytes = None  # noqa: SLF001 (a model's own hook)
