"""The training loop: resume or start, step, log, evaluate, save, stop."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from swiftv2.config.engine import ScheduleConfig, TrainConfig
from swiftv2.engine.backend import Backend, StepResult
from swiftv2.engine.checkpoint import TrainerState, load_newest, prune, save_checkpoint
from swiftv2.engine.collective import gather, on_first
from swiftv2.engine.launch import World
from swiftv2.engine.meter import Meter
from swiftv2.engine.progress import ProgressLine
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.schedule import learning_rate
from swiftv2.engine.signals import STOPPED_EARLY, StopRequest
from swiftv2.engine.stream import Exclusion, Stream
from swiftv2.errors import SwiftError

Evaluate = Callable[[int], Mapping[str, float]]
Batches = Callable[[int, list[Exclusion]], Stream]


@dataclass(frozen=True)
class FitResult:
    """How a call of `fit` ended."""

    step: int
    samples: int
    stopped_early: bool
    checkpoint: Path | None
    values: dict[str, float]

    @property
    def exit_status(self) -> int:
        """0 done; 75 stopped early with its state saved: run me again."""
        return STOPPED_EARLY if self.stopped_early else 0


def fit(
    *,
    backend: Backend,
    world: World,
    run: RunDirectory,
    batches: Batches,
    train: TrainConfig,
    schedule: ScheduleConfig,
    peak_lr: float,
    seed: int,
    evaluate: Evaluate | None = None,
    best_metric: str | None = None,
) -> FitResult:
    """Train from where the run directory stands up to `train.max_steps` (collective).

    Args:
        backend: module, optimizer and how a step is computed.
        world: this process among the ranks.
        run: the opened run directory.
        batches: given the clips that the whole run has consumed and the exclusions of its checkpoint, this rank's
            micro-batches from there on.
        train: steps, batch, and what happens every how many steps.
        schedule: learning rate over steps.
        peak_lr: its peak.
        seed: seed of the run, noted in its checkpoints.
        evaluate: called by all ranks every `evaluate_every` steps and after the last; its values are logged.
        best_metric: key of the evaluation whose lowest value marks the best checkpoint, which is saved at once and kept.

    Returns:
        Where it ended. After SIGTERM, SIGUSR1, SIGUSR2 or an interrupt on any rank, all ranks end after the same step with
        a checkpoint, `stopped_early` is set and `exit_status` is 75.

    Raises:
        SwiftError: a checkpoint is damaged beyond help, cannot be written, or another process took the run over.
    """
    state = _resume(backend, world, run, train, schedule, seed)
    generated = backend.generated_config()
    if generated is not None:
        run.document("deepspeed.json", generated)
    meter = Meter(train.global_batch, train.max_steps)
    values: dict[str, float] = {}
    saved: Path | None = None
    stopped = False
    stream = batches(state.samples, state.exclusions)
    state = replace(state, exclusions=stream.exclusions)
    with (
        StopRequest(world) as request,
        ProgressLine(world, state.step, train.max_steps) as progress,
        contextlib.closing(stream),
    ):
        _announce(progress, run, state, world)
        for step in range(state.step + 1, train.max_steps + 1):
            rate = learning_rate(step, schedule, peak_lr, train.max_steps)
            meter.begin()
            result = _step(backend, stream, rate, meter)
            meter.end()
            state = replace(state, step=step, samples=state.samples + train.global_batch)
            values = _values(result, rate, meter, step) | {"clips_left_out": float(len(state.exclusions))}
            if result.skipped:
                run.event("skipped", step, loss=result.loss, gradient_norm=result.grad_norm)
                progress.note(f"step {step} skipped: its gradient is not finite")

            last = step == train.max_steps
            agreed = request.agreed(news=stream.faulty())
            stopped = agreed.stop and not last
            if agreed.news:
                state = _leave_out(stream, run, state, world, progress)
            improved = False
            if evaluate is not None and not stopped and (last or step % train.evaluate_every == 0):
                scores = evaluate(step)
                values |= scores
                improved = best_metric is not None and _is_better(scores.get(best_metric), state.best_value)
                if improved:
                    state = replace(state, best_metric=best_metric, best_value=scores[str(best_metric)], best_step=step)
                stopped = request.agreed().stop and not last
            if last or stopped or improved or result.skipped or step % train.log_every == 0:
                run.metrics(step, values)
            progress.update(step, values)
            if last or stopped or improved or step % train.save_every == 0:
                saved = _save(backend, world, run, train, state)
            if stopped:
                run.event("stopped", step, signal=request.name)
                progress.note(f"stopped after step {step} as asked; its state is saved: run the same command to go on")
                break
        else:
            run.event("finished", state.step)
    return FitResult(state.step, state.samples, stopped, saved, values)


def _resume(
    backend: Backend, world: World, run: RunDirectory, train: TrainConfig, schedule: ScheduleConfig, seed: int
) -> TrainerState:
    """Load the newest whole checkpoint, or begin at step 0."""
    former, problems = load_newest(run.path, backend, world)
    for problem in problems:
        run.event("checkpoint_damaged", problem=problem)
    fresh = TrainerState(
        step=0,
        samples=0,
        attempt=run.attempt,
        seed=seed,
        world_size=world.size,
        micro_batch=train.global_batch // (world.size * backend.accumulation),
        accumulation=backend.accumulation,
        layout=backend.layout,
        config_sha256=on_first(lambda: hashlib.sha256((run.path / "config.yaml").read_bytes()).hexdigest(), world),
        schedule={**schedule.model_dump(), "max_steps": train.max_steps},
    )
    if former is None:
        return fresh
    if former.seed != seed:
        raise SwiftError(f"{run.path} was begun with run.seed={former.seed}, not {seed}: give another run.dir")
    run.event("resumed", former.step, layout=former.layout, passed_over=len(problems))
    return replace(
        fresh,
        step=former.step,
        samples=former.samples,
        best_metric=former.best_metric,
        best_value=former.best_value,
        best_step=former.best_step,
        exclusions=[(clip, position) for clip, position in former.exclusions],
    )


def _leave_out(stream: Stream, run: RunDirectory, state: TrainerState, world: World, progress: ProgressLine) -> TrainerState:
    """Let all ranks leave out what any of them found of no use, and note it."""
    told = [fault for faults in gather(stream.faults(), world) for fault in faults]
    found = {fault["clip"]: fault for fault in sorted(told, key=lambda one: -one["position"])}  # The first position counts.
    known = {clip for clip, _ in state.exclusions}
    for clip, fault in sorted(found.items()):
        if clip not in known:
            run.event("quarantined", state.step, **fault)
            progress.note(f"step {state.step}: a clip of run {fault.get('run', '')} is left out from here on")
    stream.exclude([(fault["clip"], fault["position"]) for fault in found.values()])
    return replace(state, exclusions=stream.exclusions)


def _announce(progress: ProgressLine, run: RunDirectory, state: TrainerState, world: World) -> None:
    ranks = f"{world.size} rank{'s' if world.size > 1 else ''} on {world.device.type}"
    begin = f"resumed after step {state.step}" if state.step else "begun"
    progress.note(f"{run.path}: {begin}, attempt {run.attempt}, {ranks}, {state.layout}")


def _step(backend: Backend, stream: Stream, rate: float, meter: Meter) -> StepResult:
    for _ in range(backend.accumulation):
        asked = time.perf_counter()
        try:
            batch = next(stream)
        except StopIteration as error:
            raise SwiftError("the batches ended before train.max_steps: the loader must go on over epochs") from error
        meter.waited(time.perf_counter() - asked)
        backend.forward_backward(batch)
    return backend.step(rate)


def _values(result: StepResult, rate: float, meter: Meter, step: int) -> dict[str, float]:
    return {
        "loss": result.loss,
        "learning_rate": rate,
        "gradient_norm": result.grad_norm,
        "skipped": result.skipped,
        **meter.values(step),
    }


def _is_better(value: float | None, best: float | None) -> bool:
    return value is not None and (best is None or value < best)


def _save(backend: Backend, world: World, run: RunDirectory, train: TrainConfig, state: TrainerState) -> Path:
    """Save a checkpoint and delete those that are no longer kept; a run taken over by another process saves nothing."""
    taker = on_first(lambda: run.lease.lost if run.lease else None, world)
    if taker is not None:
        raise SwiftError(f"{run.path} was taken over by {taker}: this process ends without saving")
    began = time.perf_counter()
    folder = save_checkpoint(run.path, backend, state, world)
    removed = prune(run.path, train.keep_last, state.best_step, world)
    run.event("saved", state.step, folder=folder.name, seconds=time.perf_counter() - began, removed=removed)
    return folder
