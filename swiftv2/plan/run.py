"""A pretraining run on so many nodes: memory, time, communication, budget and scaling put together."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from swiftv2.config.engine import EngineConfig, split_batch
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.errors import UsageError
from swiftv2.models.geometry import stage_grids
from swiftv2.plan.accounts import BYTES, WHOLE_REDUCTION, Layout
from swiftv2.plan.calibration import Forecast, forecast_interval
from swiftv2.plan.machines import Gpu, Machine, gpu_names, machine_of
from swiftv2.plan.machines import gpu as find_gpu
from swiftv2.plan.memory import Passes, RankMemory, largest_micro_batch, rank_memory
from swiftv2.plan.model import ModelPlan
from swiftv2.plan.network import Job, Traffic, splits, zero_traffic

Stage = Literal[0, 1, 2]
STAGES: tuple[Stage, ...] = (0, 1, 2)
MFU = 0.35
"""Assumed share of the GPU's peak that forward and backward passes reach; 0.33 to 0.43 is what torchtitan and Llama 3
report for dense transformers. Nothing of it was measured for Swin4D on a GPU."""
BACKWARD = 2
"""FLOPs of a backward pass as a multiple of those of the forward pass."""
MOST_POINTS = 12


@dataclass(frozen=True)
class StagePlan:
    """One ZeRO stage on the planned ranks."""

    backend: str
    """Which backend computes it: DeepSpeed cannot sum bf16 gradients in fp32 at stage 0; the plain one can."""
    memory: RankMemory
    fits: bool
    largest_micro_batch: int
    """Most clips at a time on that GPU; 0 where not even one fits."""
    gradient_bytes: float
    """Bytes of gradients summed over ranks for one optimizer step."""
    weight_bytes: float
    """Bytes of weights gathered for one optimizer step."""
    sent_bytes: float
    """What a rank sends of both for one optimizer step, in rings."""


@dataclass(frozen=True)
class RunPlan:
    """Everything that is told of a run."""

    model: ModelPlan
    gpu: str
    machine: str
    nodes: int
    ranks: int
    global_batch: int
    micro_batch: int
    accumulation: int
    zero_stage: int
    backend: str
    precision: str
    window: str
    """Where the voxels of a clip come from, in words."""
    stages: dict[str, StagePlan]
    """By ZeRO stage."""
    memory: RankMemory
    """As configured."""
    memory_bytes: float
    """What the GPU has."""
    remedies: list[str]
    """What would make it fit, where it does not."""
    computed_flops_per_clip: dict[str, int]
    """Forward FLOPs of the work really done, by part."""
    recomputed_flops_per_clip: int
    """FLOPs of forward passes repeated by checkpointing, at most."""
    assumed_mfu: float
    points: dict[str, Any]
    """Step time, MFU and clips a second: likely, slow, fast."""
    budget: dict[str, float]
    weak: list[dict[str, float]]
    strong: list[dict[str, float]]

    @property
    def fits(self) -> bool:
        """Whether the run as configured fits the GPU."""
        return self.memory.total <= self.memory_bytes

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        tree = {name: value for name, value in vars(self).items() if name not in {"model", "stages", "memory", "memory_bytes"}}
        stages = {name: asdict(stage) | {"memory": stage.memory.to_dict()} for name, stage in self.stages.items()}
        room = {"gpu_bytes": self.memory_bytes, "short_by_bytes": max(0.0, self.memory.total - self.memory_bytes)}
        return {**self.model.to_dict(), "fits": self.fits, "memory": self.memory.to_dict() | room, "stages": stages, **tree}


@dataclass(frozen=True)
class Work:
    """What the planner is told of a configured run by those who know its data."""

    passes: Callable[[PretrainConfig], Passes]
    """What the passes of a run hold."""
    layout: Layout
    """Its trainable parameters."""
    model: ModelPlan
    """Parameters and published FLOPs."""
    computed_flops: Mapping[str, int]
    """Forward FLOPs of one clip that are really done, by part."""
    window: str
    """Where the voxels come from, in words."""


def plan_run(
    config: PretrainConfig, work: Work, *, nodes: int, gpu: str, mfu: float = MFU, tokens: float | None = None
) -> RunPlan:
    """Plan a run.

    Args:
        config: the run.
        work: what its passes hold and compute.
        nodes: nodes of the machine that has this GPU.
        gpu: name of the GPU, such as a100-80.
        mfu: assumed share of the GPU's peak that forward and backward passes reach, repeated passes counted.
        tokens: stage-1 tokens, background counted, after which the run ends; its own max_steps when None.

    Raises:
        UsageError: no such GPU, more nodes than there are, a batch that cannot be split over the ranks, or an impossible
            share of the peak.
    """
    if not 0 < mfu <= 1:
        raise UsageError(f"--mfu {mfu:g} is no share of the peak: give a number above 0 and up to 1, such as {MFU}")
    if tokens is not None and not 0 < tokens < math.inf:
        raise UsageError(f"--tokens {tokens:g}: give a positive number, such as 1e11")
    found, machine = find_gpu(gpu), machine_of(gpu)
    ranks, micro_batch, accumulation = check_machine(config, nodes, gpu)
    passes = work.passes(config)
    parameters = work.layout.total
    sent = traffic(config.engine, parameters)
    stages = {
        str(stage): _stage(config, passes, work, found, (ranks, micro_batch, accumulation), parameters, stage)
        for stage in STAGES
    }
    memory = rank_memory(passes, work.layout, config.engine, ranks, micro_batch, accumulation)
    repeated = recomputed_flops(config, work.computed_flops)
    flops = (1 + BACKWARD) * work.computed_flops["total"]
    peak = found.peak_bf16_flops if config.engine.precision == "bf16" else found.peak_fp32_flops
    seconds = (flops + repeated) / (mfu * peak)
    job = Job(seconds, micro_batch, sent, overlap=1.0 if config.engine.overlap_comm else 0.0)
    point = forecast_interval(job, machine, [nodes], accumulation=accumulation)[0]
    fits = memory.total <= found.memory_bytes
    remedies = [] if fits else _remedies(config, work, found, stages, (ranks, micro_batch, accumulation))
    return RunPlan(
        model=work.model,
        gpu=gpu,
        machine=machine.name,
        nodes=nodes,
        ranks=ranks,
        global_batch=config.train.global_batch,
        micro_batch=micro_batch,
        accumulation=accumulation,
        zero_stage=config.engine.zero_stage,
        backend=config.engine.backend,
        precision=config.engine.precision,
        window=work.window,
        stages=stages,
        memory=memory,
        memory_bytes=found.memory_bytes,
        remedies=remedies,
        computed_flops_per_clip=dict(work.computed_flops),
        recomputed_flops_per_clip=repeated,
        assumed_mfu=mfu,
        points={name: _told(getattr(point, name), flops, peak) for name in ("likely", "slow", "fast")},
        budget=_budget(config, point, tokens),
        weak=_table(forecast_interval(job, machine, _counts(machine, nodes), accumulation=accumulation)),
        strong=_table(_strong(job, machine, nodes, config.train.global_batch)),
    )


def check_machine(config: PretrainConfig, nodes: int, gpu: str) -> tuple[int, int, int]:
    """Ranks, micro-batch and accumulation of a run on so many nodes.

    Raises:
        UsageError: no such GPU, more nodes than there are, or a batch that cannot be split over the ranks.
    """
    machine = machine_of(gpu)
    if not 1 <= nodes <= machine.nodes:
        raise UsageError(f"--nodes {nodes}: {machine.name} has 1 to {machine.nodes} nodes of {gpu}")
    ranks = nodes * machine.gpus_per_node
    return ranks, *split_batch(config.train.global_batch, ranks, config.train.micro_batch)


def at_stage(engine: EngineConfig, stage: Stage) -> EngineConfig:
    """The same engine at another ZeRO stage; stage 0 is the plain backend where DeepSpeed's cannot sum in fp32."""
    change = {"zero_stage": stage, "backend": "deepspeed"}
    mixed = engine.precision == "bf16" and engine.gradient_accumulation_dtype == "fp32"
    if stage == 0 and (mixed or engine.backend == "plain"):
        change["backend"] = "plain"
    return engine.model_copy(update=change)


