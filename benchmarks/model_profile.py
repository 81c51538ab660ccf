"""Which operators the time of a step goes to, by PyTorch's profiler."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from machine import table
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("scaled_dot_product", "flash_attention", "efficient_attention", "bmm", "softmax", "fmha")),
    ("linear layers", ("addmm", "::mm", "gemm", "nvjet", "cutlass", "linear")),
    ("norms", ("layer_norm",)),
    ("GELU", ("gelu",)),
    (
        "moves and fills",
        ("copy", "index", "gather", "scatter", "cat", "pad", "roll", "fill", "zero", "clone", "slice", "memset", "memcpy"),
    ),
    ("sums and additions", ("add", "sum", "mul", "div", "pow", "where", "sub")),
)
"""Kinds of operators by what their names hold; the first that fits counts."""
REST = "rest"
OperatorTimes = dict[str, tuple[float, int]]
"""Seconds and calls by operator or kernel."""


def kind_of(operator: str) -> str:
    """The kind of an operator or kernel."""
    lower = operator.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), REST)


def self_times(work: Callable[[], object], device: torch.device) -> OperatorTimes:
    """Seconds that each operator spent in itself and its calls; on a GPU those of its kernels."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        work()
        if cuda:
            torch.cuda.synchronize(device)
    found = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent > 0 and (not cuda or event.device_type == DeviceType.CUDA):
            found[event.key] = (spent / 1e6, event.count)
    return found


def kinds_table(profiles: Mapping[str, OperatorTimes]) -> list[str]:
    """Lines: milliseconds and share of each kind of operator, a column for each profile."""
    kinds = [*(kind for kind, _ in KINDS), REST]
    rows = []
    for kind in kinds:
        row = [kind]
        for times in profiles.values():
            total = sum(seconds for seconds, _ in times.values())
            spent = sum(seconds for name, (seconds, _) in times.items() if kind_of(name) == kind)
            row.append(f"{1000 * spent:.0f} ms ({100 * spent / total:.0f} %)")
        rows.append(row)
    totals = [sum(seconds for seconds, _ in times.values()) for times in profiles.values()]
    rows.append(["all", *(f"{1000 * total:.0f} ms" for total in totals)])
    return table(["kind", *profiles], rows)


def operators_table(times: OperatorTimes, count: int) -> list[str]:
    """Lines: the operators that take most."""
    total = sum(seconds for seconds, _ in times.values())
    first = sorted(times.items(), key=lambda item: -item[1][0])[:count]
    return table(["operator", "kind", "calls", "ms", "share"], _rows(first, total))


def _rows(items: Sequence[tuple[str, tuple[float, int]]], total: float) -> Iterator[list[str]]:
    for name, (seconds, calls) in items:
        shown = name.replace("aten::", "").replace("|", "/")[:70]
        yield [f"`{shown}`", kind_of(name), str(calls), f"{1000 * seconds:.0f}", f"{100 * seconds / total:.1f} %"]
