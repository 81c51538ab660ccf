"""FLOPs of the work really done are what PyTorch's counter sees of a real forward pass."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from swiftv2.config.load import load_model
from swiftv2.config.model import LossConfig, MaskConfig, ModelConfig
from swiftv2.errors import SwiftError
from swiftv2.models import SimMIM, VisibleOnly
from swiftv2.models.flops import computed_flops, forward_flops, visible_flops

TREE: dict[str, Any] = {
    "name": "odd",
    "image_size": (9, 11, 6),
    "frames": 7,
    "embed_dim": 12,
    "depths": (2, 1, 2),
    "num_heads": (2, 2, 2),
    "patch_size": (2, 3, 1, 2),
    "window_size": (3, 3, 3, 2),
    "first_window_size": (2, 4, 2, 3),
}


def seen(model: nn.Module, *inputs: Tensor) -> int:
    """FLOPs by PyTorch's counter, which knows CUDA's fused kernels but not that of the CPU."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: attention}) as counter, torch.no_grad():
        model(*inputs)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("packing", ["none", "template"])
@pytest.mark.parametrize("variant", ["unified", "decoupled"])
def test_computed_flops_are_those_of_a_real_pass(variant: str, packing: str) -> None:
    config = ModelConfig.model_validate(TREE | {"variant": variant, "packing": packing})
    model = SimMIM(config, MaskConfig(patch_size=config.patch_size), LossConfig())
    brain = torch.rand(config.image_size, generator=torch.Generator().manual_seed(1)) < 0.05
    template = None
    if packing == "template":
        model.encoder.use_template(brain)
        template = model.encoder.template.numpy()
        assert 0 < template.mean() < 1
    volume, hidden = torch.randn(1, 1, *config.image_size, 7), torch.zeros(1, 5, 4, 6, 4, dtype=torch.bool)
    counts = computed_flops(config, template)
    assert counts["total"] == seen(model, volume, hidden, brain[None])
    assert counts.keys() == forward_flops(config).keys()
    assert counts["total"] == counts["encoder"] + counts["decoder"]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("packing", ["none", "template", "subject"])
@pytest.mark.parametrize("variant", ["unified", "decoupled"])
def test_visible_flops_are_those_of_a_real_pass(variant: str, packing: str, skip: bool) -> None:
    tree = TREE | {"variant": variant, "packing": packing, "decoder": {"visible": {"width": 24, "depth": 2, "skip": skip}}}
    config = ModelConfig.model_validate(tree)
    model = VisibleOnly(config, MaskConfig(patch_size=config.patch_size), LossConfig())
    generator = torch.Generator().manual_seed(1)
    brain = torch.rand(2, *config.image_size, generator=generator) < 0.1
    if packing == "template":
        model.encoder.use_template(brain[0])
    volume, hidden = torch.randn(2, 1, *config.image_size, 7), torch.rand(2, 5, 4, 6, 4, generator=generator) < 0.6
    there = model.encoder.tokens(volume, brain)
    counts = visible_flops(config, (there & ~hidden).numpy(), there.numpy())
    assert 2 * counts["total"] == pytest.approx(seen(model, volume, hidden, brain), rel=1e-6)
    assert counts.keys() == forward_flops(config).keys()


@pytest.mark.parametrize("name", ["5M", "51M"])
def test_what_leaving_padding_and_background_out_saves(name: str) -> None:
    config = load_model(name)
    dense, published = computed_flops(config), forward_flops(config)
    assert dense["encoder"] <= published["encoder"]
    h, w, d = np.ogrid[-1:1:16j, -1:1:16j, -1:1:16j]
    packed = computed_flops(config, (h / 0.85) ** 2 + w**2 + (d / 0.8) ** 2 < 0.7)
    assert packed["stage_1"] < 0.5 * dense["stage_1"]
    assert packed["decoder"] == dense["decoder"]


def test_a_template_of_another_grid_is_refused() -> None:
    config = load_model("demo")
    with pytest.raises(SwiftError, match=r"\(8, 8, 8\)"):
        computed_flops(config, np.ones((16, 16, 16), dtype=np.bool_))
    with pytest.raises(SwiftError, match="0 of them with brain"):
        computed_flops(config, np.zeros((8, 8, 8), dtype=np.bool_))
