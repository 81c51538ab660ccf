"""SwiFT v1 reproduced: outputs and gradients of the published implementation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swiftv2.errors import SwiftError
from swiftv2.models import Swin4D

PARITY = Path(__file__).parents[1] / "data" / "parity"
FILES = ["swift_v1_padded_windows", "swift_v1_small_full_msa"]


def read(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    with np.load(PARITY / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    config = json.loads(str(arrays["config"]))
    del config["layout"]
    weights = {k.removeprefix("weights/"): torch.from_numpy(a) for k, a in arrays.items() if k.startswith("weights/")}
    return arrays, weights, config


@pytest.mark.parametrize("name", FILES)
def test_outputs_and_gradients_are_those_of_the_published_code(name: str) -> None:
    arrays, weights, config = read(name)
    model = Swin4D.from_swift_v1(weights, **config)
    output = model(torch.from_numpy(arrays["input"]).float())
    assert output.shape == arrays["output"].shape
    assert np.abs(output.detach().numpy() - arrays["output"]).max() < 2e-5
    (output * torch.from_numpy(arrays["output_cotangent"]).float()).sum().backward()
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(arrays["grad_norm_names"].tolist())
    for key, expected in zip(arrays["grad_norm_names"].tolist(), arrays["grad_norms"], strict=True):
        gradient = parameters[key].grad
        norm = 0.0 if gradient is None else float(gradient.double().norm())
        assert norm == pytest.approx(float(expected), rel=1e-4, abs=1e-12), key


def test_batch_order_does_not_matter() -> None:
    arrays, weights, config = read(FILES[0])
    model = Swin4D.from_swift_v1(weights, **config).eval()
    volume = torch.from_numpy(arrays["input"]).float()
    with torch.no_grad():
        torch.testing.assert_close(model(volume[1:]), model(volume)[1:], atol=1e-5, rtol=1e-5)


def test_wrappers_and_heads_are_dropped() -> None:
    arrays, weights, config = read(FILES[1])
    wrapped = {f"model.{key}": value for key, value in weights.items()}
    for head in ("output_head.fc.weight", "model.head.weight", "emb_mlp.0.bias", "head.bias"):
        wrapped[head] = torch.zeros(3)
    model = Swin4D.from_swift_v1(wrapped, **config).eval()
    with torch.no_grad():
        output = model(torch.from_numpy(arrays["input"]).float())
    assert np.abs(output.numpy() - arrays["output"]).max() < 2e-5


def test_arrays_of_any_byte_order_and_read_only_ones_are_taken(recwarn: pytest.WarningsRecorder) -> None:
    _, weights, config = read(FILES[1])
    expected = Swin4D.from_swift_v1(weights, **config).state_dict()
    for order in "<>":
        arrays = {key: np.asarray(value).astype(f"{order}f8") for key, value in weights.items()}
        for array in arrays.values():
            array.flags.writeable = False
        taken = Swin4D.from_swift_v1(arrays, **config).state_dict()
        assert all(torch.equal(taken[key], value) for key, value in expected.items())
    assert not recwarn.list


@pytest.mark.parametrize("key", ["last_layer_full_MSA", "num_heads", "window_size", "first_window_size"])
def test_what_weights_do_not_tell_is_not_guessed(key: str) -> None:
    _, weights, config = read(FILES[1])
    del config[key]
    with pytest.raises(SwiftError, match=key):
        Swin4D.from_swift_v1(weights, **config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_norm": True}, "patch_norm"),
        ({"c_multiplier": 1}, "c_multiplier"),
        ({"depth": 3}, "unknown keyword depth"),
        ({"depths": [2, 2, 4, 2]}, "missing layers.2.blocks.2"),
        ({"depths": [2, 2, 1, 2]}, "unknown layers.2.blocks.1"),
        ({"img_size": [96, 96, 96, 8]}, "shape"),
        ({"num_heads": [5, 3, 6, 6]}, "divisible"),
        ({"patch_size": [6, 6, 6, 2]}, "one frame"),
        ({"img_size": [42, 48, 48, 8]}, "cannot halve"),
        ({"window_size": 4}, "window_size=4 is one number"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    _, weights, config = read(FILES[1])
    with pytest.raises(SwiftError, match=message) as error:
        Swin4D.from_swift_v1(weights, **(config | change))
    assert "\n" not in str(error.value)
