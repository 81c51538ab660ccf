"""Saving while training goes on: a copy of the state is taken at once, written beside the next steps, and then counts."""

import shutil
import time
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch

from swiftv2.config.engine import TrainConfig
from swiftv2.engine.backend import Backend
from swiftv2.engine.checkpoint import TrainerState, clear, commit, outdated, remove
from swiftv2.engine.collective import attempt, for_others, gather, on_first
from swiftv2.engine.launch import World
from swiftv2.engine.manifest import hash_file
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.shards import Snapshot, Stretch, Written, shard_name, write_shard
from swiftv2.errors import SwiftError
from swiftv2.records import read_lines


class Saved(NamedTuple):
    """How a save ended."""

    state: TrainerState
    folder: Path
    problem: str | None
    """Why nothing was saved; None where the checkpoint is there."""


@dataclass
class _Save:
    """A save that was begun."""

    state: TrainerState
    kind: str
    partial: Path
    began: float
    blocking: float
    written: Future[dict[str, Written]]


class Saver:
    """Writes checkpoints of a run, one at a time; a context manager.

    `begin` copies this rank's state and hands it to a thread, which writes and syncs it. Once all ranks are `flushed`, which
    they tell one another at the boundary of a step, `finish` makes it count: manifest and rename on rank 0.

    Attributes:
        failed_in_a_row: saves that failed since the last that did not.
        longest: seconds that the longest save took from its beginning to its end.
    """

    def __init__(self, run: RunDirectory, backend: Backend, world: World, train: TrainConfig) -> None:
        self._run, self._backend, self._world, self._train = run, backend, world, train
        self._snapshot = Snapshot()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._current: _Save | None = None
        self._count = 0
        self._last = time.monotonic()
        self.failed_in_a_row = 0
        self.longest = 0.0

    def __enter__(self) -> Self:
        on_first(lambda: clear(self._run.path), self._world)
        self.longest = on_first(self._longest_before, self._world)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)

    @property
    def busy(self) -> bool:
        """Whether a save was begun and does not count yet; the same on all ranks."""
        return self._current is not None

    @property
    def flushed(self) -> bool:
        """Whether nothing of this rank is still on its way to the disk."""
        return self._current is None or self._current.written.done()

    def overdue(self, seconds: float) -> bool:
        """Whether the save under way has not come to its end for so long: a file system that no longer answers."""
        current = self._current
        return current is not None and not current.written.done() and time.monotonic() - current.began > seconds

    @property
    def due(self) -> bool:
        """Whether it is time for an ephemeral checkpoint, by this rank's clock."""
        minutes = self._train.save_minutes
        return minutes > 0 and not self.busy and time.monotonic() - self._last >= 60 * minutes

    def begin(self, state: TrainerState, *, permanent: bool, native: bool = True) -> None:
        """Take a copy of the state and begin to write it; what the thread cannot write is told by `finish`.

        Collective where DeepSpeed's own files are written; a save that is still on its way must be finished first.

        Args:
            state: where the run stands.
            permanent: whether it is kept as such, and holds DeepSpeed's own files.
            native: whether there is time for those.
        """
        began = time.monotonic()
        self._last = began
        self._count += 1
        final = self._final(state)
        partial = final.with_name(f".{final.name}.{state.attempt}.{self._count}.partial")
        beside = self._train.save_in_background
        held = self._backend.stretches()
        stretches = self._snapshot.take(held, self._synchronise) if beside else list(held)
        shapes, adam_steps = self._backend.shapes(), self._backend.adam_steps
        wanted = native and permanent and self._train.deepspeed_files
        files, problem = self._save_native(partial, state) if wanted else ([], None)

        def write() -> dict[str, Written]:
            if problem is not None:
                raise problem
            return self._write(partial, stretches, shapes, adam_steps, files)

        written = self._thread.submit(write)
        if not beside:
            futures.wait([written])
        kind = "permanent" if permanent else "ephemeral"
        self._current = _Save(state, kind, partial, began, time.monotonic() - began, written)

    def finish(self) -> Saved | None:
        """Wait until the save is on the disk and make it count; None where none was begun (collective).

        Raises:
            SwiftError: another process took the run over.
        """
        save, self._current = self._current, None
        if save is None:
            return None
        waited = time.monotonic()
        # Only rank 0 holds the lease: a run that was taken over saves nothing more.
        taker = self._run.lease.taker() if self._run.lease else None
        parts, problems, takers = zip(*gather((*self._outcome(save.written), taker), self._world), strict=True)
        if takers[0] is not None:
            raise SwiftError(f"{self._run.path} was taken over by {takers[0]}: this process ends without saving")
        problem = next((f"{one} (rank {rank})" for rank, one in enumerate(problems) if one is not None), None)
        final = self._final(save.state)
        removed: list[Path] = []
        if problem is None:
            try:
                removed = on_first(
                    lambda: self._commit(save, final, {k: v for part in parts for k, v in part.items()}), self._world
                )
            except SwiftError as error:
                problem = str(error)
        if problem is not None:
            return self._failure(save, final, problem)
        self.failed_in_a_row = 0
        now = time.monotonic()
        self.longest = max(self.longest, now - save.began)
        if self._world.rank == 0:
            self._thread.submit(self._delete, removed)
        self._run.event(
            "saved",
            save.state.step,
            folder=final.name,
            kind=save.kind,
            seconds=now - save.began,
            blocking_seconds=save.blocking + now - waited,
            bytes=sum(one.size for part in parts for one in part.values()),
            removed=[int(path.name.partition("_")[2]) for path in removed],
        )
        return Saved(save.state, final, None)

    def _outcome(self, written: "Future[dict[str, Written]]") -> tuple[dict[str, Written], str | None]:
        """What this rank has written, or why not; any error is told, as the other ranks must not wait for this one."""
        files, error = attempt(written.result)
        told = for_others(error, self._world.rank)
        return files or {}, None if told is None else str(told)

    def _commit(self, save: _Save, final: Path, files: dict[str, Written]) -> list[Path]:
        commit(save.partial, final, save.kind, save.state, files)
        return outdated(self._run.path, self._train, save.state)

    def _failure(self, save: _Save, final: Path, problem: str) -> Saved:
        self.failed_in_a_row += 1
        if self._world.rank == 0:
            shutil.rmtree(save.partial, ignore_errors=True)
        self._run.event("save_failed", save.state.step, folder=final.name, kind=save.kind, problem=problem)
        return Saved(save.state, final, problem)

    def _final(self, state: TrainerState) -> Path:
        return self._run.path / "checkpoints" / f"step_{state.step}"

    def _synchronise(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)

    def _save_native(self, partial: Path, state: TrainerState) -> tuple[list[str], SwiftError | None]:
        try:
            return self._backend.save_native(partial, state.step, state.samples), None
        except SwiftError as error:
            return [], error

    def _write(
        self, partial: Path, stretches: list[Stretch], shapes: dict[str, tuple[int, ...]], adam_steps: int, native: list[str]
    ) -> dict[str, Written]:
        """What this rank writes, on its thread."""
        name = shard_name(self._world.rank, self._world.size)
        mine = {key: shapes[key] for key, _, _ in stretches}
        files = {name: write_shard(partial / name, stretches, mine, adam_steps)}
        return files | {name: hash_file(partial / name) for name in native}

    def _delete(self, folders: list[Path]) -> None:
        for folder in folders:
            try:
                remove(folder)
            except OSError as error:
                self._run.event("not_removed", folder=folder.name, problem=error.strerror)

    def _longest_before(self) -> float:
        """Seconds that saves of former attempts took at most: a time limit may come before the first of this one."""
        rows = read_lines(self._run.path / "events.jsonl")
        return max((float(row["seconds"]) for row in rows if row.get("event") == "saved"), default=0.0)
