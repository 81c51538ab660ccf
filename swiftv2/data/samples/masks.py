"""Which cells of a clip are hidden, and which voxels that hides."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from swiftv2.config.model import MaskConfig
from swiftv2.data import keyed
from swiftv2.errors import UsageError

Cells = tuple[int, int, int, int]
Shape3 = tuple[int, int, int]


def cell_counts(grid_shape: Shape3, frames: int, cell_size: Cells) -> Cells:
    """Cells (h, w, d, t) of a clip of (H, W, D) voxels and `frames` frames, incomplete cells at the far ends counted."""
    h, w, d, t = (-(-n // c) for n, c in zip((*grid_shape, frames), cell_size, strict=True))
    return h, w, d, t


def voxel_cells(voxels: NDArray[np.int64], grid_shape: Shape3, cell_size: Cells) -> NDArray[np.int64]:
    """Flat C-order index of the spatial cell (h, w, d) that holds each kept voxel, shape (V,)."""
    h, w, d, _ = cell_counts(grid_shape, 1, cell_size)
    places = np.unravel_index(np.asarray(voxels), grid_shape)
    x, y, z = (p // c for p, c in zip(places, cell_size[:3], strict=True))
    return np.asarray(np.ravel_multi_index((x, y, z), (h, w, d)), dtype=np.int64)


def brain_cells(voxels: NDArray[np.int64], grid_shape: Shape3, cell_size: Cells) -> NDArray[np.bool_]:
    """Spatial cells that hold any kept voxel, bool (h, w, d)."""
    h, w, d, _ = cell_counts(grid_shape, 1, cell_size)
    held = np.zeros(h * w * d, dtype=np.bool_)
    held[voxel_cells(voxels, grid_shape, cell_size)] = True
    return held.reshape(h, w, d)


def masked_count(ratio: float, cells: int) -> int:
    """ceil(ratio x cells) of the ratio as it is written: 0.55 of 100 is 55, though in binary it is a little more."""
    return math.ceil(Fraction(repr(float(ratio))) * cells)


def draw_mask(config: MaskConfig, cells: Cells, brain: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw the hidden cells of one clip.

    Args:
        config: kind, ratio and what to draw among.
        cells: cells of the clip (h, w, d, t).
        brain: spatial cells with any brain voxel, (h, w, d).
        rng: generator of this draw, keyed by epoch and clip.

    Returns:
        bool (h, w, d, t), True = hidden: ceil(ratio x n) of the n cells (random), of the n places (tube) or of the n
        times (temporal) to draw among. A place outside the brain is hidden with `mask.among=all` only.

    Raises:
        UsageError: no cell may be drawn, or none would stay visible.
    """
    *space, times = cells
    places = np.flatnonzero(np.ones(space, dtype=np.bool_) if config.among == "all" else brain)
    units = {"random": len(places) * times, "tube": len(places), "temporal": times}[config.kind]
    count = masked_count(config.ratio, units)
    if not len(places) or count >= units:
        raise UsageError(
            f"mask: {config.kind} with ratio {config.ratio} hides all of the {units} it draws among "
            f"(cells {cells}, {len(places)} places): lower mask.ratio, make mask.patch_size smaller or clips longer"
        )
    mask = np.zeros((math.prod(space), times), dtype=np.bool_)
    if config.kind == "random":
        hidden = keyed.choose(rng, units, count)
        mask[places[hidden // times], hidden % times] = True
    elif config.kind == "tube":
        mask[places[keyed.choose(rng, units, count)]] = True
    else:
        last = config.temporal_choice == "last"
        hidden = np.arange(times - count, times) if last else keyed.choose(rng, units, count)
        mask[np.ix_(places, hidden)] = True
    return mask.reshape(cells)


def expand_mask(
    mask: torch.Tensor, voxels: torch.Tensor, grid_shape: Shape3, cell_size: Sequence[int], frames: int
) -> torch.Tensor:
    """From hidden cells to hidden voxels.

    Args:
        mask: bool (B, h, w, d, t), True = hidden.
        voxels: int64 (V,) flat C-order indices of the kept voxels in the grid; on the mask's device.
        grid_shape: (H, W, D).
        cell_size: voxels and frames of one cell.
        frames: frames of the clip, T.

    Returns:
        bool (B, T, V).
    """
    _, width, depth = grid_shape
    size_h, size_w, size_d, size_t = cell_size
    h, w, d = mask.shape[1:4]
    x, y, z = voxels // (width * depth), voxels // depth % width, voxels % depth
    place = ((x // size_h) * w + y // size_w) * d + z // size_d
    time = torch.arange(frames, device=mask.device) // size_t
    by_time = mask.reshape(len(mask), h * w * d, -1).transpose(1, 2)
    return by_time.index_select(1, time).index_select(2, place)


def brain_ratio(hidden: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
    """Share of each clip's brain voxels that is hidden: what a mask ratio comes to where the brain is.

    Args:
        hidden: bool (B, T, V).
        brain: bool (B, V).

    Returns:
        float32 (B,); 0 where a clip has no brain voxel.
    """
    inside = (hidden & brain[:, None]).sum((1, 2), dtype=torch.float32)
    return inside / (brain.sum(1, dtype=torch.float32) * hidden.shape[1]).clamp(min=1.0)
