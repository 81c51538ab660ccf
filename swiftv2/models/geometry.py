"""Grids of the stages, and how each attention cuts them: windows, shifts, padding."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from swiftv2.config.model import ModelConfig

Grid = tuple[int, int, int, int]


@dataclass(frozen=True)
class WindowSpec:
    """One way of cutting a token grid into windows; all axes are (H, W, D, T)."""

    grid: Grid
    window: Grid
    shift: Grid
    mask_padding: bool
    """Whether padded tokens are hidden from attention (v2), or attended to as zeros (SwiFT v1)."""

    @classmethod
    def fit(cls, grid: Grid, window: Grid, shifted: bool, mask_padding: bool) -> "WindowSpec":
        """Cut `grid` by `window`: an axis no longer than its window takes its own length and is never shifted."""
        fitted = tuple(min(n, w) for n, w in zip(grid, window, strict=True))
        shift = tuple(w // 2 if shifted and n > w else 0 for n, w in zip(grid, window, strict=True))
        return cls(grid, as_grid(fitted), as_grid(shift), mask_padding)

    @property
    def padded(self) -> Grid:
        """The grid padded on the right to a multiple of the window."""
        return pad_to_multiple(self.grid, self.window)

    @property
    def windows(self) -> int:
        """Number of windows."""
        return math.prod(self.padded) // self.length

    @property
    def length(self) -> int:
        """Tokens of one window, padded ones counted."""
        return math.prod(self.window)


def as_grid(sizes: Sequence[int]) -> Grid:
    """Four sizes as a tuple of the right type."""
    h, w, d, t = sizes
    return int(h), int(w), int(d), int(t)


def pad_to_multiple(grid: Grid, multiple: Grid) -> Grid:
    """Every axis rounded up to a multiple."""
    return as_grid([-(-n // m) * m for n, m in zip(grid, multiple, strict=True)])


def split_axes(x: Tensor, first: int, sizes: Sequence[int]) -> Tensor:
    """Every axis from `first` on split into (cells, size of a cell), as many as there are sizes; others stay."""
    last = first + len(sizes)
    split = [n for axis, size in zip(x.shape[first:last], sizes, strict=True) for n in (axis // size, size)]
    return x.reshape(*x.shape[:first], *split, *x.shape[last:])


def patches_with_brain(brain: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, H, W, D) bool -> (B, h, w, d) bool: which patches hold any brain voxel; `patch` begins with (H, W, D)."""
    height, width, depth = brain.shape[1:]
    h, w, d = patch[:3]
    padded = functional.pad(brain, (0, -depth % d, 0, -width % w, 0, -height % h))
    return split_axes(padded, 1, (h, w, d)).any(dim=6).any(dim=4).any(dim=2)


def token_grid(config: ModelConfig, shape: Sequence[int]) -> Grid:
    """Tokens along (H, W, D, T) for a clip of that many voxels and frames, padded on the right to whole patches."""
    return as_grid([-(-n // p) for n, p in zip(shape, config.patch_size, strict=True)])


def stage_grids(config: ModelConfig, shape: Sequence[int] | None = None) -> list[Grid]:
    """Token grid of every stage; space is halved (rounded up) between stages, time never.

    Args:
        config: the model.
        shape: voxels and frames (H, W, D, T) of the clip; the configured ones when not given.
    """
    grid = token_grid(config, shape or (*config.image_size, config.frames))
    grids = [grid]
    for _ in config.depths[1:]:
        h, w, d, t = grids[-1]
        grids.append((-(-h // 2), -(-w // 2), -(-d // 2), t))
    return grids


def stage_window(config: ModelConfig, stage: int, grid: Grid) -> tuple[Grid, bool]:
    """Window of a stage and whether its odd blocks are shifted."""
    if config.last_layer_full_msa and stage == len(config.depths) - 1:
        return (*grid[:3], config.window_size[3]), False
    return as_grid(config.first_window_size if stage == 0 else config.window_size), True


def block_specs(config: ModelConfig, stage: int, block: int, grid: Grid) -> list[WindowSpec]:
    """Window cuts of one block's attentions: one for 4-D attention, (temporal, spatial) for decoupled attention."""
    window, may_shift = stage_window(config, stage, grid)
    shifted = may_shift and block % 2 == 1
    if config.variant == "decoupled":
        # A last stage that spans the whole grid does so in space: its windows in time still shift.
        return [
            WindowSpec.fit(grid, (1, 1, 1, window[3]), block % 2 == 1, mask_padding=True),
            WindowSpec.fit(grid, (*window[:3], 1), shifted, mask_padding=True),
        ]
    return [WindowSpec.fit(grid, window, shifted, mask_padding=config.variant != "swift_v1")]
