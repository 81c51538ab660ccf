"""Reading SwiFT v1's keywords and state dicts, whatever training framework wrapped them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swiftv2.errors import SwiftError

REQUIRED = (
    "img_size",
    "embed_dim",
    "first_window_size",
    "window_size",
    "patch_size",
    "depths",
    "num_heads",
    "last_layer_full_MSA",
)
PER_AXIS_OR_STAGE = ("img_size", "patch_size", "first_window_size", "window_size", "depths", "num_heads")
DEFAULTS: dict[str, Any] = {
    "in_chans": 1,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "patch_norm": False,
    "c_multiplier": 2,
}
LIGHTNING_PREFIX = "model."
HEADS = ("output_head.", "model.head.", "emb_mlp.", "head.")


def v1_tree(config: Mapping[str, Any]) -> dict[str, Any]:
    """SwiFT v1's keywords as the plain values of a ModelConfig.

    Raises:
        SwiftError: a keyword is unknown, missing where it must not be guessed, or unsupported.
    """
    unknown = sorted(config.keys() - {*REQUIRED, *DEFAULTS})
    if unknown:
        raise SwiftError(
            f"SwiFT v1 configuration: unknown keyword {unknown[0]}; known are {', '.join(REQUIRED)} and {', '.join(DEFAULTS)}"
        )
    missing = [key for key in REQUIRED if config.get(key) is None]
    if missing:
        raise SwiftError(
            f"SwiFT v1 configuration: {', '.join(missing)} not given; weights do not tell these: take them from the "
            "checkpoint's hyper_parameters or from whoever trained it"
        )
    given = DEFAULTS | dict(config)
    for key in PER_AXIS_OR_STAGE:
        try:
            given[key] = tuple(given[key])
        except TypeError as error:
            raise SwiftError(
                f"SwiFT v1 configuration: {key}={given[key]!r} is one number; give one for each axis or stage"
            ) from error
    if given["patch_norm"]:
        raise SwiftError("SwiFT v1 configuration: patch_norm=True is not supported; no published model has that norm")
    if given["c_multiplier"] != 2:
        raise SwiftError(
            f"SwiFT v1 configuration: c_multiplier={given['c_multiplier']} is not supported; widths double at each stage"
        )
    if len(given["img_size"]) != 4 or len(given["patch_size"]) != 4:
        raise SwiftError("SwiFT v1 configuration: img_size and patch_size are (H, W, D, T), four numbers each")
    return {
        "name": "swift_v1",
        "variant": "swift_v1",
        "image_size": given["img_size"][:3],
        "frames": given["img_size"][3],
        "in_channels": given["in_chans"],
        "embed_dim": given["embed_dim"],
        "depths": given["depths"],
        "num_heads": given["num_heads"],
        "patch_size": given["patch_size"],
        "window_size": given["window_size"],
        "first_window_size": given["first_window_size"],
        "last_layer_full_msa": given["last_layer_full_MSA"],
        "mlp_ratio": given["mlp_ratio"],
        "qkv_bias": given["qkv_bias"],
    }


def encoder_tensors(state_dict: Mapping[str, Tensor | np.ndarray[Any, Any]]) -> dict[str, Tensor]:
    """The encoder's tensors under the names of this package, float32; wrappers' prefixes and heads are dropped."""
    tensors = {}
    for key, value in state_dict.items():
        if key.startswith(HEADS):
            continue
        name = key.removeprefix(LIGHTNING_PREFIX)
        if name.startswith(HEADS):
            continue
        # PyTorch takes no array of foreign byte order, and warns of read-only ones: numpy copies both.
        plain = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, dtype=np.float32))
        tensors[name] = plain.to(torch.float32)
    return tensors
