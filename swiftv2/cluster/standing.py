"""How a run stands: pure functions of what lies in its directory and of what Slurm says of its job."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

from swiftv2.cluster.alarms import Alarm, event_alarms, present_alarms
from swiftv2.cluster.slurm import Job
from swiftv2.cluster.traces import HELDOUT, Traces
from swiftv2.records import NO_FAULT, STALE_SECONDS

State = Literal["running", "pending", "stopped", "requeued", "finished", "failed", "dead", "not begun"]

WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
GOING = {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
_ENDING_SECONDS = 30.0
"""After a hang is written down, the process is gone within this time; a heartbeat since shows that it is not."""
_STARTING_SECONDS = 900.0
"""What a batch script may take before training begins, where Slurm cannot be asked."""
_STEPS = {"resumed", "rewound", "stopped", "finished"}
_DURATION = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


class Queued(NamedTuple):
    """What Slurm says of the job; all but its number is None where it says nothing."""

    number: str
    name: str | None = None
    state: str | None = None
    reason: str | None = None
    nodes: str | None = None
    node_count: int | None = None
    seconds_left: float | None = None
    start: str | None = None


class Saved(NamedTuple):
    """The newest checkpoint: seconds since it was saved, steps since, whether manifest and sizes are whole, or what is not."""

    step: int
    age_seconds: float
    kind: str | None
    bytes: int
    whole: bool
    problem: str | None
    steps_since: int | None


@dataclass(frozen=True)
class Standing:
    """How a run stands; None is what is not known.

    Attributes:
        run: the run directory.
        state, why: in a word, and in a line where there is more to say.
        step, max_steps: done, and asked for.
        loss, heldout_loss, heldout_best, heldout_best_step: last, last, lowest, and where that was.
        clips_per_second, mfu, data_wait, step_seconds, seconds_left: as the run itself measured them.
        time: unix time of the last line of metrics.
        attempts, requeues, world_size: starts, how often its job was queued again, ranks of the last start.
        holder, heartbeat_seconds: who holds the lease, and the seconds since it was last renewed.
        job, checkpoint: see there.
        alarms: what a person should know, the present first, then the newest.
    """

    run: str
    state: State
    why: str | None
    step: int | None
    max_steps: int | None
    loss: float | None
    heldout_loss: float | None
    heldout_best: float | None
    heldout_best_step: int | None
    clips_per_second: float | None
    mfu: float | None
    data_wait: float | None
    step_seconds: float | None
    seconds_left: float | None
    time: float | None
    attempts: int
    requeues: int
    world_size: int | None
    holder: str | None
    heartbeat_seconds: float | None
    job: Queued | None
    checkpoint: Saved | None
    alarms: Sequence[Alarm]

    @property
    def over(self) -> bool:
        """Whether nothing will go on by itself: a stopped run does where its job is still there to queue it again."""
        there = self.job is not None and self.job.state in WAITING | GOING
        return self.state in {"finished", "failed", "dead"} or (self.state == "stopped" and not there)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, with the same keys always."""
        values = {**vars(self)}
        values["job"] = None if self.job is None else self.job._asdict()
        values["checkpoint"] = None if self.checkpoint is None else self.checkpoint._asdict()
        values["alarms"] = [asdict(one) for one in self.alarms]
        return values


def stand(traces: Traces, job: Job | None, now: float, silent: str | None = None) -> Standing:
    """How a run stands.

    Args:
        traces: what lies in its directory.
        job: what Slurm says of `traces.job`; None where it knows none, or was not asked.
        now: unix time.
        silent: why Slurm could not be asked; None where it has answered.
    """
    state, why = judge(traces, job, now, answered=silent is None)
    starts = [row for row in traces.events if row["event"] == "start"]
    step = _step(traces)
    last, best = (traces.evaluations[-1] if traces.evaluations else {}), traces.best
    going = state == "running"
    present = present_alarms(traces, job, now, STALE_SECONDS, going=going, over=state == "finished", silent=silent)
    return Standing(
        run=str(traces.path),
        state=state,
        why=why,
        step=step,
        max_steps=traces.setting("train", "max_steps"),
        loss=traces.value("loss"),
        heldout_loss=last.get(HELDOUT, best[0] if best else None),
        heldout_best=best[0] if best else None,
        heldout_best_step=best[1] if best else None,
        clips_per_second=traces.value("clips_per_second"),
        mfu=traces.value("mfu"),
        data_wait=traces.value("data_wait"),
        step_seconds=traces.value("step_seconds"),
        seconds_left=traces.value("seconds_left"),
        time=traces.rows[-1]["time"] if traces.rows else None,
        attempts=len(starts),
        requeues=sum(row["event"] == "requeued" for row in traces.events),
        world_size=starts[-1].get("world_size") if starts else None,
        holder=str(traces.holder) if traces.holder and not traces.holder.released else None,
        heartbeat_seconds=None if traces.heartbeat is None else max(0.0, now - traces.heartbeat),
        job=None if traces.job is None else _queued(traces.job, job),
        checkpoint=_saved(traces, step, now),
        alarms=[*present, *event_alarms(traces.events, now)],
    )


