"""The run directory: everything that a run leaves, and all that is needed to go on with it."""

import contextlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

import swiftv2
from swiftv2.engine.collective import on_first
from swiftv2.engine.launch import World
from swiftv2.engine.lease import Lease, last_attempt
from swiftv2.engine.loss import lost_each_other
from swiftv2.errors import InterruptedRunError, SwiftError, UsageError
from swiftv2.files import write_file
from swiftv2.records import FOLDERS, append_line, cut_torn_line, is_foreign, read_lines

CHANGEABLE = (
    "run.dir",
    "data.store",
    "train.max_steps",
    "train.micro_batch",
    "train.log_every",
    "train.save_every",
    "train.keep_last",
    "train.keep_every",
    "train.keep_steps",
    "train.save_minutes",
    "train.save_in_background",
    "train.deepspeed_files",
    "train.time_limit_minutes",
    "train.skip_steps",
    "faults",
    "tracking",
    "train.evaluate_every",
    "train.profile",
    "evaluate",
    "model.attention_buckets",
    "model.checkpoint_stages",
    "model.checkpoint_keep",
    "data.threads",
    "data.prefetch",
    "data.prefetch_mb",
    "data.patience_seconds",
    "data.on_bad_clip",
    "data.quarantine_limit",
    "engine.backend",
    "engine.zero_stage",
    "engine.device",
    "engine.compile",
    "engine.reduce_bucket_size",
    "engine.allgather_bucket_size",
    "engine.overlap_comm",
    "engine.contiguous_gradients",
)
"""Keys, or whole sections, that may differ when a run is resumed: its samples and what a step computes stay the same.

A cosine or a cooldown ends where `train.max_steps` says now. A store may move; the recipe checks that its content is the same.
"""

_OF_THE_BODY = ("SWIFTV2_SUBMITTED", "SWIFTV2_SITE_FILE")
"""Variables that `slurm/body.sh` sets for the run directory's script."""
PACKAGES = ("torch", "deepspeed", "zarr", "numpy", "safetensors", "mpi4py")


