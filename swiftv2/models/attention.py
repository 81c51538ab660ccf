"""Window attention over gathered windows, and the rotary embeddings of the decoupled family."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from swiftv2.models.geometry import Grid, Partition, untraced, window_coordinates

HARDWARE_MULTIPLE = 8
"""CUDA's fused kernels take masks only at head dimensions that this divides; others are padded with zeros."""


class WindowAttention(nn.Module):
    """Multi-head attention within windows; every projection also sees the padded tokens, as SwiFT v1's did.

    Args:
        width: channels C.
        heads: attention heads; divides `width`.
        bias: whether queries, keys and values carry a bias.
        rotary_theta: base of the rotary embeddings over the window's axes longer than 1; None for none.
    """

    def __init__(self, width: int, heads: int, bias: bool, rotary_theta: float | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.rotary_theta = rotary_theta
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, rows: Tensor, cut: Partition) -> Tensor:
        """(batch * tokens, C) rows -> (batch * tokens, C) rows."""
        windows = cut.split(rows)
        count, length, batch, width = windows.shape
        # Three products rather than one: each result folds (batch, heads) into one axis without a copy.
        weights = self.qkv.weight.view(3, width, width).unbind(0)
        biases = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.view(3, width).unbind(0)
        query, key, value = (
            functional.linear(windows, w, b).view(count, length, batch * self.heads, width // self.heads).transpose(1, 2)
            for w, b in zip(weights, biases, strict=True)
        )
        if self.rotary_theta is not None:
            cosine, sine = rotary_tables(cut.spec.window, width // self.heads, self.rotary_theta, rows.device)
            query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        mixed = _attend(query, key, value, cut)
        return cut.join(self.proj(mixed.transpose(1, 2).reshape(count, length, batch, width)))


def _attend(query: Tensor, key: Tensor, value: Tensor, cut: Partition) -> Tensor:
    """Attention of (windows, batch * heads, length, head_dim); only windows that need a mask are given one."""
    head_dim = query.shape[-1]
    scale = head_dim**-0.5
    missing = -head_dim % HARDWARE_MULTIPLE if query.is_cuda else 0
    if missing:
        query, key, value = (functional.pad(x, (0, missing)) for x in (query, key, value))
    free, parts = cut.free_windows, []
    if free:
        parts.append(functional.scaled_dot_product_attention(query[:free], key[:free], value[:free], scale=scale))
    if cut.mask is not None:
        parts.append(
            functional.scaled_dot_product_attention(query[free:], key[free:], value[free:], attn_mask=cut.mask, scale=scale)
        )
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out[..., :head_dim] if missing else out


@untraced
@lru_cache(maxsize=64)
def rotary_tables(window: Grid, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, head_dim / 2), float32, of the positions inside a window.

    Attention sees differences of positions alone, and tokens of one region keep their distances inside a window, so
    positions inside the window stand for positions in the grid. A window in time rotates all channel pairs; a window in
    space gives each of its three axes `head_dim // 6` pairs and leaves the last `head_dim % 6` channels unrotated.
    """
    axes = (3,) if window[:3] == (1, 1, 1) else (0, 1, 2)
    pairs = head_dim // (2 * len(axes))
    frequencies = theta ** -(np.arange(pairs) / pairs)
    positions = window_coordinates(window)[:, axes]
    angles = np.zeros((len(positions), head_dim // 2))
    angles[:, : pairs * len(axes)] = (positions[:, :, None] * frequencies).reshape(len(positions), -1)
    with torch.inference_mode(mode=False):
        return (
            torch.from_numpy(np.cos(angles).astype(np.float32)).to(device),
            torch.from_numpy(np.sin(angles).astype(np.float32)).to(device),
        )


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of (..., length, head_dim) by the tables' angles, in float32."""
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2).to(x.dtype)