def recomputed_flops(config: PretrainConfig, flops: Mapping[str, int]) -> int:
    """FLOPs that checkpointed stages repeat for one clip, at most: the products of their blocks, unless these are kept."""
    if config.model.checkpoint_keep == "products":
        return 0
    return sum(flops[f"stage_{stage + 1}"] for stage in set(config.model.checkpoint_stages))


def _stage(
    config: PretrainConfig, passes: Passes, work: Work, gpu: Gpu, batch: tuple[int, int, int], parameters: int, stage: Stage
) -> StagePlan:
    ranks, micro_batch, accumulation = batch
    engine = at_stage(config.engine, stage)
    memory = rank_memory(passes, work.layout, engine, ranks, micro_batch, accumulation)
    most = largest_micro_batch(passes, work.layout, engine, ranks, gpu.memory_bytes, accumulated=accumulation > 1)
    told = traffic(engine, parameters)
    gradients = told.gradient_bytes * (accumulation if told.every_micro_step else 1)
    sent = (2 * gradients + told.weight_bytes) * (ranks - 1) / ranks
    return StagePlan(engine.backend, memory, memory.total <= gpu.memory_bytes, most, gradients, told.weight_bytes, sent)


def traffic(engine: EngineConfig, parameters: int) -> Traffic:
    """What ranks send each other for one optimizer step of a model of so many trainable parameters."""
    stage: Stage = 0 if engine.backend == "plain" else engine.zero_stage
    whole = stage == 0 or (stage == 1 and engine.precision == "bf16" and engine.gradient_accumulation_dtype == "fp32")
    return zero_traffic(
        parameters,
        stage,
        gradient_itemsize=BYTES[engine.communication_dtype],
        weight_itemsize=BYTES[engine.precision],
        bucket_elements=WHOLE_REDUCTION if whole else engine.reduce_bucket_size,
    )


