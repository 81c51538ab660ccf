"""muP: settings tuned at one width hold at others.

Yang et al., "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer", NeurIPS 2021
(arXiv 2203.03466), table 8, for Adam. With m the width as a multiple of the base's, against the standard form:

- matrix-like (from width to width): first values have 1/sqrt(m) of the spread, the learning rate is 1/m;
- output-like (from width to a fixed size): the input is multiplied by 1/m;
- input-like and vector-like (patch embedding, norms, biases, position tables, mask token, layer scales): as they are;
- attention: scores are scaled by sqrt(base head dimension) / head dimension.

All stages scale together, so one m holds for all of them; at m = 1 it is the standard form.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from swiftv2.config.model import ModelConfig


class Readout(nn.Linear):
    """A linear layer from the model's width to something of fixed size.

    Args:
        width: channels that come in.
        outputs: numbers that go out.
        multiplier: the width as a multiple of the base's; 1 in the standard form.
    """

    def __init__(self, width: int, outputs: int, multiplier: float) -> None:
        super().__init__(width, outputs)
        self.multiplier = multiplier

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's own name)
        """(..., width) -> (..., outputs)."""
        return functional.linear(input if self.multiplier == 1.0 else input / self.multiplier, self.weight, self.bias)


class Embedding(nn.Linear):
    """A linear layer from something of fixed size to the model's width."""


class FixedWidth(nn.Module):
    """A part whose inner width does not scale with the model's: its linear layers are as in the standard form."""


def attention_scale(config: ModelConfig, stage: int) -> float:
    """What attention scores of a stage are multiplied by."""
    heads, width = config.num_heads[stage], config.embed_dim << stage
    base = config.base_embed_dim << stage if config.parametrisation == "mup" else width
    return math.sqrt(base / heads) * heads / width


def matrix_like(module: nn.Module) -> set[str]:
    """Names of the weights that map the model's width to itself."""
    fixed = [f"{name}." for name, child in module.named_modules() if isinstance(child, FixedWidth)]
    return {
        f"{name}.weight"
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear)
        and not isinstance(child, Readout | Embedding)
        and not any(name.startswith(prefix) for prefix in fixed)
    }


def learning_rates(module: nn.Module, config: ModelConfig) -> dict[str, float]:
    """Factors of the learning rate of the parameters that have one other than 1, by name.

    Args:
        module: holds a model of that configuration.
        config: width, base and parametrisation.
    """
    multiplier = config.width_multiplier
    return {} if multiplier == 1.0 else dict.fromkeys(sorted(matrix_like(module)), 1.0 / multiplier)


def shrink(module: nn.Module, config: ModelConfig) -> None:
    """Bring first values of the standard form to those of muP, in place."""
    multiplier = config.width_multiplier
    if multiplier == 1.0:
        return
    with torch.no_grad():
        for name in matrix_like(module):
            weight = module.get_parameter(name)
            if not weight.is_meta:
                weight.mul_(multiplier**-0.5)


def factors(config: ModelConfig) -> dict[str, object] | None:
    """What a reader of the weights must apply, as plain values for their card; None for the standard form.

    Returns:
        `base_embed_dim`; `attention_scale` of each stage; `readout_multiplier`, by which the decoder's last input is
        multiplied; `learning_rate_multiplier` of matrix-like weights, for further training.
    """
    if config.parametrisation == "standard":
        return None
    return {
        "base_embed_dim": config.base_embed_dim,
        "attention_scale": [attention_scale(config, stage) for stage in range(len(config.depths))],
        "readout_multiplier": 1.0 / config.width_multiplier,
        "learning_rate_multiplier": 1.0 / config.width_multiplier,
    }
