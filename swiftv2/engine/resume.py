"""Where a run goes on: from its newest whole checkpoint, from one of another run, or from the beginning."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from swiftv2.config.engine import ScheduleConfig, TrainConfig
from swiftv2.engine.backend import Backend
from swiftv2.engine.checkpoint import Checkpoint, TrainerState, load_newest, verify_checkpoint
from swiftv2.engine.collective import on_first
from swiftv2.engine.launch import World
from swiftv2.engine.rundir import RunDirectory
from swiftv2.errors import SwiftError


class Start(NamedTuple):
    """Where a run stands when a process takes it up."""

    state: TrainerState
    problems: list[str]
    """A line for each damaged checkpoint that was passed over."""
    new: bool
    """Whether the run has no checkpoint of its own."""


def resume(
    backend: Backend,
    world: World,
    run: RunDirectory,
    train: TrainConfig,
    schedule: ScheduleConfig,
    seed: int,
    branch: Path | None = None,
) -> Start:
    """Load the newest whole checkpoint, or begin: at step 0, or where `branch` stands (collective).

    Args:
        backend: takes the state.
        world: this process among the ranks.
        run: the opened run directory.
        train: steps and batch, noted in the state.
        schedule: noted in it, too.
        seed: of the run.
        branch: folder of a checkpoint of another run, from which a run without one of its own goes on.

    Raises:
        SwiftError: no checkpoint is whole, `branch` is missing or damaged, or the run was begun with another seed.
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
        "tracker_id": run.tracker_id,
    }
    if former is None:
        state = TrainerState(step=0, samples=0, seed=seed, **now)
        return Start(state if branch is None else _branched(branch, state, backend, world, run), problems, new=True)
    if former.seed != seed:
        raise SwiftError(f"{run.path} was begun with run.seed={former.seed}, not {seed}: give another run.dir")
    run.event("resumed", former.step, world_size=former.world_size, passed_over=len(problems))
    return Start(replace(former, **now), problems, new=False)


def _branched(branch: Path, state: TrainerState, backend: Backend, world: World, run: RunDirectory) -> TrainerState:
    """The state of another run's checkpoint, with nothing of what that run thought of its own evaluations."""
    on_first(lambda: verify_checkpoint(branch), world)
    former = on_first(Checkpoint(branch, 0, None).trainer, world)
    if former.seed != state.seed:
        raise SwiftError(f"{branch} is of a run with run.seed={former.seed}, not {state.seed}: a branch keeps the seed")
    backend.restore(branch)
    run.event("branched", former.step, source=str(branch))
    kept = ("step", "samples", "exclusions", "spike_window")
    # The step at which it begins is the trunk's to evaluate.
    return replace(state, evaluated=former.step, **{name: getattr(former, name) for name in kept})


def without_effect(train: TrainConfig, state: TrainerState) -> Iterator[str]:
    """A line for each setting that comes too late for a run that stands here."""
    if state.step > train.max_steps:
        yield f"train.max_steps={train.max_steps} is less than the {state.step} steps that are done: nothing is left to do"
    past = [step for step in train.skip_steps if step <= state.step]
    if past and state.step:
        yield f"train.skip_steps: {past} are done already and stay as they are"
