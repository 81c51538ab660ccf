"""What is told of a run: when a line of metrics is written, what stands in it, and how an attempt begins."""

from collections.abc import Mapping

from swiftv2.config.engine import TrainConfig
from swiftv2.engine.backend import StepResult
from swiftv2.engine.checkpoint import TrainerState
from swiftv2.engine.launch import World
from swiftv2.engine.meter import Meter
from swiftv2.engine.rundir import RunDirectory


def greeting(run: RunDirectory, state: TrainerState, world: World) -> str:
    """How an attempt begins, for a person."""
    began = f"resumed after step {state.step}" if state.step else "begun"
    ranks = f"{world.size} rank{'s' if world.size > 1 else ''} on {world.device.type}"
    return f"{run.path}: {began}, attempt {run.attempt}, {ranks}"


def evaluation_is_due(state: TrainerState, train: TrainConfig) -> bool:
    """Whether the step was to be evaluated and was not yet, which a stop may have prevented."""
    at = state.step >= train.max_steps or state.step % train.evaluate_every == 0
    return state.step > 0 and at and state.evaluated != state.step


def is_logged(state: TrainerState, train: TrainConfig, values: Mapping[str, float], *, improved: bool) -> bool:
    """Whether the step that was just made gets a line: every `log_every`, the last, evaluated ones and refused ones."""
    if not values:
        return False
    due = state.step % train.log_every == 0 or state.step == train.max_steps or state.evaluated == state.step
    return due or improved or bool(values.get("skipped"))


def values_of(result: StepResult, rate: float, state: TrainerState, meter: Meter) -> dict[str, float]:
    """What is known after a step; figures that cannot be known are not there."""
    ratio = result.loss_ratio
    return {
        "loss": result.loss,
        **({} if ratio is None else {"loss_ratio": ratio}),
        "learning_rate": rate,
        "gradient_norm": result.grad_norm,
        "skipped": result.refused is not None,
        **meter.values(state.step),
        "clips_left_out": float(len(state.exclusions)),
    }
