"""Memory of one rank in an optimizer step, and the largest micro-batch that fits a GPU."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swiftv2.config.engine import EngineConfig
from swiftv2.plan.accounts import KINDS, Account, Layout, Ledger, account
from swiftv2.plan.tape import FREED, GRADIENT, HELD, INSIDE, Tape

CONTEXT_BYTES = 1_000_000_000
"""CUDA context, cuBLAS workspaces and NCCL's buffers, outside PyTorch's allocator: 0.6 to 1.2 GB are usual."""
FRAGMENTATION = 0.05
"""Share of what PyTorch holds that it cannot hand out again (expandable segments on); an assumption."""
MOST_CLIPS = 4096
"""Micro-batches are searched up to here."""


@dataclass(frozen=True)
class Passes:
    """Tapes of one module, and the bytes of its input."""

    tape: Callable[[int], Tape]
    """The tape of so many clips."""
    input_bytes: Callable[[int], float]
    """Bytes of one micro-batch as it comes from the store, for so many clips."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes that the fullest rank holds at the moment when it holds most."""

    weights: int
    """Weights in the format of the passes, and frozen ones."""
    gradients: int
    """Gradients, whole or this rank's, with copies that live beside them."""
    optimizer: int
    """fp32 masters where there are any, and AdamW's moments."""
    activations: int
    """What the backward pass needs, and temporaries of both passes."""
    buckets: int
    """Buffers in which gradients wait and travel."""
    other: int
    """The micro-batch from the store, tables of the model, temporaries of the step."""
    reserve: int
    """Room for what cannot be planned: CUDA context, NCCL, fragmentation; 0 on a CPU."""
    most: dict[str, int]
    """The most of each kind at any time of the step, which need not be the moment of the peak."""

    @property
    def tensors(self) -> int:
        """Bytes of all tensors."""
        return sum(getattr(self, kind) for kind in KINDS)

    @property
    def total(self) -> int:
        """Bytes of tensors and reserve."""
        return self.tensors + self.reserve

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by kind at the peak, `reserve` and `total`."""
        return {kind: int(getattr(self, kind)) for kind in (*KINDS, "reserve")} | {"total": self.total}

    def to_dict(self) -> dict[str, Any]:
        """`parts`, and the most of each kind under `most`."""
        return {**self.parts, "most": self.most}


def rank_memory(
    passes: Passes,
    layout: Layout,
    engine: EngineConfig,
    world: int,
    micro_batch: int,
    accumulation: int,
    *,
    cuda: bool = True,
) -> RankMemory:
    """Memory of the fullest rank at its peak over an optimizer step that is not the first.

    Args:
        passes: what the module's passes hold.
        layout: its trainable parameters.
        engine: backend, ZeRO stage, formats, buckets.
        world: ranks.
        micro_batch: clips of a rank at a time.
        accumulation: micro-batches of a rank in a step.
        cuda: whether the device is a GPU, with a reserve, the next micro-batch beside this one, and buffers taken whole.
    """
    tape = passes.tape(micro_batch)
    ledger = Ledger()
    books = account(ledger, layout, engine, world, cuda=cuda)
    books.begin()
    ledger.add("weights", tape.frozen_bytes)
    ledger.add("other", tape.kept[0] + tape.kept[1] * micro_batch)
    ledger.add("other", passes.input_bytes(micro_batch) * (2 if cuda else 1))
    # The first micro-batch makes sums, the second adds to them, every further one is like the second.
    turns = min(accumulation, 3)
    for turn in range(turns):
        _play(tape, micro_batch, ledger, books)
        books.passed(last=turn == turns - 1)
    books.update()
    held = {kind: math.ceil(size) for kind, size in ledger.at_most.items()}
    reserve = CONTEXT_BYTES + math.ceil(FRAGMENTATION * ledger.most) if cuda else 0
    most = {kind: math.ceil(size) for kind, size in ledger.most_of.items()}
    return RankMemory(**held, reserve=reserve, most=most)


def _play(tape: Tape, micro_batch: int, ledger: Ledger, books: Account) -> None:
    """One forward and backward pass; what is left of it at its end goes then."""
    held: dict[int, float] = {}
    for event in tape.events:
        size = event.fixed + event.each * micro_batch
        if event.kind == HELD:
            held[event.number] = size
            ledger.add("activations", size)
        elif event.kind == FREED:
            ledger.add("activations", -held.pop(event.number, 0.0))
        elif event.kind == GRADIENT:
            ledger.add("activations", -size)
            books.gradient(event.number)
        elif event.kind == INSIDE and not books.cuda:
            ledger.pass_by("activations", size)
    ledger.add("activations", -ledger.now["activations"])


def largest_micro_batch(
    passes: Passes, layout: Layout, engine: EngineConfig, world: int, memory_bytes: float, *, accumulated: bool
) -> int:
    """Most clips that a rank can compute at a time on a GPU; 0 where not even one fits.

    Args:
        passes: what the module's passes hold.
        layout: its trainable parameters.
        engine: backend, ZeRO stage, formats, buckets.
        world: ranks.
        memory_bytes: what the GPU has.
        accumulated: whether gradients of several micro-batches are summed, which takes more room.
    """

    def fits(clips: int) -> bool:
        return rank_memory(passes, layout, engine, world, clips, 2 if accumulated else 1).total <= memory_bytes

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= MOST_CLIPS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
