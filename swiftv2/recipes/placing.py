"""Where a run that is still to be configured fits: nodes, ZeRO stage, micro-batch and checkpointing, and how fast it goes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from swiftv2.config.load import build, override
from swiftv2.config.model import ModelConfig
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.errors import UsageError
from swiftv2.plan.accounts import BYTES
from swiftv2.plan.calibration import forecast_interval
from swiftv2.plan.machines import Machine, gpu_names, machine, machine_names, machine_of
from swiftv2.plan.memory import Passes, rank_memory
from swiftv2.plan.network import Job
from swiftv2.plan.run import BACKWARD, check_machine, recomputed_flops, traffic
from swiftv2.recipes.planning import counted_flops, find_window, layout, passes

GB = 1e9
_LEAST_STATES = 6
"""Bytes of optimizer states of a parameter, shared among all ranks, in the smallest formats there are."""


@dataclass(frozen=True)
class Place:
    """A run where it fits."""

    config: PretrainConfig
    """The run, with what was changed for the memory."""
    machine: str
    nodes: int
    memory_bytes: int
    """Of the fullest rank at its peak, reserve counted."""
    clips_per_second: tuple[float, float, float]
    """Likely, with a fast network, with a slow one."""

    def hours(self, steps: int) -> tuple[float, float, float]:
        """Hours of so many steps: likely, with a fast network, with a slow one."""
        likely, fast, slow = (steps * self.config.train.global_batch / rate / 3600 for rate in self.clips_per_second)
        return likely, fast, slow

    def affords(self, hours: float) -> int:
        """Steps that so many hours suffice for."""
        return math.floor(hours * 3600 * self.clips_per_second[0] / self.config.train.global_batch)

    def lasting(self, config: PretrainConfig) -> PretrainConfig:
        """Another run of the same model, changed as this one was."""
        train = config.train.model_copy(update={"micro_batch": self.config.train.micro_batch})
        return config.model_copy(update={"model": self.config.model, "engine": self.config.engine, "train": train})


def find_machine(name: str) -> Machine:
    """A machine by its name or by that of its GPU.

    Raises:
        UsageError: there is none; the message names those that are.
    """
    if name in machine_names():
        return machine(name)
    if name in gpu_names():
        return machine_of(name)
    raise UsageError(f"no machine is named {name!r}; there are {', '.join([*machine_names(), *gpu_names()])}")


def place(config: PretrainConfig, where: Machine, mfu: float, *, nodes: int | None = None, hours: float | None = None) -> Place:
    """A run on the nodes asked for, or on as few as it fits, and ends on in time.

    What does not fit is made lighter: ZeRO-2, smaller micro-batches, recomputed stages.

    Args:
        config: the run.
        where: the machine.
        mfu: assumed share of the GPU's peak that passes reach.
        nodes: of the machine; as few as do when None.
        hours: that the run may take; any when None.

    Raises:
        UsageError: the run fits nowhere, takes too long everywhere, or cannot be split over the nodes.
    """
    finder = _Finder(config, where, mfu)
    counts = _counts(config, where, nodes)
    shortest = math.inf
    for count in counts:
        found = finder.fit(count)
        if found is None:
            continue
        taken = found.hours(config.train.max_steps)[0]
        if hours is None or taken <= hours:
            return found
        shortest = min(shortest, taken)
    if shortest < math.inf:
        raise UsageError(
            f"{config.model.name} takes {shortest:,.3g} h at least on the nodes of {where.name} over which train.global_batch="
            f"{config.train.global_batch} splits: give more than --hours {hours:g}, a larger batch or a smaller budget"
        )
    most = f"{counts[-1]} node{'s' * (counts[-1] > 1)} of {where.name}"
    raise UsageError(
        f"{config.model.name} does not fit {most}: {finder.short / GB:,.1f} GB short on each GPU with one clip at a time and "
        "all stages recomputed; give more nodes, another machine or a smaller budget"
    )


def _counts(config: PretrainConfig, where: Machine, nodes: int | None) -> list[int]:
    """Numbers of nodes to look at.

    Raises:
        UsageError: the global batch cannot be split over any.
    """
    if nodes is not None:
        check_machine(
            config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": 1})}), nodes, where.gpu.name
        )
        return [nodes]
    batch, ranks = config.train.global_batch, where.gpus_per_node
    counts = [count for count in range(1, where.nodes + 1) if batch % (count * ranks) == 0]
    if not counts:
        raise UsageError(f"train.global_batch={batch} cannot be split over the {ranks} GPUs of a node of {where.name}")
    return counts


class _Finder:
    """Looks for what fits; passes are recorded once a model, on whatever nodes."""

    def __init__(self, config: PretrainConfig, where: Machine, mfu: float) -> None:
        window = find_window(config)

        @cache
        def record(model: ModelConfig) -> Passes:
            return passes(config.model_copy(update={"model": model}), window)

        self.short = math.inf
        """Bytes that the lightest run looked at was short by."""
        self._config, self._where, self._mfu = config, where, mfu
        self._passes: Callable[[ModelConfig], Passes] = record
        self._layout = layout(config)
        self._flops = cache(lambda: counted_flops(config, window))

    def fit(self, nodes: int) -> Place | None:
        """The run on so many nodes, no lighter than need be; None where even the lightest does not fit."""
        room, ranks = self._where.gpu.memory_bytes, nodes * self._where.gpus_per_node
        total = self._layout.total
        least = total * (BYTES[self._config.engine.precision] + _LEAST_STATES / ranks)
        if least > room:
            self.short = min(self.short, least - room)
            return None
        for lighter in _lighter(self._config, ranks):
            _, micro_batch, accumulation = check_machine(lighter, nodes, self._where.gpu.name)
            held = self._passes(lighter.model)
            memory = rank_memory(held, self._layout, lighter.engine, ranks, micro_batch, accumulation).total
            if memory <= room:
                return Place(lighter, self._where.name, nodes, memory, self._pace(lighter, nodes))
            self.short = min(self.short, memory - room)
        return None

    def _pace(self, config: PretrainConfig, nodes: int) -> tuple[float, float, float]:
        """Clips a second, as `swiftv2.plan.run.plan_run` forecasts them: likely, fast, slow."""
        gpu = self._where.gpu
        peak = gpu.peak_bf16_flops if config.engine.precision == "bf16" else gpu.peak_fp32_flops
        flops = (1 + BACKWARD) * self._flops()["total"] + recomputed_flops(config, self._flops())
        _, micro_batch, accumulation = check_machine(config, nodes, gpu.name)
        sent, overlap = traffic(config.engine, self._layout.total), 1.0 if config.engine.overlap_comm else 0.0
        job = Job(flops / (self._mfu * peak), micro_batch, sent, overlap)
        point = forecast_interval(job, self._where, [nodes], accumulation=accumulation)[0]
        return point.likely.clips_per_second, point.fast.clips_per_second, point.slow.clips_per_second


def _lighter(config: PretrainConfig, ranks: int) -> Iterator[PretrainConfig]:
    """A run as configured, and then with less and less memory."""
    share = config.train.global_batch // ranks
    most = min(share, config.train.micro_batch or share)
    micro_batches = [count for count in range(most, 0, -1) if share % count == 0]
    config = _with(config, f"train.micro_batch={micro_batches[0]}")
    yield config
    if config.engine.backend == "deepspeed" and config.engine.zero_stage < 2:
        config = _with(config, "engine.zero_stage=2")
        yield config
    for count in micro_batches[1:]:
        config = _with(config, f"train.micro_batch={count}")
        yield config
    for stages in ([0], list(range(len(config.model.depths)))):
        if not set(stages) <= set(config.model.checkpoint_stages) or config.model.checkpoint_keep != "nothing":
            config = _with(config, f"model.checkpoint_stages={stages}", "model.checkpoint_keep=nothing")
            yield config


def _with(config: PretrainConfig, *words: str) -> PretrainConfig:
    tree: dict[str, Any] = config.model_dump(mode="json")
    for word in words:
        override(tree, word)
    return build(PretrainConfig, tree, where=config.model.name, overrides=words)
