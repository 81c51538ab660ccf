"""Steps on a GPU: real bf16 optimizer steps under ZeRO-2, and the formulations side by side under autocast.

Everything here also runs on the CPU at a small size, which is how it is tested where no GPU is.
"""

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from machine import child, environment, prose, table
from model_cases import FORMULATIONS, Case, Formulation, Times, changed, paired, template_brain, template_tokens
from model_profile import OperatorTimes, kinds_table, operators_table, self_times

from swiftv2.config.data import DataConfig
from swiftv2.config.engine import EngineConfig, RunConfig, TrainConfig
from swiftv2.config.load import load_model
from swiftv2.config.model import ModelConfig
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data.samples.batch import Batch
from swiftv2.engine import launch
from swiftv2.engine.backend import Backend
from swiftv2.engine.build import build_backend
from swiftv2.engine.launch import World
from swiftv2.errors import SwiftError
from swiftv2.models import decay_names, learning_rates
from swiftv2.models.blocks import compile_blocks
from swiftv2.models.flops import computed_flops
from swiftv2.recipes.objective import Objective

PEAK = 790e12
"""FLOPs a second of an H200 in bf16, dense."""
OPTIMIZER_BATCH = {"5M": 64, "7M": 64, "51M": 64, "202M": 32, "806M": 16, "3.2B": 8}
"""Clips of a step; halved until they fit."""
COMPARED_BATCH = {"5M": 16, "806M": 8}
TARGETS = {("5M", "dense"): 6.0, ("5M", "packed"): 10.0, ("806M", "dense"): 2.0, ("806M", "packed"): 2.7}
MFU_TARGET = {"806M": 0.45, "3.2B": 0.45}
WARM_UP = 3
SETTINGS = (("dense", "none", False), ("packed", "template", False), ("packed, compiled", "template", True))
"""Name, packing, whether blocks are compiled."""


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of one model."""

    batch: int
    seconds: float
    """Of one step, median."""
    peak: int
    """Bytes allocated on the GPU at most; 0 on the CPU."""
    flops: float
    """FLOPs of the work really done in one step: three times those of the forward pass."""

    @property
    def utilisation(self) -> float:
        """FLOPs a second as a share of the GPU's peak."""
        return self.flops / self.seconds / PEAK


Measured = tuple[Steps, OperatorTimes]


def section(rounds: int) -> Iterator[str]:
    """Lines of the page; says so where there is no GPU."""
    yield from ["", "## GPU"]
    if not torch.cuda.is_available():
        yield from prose("no GPU: not measured. Nothing on this page says anything of a GPU.")
        return
    yield from prose(f"{torch.cuda.get_device_name()}; shares are of {PEAK / 1e12:.0f} TFLOP/s.")
    yield from optimizer_section(list(OPTIMIZER_BATCH), OPTIMIZER_BATCH, rounds, "cuda")
    for name, batch in COMPARED_BATCH.items():
        yield from compared_section(name, load_model(name), batch, rounds, torch.device("cuda"))


def optimizer_section(
    names: Sequence[str],
    batches: dict[str, int],
    rounds: int,
    device: str,
    settings: Sequence[tuple[str, str, bool]] = SETTINGS,
) -> Iterator[str]:
    """Lines: optimizer steps of each model in each setting, and where the time of the last goes."""
    yield from ["", "### Optimizer steps: SimMIM, bf16, ZeRO-2, one GPU", ""]
    rows, times = [], dict[str, OperatorTimes]()
    for name in names:
        for label, packing, compiled in settings:
            config = changed(load_model(name), packing=packing)
            work = partial(steps_in_child, config, compiled=compiled, rounds=rounds, device=device)
            found, spent = fitting(work, batches[name])
            wanted = MFU_TARGET.get(name)
            verdict = "" if wanted is None else f"{100 * wanted:.0f} %: {'met' if found.utilisation >= wanted else 'MISSED'}"
            values = [f"{1000 * found.seconds:.0f}", f"{found.batch / found.seconds:.1f}", f"{found.peak / 2**30:.1f}"]
            rows.append([f"{name} {label}", str(found.batch), *values, f"{100 * found.utilisation:.1f} %", verdict])
            times[f"{name} {label}"] = spent
    heads = ["model", "clips a step", "ms a step", "clips/s", "peak memory, GiB", "MFU", "target"]
    yield from table(heads, rows)
    yield from ["", "Where a step goes:", "", *kinds_table(times)]
    label, last = next(reversed(times.items()))
    yield from ["", f"{label}:", "", *operators_table(last, 12)]


def fitting(work: Callable[[int], Measured | None], batch: int) -> Measured:
    """What `work` gives for the largest batch that fits: the given one, or a half, a quarter... of it.

    Raises:
        SwiftError: not even one clip fits.
    """
    while batch:
        found = work(batch)
        if found is not None:
            return found
        batch //= 2
    raise SwiftError("not even one clip fits into the memory of this GPU: leave the model out")


