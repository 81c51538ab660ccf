"""What a model holds and costs, from its configuration alone: nothing is allocated."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from swiftv2.config.model import LossConfig, MaskConfig, ModelConfig
from swiftv2.models.flops import forward_flops
from swiftv2.models.simmim import SimMIM


@dataclass(frozen=True)
class ModelPlan:
    """Size and cost of a model; encoder and decoder are told apart."""

    model: str
    """Name of the preset."""
    encoder_parameters: int
    """Parameters of the encoder, position tables and final norm counted, the mask token not."""
    decoder_parameters: int
    """Parameters of the SimMIM decoder."""
    forward_flops_per_clip: dict[str, int]
    """FLOPs of one clip: `patch_embed`, `stage_1`..., `encoder` (their sum), `decoder`, `total`."""

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return asdict(self)

    def to_json(self) -> str:
        """The plan as one JSON object."""
        return json.dumps(self.to_dict())


def plan_model(config: ModelConfig) -> ModelPlan:
    """Count the parameters of a model and the FLOPs of one clip of its configured grid and length."""
    with torch.device("meta"):
        model = SimMIM(config, MaskConfig(patch_size=config.patch_size), LossConfig())
    return ModelPlan(config.name, _parameters(model.encoder), _parameters(model.decoder), forward_flops(config))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
