"""What a person should know of a run: what holds now, and what was written down in its last two attempts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swiftv2.cluster.slurm import Job
from swiftv2.cluster.traces import Traces

_ATTEMPTS = 2
_SLOWER = 10
"""How many times as long as usual the next line of metrics may take."""
_LEAST_SECONDS = 60.0
_LONG_PHASES = 5
"""How many times `faults.hang_seconds` loading, the first step, an evaluation or a save may take."""
_HANG_SECONDS = 180.0
_ROOM = 2
"""Free space below so many checkpoints is little: one is written beside those that are there."""
_FOR_EVER = {
    "DependencyNeverSatisfied",
    "JobHeldAdmin",
    "JobHeldUser",
    "PartitionDown",
    "BadConstraints",
    "launch failed requeued held",
}
"""Reasons for which a job waits until somebody does something."""
_GB = 1e9

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Alarm:
    """One line.

    Attributes:
        kind: name of the event, or of what holds now.
        text: what is wrong.
        present: whether it holds now; else it happened.
        time, age_seconds: unix time since when, and seconds until now; None where it cannot be told.
        attempt, step: to which it belongs.
    """

    kind: str
    text: str
    present: bool
    time: float | None
    age_seconds: float | None
    attempt: int | None = None
    step: int | None = None


def event_alarms(events: Sequence[Row], now: float) -> list[Alarm]:
    """Alarms of the last two attempts, the newest first.

    Args:
        events: oldest first.
        now: unix time.
    """
    starts = [index for index, row in enumerate(events) if row["event"] == "start"]
    first = starts[-_ATTEMPTS] if len(starts) >= _ATTEMPTS else 0
    found = []
    for row in events[first:]:
        tell = _TOLD.get(row["event"])
        text = tell(row) if tell else ""
        if text:
            age = max(0.0, now - row["time"])
            line = " ".join(text.split())
            found.append(Alarm(row["event"], line, False, row["time"], age, row["attempt"], row.get("step")))
    return found[::-1]


def present_alarms(
    traces: Traces, job: Job | None, now: float, stale: float, *, going: bool, over: bool, silent: str | None
) -> list[Alarm]:
    """What holds now.

    Args:
        traces: what lies in the run directory.
        job: what Slurm says of its job.
        now: unix time.
        stale: age of a heartbeat from which it is too old.
        going: whether the run goes on, as far as can be told.
        over: whether it has reached its end.
        silent: why Slurm could not be asked.
    """
    found: list[tuple[str, str, float | None]] = []
    if silent is not None and traces.job is not None:
        found.append(("slurm", f"job {traces.job} cannot be looked at: {silent}", None))
    if job is not None and job.state == "PENDING" and job.reason in _FOR_EVER:
        found.append(("job", f"job {job.name} will not start by itself: {job.reason}", None))
    if going:
        found += _heartbeat(traces, job, now, stale)
        found += _standstill(traces, now)
    if traces.rows and traces.value("loss") is None and any("loss" in row for row in traces.rows):
        found.append(("loss", "the last loss is not finite", traces.rows[-1]["time"]))
    if traces.checkpoint is not None and traces.checkpoint.problem is not None:
        found.append(("checkpoint", f"the newest checkpoint is damaged: {traces.checkpoint.problem}", None))
    if not over and traces.free < _ROOM * traces.largest:
        room = f"{traces.free / _GB:.2f} GB are free, and a checkpoint takes {traces.largest / _GB:.2f} GB"
        found.append(("disk", f"{room}: make room", None))
    found += _left_out(traces)
    found += [("damaged", text, None) for text in traces.damaged]
    return [
        Alarm(kind, " ".join(text.split()), True, since, None if since is None else max(0.0, now - since))
        for kind, text, since in found
    ]


def _heartbeat(traces: Traces, job: Job | None, now: float, stale: float) -> list[tuple[str, str, float | None]]:
    held = traces.holder is not None and not traces.holder.released
    if not held or traces.heartbeat is None or now - traces.heartbeat < stale:
        return []
    whose = f"Slurm says {job.state} of job {job.name}" if job is not None else "its process is there"
    text = f"no heartbeat for {now - traces.heartbeat:.0f} s although {whose}: does it hang, or its file system?"
    return [("heartbeat", text, traces.heartbeat)]


def _standstill(traces: Traces, now: float) -> list[tuple[str, str, float | None]]:
    """No new line of metrics for much longer than one takes."""
    start = next((row for row in reversed(traces.events) if row["event"] == "start"), None)
    attempt = start["attempt"] if start else 0
    row = next((row for row in reversed(traces.rows) if row["attempt"] == attempt and "step_seconds" in row), None)
    patience = _LONG_PHASES * float(traces.setting("faults", "hang_seconds", _HANG_SECONDS))
    if row is None:
        if start is None or now - start["time"] < patience:
            return []
        return [("standstill", f"no step since the start of attempt {attempt}", start["time"])]
    every = int(traces.setting("train", "log_every", 1))
    usual = float(row["step_seconds"] or 0.0) * every
    allowed = max(_LEAST_SECONDS, _SLOWER * usual, patience if _is_evaluated(traces, row["step"], every) else 0.0)
    # Steps are done again, and a rewind takes time, before the next line.
    since = max([row["time"], *(one["time"] for one in traces.events if one["event"] in {"resumed", "rewound"})])
    if now - since < allowed:
        return []
    return [("standstill", f"no line of metrics since step {row['step']}, where one takes {usual:.1f} s", row["time"])]


def _is_evaluated(traces: Traces, step: int, every: int) -> bool:
    """Whether an evaluation comes before the next line: its step is written down when that is done."""
    interval, last = traces.setting("train", "evaluate_every"), traces.setting("train", "max_steps")
    due = interval is not None and step // int(interval) != (step + every) // int(interval)
    return due or (last is not None and step + every >= int(last))


def _left_out(traces: Traces) -> list[tuple[str, str, float | None]]:
    count = traces.value("clips_left_out")
    if not count:
        return []
    kinds = {"quarantined", "rewound"}
    since = next((row["time"] for row in reversed(traces.events) if row["event"] in kinds), None)
    clips = "1 clip is" if count == 1 else f"{count:.0f} clips are"
    return [("left_out", f"{clips} left out", since)]


def _hang(row: Row) -> str:
    behind = {one.get("rank"): one.get("host") for one in [*row.get("behind", ()), *row.get("silent", ())]}
    suspects = [f"rank {rank} on {behind.get(rank) or 'an unknown host'}" for rank in row.get("suspects", ())]
    most_likely = f"; most likely at fault: {_few(suspects)}" if suspects else ""
    return f"{row.get('cause', 'not known why')}{most_likely}"


def _lost(row: Row) -> str:
    if "cause" in row:
        return _hang(row)
    return f"rank {row.get('rank')} on {row.get('host')} is gone since {row.get('phase')} of step {row.get('step')}"


def _slow(row: Row) -> str:
    slow = [f"rank {one['rank']} on {one['host']} ({one['what']}, {one['share']:+.0%})" for one in row.get("slow", ())]
    return f"slow: {_few(slow)}" if slow else ""


def _skipped(row: Row) -> str:
    return f"step {row.get('step')} was refused: {row.get('reason')}"


def _rewound(row: Row) -> str:
    first, last = row.get("refused") or (None, None)
    return (
        f"went back to step {row.get('step')}: steps {first} to {last} were refused, {row.get('samples')} samples are left out"
    )


def _requeued(row: Row) -> str:
    """A requeue is no alarm, but hosts that are left out are."""
    hosts = row.get("excluded") or ()
    return f"queued again without {_few([str(host) for host in hosts])}" if hosts else ""


def _quarantined(row: Row) -> str:
    return f"a clip of run {row.get('run')} is left out: {row.get('reason')}"


def _few(names: Sequence[str]) -> str:
    shown = 3
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _problem(before: str) -> Callable[[Row], str]:
    return lambda row: f"{before}{row.get('problem') or row.get('error') or 'not known why'}"


_TOLD: Mapping[str, Callable[[Row], str]] = {
    "hang": _hang,
    "grace": _hang,
    "lost": _lost,
    "failed": _problem(""),
    "save_failed": lambda row: f"the checkpoint of step {row.get('step')} could not be saved: {row.get('problem')}",
    "not_removed": lambda row: f"{row.get('folder')} could not be deleted: {row.get('problem')}",
    "skipped": _skipped,
    "rewound": _rewound,
    "slow": _slow,
    "checkpoint_damaged": _problem("a checkpoint was passed over: "),
    "quarantined": _quarantined,
    "requeued": _requeued,
}
"""What each kind of event tells; others are no alarms."""