def _remedies(
    config: PretrainConfig, work: Work, gpu: Gpu, stages: Mapping[str, StagePlan], batch: tuple[int, int, int]
) -> list[str]:
    """Single changes that would make a run fit, the cheapest first."""
    _, micro_batch, accumulation = batch
    found = []
    for name, stage in stages.items():
        if stage.fits and stage.backend == "deepspeed":
            found.append(f"engine.zero_stage={name}")
    mine = stages[str(0 if config.engine.backend == "plain" else config.engine.zero_stage)].largest_micro_batch
    share = micro_batch * accumulation
    smaller = [n for n in range(1, mine + 1) if share % n == 0]
    if smaller:
        found.append(f"train.micro_batch={smaller[-1]}")
    depth = len(config.model.depths)
    for upto in range(1, depth + 1):
        recomputed = sorted(set(config.model.checkpoint_stages) | set(range(upto)))
        if recomputed == sorted(set(config.model.checkpoint_stages)):
            continue
        change = {"checkpoint_stages": tuple(recomputed), "checkpoint_keep": "nothing"}
        other = config.model_copy(update={"model": config.model.model_copy(update=change)})
        if rank_memory(work.passes(other), work.layout, config.engine, *batch).total <= gpu.memory_bytes:
            found.append(f"model.checkpoint_stages={recomputed}".replace(" ", ""))
            break
    need = stages[str(config.engine.zero_stage)].memory.total
    larger = [name for name in gpu_names() if find_gpu(name).memory_bytes >= need]
    if larger:
        smallest = min(larger, key=lambda name: find_gpu(name).memory_bytes)
        found.append(f"--gpu {smallest}")
    return found


def _told(point: Any, flops: int, peak: float) -> dict[str, float]:
    """A forecast point with the model FLOPs that it makes of the peak: repeated passes and waiting are lost."""
    return asdict(point) | {"mfu": flops * point.clips_per_second / (point.ranks * peak)}


def _budget(config: PretrainConfig, point: Forecast, tokens: float | None) -> dict[str, float]:
    """Steps, clips, tokens, days and node-hours; evaluation, saves and interruptions are not counted."""
    grid = stage_grids(config.model, (*config.model.image_size, config.clip.frames))[0]
    a_clip = math.prod(grid)
    batch = config.train.global_batch
    steps = config.train.max_steps if tokens is None else math.ceil(tokens / (a_clip * batch))
    clips = steps * batch
    told: dict[str, float] = {"tokens_per_clip": a_clip, "steps": steps, "clips": clips, "tokens": clips * a_clip}
    for name in ("likely", "slow", "fast"):
        hours = clips / getattr(point, name).clips_per_second / 3600
        told[f"days_{name}"] = hours / 24
        told[f"node_hours_{name}"] = hours * getattr(point, name).nodes
    return told


def _counts(machine: Machine, nodes: int) -> list[int]:
    """Numbers of nodes that are told: powers of two around the planned one, and itself."""
    powers = [2**n for n in range(math.ceil(math.log2(machine.nodes)) + 1) if 2**n <= min(machine.nodes, 16 * nodes)]
    return sorted({*powers[-MOST_POINTS:], 1, nodes})


def _strong(job: Job, machine: Machine, nodes: int, global_batch: int) -> list[Forecast]:
    counts = splits(machine, _counts(machine, nodes), global_batch)
    if 1 not in counts:
        return []
    return forecast_interval(job, machine, counts, global_batch=global_batch)


def _table(points: Sequence[Forecast]) -> list[dict[str, float]]:
    return [
        {
            "nodes": p.likely.nodes,
            "ranks": p.likely.ranks,
            "global_batch": p.likely.global_batch,
            "step_seconds": p.likely.step_seconds,
            "clips_per_second": p.likely.clips_per_second,
            "clips_per_second_slow": p.slow.clips_per_second,
            "clips_per_second_fast": p.fast.clips_per_second,
            "efficiency": p.likely.efficiency,
            "efficiency_slow": p.slow.efficiency,
            "efficiency_fast": p.fast.efficiency,
        }
        for p in points
    ]
