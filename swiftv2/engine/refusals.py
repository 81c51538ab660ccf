"""What is left out: bad clips, and the samples of refused steps; when the run goes back, and what is said at the end."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swiftv2.config.engine import FaultsConfig
from swiftv2.engine.backend import Backend, StepResult
from swiftv2.engine.checkpoint import TrainerState, list_checkpoints, load_newest, remove
from swiftv2.engine.collective import gather, on_first
from swiftv2.engine.launch import World
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.stream import Exclusion, Stream
from swiftv2.errors import SwiftError

DIAGNOSIS = "diagnosis.json"
_WORST = 8
"""Samples that an event names: those of the micro-batches with the largest losses."""
_MOST_LINES = 3
"""Clips that are named in the log one by one."""


@dataclass(frozen=True)
class Refusals:
    """Notes refused steps, and takes the run back behind them."""

    run: RunDirectory
    backend: Backend
    world: World
    config: FaultsConfig

    def leave_out(self, state: TrainerState, stream: Stream) -> tuple[TrainerState, list[str]]:
        """Let all ranks leave out what any of them found of no use, and write it down (collective).

        Returns:
            The state, and a line for each clip, or one for many.
        """
        told = [fault for faults in gather(stream.faults(), self.world) for fault in faults]
        found = {one["clip"]: one for one in sorted(told, key=lambda one: -one["position"])}  # The first position counts.
        known = {one.clip for one in state.exclusions}
        lines = []
        for clip, fault in sorted(found.items()):
            if clip not in known:
                self.run.event("quarantined", state.step, **fault)
                lines.append(f"step {state.step}: a clip of run {fault.get('run', '')} is left out from here on")
        if len(lines) > _MOST_LINES:
            lines = [f"step {state.step}: {len(lines)} clips are left out from here on: events.jsonl says which"]
        stream.exclude([Exclusion(fault["clip"], fault["position"]) for fault in found.values()])
        return replace(state, exclusions=stream.exclusions), lines

    def note(self, state: TrainerState, result: StepResult, stream: Stream) -> TrainerState:
        """Write a refused step down, with the samples of all ranks (collective)."""
        own = stream.recent(self.backend.accumulation)
        told = [{**sample, "loss": result.losses[sample["micro_batch"]]} for sample in own]
        samples = [one for part in gather(told, self.world) for one in part]
        worst = sorted(samples, key=lambda one: (one["loss"] == one["loss"], -one["loss"]))[:_WORST]
        self.run.event(
            "skipped",
            state.step,
            reason=result.refused,
            loss=result.loss,
            gradient_norm=result.grad_norm,
            samples=len(samples),
            worst=[{key: _plain(value) for key, value in one.items()} for one in worst],
        )
        clips = sorted({(one["clip"], one["position"]) for one in samples})
        entry = {"step": state.step, "reason": result.refused, "clips": [list(one) for one in clips]}
        return replace(state, refused=[*state.refused, entry])

    def hopeless(self, state: TrainerState) -> bool:
        """Whether so many steps in a row were refused that the run has to go back."""
        return len(state.refused) >= self.config.rewind_after

    def rewind(self, state: TrainerState) -> TrainerState:
        """Load the newest checkpoint from before the refused steps, with their samples left out (collective).

        Checkpoints that were saved since are deleted by `settle`, once the new state is saved.

        Raises:
            SwiftError: the run went back too often, or there is no checkpoint to go back to.
        """
        first, last = state.refused[0]["step"], state.step
        if state.rewinds >= self.config.most_rewinds:
            raise self._give_up(state, f"although the run went back {state.rewinds} times")
        former, problems = load_newest(self.run.path, self.backend, self.world, before=first)
        for problem in problems:
            self.run.event("checkpoint_damaged", problem=problem)
        if former is None:
            raise self._give_up(state, "and there is no checkpoint from before them")
        known = {one.clip: one for one in state.exclusions}
        for entry in state.refused:
            for clip, position in entry["clips"]:
                if clip not in known or position < known[clip].position:
                    known[clip] = Exclusion(clip, position, "rewound")
        self.run.event("rewound", former.step, refused=[first, last], samples=len(known) - len(state.exclusions))
        return replace(
            former,
            attempt=state.attempt,
            world_size=state.world_size,
            micro_batch=state.micro_batch,
            accumulation=state.accumulation,
            config_sha256=state.config_sha256,
            schedule=state.schedule,
            exclusions=[known[clip] for clip in sorted(known)],
            refused=[],
            rewinds=state.rewinds + 1,
        )

    def settle(self, state: TrainerState) -> None:
        """Delete the checkpoints that lie ahead of a state that was gone back to (collective)."""

        def act() -> None:
            for checkpoint in list_checkpoints(self.run.path):
                if checkpoint.step > state.step:
                    remove(checkpoint.path)

        on_first(act, self.world)

    def _give_up(self, state: TrainerState, why: str) -> SwiftError:
        path: Path = self.run.path / DIAGNOSIS
        self.run.document(DIAGNOSIS, _diagnosis(state))
        steps = f"{state.refused[0]['step']} to {state.step}"
        return SwiftError(
            f"steps {steps} were refused ({state.refused[-1]['reason']}), {why}: see {path}; widen faults.spike_sigma if the "
            "numbers are sound, else export the last checkpoint and begin a new run.dir from it (run.init_from) with a lower "
            "optimizer.lr or without the samples (data.exclude)"
        )


def _diagnosis(state: TrainerState) -> dict[str, Any]:
    """All that is known where a run gives up."""
    return {
        "step": state.step,
        "rewinds": state.rewinds,
        "refused": state.refused,
        "left_out": [one._asdict() for one in state.exclusions],
        "last_accepted": _table(state.spike_window),
    }


def _table(window: Sequence[Sequence[float]]) -> list[dict[str, float]]:
    return [{"loss": loss, "gradient_norm": norm} for loss, norm in window]


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity."""
    return None if isinstance(value, float) and value - value != 0 else value
