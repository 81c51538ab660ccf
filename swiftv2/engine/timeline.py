"""What a trace of the torch profiler says: seconds of the profiled steps by phase, named range, kind of operator and operator.

Each moment of the main thread within a step belongs to the innermost event there. Events of the backward pass belong to the
range in which their forward operator ran: autograd numbers its nodes as it makes them, and the profiler notes that number for
the operator and for the node (`Sequence number`), so that no hook is needed there. Gradients are added up right after the node
that makes them. Operators of activation checkpoints, computed again within a node, belong to its backward pass.

On CUDA a kernel belongs to the operator that launched it (`correlation`). Not in the trace of a CPU: what its threads do beside
the main one; there an operator's seconds are those that the main thread spends in it.
"""

import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from swiftv2.errors import SwiftError

STEP = "step "
"""Name of a step's range, with its number behind."""
PHASES = ("data", "copy", "forward", "backward", "communication", "optimizer", "checkpoint", "evaluation")
"""Names of ranges that the engine's own clock uses too; what is in none of them is `other`."""
OUTSIDE = "Python and waiting"
"""Kind of the time in which no operator runs."""

_NODE = "autograd::engine::evaluate_function: "
_OF_THE_HOST = {"user_annotation", "cpu_op", "cuda_runtime", "cuda_driver"}
_OF_THE_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_LONG_GAP = 100.0
"""Microseconds from which a gap between kernels is counted."""
_MOST_BYTES = 2**29
"""Of a trace that is summed up: two million events, a minute or two."""
_TOP = 40
_KINDS = (
    ("communication", r"nccl|gloo|c10d::|all_?reduce|all_?gather|reduce_?scatter|broadcast_coalesced"),
    ("attention", r"scaled_dot_product|flash|fmha|efficient_attention|attention_(for|back)ward"),
    ("convolution", r"conv(olution|_|\d|$)|cudnn::|slow_conv"),
    ("normalisation", r"layer_?norm|batch_?norm|group_?norm|rms_?norm"),
    (
        "matrix products",
        r"(^|[^a-z])(add|b|badd?b|_scaled_|_)?mm($|_)|addmv|matmul|linear($|_)|gemm|cutlass|_addmm_activation|einsum",
    ),
    ("compiled kernels", r"^## call compiled|compiledfunction|torch-compiled region|^triton_|cpp_fused"),
    (
        "copies and indexing",
        (
            r"cop(y|ies)|memcpy|memset|(^|::|_)(cat|stack|clone|contiguous|to|pad|constant_pad_nd|repeat|roll|flip)$|index|gather|"
            r"scatter|embedding|take|masked_(select|fill)|nonzero|unique|where|catarray|slice_backward|select_backward|fill|zero"
        ),
    ),
    (
        "elementwise and sums",
        (
            r"elementwise|vectorized|reduce_kernel|_foreach_|fused_adam|multi_tensor|gelu|softmax|sigmoid|tanh|relu|dropout|loss|norm|"
            r"(^|::|_)(add|sub|rsub|mul|div|neg|pow|square|sqrt|rsqrt|exp|log|sum|mean|var|std|max|min|clamp|clamp_min|abs|lerp|"
            r"addcmul|addcdiv|threshold|count_nonzero|all|any|isfinite|eq|ne|lt|le|gt|ge|bitwise_\w+|logical_\w+|cumsum|sign|"
            r"reciprocal|floor_divide|remainder|normal|uniform|cos|sin|huber|smooth_l1)(_|__)?(_backward)?$"
        ),
    ),
)
_COMPILED = [(kind, re.compile(pattern)) for kind, pattern in _KINDS]


class Event(NamedTuple):
    """Something that lasted, in microseconds."""

    name: str
    category: str
    thread: Any
    start: float
    end: float
    args: Mapping[str, Any]


class Place(NamedTuple):
    """Where a moment belongs."""

    step: int | None = None
    phase: str = "other"
    path: tuple[str, ...] = ()
    """Named ranges around it, the outermost first."""
    direction: str = ""
    """forward, backward, or neither."""


Cell = tuple[str, tuple[str, ...], str, str]
"""Phase, path, direction, kind."""


class Moment(NamedTuple):
    """A piece of an event's own time."""

    event: Event
    around: Event | None
    """The operator within which it ran."""
    place: Place
    start: float
    end: float
    first: bool
    """Whether it is the event's first."""


class _Open:
    """An event of which the end has not come, and up to when its time was told."""

    __slots__ = ("around", "cursor", "event", "place", "told")

    def __init__(self, event: Event, place: Place, around: Event | None) -> None:
        self.event, self.place, self.around, self.cursor, self.told = event, place, around, event.start, False

    def up_to(self, until: float) -> Iterator[Moment]:
        """Its own time up to then, which may be none; at least one piece, so that it is counted."""
        if until > self.cursor or not self.told:
            end = max(until, self.cursor)
            yield Moment(self.event, self.around, self.place, self.cursor, end, not self.told)
            self.told, self.cursor = True, end


def too_large(path: Path) -> bool:
    """Whether summing a trace up would take too much of the host's memory."""
    return path.stat().st_size > _MOST_BYTES


