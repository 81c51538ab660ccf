"""Checkpoints that are whole or do not exist: `checkpoints/step_N/` with a manifest of hashes written last."""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from swiftv2.config.engine import TrainConfig
from swiftv2.engine.backend import Backend
from swiftv2.engine.collective import on_first
from swiftv2.engine.launch import World
from swiftv2.engine.manifest import check_hashes, hash_file, look_at, write_manifest
from swiftv2.engine.shards import SavedState, Written
from swiftv2.engine.stream import Exclusion
from swiftv2.errors import SwiftError
from swiftv2.files import read_json, sync, write_file

TRAINER = "trainer.json"
_REPLACED = ".replaced"
_NEWEST = 2
"""Whole checkpoints that are always kept, of whatever kind."""


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands, beside its weights: everything else follows from the configuration and these numbers.

    Attributes:
        step, samples: done and consumed by all ranks.
        attempt, seed, world_size, micro_batch, accumulation, config_sha256, schedule: of the run that saved it.
        best_metric, best_value, best_step: of evaluations so far.
        evaluated: step of the last evaluation.
        exclusions: what is left out, as (clip, position, cause).
        spike_window: loss and gradient norm of the accepted steps by which the next is judged.
        refused: steps in a row, up to this one, that were refused: step, reason, and (clip, position) of each sample.
        rewinds: how often the run went back.
        tracker_id: of the run at its trackers, the same in every attempt; None where there are none.
    """

    step: int
    samples: int
    attempt: int
    seed: int
    world_size: int
    micro_batch: int
    accumulation: int
    config_sha256: str
    schedule: dict[str, Any] = field(default_factory=dict)
    best_metric: str | None = None
    best_value: float | None = None
    best_step: int | None = None
    evaluated: int = 0
    exclusions: list[Exclusion] = field(default_factory=list)
    spike_window: list[tuple[float, float]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    rewinds: int = 0
    tracker_id: str | None = None

    def scored(self, scores: Mapping[str, float], metric: str | None) -> Self:
        """The state after an evaluation, which may have been the best so far: the lowest finite value of `metric`."""
        state = dataclasses.replace(self, evaluated=self.step)
        value = None if metric is None else scores.get(metric)
        if value is None or not math.isfinite(value) or (self.best_value is not None and value >= self.best_value):
            return state
        return dataclasses.replace(state, best_metric=metric, best_value=value, best_step=self.step)


@dataclass(frozen=True)
class Checkpoint:
    """A folder `step_N`; `problem` is what is visibly wrong with it (None: manifest whole, all sizes fit)."""

    path: Path
    step: int
    problem: str | None
    kind: str | None = None
    """permanent or ephemeral; None where it cannot be told."""

    def trainer(self) -> TrainerState:
        """Read `trainer.json`.

        Raises:
            SwiftError: it is damaged or of another version.
        """
        values = read_json(self.path / TRAINER)
        known = {f.name for f in dataclasses.fields(TrainerState)}
        try:
            state = TrainerState(**{key: value for key, value in values.items() if key in known})
            return dataclasses.replace(state, exclusions=[Exclusion(*one) for one in state.exclusions])
        except TypeError as error:
            raise SwiftError(f"{self.path / TRAINER}: entries are missing: it is damaged or of another version") from error


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """All checkpoints of a run directory, the newest first."""
    found = []
    for path in (run_dir / "checkpoints").glob("step_*"):
        number = re.fullmatch(r"step_(\d+)", path.name)
        if number and path.is_dir():
            problem, kind = look_at(path)
            found.append(Checkpoint(path, int(number.group(1)), problem, kind))
    return sorted(found, key=lambda c: -c.step)


def latest(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint whose manifest is whole and whose sizes fit; hashes are checked when it is loaded."""
    return next((c for c in list_checkpoints(run_dir) if c.problem is None), None)


def verify_checkpoint(folder: Path) -> None:
    """Read every file of a checkpoint and compare it with the manifest.

    Raises:
        SwiftError: a file is missing, truncated or changed; the message names it.
    """
    if not folder.is_dir():
        raise SwiftError(f"{folder}: there is no such checkpoint folder")
    problem = check_hashes(folder)
    if problem:
        raise SwiftError(problem)


