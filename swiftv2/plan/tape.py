"""What a forward and backward pass holds, recorded from the real module without allocating it.

The module runs on PyTorch's fake tensors: shapes, formats and storages are real, numbers are not there. Integers and
booleans are the exception: they decide what is gathered, and so the shapes of packed tokens, and are computed for real.
"""

import gc
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from swiftv2.errors import SwiftError

HELD, FREED, GRADIENT, INSIDE = 0, 1, 2, 3
"""Kinds of events: a storage appears, a storage goes, a parameter's gradient is complete, a CPU kernel takes room inside."""

_ITEM = torch.ops.aten._local_scalar_dense.default  # noqa: SLF001 (the name of an operator)


class Event(NamedTuple):
    """Something that happens to memory."""

    kind: int
    number: int
    """Of the storage, or of the parameter whose gradient is complete; else 0."""
    fixed: float
    """Bytes whatever the micro-batch."""
    each: float
    """Bytes for every clip of the micro-batch."""


@dataclass(frozen=True)
class Tape:
    """Forward and backward pass of one micro-batch, event by event, and what stays between passes."""

    events: tuple[Event, ...]
    sizes: tuple[int, ...]
    """Elements of each trainable parameter, in the module's order."""
    frozen_bytes: int
    """Bytes of parameters that are not trained, in the format in which they were recorded."""
    kept: tuple[float, float]
    """Bytes (fixed, for every clip) of buffers and of tables that the model keeps between passes."""
    element: int
    """Bytes of an element of the weights."""
    micro_batch: int | None = None
    """The only micro-batch that this tape describes; None where it holds for every one."""


class FakeNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs floating-point operations on fake tensors, and those on integers and booleans for real."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.building = True
        """While a module is built, whatever asks for a number that is not there gets 0: first values are of no interest."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        del types
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        return self._computed(func, args, kwargs or {})

    def _computed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if self.building and func is _ITEM and isinstance(tensors[0], FakeTensor):
            return 0
        dtype = kwargs.get("dtype")
        numbers = any(isinstance(x, FakeTensor) or x.is_floating_point() for x in tensors)
        if numbers or (dtype is not None and dtype.is_floating_point):
            return self._faked(func, args, kwargs)
        if not tensors and dtype is None:
            made = self._faked(func, args, kwargs)
            if not isinstance(made, Tensor) or made.is_floating_point():
                return made
        made = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda x: self._fake.from_tensor(x) if x.is_floating_point() else x, made)

    def _faked(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        with self._fake:
            return func(*args, **kwargs)


class Recorder(FakeNumbers):  # type: ignore[no-untyped-call]
    """Writes down every storage that appears and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int, int]] = []
        self.numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.live = 0
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation and the storages of its results."""
        if func is torch.ops.aten.sum.dim_IntList and not args[0].is_floating_point():
            # Sums of integers and booleans are taken over an int64 copy on a CPU.
            self.events.append((INSIDE, 0, args[0].numel() * torch.int64.itemsize))
        made = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return made

    def note(self, tensor: Tensor) -> int:
        """Number of a tensor's storage, which is new or known."""
        storage = tensor.untyped_storage()
        number = self.numbers.get(storage)
        if number is None:
            number, size = self._count, storage.nbytes()
            self._count += 1
            self.numbers[storage] = number
            self.events.append((HELD, number, size))
            self.live += size
            weakref.finalize(storage, self._gone, number, size).atexit = False
        return number

    def _gone(self, number: int, size: int) -> None:
        self.events.append((FREED, number, size))
        self.live -= size


def record(make: Callable[[], tuple[nn.Module, Any]], micro_batch: int, precision: str) -> Tape:
    """Run a module's forward and backward pass and write down what it holds.

    A forward pass before it fills the tables that models keep between passes.

    Args:
        make: gives the module, whose `forward(batch)` gives a scalar loss, and a micro-batch; called with fake tensors.
        micro_batch: clips of that micro-batch.
        precision: `fp32` or `bf16`, the format of weights and activations.
    """
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()  # Cycles would be freed at random moments.
    forget_tables()
    try:
        with Recorder() as recorder:
            return _record(recorder, make, micro_batch, precision)
    finally:
        # Tables made meanwhile may hold numbers that are not there.
        forget_tables()
        if collecting:
            gc.enable()


def forget_tables() -> None:
    """Empty the caches in which models keep tables by shape."""
    for name, module in list(sys.modules.items()):
        if name.startswith("swiftv2.models."):
            for function in vars(module).values():
                while callable(function):
                    if hasattr(function, "cache_clear"):
                        function.cache_clear()
                    function = getattr(function, "__wrapped__", None)  # noqa: PLW2901 (what is under a decorator)


def _record(recorder: Recorder, make: Callable[[], tuple[nn.Module, Any]], micro_batch: int, precision: str) -> Tape:
    module, batch = make()
    recorder.building = False
    if precision == "bf16":
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    trained = [p for p in module.parameters() if p.requires_grad]
    frozen = sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)
    before = recorder.live
    with torch.no_grad():
        module(batch)
    kept = recorder.live - before + sum(b.numel() * b.element_size() for b in module.buffers())
    recorder.events.clear()
    for index, parameter in enumerate(trained):

        def note(grown: Tensor, number: int = index) -> None:
            recorder.events.append((GRADIENT, number, grown.numel() * grown.element_size()))

        parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
    torch.autograd.backward(module(batch))
    events = tuple(Event(kind, number, float(size), 0.0) for kind, number, size in recorder.events)
    missing = len(trained) - sum(event.kind == GRADIENT for event in events)
    if missing:
        raise SwiftError(f"{missing} trainable parameters get no gradient: memory cannot be planned for this model")
    sizes = tuple(p.numel() for p in trained)
    return Tape(events, sizes, frozen, (float(kept), 0.0), trained[0].element_size(), micro_batch)


def stretch(one: Tape, two: Tape) -> Tape | None:
    """A tape for every micro-batch, from those of two different ones.

    None where the passes differ in more than sizes, as those of a single clip do from others: what has one clip need not
    be moved to be looked at otherwise.
    """
    first, second = one.micro_batch, two.micro_batch
    pairs = list(zip(_named(one.events), _named(two.events), strict=False))
    same = len(one.events) == len(two.events) and all((a.kind, a.number) == (b.kind, b.number) for a, b in pairs)
    if not same or first is None or second is None or first == second:
        return None

    def line(at_first: float, at_second: float) -> tuple[float, float]:
        each = (at_second - at_first) / (second - first)
        return at_first - first * each, each

    events = tuple(Event(a.kind, a.number, *line(a.fixed, b.fixed)) for a, b in pairs)
    return Tape(events, one.sizes, one.frozen_bytes, line(one.kept[0], two.kept[0]), one.element)


def _named(events: Sequence[Event]) -> list[Event]:
    """The same with storages numbered in the order in which they appear."""
    names: dict[int, int] = {}
    storages = {HELD, FREED}
    return [e._replace(number=names.setdefault(e.number, len(names))) if e.kind in storages else e for e in events]