def steps_in_child(model: ModelConfig, batch: int, *, compiled: bool, rounds: int, device: str) -> Measured | None:
    """`optimizer_steps` in a fresh process, since DeepSpeed starts once in a process; None where memory ran out.

    Raises:
        SwiftError: the process failed.
    """
    wanted = {"model": model.model_dump(mode="json"), "batch": batch, "rounds": rounds}
    wanted["engine"] = {"device": device, "compile": compiled}
    words = child("model.py", "--steps", json.dumps(wanted))
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        raise SwiftError(f"steps of {model.name} failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found is None:
        return None
    return Steps(**found["steps"]), {name: (spent, calls) for name, (spent, calls) in found["operators"].items()}


def steps_here(wanted: str) -> str:
    """What `steps_in_child` asks for and takes back, each as one line of JSON."""
    asked = json.loads(wanted)
    try:
        steps, operators = optimizer_steps(
            ModelConfig.model_validate(asked["model"]),
            EngineConfig.model_validate(asked["engine"]),
            asked["batch"],
            asked["rounds"],
        )
    except torch.OutOfMemoryError:
        return json.dumps(None)
    return json.dumps({"steps": asdict(steps), "operators": operators})


def optimizer_steps(model: ModelConfig, engine: EngineConfig, batch: int, rounds: int) -> Measured:
    """Real optimizer steps on noise, and the time of each operator in one more.

    Args:
        model: the model, with its packing.
        engine: precision, ZeRO stage, device, whether blocks are compiled.
        batch: clips of a step, all in one micro-batch.
        rounds: steps that are timed.
    """
    brain = template_brain(model.image_size)
    config = PretrainConfig(
        run=RunConfig(dir=Path("unused")),
        data=DataConfig(store=Path("unused")),
        model=model,
        train=TrainConfig(max_steps=rounds, global_batch=batch),
    )
    world = launch.start(engine)
    try:
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)
        objective = Objective(config, torch.from_numpy(np.flatnonzero(brain)), model.image_size)
        if engine.compile:
            compile_blocks(objective)
        rates = learning_rates(objective, config.model)
        backend = build_backend(engine, config.optimizer, objective, decay_names(objective), world, batch, 1, rates)
        clips = noise_batch(config, int(brain.sum()), batch).to(world.device)
        seconds = [_timed(backend, clips, world) for _ in range(WARM_UP + rounds)][WARM_UP:]
        peak = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else 0
        spent = self_times(lambda: _timed(backend, clips, world), world.device)
        backend.close()
    finally:
        launch.stop()
    work = computed_flops(model, None if model.packing == "none" else template_tokens(model))
    return Steps(batch, float(np.median(seconds)), peak, 3.0 * batch * work["total"]), spent


def _timed(backend: Backend, clips: Batch, world: World) -> float:
    begun = time.perf_counter()
    backend.forward_backward(clips)
    backend.step(1e-4)
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter() - begun


def noise_batch(config: PretrainConfig, voxels: int, clips: int) -> Batch:
    """Packed clips of noise, every kept voxel brain, with random masks."""
    rng = torch.Generator().manual_seed(0)
    frames = config.clip.frames
    padded = [-(-n // p) * p for n, p in zip((*config.model.image_size, frames), config.model.patch_size, strict=True)]
    cells = [n // c for n, c in zip(padded, config.mask.patch_size, strict=True)]
    numbers, ones = torch.arange(clips), torch.ones(clips)
    return Batch(
        bold=torch.randint(-3000, 3000, (clips, frames, voxels), dtype=torch.int16, generator=rng),
        slope=ones / 1000,
        intercept=torch.zeros(clips),
        statistics=torch.tensor([[0.0, 1.7, -3.0, 3.0, 0.0, 3.0]]).repeat(clips, 1),
        voxel_mean=None,
        voxel_std=None,
        brain=torch.ones(clips, voxels, dtype=torch.bool),
        mask=torch.rand(clips, *cells, generator=rng) < config.mask.ratio,
        sample=numbers,
        epoch=torch.zeros(clips, dtype=torch.int64),
        clip=numbers,
        start=torch.zeros(clips, dtype=torch.int64),
        tr=2 * ones,
        cohort=torch.zeros(clips, dtype=torch.int64),
        subject=torch.zeros(clips, dtype=torch.int64),
        weight=ones,
    )


def compared_section(name: str, config: ModelConfig, batch: int, rounds: int, device: torch.device) -> Iterator[str]:
    """Lines: the formulations in turn, forward and backward of the encoder under the same bf16 autocast."""
    yield from ["", f"### {name}: formulations under bf16 autocast, {batch} clips, encoder forward and backward", ""]
    times, peaks = compare_under_autocast(config, batch, rounds, device)
    rows = []
    for formulation, found in times.items():
        times_published = found.times(times["published"])
        wanted = TARGETS.get((name, formulation))
        verdict = "" if wanted is None else f"{wanted:g}x: {'met' if times_published[0] >= wanted else 'MISSED'}"
        step_ms = 1000 * float(np.median(found.steps))
        memory = f"{peaks[formulation] / 2**30:.1f}"
        rows.append([formulation, f"{step_ms:.0f}", f"{found.rate:.1f}", paired(times_published), memory, verdict])
    yield from table(["formulation", "ms", "clips/s", "times published", "peak memory, GiB", "target"], rows)


def compare_under_autocast(
    config: ModelConfig, batch: int, rounds: int, device: torch.device
) -> tuple[dict[Formulation, Times], dict[Formulation, int]]:
    """Times in turn, after a round not counted, and the most bytes a step allocates on the GPU (0 on the CPU)."""
    times, peaks = {name: Times(batch) for name in FORMULATIONS}, dict.fromkeys(FORMULATIONS, 0)
    cases = {name: Case(name, config, batch) for name in FORMULATIONS}
    models = {name: case.build().to(device) for name, case in cases.items()}
    clips = cases["published"].clips().to(device)
    for number in range(-1, rounds):
        for name, model in models.items():
            held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            begun = _now(device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(clips).float().square().mean()
            between = _now(device)
            loss.backward()
            ended = _now(device)
            model.zero_grad(set_to_none=True)
            if number >= 0:
                times[name].forward.append(between - begun)
                times[name].backward.append(ended - between)
                peaks[name] = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else 0
    return times, peaks


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
