"""What published runs lost against their machines' figures, and forecasts within the bounds that this sets.

The runs are v2's 4.1 B model on Aurora and Frontier. Each reported rate gives one slowdown, each machine a fitted one. A
forecast for another machine lies between the least and the most of what any reported rate shows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from scipy import optimize

from swiftv2.plan.machines import Machine, machine
from swiftv2.plan.network import Job, Point, Slowdown, Traffic, forecast, step_communication, zero_traffic

Reading = Literal["contention", "straggler"]
"""What a loss is put down to: the network, or waiting for the slowest rank."""

PARAMETERS = 4_074_000_000
"""The 4.1 B model: 3.2B's recipe at E = 864, as parameters grow with the square of the width."""
MICRO_BATCHES = (1, 2)
"""Clips of a rank in a step; not reported. 1 fits both machines best, 2 not much worse, more clearly worse."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default."""


@dataclass(frozen=True)
class Run:
    """Reported throughput on one machine."""

    machine: str
    """Name of the machine."""
    alone: float
    """Clips a second on one node."""
    reported: tuple[tuple[int, float], ...]
    """(nodes, clips a second)."""


RUNS = (
    Run("aurora", 27.44, ((4, 83.85), (16, 276.29), (64, 877.98), (256, 2934.0), (512, 4252.0))),
    Run("frontier", 15.29, ((64, 227.5), (512, 633.6), (2048, 1828.8))),
)
"""Strong scaling as v2 reported it for its 4.1 B model: clips of 20 frames a second."""


@dataclass(frozen=True)
class Bounds:
    """Slowdowns that the reported rates allow."""

    least: Slowdown
    """The least that any reported rate shows."""
    likely: Slowdown
    """What fits Aurora, whose loss is the smaller."""
    most: Slowdown
    """The most that any reported rate shows."""


@dataclass(frozen=True)
class Forecast:
    """A job on some number of nodes, with its interval."""

    likely: Point
    """With Aurora's fitted slowdown."""
    slow: Point
    """With the largest slowdown of any reported rate."""
    fast: Point
    """With the smallest slowdown of any reported rate."""


def run_traffic() -> Traffic:
    """What the 4.1 B model sends for a step: ZeRO-1 in bf16."""
    return zero_traffic(PARAMETERS, 1, gradient_itemsize=2, weight_itemsize=2, bucket_elements=BUCKET_ELEMENTS)


def run_job(run: Run, micro_batch: int = MICRO_BATCHES[0]) -> Job:
    """The 4.1 B model on a machine: its computation is what one node took less what its links take."""
    where, traffic = machine(run.machine), run_traffic()
    step = micro_batch * where.gpus_per_node / run.alone
    return Job((step - step_communication(where, 1, traffic)) / micro_batch, micro_batch, traffic)


def predict(run: Run, nodes: int, slowdown: Slowdown, micro_batch: int = MICRO_BATCHES[0]) -> float:
    """Clips a second of the 4.1 B model on a number of nodes of a run's machine."""
    return forecast(run_job(run, micro_batch), machine(run.machine), [nodes], slowdown)[0].clips_per_second


def fit(
    run: Run, reading: Reading = "contention", most_nodes: int | None = None, micro_batch: int = MICRO_BATCHES[0]
) -> Slowdown:
    """The slowdown of one kind with the least squared error of log throughput.

    Args:
        run: reported rates.
        reading: the kind.
        most_nodes: rates on more nodes are left out of the fit.
        micro_batch: clips of a rank in a step.
    """
    used = [(nodes, rate) for nodes, rate in run.reported if most_nodes is None or nodes <= most_nodes]

    def error(value: float) -> float:
        slowdown = _slowdown(reading, value)
        return math.fsum(math.log(predict(run, nodes, slowdown, micro_batch) / rate) ** 2 for nodes, rate in used)

    return _slowdown(reading, _least(error))


@cache
def bounds(reading: Reading = "contention") -> Bounds:
    """The slowdowns of one kind that the reported rates allow: each rate alone, and each machine under each micro-batch."""
    alone = [fit(Run(run.machine, run.alone, (point,)), reading) for run in RUNS for point in run.reported]
    whole = [fit(run, reading, micro_batch=micro_batch) for run in RUNS for micro_batch in MICRO_BATCHES]
    each: list[float] = [getattr(slowdown, reading) for slowdown in alone + whole]
    return Bounds(_slowdown(reading, min(each)), fit(RUNS[0], reading), _slowdown(reading, max(each)))


def forecast_interval(
    job: Job,
    where: Machine,
    nodes: Sequence[int],
    *,
    accumulation: int = 1,
    global_batch: int | None = None,
    reading: Reading = "contention",
) -> list[Forecast]:
    """Throughput of a job on several numbers of nodes, with what both published machines allow.

    Args:
        job: the model and what it sends.
        where: the machine.
        nodes: numbers of nodes, each a point.
        accumulation: weak scaling: micro-batches of a rank in a step.
        global_batch: strong scaling: clips in a step.
        reading: what the published losses are put down to.

    Raises:
        UsageError: the machine has fewer nodes, or the global batch cannot be split over them.
    """
    allowed = bounds(reading)
    likely, slow, fast = (
        forecast(job, where, nodes, slowdown, accumulation=accumulation, global_batch=global_batch)
        for slowdown in (allowed.likely, allowed.most, allowed.least)
    )
    return [Forecast(*points) for points in zip(likely, slow, fast, strict=True)]


def _slowdown(reading: Reading, value: float) -> Slowdown:
    return Slowdown(contention=value) if reading == "contention" else Slowdown(straggler=value)


def _least(error: Callable[[float], float]) -> float:
    """The argument between 0 and 10 at which an error with one minimum is least."""
    found = optimize.minimize_scalar(error, bounds=(0.0, 10.0), method="bounded", options={"xatol": 1e-7})
    return float(found.x)
