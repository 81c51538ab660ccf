"""Features of every stage: the last is what forward gives, each is that of a model that ends there."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from swiftv2.config.model import ModelConfig
from swiftv2.models import Swin4D
from swiftv2.models.geometry import stage_grids
from swiftv2.models.heads import pooled_tokens

SETTINGS: dict[str, Any] = {
    "name": "small",
    "frames": 4,
    "embed_dim": 12,
    "depths": (2, 1, 2),
    "num_heads": (2, 2, 2),
    "patch_size": (2, 2, 2, 1),
    "window_size": (2, 2, 2, 4),
    "first_window_size": (3, 2, 2, 2),
}
CASES = [("swift_v1", "none"), *((v, p) for v in ("unified", "decoupled") for p in ("none", "template", "subject"))]


def made(variant: str, packing: str, **changes: Any) -> Swin4D:
    size = (8, 8, 8) if variant == "swift_v1" else (10, 7, 6)
    tree = SETTINGS | {"image_size": size, "variant": variant, "packing": packing} | changes
    model = Swin4D(ModelConfig.model_validate(tree)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    if packing == "template":
        model.use_template(brain(model)[0] | brain(model)[1])
    return model


def brain(model: Swin4D) -> Tensor:
    """Two brains, as (2, H, W, D) bool, that leave out different patches."""
    found = torch.zeros(2, *model.config.image_size, dtype=torch.bool)
    found[0, 1:7, 2:6, 1:5] = True
    found[1, 3:8, 1:3, 2:4] = True
    return found


def volume(model: Swin4D) -> Tensor:
    return torch.randn(2, 1, *model.config.image_size, 4, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("variant", "packing"), CASES)
def test_the_last_stage_is_what_forward_gives(variant: str, packing: str) -> None:
    model = made(variant, packing)
    with torch.no_grad():
        found, expected = model.stages(volume(model), brain(model)), model(volume(model), brain=brain(model))
    assert torch.equal(found[-1], expected)
    grids = stage_grids(model.config)
    assert [tuple(one.shape) for one in found] == [(2, 12 * 2**s, *grid) for s, grid in enumerate(grids)]


@pytest.mark.parametrize(("variant", "packing"), CASES)
def test_each_stage_is_that_of_a_model_that_ends_there(variant: str, packing: str) -> None:
    """But for the norm that such a model, if it is not SwiFT v1, puts behind its last stage."""
    model = made(variant, packing)
    own = model.state_dict()
    with torch.no_grad():
        found = model.stages(volume(model), brain(model))
    for stage, features in enumerate(found[:-1]):
        cut = {name: SETTINGS[name][: stage + 1] for name in ("depths", "num_heads")}
        shorter = made(variant, packing, **cut, last_layer_full_msa=False)
        tensors = {name: t if own[name].shape != t.shape else own[name] for name, t in shorter.state_dict().items()}
        shorter.load_state_dict(tensors)
        with torch.no_grad():
            expected = shorter(volume(model), brain=brain(model))
        if variant == "swift_v1":
            torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
            continue
        norm = shorter.norm
        normed = functional.layer_norm(features.movedim(1, -1), (features.shape[1],), norm.weight, norm.bias).movedim(-1, 1)
        computed = features.abs().sum(1, keepdim=True) > 0
        torch.testing.assert_close(torch.where(computed, normed, 0.0), expected, atol=1e-5, rtol=1e-5)


def test_packed_tokens_are_those_that_hold_brain() -> None:
    model = made("unified", "subject")
    with torch.no_grad():
        found = model.stages(volume(model), brain(model))
    for features in found:
        held = pooled_tokens(model.config, brain(model), features.shape[2:])
        assert torch.equal(features.abs().sum((1, 5)) > 0, held)
        assert held.flatten(1).any(1).all()
    assert not pooled_tokens(model.config, brain(model), found[0].shape[2:]).all()
