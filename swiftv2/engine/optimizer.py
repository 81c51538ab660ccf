"""AdamW in two parameter groups: with decay, and without."""

from collections.abc import Collection, Mapping

import torch
from torch import nn

from swiftv2.config.model import OptimizerConfig
from swiftv2.errors import SwiftError


def adamw(parameters: Mapping[str, nn.Parameter], decay: Collection[str], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters; only those named in `decay` are decayed.

    PyTorch's own class, so that DeepSpeed need not compile one; at most two groups, since ZeRO flattens and
    communicates each group by itself.

    Args:
        parameters: the trainable parameters by name, in the module's order.
        decay: names of the parameters that are decayed.
        config: peak learning rate, decay, betas, eps.

    Raises:
        SwiftError: a name in `decay` is no trainable parameter.
    """
    unknown = sorted(set(decay) - set(parameters))
    if unknown:
        raise SwiftError(f"cannot decay {unknown[0]}: no trainable parameter has this name")
    split = {True: [], False: []}  # type: dict[bool, list[nn.Parameter]]
    for name, parameter in parameters.items():
        split[name in decay].append(parameter)
    groups = [
        {"params": members, "weight_decay": config.weight_decay if decayed else 0.0}
        for decayed, members in split.items()
        if members
    ]
    fused = all(p.device.type == "cuda" for p in parameters.values())
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
