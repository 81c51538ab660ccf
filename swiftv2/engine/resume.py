"""Where a run goes on: from its newest whole checkpoint, or from the beginning."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from swiftv2.config.engine import ScheduleConfig, TrainConfig
from swiftv2.engine.backend import Backend
from swiftv2.engine.checkpoint import TrainerState, load_newest
from swiftv2.engine.collective import on_first
from swiftv2.engine.launch import World
from swiftv2.engine.rundir import RunDirectory
from swiftv2.errors import SwiftError


def resume(
    backend: Backend, world: World, run: RunDirectory, train: TrainConfig, schedule: ScheduleConfig, seed: int
) -> tuple[TrainerState, list[str]]:
    """Load the newest whole checkpoint, or begin at step 0 (collective).

    Returns:
        The state, and a line for each damaged checkpoint that was passed over.

    Raises:
        SwiftError: no checkpoint is whole, or the run was begun with another seed.
    """
    former, problems = load_newest(run.path, backend, world)
    for problem in problems:
        run.event("checkpoint_damaged", problem=problem)
    now: dict[str, Any] = {
        "attempt": run.attempt,
        "world_size": world.size,
        "micro_batch": train.global_batch // (world.size * backend.accumulation),
        "accumulation": backend.accumulation,
        "config_sha256": on_first(lambda: hashlib.sha256((run.path / "config.yaml").read_bytes()).hexdigest(), world),
        "schedule": {**schedule.model_dump(), "max_steps": train.max_steps},
    }
    if former is None:
        return TrainerState(step=0, samples=0, seed=seed, **now), problems
    if former.seed != seed:
        raise SwiftError(f"{run.path} was begun with run.seed={former.seed}, not {seed}: give another run.dir")
    run.event("resumed", former.step, world_size=former.world_size, passed_over=len(problems))
    return replace(former, **now), problems


def without_effect(train: TrainConfig, state: TrainerState) -> Iterator[str]:
    """A line for each setting that comes too late for a run that stands here."""
    if state.step > train.max_steps:
        yield f"train.max_steps={train.max_steps} is less than the {state.step} steps that are done: nothing is left to do"
    past = [step for step in train.skip_steps if step <= state.step]
    if past and state.step:
        yield f"train.skip_steps: {past} are done already and stay as they are"
