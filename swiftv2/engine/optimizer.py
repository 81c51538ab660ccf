"""AdamW in parameter groups: with decay and without, and by the multiple of the learning rate."""

from collections.abc import Collection, Mapping

import torch
from torch import nn

from swiftv2.config.model import OptimizerConfig
from swiftv2.errors import SwiftError

FACTOR = "lr_factor"
"""Key of a group: its learning rate as a multiple of the schedule's."""


def adamw(
    parameters: Mapping[str, nn.Parameter],
    decay: Collection[str],
    config: OptimizerConfig,
    rates: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW over all parameters; only those named in `decay` are decayed.

    PyTorch's own class, so that DeepSpeed need not compile one; one group for each pair of rate and decay, since ZeRO
    flattens and communicates each group by itself.

    Args:
        parameters: the trainable parameters by name, in the module's order.
        decay: names of the parameters that are decayed.
        config: peak learning rate, decay, betas, eps.
        rates: multiples of the learning rate of parameters that have one other than 1. What decay takes from them is left
            as it is: AdamW decays by rate times decay, so theirs is divided by the multiple.

    Raises:
        SwiftError: a name in `decay` or `rates` is no trainable parameter.
    """
    factors = dict(rates or {})
    for use, names in (("decay", set(decay)), ("set the rate of", factors.keys())):
        unknown = sorted(names - parameters.keys())
        if unknown:
            raise SwiftError(f"cannot {use} {unknown[0]}: no trainable parameter has this name")
    split: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in parameters.items():
        split.setdefault((factors.get(name, 1.0), name in decay), []).append(parameter)
    groups = [
        {"params": members, "weight_decay": config.weight_decay / factor if decayed else 0.0, FACTOR: factor}
        for (factor, decayed), members in split.items()
        if members
    ]
    fused = all(p.device.type == "cuda" for p in parameters.values())
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    set_learning_rate(optimizer, config.lr)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group: this one times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[FACTOR]