def read_trace(path: Path) -> list[Event]:
    """What lasted in a trace in Chrome's format.

    Raises:
        SwiftError: it is damaged, or so large that to read it would take the host's memory.
    """
    if too_large(path):
        size = path.stat().st_size / 1e9
        raise SwiftError(f"a trace of {size:.1f} GB is too large to be summed up: open it by itself, or profile fewer steps")
    try:
        with path.open(encoding="utf-8") as stream:
            told = json.load(stream)["traceEvents"]
        return [
            Event(
                str(one["name"]),
                str(one.get("cat", "")),
                one.get("tid"),
                float(one["ts"]),
                float(one["ts"]) + float(one["dur"]),
                one.get("args", {}),
            )
            for one in told
            if one.get("ph") == "X"
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise SwiftError(f"{path}: no trace of the profiler: {error}") from error


@cache
def kind_of(name: str) -> str:
    """Kind of an operator or a kernel, by its name."""
    plain = name.removeprefix("aten::").lower()
    return next((kind for kind, pattern in _COMPILED if pattern.search(plain)), "other")


def summarise(events: Sequence[Event], names: Iterable[str]) -> dict[str, Any]:
    """Sum up a trace.

    Args:
        events: of one rank.
        names: of the ranges of modules.

    Returns:
        Of all steps together: `steps`, their numbers; `seconds`; `cells`: seconds by phase, range (names from the outermost to
        the innermost), direction and kind, of the main thread on the `cpu`, which add up to `seconds`, and of kernels on the
        `device`; `operators`: those that took longest, with `count`; `between`: seconds of phases outside of steps; `device`:
        busy and idle seconds, or None without one; `events`: how many there are.

    Raises:
        SwiftError: no step is in it.
    """
    steps = sorted((one for one in events if _number(one) is not None), key=_order)
    if not steps:
        raise SwiftError("no step is in the trace")
    main = steps[0].thread
    # While autograd's own thread works for a GPU, the main one waits for it: together they are one line of time.
    threads = {main} | {one.thread for one in events if one.name.startswith(_NODE)}
    line = sorted((one for one in events if one.thread in threads and one.category in _OF_THE_HOST), key=_order)
    exchanges = _merged((one.start, one.end) for one in events if one.thread not in threads and one.name.startswith("gloo:"))

    host = _Host()
    for moment in _moments(line, frozenset(names)):
        host.add(moment, exchanges)
    kernels = [one for one in events if one.category in _OF_THE_DEVICE]
    device = host.launched_by(kernels)
    operators = sorted(host.operators.items(), key=lambda one: -max(one[1].cpu, one[1].device))
    return {
        "steps": [_number(one) for one in steps],
        "seconds": sum(one.end - one.start for one in steps) / 1e6,
        "cells": [
            {
                "phase": cell[0],
                "range": list(cell[1]),
                "direction": cell[2],
                "kind": cell[3],
                "cpu": host.cells[cell] / 1e6,
                "device": device[cell] / 1e6,
            }
            for cell in sorted(host.cells.keys() | device.keys(), key=lambda cell: -host.cells[cell] - device[cell])
        ],
        "operators": [
            {
                "name": name,
                "shapes": shapes,
                "kind": kind_of(name),
                "count": told.count,
                "cpu": told.cpu / 1e6,
                "device": told.device / 1e6,
            }
            for (name, shapes), told in operators[:_TOP]
        ],
        "between": {phase: seconds / 1e6 for phase, seconds in host.between.items()},
        "device": _device(kernels, steps) if kernels else None,
        "events": len(events),
    }


@dataclass
class _Operator:
    """How often an operator was called, and its own microseconds."""

    count: int = 0
    cpu: float = 0.0
    device: float = 0.0


class _Host:
    """Microseconds of the main thread, added up."""

    def __init__(self) -> None:
        self.cells: defaultdict[Cell, float] = defaultdict(float)
        self.between: defaultdict[str, float] = defaultdict(float)
        self.operators: defaultdict[tuple[str, str], _Operator] = defaultdict(_Operator)
        self.launches: dict[Any, tuple[Place, Event]] = {}

    def add(self, moment: Moment, exchanges: Sequence[tuple[float, float]]) -> None:
        """Add a moment; `exchanges` are the times at which threads of the process group were at work."""
        event, place, lasted = moment.event, moment.place, moment.end - moment.start
        if moment.first and "correlation" in event.args:
            self.launches[event.args["correlation"]] = place, moment.around or event
        if place.step is None:
            if place.phase != "other":
                self.between[place.phase] += lasted
            return
        kind = _kind(event)
        # A rank waits for others outside of operators.
        waited = _overlap(exchanges, moment.start, moment.end) if kind == OUTSIDE else 0.0
        self.cells[place.phase, place.path, place.direction, kind] += lasted - waited
        if waited:
            self.cells[place.phase, place.path, place.direction, "communication"] += waited
        if event.category == "cpu_op" and kind != OUTSIDE:
            told = self.operators[_signature(event)]
            told.count += moment.first
            told.cpu += lasted

    def launched_by(self, kernels: Iterable[Event]) -> defaultdict[Cell, float]:
        """Microseconds of kernels, each where it was launched; its operator is told them too."""
        cells: defaultdict[Cell, float] = defaultdict(float)
        for kernel in kernels:
            place, cause = self.launches.get(kernel.args.get("correlation"), (Place(), kernel))
            if place.step is None:
                continue
            kind = kind_of(cause.name) if cause.category == "cpu_op" else "other"
            kind = kind_of(kernel.name) if kind == "other" else kind
            cells[place.phase, place.path, place.direction, kind] += kernel.end - kernel.start
            if cause.category == "cpu_op":
                self.operators[_signature(cause)].device += kernel.end - kernel.start
        return cells


def _signature(operator: Event) -> tuple[str, str]:
    """Name and, where they were recorded, shapes."""
    return operator.name, str(operator.args.get("Input Dims", ""))


def _moments(line: Sequence[Event], names: frozenset[str]) -> Iterator[Moment]:
    """Each event's time of its own, in pieces between the events within it."""
    made: dict[Any, Place] = {}
    stack: list[_Open] = []
    last = Place()

    def close(until: float) -> Iterator[Moment]:
        while stack and stack[-1].event.end <= until:
            done = stack.pop()
            yield from done.up_to(done.event.end)
            if stack:
                stack[-1].cursor = max(stack[-1].cursor, done.event.end)

    for whole in line:
        yield from close(whole.start)
        above = stack[-1] if stack else None
        around = above.place if above else Place()
        # Ends of nested events are told to fractions of a microsecond.
        event = whole._replace(end=min(whole.end, above.event.end)) if above else whole
        place = _place(event, around, names, made, last)
        if event.name.startswith(_NODE):
            last = place
        elif place.direction != "backward" and "Sequence number" in event.args:
            # Of the operators with one number, the last to begin is the one that made the node.
            made[event.args["Sequence number"]] = place
        if above:
            yield from above.up_to(event.start)
        operator = next((one.event for one in reversed(stack) if one.event.category == "cpu_op"), None)
        stack.append(_Open(event, place, operator))
    yield from close(float("inf"))


def _place(event: Event, around: Place, names: frozenset[str], made: Mapping[Any, Place], last: Place) -> Place:
    """Where the time within an event belongs."""
    if event.category == "user_annotation":
        if _number(event) is not None:
            return Place(_number(event))
        if event.name in PHASES:
            return around._replace(phase=event.name)
        if event.name in names:
            return around._replace(path=(*around.path, event.name), direction="forward")
    if event.name.startswith(_NODE):
        # What adds a gradient up has no number, and comes right after what made the gradient.
        path = made[event.args["Sequence number"]].path if event.args.get("Sequence number") in made else last.path
        return around._replace(path=path, direction="backward")
    return around


def _kind(event: Event) -> str:
    if event.category == "user_annotation" or event.name.startswith(_NODE) or "AccumulateGrad" in event.name:
        kind = kind_of(event.name)
        return kind if kind in {"compiled kernels", "communication"} else OUTSIDE
    if event.category != "cpu_op":
        return "waiting for the device" if "ynchronize" in event.name else "launching kernels"
    return kind_of(event.name)


def _device(kernels: Sequence[Event], steps: Sequence[Event]) -> dict[str, Any]:
    """How busy the device was from the first step's begin to the last one's end."""
    begin, end = steps[0].start, steps[-1].end
    busy = _merged((max(one.start, begin), min(one.end, end)) for one in kernels if one.end > begin and one.start < end)
    gaps = [after - before for (_, before), (after, _) in zip([(begin, begin), *busy], [*busy, (end, end)], strict=True)]
    worked = sum(stop - start for start, stop in busy)
    longest: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for one in kernels:
        longest[one.name][0] += 1
        longest[one.name][1] += one.end - one.start
    return {
        "seconds": (end - begin) / 1e6,
        "busy": worked / 1e6,
        "idle": (end - begin - worked) / 1e6,
        "long_gaps": sum(gap >= _LONG_GAP for gap in gaps),
        "long_gap_seconds": sum(gap for gap in gaps if gap >= _LONG_GAP) / 1e6,
        "kernels": [
            {"name": name, "kind": kind_of(name), "count": int(count), "seconds": seconds / 1e6}
            for name, (count, seconds) in sorted(longest.items(), key=lambda one: -one[1][1])[:_TOP]
        ],
    }


def _number(event: Event) -> int | None:
    """Number of the step whose range an event is."""
    digits = event.name.removeprefix(STEP)
    return int(digits) if event.category == "user_annotation" and event.name.startswith(STEP) and digits.isdecimal() else None


def _order(event: Event) -> tuple[float, float]:
    return event.start, -event.end


def _merged(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Intervals that do not touch, in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _overlap(intervals: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """How long it is from start to end within intervals that do not touch."""
    at = max(bisect_right(intervals, (start, float("inf"))) - 1, 0)
    total = 0.0
    for begin, stop in intervals[at:]:
        if begin >= end:
            break
        total += max(min(stop, end) - max(begin, start), 0.0)
    return total
