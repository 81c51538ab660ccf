"""Whether a Slurm job that ended is to be started again: judged by what it has left, not by its status alone."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from swiftv2.cluster.standing import holds
from swiftv2.cluster.traces import read_traces
from swiftv2.errors import SwiftError
from swiftv2.files import read_json
from swiftv2.records import (
    EVENTS,
    LEASE,
    NO_FAULT,
    append_line,
    cut_torn_line,
    is_foreign,
    newest_step,
    read_holder,
    read_lines,
)

AGAIN = 75
KILLED = 128
"""Statuses above this are a signal's: the process was ended from outside."""
IDLE_STARTS = 3
"""Starts in a row of one job, by others than this project, that may come to no newer checkpoint."""
BROKEN_CHECKUPS = 2
"""Checkups in a row that may be ended from outside, by a signal or a lost rank, before a person must look."""
_STORE_STAGING = ".build"


class Attempt(NamedTuple):
    """One start of a Slurm job."""

    job: str
    """SLURM_JOB_ID."""
    restart: int
    """SLURM_RESTART_COUNT: starts before this one."""
    nodes: str
    """SLURM_JOB_NODELIST."""


class Verdict(NamedTuple):
    """What is to be done with a job whose ranks have ended."""

    status: int
    """Exit status of the job; 75: start it again."""
    reason: str
    exclude: tuple[str, ...] = ()
    """Hosts that the next start leaves out."""

    @property
    def again(self) -> bool:
        """Whether the job is to be requeued."""
        return self.status == AGAIN


def run_mark(run_dir: Path) -> int:
    """How far a run is: the step of its newest finished checkpoint, 0 where there is none."""
    return newest_step(run_dir) or 0


def store_mark(store: Path) -> int:
    """How far an unfinished build or append is: files that finished runs have left for its end."""
    return sum(1 for path in (store / _STORE_STAGING).rglob("*") if path.is_file())


def begin(run_dir: Path, attempt: Attempt, most: int) -> int:
    """Note that a job begins on a run; how far the run is.

    Args:
        run_dir: folder of the run, made where it is not there.
        attempt: this start.
        most: starts after the first that are allowed.

    Raises:
        SwiftError: the folder holds other things, another job writes there, or this one was started too often, or again and
            again without a checkpoint of its own.
    """
    if is_foreign(run_dir):
        raise SwiftError(f"{run_dir} is not empty and no run directory: give another run.dir")
    mark = run_mark(run_dir)
    holder = read_holder(run_dir / LEASE)
    if holder is not None and holder.job != attempt.job and holds(read_traces(run_dir), time.time()):
        raise SwiftError(f"{run_dir} is being written by {holder}: stop that one first, or wait until it has ended")
    if attempt.restart > most:
        raise SwiftError(
            f"{run_dir}: job {attempt.job} was requeued {attempt.restart} times, more than {most}: {_look(run_dir)}"
        )
    idle = _idle_starts(run_dir, attempt.job, mark)
    if idle > IDLE_STARTS:
        raise SwiftError(
            f"{run_dir}: job {attempt.job} was started {idle} times in a row without a checkpoint after step {mark}: "
            f"{_look(run_dir)}"
        )
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    _note(run_dir, "job", job=attempt.job, restart=attempt.restart, nodes=attempt.nodes, checkpoint=mark)
    return mark


def judge_run(run_dir: Path, attempt: Attempt, status: int, mark: int, most: int) -> Verdict:
    """What is to be done with a job on a run.

    Args:
        run_dir: folder of the run.
        attempt: the start that has ended.
        status: of the ranks, as `srun` gives it.
        mark: how far the run was when it began.
        most: starts after the first that are allowed.
    """
    verdict = _judge(run_dir, attempt, status, mark, most)
    if verdict.again:
        _note(run_dir, "requeued", job=attempt.job, restart=attempt.restart, reason=verdict.reason, status=status)
    return verdict


def judge_checkup(run_dir: Path, attempt: Attempt, status: int, report: Path, most: int) -> Verdict:
    """What is to be done where `doctor` ended with a status other than 0: hosts that it calls sick are left out.

    Args:
        run_dir: folder of the run.
        attempt: the start that has ended.
        status: of doctor's ranks.
        report: what doctor has printed as JSON.
        most: starts after the first that are allowed.
    """
    hosts, problem = _sick(report)
    if not hosts and status > KILLED and attempt.restart < most and _broken_checkups(run_dir) < BROKEN_CHECKUPS:
        verdict = Verdict(AGAIN, f"doctor was ended with status {status}: {problem}")
        _note(run_dir, "requeued", job=attempt.job, restart=attempt.restart, reason=verdict.reason, status=status, checkup=True)
    elif not hosts:
        verdict = Verdict(status if 0 < status <= KILLED else 1, problem)
    elif attempt.restart >= most:
        verdict = Verdict(1, f"{', '.join(hosts)} sick, and the job was requeued {attempt.restart} times already: {problem}")
    else:
        verdict = Verdict(AGAIN, f"{', '.join(hosts)} sick: {problem}", hosts)
        _note(
            run_dir, "requeued", job=attempt.job, restart=attempt.restart, reason=verdict.reason, status=status, excluded=hosts
        )
    return verdict


def judge_store(store: Path, attempt: Attempt, status: int, mark: int, most: int) -> Verdict:
    """What is to be done with a job that builds a store; arguments as for a run."""
    if status == 0 and (store / _STORE_STAGING).exists():
        status = KILLED + 1  # What `srun` says where it has lost a node.
    if status not in {0, AGAIN} and status <= KILLED:
        return Verdict(status, f"failed with status {status}")
    further = f"{now} runs after {mark}" if (now := store_mark(store)) > mark else None
    return _again(store, attempt, status, further, most, "run was finished")


