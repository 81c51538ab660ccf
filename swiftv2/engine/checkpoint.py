"""Checkpoints that are whole or do not exist: `checkpoints/step_N/` with a manifest of hashes written last."""

import dataclasses
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swiftv2.engine.backend import Backend
from swiftv2.engine.collective import on_first
from swiftv2.engine.launch import World
from swiftv2.engine.manifest import check_hashes, check_sizes, write_manifest
from swiftv2.engine.stream import Exclusion
from swiftv2.errors import SwiftError
from swiftv2.files import read_json, sync, write_file

TRAINER = "trainer.json"


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands, beside its weights: everything else follows from the configuration and these numbers."""

    step: int
    samples: int
    attempt: int
    seed: int
    world_size: int
    micro_batch: int
    accumulation: int
    layout: str
    config_sha256: str
    schedule: dict[str, Any] = field(default_factory=dict)
    best_metric: str | None = None
    best_value: float | None = None
    best_step: int | None = None
    exclusions: list[Exclusion] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """A folder `step_N`; `problem` is what is visibly wrong with it (None: manifest whole, all sizes fit)."""

    path: Path
    step: int
    problem: str | None

    def trainer(self) -> TrainerState:
        """Read `trainer.json`.

        Raises:
            SwiftError: it is damaged or of another version.
        """
        values = read_json(self.path / TRAINER)
        known = {f.name for f in dataclasses.fields(TrainerState)}
        try:
            return TrainerState(**{key: value for key, value in values.items() if key in known})
        except TypeError as error:
            raise SwiftError(f"{self.path / TRAINER}: entries are missing: it is damaged or of another version") from error


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """All checkpoints of a run directory, the newest first."""
    found = []
    for path in (run_dir / "checkpoints").glob("step_*"):
        number = re.fullmatch(r"step_(\d+)", path.name)
        if number and path.is_dir():
            found.append(Checkpoint(path, int(number.group(1)), check_sizes(path)))
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


def save_checkpoint(run_dir: Path, backend: Backend, state: TrainerState, world: World) -> Path:
    """Write `checkpoints/step_N/` as a whole or not at all (collective).

    A temporary folder beside it takes all files, each synced to disk; the manifest comes last; then one rename. What a
    failed save leaves behind is the temporary folder, which the next one removes.

    Returns:
        The finished folder.

    Raises:
        SwiftError: on every rank, where a file could not be written; former checkpoints are untouched.
    """
    final = run_dir / "checkpoints" / f"step_{state.step}"
    partial = final.with_name(f".{final.name}.partial")
    on_first(lambda: _clear(partial), world)
    backend.save(partial)
    text = json.dumps(dataclasses.asdict(state), indent=1) + "\n"
    on_first(lambda: write_file(partial / TRAINER, text), world)
    write_manifest(partial, world)
    on_first(lambda: _commit(partial, final), world)
    return final


def load_newest(run_dir: Path, backend: Backend, world: World) -> tuple[TrainerState | None, list[str]]:
    """Load the newest checkpoint whose files all match their hashes (collective).

    Newer ones that are damaged are renamed `damaged_step_N`: by their sizes alone they might look whole, and count among
    those kept in the place of good ones.

    Returns:
        (state, problems): the trainer state, None where the run has no checkpoint at all; and a line for each newer
        checkpoint that was set aside because it is damaged.

    Raises:
        SwiftError: there are checkpoints but all are damaged, or the whole one does not fit the model.
    """
    problems: list[str] = []
    damaged: list[Path] = []
    for candidate in on_first(lambda: list_checkpoints(run_dir), world):
        problem = candidate.problem or check_hashes(candidate.path, world)
        if problem is None:
            state = on_first(candidate.trainer, world)
            backend.load(candidate.path, state.layout)
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


def prune(run_dir: Path, keep_last: int, best_step: int | None, world: World) -> list[int]:
    """Delete all whole checkpoints but the best and the last `keep_last` others; returns the steps deleted (collective).

    Damaged ones neither count nor are touched.
    """

    def act() -> list[int]:
        whole = [c for c in list_checkpoints(run_dir) if c.problem is None and c.step != best_step]
        old = whole[keep_last:]
        for checkpoint in old:
            _remove(checkpoint.path)
        return [c.step for c in old]

    return on_first(act, world)


def _clear(partial: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    for leftover in partial.parent.glob(".step_*"):
        shutil.rmtree(leftover)
    partial.mkdir()


def _commit(partial: Path, final: Path) -> None:
    sync(partial)
    if final.exists():  # the same step saved again
        _remove(final)
    partial.rename(final)
    sync(final.parent)


def _set_aside(folders: list[Path]) -> None:
    for folder in folders:
        aside = folder.with_name(f"damaged_{folder.name}")
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; renamed first, so that a kill in between leaves no half of one under its name."""
    doomed = folder.with_name(f".{folder.name}.removed")
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)
