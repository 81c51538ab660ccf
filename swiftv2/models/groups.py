"""Tokens that attend to one another, put into a few buckets of equal length.

A group is what lies in one window and, after a cyclic shift, in one region of it. Groups of nearly equal size share a
bucket, whose slots are padded to one length; padded slots are hidden as keys and never read as queries. So neither
windows that overhang the grid nor background cost anything, and groups that fill their bucket need no mask.

SwiFT v1 is the exception, for its published weights: it attends to overhanging slots as zeros, and adds -100 to the
logits across regions. In the other families a key of another region is not there at all: -100 would leave it a weight of
exp(-100 + difference of logits), which float32 adds to nothing below a difference of 80, and bf16 below 89:
trained logits are taken to stay below that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swiftv2.models.geometry import WindowSpec
from swiftv2.models.tokens import TokenSet

REGION_PENALTY = -100.0
"""Added by SwiFT v1 to the logit of a key of another region in shifted windows; its published weights learned with it."""
ALIGNED = 8
"""CUDA's fused kernels read masks whose rows start at multiples of this."""
FIXED_LENGTHS = 8
"""Bucket lengths where every batch has token sets of its own: multiples of an eighth of the window."""
FIXED_COUNTS = 16
"""Groups of such a bucket are filled up to a multiple of this share (1/16) of the windows: brain masks then come in few
shapes. Random masks (visible-only encoding) still come in many, which kernels must take as they come."""


@dataclass(frozen=True, eq=False)
class Bucket:
    """Groups of one padded length."""

    slots: NDArray[np.int64]
    """(groups, length) token of each slot, -1 for padding."""
    bias: NDArray[np.float32] | None
    """(groups, 1, 1 or length, length) added to the logits; None where nothing is."""

    @property
    def length(self) -> int:
        """Slots of a group."""
        return int(self.slots.shape[1])

    def pieces(self, groups: int) -> list["Bucket"]:
        """The same groups, at most so many at a time."""
        starts = range(0, len(self.slots), groups)
        return [Bucket(self.slots[i : i + groups], None if self.bias is None else self.bias[i : i + groups]) for i in starts]