def _judge(run_dir: Path, attempt: Attempt, status: int, mark: int, most: int) -> Verdict:
    holder = read_holder(run_dir / LEASE)
    if holder is not None and holder.job == attempt.job and holder.restart > attempt.restart:
        # This script belongs to a node that Slurm has given up and that lives on.
        return Verdict(1, f"start {holder.restart + 1} of job {holder.job} has taken the run over")
    if status == 0 and not _is_finished(run_dir):
        # What `srun` says where it has lost a node.
        status = KILLED + 1
    problem = _problem(run_dir) if status else None
    if status not in {0, AGAIN} and status <= KILLED:
        return Verdict(status, f"failed with status {status}{f': {problem}' if problem else ''}; a person must look")
    if problem is not None:
        # The highest status of all ranks says less: others end with 75 where one has failed.
        return Verdict(1, f"failed: {problem}; a person must look")
    further = f"checkpoint {step} after {mark}" if (step := _saved_since(run_dir, mark)) is not None else None
    return _again(run_dir, attempt, status, further, most, "checkpoint was made")


def _again(path: Path, attempt: Attempt, status: int, further: str | None, most: int, unit: str) -> Verdict:
    """Of a job that did not fail by itself: whether another start would come further."""
    if status == 0:
        return Verdict(0, f"{path} is done")
    if further is None:
        reason = f"no {unit} since the job began, so another start would come no further"
        return Verdict(1, f"not requeued after status {status}: {reason}: {_look(path)}")
    if attempt.restart >= most:
        return Verdict(1, f"not requeued: it was {attempt.restart} times, as often as is allowed; given again, it goes on")
    return Verdict(AGAIN, f"stopped with status {status}, {further}")


def _problem(run_dir: Path) -> str | None:
    """What the run's last attempt said when it failed; None where it did not say so."""
    for row in reversed(read_lines(run_dir / EVENTS)):
        if row["event"] in {"start", "job"}:
            return None
        if row["event"] == "failed" and row.get("error") not in NO_FAULT:
            return str(row.get("problem"))
    return None


def _is_finished(run_dir: Path) -> bool:
    """Whether the last attempt has come to the end of the run."""
    rows = read_lines(run_dir / EVENTS)
    ends = [row["event"] for row in rows if row["event"] in {"start", "finished"}]
    return bool(ends) and ends[-1] == "finished"


def _saved_since(run_dir: Path, mark: int) -> int | None:
    """Step of the last checkpoint that the job's last start has made, None where it made none.

    Not the newest step decides: a run that went back to an older checkpoint, because a newer one was damaged or its numbers
    went wrong, comes further from there.
    """
    for row in reversed(read_lines(run_dir / EVENTS)):
        if row["event"] == "job":
            return None
        if row["event"] == "saved" and row["step"] not in {0, mark}:
            return int(row["step"])
    return None


def _idle_starts(run_dir: Path, job: str, mark: int) -> int:
    """Starts of a job, with this one, since the last that this project asked for, from the same checkpoint on."""
    count = 1
    for row in reversed(read_lines(run_dir / EVENTS)):
        made = row["event"] == "saved" and row["step"] not in {0, mark}
        if made or row["event"] == "requeued" or (row["event"] == "job" and (row["job"] != job or row["checkpoint"] != mark)):
            break
        count += row["event"] == "job"
    return count


def _sick(report: Path) -> tuple[tuple[str, ...], str]:
    """Hosts that a checkup calls sick, and what it found; where it has left no report, that."""
    try:
        told = read_json(report)
    except SwiftError:
        return (), f"doctor ended without a report; what it said stands above and in {report}"
    checks: Sequence[dict[str, Any]] = told.get("checks", [])
    found = "; ".join(f"{check['name']}: {check['what']}" for check in checks if check["verdict"] == "sick")
    return tuple(told.get("sick_hosts", [])), " ".join(found.split()) or "doctor names no reason"


def _broken_checkups(run_dir: Path) -> int:
    """Checkups in a row, up to now, that were ended from outside."""
    count = 0
    for row in reversed(read_lines(run_dir / EVENTS)):
        if row["event"] == "start":
            break
        count += row["event"] == "requeued" and bool(row.get("checkup"))
    return count


def _look(path: Path) -> str:
    return f"look at the job's output and at {path / EVENTS if (path / EVENTS).exists() else path}"


def _note(run_dir: Path, event: str, **values: Any) -> None:
    """Append an event as the engine does; the attempt is the last one that the engine began."""
    holder = read_holder(run_dir / LEASE)
    attempt = holder.attempt if holder else 0
    cut_torn_line(run_dir / EVENTS)  # of a node that went down: behind it, another line would be damaged, too
    append_line(run_dir / EVENTS, {"step": None, "attempt": attempt, "time": time.time(), "event": event, **values})


def this_attempt(environment: Mapping[str, str]) -> Attempt:
    """The Slurm job of this process.

    Raises:
        SwiftError: there is none.
    """
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        raise SwiftError("SLURM_JOB_ID is not set: this command is for the body of a Slurm job")
    restart = environment.get("SLURM_RESTART_COUNT", "0")
    if not restart.isdigit():
        raise SwiftError(f"SLURM_RESTART_COUNT={restart!r} is no number")
    return Attempt(job, int(restart), environment.get("SLURM_JOB_NODELIST", ""))
