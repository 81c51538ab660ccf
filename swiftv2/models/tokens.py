"""Which tokens a stage computes: all of its grid, those that hold brain, or those of each sample's own."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swiftv2.models.geometry import Grid

CHILDREN = 8
"""Cells that merging joins into one: 2 x 2 x 2 in space; time stays."""


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Tokens of one stage, in an order of their own."""

    grid: Grid
    cells: NDArray[np.int64]
    """(n,) flat C-order cell of each token in the grid."""
    sample: NDArray[np.int64] | None = None
    """(n,) sample that each token belongs to; None where every sample of the batch has these same tokens."""

    @classmethod
    def dense(cls, grid: Grid) -> "TokenSet":
        """Every cell of the grid, for all samples."""
        return cls(grid, np.arange(int(np.prod(grid))))

    @classmethod
    def shared(cls, kept: NDArray[np.bool_]) -> "TokenSet":
        """The same cells for all samples; `kept` is (h, w, d, t)."""
        h, w, d, t = kept.shape
        return cls((h, w, d, t), np.flatnonzero(kept))

    @classmethod
    def per_sample(cls, kept: NDArray[np.bool_]) -> "TokenSet":
        """Each sample's own cells; `kept` is (B, h, w, d, t)."""
        batch, h, w, d, t = kept.shape
        sample, cells = np.nonzero(kept.reshape(batch, -1))
        return cls((h, w, d, t), cells.astype(np.int64), sample.astype(np.int64))

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def coordinates(self) -> tuple[NDArray[np.int64], ...]:
        """Place of each token along (H, W, D, T), (n,) each."""
        return tuple(axis.astype(np.int64) for axis in np.unravel_index(self.cells, self.grid))

    def rows(self, batch: int) -> NDArray[np.int64]:
        """(n,) where each token lies among rows of (cell, sample) that hold the whole grid; shared sets: its cell."""
        return self.cells if self.sample is None else self.cells * batch + self.sample

    def merged(self) -> tuple["TokenSet", NDArray[np.int64]]:
        """Parents of these tokens, and (parents, 8) which token is each parent's child, -1 where there is none.

        Children follow one another with the last spatial axis fastest.
        """
        h, w, d, t = self.coordinates
        _, width, depth, times = self.grid
        coarse = (-(-self.grid[0] // 2), -(-width // 2), -(-depth // 2), times)
        parent = np.ravel_multi_index((h // 2, w // 2, d // 2, t), coarse).astype(np.int64)
        if self.sample is not None:
            parent += self.sample * int(np.prod(coarse))
        child = (h % 2) * 4 + (w % 2) * 2 + d % 2
        ids, owner = np.unique(parent, return_inverse=True)
        children = np.full((len(ids), CHILDREN), -1, dtype=np.int64)
        children[owner.reshape(-1), child] = np.arange(len(self))
        sample, cells = np.divmod(ids, int(np.prod(coarse)))
        return TokenSet(coarse, cells, None if self.sample is None else sample), children
