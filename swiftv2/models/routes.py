"""The way of tokens through the encoder: one gather brings them into the order of each attention's groups.

Rows are (slots, batch, C). Where all samples compute the same tokens, the batch lies beside the slots, folds into the
heads, and one small index serves every sample; where each sample has its own, the slots of all samples follow one another
and the batch is 1. Everything here depends on shapes and token sets alone, is worked out on the CPU and kept on the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swiftv2.config.model import ModelConfig
from swiftv2.models.geometry import Grid, WindowSpec, block_specs, stage_grids
from swiftv2.models.groups import Bucket, attention_groups, slot_sources, slot_tokens
from swiftv2.models.tokens import CHILDREN, TokenSet

KERNEL_BATCH = 65_535
"""Most groups that CUDA's attention kernels take at a time."""

Function = TypeVar("Function", bound=Callable[..., Any])


def untraced(function: Function) -> Function:
    """Keep torch.compile from tracing what is worked out once and looked up afterwards."""
    disabled: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


class _Gather(torch.autograd.Function):
    """Rows moved by an index whose inverse is known: the backward pass gathers too, where autograd would scatter."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, zero: Tensor | None, zero_back: Tensor | None
    ) -> Tensor:
        """Rows `index` of `rows`, with the output rows `zero` set to 0; backward the same with the other pair."""
        ctx.save_for_backward(inverse, zero_back)
        return _gather(rows, index, zero)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The gradient's rows, moved back."""
        inverse, zero_back = ctx.saved_tensors
        return _gather(grads[0], inverse, zero_back), None, None, None, None


def _gather(rows: Tensor, index: Tensor, zero: Tensor | None) -> Tensor:
    out = rows.index_select(0, index)
    return out if zero is None else out.index_fill_(0, zero, 0.0)


@dataclass(frozen=True, eq=False)
class Move:
    """Rows in one order brought into another one; every row that counts has one place in each."""

    index: Tensor
    """(out,) int64: the row of each new row; for padding any row."""
    inverse: Tensor
    """(in,) int64: the new row of each row; any for rows that go nowhere."""
    zero: Tensor | None
    """New rows that are 0: children and cells that are not there."""
    zero_back: Tensor | None
    """Rows that go nowhere, and so get no gradient."""

    def __call__(self, rows: Tensor) -> Tensor:
        """(in, ...) -> (out, ...)."""
        moved: Tensor = _Gather.apply(rows, self.index, self.inverse, self.zero, self.zero_back)  # type: ignore[no-untyped-call]
        return moved


@dataclass(frozen=True, eq=False)
class Layout:
    """Slots of one attention: its groups, bucket by bucket."""

    buckets: tuple[tuple[int, int, Tensor | None], ...]
    """Groups, slots of a group, and what is added to the logits: (groups, 1, 1 or length, length) or None."""
    blank: Tensor | None
    """Slots whose normalised token is 0: SwiFT v1's overhanging windows, to which it attends."""
    rotary: tuple[Tensor, Tensor] | None
    """Cosines and sines (slots, 1, head_dim / 2), float32; the decoupled family's."""
    sample: Tensor | None
    """(slots,) int64 sample of each slot, where every sample has tokens of its own."""


@dataclass(frozen=True, eq=False)
class Step:
    """One attention: how its tokens come to it, and their groups."""

    move: Move | None
    """None where they are in its order already."""
    layout: Layout


@dataclass(frozen=True, eq=False)
class StageRoute:
    """A stage: how tokens come to it, where they are, and its attentions."""

    merge: Move | None
    """(slots before * batch) rows to (slots, batch, 8 children); None for the first stage."""
    batch: int
    positions: Move | None
    """Rows of the position table to slots; None where every sample has tokens of its own."""
    cells: Tensor | None
    """(slots,) int64 row of the position table, where every sample has tokens of its own."""
    blocks: tuple[tuple[Step, ...], ...]