def attention_groups(tokens: TokenSet, spec: WindowSpec, buckets: int, width: int) -> list[Bucket]:
    """Cut tokens into attention groups, and these into buckets.

    Args:
        tokens: what is computed.
        spec: windows and shift.
        buckets: most bucket lengths.
        width: channels C; how much longer a bucket may be rather than another one depends on it.

    Returns:
        Buckets, longest first; every token stands in exactly one slot.
    """
    if not spec.mask_padding:
        return _whole_windows(spec)
    key = _window(tokens, spec) * 3 ** len(spec.grid) + _region(tokens, spec)
    if tokens.sample is not None:
        key += tokens.sample * (spec.windows * 3 ** len(spec.grid))
    _, group, counts = np.unique(key, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    starts = np.cumsum(counts) - counts
    place = np.empty(len(tokens), dtype=np.int64)
    place[order] = np.arange(len(tokens)) - np.repeat(starts, counts)
    lengths = (
        bucket_lengths(counts, buckets, width) if tokens.sample is None else _fixed_lengths(spec.length, int(counts.max()))
    )
    choice = np.searchsorted(lengths, counts)
    found = []
    for index in reversed(range(len(lengths))):
        members = np.flatnonzero(choice == index)
        if not len(members):
            continue
        rows = np.full(len(counts), -1, dtype=np.int64)
        rows[members] = np.arange(len(members))
        mine = np.flatnonzero(rows[group] >= 0)
        total = len(members) if tokens.sample is None else _rounded(len(members), spec.windows)
        slots = np.full((total, lengths[index]), -1, dtype=np.int64)
        slots[rows[group[mine]], place[mine]] = mine
        found.append(Bucket(slots, _key_bias(slots, always=tokens.sample is not None)))
    return found


def bucket_lengths(counts: NDArray[np.int64], buckets: int, width: int) -> NDArray[np.int64]:
    """The at most so many padded lengths that cost least for groups of these sizes, ascending.

    A slot of a group of length L costs 24 C^2 + 4 L C operations.
    """
    sizes, groups = np.unique(-(-counts // ALIGNED) * ALIGNED if counts.max() > ALIGNED else counts, return_counts=True)
    number = min(buckets, len(sizes))
    cost = sizes * (6.0 * width + sizes)
    below = np.concatenate(([0], np.cumsum(groups)))
    best = np.where(np.arange(len(sizes) + 1) == 0, 0.0, np.inf)
    chosen: list[NDArray[np.int64]] = []
    for _ in range(number):
        # table[j, i]: the first i sizes in the buckets so far, sizes i..j-1 in one more of length sizes[j - 1].
        table = best[None, :] + (below[1:, None] - below[None, :]) * cost[:, None]
        table = np.where(np.arange(len(sizes) + 1)[None, :] <= np.arange(len(sizes))[:, None], table, np.inf)
        chosen.append(table.argmin(1))
        best = np.concatenate(([0.0], table.min(1)))
    lengths, last = [], len(sizes)
    for step in reversed(chosen):
        if last == 0:
            break
        lengths.append(int(sizes[last - 1]))
        last = int(step[last - 1])
    return np.array(lengths[::-1], dtype=np.int64)


def _fixed_lengths(window: int, longest: int) -> NDArray[np.int64]:
    step = -(-window // FIXED_LENGTHS)
    step = -(-step // ALIGNED) * ALIGNED if window > ALIGNED else step
    return np.arange(step, max(longest, 1) + step, step, dtype=np.int64)


def _rounded(groups: int, windows: int) -> int:
    step = max(windows // FIXED_COUNTS, 1)
    return -(-groups // step) * step


def _key_bias(slots: NDArray[np.int64], *, always: bool) -> NDArray[np.float32] | None:
    """(groups, 1, 1, length): -inf on padded keys, but nowhere in groups that only fill the bucket up."""
    padded = (slots < 0) & (slots >= 0).any(axis=1, keepdims=True)
    # Where every batch has tokens of its own, a mask that comes and goes would be compiled for anew.
    wanted = always or padded.any()
    return np.where(padded, np.float32(-np.inf), np.float32(0))[:, None, None, :] if wanted else None


def _rolled(tokens: TokenSet, spec: WindowSpec) -> list[NDArray[np.int64]]:
    """Place of each token along each axis after the cyclic shift of the padded grid."""
    return [(axis - s) % n for axis, s, n in zip(tokens.coordinates, spec.shift, spec.padded, strict=True)]


def _window(tokens: TokenSet, spec: WindowSpec) -> NDArray[np.int64]:
    counts = [n // w for n, w in zip(spec.padded, spec.window, strict=True)]
    places = [p // w for p, w in zip(_rolled(tokens, spec), spec.window, strict=True)]
    return np.ravel_multi_index(places, counts).astype(np.int64)


def _region(tokens: TokenSet, spec: WindowSpec) -> NDArray[np.int64]:
    """Region of each token: three slices along each shifted axis."""
    region = np.zeros(len(tokens), dtype=np.int64)
    for place, size, window, shift in zip(_rolled(tokens, spec), spec.padded, spec.window, spec.shift, strict=True):
        region *= 3
        if shift:
            region += (place >= size - window).astype(np.int64) + (place >= size - shift)
    return region


def _whole_windows(spec: WindowSpec) -> list[Bucket]:
    """SwiFT v1: windows as they are cut, overhanging slots attended to; windows of one region first."""
    padded = TokenSet.dense(spec.padded)
    inner = [p % w for p, w in zip(_rolled(padded, spec), spec.window, strict=True)]
    position = np.ravel_multi_index(inner, spec.window)
    order = np.argsort(_window(padded, spec) * spec.length + position).reshape(-1, spec.length)
    regions = _region(padded, spec)[order]
    inside = np.logical_and.reduce([axis < n for axis, n in zip(padded.coordinates, spec.grid, strict=True)])
    token = np.full(len(padded), -1, dtype=np.int64)
    token[inside] = np.arange(inside.sum())
    slots = token[order]
    mixed = (regions != regions[:, :1]).any(axis=1)
    penalty = np.float32(REGION_PENALTY) * (regions[mixed][:, None, :, None] != regions[mixed][:, None, None, :])
    parts = [Bucket(slots[~mixed], None), Bucket(slots[mixed], penalty.astype(np.float32))]
    return [part for part in parts if len(part.slots)]


def slot_tokens(buckets: Sequence[Bucket]) -> NDArray[np.int64]:
    """(slots,) token of every slot of all buckets, -1 for padding."""
    return np.concatenate([bucket.slots.reshape(-1) for bucket in buckets])


def slot_sources(buckets: Sequence[Bucket]) -> NDArray[np.int64]:
    """(slots,) token that every slot is filled from: padding repeats the first of its group, so no other sample's."""
    firsts = [np.maximum(bucket.slots[:, :1], 0) for bucket in buckets]
    filled = [np.where(bucket.slots >= 0, bucket.slots, first) for bucket, first in zip(buckets, firsts, strict=True)]
    return np.concatenate([slots.reshape(-1) for slots in filled])
