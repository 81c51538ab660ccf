"""What a step costs on many nodes: collectives over a node's links and its network interfaces, and what is waited for.

The equations stand in docs/scaling-forecast.md. Sizes are bytes, rates bytes a second, times seconds. Nothing here is
fitted: what software loses against the machine's figures comes in as a `Slowdown`, which calibration.py fits to
published runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from swiftv2.errors import UsageError
from swiftv2.plan.machines import Machine

BACKWARD_SHARE = 2 / 3
"""Share of the computation that is the backward pass: its products are twice those of the forward pass."""
PARAMETER_GROUPS = 2
"""Groups in which weights are gathered: those with weight decay and those without."""


@dataclass(frozen=True)
class Slowdown:
    """What is lost against the machine's published figures; zeros mean nothing."""

    contention: float = 0.0
    """The bandwidth that a node reaches in the network falls as nodes ** -contention (0 to 1)."""
    straggler: float = 0.0
    """Waiting for the slowest rank: computation grows by this share for every e-fold of nodes."""


@dataclass(frozen=True)
class Traffic:
    """What ranks send each other for one optimizer step, as whole tensors (what a rank sends follows from them)."""

    gradient_bytes: float
    """Bytes of all gradients, each time they are summed over ranks."""
    gradient_messages: int
    """Buckets in which they are summed."""
    weight_bytes: float
    """Bytes of all weights gathered at the end of a step; 0 where every rank updates all of them."""
    weight_messages: int
    """Collectives in which they are gathered."""
    every_micro_step: bool
    """Whether gradients are summed after every micro-batch (ZeRO-2) or once a step."""


@dataclass(frozen=True)
class Job:
    """One model on one kind of GPU."""

    clip_seconds: float
    """Seconds in which a rank computes forward and backward of one clip, communication left out."""
    micro_batch: int
    """Clips that a rank computes at a time, at most."""
    traffic: Traffic
    """What is sent for a step."""
    overlap: float = 0.0
    """Share of the backward pass behind which summing gradients can hide (0 to 1)."""


@dataclass(frozen=True)
class Point:
    """A job on some number of nodes."""

    nodes: int
    """Nodes."""
    ranks: int
    """GPUs."""
    global_batch: int
    """Clips in one optimizer step."""
    accumulation: int
    """Micro-batches of a rank in one optimizer step."""
    step_seconds: float
    """Seconds of one optimizer step."""
    communication_seconds: float
    """Seconds of it in which ranks only communicate."""
    clips_per_second: float
    """Clips a second over all ranks."""
    efficiency: float
    """Clips a second over nodes times what one node does."""


def zero_traffic(
    parameters: int, stage: Literal[0, 1, 2], *, gradient_itemsize: int, weight_itemsize: int, bucket_elements: int
) -> Traffic:
    """What DeepSpeed's ZeRO sends for a model.

    Stages 1 and 2 sum whole buckets over all ranks and keep their part of the sum (DeepSpeed's
    `use_multi_rank_bucket_allreduce`, its default), so gradients cost an all-reduce and not a reduce-scatter.

    Args:
        parameters: parameters of the model.
        stage: what ZeRO partitions.
        gradient_itemsize: bytes of a gradient on the wire.
        weight_itemsize: bytes of a weight on the wire.
        bucket_elements: gradients in one bucket.
    """
    gathers = stage > 0
    return Traffic(
        gradient_bytes=float(parameters * gradient_itemsize),
        gradient_messages=math.ceil(parameters / bucket_elements),
        weight_bytes=float(parameters * weight_itemsize) if gathers else 0.0,
        weight_messages=PARAMETER_GROUPS if gathers else 0,
        every_micro_step=stage == 2,
    )


def step_communication(
    machine: Machine, nodes: int, traffic: Traffic, accumulation: int = 1, slowdown: Slowdown | None = None
) -> float:
    """Seconds of all collectives of one optimizer step, none of them hidden.

    Args:
        machine: whose figures count.
        nodes: nodes in use.
        traffic: what is sent.
        accumulation: micro-batches of a step.
        slowdown: what is lost against the machine's figures; nothing by default.
    """
    lost = slowdown or Slowdown()
    return _gradients(machine, nodes, traffic, accumulation, lost) + _weights(machine, nodes, traffic, lost)


