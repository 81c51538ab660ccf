"""Blocks of the three families, patch merging, and stochastic depth without a running random state."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from swiftv2.config.model import ModelConfig
from swiftv2.models.attention import GroupAttention
from swiftv2.models.routes import Layout, Move, Step
from swiftv2.models.tokens import CHILDREN


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        out: Tensor = self.linear2(functional.gelu(self.linear1(x)))
        return out


class DropPath(nn.Module):
    """Adds a branch to the residual, or leaves it out for whole samples; the draw is handed in.

    Args:
        probability: chance that a sample loses the branch; kept branches are scaled to keep the mean.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor, branch: Tensor, uniform: Tensor | None) -> Tensor:
        """`x + branch`, both (slots, batch, C); `uniform` (slots or 1, batch, 1) in [0, 1) or None for no dropping."""
        if uniform is None or self.probability == 0.0:
            return x + branch
        return x + branch * ((uniform >= self.probability).to(branch.dtype) / (1.0 - self.probability))


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

    def __init__(self, config: ModelConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        width = config.embed_dim * 2**stage
        self.norm1 = nn.LayerNorm(width)
        self.attn = GroupAttention(width, config.num_heads[stage], config.qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, steps: tuple[Step, ...], uniforms: Tensor | None) -> Tensor:
        """(slots, batch, C) -> (slots, batch, C) in the order of the step; `uniforms` (samples, 2) or None."""
        (step,) = steps
        x = _arrive(x, step)
        x = self.drop_path(x, self.attn(_normalised(self.norm1, x, step.layout), step.layout), _draw(uniforms, 0, step.layout))
        out: Tensor = self.drop_path(x, self.mlp(self.norm2(x)), _draw(uniforms, 1, step.layout))
        return out


class DecoupledBlock(nn.Module):
    """d-SwiFT's block: attention in time, attention in space, the MLP, a pre-norm residual each."""

    branches: int = 3

    def __init__(self, config: ModelConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        width, heads = config.embed_dim * 2**stage, config.num_heads[stage]
        self.temporal_norm = nn.LayerNorm(width)
        self.temporal_attn = GroupAttention(width, heads, config.qkv_bias)
        self.temporal_scale = LayerScale(width, config.layer_scale_temporal)
        self.spatial_norm = nn.LayerNorm(width)
        self.spatial_attn = GroupAttention(width, heads, config.qkv_bias)
        self.spatial_scale = LayerScale(width, config.layer_scale_spatial)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, steps: tuple[Step, ...], uniforms: Tensor | None) -> Tensor:
        """(slots, batch, C) -> (slots, batch, C) in the order of the last step; `uniforms` (samples, 3) or None."""
        in_time, in_space = steps
        x = _arrive(x, in_time)
        mixed = self.temporal_attn(_normalised(self.temporal_norm, x, in_time.layout), in_time.layout)
        x = _arrive(self.drop_path(x, self.temporal_scale(mixed), _draw(uniforms, 0, in_time.layout)), in_space)
        mixed = self.spatial_attn(_normalised(self.spatial_norm, x, in_space.layout), in_space.layout)
        x = self.drop_path(x, self.spatial_scale(mixed), _draw(uniforms, 1, in_space.layout))
        out: Tensor = self.drop_path(x, self.mlp(self.norm2(x)), _draw(uniforms, 2, in_space.layout))
        return out


def compile_blocks(module: nn.Module, *, varying: bool = False) -> None:
    """Let torch.compile compile every block of a model, in place; the first passes then take minutes.

    Args:
        module: holds blocks.
        varying: whether the numbers of tokens change from batch to batch, so that kernels take them as they come.

    Raises:
        RuntimeError: in the first pass, where a block cannot be compiled whole.
    """
    # One code for all blocks meets two shifts of four stages and both modes: more than the default allows, and beyond its
    # limit PyTorch would go on uncompiled.
    torch._dynamo.config.recompile_limit = 256  # noqa: SLF001 (the documented way)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # noqa: SLF001
    for child in module.modules():
        if isinstance(child, Block | DecoupledBlock):
            child.compile(fullgraph=True, dynamic=varying)


def _arrive(x: Tensor, step: Step) -> Tensor:
    return x if step.move is None else step.move(x)


def _draw(uniforms: Tensor | None, branch: int, layout: Layout) -> Tensor | None:
    """Each sample's draw for a branch, beside its slots."""
    if uniforms is None:
        return None
    drawn = uniforms[:, branch]
    return drawn[None, :, None] if layout.sample is None else drawn[layout.sample][:, None, None]


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
