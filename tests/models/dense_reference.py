"""Swin4D written out without windows, gathers or buckets: every token, one attention matrix over the whole grid.

Which token may attend to which is worked out from coordinates, key by key: same window of the shifted, padded grid, with
-100 on the logit across its regions; keys that do not count are left out.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from swiftv2.models import Swin4D

Grid = tuple[int, ...]


def reference(model: Swin4D, volume: Tensor, kept: Tensor, hidden: Tensor | None = None, token: Tensor | None = None) -> Tensor:
    """Features (B, C_last, h, w, d, t) of the last stage, 0 where no child was kept.

    Args:
        model: whose weights and configuration are taken (unified or decoupled).
        volume: (B, C, H, W, D, T).
        kept: (B, h, w, d, t) bool: tokens of the first stage that exist.
        hidden: (B, h, w, d, t) bool: embeddings that `token` replaces.
        token: (E,).
    """
    config = model.config
    ph, pw, pd, pt = config.patch_size
    sizes = [-(-n // p) for n, p in zip(volume.shape[2:], config.patch_size, strict=True)]
    missing = [p * s - n for n, p, s in zip(volume.shape[2:], config.patch_size, sizes, strict=True)]
    volume = functional.pad(volume, [m for one in reversed(missing) for m in (0, one)])
    cells = [
        volume[:, :, h * ph : (h + 1) * ph, w * pw : (w + 1) * pw, d * pd : (d + 1) * pd, t * pt : (t + 1) * pt]
        for h, w, d, t in itertools.product(*map(range, sizes))
    ]
    patches = torch.stack([cell.movedim(1, -1).flatten(1) for cell in cells], 1)
    x = model.patch_embed.fc(patches)
    exists = kept.flatten(1)
    if hidden is not None and token is not None:
        x = torch.where(hidden.flatten(1)[..., None], token, x)
    grid: Grid = tuple(sizes)
    layers: list[Any] = list(model.layers)
    tables: list[Any] = list(model.pos_embeds)
    for stage, layer in enumerate(layers):
        if config.absolute_position:
            table = tables[stage]
            place = table.pos_embed[0].movedim(0, -1).expand(*grid, -1)
            if table.with_time:
                place = place + table.time_embed[0, :, 0, 0, 0, : grid[3]].T
            x = x + place.reshape(1, -1, place.shape[-1])
        for index, block in enumerate(layer.blocks):
            window = list(config.first_window_size if stage == 0 else config.window_size)
            full = config.last_layer_full_msa and stage == len(config.depths) - 1
            if full:
                window = [*grid[:3], config.window_size[3]]
            odd = index % 2 == 1
            if config.variant == "decoupled":
                steps = (
                    (block.temporal_norm, block.temporal_attn, block.temporal_scale, [1, 1, 1, window[3]], odd, (3,)),
                    (
                        block.spatial_norm,
                        block.spatial_attn,
                        block.spatial_scale,
                        [*window[:3], 1],
                        odd and not full,
                        (0, 1, 2),
                    ),
                )
                for norm, attention, scale, cut, shifted, axes in steps:
                    x = x + scale(_attend(attention, norm(x), grid, cut, shifted, exists, (axes, config.rope_theta)))
            else:
                x = x + _attend(block.attn, block.norm1(x), grid, window, odd and not full, exists, None)
            x = x + block.mlp(block.norm2(x))
        if layer.downsample is not None:
            x, exists, grid = _merge(layer.downsample, x, exists, grid)
    x = torch.where(exists[..., None], model.norm(x), 0.0)
    return x.transpose(1, 2).reshape(len(volume), -1, *grid)


def _attend(
    attention: Any,
    x: Tensor,
    grid: Grid,
    window: list[int],
    shifted: bool,
    exists: Tensor,
    rotary: tuple[tuple[int, ...], float] | None,
) -> Tensor:
    tokens = list(itertools.product(*map(range, grid)))
    batch, count, width = x.shape
    heads = attention.heads
    head_dim = width // heads
    query, key, value = attention.qkv(x).view(batch, count, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    if rotary is not None:
        query, key = (_rotated(one, tokens, *rotary) for one in (query, key))
    logits = query @ key.transpose(-1, -2) / math.sqrt(head_dim)
    places = torch.tensor([_place(token, grid, window, shifted) for token in tokens])
    same_window, same_region = ((p[:, None] == p[None]).all(-1) for p in places.unbind(1))
    logits = logits + torch.where(same_region, 0.0, -100.0)
    visible = same_window[None, None] & exists[:, None, None, :]
    # Rows of tokens that are not there may see nothing at all; they are of no meaning.
    weights = torch.nan_to_num(logits.masked_fill(~visible, -torch.inf).softmax(-1))
    out: Tensor = attention.proj((weights @ value).transpose(1, 2).reshape(batch, count, width))
    return out


def _place(token: Grid, grid: Grid, window: list[int], shifted: bool) -> tuple[Grid, Grid]:
    """Window and region of a token: the grid is padded to whole windows and rolled by half a window."""
    windows, regions = [], []
    for position, size, wanted in zip(token, grid, window, strict=True):
        cut = min(size, wanted)
        shift = cut // 2 if shifted and size > wanted else 0
        padded = -(-size // cut) * cut
        rolled = (position - shift) % padded
        windows.append(rolled // cut)
        regions.append(0 if not shift or rolled < padded - cut else 1 if rolled < padded - shift else 2)
    return tuple(windows), tuple(regions)


def _rotated(x: Tensor, tokens: list[Grid], axes: tuple[int, ...], theta: float) -> Tensor:
    """(B, heads, N, head_dim), pair by pair turned by position times theta ** -(pair / pairs)."""
    pairs = x.shape[-1] // (2 * len(axes))
    out = x.clone()
    for which, axis in enumerate(axes):
        position = torch.tensor([token[axis] for token in tokens], dtype=x.dtype)
        for pair in range(pairs):
            angle = position * theta ** -(pair / pairs)
            even = 2 * (which * pairs + pair)
            a, b = x[..., even], x[..., even + 1]
            out[..., even], out[..., even + 1] = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return out


def _merge(merging: Any, x: Tensor, exists: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Grid]:
    coarse = (*(-(-n // 2) for n in grid[:3]), grid[3])
    index = {token: i for i, token in enumerate(itertools.product(*map(range, grid)))}
    parents, there = [], []
    for h, w, d, t in itertools.product(*map(range, coarse)):
        children, some = [], torch.zeros_like(exists[:, 0])
        for i, j, k in itertools.product(range(2), repeat=3):
            child = index.get((2 * h + i, 2 * w + j, 2 * d + k, t))
            if child is None:
                children.append(torch.zeros_like(x[:, 0]))
            else:
                children.append(torch.where(exists[:, child, None], x[:, child], 0.0))
                some = some | exists[:, child]
        parents.append(torch.cat(children, -1))
        there.append(some)
    return merging.reduction(merging.norm(torch.stack(parents, 1))), torch.stack(there, 1), coarse
