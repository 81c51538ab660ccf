"""What a build or append tells of its runs: the report, the file of ids, the index, and the commit.

What is written here before the commit is written again, to the same bytes, by an attempt that comes after a kill.
"""

import hashlib
import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from swiftv2 import __version__
from swiftv2.data.changes.plan import WITHDRAWN, WITHDRAWN_ELSEWHERE, Options, Plan, Refused
from swiftv2.data.changes.versions import (
    Base,
    check_unchanged,
    encode_runs,
    read_lines,
    read_subjects,
    write_lines,
    write_subjects,
    writing,
)
from swiftv2.data.ingest.discover import Discovery
from swiftv2.data.ingest.run import Candidate
from swiftv2.data.keys import salt_id, subject_key
from swiftv2.data.labels import LabelRow, merge
from swiftv2.data.store import layout
from swiftv2.data.store.reader import Run
from swiftv2.errors import UsageError
from swiftv2.files import write_file

Result = TypeVar("Result")
_KEYS = ("subject", "session", "task", "run")


@dataclass(frozen=True)
class BuildReport:
    """What a build or append did.

    Attributes:
        version: of the store.
        taken: runs that were taken, by this build or append.
        present: files whose runs were in the store before.
        refused: pseudonymous key and reason of every run that was not taken.
        frames: volumes of the runs taken.
        bytes: of their bold shards.
        report: the file that names every source file with its key and reason; mode 0600, since names tell subjects.
        nothing_to_do: whether the store was there already, from the same files and options.
    """

    version: int
    taken: int
    present: int
    refused: tuple[tuple[str, str], ...]
    frames: int
    bytes: int
    report: Path
    nothing_to_do: bool = False


@dataclass(frozen=True)
class Job:
    """What is to be taken, and where.

    Attributes:
        store: folder of the store.
        discovery: the files.
        options: what the user asks.
        salt: of the pseudonymous keys.
        base: the version that is appended to; None for a new store.
        strict: whether any refusal is an error.
    """

    store: Path
    discovery: Discovery
    options: Options
    salt: str
    base: Base | None
    strict: bool

    @property
    def command(self) -> str:
        """Verb of `swiftv2 store`."""
        return "build" if self.base is None else "append"

    @property
    def staging(self) -> Path:
        """Folder that is there while this is unfinished."""
        return self.store / layout.STAGING

    @property
    def rows(self) -> Path:
        """What runs leave for the end."""
        return self.staging / "rows"

    @property
    def small(self) -> Path:
        """Shared shards on their way."""
        return self.staging / "small"

    def guarded(self, action: Callable[[], Result]) -> Result:
        """Do something, and name the place where writing fails."""
        with writing(self.store, self.command):
            return action()


def report_of(
    store: Path,
    version: int,
    runs: Iterable[Run],
    refused: tuple[tuple[str, str], ...],
    present: int,
    *,
    nothing_to_do: bool = False,
) -> BuildReport:
    """The report of a change that took these runs."""
    taken = tuple(runs)
    frames, size = sum(run.frames for run in taken), sum(run.bytes for run in taken)
    report = store / layout.REPORT_FILE
    return BuildReport(version, len(taken), present, refused, frames, size, report, nothing_to_do)


def report_again(store: Path, version: int, runs: Iterable[Run]) -> BuildReport:
    """The report of a change that made a version of the store before: what is left of its runs, and what it refused.

    Args:
        store: folder of the store.
        version: that the change made.
        runs: of the newest version.
    """
    lines = (line for line in read_lines(store / layout.REPORT_FILE) if line["version"] == version)
    refused = tuple((line["run"], line["reason"]) for line in lines if line["status"] == "refused")
    taken = (run for run in runs if run.since == version and run.present)
    return report_of(store, version, taken, refused, 0, nothing_to_do=True)


