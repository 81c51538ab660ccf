"""The MLP of a block, which keeps only its hidden layer for the backward pass."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK_BYTES = 4 * 2**20
"""On a CPU, rows are taken so many hidden bytes at a time: what is computed again then lies in the cache, not in memory."""


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        one, two = self.linear1, self.linear2
        rows = x.reshape(-1, x.shape[-1])
        out: Tensor = _KeepHidden.apply(rows, one.weight, one.bias, two.weight, two.bias)  # type: ignore[no-untyped-call]
        return out.view_as(x)


class _KeepHidden(torch.autograd.Function):
    """Autograd would keep the hidden layer twice, before and after its GELU; the GELU is computed again instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        """(rows, C) -> (rows, C)."""
        hidden = functional.linear(x, weight1, bias1)
        ctx.save_for_backward(x, hidden, weight1, weight2)
        parts = [functional.linear(functional.gelu(part), weight2, bias2) for part in torch.split(hidden, _rows(hidden))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the rows, and of both layers' weights and biases."""
        x, hidden, weight1, weight2 = ctx.saved_tensors
        # Under autocast, saved tensors and gradients have formats of their own.
        kind, rows = hidden.dtype, _rows(hidden)
        grad, inputs, first, second = (t.to(kind) for t in (grads[0], x, weight1, weight2))
        to_x, to_weights1, to_weights2, to_bias1 = [], [], [], []
        for part, upper, lower in zip(*(torch.split(t, rows) for t in (hidden, grad, inputs)), strict=True):
            to_weights2.append(upper.t() @ functional.gelu(part))
            inner = torch.ops.aten.gelu_backward(upper @ second, part)
            to_weights1.append(inner.t() @ lower)
            to_bias1.append(inner.sum(0))
            to_x.append(inner @ first)
        found = (torch.cat(to_x), _sum(to_weights1), _sum(to_bias1), _sum(to_weights2), grad.sum(0))
        kinds = (x.dtype, weight1.dtype, weight1.dtype, weight2.dtype, weight2.dtype)
        return tuple(one.to(kind) for one, kind in zip(found, kinds, strict=True))


def _rows(hidden: Tensor) -> int:
    """Rows taken at a time; all where kernels are large anyway, or where sums of parts would round in bf16."""
    if hidden.device.type != "cpu" or hidden.dtype == torch.bfloat16 or torch.compiler.is_compiling():
        return max(hidden.shape[0], 1)
    return max(CHUNK_BYTES // (hidden.element_size() * hidden.shape[1]), 1)


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total
