"""Decoders: the last stage's features back to voxels, by pixel shuffle."""

import math

from torch import Tensor, nn
from torch.nn import functional

from swiftv2.config.model import ModelConfig
from swiftv2.models.geometry import Grid, as_grid
from swiftv2.models.mup import Readout


def expansion(config: ModelConfig) -> Grid:
    """Voxels and frames (H, W, D, T) that one token of the last stage stands for."""
    merged = 2 ** (len(config.depths) - 1)
    h, w, d, t = config.patch_size
    return h * merged, w * merged, d * merged, t


def pixel_shuffle(x: Tensor, factors: Grid) -> Tensor:
    """(B, h, w, d, t, fH*fW*fD*fT*C) -> (B, C, h*fH, w*fW, d*fD, t*fT); the channel is the fastest of the flat axis."""
    x = x.reshape(*x.shape[:5], *factors, -1).permute(0, 9, 1, 5, 2, 6, 3, 7, 4, 8)
    batch, channels = x.shape[:2]
    sizes = as_grid([x.shape[i] * x.shape[i + 1] for i in (2, 4, 6, 8)])
    return x.reshape(batch, channels, *sizes)


class LinearDecoder(nn.Module):
    """SimMIM's own: one linear layer, then a pixel shuffle."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.factors = expansion(config)
        self.expand = Readout(width, math.prod(self.factors) * config.in_channels, config.width_multiplier)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C_last, h, w, d, t) -> (B, C, H, W, D, T) of the padded clip."""
        return pixel_shuffle(self.expand(features.permute(0, 2, 3, 4, 5, 1)), self.factors)


class MLPDecoder(nn.Module):
    """A hidden layer and a GELU before the linear layer and its pixel shuffle."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.factors = expansion(config)
        hidden = hidden_width(config, width)
        self.hidden = nn.Linear(width, hidden)
        self.expand = Readout(hidden, math.prod(self.factors) * config.in_channels, config.width_multiplier)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C_last, h, w, d, t) -> (B, C, H, W, D, T) of the padded clip."""
        hidden = functional.gelu(self.hidden(features.permute(0, 2, 3, 4, 5, 1)))
        return pixel_shuffle(self.expand(hidden), self.factors)


class FactorizedDecoder(nn.Module):
    """Time first (an MLP and a 1-D shuffle), then space (a linear layer and a 3-D shuffle): the costs add up."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        h, w, d, self.frames = expansion(config)
        self.factors = (h, w, d, 1)
        hidden = hidden_width(config, width)
        self.temporal_hidden = nn.Linear(width, hidden)
        self.temporal_expand = nn.Linear(hidden, width * self.frames)
        self.spatial_expand = Readout(width, h * w * d * config.in_channels, config.width_multiplier)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C_last, h, w, d, t) -> (B, C, H, W, D, T) of the padded clip."""
        x = self.temporal_expand(functional.gelu(self.temporal_hidden(features.permute(0, 2, 3, 4, 5, 1))))
        x = x.reshape(*x.shape[:5], self.frames, -1).flatten(4, 5)
        return pixel_shuffle(self.spatial_expand(x), self.factors)


def hidden_width(config: ModelConfig, width: int) -> int:
    """Channels of the hidden layer of the mlp and factorized decoders."""
    return max(round(config.decoder.hidden_ratio * width), 1)


def make_decoder(config: ModelConfig, width: int) -> nn.Module:
    """The configured decoder for an encoder whose last stage has that width."""
    kinds = {"linear": LinearDecoder, "mlp": MLPDecoder, "factorized": FactorizedDecoder}
    return kinds[config.decoder.kind](config, width)