class RunDirectory:
    """An opened run directory; rank 0 writes, the other ranks know its path, attempt and whether it is resumed."""

    def __init__(self, path: Path, attempt: int, world: World, lease: Lease | None) -> None:
        self.path = path
        self.attempt = attempt
        self.lease = lease
        self.listeners: list[Callable[[int, Mapping[str, Any]], None]] = []
        self.tracker_id: str | None = None
        self._writes = world.rank == 0

    @classmethod
    def open(cls, path: Path, config_text: str, world: World, changeable: Collection[str] = CHANGEABLE) -> Self:
        """Create a run directory or take an existing one over for another attempt (collective).

        Args:
            path: the folder.
            config_text: the resolved configuration as YAML.
            world: this process among the ranks.
            changeable: keys or sections that may differ from those of the former attempt.

        Raises:
            SwiftError: another process writes to it, or the folder is not a run directory and not empty.
            UsageError: the configuration differs from the former attempt's in a key that must not change.
        """
        lease: Lease | None = None

        def prepare() -> int:
            nonlocal lease
            if is_foreign(path):
                raise SwiftError(f"{path} is not empty and no run directory: give another run.dir")
            try:
                for name in FOLDERS:
                    (path / name).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SwiftError(f"run.dir={path} cannot be written ({error.strerror}): give another one") from error
            attempt = 1 + max(last_attempt(path), _last_written_attempt(path))
            lease = Lease.acquire(path, attempt)
            try:
                changes = compare_config(path / "config.yaml", config_text, changeable)
                write_file(path / "config.yaml", config_text)
                write_file(path / "environment.json", json.dumps(_environment(world), indent=1) + "\n")
                write_file(path / "resume.sh", _resume_script(world), mode=0o755)
                for name in ("metrics.jsonl", "events.jsonl"):
                    cut_torn_line(path / name)
                run = cls(path, attempt, world, lease)
                run.event("start", world_size=world.size, launcher=world.launcher, host=platform.node(), pid=os.getpid())
                for key, (old, new) in changes.items():
                    run.event("config_changed", key=key, old=old, new=new)
            except BaseException:
                lease.release()
                raise
            return attempt

        attempt = on_first(prepare, world)
        return cls(path, attempt, world, lease)

    @property
    def taken(self) -> str | None:
        """Why this process must stop writing, where another one has taken the run over: found out within a heartbeat."""
        taker = self.lease.lost if self.lease else None
        return None if taker is None else f"{self.path} was taken over by {taker}"

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`: step, attempt, time, then the values; then tell those who listen."""
        self._append("metrics.jsonl", {"step": step, "attempt": self.attempt, "time": time.time(), **values})
        for listen in self.listeners:
            listen(step, values)

    def event(self, kind: str, step: int | None = None, /, **values: Any) -> None:
        """Append one line to `events.jsonl`: step (null outside of steps), attempt, time, event, then the values."""
        line = {"step": step, "attempt": self.attempt, "time": time.time(), "event": kind, **values}
        self._append("events.jsonl", line)

    def alarm(self, kind: str, values: Mapping[str, Any]) -> None:
        """Append an event from whatever rank is able to, where the first may be the one that hangs."""
        self._append(
            "events.jsonl", {"step": None, "attempt": self.attempt, "time": time.time(), "event": kind, **values}, anyway=True
        )

    def warn(self, kind: str, problem: str) -> None:
        """Say in an event and on standard error what is missing beside training, which goes on all the same (rank 0)."""
        if not self._writes:
            return
        with contextlib.suppress(SwiftError, OSError):
            self.event(kind, problem=problem)
        stamp = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S}"
        print(f"{stamp} {kind}: {problem}", file=sys.stderr, flush=True)  # noqa: T201 (where a person reads)

    def document(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file of the run directory, whole (rank 0)."""
        if self._writes:
            write_file(self.path / name, json.dumps(values, indent=1) + "\n")

    def close(self) -> None:
        """Give the lease back."""
        if self.lease is not None:
            self.lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # A full disk may be what went wrong: then nothing can be written of it; nor into a run that another has taken over.
        if error is not None and self.taken is None:
            with contextlib.suppress(SwiftError):
                kind = InterruptedRunError if isinstance(error, RuntimeError) and lost_each_other(error) else type(error)
                self.event("failed", error=kind.__name__, problem=str(error).partition("\n")[0])
        self.close()

    def _append(self, name: str, line: Mapping[str, Any], *, anyway: bool = False) -> None:
        if not (self._writes or anyway):
            return
        if self.taken is not None:
            raise SwiftError(f"{self.taken}: this process ends without writing")
        append_line(self.path / name, line)


def _last_written_attempt(path: Path) -> int:
    names = ("events.jsonl", "metrics.jsonl")
    return max((row["attempt"] for name in names for row in read_lines(path / name)), default=0)


def compare_config(path: Path, config_text: str, changeable: Collection[str] = CHANGEABLE) -> dict[str, tuple[Any, Any]]:
    """What differs between a run's `config.yaml`, where there is one, and a resolved configuration: (before, now) by key.

    Raises:
        UsageError: a key differs that may not.
    """
    if not path.exists():
        return {}
    old, new = (_flatten(yaml.safe_load(text)) for text in (path.read_text(encoding="utf-8"), config_text))
    changes = {key: (old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)}
    for key, (before, now) in changes.items():
        if not any(key == free or key.startswith(f"{free}.") for free in changeable):
            raise UsageError(
                f"{path.parent} was begun with {key}={before} and cannot go on with {key}={now}: "
                "take the former value, or give another run.dir"
            )
    return changes


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {key: value for name, below in tree.items() for key, value in _flatten(below, f"{prefix}{name}.").items()}


def _environment(world: World) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "swiftv2": swiftv2.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "host": platform.node(),
        "world_size": world.size,
        "launcher": world.launcher,
        "device": str(world.device),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "command": sys.orig_argv,
        "folder": str(Path.cwd()),
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout from which the package runs and whether it was changed; None outside of a checkout."""
    root = Path(swiftv2.__file__).parents[1]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None

    def ask(*words: str) -> str:
        done = subprocess.run([git, "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True)  # noqa: S603 (fixed words)
        return done.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain"))}
    except (subprocess.SubprocessError, OSError):
        return None


def _resume_script(world: World) -> str:
    """A shell script that starts the same command again in the same way; under a launcher of `slurm/`, by queueing that."""
    folder = f"cd {shlex.quote(str(Path.cwd()))} || exit 1\n"
    if os.environ.get("SWIFTV2_SUBMITTED"):
        own = sorted(name for name in os.environ if name.startswith("SWIFTV2_") and name not in _OF_THE_BODY)
        exports = "".join(f"export {name}={shlex.quote(os.environ[name])}\n" for name in own)
        site = f". {shlex.quote(os.environ['SWIFTV2_SITE_FILE'])} || exit 1\n"
        return f"#!/bin/bash\n{folder}{exports}{site}exec {os.environ['SWIFTV2_SUBMITTED']}\n"
    interpreter, rest = sys.executable, sys.orig_argv[1:]
    words = [interpreter, *rest]
    single = int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1
    if world.launcher == "torchrun":
        meeting = ["--standalone"] if single else ["--rdzv-backend=c10d", f"--rdzv-endpoint={os.environ['MASTER_ADDR']}:29400"]
        ranks = [f"--nproc-per-node={world.local_size}", f"--nnodes={os.environ.get('GROUP_WORLD_SIZE', '1')}"]
        while rest and rest[0] == "-u":
            rest = rest[1:]
        words = [interpreter, "-m", "torch.distributed.run", *meeting, *ranks, *rest]
    elif world.launcher == "mpirun":
        words = ["mpirun", "-n", str(world.size), *words]
    elif world.launcher == "srun":
        words = ["srun", f"--ntasks={world.size}", *words]
    threads = os.environ.get("OMP_NUM_THREADS")
    export = f"export OMP_NUM_THREADS={shlex.quote(threads)}\n" if threads else ""
    note = "" if single else "# Run this on every node of the job.\n"
    return f"#!/bin/sh\n{note}{folder}{export}exec {shlex.join(words)}\n"