@dataclass(frozen=True, eq=False)
class Route:
    """From the embedded patches to the features of the last stage."""

    enter: Move
    """Embedded cells to the slots of the first attention."""
    stages: tuple[StageRoute, ...]
    leave: Move
    """Slots of the last attention to the cells of the last stage's grid."""
    batch: int
    """Samples side by side in one row."""
    slots: tuple[tuple[int, ...], ...]
    """Slots of each attention, stage by stage: the rows that are really computed."""
    shapes: tuple[tuple[int, int], ...]
    """Groups and length of every bucket of every geometry: what kernels, and a compiler, see of the tokens."""
    cells: Tensor | None = None
    """Kept cells of the first stage, in C order; None where rows of all cells come in."""
    voxels: Tensor | None = None
    """Voxels of their patches, flat in the padded grid: (places * voxels of a patch,)."""
    rows: Tensor | None = None
    """Rows of (cell, sample) that are embedded, where every sample has tokens of its own: those alone come in."""


class Work:
    """What a model has computed since this was last asked: how even ranks are, and how many shapes their kernels met."""

    def __init__(self) -> None:
        self._rows = 0
        self._shapes: set[tuple[tuple[int, int], ...]] = set()

    def note(self, route: Route) -> None:
        """Count a forward pass."""
        self._rows += route.batch * sum(map(sum, route.slots))
        self._shapes.add(route.shapes)

    def take(self) -> tuple[int, int]:
        """Rows of all attentions together, and different sets of shapes; counting begins anew."""
        found = self._rows, len(self._shapes)
        self._rows, self._shapes = 0, set()
        return found


