"""Makes this process kill itself at a stage of a save, of a removal, or of a rewind."""

import functools
import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from swiftv2.engine import checkpoint, saver, shards
from swiftv2.engine.refusals import Refusals

_UPDATES = 6
"""Pieces of a shard that are on the disk when a rank dies in the middle of it: header and some tensors."""


def die(*_: object) -> None:
    """End as the kernel ends processes that take too much memory, or a node that loses power."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(own_rank: int, stage: str, rank: int, step: int) -> None:
    """Die on one rank at a stage, for the first time that it is about the step.

    Args:
        own_rank: of this process.
        stage: one of STAGES.
        rank: the one that dies.
        step: whose checkpoint is being saved; that removes others, or that the run went back to.
    """
    if own_rank == rank:
        STAGES[stage](step)


def _before(owner: Any, name: str, step: int) -> None:
    """Die instead of a call whose first argument is a folder or file of the step's unfinished checkpoint."""
    _wrap(owner, name, step, die)


def _wrap(owner: Any, name: str, step: int, instead: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(path: Path, *rest: Any) -> Any:
        if f"/.step_{step}." in f"{path}/":
            return instead(original, path, *rest)
        return original(path, *rest)

    _replace(owner, name, call)


def _replace(owner: Any, name: str, by: Any) -> None:
    """For this process only."""
    setattr(owner, name, by)


def _in_a_shard(step: int) -> None:
    class Digest:
        def __init__(self) -> None:
            self.inner, self.left = hashlib.sha256(), _UPDATES

        def update(self, data: memoryview) -> None:
            self.left -= 1
            if self.left == 0:
                die()
            self.inner.update(data)

        def hexdigest(self) -> str:
            return self.inner.hexdigest()

    def write(call: Callable[..., Any], *values: Any) -> Any:
        _replace(shards, "hashlib", SimpleNamespace(sha256=Digest))  # what is used of it
        return call(*values)

    _wrap(saver, "write_shard", step, write)


def _after_manifest(step: int) -> None:
    _wrap(checkpoint, "write_manifest", step, lambda call, *values: die(call(*values)))


def _after_rename(step: int) -> None:
    rename = Path.rename

    def call(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if moved.name == f"step_{step}":
            die()
        return moved

    _replace(Path, "rename", call)


def _former_aside(step: int) -> None:
    rename = Path.rename

    def call(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if self.name == f"step_{step}":
            die()
        return moved

    _replace(Path, "rename", call)


def _in_a_removal(step: int) -> None:
    """Of whatever goes once the step's checkpoint counts: its manifest and trainer state are gone, the state is not."""

    def rmtree(path: Path, *rest: Any, **options: Any) -> None:
        if Path(path).name.endswith(".removed") and (Path(path).parent / f"step_{step}").exists():
            for name in ("manifest.json", "trainer.json"):
                (Path(path) / name).unlink()
            die()
        shutil.rmtree(path, *rest, **options)

    _replace(checkpoint, "shutil", SimpleNamespace(rmtree=rmtree))  # what is used of it


def _in_a_rewind(name: str, step: int) -> None:
    """Before the run goes back from the step (`rewind`), or before it deletes what lies ahead of the step (`settle`)."""

    def call(self: Refusals, state: checkpoint.TrainerState) -> Any:
        if state.step == step:
            die()
        return original(self, state)

    original = getattr(Refusals, name)
    _replace(Refusals, name, call)


STAGES: dict[str, Callable[[int], None]] = {
    "before the shard": lambda step: _before(saver, "write_shard", step),
    "in the shard": _in_a_shard,
    "after the shards": lambda step: _before(saver, "commit", step),
    "before the manifest": lambda step: _before(checkpoint, "write_manifest", step),
    "after the manifest": _after_manifest,
    "former one aside": _former_aside,
    "after the rename": _after_rename,
    "in a removal": _in_a_removal,
    "before the rewind": lambda step: _in_a_rewind("rewind", step),
    "after the rewind's save": lambda step: _in_a_rewind("settle", step),
}
