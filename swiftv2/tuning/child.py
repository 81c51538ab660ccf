"""One fine-tuning run as a process of its own: started, followed by its metrics, told to stop, judged by what it has left."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from swiftv2.errors import InterruptedRunError, SwiftError
from swiftv2.files import read_json, write_file
from swiftv2.records import EVENTS, METRICS, NO_FAULT, read_lines, read_metrics

SELECT = "val/select"
"""The task's metric on validation subjects, with the sign that makes lower better."""
RESULT = "result.json"
STOPPED_EARLY = InterruptedRunError.exit_status
_OF_LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "OMPI_",
    "PMI_",
    "PMIX_",
    "MPI_",
    "TORCHELASTIC_",
)
_OF_STEPS = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP", "SLURM_NTASKS", "SLURM_TASKS_PER_NODE", "SLURM_NODEID")
_USAGE = 2
_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask to stop."""
Row = tuple[int, float]


class Ended(NamedTuple):
    """How a run has ended."""

    state: str
    """complete, stopped (its state is saved), failed (by itself: again would fail again) or lost (by no fault of its own)."""
    value: float | None = None
    """Of the best step on the validation subjects, lower is better (complete)."""
    reason: str | None = None
    """Why it failed or was lost, in one line."""


class Child:
    """A fine-tuning run.

    Args:
        run: its directory.
        settings: its configuration as YAML; written beside the directory, in which nothing may lie before it begins.
        log: file that its output is appended to.
        ranks: processes.
        command: words that start it before the path of its configuration; `swiftv2 finetune` on so many ranks when None.
    """

    def __init__(self, run: Path, settings: str, log: Path, ranks: int = 1, command: Sequence[str] | None = None) -> None:
        self.run, self.log, self.ranks = run, log, ranks
        self._seen: tuple[int, int] | None = None
        self._last = -1
        self._told = False
        run.parent.mkdir(parents=True, exist_ok=True)
        path = run.with_name(f"{run.name}.yaml")
        write_file(path, settings)
        program = [*(_finetune(ranks) if command is None else command), str(path)]
        self._begins = log.stat().st_size if log.exists() else 0
        self._events = len(read_lines(run / EVENTS))
        with log.open("ab") as stream:
            self.process = subprocess.Popen(  # noqa: S603 (the words are our own)
                [sys.executable, "-m", "swiftv2.tuning.bound", str(os.getpid()), *program],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment(os.environ),
                # Signals of a terminal, or of Slurm, come to the worker alone, which hands them on once.
                process_group=0,
            )

    def fresh(self) -> list[Row]:
        """(step, value) of the evaluations since the last call; those without a finite value are left out."""
        path = self.run / METRICS
        try:
            state = path.stat()
        except FileNotFoundError:
            return []
        if self._seen == (state.st_size, state.st_mtime_ns):
            return []
        self._seen = (state.st_size, state.st_mtime_ns)
        # Steps are logged between evaluations, and an evaluation that was made up for in a line of its own.
        rows = [row for row in read_metrics(path) if row["step"] > self._last and row.get(SELECT) is not None]
        found = [(int(row["step"]), float(row[SELECT])) for row in rows]
        self._last = max((step for step, _ in found), default=self._last)
        return found

    def tell_to_stop(self) -> None:
        """Let it save its state and end; told once, for a second signal would end it at once."""
        if self._told or self.process.poll() is not None:
            return
        self._told = True
        # torchrun gives its ranks half a minute only: they are told themselves, and it ends with them.
        below = _children(self.process.pid) if self.ranks > 1 else []
        for pid in below or [self.process.pid]:
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue

    def kill(self) -> None:
        """End it without a chance to save."""
        for pid in [*_children(self.process.pid), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def follow(self, each: Callable[["Child"], None], poll_seconds: float) -> Ended:
        """Wait for its end.

        Args:
            each: called again and again meanwhile, and once after the end.
            poll_seconds: between calls.
        """
        try:
            while self.process.poll() is None:
                each(self)
                time.sleep(poll_seconds)
            each(self)
        except BaseException:
            self.tell_to_stop()
            self.process.wait()
            raise
        return self.judge()

    def judge(self) -> Ended:
        """How it has ended, by what it has left: torchrun turns every status but 0 into 1."""
        status = self.process.returncode
        if status == 0:
            value = _selected(self.run)
            if value is None:
                return Ended("failed", reason=f"no evaluation gave a finite {SELECT}")
            return Ended("complete", value)
        new = read_lines(self.run / EVENTS)[self._events :]
        fault = next((row for row in reversed(new) if row["event"] == "failed" and row.get("error") not in NO_FAULT), None)
        if fault is not None:
            return Ended("failed", reason=str(fault.get("problem")))
        started = any(row["event"] == "start" for row in new)
        if status in {1, _USAGE} and not started and not self._told:
            return Ended("failed", reason=self._complaint() or f"exit status {status}: see {self.log}")
        # Told by this worker, by Slurm, or by the clock of its job: before it began, while it ran, or while it was judged.
        # Slurm tells all processes of a step at once; one that leaves already does not listen any more, and dies of it.
        asked = self._told or status == STOPPED_EARLY or -status in _ASKING
        if asked or any(row["event"] == "stopped" for row in new):
            return Ended("stopped", reason=f"exit status {status}")
        ended = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        return Ended("lost", reason=f"{self._complaint() or ended} (see {self.log})")

    def _complaint(self) -> str | None:
        """The last line that swiftv2 said of this start."""
        with self.log.open("rb") as stream:
            stream.seek(self._begins)
            lines = stream.read().decode(errors="replace").splitlines()
        said = [line.partition(": ")[2] for line in lines if line.startswith("swiftv2") and ": " in line]
        return said[-1] if said else None


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Variables of a worker without those that would make its child one rank of the worker's own launcher."""
    return {name: value for name, value in given.items() if not name.startswith((*_OF_LAUNCHERS, *_OF_STEPS))}


def _finetune(ranks: int) -> list[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*start, "-m", "swiftv2", "finetune"]


def _selected(run: Path) -> float | None:
    """The value of a finished run: of its best step, by all validation subjects."""
    try:
        value = read_json(run / RESULT)["select"]["value"]
    except (SwiftError, KeyError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _children(pid: int) -> list[int]:
    """Processes that a process has started, where the system tells."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
    except OSError:
        return []
    return [int(word) for word in text.split()]
