"""A small head that brings embeddings to a space shared with other modalities, such as those of genomes."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Projector(nn.Module):
    """Linear, GELU, dropout, linear, layer norm.

    Args:
        width: features of an embedding.
        hidden: width between the two layers.
        out: dimensions of the shared space.
        dropout: share of the hidden values that is dropped in training, by torch's running random state.
        unit: whether results have length 1, as contrastive losses compare directions; a scale would only change their
            temperature.
        seed: where the first values come from, and they alone.
    """

    def __init__(
        self, width: int, hidden: int = 1024, out: int = 512, dropout: float = 0.1, *, unit: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self.width, self.hidden, self.out, self.dropout, self.unit = width, hidden, out, dropout, unit
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, out), nn.LayerNorm(out)
            )

    def forward(self, embeddings: Tensor) -> Tensor:
        """(..., `width`) -> (..., `out`), in the number format of the weights."""
        dtype = next(self.parameters()).dtype
        projected: Tensor = self.layers(embeddings.to(dtype))
        return functional.normalize(projected, dim=-1) if self.unit else projected
