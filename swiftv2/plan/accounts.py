"""Who holds what in an optimizer step: the engine's backends and DeepSpeed's ZeRO, byte by byte.

These accounts follow the allocations of DeepSpeed 0.19's `DeepSpeedZeroOptimizer`, `BF16_Optimizer` and
`FP16_UnfusedOptimizer` and of the engine's plain backend, in their order; nothing here is a rule of thumb.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from swiftv2.config.engine import EngineConfig

KINDS = ("weights", "gradients", "optimizer", "activations", "buckets", "other")
BYTES = {"fp32": 4, "bf16": 2}
MOMENTS = 8
"""AdamW's two fp32 moments of a weight."""
ALIGNMENT = 2
"""ZeRO pads each flat group to a multiple of this times the ranks."""
WHOLE_REDUCTION = 500_000_000
"""Elements that DeepSpeed reduces at a time where nothing but the optimizer's state is partitioned, or not even that."""
NORM_BYTES = 8
"""ZeRO takes gradient norms in float64, one tensor at a time."""


class Ledger:
    """Bytes held now, by kind; what they were when most was held, and the most of each kind at any time."""

    def __init__(self) -> None:
        self.now = dict.fromkeys(KINDS, 0.0)
        self.total = 0.0
        self.most = 0.0
        self.at_most = dict(self.now)
        self.most_of = dict(self.now)

    def add(self, kind: str, size: float) -> None:
        """Hold `size` more bytes, or fewer where it is negative."""
        self.now[kind] += size
        self.total += size
        self.most_of[kind] = max(self.most_of[kind], self.now[kind])
        if self.total > self.most:
            self.most, self.at_most = self.total, dict(self.now)

    def pass_by(self, kind: str, size: float) -> None:
        """Hold `size` bytes for a moment."""
        self.add(kind, size)
        self.add(kind, -size)


@dataclass(frozen=True)
class Layout:
    """Parameters of a model as ZeRO flattens them."""

    sizes: tuple[int, ...]
    """Elements of each trainable parameter, in the module's order."""
    group: tuple[int, ...]
    """Which group of the optimizer each is in: 0 with weight decay, 1 without, 2 with a learning rate of its own."""

    @property
    def groups(self) -> list[list[int]]:
        """Parameters of each group of the optimizer."""
        return [[i for i, own in enumerate(self.group) if own == group] for group in sorted(set(self.group))]

    @property
    def total(self) -> int:
        """Elements of all parameters."""
        return sum(self.sizes)


class Account(ABC):
    """Charges a ledger for weights, gradients and the optimizer; one subclass for each way in which a step is computed.

    Args:
        ledger: what is charged.
        layout: the parameters.
        engine: backend, stage, formats, buckets.
        world: ranks.
        cuda: whether the device is a GPU: there AdamW is one fused kernel, and memory that is asked for is taken; on a CPU
            only what is written.
    """

    def __init__(self, ledger: Ledger, layout: Layout, engine: EngineConfig, world: int, *, cuda: bool) -> None:
        self.ledger, self.layout, self.engine, self.world, self.cuda = ledger, layout, engine, world, cuda
        self.sizes = layout.sizes
        self.element = BYTES[engine.precision]
        self.summed = BYTES[engine.gradient_accumulation_dtype]
        self.sent = BYTES[engine.communication_dtype]
        self.master = BYTES[engine.optimizer_dtype]

    @abstractmethod
    def begin(self) -> None:
        """Charge what is there before the first pass, and throughout."""

    @abstractmethod
    def gradient(self, index: int) -> None:
        """The gradient of a parameter is complete in this backward pass."""

    @abstractmethod
    def passed(self, *, last: bool) -> None:
        """A backward pass is over, the last of its step or not."""

    @abstractmethod
    def update(self) -> None:
        """The optimizer's step; afterwards no gradient is left."""

    def adam(self, elements: int) -> None:
        """What AdamW holds beside its state while it moves a tensor: two copies on a CPU, nothing in a fused kernel."""
        if not self.cuda:
            self.ledger.pass_by("other", 2 * self.master * elements)

    def reduce_whole(self, tensors: Sequence[int], element: int) -> None:
        """DeepSpeed's reduction of unpartitioned gradients: tensors are joined, and cast where they travel otherwise."""
        joined: list[int] = []
        for elements in tensors:
            joined.append(elements)
            if sum(joined) > WHOLE_REDUCTION:
                self._reduce(joined, element)
                joined = []
        if joined:
            self._reduce(joined, element)

    def _reduce(self, joined: Sequence[int], element: int) -> None:
        copies = (element if len(joined) > 1 else 0) + (self.sent if self.sent != element else 0)
        self.ledger.pass_by("buckets", copies * sum(joined))