def forecast(
    job: Job,
    machine: Machine,
    nodes: Sequence[int],
    slowdown: Slowdown,
    *,
    accumulation: int = 1,
    global_batch: int | None = None,
) -> list[Point]:
    """Throughput of a job on several numbers of nodes.

    Args:
        job: the model and what it sends.
        machine: where it runs.
        nodes: numbers of nodes, each a point.
        slowdown: what is lost against the machine's figures.
        accumulation: weak scaling: micro-batches of a rank in a step, on every number of nodes.
        global_batch: strong scaling: clips in a step, on every number of nodes; `accumulation` then follows.

    Raises:
        UsageError: the machine has fewer nodes, or the global batch cannot be split over them.
    """
    split = _split(job, machine, 1, accumulation, global_batch)
    alone = _point(job, machine, 1, split, slowdown, 0.0).clips_per_second
    points = []
    for count in nodes:
        split = _split(job, machine, count, accumulation, global_batch)
        points.append(_point(job, machine, count, split, slowdown, alone))
    return points


def splits(machine: Machine, nodes: Sequence[int], global_batch: int) -> list[int]:
    """Those numbers of nodes over whose ranks a global batch can be split evenly."""
    return [count for count in nodes if global_batch % (count * machine.gpus_per_node) == 0]


def _split(job: Job, machine: Machine, nodes: int, accumulation: int, global_batch: int | None) -> tuple[int, int]:
    """Micro-batch and accumulation of a rank."""
    if not 1 <= nodes <= machine.nodes:
        raise UsageError(f"{machine.name} has 1 to {machine.nodes} nodes, not {nodes}; ask for fewer")
    if global_batch is None:
        return job.micro_batch, accumulation
    ranks = nodes * machine.gpus_per_node
    if global_batch % ranks:
        raise UsageError(
            f"a global batch of {global_batch} cannot be split over {ranks} ranks ({nodes} nodes); take a multiple"
        )
    share = global_batch // ranks
    micro = max(size for size in range(1, min(job.micro_batch, share) + 1) if share % size == 0)
    return micro, share // micro


def _point(job: Job, machine: Machine, nodes: int, split: tuple[int, int], slowdown: Slowdown, alone: float) -> Point:
    micro_batch, accumulation = split
    ranks = nodes * machine.gpus_per_node
    compute = job.clip_seconds * micro_batch * accumulation
    gradients = _gradients(machine, nodes, job.traffic, accumulation, slowdown)
    # Only the backward passes whose gradients are summed can hide that.
    behind = compute if job.traffic.every_micro_step else compute / accumulation
    hidden = min(gradients, job.overlap * BACKWARD_SHARE * behind)
    exposed = gradients - hidden + _weights(machine, nodes, job.traffic, slowdown)
    step = compute * (1 + slowdown.straggler * math.log(nodes)) + exposed
    clips = ranks * micro_batch * accumulation
    rate = clips / step
    efficiency = rate / (nodes * alone) if alone else 1.0
    return Point(nodes, ranks, clips, accumulation, step, exposed, rate, efficiency)


def _gradients(machine: Machine, nodes: int, traffic: Traffic, accumulation: int, slowdown: Slowdown) -> float:
    """An all-reduce passes every byte twice; NCCL takes a tree where its hops are fewer than a ring's."""
    times = accumulation if traffic.every_micro_step else 1
    hops = min(2 * _ring(machine, nodes), _tree(machine, nodes))
    return times * (2 * _passing(machine, nodes, traffic.gradient_bytes, slowdown) + traffic.gradient_messages * hops)


def _weights(machine: Machine, nodes: int, traffic: Traffic, slowdown: Slowdown) -> float:
    """An all-gather passes every byte once, and NCCL and RCCL know only the ring for it."""
    hops = traffic.weight_messages * _ring(machine, nodes)
    return _passing(machine, nodes, traffic.weight_bytes, slowdown) + hops


def _passing(machine: Machine, nodes: int, size: float, slowdown: Slowdown) -> float:
    """Seconds to pass a tensor once around: inside the nodes over every rank's links, then between nodes.

    Between nodes each rank passes its part of the tensor, so that a node sends the whole of it through interfaces that its
    ranks share.
    """
    ranks = machine.gpus_per_node
    inside = size * (ranks - 1) / ranks / machine.intra_node_bandwidth
    between = size * (nodes - 1) / nodes / machine.injection_bandwidth
    return inside + between * math.pow(nodes, slowdown.contention)


def _ring(machine: Machine, nodes: int) -> float:
    """Seconds of hops of one pass around a ring through all ranks."""
    inside = nodes * (machine.gpus_per_node - 1)
    return inside * machine.intra_node_latency + (nodes if nodes > 1 else 0) * machine.network_latency


def _tree(machine: Machine, nodes: int) -> float:
    """Seconds of hops up and down a tree over nodes, each a chain of its ranks."""
    inside = machine.gpus_per_node - 1
    return 2 * (inside * machine.intra_node_latency + math.ceil(math.log2(nodes)) * machine.network_latency)
