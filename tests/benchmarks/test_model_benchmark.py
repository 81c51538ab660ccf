"""The yardstick of the model benchmark computes the published function, and the benchmark writes a whole page."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import PublishedSwin4D

from swiftv2.config.load import build
from swiftv2.config.model import ModelConfig
from swiftv2.models import Swin4D
from swiftv2.models.swift_v1 import encoder_tensors, v1_tree

PARITY = Path(__file__).parents[1] / "data" / "parity"
FILES = ["swift_v1_padded_windows", "swift_v1_small_full_msa"]
PADDED: dict[str, Any] = {
    "name": "padded",
    "image_size": (24, 16, 8),
    "frames": 10,
    "embed_dim": 12,
    "depths": (2, 2, 1),
    "num_heads": (2, 3, 4),
    "patch_size": (2, 2, 2, 1),
    "window_size": (4, 4, 4, 4),
    "first_window_size": (5, 3, 4, 4),
    "last_layer_full_msa": True,
}
CHANGES: list[dict[str, Any]] = [
    {"variant": "swift_v1"},
    {"variant": "unified"},
    {"variant": "unified", "image_size": (10, 14, 6), "patch_size": (2, 2, 2, 2), "last_layer_full_msa": False},
    {"variant": "unified", "qkv_bias": False, "frames": 3},
]


@pytest.mark.parametrize("name", FILES)
def test_the_yardstick_gives_what_the_published_code_gives(name: str) -> None:
    with np.load(PARITY / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    keywords = json.loads(str(arrays["config"]))
    del keywords["layout"]
    model = PublishedSwin4D(build(ModelConfig, v1_tree(keywords), where="parity file"))
    weights = {key.removeprefix("weights/"): array for key, array in arrays.items() if key.startswith("weights/")}
    model.load_state_dict(encoder_tensors(weights))
    output = model(torch.from_numpy(arrays["input"]).float())
    assert np.abs(output.detach().numpy() - arrays["output"]).max() < 2e-5
    (output * torch.from_numpy(arrays["output_cotangent"]).float()).sum().backward()
    parameters = dict(model.named_parameters())
    for key, expected in zip(arrays["grad_norm_names"].tolist(), arrays["grad_norms"], strict=True):
        gradient = parameters[key].grad
        norm = 0.0 if gradient is None else float(gradient.double().norm())
        assert norm == pytest.approx(float(expected), rel=1e-4, abs=1e-12), key


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(map(str, changes)))
def test_the_yardstick_is_the_function_that_we_compute(changes: dict[str, Any]) -> None:
    config = ModelConfig.model_validate(PADDED | changes)
    ours, published = Swin4D(config), PublishedSwin4D(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    published.load_state_dict(ours.state_dict())
    volume = torch.randn(2, 1, *config.image_size, config.frames, generator=generator)
    outputs = [model(volume) for model in (ours, published)]
    assert outputs[0].abs().mean() > 0.1
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-5, rtol=0)
    weight = torch.randn(outputs[0].shape, generator=generator) / outputs[0].numel() ** 0.5
    for output in outputs:
        (output * weight).sum().backward()
    theirs = dict(published.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is None:
            assert theirs[name].grad is None
        else:
            torch.testing.assert_close(theirs[name].grad, parameter.grad, atol=2e-5, rtol=1e-4, msg=name)