class Whole(Account):
    """Whole gradients and states on every rank: the plain backend, and DeepSpeed's stage 0 in fp32."""

    def begin(self) -> None:
        """Weights, in bf16 beside fp32 masters, and moments."""
        total = self.layout.total
        self.ledger.add("weights", self.element * total)
        self.ledger.add("optimizer", (MOMENTS + (4 if self.element == 2 else 0)) * total)
        self._kept: set[int] = set()
        self._masters: set[int] = set()

    def gradient(self, index: int) -> None:
        """Kept, or added to the one that is kept."""
        if index not in self._kept:
            self._kept.add(index)
            self.ledger.add("gradients", self.element * self.sizes[index])

    def passed(self, *, last: bool) -> None:
        """bf16 gradients may move to fp32 ones; DeepSpeed reduces after the last pass."""
        if self.engine.precision == "bf16" and self.engine.gradient_accumulation_dtype == "fp32":
            self._move()
        if last and self.engine.backend == "deepspeed":
            self.reduce_whole(self.sizes, self.element)

    def update(self) -> None:
        """The plain backend averages all gradients in one flat tensor."""
        ledger, total = self.ledger, self.layout.total
        if self.engine.precision == "bf16":
            self._move()
        if self.engine.backend == "plain" and self.world > 1:
            ledger.add("buckets", 4 * total)
            if self.sent != 4:
                ledger.add("buckets", self.sent * total)
                ledger.add("buckets", -4 * total)
            ledger.add("buckets", -min(self.sent, 4) * total)
        self.adam(max(self.sizes))
        ledger.add("gradients", -4 * total)
        self._kept.clear()
        self._masters.clear()

    def _move(self) -> None:
        """Add bf16 gradients to their fp32 masters', one after another."""
        for index in sorted(self._kept):
            elements = self.sizes[index]
            self.ledger.add("gradients", 4 * elements)
            if index in self._masters:
                self.ledger.add("gradients", -4 * elements)
            self._masters.add(index)
            self.ledger.add("gradients", -2 * elements)
        self._kept.clear()


class UnpartitionedBf16(Account):
    """DeepSpeed's stage 0 in bf16: bf16 gradients, fp32 masters, fp32 gradients in the step."""

    def begin(self) -> None:
        """Weights, masters and moments."""
        self.ledger.add("weights", 2 * self.layout.total)
        self.ledger.add("optimizer", (4 + MOMENTS) * self.layout.total)
        self._kept: set[int] = set()

    def gradient(self, index: int) -> None:
        """Kept in bf16."""
        if index not in self._kept:
            self._kept.add(index)
            self.ledger.add("gradients", 2 * self.sizes[index])

    def passed(self, *, last: bool) -> None:
        """Reduced after the last pass."""
        if last:
            self.reduce_whole(self.sizes, 2)

    def update(self) -> None:
        """fp32 copies of all gradients beside the bf16 ones."""
        total = self.layout.total
        self.ledger.add("gradients", 4 * total)
        self.adam(max(self.sizes))
        self.ledger.add("gradients", -6 * total)
        self._kept.clear()


