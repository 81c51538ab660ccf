"""Blocks of the three families, and patch merging."""

import torch
from torch import Tensor, nn

from swiftv2.config.model import ModelConfig
from swiftv2.models.attention import GroupAttention
from swiftv2.models.mlp import MLP
from swiftv2.models.mup import attention_scale
from swiftv2.models.routes import Layout, Move, Step
from swiftv2.models.tokens import CHILDREN


class LayerScale(nn.Module):
    """A learned factor a channel."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.scale = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return x * self.scale


class Block(nn.Module):
    """SwiFT's block: 4-D window attention, then the MLP, a pre-norm residual each."""

    branches: int = 2

    def __init__(self, config: ModelConfig, stage: int) -> None:
        super().__init__()
        width = config.embed_dim * 2**stage
        self.norm1 = nn.LayerNorm(width)
        self.attn = GroupAttention(width, config.num_heads[stage], config.qkv_bias, attention_scale(config, stage))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * config.mlp_ratio))

    def forward(self, x: Tensor, steps: tuple[Step, ...], factors: Tensor | None) -> Tensor:
        """(slots, batch, C) -> (slots, batch, C) in the order of the step; `factors` (samples, 2) of the branches or None."""
        (step,) = steps
        x = _arrive(x, step)
        x = _add(x, self.attn(_normalised(self.norm1, x, step.layout), step.layout), factors, 0, step.layout)
        return _add(x, self.mlp(self.norm2(x)), factors, 1, step.layout)


class DecoupledBlock(nn.Module):
    """d-SwiFT's block: attention in time, attention in space, the MLP, a pre-norm residual each."""

    branches: int = 3

    def __init__(self, config: ModelConfig, stage: int) -> None:
        super().__init__()
        width, heads = config.embed_dim * 2**stage, config.num_heads[stage]
        scale = attention_scale(config, stage)
        self.temporal_norm = nn.LayerNorm(width)
        self.temporal_attn = GroupAttention(width, heads, config.qkv_bias, scale)
        self.temporal_scale = LayerScale(width, config.layer_scale_temporal)
        self.spatial_norm = nn.LayerNorm(width)
        self.spatial_attn = GroupAttention(width, heads, config.qkv_bias, scale)
        self.spatial_scale = LayerScale(width, config.layer_scale_spatial)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * config.mlp_ratio))

    def forward(self, x: Tensor, steps: tuple[Step, ...], factors: Tensor | None) -> Tensor:
        """(slots, batch, C) -> (slots, batch, C) in the order of the last step; `factors` (samples, 3) of branches or None."""
        in_time, in_space = steps
        x = _arrive(x, in_time)
        mixed = self.temporal_attn(_normalised(self.temporal_norm, x, in_time.layout), in_time.layout)
        x = _arrive(_add(x, self.temporal_scale(mixed), factors, 0, in_time.layout), in_space)
        mixed = self.spatial_attn(_normalised(self.spatial_norm, x, in_space.layout), in_space.layout)
        x = _add(x, self.spatial_scale(mixed), factors, 1, in_space.layout)
        return _add(x, self.mlp(self.norm2(x)), factors, 2, in_space.layout)


def compile_blocks(module: nn.Module, *, varying: bool = False) -> None:
    """Let torch.compile compile every block of a model, in place; the first passes then take minutes.

    Args:
        module: holds blocks.
        varying: whether the numbers of tokens change from batch to batch, so that kernels take them as they come.

    Raises:
        RuntimeError: in the first pass, where a block cannot be compiled whole.
    """
    # One code for all blocks meets two shifts of four stages and both modes, and with varying tokens the sets of buckets:
    # more than the default allows, and beyond its limit PyTorch would go on uncompiled.
    torch._dynamo.config.recompile_limit = 1024  # noqa: SLF001 (the documented way)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # noqa: SLF001
    for child in module.modules():
        if isinstance(child, Block | DecoupledBlock):
            child.compile(fullgraph=True, dynamic=varying)


def _arrive(x: Tensor, step: Step) -> Tensor:
    return x if step.move is None else step.move(x)


def _add(x: Tensor, branch: Tensor, factors: Tensor | None, which: int, layout: Layout) -> Tensor:
    """A residual branch, times each sample's factor where there are any."""
    if factors is None:
        return x + branch
    own = factors[:, which]
    return x + branch * (own[None, :, None] if layout.sample is None else own[layout.sample][:, None, None])


def _normalised(norm: nn.LayerNorm, x: Tensor, layout: Layout) -> Tensor:
    out: Tensor = norm(x)
    return out if layout.blank is None else out.index_fill(0, layout.blank, 0.0)


class PatchMerging(nn.Module):
    """Joins 2x2x2 neighbours in space into one token of twice the width; time stays.

    Args:
        width: channels of the finer stage.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8 * width)
        self.reduction = nn.Linear(8 * width, 2 * width, bias=False)

    def forward(self, x: Tensor, children: Move) -> Tensor:
        """(slots, batch, C) -> (slots of the next stage, batch, 2C); missing children are zero before the norm."""
        batch, width = x.shape[1:]
        joined = children(x.view(-1, width)).view(-1, batch, CHILDREN * width)
        out: Tensor = self.reduction(self.norm(joined))
        return out
