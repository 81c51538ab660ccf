"""Attention within groups of tokens, by fused kernels only, and the rotary embeddings of the decoupled family."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from swiftv2.models.routes import Layout

HARDWARE_MULTIPLE = 8
"""CUDA's fused kernels take masks only at head dimensions that this divides; others are padded with zeros."""
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""Kernels that never hold a whole attention matrix. Where none of them can run, PyTorch refuses instead of going slowly.
cuDNN's is left out: it plans anew for every shape, and packed shapes vary."""


class GroupAttention(nn.Module):
    """Multi-head attention within the groups of a layout.

    Args:
        width: channels C.
        heads: attention heads; divides `width`.
        bias: whether queries, keys and values carry a bias.
        scale: what scores are multiplied by; 1 / sqrt(head dimension) when None.
    """

    def __init__(self, width: int, heads: int, bias: bool, scale: float | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5 if scale is None else scale
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(slots, batch, C) -> (slots, batch, C); what padded slots become is of no meaning."""
        slots, batch, width = x.shape
        # Three products rather than one: each result folds (batch, heads) into one axis without a copy.
        weights = self.qkv.weight.view(3, width, width).unbind(0)
        biases = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.view(3, width).unbind(0)
        query, key, value = (
            functional.linear(x, w, b).view(slots, batch * self.heads, width // self.heads)
            for w, b in zip(weights, biases, strict=True)
        )
        if layout.rotary is not None:
            query, key = rotate(query, *layout.rotary), rotate(key, *layout.rotary)
        out: Tensor = self.proj(_attend(query, key, value, layout, self.scale).view(slots, batch, width))
        return out


def _attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """Attention of (slots, batch * heads, head_dim) within each group of each bucket."""
    heads, head_dim = query.shape[1:]
    missing = -head_dim % HARDWARE_MULTIPLE if query.is_cuda else 0
    if missing:
        query, key, value = (functional.pad(x, (0, missing)) for x in (query, key, value))
    sizes = [groups * length for groups, length, _ in layout.buckets]
    parts = []
    with sdpa_kernel(FUSED):
        triples = zip(*(torch.split(x, sizes) for x in (query, key, value)), strict=True)
        for (groups, length, bias), triple in zip(layout.buckets, triples, strict=True):
            q, k, v = (x.view(groups, length, heads, -1).transpose(1, 2) for x in triple)
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
            parts.append(mixed.transpose(1, 2).reshape(groups * length, heads, -1))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out[..., :head_dim].contiguous() if missing else out


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of (slots, heads, head_dim) by angles (slots, 1, head_dim / 2), in float32 at least."""
    even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2).to(x.dtype)
