"""First values of every parameter, reproducible from a seed alone, and which of them weight decay touches."""

import torch
from torch import nn

from swiftv2.config.model import ModelConfig
from swiftv2.models.blocks import LayerScale
from swiftv2.models.mup import shrink

STD = 0.02


def initialise(module: nn.Module, config: ModelConfig, seed: int) -> None:
    """Set every parameter in place: truncated normal (std 0.02) for matrices, position tables and the mask token.

    Biases start at 0, layer norms at 1 and 0, layer scales at their configured value. The draws come from the seed
    alone, on the CPU, whatever the device. Under muP matrices from width to width have less spread. On the meta device
    nothing happens.

    Args:
        module: a model of this package.
        config: its width and parametrisation.
        seed: where the draws start.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for child in module.modules():
            for name, parameter in child.named_parameters(recurse=False):
                if not parameter.is_meta:
                    _fill(child, name, parameter, generator)
    shrink(module, config)


def _fill(owner: nn.Module, name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
    if isinstance(owner, LayerScale):
        parameter.fill_(owner.initial)
    elif isinstance(owner, nn.LayerNorm):
        parameter.fill_(1.0 if name == "weight" else 0.0)
    elif name == "bias":
        parameter.zero_()
    else:
        draw = torch.empty(parameter.shape, dtype=torch.float32)
        parameter.copy_(nn.init.trunc_normal_(draw, std=STD, generator=generator))


def decay_names(module: nn.Module) -> set[str]:
    """Names of the parameters that weight decay touches: the matrices of linear layers.

    Norms, biases, position tables, the mask token and layer scales are left alone.
    """
    return {
        f"{prefix}.weight" if prefix else "weight" for prefix, child in module.named_modules() if isinstance(child, nn.Linear)
    }