def write_report(job: Job, plan: Plan, runs: list[Run], refused: list[Refused]) -> None:
    """Put what becomes of each file into the report, in place of what an interrupted attempt wrote there.

    Files of subjects who withdrew are not named: their ids are to be nowhere in the store. A refusal that a former version's
    report tells of is not told again.
    """
    names = {candidate.key: candidate.source.relative for candidate in plan.candidates}
    told = [(names[run.key], run.key, run.subject, "taken", "") for run in runs]
    told += [
        (one.file, one.key, one.subject, "refused", one.reason)
        for one in refused
        if one.reason not in (WITHDRAWN, WITHDRAWN_ELSEWHERE)
    ]
    columns = ("file", "run", "subject", "status", "reason")
    lines = [dict(zip(columns, line, strict=True)) for line in sorted(told)]
    path = job.store / layout.REPORT_FILE
    former = [] if job.base is None else [line for line in read_lines(path) if line["version"] < plan.version]
    known = {tuple(line[name] for name in columns) for line in former}
    new = [{**line, "version": plan.version} for line in lines if tuple(line.values()) not in known]
    write_lines(path, former + new)


def commit(job: Job, plan: Plan, runs: tuple[Run, ...], refused: tuple[Refused, ...]) -> None:
    """Write index and ids, then the group's metadata: from here on the store is of the new version."""
    former = job.base.attributes if job.base is not None else None
    if job.base is not None:
        check_unchanged(job.base)  # Again: not every file system has locks.
    lines = runs if job.base is None else (*job.base.runs, *runs)
    index = encode_runs(lines)
    write_file(job.store / layout.index_name(plan.version), index)
    write_subjects(job.store, subjects_of(job, plan.candidates, runs))
    change = {
        "version": plan.version,
        "change": job.command,
        "runs": len(lines),
        "runs_sha256": hashlib.sha256(index).hexdigest(),
        "writer": f"swiftv2 {__version__}",
        "cohort": job.options.cohort,
        "sources": plan.digest,
        "taken": len(runs),
        "refused": len(refused),
    }
    identity = hmac.new(plan.salt.encode(), plan.digest.encode(), hashlib.sha256).hexdigest()[:16]
    attributes = {
        "format": layout.FORMAT,
        "version": plan.version,
        "store_id": former["store_id"] if former else identity,
        "salt_id": salt_id(plan.salt),
        "sources": former["sources"] if former else plan.digest,
        "generated": plan.generated,
        "writer": change["writer"],
        "grid": plan.grid.to_json(),
        "options": former["options"] if former else job.options.kept() | {"chunk_frames": layout.CHUNK_FRAMES},
        "rows": plan.rows,
        "frames": plan.frames,
        "runs": len(lines),
        "index": layout.index_name(plan.version),
        "runs_sha256": change["runs_sha256"],
        "history": [*(former["history"] if former else ()), change],
    }
    layout.write_attributes(job.store, attributes)


def refuse_unused_labels(job: Job) -> None:
    """Refuse label tables that say more than the store has where a command finds no run to take, and so changes nothing.

    Raises:
        UsageError: they say more, or something else.
    """
    if subjects_of(job, (), ())["labels"] != read_subjects(job.store)["labels"]:
        raise UsageError(
            f"--labels: {job.store} has all runs already, and labels come with new runs only: nothing is changed; leave "
            "--labels out, or build another store"
        )


def subjects_of(job: Job, candidates: tuple[Candidate, ...], runs: tuple[Run, ...]) -> dict[str, Any]:
    """The file of ids: what it holds of runs that are present, and what is new.

    Raises:
        UsageError: labels that differ from the store's.
    """
    cohort, present = job.options.cohort, {run.subject for run in runs}
    subjects: dict[str, Any] = {}
    labels: list[LabelRow] = []
    if job.base is not None:
        content = read_subjects(job.store)
        present |= job.base.subjects
        subjects = {key: one for key, one in content["subjects"].items() if key in present}
        former = (one for one in content["labels"] if one["subject"] in present)
        labels = [
            LabelRow(one["subject"], one["session"], one["task"], one["run"], "", tuple(one["values"].items()))
            for one in former
        ]
    ids = {candidate.subject: candidate.source.subject for candidate in candidates}
    for run in runs:
        subjects.setdefault(run.subject, {"cohort": cohort, "id": ids[run.subject]})
    keyed = [replace(row, subject=subject_key(job.salt, cohort, row.subject), file="") for row in job.discovery.labels]
    try:
        merged = merge([*labels, *(row for row in keyed if row.subject in present)])
    except UsageError as error:
        raise UsageError(f"the labels differ from those in the store: {error}" if job.base else str(error)) from error
    return {
        "salt": job.salt,
        "subjects": {key: subjects[key] for key in sorted(subjects)},
        "labels": [{**dict(zip(_KEYS, row.name, strict=True)), "values": dict(row.values)} for row in merged],
    }