@untraced
@lru_cache(maxsize=8)
def shared_route(
    config: ModelConfig,
    shape: tuple[int, ...],
    template: bytes | None,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Route:
    """The route where all samples compute the same tokens.

    Args:
        config: the model.
        shape: voxels and frames (H, W, D, T) of the clips.
        template: the first stage's kept cells in space, (h, w, d) bool as bytes; None keeps all.
        batch: samples.
        device: where its indices are wanted.
        dtype: number format of the queries, and so of the masks.

    Returns:
        A route whose `enter` takes rows of the kept cells, in C order.
    """
    grid = stage_grids(config, shape)[0]
    if template is None:
        tokens = TokenSet.dense(grid)
        return _route(config, tokens, np.arange(len(tokens)), batch, device, dtype)
    kept = np.frombuffer(template, dtype=np.bool_).reshape(grid[:3])
    tokens = TokenSet.shared(np.broadcast_to(kept[..., None], grid))
    route = _route(config, tokens, np.arange(len(tokens)), batch, device, dtype)
    return replace(route, cells=_on(tokens.cells, device), voxels=_on(_patch_voxels(kept, config.patch_size), device))


@untraced
def sample_route(config: ModelConfig, kept: NDArray[np.bool_], device: torch.device, dtype: torch.dtype) -> Route:
    """The route where every sample computes tokens of its own.

    Args:
        config: the model.
        kept: (B, h, w, d, t) bool, the tokens of the first stage that are computed.
        device: where its indices are wanted.
        dtype: number format of the queries.

    Returns:
        A route whose `enter` takes the kept rows of (cell, sample), sample by sample, their cells in C order.
    """
    tokens = TokenSet.per_sample(kept)
    route = _route(config, tokens, np.arange(len(tokens)), len(kept), device, dtype)
    return replace(route, rows=_on(tokens.rows(len(kept)), device))


def _patch_voxels(kept: NDArray[np.bool_], patch: Grid) -> NDArray[np.int64]:
    """Flat voxels of the padded grid under each kept place, (places * voxels of a patch,), the last axis fastest."""
    size = [n * p for n, p in zip(kept.shape, patch[:3], strict=True)]
    corners = [axis * p for axis, p in zip(np.nonzero(kept), patch[:3], strict=True)]
    offsets = np.meshgrid(*map(np.arange, patch[:3]), indexing="ij")
    h, w, d = (corner[:, None] + offset.reshape(-1) for corner, offset in zip(corners, offsets, strict=True))
    return np.asarray(np.ravel_multi_index((h, w, d), size), dtype=np.int64).reshape(-1)


class Order(NamedTuple):
    """Tokens by slot."""

    tokens: NDArray[np.int64]
    """(slots,), -1 for padding."""
    sources: NDArray[np.int64]
    """(slots,) token that a slot is filled from; padding has some, too."""


class _Placed(NamedTuple):
    order: Order
    layout: Layout


def _route(
    config: ModelConfig,
    tokens: TokenSet,
    entrance: NDArray[np.int64],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Route:
    """Stage by stage; `entrance` is the token of each row that comes in, -1 for none."""
    side_by_side = batch if tokens.sample is None else 1
    order = Order(entrance, entrance)
    children: NDArray[np.int64] | None = None
    stages, slots, shapes = [], [], []
    enter: Move | None = None
    for stage, depth in enumerate(config.depths):
        specs = [block_specs(config, stage, block, tokens.grid) for block in range(depth)]
        layouts = {spec: _layout(config, stage, spec, tokens, device, dtype) for spec in dict.fromkeys(chain(*specs))}
        first = layouts[specs[0][0]].order
        merge = None if children is None else _merge(order.tokens, children, first.tokens, side_by_side, device)
        enter = enter or _move(order.tokens, first, device)
        moves: dict[tuple[WindowSpec, WindowSpec], Move | None] = {}
        blocks, former = [], specs[0][0]
        for block in specs:
            steps = []
            for spec in block:
                if (former, spec) not in moves:
                    before, after = layouts[former].order, layouts[spec].order
                    same = np.array_equal(before.tokens, after.tokens)
                    moves[former, spec] = None if same else _move(before.tokens, after, device)
                steps.append(Step(moves[former, spec], layouts[spec].layout))
                former = spec
            blocks.append(tuple(steps))
        stages.append(_stage_route(config, merge, tokens, first, side_by_side, tuple(blocks), device))
        slots.append(tuple(len(layouts[spec].order.tokens) for spec in chain(*specs)))
        shapes += [(groups, length) for found in layouts.values() for groups, length, _ in found.layout.buckets]
        order = layouts[former].order
        if stage + 1 < len(config.depths):
            tokens, children = tokens.merged()
    if enter is None:
        raise AssertionError("a model has at least one stage")
    leave = _move(order.tokens, _grid_order(tokens, batch), device, zero=True)
    return Route(enter, tuple(stages), leave, side_by_side, tuple(slots), tuple(shapes))


def _stage_route(
    config: ModelConfig,
    merge: Move | None,
    tokens: TokenSet,
    first: Order,
    batch: int,
    blocks: tuple[tuple[Step, ...], ...],
    device: torch.device,
) -> StageRoute:
    positions = cells = None
    if config.absolute_position:
        if tokens.sample is None:
            positions = _move(_grid_order(tokens, 1).tokens, first, device)
        else:
            cells = _on(tokens.cells[first.sources], device)
    return StageRoute(merge, batch, positions, cells, blocks)


def _layout(
    config: ModelConfig, stage: int, spec: WindowSpec, tokens: TokenSet, device: torch.device, dtype: torch.dtype
) -> _Placed:
    """Where tokens stand for one attention, and its layout."""
    width = config.embed_dim * 2**stage
    found: list[Bucket] = attention_groups(tokens, spec, config.attention_buckets, width)
    order = Order(slot_tokens(found), slot_sources(found))
    padded = np.flatnonzero(order.tokens < 0)
    buckets = tuple(
        (len(b.slots), b.length, None if b.bias is None else _on(b.bias, device, dtype))
        for b in chain(*(bucket.pieces(KERNEL_BATCH) for bucket in found))
    )
    rotary = None
    if config.variant == "decoupled":
        axes = (3,) if spec.window[:3] == (1, 1, 1) else (0, 1, 2)
        places = np.stack([axis[order.sources] for axis in tokens.coordinates], axis=1)[:, axes]
        rotary = rotary_tables(_on(places, device), width // config.num_heads[stage], config.rope_theta)
    blank = _on(padded, device) if padded.size and not spec.mask_padding else None
    sample = None if tokens.sample is None else _on(tokens.sample[order.sources], device)
    return _Placed(order, Layout(buckets, blank, rotary, sample))


def rotary_tables(places: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (slots, 1, head_dim / 2), float32, of places (slots, axes) in tokens, int64.

    Attention sees differences of places alone. A window in time rotates all channel pairs; a window in space gives each
    of its three axes `head_dim // 6` pairs and leaves the last `head_dim % 6` channels unrotated.
    """
    slots, axes = places.shape
    pairs = head_dim // (2 * axes)
    with torch.inference_mode(mode=False):
        # One small table of each place, in double precision, then a gather where the slots are.
        step = torch.arange(int(places.max()) + 1 if slots else 1, dtype=torch.float64)
        angles = step[:, None] * theta ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        still = torch.zeros(slots, 1, head_dim // 2 - pairs * axes, device=places.device)
        tables = []
        for table, rest in ((angles.cos(), still + 1), (angles.sin(), still)):
            turned = table.to(places.device, torch.float32)[places].view(slots, 1, pairs * axes)
            tables.append(torch.cat((turned, rest), dim=-1))
    return tables[0], tables[1]


def _grid_order(tokens: TokenSet, batch: int) -> Order:
    """Tokens by rows of the whole grid, -1 where a cell is not computed: (cells,), or (cells * batch,)."""
    cells = math.prod(tokens.grid)
    found = np.full(cells if tokens.sample is None else cells * batch, -1, dtype=np.int64)
    found[tokens.rows(batch)] = np.arange(len(tokens))
    return Order(found, np.maximum(found, 0))


def _move(before: NDArray[np.int64], after: Order, device: torch.device, *, zero: bool = False) -> Move:
    """From the tokens of rows to new rows; padding repeats what the order says, or is 0 where `zero` says so."""
    missing = np.flatnonzero(after.tokens < 0) if zero else None
    return Move(
        _on(_found(before, after.sources), device),
        _on(_found(after.tokens, before), device),
        _some(missing, device),
        _some(np.flatnonzero(before < 0), device),
    )


def _merge(
    before: NDArray[np.int64], children: NDArray[np.int64], after: NDArray[np.int64], batch: int, device: torch.device
) -> Move:
    """From (slots * batch) rows of children to (slots, batch, 8) rows; missing children and padded parents are 0."""
    wanted = np.where(after[:, None] >= 0, children[after], -1)
    sample = np.arange(batch)
    flat = np.repeat(wanted[:, None, :], batch, axis=1)
    index = _found(before, wanted.reshape(-1)).reshape(-1, 1, CHILDREN) * batch + sample[None, :, None]
    # Row of (slot, child) among the new ones for sample 0; sample b lies 8 rows further each.
    place = _found(wanted.reshape(-1), before)
    start = place // CHILDREN * (CHILDREN * batch) + place % CHILDREN
    inverse = start[:, None] + sample * CHILDREN
    idle = np.flatnonzero(np.repeat(before < 0, batch))
    missing = np.flatnonzero(flat.reshape(-1) < 0)
    return Move(_on(index.reshape(-1), device), _on(inverse.reshape(-1), device), _some(missing, device), _some(idle, device))


def _found(rows: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each wanted token stands among rows; 0 for padding and for tokens that are not there."""
    where = np.zeros(max(int(rows.max(initial=-1)), int(wanted.max(initial=-1))) + 1, dtype=np.int64)
    real = np.flatnonzero(rows >= 0)
    where[rows[real]] = real
    return np.where(wanted >= 0, where[wanted], 0)


def _some(rows: NDArray[np.int64] | None, device: torch.device) -> Tensor | None:
    return None if rows is None or not rows.size else _on(rows, device)


def _on(values: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    # Tensors made under inference_mode could never be used in training afterwards.
    with torch.inference_mode(mode=False):
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, dtype)
