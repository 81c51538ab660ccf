"""Attention takes a fused kernel or none, on every layout that models make."""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from swiftv2.config.model import ModelConfig
from swiftv2.models import Swin4D
from swiftv2.models.attention import GroupAttention
from swiftv2.models.blocks import compile_blocks
from swiftv2.models.routes import Layout

FUSED = ("flash_attention", "efficient_attention", "cudnn_attention")
SLOW = ("_math", "aten::softmax", "aten::_softmax", "aten::bmm")
CASES: dict[str, dict[str, Any]] = {
    "v1": {"variant": "swift_v1", "image_size": (8, 8, 8), "frames": 5, "patch_size": (2, 2, 2, 1)},
    "unified": {"variant": "unified"},
    "decoupled": {"variant": "decoupled"},
    "template": {"variant": "unified", "packing": "template"},
    "subject": {"variant": "unified", "packing": "subject"},
}


def model_of(case: str, **changes: Any) -> Swin4D:
    tree: dict[str, Any] = {
        "name": "small",
        "image_size": (10, 8, 6),
        "frames": 6,
        "embed_dim": 12,
        "depths": (2, 2),
        "num_heads": (2, 2),
        "patch_size": (2, 2, 2, 1),
        "window_size": (2, 2, 2, 4),
        "first_window_size": (3, 3, 3, 4),
    }
    model = Swin4D(ModelConfig.model_validate(tree | CASES[case] | changes))
    if case == "template":
        model.use_template(brain_of(model)[0])
    return model


def brain_of(model: Swin4D) -> torch.Tensor:
    return torch.rand(2, *model.config.image_size, generator=torch.Generator().manual_seed(2)) < 0.1


def clip_of(model: Swin4D) -> torch.Tensor:
    shape = (2, 1, *model.config.image_size, model.config.frames)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_only_fused_kernels_run(case: str, dtype: torch.dtype) -> None:
    """Whole attention matrices, and with them the softmax of the slow path, are nowhere in a forward and backward pass."""
    model = model_of(case).to(dtype)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        model(clip_of(model), brain=brain_of(model)).float().square().sum().backward()
    names = [event.name for event in seen.events() or ()]
    kernels = [name for name in names if any(word in name for word in FUSED)]
    assert any("backward" in name for name in kernels)
    assert any("backward" not in name for name in kernels)
    assert not [name for name in names if any(word in name for word in SLOW)]


def test_the_slow_path_is_refused_rather_than_taken() -> None:
    """No fused kernel gives a gradient to a mask: asked for one, attention ends instead of going slowly."""
    attention = GroupAttention(12, 2, bias=True)
    bias = torch.zeros(3, 1, 1, 8, requires_grad=True)
    layout = Layout(((3, 8, bias),), None, None, None)
    with pytest.raises(RuntimeError, match="No available kernel"), pytest.warns(UserWarning, match="attention"):
        attention(torch.randn(24, 1, 12), layout)
    learned = Layout(((3, 8, bias.detach()),), None, None, None)
    assert attention(torch.randn(24, 1, 12), learned).shape == (24, 1, 12)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_cuda_agrees_with_the_cpu(case: str) -> None:
    """Head dimensions 6 and 12 are padded to 8 and 16 there; float32 products may round differently."""
    model = model_of(case)
    volume, brain = clip_of(model), brain_of(model)
    expected = model(volume, brain=brain)
    model.cuda()
    output = model(volume.cuda(), brain=brain.cuda())
    torch.testing.assert_close(output.cpu(), expected, atol=2e-4, rtol=1e-3)
    rounded = model.to(torch.bfloat16)(volume.cuda(), brain=brain.cuda()).float().cpu()
    error = (rounded - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("case", ["unified", "subject"])
def test_compiled_blocks_compute_the_same(case: str) -> None:
    model = model_of(case, depths=(2,), num_heads=(2,), checkpoint_stages=(0,))
    volume, brain = clip_of(model), brain_of(model)
    expected = model(volume, brain=brain)
    wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    compile_blocks(model, varying=case == "subject")
    output = model(volume, brain=brain)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    for found, gradient in zip(torch.autograd.grad(output.square().sum(), list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-4, rtol=1e-3)