def commit(partial: Path, final: Path, kind: str, state: TrainerState, files: Mapping[str, Written]) -> None:
    """Make a checkpoint of a folder whose files are all on the disk: trainer state, manifest, one rename.

    Args:
        partial: the folder, beside the final one.
        final: `checkpoints/step_N`; a former one of the same step is replaced.
        kind: permanent or ephemeral.
        state: where the run stood when the files were taken.
        files: by name below the folder, without the trainer state.
    """
    write_file(partial / TRAINER, json.dumps(dataclasses.asdict(state), indent=1) + "\n")
    write_manifest(partial, kind, {**files, TRAINER: hash_file(partial / TRAINER)})
    aside = final.with_name(f".{final.name}{_REPLACED}")
    if final.exists():
        final.rename(aside)
    partial.rename(final)
    sync(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def clear(run_dir: Path) -> None:
    """Remove what a killed process has left behind, and bring back what it was about to replace."""
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for aside in folder.glob(f".step_*{_REPLACED}"):
        final = folder / aside.name.removeprefix(".").removesuffix(_REPLACED)
        if not final.exists():
            aside.rename(final)
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover)


def load_newest(
    run_dir: Path, backend: Backend, world: World, before: int | None = None
) -> tuple[TrainerState | None, list[str]]:
    """Load the newest checkpoint whose files all match their hashes (collective).

    Newer ones that are damaged are renamed `damaged_step_N`: by their sizes alone they might look whole, and count among
    those kept in the place of good ones.

    Args:
        run_dir: the run directory.
        backend: takes the state, whatever number of ranks saved it.
        world: this process among the ranks.
        before: only checkpoints of steps below this one count.

    Returns:
        (state, problems): the trainer state, None where there is no checkpoint at all; and a line for each newer checkpoint
        that was set aside because it is damaged.

    Raises:
        SwiftError: there are checkpoints but all are damaged, or the whole one does not fit the model.
    """
    problems: list[str] = []
    damaged: list[Path] = []
    for candidate in on_first(lambda: list_checkpoints(run_dir), world):
        if before is not None and candidate.step >= before:
            continue
        problem = candidate.problem or check_hashes(candidate.path, world)
        if problem is None:
            state = on_first(candidate.trainer, world)
            backend.restore(candidate.path)
            on_first(lambda: _set_aside(damaged), world)
            return state, problems
        problems.append(problem)
        damaged.append(candidate.path)
    if problems:
        raise SwiftError(
            f"{run_dir}: no checkpoint is whole ({'; '.join(problems)}); restore one, or remove "
            f"{run_dir / 'checkpoints'} to begin again"
        )
    return None, []


def read_weights(checkpoint: Path) -> dict[str, Any]:
    """Whole weights (fp32) and buffers by name, on the CPU, of a checkpoint that was verified.

    Raises:
        SwiftError: its state is not whole.
    """
    with SavedState(checkpoint) as saved:
        return saved.weights()


def outdated(run_dir: Path, train: TrainConfig, state: TrainerState) -> list[Path]:
    """Whole checkpoints that are no longer kept after this state was saved.

    Kept are the newest two of all, the best, the last `keep_last` permanent ones beside it, permanent ones that `keep_every`
    divides or `keep_steps` names, and the newest from before the steps that were refused, to which the run may have to go
    back. Damaged ones, and those that lie ahead of a state that was gone back to, neither count nor are touched.
    """
    whole = [c for c in list_checkpoints(run_dir) if c.problem is None and c.step <= state.step]
    permanent = [c for c in whole if c.kind == "permanent" and c.step != state.best_step]
    kept = {c.step for c in whole[:_NEWEST]} | {c.step for c in permanent[: train.keep_last]} | {state.best_step}
    if state.refused:
        kept |= {c.step for c in [c for c in whole if c.step < state.refused[0]["step"]][:1]}
    kept |= {c.step for c in permanent if c.step in train.keep_steps}
    if train.keep_every is not None:
        kept |= {c.step for c in permanent if c.step % train.keep_every == 0}
    return [c.path for c in whole if c.step not in kept]


def remove(folder: Path) -> None:
    """Delete a checkpoint; renamed first, so that a kill in between leaves no half of one under its name."""
    doomed = folder.with_name(f".{folder.name}.removed")
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _set_aside(folders: list[Path]) -> None:
    for folder in folders:
        aside = folder.with_name(f"damaged_{folder.name}")
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
