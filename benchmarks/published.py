"""The published formulation of SwiFT's encoder, as a yardstick: the same function as ours, computed as published.

Every forward pass of a stage builds its attention mask anew; the mask is added to each window's logits; the attention
matrix is held in memory three times over; windows are cut by a permute and a copy, shifted by `torch.roll`; padded tokens
are computed; merging joins eight strided slices; between stages the channels come first. Parameters have the names and
shapes of `swiftv2.models.Swin4D`, so that the same weights load into both.

SwiFT: Kim et al., "SwiFT: Swin 4D fMRI Transformer", NeurIPS 2023 (arXiv 2307.05916).
"""

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional

from swiftv2.config.model import ModelConfig

Sizes = tuple[int, int, int, int]
AXES = (1, 2, 3, 4)
"""(H, W, D, T) of a tensor with the channels last."""
REGION_PENALTY = -100.0


def sizes(values: Sequence[int]) -> Sizes:
    """Four sizes as a tuple."""
    h, w, d, t = values
    return h, w, d, t


def cut(x: Tensor, window: Sizes) -> Tensor:
    """(B, H, W, D, T, C) -> (B * windows, tokens of a window, C)."""
    batch, channels = x.shape[0], x.shape[-1]
    counts = [n // w for n, w in zip(x.shape[1:5], window, strict=True)]
    split = x.view(batch, *(size for pair in zip(counts, window, strict=True) for size in pair), channels)
    return split.permute(0, 1, 3, 5, 7, 2, 4, 6, 8, 9).contiguous().view(-1, math.prod(window), channels)


def join(windows: Tensor, window: Sizes, grid: Sizes) -> Tensor:
    """(B * windows, tokens of a window, C) -> (B, H, W, D, T, C)."""
    counts = [n // w for n, w in zip(grid, window, strict=True)]
    split = windows.view(-1, *counts, *window, windows.shape[-1])
    return split.permute(0, 1, 5, 2, 6, 3, 7, 4, 8, 9).contiguous().view(-1, *grid, windows.shape[-1])


def region_mask(padded: Sizes, window: Sizes, shift: Sizes, device: torch.device) -> Tensor:
    """(windows, tokens, tokens): -100 between tokens of different regions of the shifted grid, else 0."""
    regions = torch.zeros((1, *padded, 1), device=device)
    bounds = [(slice(-w), slice(-w, -s), slice(-s, None)) if s else (slice(None),) for w, s in zip(window, shift, strict=True)]
    for number, (h, w, d, t) in enumerate(product(*bounds)):
        regions[:, h, w, d, t, :] = number
    numbers = cut(regions, window).squeeze(-1)
    difference = numbers.unsqueeze(1) - numbers.unsqueeze(2)
    return difference.masked_fill(difference != 0, REGION_PENALTY).masked_fill(difference == 0, 0.0)


def padding_mask(grid: Sizes, padded: Sizes, window: Sizes, shift: Sizes, device: torch.device) -> Tensor:
    """(windows, 1, tokens): -inf on keys that are padding, else 0; the v2 family hides them, SwiFT v1 does not."""
    padding = torch.full((1, *padded, 1), -torch.inf, device=device)
    h, w, d, t = grid
    padding[:, :h, :w, :d, :t] = 0.0
    return cut(torch.roll(padding, [-s for s in shift], AXES), window).squeeze(-1).unsqueeze(1)


class Attention(nn.Module):
    """Multi-head attention within windows, its matrix written out."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B * windows, tokens, C) -> the same; `mask` (windows, tokens, tokens) is added to the logits of each head."""
        rows, tokens, width = x.shape
        query, key, value = self.qkv(x).reshape(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        logits = (query * self.scale) @ key.transpose(-2, -1)
        if mask is not None:
            windows = mask.shape[0]
            logits = logits.view(rows // windows, windows, self.heads, tokens, tokens) + mask.unsqueeze(1).unsqueeze(0)
            logits = logits.view(-1, self.heads, tokens, tokens)
        weights = self.softmax(logits).to(value.dtype)
        out: Tensor = self.proj((weights @ value).transpose(1, 2).reshape(rows, tokens, width))
        return out


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


class Block(nn.Module):
    """Window attention and MLP, a pre-norm residual each."""

    def __init__(self, width: int, heads: int, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, config.qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * config.mlp_ratio))

    def forward(self, x: Tensor, window: Sizes, shift: Sizes, mask: Tensor | None) -> Tensor:
        """(B, H, W, D, T, C) -> the same."""
        h, w, d, t = x.shape[1:5]
        branch = self.norm1(x)
        missing = [-n % size for n, size in zip((h, w, d, t), window, strict=True)]
        branch = functional.pad(branch, (0, 0, 0, missing[3], 0, missing[2], 0, missing[1], 0, missing[0]))
        padded = sizes(branch.shape[1:5])
        if any(shift):
            branch = torch.roll(branch, [-s for s in shift], AXES)
        branch = join(self.attn(cut(branch, window), mask), window, padded)
        if any(shift):
            branch = torch.roll(branch, shift, AXES)
        if any(missing):
            branch = branch[:, :h, :w, :d, :t].contiguous()
        x = x + branch
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Merging(nn.Module):
    """Joins the eight neighbours in space, each a strided slice, into one token of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8 * width)
        self.reduction = nn.Linear(8 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D, T, C) -> (B, ceil(H/2), ceil(W/2), ceil(D/2), T, 2C)."""
        h, w, d = x.shape[1:4]
        if h % 2 or w % 2 or d % 2:
            x = functional.pad(x, (0, 0, 0, 0, 0, d % 2, 0, w % 2, 0, h % 2))
        children = [x[:, i::2, j::2, k::2] for i, j, k in product(range(2), repeat=3)]
        out: Tensor = self.reduction(self.norm(torch.cat(children, dim=-1)))
        return out


class Stage(nn.Module):
    """The blocks of one resolution and the merging that ends it; channels come first on both ends."""

    def __init__(self, config: ModelConfig, stage: int) -> None:
        super().__init__()
        width, last = config.embed_dim * 2**stage, stage + 1 == len(config.depths)
        self.full = config.last_layer_full_msa and last
        self.window = config.first_window_size if stage == 0 else config.window_size
        self.hide_padding = config.variant != "swift_v1"
        self.blocks = nn.ModuleList([Block(width, config.num_heads[stage], config) for _ in range(config.depths[stage])])
        self.downsample = None if last else Merging(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W, D, T) -> the next stage's input.

        As published, the channels move to the end as a view alone: the residual stream of the whole stage keeps lying in
        memory with the channels first, and every norm and addition steps over it.
        """
        x = x.contiguous().permute(0, 2, 3, 4, 5, 1)
        grid = sizes(x.shape[1:5])
        wanted = (*grid[:3], self.window[3]) if self.full else self.window
        window = sizes([min(n, w) for n, w in zip(grid, wanted, strict=True)])
        half = sizes([w // 2 if n > w and not self.full else 0 for n, w in zip(grid, window, strict=True)])
        padded = sizes([-(-n // w) * w for n, w in zip(grid, window, strict=True)])
        masks = {shift: self._mask(grid, padded, window, shift, x.device) for shift in {half, (0, 0, 0, 0)}}
        for number, block in enumerate(self.blocks):
            shift = half if number % 2 else (0, 0, 0, 0)
            x = block(x, window, shift, masks[shift])
        if self.downsample is not None:
            x = self.downsample(x)
        return x.permute(0, 5, 1, 2, 3, 4)

    def _mask(self, grid: Sizes, padded: Sizes, window: Sizes, shift: Sizes, device: torch.device) -> Tensor | None:
        mask = region_mask(padded, window, shift, device) if any(shift) else None
        if self.hide_padding and padded != grid:
            hidden = padding_mask(grid, padded, window, shift, device)
            mask = hidden.expand(-1, hidden.shape[-1], -1) if mask is None else mask + hidden
        return mask


class PositionTables(nn.Module):
    """Learned embeddings of place and time, channels first."""

    def __init__(self, width: int, grid: Sizes) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, width, *grid[:3], 1))
        self.time_embed = nn.Parameter(torch.zeros(1, width, 1, 1, 1, grid[3]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W, D, T) plus the tables."""
        x = x + self.pos_embed
        return x + self.time_embed[..., : x.shape[-1]]


class PatchEmbed(nn.Module):
    """A reshape and a linear layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.fc = nn.Linear(math.prod(self.patch) * config.in_channels, config.embed_dim)

    def forward(self, volume: Tensor) -> Tensor:
        """(B, C, H, W, D, T), a multiple of the patch on every axis -> (B, E, h, w, d, t)."""
        batch, channels = volume.shape[:2]
        counts = [n // p for n, p in zip(volume.shape[2:], self.patch, strict=True)]
        split = volume.view(batch, channels, *(size for pair in zip(counts, self.patch, strict=True) for size in pair))
        patches = split.permute(0, 2, 4, 6, 8, 3, 5, 7, 9, 1).contiguous().view(batch, *counts, -1)
        out: Tensor = self.fc(patches)
        return out.permute(0, 5, 1, 2, 3, 4)


class PublishedSwin4D(nn.Module):
    """SwiFT v1's encoder, and u-SwiFT's, without dropping of any kind.

    Args:
        config: variant swift_v1 or unified. In unified models padded tokens are hidden from attention, which costs a mask
            in unshifted blocks too, and the final norm is applied.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        grid = [-(-n // p) for n, p in zip((*config.image_size, config.frames), config.patch_size, strict=True)]
        tables = []
        for stage in range(len(config.depths)):
            tables.append(PositionTables(config.embed_dim * 2**stage, sizes(grid)))
            grid = [*(-(-n // 2) for n in grid[:3]), grid[3]]
        self.pos_embeds = nn.ModuleList(tables)
        self.layers = nn.ModuleList([Stage(config, stage) for stage in range(len(config.depths))])
        self.norm = nn.LayerNorm(config.embed_dim * 2 ** (len(config.depths) - 1))

    def forward(self, volume: Tensor) -> Tensor:
        """(B, C, H, W, D, T) -> (B, C_last, h, w, d, t)."""
        x: Tensor = self.patch_embed(volume)
        for table, layer in zip(self.pos_embeds, self.layers, strict=True):
            x = layer(table(x))
        if self.config.variant != "swift_v1":
            x = self.norm(x.permute(0, 2, 3, 4, 5, 1)).permute(0, 5, 1, 2, 3, 4)
        return x
