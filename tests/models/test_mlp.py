"""The MLP keeps one hidden layer for its backward pass, and gives autograd's gradients."""

import pytest
import torch
from torch.nn import functional

from swiftv2.models import mlp
from swiftv2.models.mlp import MLP


@pytest.mark.parametrize("rows", [1, 7, 8, 1000])
def test_gradients_are_autograds(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are taken at a time, the last ones fewer."""
    monkeypatch.setattr(mlp, "CHUNK_BYTES", rows * 20 * 8)
    torch.manual_seed(0)
    model = MLP(5, 20).double()
    x = torch.randn(4, 9, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, *model.parameters()]
    expected = functional.linear(
        functional.gelu(functional.linear(x, model.linear1.weight, model.linear1.bias)),
        model.linear2.weight,
        model.linear2.bias,
    )
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    weight = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_one_hidden_layer_is_kept() -> None:
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = MLP(6, 24)(torch.randn(50, 6, requires_grad=True))
    assert out.requires_grad
    assert [tuple(t.shape) for t in kept if t.shape[0] == 50] == [(50, 6), (50, 24)]


def test_bf16_and_autocast_give_gradients_in_the_weights_format() -> None:
    exact, rounded, cast = MLP(8, 32), MLP(8, 32).bfloat16(), MLP(8, 32)
    rounded.load_state_dict(exact.state_dict())
    cast.load_state_dict(exact.state_dict())
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    exact(x).sum().backward()
    rounded(x.bfloat16()).float().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        cast(x).float().sum().backward()
    for name, parameter in exact.named_parameters():
        for other in (rounded, cast):
            gradient = dict(other.named_parameters())[name].grad
            assert gradient is not None
            assert parameter.grad is not None
            assert gradient.dtype == dict(other.named_parameters())[name].dtype
            assert (gradient.float() - parameter.grad).norm() < 0.02 * parameter.grad.norm()