class PartitionedStates(Account):
    """Stage 1 in bf16 with fp32 sums: a whole fp32 gradient stays on every rank, its optimizer's states are shared out."""

    def begin(self) -> None:
        """Flat weights and gradients, and this rank's masters and moments."""
        self.parts = [padded(sum(self.sizes[i] for i in group), self.world) for group in self.layout.groups]
        self.ledger.add("weights", 2 * sum(self.parts))
        self.ledger.add("gradients", 4 * sum(self.parts))
        self.ledger.add("optimizer", (4 + MOMENTS) * sum(self.parts) // self.world)
        self._kept: set[int] = set()

    def gradient(self, index: int) -> None:
        """bf16 gradients stay until the step, zeroed between passes."""
        if index not in self._kept:
            self._kept.add(index)
            self.ledger.add("gradients", 2 * self.sizes[index])

    def passed(self, *, last: bool) -> None:
        """Each is cast to be added; the flat fp32 gradients are joined to be reduced."""
        self.ledger.pass_by("gradients", 4 * max(self.sizes))
        if last:
            self.reduce_whole(self.parts, 4)

    def update(self) -> None:
        """In place, group by group."""
        for part in self.parts:
            self.adam(part // self.world)
        self.ledger.add("gradients", -2 * sum(self.sizes[i] for i in self._kept))
        self._kept.clear()


@dataclass
class _Bucket:
    """DeepSpeed's contiguous buffer of gradients that wait to be reduced."""

    held: int = 0
    """Bytes charged for it; 0 while there is none."""
    elements: int = 0
    members: list[int] = field(default_factory=list)
    oversized: list[int] = field(default_factory=list)


class Partitioned(Account):
    """ZeRO 1 and 2: gradients go through a bucket; this rank keeps those of its own part of each flat group."""

    def begin(self) -> None:
        """Flat weights, and this rank's masters and moments."""
        groups = self.layout.groups
        self.flat = [padded(sum(self.sizes[i] for i in group), self.world) for group in groups]
        self.parts = [flat // self.world for flat in self.flat]
        self.spans = {i: (g, *span) for g, group in enumerate(groups) for i, span in _spans(self.sizes, group).items()}
        self.rank = self._fullest_rank()
        self.compact = self.element != self.summed
        self.ledger.add("weights", self.element * sum(self.flat))
        self.ledger.add("optimizer", 3 * self.master * sum(self.parts))
        self._bucket = _Bucket()
        self._waiting: set[int] = set()  # stage 1: whole gradients that wait for the last pass
        self._own = 0  # bytes of this pass's own gradients
        self._sums = 0  # bytes of the sums of this step
        self._own_sizes: set[int] = set()

    @property
    def mine(self) -> set[int]:
        """Parameters of which this rank updates any part."""
        first = [self.rank * part for part in self.parts]
        return {i for i, (g, a, b) in self.spans.items() if a < first[g] + self.parts[g] and b > first[g]}

    def _fullest_rank(self) -> int:
        """The rank whose parameters, whole, have most elements."""
        most = np.zeros(self.world, dtype=np.int64)
        for group, start, end in self.spans.values():
            first, last = start // self.parts[group], min((end - 1) // self.parts[group], self.world - 1)
            most[first : last + 1] += end - start
        return int(most.argmax())

    def gradient(self, index: int) -> None:
        """Stage 2: into the bucket; stage 1: kept until the last pass."""
        self._open()
        if self.engine.zero_stage == 2:
            self.ledger.add("gradients", self.element * self.sizes[index])
            self._into_bucket(index)
        elif index not in self._waiting:
            self._waiting.add(index)
            self.ledger.add("gradients", self.element * self.sizes[index])

    def passed(self, *, last: bool) -> None:
        """What is left in the bucket is reduced; this rank's gradients are kept or summed."""
        if self.engine.zero_stage == 1:
            if not last:
                return
            for group in self.layout.groups:
                for index in (i for i in group if i in self._waiting):
                    self._into_bucket(index)
            self._waiting.clear()
        self._flush()
        self.ledger.add("buckets", -self._bucket.held)
        self._bucket = _Bucket()
        if self._sums:
            self.ledger.add("gradients", -self._own)
        else:
            self._sums = self._own
        self._own = 0

    def update(self) -> None:
        """Norm in float64, then group by group a flat gradient in the masters' format and AdamW."""
        ledger = self.ledger
        ledger.pass_by("other", NORM_BYTES * max(min(self.sizes[i], self.parts[self.spans[i][0]]) for i in self.mine))
        for group, part in enumerate(self.parts):
            if not self.compact:
                ledger.add("gradients", self.summed * part)
                if self.summed != self.master:
                    ledger.add("gradients", self.master * part)
                    ledger.add("gradients", -self.summed * part)
                if group == len(self.parts) - 1:
                    ledger.add("gradients", -self._sums)
            self.adam(part)
            ledger.add("gradients", -self.master * part)
        self._sums = 0

    def _open(self) -> None:
        if not self._bucket.held and self.cuda and self.engine.contiguous_gradients:
            self._bucket.held = self.element * self.engine.reduce_bucket_size * (2 if self.engine.overlap_comm else 1)
            self.ledger.add("buckets", self._bucket.held)

    def _into_bucket(self, index: int) -> None:
        bucket, elements, limit = self._bucket, self.sizes[index], self.engine.reduce_bucket_size
        if bucket.elements + elements > limit:
            self._flush()
        if elements > limit or not self.engine.contiguous_gradients:
            bucket.oversized.append(index)
        else:
            written = self.element * (bucket.elements + elements)
            if written > bucket.held:
                self.ledger.add("buckets", written - bucket.held)
                bucket.held = written
            self.ledger.add("gradients", -self.element * elements)
        bucket.elements += elements
        bucket.members.append(index)

    def _flush(self) -> None:
        """Reduce the bucket and keep of it what is this rank's."""
        bucket, mine = self._bucket, self.mine
        if not bucket.members:
            return
        if self.compact and not self._sums:
            self._sums = 4 * sum(self.parts)
            self.ledger.add("gradients", self._sums)
        copies = (self.element if self._slices(bucket.members) > 1 else 0) + (self.sent if self.sent != self.element else 0)
        self.ledger.pass_by("buckets", copies * bucket.elements)
        for index in bucket.members:
            if index in mine and not self.compact:
                self._keep(index)
            if index in bucket.oversized:
                self.ledger.add("gradients", -self.element * self.sizes[index])
        bucket.elements, bucket.members, bucket.oversized = 0, [], []

    def _keep(self, index: int) -> None:
        """Copy a gradient to this rank's; a GPU takes room for all of them at the first."""
        size = self.element * (sum(self.sizes[i] for i in self.mine) if self.cuda else self.sizes[index])
        if self._own == 0 or not self.cuda:
            self._own += size
            self.ledger.add("gradients", size)

    def _slices(self, members: Sequence[int]) -> int:
        """Pieces into which a bucket falls: runs of one owner, and every piece of one's own that is added elsewhere."""
        count, before = 0, None
        for index in members:
            group, start, end = self.spans[index]
            part = self.parts[group]
            for owner in range(start // part, (end - 1) // part + 1):
                own = self.compact and owner == self.rank
                if own or owner != before:
                    count += 1
                before = None if own else owner
        return count


def account(ledger: Ledger, layout: Layout, engine: EngineConfig, world: int, *, cuda: bool) -> Account:
    """The account of a configured engine."""
    return _kind(engine)(ledger, layout, engine, world, cuda=cuda)


def _kind(engine: EngineConfig) -> type[Account]:
    if engine.backend == "plain":
        return Whole
    if engine.zero_stage == 0:
        return Whole if engine.precision == "fp32" else UnpartitionedBf16
    if engine.zero_stage == 1 and engine.precision == "bf16" and engine.gradient_accumulation_dtype == "fp32":
        return PartitionedStates
    return Partitioned


def padded(elements: int, world: int) -> int:
    """Elements of a flat group, padded as ZeRO pads it."""
    return -(-elements // (ALIGNMENT * world)) * ALIGNMENT * world


def _spans(sizes: Sequence[int], group: Sequence[int]) -> dict[int, tuple[int, int]]:
    """First and last element (exclusive) of each parameter in its flat group."""
    ends = np.cumsum([sizes[i] for i in group]).tolist()
    return {i: (end - sizes[i], end) for i, end in zip(group, ends, strict=True)}
