"""Which ranks are slow, and at what: waiting for data or computing."""

import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from swiftv2.engine.collective import gather
from swiftv2.engine.launch import World

SLOW_RATIO = 1.5
"""How many times the median over ranks a rank must take to count as slow."""
SLOW_SHARE = 0.05
"""Which share of a step it must lose besides."""
_LONGEST_WINDOW = 1000


@dataclass(frozen=True)
class RankPace:
    """Medians over the last steps of one rank, in seconds a step."""

    rank: int
    host: str
    data: float
    """Waiting for batches."""
    compute: float
    """In the forward pass, the one part in which no rank waits for another."""
    step: float


def compare(paces: Sequence[RankPace]) -> dict[str, Any]:
    """Ranks side by side, and those that hold up the others.

    Of an even number of values, the lower middle one is the median: of two ranks, too, one can be slow.

    Args:
        paces: one for each rank.

    Returns:
        `step_seconds`, `data_seconds`, `compute_seconds`: median, least and most over ranks; `ranks`: every rank's own;
        `slow`: rank, host, `what` ("data" or "compute"), `seconds`, the `median` over ranks, and `share`: of a step's time,
        by how much it is longer.
    """
    step = statistics.median_low([pace.step for pace in paces])
    report: dict[str, Any] = {"step_seconds": _spread([pace.step for pace in paces])}
    slow = []
    whats: tuple[Literal["data", "compute"], ...] = ("data", "compute")
    for what in whats:
        seconds = [getattr(pace, what) for pace in paces]
        spread = report[f"{what}_seconds"] = _spread(seconds)
        median = spread["median"]
        slow += [
            {
                "rank": pace.rank,
                "host": pace.host,
                "what": what,
                "seconds": own,
                "median": median,
                "share": (own - median) / step if step > 0 else 1.0,
            }
            for pace, own in zip(paces, seconds, strict=True)
            if own > SLOW_RATIO * median and own - median > SLOW_SHARE * step
        ]
    return report | {"ranks": [asdict(pace) for pace in paces], "slow": slow}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median_low(values), "least": min(values), "most": max(values)}


class Pace:
    """Measures this rank's steps between two reports: the forward passes of a module, other than those of evaluations."""

    def __init__(self, world: World, module: nn.Module) -> None:
        self._on_gpu = world.device.type == "cuda"
        self._waited = 0.0
        self._clocks: list[Callable[[], float]] = []
        self._end_forward: Callable[[], None] | None = None
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=_LONGEST_WINDOW)
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._finish)

    def waited(self, seconds: float) -> None:
        """The step has waited for a micro-batch."""
        self._waited += seconds

    def stepped(self, seconds: float) -> None:
        """A step is done, the device has been waited for: what it took as a whole."""
        self._steps.append((self._waited, sum(clock() for clock in self._clocks), seconds))
        self._waited = 0.0
        self._clocks.clear()

    def report(self, world: World) -> dict[str, Any]:
        """Compare all ranks over the steps since the last report, see `compare` (collective)."""
        data, compute, step = (statistics.median(values) for values in zip(*self._steps or [(0.0, 0.0, 0.0)], strict=True))
        self._steps.clear()
        return compare(gather(RankPace(world.rank, socket.gethostname(), data, compute, step), world))

    def _begin(self, module: nn.Module, inputs: object) -> None:
        del inputs
        if module.training:
            self._end_forward = self._gpu_clock() if self._on_gpu else self._host_clock()

    def _finish(self, module: nn.Module, inputs: object, output: object) -> None:
        del module, inputs, output
        if self._end_forward is not None:
            self._end_forward()
            self._end_forward = None

    def _host_clock(self) -> Callable[[], None]:
        began = time.perf_counter()

        def end() -> None:
            seconds = time.perf_counter() - began
            self._clocks.append(lambda: seconds)

        return end

    def _gpu_clock(self) -> Callable[[], None]:
        """Kernels run later than they are asked for: their own clock is read when the step has waited for them."""
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()

        def seconds() -> float:
            ended.synchronize()
            return float(began.elapsed_time(ended)) / 1000

        def end() -> None:
            ended.record()
            self._clocks.append(seconds)

        return end
