"""Leaving the background out is exact: outputs and gradients equal those of a model that attends densely under a mask."""

from typing import Any

import numpy as np
import pytest
import torch
from dense_reference import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swiftv2.config.model import ModelConfig
from swiftv2.errors import SwiftError
from swiftv2.models import Swin4D

VARIANTS = ["unified", "decoupled"]


def config(variant: str, **changes: Any) -> ModelConfig:
    tree: dict[str, Any] = {
        "name": "small",
        "variant": variant,
        "image_size": (9, 6, 5),
        "frames": 6,
        "embed_dim": 12,
        "depths": (2, 2),
        "num_heads": (2, 2),
        "patch_size": (2, 2, 2, 1),
        "window_size": (2, 2, 2, 4),
        "first_window_size": (3, 2, 2, 4),
    }
    return ModelConfig.model_validate(tree | changes)


def lively(model: Swin4D, seed: int = 0) -> Swin4D:
    """float64, with parameters large enough that every one of them matters."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def clip(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(model: Swin4D, output: Tensor) -> dict[str, Tensor]:
    weight = clip(tuple(output.shape), 99)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad((output * weight).sum(), parameters, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found, strict=True)}


def assert_equal(model: Swin4D, output: Tensor, expected: Tensor) -> None:
    # Rotary tables are float32; everything else is float64.
    close = 1e-6 if model.config.variant == "decoupled" else 1e-10
    torch.testing.assert_close(output, expected, rtol=10 * close, atol=close)
    mine, theirs = gradients(model, output), gradients(model, expected)
    for name, gradient in mine.items():
        error = (gradient - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1.0)
        assert error < 100 * close, name


def tokens_of(brain: Tensor, model: Swin4D, frames: int) -> Tensor:
    """(B, h, w, d, t): tokens that hold any brain voxel, patch by patch."""
    patch = model.config.patch_size
    sizes = [-(-n // p) for n, p in zip((*brain.shape[1:], frames), patch, strict=True)]
    kept = torch.zeros(len(brain), *sizes, dtype=torch.bool)
    for b, h, w, d in np.argwhere(brain.numpy()):
        kept[b, h // patch[0], w // patch[1], d // patch[2]] = True
    return kept


masks = st.integers(0, 2**31)
shapes = st.tuples(st.integers(3, 9), st.integers(2, 6), st.integers(1, 5), st.integers(1, 6))


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    shape=shapes, seed=masks, share=st.sampled_from([0.02, 0.2, 0.6, 1.0]), buckets=st.integers(1, 8), batch=st.integers(1, 2)
)
@settings(max_examples=10, deadline=None)
def test_a_template_equals_dense_attention_under_a_mask(
    variant: str, shape: tuple[int, int, int, int], seed: int, share: float, buckets: int, batch: int
) -> None:
    """Random masks, odd grids and windows, shifts, clips that overhang their windows in time."""
    *size, frames = shape
    settled = config(variant, packing="template", image_size=tuple(size), frames=frames, attention_buckets=buckets)
    model = lively(Swin4D(settled), seed % 7)
    rng = np.random.default_rng(seed)
    brain = torch.from_numpy(rng.random(size) < share)
    brain[tuple(rng.integers(size))] = True
    model.use_template(brain)
    volume = clip((batch, 1, *shape), seed)
    kept = tokens_of(brain.expand(batch, -1, -1, -1), model, frames)
    assert_equal(model, model(volume), reference(model, volume, kept))


@pytest.mark.parametrize("variant", VARIANTS)
@given(shape=shapes, seed=masks, share=st.sampled_from([0.05, 0.4, 1.0]), batch=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_subjects_masks_equal_dense_attention_under_each_mask(
    variant: str, shape: tuple[int, int, int, int], seed: int, share: float, batch: int
) -> None:
    *size, frames = shape
    settled = config(variant, packing="subject", image_size=tuple(size), frames=frames)
    model = lively(Swin4D(settled), seed % 7)
    rng = np.random.default_rng(seed)
    brain = torch.from_numpy(rng.random((batch, *size)) < share)
    for one in brain:
        one[tuple(rng.integers(size))] = True
    volume = clip((batch, 1, *shape), seed)
    assert_equal(model, model(volume, brain=brain), reference(model, volume, tokens_of(brain, model, frames)))


@pytest.mark.parametrize("variant", VARIANTS)
@given(shape=shapes, seed=masks, batch=st.integers(1, 2))
@settings(max_examples=10, deadline=None)
def test_without_packing_every_token_counts(variant: str, shape: tuple[int, int, int, int], seed: int, batch: int) -> None:
    """Leaving regions out of a shifted window's softmax is what -100 on their logits comes to."""
    *size, frames = shape
    model = lively(Swin4D(config(variant, image_size=tuple(size), frames=frames)), seed % 7)
    volume = clip((batch, 1, *shape), seed)
    everywhere = torch.ones(batch, *size, dtype=torch.bool)
    assert_equal(model, model(volume), reference(model, volume, tokens_of(everywhere, model, frames)))


