"""Blocks of the three families, patch merging, and stochastic depth without a running random state."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from swiftv2.config.model import ModelConfig
from swiftv2.models.attention import WindowAttention
from swiftv2.models.geometry import Grid, Partition


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
        """`x + branch`, both (batch * tokens, C); `uniform` (batch,) in [0, 1) or None for no dropping."""
        if uniform is None or self.probability == 0.0:
            return x + branch
        batch = uniform.shape[0]
        factor = (uniform >= self.probability).to(branch.dtype) / (1.0 - self.probability)
        return x + (branch.view(batch, -1, branch.shape[-1]) * factor[:, None, None]).view_as(branch)


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
        self.attn = WindowAttention(width, config.num_heads[stage], config.qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, cuts: list[Partition], uniforms: Tensor | None) -> Tensor:
        """(batch * tokens, C) -> the same; `uniforms` (batch, 2) or None."""
        attention, mlp = (None, None) if uniforms is None else uniforms.unbind(1)
        x = self.drop_path(x, self.attn(self.norm1(x), cuts[0]), attention)
        out: Tensor = self.drop_path(x, self.mlp(self.norm2(x)), mlp)
        return out


class DecoupledBlock(nn.Module):
    """d-SwiFT's block: attention in time, attention in space, the MLP, a pre-norm residual each."""

    branches: int = 3

    def __init__(self, config: ModelConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        width, heads = config.embed_dim * 2**stage, config.num_heads[stage]
        self.temporal_norm = nn.LayerNorm(width)
        self.temporal_attn = WindowAttention(width, heads, config.qkv_bias, config.rope_theta)
        self.temporal_scale = LayerScale(width, config.layer_scale_temporal)
        self.spatial_norm = nn.LayerNorm(width)
        self.spatial_attn = WindowAttention(width, heads, config.qkv_bias, config.rope_theta)
        self.spatial_scale = LayerScale(width, config.layer_scale_spatial)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, cuts: list[Partition], uniforms: Tensor | None) -> Tensor:
        """(batch * tokens, C) -> the same; `uniforms` (batch, 3) or None."""
        temporal, spatial, mlp = (None, None, None) if uniforms is None else uniforms.unbind(1)
        x = self.drop_path(x, self.temporal_scale(self.temporal_attn(self.temporal_norm(x), cuts[0])), temporal)
        x = self.drop_path(x, self.spatial_scale(self.spatial_attn(self.spatial_norm(x), cuts[1])), spatial)
        out: Tensor = self.drop_path(x, self.mlp(self.norm2(x)), mlp)
        return out


class PatchMerging(nn.Module):
    """Joins 2x2x2 neighbours in space into one token of twice the width; time stays.

    Args:
        width: channels of the finer stage.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8 * width)
        self.reduction = nn.Linear(8 * width, 2 * width, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(batch, h, w, d, t, C) -> (batch, ceil(h/2), ceil(w/2), ceil(d/2), t, 2C); missing children are zero."""
        h, w, d, t = grid
        if h % 2 or w % 2 or d % 2:
            x = functional.pad(x, (0, 0, 0, 0, 0, d % 2, 0, w % 2, 0, h % 2))
        batch, h, w, d, t, width = x.shape
        x = x.view(batch, h // 2, 2, w // 2, 2, d // 2, 2, t, width).permute(0, 1, 3, 5, 7, 2, 4, 6, 8)
        out: Tensor = self.reduction(self.norm(x.reshape(batch, h // 2, w // 2, d // 2, t, 8 * width)))
        return out
