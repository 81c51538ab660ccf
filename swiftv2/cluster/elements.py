"""How the elements of a sweep stand, by their run directories, the jobs that were noted for them, and what Slurm says."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from swiftv2.cluster import slurm
from swiftv2.cluster.book import OTHER_JOB, Entry
from swiftv2.cluster.slurm import Job
from swiftv2.cluster.standing import GOING, WAITING, Standing, stand
from swiftv2.cluster.traces import Traces, read_traces
from swiftv2.config.sweep import SweepConfig

State = Literal["not begun", "pending", "waiting", "running", "finished", "failed"]
ACTIVE: frozenset[State] = frozenset({"pending", "waiting", "running"})
"""States of elements that go on by themselves."""
AskSlurm = Callable[[list[str]], Mapping[str, Job] | None]
"""Gives jobs by number and by name; None where Slurm cannot be asked."""
_NEVER = "DependencyNeverSatisfied"
_LOG_BYTES = 1 << 16
_SAID = re.compile(r"swiftv2(?: \(rank \d+\))?: (?P<stamp>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d )?(?P<text>.*)")
"""What commands and, with the time, launchers say."""
_VERDICT = "failed with status"
"""Begins what `swiftv2 job end` says of ranks that have told themselves why they failed."""


@dataclass(frozen=True)
class ElementState:
    """How an element stands."""

    name: str
    index: int | None
    """In the sweep as it is now; None for one that was queued and is no longer in it."""
    run_dir: Path
    state: State
    """waiting: for elements that must finish before it."""
    reason: str
    """What more there is to say; empty where the state says all."""
    job: str | None
    """Such as 117_3; None where it was never queued."""
    queued: bool
    """Whether Slurm still has it in its queue, or running."""
    step: int | None
    steps: int | None
    loss: float | None


def ask_slurm(numbers: list[str]) -> Mapping[str, Job]:
    """What Slurm says of jobs; it is not asked where there are none.

    Raises:
        SwiftError: it does not answer.
    """
    return slurm.jobs(numbers) if numbers else {}


def element_states(sweep: SweepConfig, book: Mapping[str, Entry], ask: AskSlurm) -> list[ElementState]:
    """How all elements stand, in the order of the sweep; behind them those that were queued and are no longer in it.

    Args:
        sweep: the sweep.
        book: how its elements were queued.
        ask: asks Slurm.

    Raises:
        SwiftError: Slurm does not answer, or a run directory cannot be read.
    """
    known = sweep.names()
    names = (*known, *sorted(set(book) - set(known)))
    numbers = [job for entry in book.values() for job in (entry.job, *entry.after.values())]
    traces = {name: read_traces(path) for name in names if (path := sweep.run_dir(name)).is_dir()}
    # Slurm is asked first about what stands there now, then directories are read: what ended meanwhile has written its end.
    queue = ask(list(dict.fromkeys([*numbers, *(one.job for one in traces.values() if one.job)])))
    traces = {name: read_traces(sweep.run_dir(name)) for name in traces}
    return _Judge(sweep, book, queue, traces).all(names)


class _Judge:
    """States of elements, each looked for once: what waits for another one depends on its state."""

    def __init__(
        self, sweep: SweepConfig, book: Mapping[str, Entry], queue: Mapping[str, Job] | None, traces: Mapping[str, Traces]
    ) -> None:
        self.sweep, self.book, self.traces = sweep, book, traces
        self.answered, self.queue = queue is not None, queue or {}
        self.now = time.time()
        self.states: dict[str, ElementState] = {}

    def all(self, names: tuple[str, ...]) -> list[ElementState]:
        return [self.of(name) for name in names]

    def of(self, name: str) -> ElementState:
        if name not in self.states:
            self.states[name] = self._look(name)
        return self.states[name]

    def _look(self, name: str) -> ElementState:
        entry, traces = self.book.get(name), self.traces.get(name)
        job = self.queue.get(entry.job) if entry is not None else None
        standing = None
        if traces is not None:
            silent = None if self.answered else "Slurm was not asked"
            standing = stand(traces, self.queue.get(traces.job or ""), self.now, silent)
        state, reason = self._judge(entry, job, traces, standing)
        names = self.sweep.names()
        return ElementState(
            name=name,
            index=names.index(name) if name in names else None,
            run_dir=self.sweep.run_dir(name),
            state=state,
            reason=reason,
            job=entry.job if entry is not None else traces.job if traces is not None else None,
            queued=job is not None and job.state in WAITING | GOING,
            step=standing.step if standing is not None else None,
            steps=standing.max_steps if standing is not None else None,
            loss=standing.loss if standing is not None else None,
        )

    def _judge(
        self, entry: Entry | None, job: Job | None, traces: Traces | None, standing: Standing | None
    ) -> tuple[State, str]:
        if entry is not None and job is not None and job.state in WAITING:
            return self._waits(entry, job)
        if job is not None and job.state in GOING:
            return "running", (standing.why or "") if standing is not None and standing.state == "running" else ""
        if standing is not None and standing.state == "finished":
            return "finished", ""
        if standing is not None and standing.state in {"running", "pending", "requeued"}:
            return ("running" if standing.state == "running" else "pending"), standing.why or ""
        if entry is None:
            begun = standing is not None and standing.state != "not begun"
            return ("failed", _why(standing)) if begun else ("not begun", "")
        if not self.answered:
            return "pending", f"queued as job {entry.job}; whether it still is cannot be told without Slurm"
        return "failed", self._failure(entry, job, traces, standing)

    def _waits(self, entry: Entry, job: Job) -> tuple[State, str]:
        """Of a job that Slurm has not started."""
        lost = self._lost_parent(entry)
        if lost is not None:
            return "failed", lost
        if job.reason == _NEVER:
            return "failed", f"what it waits for has failed: job {', '.join(entry.after.values())}"
        # Slurm gives its reason a moment after it took the job.
        parents = [name for name in entry.after if name in self.book and not self._is_done(name)]
        waits = [f"{name} (job {entry.after[name]})" for name in parents]
        if OTHER_JOB in entry.after and (job.reason == "Dependency" or self._is_active(entry.after[OTHER_JOB])):
            waits.append(f"job {entry.after[OTHER_JOB]}")
        if waits:
            return "waiting", f"for {', '.join(waits)}"
        return "pending", "" if job.reason in {"", "None"} else job.reason

    def _lost_parent(self, entry: Entry) -> str | None:
        """Which parent will not let the job start any more, in one line."""
        for name, number in entry.after.items():
            if name not in self.book or self._is_done(name):
                continue
            if self.book[name].job != number:
                if not self._is_active(number):
                    return f"job {number} of {name}, for which it waited, has failed; that one was queued again"
            elif self.of(name).state == "failed":
                return f"{name}, for which it waited, has failed"
        return None

    def _is_done(self, name: str) -> bool:
        return self.of(name).state == "finished"

    def _is_active(self, number: str) -> bool:
        return number in self.queue and self.queue[number].state in WAITING | GOING

    def _failure(self, entry: Entry, job: Job | None, traces: Traces | None, standing: Standing | None) -> str:
        """Why a job that was queued is over without a finished run."""
        lost = self._lost_parent(entry)
        began = datetime.fromisoformat(entry.when).timestamp()
        since = {row["event"] for row in traces.events if row["time"] >= began} if traces is not None else set()
        if lost is not None and not since:
            return lost
        log = self.sweep.folder / f"slurm-{entry.job}.out"
        # Where a run wrote down why it failed, that says most; then what its job said last.
        why = _why(standing) if since else ""
        told = why if "failed" in since else complaint(log) or why
        if job is None:
            return told or f"job {entry.job} is over, and Slurm has forgotten it: see {log}"
        if job.state in {"FAILED", "COMPLETED"}:
            return told or f"its job ended without finishing the run: see {log}"
        word = job.state.lower().replace("_", " ")
        return f"{word}: {told}" if told else word


def _why(standing: Standing | None) -> str:
    if standing is None:
        return ""
    after = f" after step {standing.step}" if standing.state == "stopped" and standing.step is not None else ""
    return (
        f"{standing.state}{after}: {standing.why}"
        if standing.why and standing.state != "failed"
        else standing.why or standing.state
    )


def complaint(log: Path) -> str | None:
    """The last line in which a command said what was wrong; else the last one of the launcher; None where there is none.

    Args:
        log: what a job or a process has printed.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    said = [match for line in lines if (match := _SAID.match(line))]
    complaints = [match for match in said if match["stamp"] is None and not match["text"].startswith(_VERDICT)]
    # What the launcher says at a start tells nothing of an end.
    others = [match for match in said if not match["text"].startswith("job ")]
    return next((match["text"] for match in reversed(complaints or others)), None)