@pytest.mark.parametrize("packing", ["none", "template", "subject"])
def test_hidden_tokens_and_drop_path_are_the_same_packed(packing: str) -> None:
    model = lively(Swin4D(config("unified", packing=packing, drop_path=0.5))).train()
    brain = torch.rand(9, 6, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    if packing == "template":
        model.use_template(brain)
    own = brain.expand(2, -1, -1, -1)
    kept = tokens_of(own if packing != "none" else torch.ones_like(own), model, 6)
    volume, token = clip((2, 1, 9, 6, 5, 6), 3), clip((12,), 4)
    hidden = torch.rand(kept.shape, generator=torch.Generator().manual_seed(5)) < 0.6
    keep_all = torch.full((2, model.branches), 0.999)
    model.eval()
    output = model(volume, keep_all, hidden, token, own)
    assert_equal(model, output, reference(model, volume, kept, hidden, token))
    draws = torch.rand(2, model.branches, generator=torch.Generator().manual_seed(3))
    both = model.train()(volume, draws, hidden, token, own)
    alone = model(volume[1:], draws[1:], hidden[1:], token, own[1:])
    torch.testing.assert_close(both[1:], alone)
    assert not torch.allclose(both, output)


@pytest.mark.parametrize("packing", ["template", "subject"])
def test_background_voxels_outside_every_brain_token_change_nothing(packing: str) -> None:
    model = lively(Swin4D(config("unified", packing=packing)))
    brain = torch.zeros(9, 6, 5, dtype=torch.bool)
    brain[2:6, 2:4, :3] = True
    if packing == "template":
        model.use_template(brain)
    volume = clip((1, 1, 9, 6, 5, 6), 1)
    changed = volume.clone()
    changed[:, :, 6:] = 7.0
    first, second = (model(v, brain=brain[None]) for v in (volume, changed))
    assert torch.equal(first, second)
    assert bool(first.any())


def test_the_template_travels_with_the_weights() -> None:
    model = Swin4D(config("unified", packing="template"))
    brain = torch.zeros(9, 6, 5, dtype=torch.bool)
    brain[3:7, 1:4, 2:] = True
    model.use_template(brain)
    other = Swin4D(config("unified", packing="template"), seed=3)
    other.use_template(~brain)
    volume = torch.randn(1, 1, 9, 6, 5, 6)
    assert not torch.equal(other(volume), model(volume))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(volume), model(volume))


def test_packing_without_a_mask_is_refused() -> None:
    volume = torch.zeros(1, 1, 9, 6, 5, 6)
    with pytest.raises(SwiftError, match="no template mask yet"):
        Swin4D(config("unified", packing="template"))(volume)
    with pytest.raises(SwiftError, match="needs a brain mask of each clip"):
        Swin4D(config("unified", packing="subject"))(volume)
    with pytest.raises(SwiftError, match="no brain voxel"):
        Swin4D(config("unified", packing="subject"))(volume, brain=torch.zeros(1, 9, 6, 5, dtype=torch.bool))
    with pytest.raises(SwiftError, match="does not fit"):
        Swin4D(config("unified", packing="template")).use_template(torch.ones(9, 6, 6, dtype=torch.bool))
    with pytest.raises(SwiftError, match=r"needs model\.packing=template"):
        Swin4D(config("unified")).use_template(torch.ones(9, 6, 5, dtype=torch.bool))


def test_swift_v1_refuses_packing() -> None:
    with pytest.raises(ValueError, match="only packing=none is exact"):
        config("swift_v1", packing="template", image_size=(8, 8, 8))
