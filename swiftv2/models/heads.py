"""From an encoder's tokens to predictions: pooling, a head, and the two put on an encoder."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from swiftv2.config.finetune import HeadConfig
from swiftv2.config.model import ModelConfig
from swiftv2.models.geometry import patches_with_brain
from swiftv2.models.initialise import initialise
from swiftv2.models.swin4d import Swin4D


def pooled_tokens(config: ModelConfig, brain: Tensor, grid: Sequence[int]) -> Tensor:
    """Which tokens of a stage a mean over a clip counts.

    Those that hold any brain voxel; for variant=swift_v1 all, as the published model averages over its whole grid.

    Args:
        config: of the encoder.
        brain: (B, H, W, D) bool.
        grid: tokens (h, w, d, t) of the stage.

    Returns:
        (B, h, w, d) bool.
    """
    if config.variant == "swift_v1":
        return brain.new_ones((len(brain), *grid[:3]))
    held = patches_with_brain(brain, config.patch_size)
    for _ in config.depths:
        if tuple(held.shape[1:]) == tuple(grid[:3]):
            break
        held = patches_with_brain(held, (2, 2, 2))
    return held


class Pool(nn.Module):
    """Over the tokens of a clip, in float32.

    Args:
        kind: mean; mean_std, the mean and the deviation over tokens; attention, a mean weighted by a learned score.
        width: channels of a token.
    """

    def __init__(self, kind: Literal["mean", "mean_std", "attention"], width: int) -> None:
        super().__init__()
        self.kind = kind
        self.width = 2 * width if kind == "mean_std" else width
        if kind == "attention":
            self.score = nn.Linear(width, 1)

    def forward(self, features: Tensor, counted: Tensor) -> Tensor:
        """(B, C, h, w, d, t) and (B, h, w, d) bool -> (B, `width`); all times count."""
        tokens = features.flatten(2).transpose(1, 2).float()
        held = counted[..., None].expand(*counted.shape, features.shape[-1]).flatten(1)
        if self.kind == "attention":
            # A head in bf16 scores in bf16; what is summed stays in float32.
            score = self.score(tokens.to(self.score.weight.dtype)).squeeze(-1).float()
            return torch.einsum("bn,bnc->bc", torch.softmax(score.masked_fill(~held, -torch.inf), dim=1), tokens)
        share = held.float() / held.sum(dim=1, keepdim=True)
        mean = torch.einsum("bn,bnc->bc", share, tokens)
        if self.kind == "mean":
            return mean
        square = torch.einsum("bn,bnc->bc", share, (tokens - mean[:, None]).square())
        return torch.cat((mean, torch.sqrt(square + 1e-6)), dim=1)


class Head(nn.Module):
    """From pooled features to outputs: a norm, dropout, and one linear layer or two.

    Args:
        config: kind, norm, hidden width, dropout.
        width: features.
        outputs: numbers that go out.
    """

    def __init__(self, config: HeadConfig, width: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if config.norm else None
        self.dropout = config.dropout
        self.hidden = nn.Linear(width, config.hidden) if config.kind == "mlp" else None
        self.out = nn.Linear(config.hidden if config.kind == "mlp" else width, outputs)

    def forward(self, x: Tensor, draws: Tensor | None = None) -> Tensor:
        """(B, width) float32 -> (B, outputs) float32.

        Args:
            x: pooled features.
            draws: (B, width) uniform in [0, 1), by which features are dropped in training.
        """
        x = x.to(self.out.weight.dtype)
        if self.norm is not None:
            x = self.norm(x)
        if self.training and self.dropout > 0 and draws is not None:
            x = x * (draws >= self.dropout).to(x) / (1 - self.dropout)
        if self.hidden is not None:
            x = functional.gelu(self.hidden(x))
        out: Tensor = self.out(x)
        return out.float()


class Predictor(nn.Module):
    """An encoder with a pooling and a head.

    Args:
        encoder: a Swin4D, pretrained or not.
        config: pooling and head.
        outputs: numbers that are predicted of a clip.
        seed: where the head's first values come from.
    """

    def __init__(self, encoder: Swin4D, config: HeadConfig, outputs: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.pool = Pool(config.pool, encoder.width)
        self.head = Head(config, self.pool.width, outputs)
        # The head is small and of no family of widths: its first values are those of the standard form.
        standard = encoder.config.model_copy(update={"parametrisation": "standard"})
        for part in (self.pool, self.head):
            initialise(part, standard, seed)

    def forward(self, volume: Tensor, brain: Tensor, drop_path: Tensor | None = None, dropout: Tensor | None = None) -> Tensor:
        """Predict of clips.

        Args:
            volume: (B, C, H, W, D, T).
            brain: (B, H, W, D) bool.
            drop_path: see `Swin4D.forward`.
            dropout: see `Head.forward`.

        Returns:
            (B, outputs) float32.
        """
        features = self.encoder(volume, drop_path, brain=brain)
        counted = pooled_tokens(self.encoder.config, brain, features.shape[2:])
        return self.head(self.pool(features, counted), dropout)  # type: ignore[no-any-return]
