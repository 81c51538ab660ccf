"""Where tokens go: grids of the stages, windows, shifts, padding, attention masks.

Everything here depends on shapes alone and is computed once per shape. A `Partition` sends each row of tokens to its
place in its window by one gather and back by its inverse, so that padding, shifting and cutting cost one copy, and the
backward pass of the one is the forward pass of the other.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from swiftv2.config.model import ModelConfig

Grid = tuple[int, int, int, int]
Function = TypeVar("Function", bound=Callable[..., Any])
AXES = 4
REGION_PENALTY = -100.0
"""Added to the logit of a key of another region in shifted windows; the published models were trained with it."""


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


def untraced(function: Function) -> Function:
    """Keep torch.compile from tracing what is looked up in a cache."""
    disabled: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


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


@dataclass(frozen=True)
class Partition:
    """Gather indices between token rows (batch, token) and window rows (window, position, batch), and the masks.

    The batch lies inside the window so that it folds into the heads, and one mask serves every sample.
    """

    spec: WindowSpec
    batch: int
    free_windows: int
    """Windows that need no mask; they come first."""
    source: Tensor
    """(windows * length * batch,) int64: the token row of each window row; 0 for padding."""
    place: Tensor
    """(batch * tokens,) int64: the window row of each token row."""
    padding: Tensor | None
    """int64 window rows that are padding; None where nothing is padded."""
    mask: Tensor | None
    """(windows - free_windows, 1, length, length) float: what is added to the logits; None where no window needs it."""

    def split(self, rows: Tensor) -> Tensor:
        """(batch * tokens, C) token rows -> (windows, length, batch, C); padding is zero."""
        gathered: Tensor = _Gather.apply(rows, self.source, self.place, self.padding, None)  # type: ignore[no-untyped-call]
        return gathered.view(self.spec.windows, self.spec.length, self.batch, rows.shape[-1])

    def join(self, windows: Tensor) -> Tensor:
        """(windows, length, batch, C) -> (batch * tokens, C) token rows; padding is dropped."""
        rows = windows.reshape(-1, windows.shape[-1])
        joined: Tensor = _Gather.apply(rows, self.place, self.source, None, self.padding)  # type: ignore[no-untyped-call]
        return joined


class _Gather(torch.autograd.Function):
    """Rows moved by an index whose inverse is known: the backward pass gathers too, where autograd would scatter."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, zero: Tensor | None, zero_back: Tensor | None
    ) -> Tensor:
        """Rows `index` of `rows`, with the output rows `zero` set to 0; backward the same with the other pair."""
        ctx.inverse, ctx.zero_back = inverse, zero_back
        return _gather(rows, index, zero)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The gradient's rows, moved back."""
        return _gather(grads[0], ctx.inverse, ctx.zero_back), None, None, None, None


def _gather(rows: Tensor, index: Tensor, zero: Tensor | None) -> Tensor:
    out = rows.index_select(0, index)
    return out if zero is None else out.index_fill_(0, zero, 0.0)


@lru_cache(maxsize=128)
def partition(spec: WindowSpec, batch: int, device: torch.device, dtype: torch.dtype) -> Partition:
    """The partition of `batch` samples of that geometry; the mask has the queries' number format."""
    layout = _layout(spec)
    tokens = math.prod(spec.grid)
    cells = layout.cells.reshape(-1)
    real = cells >= 0
    sample = np.arange(batch)
    source = np.where(real, cells, 0)[:, None] + sample * np.where(real, tokens, 0)[:, None]
    place = np.empty(tokens, dtype=np.int64)
    place[cells[real]] = np.flatnonzero(real)
    padding = (np.flatnonzero(~real)[:, None] * batch + sample).reshape(-1)
    # Tensors made under inference_mode could never be used in training afterwards.
    with torch.inference_mode(mode=False):
        return Partition(
            spec,
            batch,
            layout.free_windows,
            torch.from_numpy(source.reshape(-1)).to(device),
            torch.from_numpy((place[None] * batch + sample[:, None]).reshape(-1)).to(device),
            torch.from_numpy(padding).to(device) if padding.size else None,
            attention_mask(spec, device, dtype),
        )


@lru_cache(maxsize=32)
def attention_mask(spec: WindowSpec, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """(masked windows, 1, length, length): -100 across regions, -inf on hidden padding; None where no window needs one.

    A row is never -inf throughout: every window holds at least one real token.
    """
    layout = _layout(spec)
    cells, regions = layout.cells[layout.free_windows :], layout.regions[layout.free_windows :]
    if not cells.size:
        return None
    added = np.where(regions[:, :, None] == regions[:, None, :], np.float32(0), np.float32(REGION_PENALTY))
    if spec.mask_padding:
        added[np.broadcast_to((cells < 0)[:, None, :], added.shape)] = -np.inf
    with torch.inference_mode(mode=False):
        return torch.from_numpy(added[:, None]).to(device, dtype)


def window_coordinates(window: Grid) -> npt.NDArray[np.int64]:
    """(length, 4) position of each token inside its window; C order."""
    return np.stack(np.unravel_index(np.arange(math.prod(window)), window), axis=1).astype(np.int64)


def _cut(values: npt.NDArray[Any], window: Grid) -> npt.NDArray[Any]:
    """(H, W, D, T) -> (windows, length), both in C order."""
    counts = [n // w for n, w in zip(values.shape, window, strict=True)]
    split = values.reshape([size for pair in zip(counts, window, strict=True) for size in pair])
    return split.transpose(0, 2, 4, 6, 1, 3, 5, 7).reshape(math.prod(counts), math.prod(window))


def _cells(spec: WindowSpec) -> npt.NDArray[np.int64]:
    """(windows, length) flat token of each window position, -1 for padding."""
    grid = np.full(spec.padded, -1, dtype=np.int64)
    grid[tuple(slice(n) for n in spec.grid)] = np.arange(math.prod(spec.grid)).reshape(spec.grid)
    return _cut(np.roll(grid, [-s for s in spec.shift], axis=range(AXES)), spec.window)


def _regions(spec: WindowSpec) -> npt.NDArray[np.int64]:
    """(windows, length) id of the region each position belongs to after the cyclic shift."""
    axes = []
    for size, window, shift in zip(spec.padded, spec.window, spec.shift, strict=True):
        position = np.arange(size)
        axes.append((position >= size - window).astype(np.int64) + (position >= size - shift) if shift else position * 0)
    h, w, d, t = np.ix_(*axes)
    return _cut(((h * 3 + w) * 3 + d) * 3 + t, spec.window)


@dataclass(frozen=True)
class _Layout:
    """(windows, length) cells and regions, windows that need no mask first."""

    cells: npt.NDArray[np.int64]
    regions: npt.NDArray[np.int64]
    free_windows: int


@lru_cache(maxsize=64)
def _layout(spec: WindowSpec) -> _Layout:
    cells, regions = _cells(spec), _regions(spec)
    needs_mask = (regions != regions[:, :1]).any(axis=1)
    if spec.mask_padding:
        needs_mask |= (cells < 0).any(axis=1)
    order = np.argsort(needs_mask, kind="stable")
    return _Layout(cells[order], regions[order], int((~needs_mask).sum()))