def judge(traces: Traces, job: Job | None, now: float, *, answered: bool) -> tuple[State, str | None]:
    """In what state a run is, and why.

    Slurm's word that a job waits counts most, since it queues a job again only when its processes are dead; then a living
    holder of the lease; then what the last attempt wrote down before it ended.
    """
    waits = job is not None and job.state in WAITING
    ended = _ending(traces.events)
    if waits and job is not None and (traces.holder is None or traces.holder.job == job.number or not holds(traces, now)):
        return "pending", _waiting(job)
    if holds(traces, now) and not _gone_since(traces, ended):
        return "running", None
    if ended is None or (job is not None and job.state in GOING and _begun_after(job, ended[2])):
        return _without_ending(traces, job, now, answered=answered)
    state, why, _ = ended
    if state == "requeued" and answered and (job is None or job.state not in GOING):
        return "stopped", f"it was queued again, but Slurm has job {traces.job} no more: start it again"
    return state, why


def holds(traces: Traces, now: float) -> bool:
    """Whether a living process holds the lease, as far as that can be told."""
    if traces.holder is None or traces.heartbeat is None or traces.holder.released:
        return False
    return traces.alive if traces.alive is not None else now - traces.heartbeat < STALE_SECONDS


def _without_ending(traces: Traces, job: Job | None, now: float, *, answered: bool) -> tuple[State, str | None]:
    """A run without a living holder of which nothing is written about its end."""
    here = job is not None and job.state in GOING
    starts = [row for row in traces.events if row["event"] in {"start", "job"}]
    if here or (not answered and starts and starts[-1]["event"] == "job" and now - starts[-1]["time"] < _STARTING_SECONDS):
        lost = traces.holder is not None and not traces.holder.released and traces.holder.job == traces.job
        return "running", None if lost else "its job runs; training has not begun"
    if not starts:
        return "not begun", None if job is None else f"job {job.name}: {job.state}"
    if starts[-1]["event"] == "job":
        return "failed", f"job {traces.job} ended before training began: see its output"
    if traces.holder is not None and traces.holder.released:
        return "failed", "it ended and could not write down why: is the disk full?"
    return "dead", "it was killed, or its node is gone: give the same command again"


def _ending(events: Sequence[Mapping[str, Any]]) -> tuple[State, str | None, float] | None:
    """What the last attempt wrote of its end: state, why, unix time; None where it wrote nothing."""
    ending: tuple[State, str | None, float] | None = None
    for row in events:
        kind, when = row["event"], row["time"]
        failed = ending is not None and ending[0] == "failed"
        if kind in {"start", "job"}:
            ending = None
        elif kind == "requeued":
            ending = ("requeued", row.get("reason"), when)
        elif kind == "failed" and row.get("error") not in NO_FAULT:
            ending = ("failed", row.get("problem") or row.get("error"), when)
        elif kind == "finished":
            ending = ("finished", None, when)
        elif kind == "stopped":
            ending = ("stopped", row.get("signal"), when)
        elif kind in {"hang", "grace", "lost", "failed"} and not failed:
            # A rank that is lost has more to say than those that end for want of it.
            former = ending[1] if ending is not None else None
            ending = ("stopped", former or row.get("cause") or row.get("problem") or _left(row), when)
    return ending


def _left(row: Mapping[str, Any]) -> str:
    return f"rank {row.get('rank')} on {row.get('host')} is gone" if row.get("rank") is not None else str(row["event"])


def _gone_since(traces: Traces, ended: tuple[State, str | None, float] | None) -> bool:
    """Whether the holder has written that it ends, and was not heard of since: then it does not wait to release the lease."""
    if ended is None or traces.heartbeat is None or ended[0] == "finished":
        return False
    return traces.alive is None and traces.heartbeat < ended[2] + _ENDING_SECONDS


def _begun_after(job: Job, when: float) -> bool:
    """Whether Slurm began a job after a moment; its times have no zone, they are local, and are cut to seconds."""
    try:
        return datetime.fromisoformat(job.start).astimezone().timestamp() > when
    except ValueError:
        return False


def _waiting(job: Job) -> str:
    expected = "" if job.start in {"", "N/A", "Unknown"} else f", expected to start {job.start.replace('T', ' ')}"
    return f"{job.reason}{expected}"


def _step(traces: Traces) -> int | None:
    """Of the last line of metrics, or of what came after it: a stop, a rewind, an earlier checkpoint."""
    known = [(row["time"], row["step"]) for row in traces.rows[-1:]]
    known += [(row["time"], row["step"]) for row in traces.events if row["event"] in _STEPS and row.get("step") is not None]
    if known:
        return int(max(known)[1])
    return traces.checkpoint.step if traces.checkpoint else None


def _queued(number: str, job: Job | None) -> Queued:
    if job is None:
        return Queued(number)
    start = None if job.start in {"", "N/A", "Unknown"} else job.start
    reason = None if job.reason in {"", "None"} else job.reason
    return Queued(number, job.name, job.state, reason, job.nodes or None, job.node_count, seconds(job.time_left), start)


def seconds(text: str) -> float | None:
    """Seconds of Slurm's days-hours:minutes:seconds; None for words such as UNLIMITED or INVALID."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)


def _saved(traces: Traces, step: int | None, now: float) -> Saved | None:
    one = traces.checkpoint
    if one is None:
        return None
    since = None if step is None else step - one.step
    return Saved(one.step, max(0.0, now - one.time), one.kind, one.size, one.problem is None, one.problem, since)
