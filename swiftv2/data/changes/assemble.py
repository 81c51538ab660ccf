"""Taking runs into a store, new or not: by one process or by many ranks, killed and started again at will.

A build is an append to nothing. Every run has its own shards, written once by the rank that reads the run. What the runs
share (small arrays, index, ids) is left in a staging folder and put together at the end, each shared shard by one rank.
The group's metadata come last: until then readers see the version before.
"""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from swiftv2.data.changes.plan import Inspected, Inspector, Plan, Refused, make_plan, reasons
from swiftv2.data.changes.publish import BuildReport, Job, commit, report_of, subjects_of, write_report
from swiftv2.data.changes.tally import Progress, Tally
from swiftv2.data.changes.versions import (
    alone_in,
    changed,
    check_unchanged,
    make_staging,
    remove_former,
    remove_staging,
    settle,
)
from swiftv2.data.ingest.nifti import RefusedError
from swiftv2.data.ingest.run import Candidate, Taken, stage, stage_refusal, take_run
from swiftv2.data.ranks import Communicator, each, on_first, share, together
from swiftv2.data.store import layout
from swiftv2.data.store.reader import Run, Store
from swiftv2.errors import DamagedError, SwiftError, UsageError
from swiftv2.files import read_json, sync, write_file


def take(job: Job, ranks: Communicator, progress: Callable[[Progress], None] | None) -> BuildReport:
    """Take runs into a store, or go on with taking them; the result does not depend on ranks or interruptions.

    Raises:
        UsageError: mixed spaces, contradicting labels, or a folder that holds something else.
        SwiftError: no run can be taken, a refusal where the job is strict, or a failure to write.
    """
    inspector = Inspector(job.options, job.salt, job.base)
    inspected = each(ranks, job.discovery.sources, inspector.inspect)
    with contextlib.ExitStack() as held:
        plan = on_first(ranks, lambda: _plan(job, inspected))
        if not plan.candidates:
            return on_first(ranks, lambda: job.guarded(lambda: _no_candidate(job, plan)))
        done = on_first(ranks, lambda: job.guarded(lambda: _begin(job, plan, held)))
        _work(job, plan, ranks, done, progress)
        entries = each(ranks, plan.candidates, lambda candidate: _read_entry(job, candidate))
        runs, refused = on_first(ranks, lambda: job.guarded(lambda: _collect(job, plan, entries)))
        if not runs:
            return on_first(ranks, lambda: job.guarded(lambda: _give_up(job, plan, refused)))
        together(ranks, lambda: job.guarded(lambda: _assemble(job, plan, runs, ranks)))
        on_first(ranks, lambda: job.guarded(lambda: commit(job, plan, runs, refused)))
        together(ranks, lambda: job.guarded(lambda: _clear(job, plan.candidates[ranks.rank :: ranks.size])))
        on_first(ranks, lambda: job.guarded(lambda: remove_former(job.store, layout.STAGING)))
    return report_of(job.store, plan.version, runs, _named(refused), plan.present)


def _named(refused: Iterable[Refused]) -> tuple[tuple[str, str], ...]:
    return tuple((one.key, one.reason) for one in refused)


def _plan(job: Job, inspected: list[Inspected]) -> Plan:
    plan = make_plan(job.discovery, inspected, job.options, job.salt, job.base)
    if job.base is not None:
        subjects_of(job, plan.candidates, ())  # Labels that contradict the store's stop it before anything is written.
    return plan


def _no_candidate(job: Job, plan: Plan) -> BuildReport:
    if layout.unfinished(job.store) is None:
        make_staging(job.store, layout.STAGING)
        with alone_in(job.store, layout.STAGING):
            _check_current(job)
            write_report(job, plan, [], list(plan.refused))
            remove_staging(job.store, layout.STAGING)
    return _nothing(job, plan, plan.refused)


def _nothing(job: Job, plan: Plan, refused: tuple[Refused, ...]) -> BuildReport:
    """The report of an append that takes nothing: the store stays the version it is."""
    if job.strict and refused:
        raise SwiftError(_strictly(job, refused, len(refused) + plan.present))
    return report_of(job.store, plan.version - 1, (), _named(refused), plan.present, nothing_to_do=True)


def _give_up(job: Job, plan: Plan, refused: tuple[Refused, ...]) -> BuildReport:
    """Take back what an append prepared that then found no run good."""
    settle(job.store)
    remove_staging(job.store, layout.STAGING)
    return _nothing(job, plan, refused)


def _begin(job: Job, plan: Plan, held: contextlib.ExitStack) -> tuple[set[int], set[int]]:
    """Make the staging folder and the arrays, or check that what is unfinished there is the same.

    Returns:
        Rows that are done already, and rows whose runs were taken or are being written.
    """
    times = [candidate.source.path.stat().st_mtime_ns for candidate in plan.candidates]
    state = {
        "version": plan.version,
        "salt": plan.salt,
        "digest": plan.digest,
        "times": hashlib.sha256(json.dumps(times).encode()).hexdigest(),
    }
    kept = job.staging / layout.PLAN_FILE
    if not kept.is_file():
        if job.base is None:
            _check_new(job.store)
        make_staging(job.store, layout.STAGING)
    held.enter_context(alone_in(job.store, layout.STAGING))
    _check_current(job)
    if not kept.is_file():
        _clear_staging(job)
        if job.base is not None:
            settle(job.store)  # An append that was given up may have left something.
        write_file(kept, json.dumps(state), layout.PRIVATE)
    elif read_json(kept) != state:
        raise UsageError(_other(job))
    for stale in job.store.rglob("*.partial"):
        stale.unlink()
    for folder in (job.rows, job.small, job.staging / "ranks"):
        folder.mkdir(exist_ok=True)
    for counts in (job.staging / "ranks").iterdir():
        counts.unlink()
    made = job.staging / "arrays"
    if not made.is_file():
        _make_arrays(job, plan)
        write_file(made, "")
    done, taken = ({int(path.stem) for path in job.rows.glob(f"*.{suffix}")} for suffix in ("json", "npz"))
    return done, taken


def _other(job: Job) -> str:
    if job.base is None:
        return f"{job.store} is an unfinished store of other files or options: remove it or give another folder"
    return (
        f"{job.store}: an append of other files or options is unfinished: give that one again, or give it up by removing "
        f"{job.staging}"
    )


def _check_new(store: Path) -> None:
    if store.exists() and (not store.is_dir() or any(path.name != layout.STAGING for path in store.iterdir())):
        raise UsageError(f"{store} exists and is no store: give a new folder")


def _check_current(job: Job) -> None:
    """See under the lock that no other change is at work or came between reading the store and this.

    Both kinds of change make their folder first and then look for the other's: at least one of two sees the other.

    Raises:
        SwiftError: there is one; nothing is left of this change but what an attempt before it had left.
    """
    try:
        _see_no_other(job)
    except SwiftError:
        if not (job.staging / layout.PLAN_FILE).is_file():
            remove_staging(job.store, layout.STAGING)
        raise


def _see_no_other(job: Job) -> None:
    if (job.store / layout.DROPPING).is_dir():
        raise SwiftError(f"{job.store} is being changed by another process: let it end, or stop it first")
    if job.base is not None:
        check_unchanged(job.base)
    elif layout.is_complete(job.store):
        raise changed(job.store)


def _clear_staging(job: Job) -> None:
    for path in job.staging.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _make_arrays(job: Job, plan: Plan) -> None:
    """Write the metadata of the bold arrays, of every type since any run may need any; and the kept voxels."""
    base, codec = job.base, job.options.compression
    shape = (plan.rows, plan.frames, len(plan.voxels))
    chunk = layout.CHUNK_FRAMES if base is None else int(base.attributes["options"]["chunk_frames"])
    if base is None:
        layout.create_folder(job.store, "bold")
        layout.create_voxels(job.store, plan.voxels, codec)
    for dtype in layout.BOLD_TYPES:
        if base is not None and dtype in base.dtypes:
            layout.set_shape(job.store / "bold" / dtype, shape)
        else:
            layout.create_bold(job.store, dtype, shape, codec, chunk)
            sync(job.store / "bold" / dtype / "zarr.json")


def _work(
    job: Job,
    plan: Plan,
    ranks: Communicator,
    before: tuple[set[int], set[int]],
    progress: Callable[[Progress], None] | None,
) -> None:
    """Take this rank's share of the runs that are not done: dealt largest first to the rank with the least so far."""
    (done, taken), early = before, len(plan.refused)
    sizes = {candidate.row: candidate.source.size for candidate in plan.candidates}
    state = Progress(
        done=len(done) + early,
        total=len(sizes) + early,
        refused=len(done - taken) + early,
        bytes_done=sum(sizes[row] for row in done),
        bytes_total=sum(sizes.values()),
    )
    left = [candidate for candidate in plan.candidates if candidate.row not in done]
    mine = share([candidate.source.size for candidate in left], ranks)
    with Tally(job.staging / "ranks", ranks, state, progress) as tally:

        def work() -> None:
            for number in mine:
                refused = _take_one(job, plan, left[number])
                tally.add(left[number].source.size, refused=refused)

        together(ranks, work)
    tally.finish()


def _take_one(job: Job, plan: Plan, candidate: Candidate) -> bool:
    """Read a run and write its shards and what it leaves for the end; tells whether it was refused."""
    options = job.options
    try:
        taken = take_run(
            candidate,
            plan.grid,
            plan.voxels,
            resample=options.grid.resample,
            keep_float=options.keep_float,
            clean=options.clean,
        )
    except RefusedError as refusal:
        reason = str(refusal)
        job.guarded(lambda: stage_refusal(job.rows, candidate.row, reason))
        return True
    job.guarded(lambda: _write(job, taken))
    return False


def _write(job: Job, taken: Taken) -> None:
    written = layout.write_bold(job.store, taken.run.dtype, taken.run.row, taken.bold)
    stage(job.rows, taken, written)


def _read_entry(job: Job, candidate: Candidate) -> dict[str, Any]:
    """What a run left: its index line, or why it was refused."""
    entry: dict[str, Any] = json.loads((job.rows / f"{candidate.row}.json").read_text(encoding="utf-8"))
    return entry


def _collect(job: Job, plan: Plan, entries: list[dict[str, Any]]) -> tuple[tuple[Run, ...], tuple[Refused, ...]]:
    """Sort what all ranks left, write the report, and prepare the small arrays."""
    runs, refused = [], list(plan.refused)
    for candidate, entry in zip(plan.candidates, entries, strict=True):
        if "taken" in entry:
            runs.append(replace(Run.from_json(entry["taken"]), since=plan.version))
        else:
            refused.append(Refused(candidate.key, candidate.subject, candidate.source.relative, entry["refused"]))
    refused.sort(key=lambda one: (one.file, one.key))
    if not runs and job.base is None:
        shutil.rmtree(job.store)
        raise SwiftError(f"no run can be taken: {reasons([one.reason for one in refused])}")
    write_report(job, plan, runs, refused)
    if job.strict and refused:
        raise SwiftError(_strictly(job, refused, len(runs) + len(refused) + plan.present))
    if runs:
        _stage_small(job, plan)
        dtypes = {run.dtype for run in runs} | (job.base.dtypes if job.base is not None else frozenset())
        for dtype in set(layout.BOLD_TYPES) - dtypes:
            shutil.rmtree(job.store / "bold" / dtype, ignore_errors=True)
    return tuple(runs), tuple(refused)


def _strictly(job: Job, refused: Iterable[Refused], total: int) -> str:
    texts = [one.reason for one in refused]
    what = job.store if job.base is None else job.staging
    return (
        f"{len(texts)} of {total} runs are refused: {reasons(texts)}; {job.store / layout.REPORT_FILE} names the files; "
        f"remove {what} after mending them, or {job.command} without strict"
    )


def _stage_small(job: Job, plan: Plan) -> None:
    """Write the metadata of the small arrays, in the staging folder and in their places."""
    shutil.rmtree(job.small)
    job.small.mkdir()
    for small in layout.SMALL_ARRAYS:
        shape = (plan.rows, len(plan.voxels) if small.axis == "voxel" else plan.frames)
        staged, place = job.small / small.name, job.store / small.name
        if job.base is None:
            layout.create_small(job.small, small, shape, shape[1], job.options.compression)
            place.mkdir(exist_ok=True)
        else:
            staged.mkdir()
            shutil.copy(place / "zarr.json", staged / "zarr.json")
            layout.set_shape(staged, shape)
        write_file(place / "zarr.json", (staged / "zarr.json").read_bytes())
        # Whole shards are written without a copy of their rows.
        width = layout.rows_of_shard(staged)
        layout.set_shape(staged, (-(-plan.rows // width) * width, shape[1]))


def _assemble(job: Job, plan: Plan, runs: tuple[Run, ...], ranks: Communicator) -> None:
    """Write the shared shards of the small arrays, each by one rank, one array and one shard at a time.

    The first of them may hold runs of the former version: their rows are written again with the new ones beside them.
    """
    new, old = {run.row: run for run in runs}, _OldRows(job)
    width = layout.rows_of_shard(job.small / layout.SMALL_ARRAYS[0].name)
    for shard in range(plan.first // width + ranks.rank, -(-plan.rows // width), ranks.size):
        first = shard * width
        for small in layout.SMALL_ARRAYS:
            kept = ((row, content) for row in range(first, plan.first) if (content := old.read(small.name, row)) is not None)
            staged = (
                (row, content) for row in range(first, first + width) if row in new for content in _staged(job, row, small)
            )
            layout.write_rows(job.small, job.store, small, first, itertools.chain(kept, staged))


def _staged(job: Job, row: int, small: layout.Small) -> list[layout.AnyArray]:
    with np.load(job.rows / f"{row}.npz") as content:
        return [content[small.name]] if small.name in content else []


class _OldRows:
    """Rows of the former version's runs, none of them taken for empty because its file is not there."""

    def __init__(self, job: Job) -> None:
        self._store = Store.open(job.store) if job.base is not None else None
        runs = () if self._store is None else self._store.runs
        self._places = {run.row: place for place, run in enumerate(runs) if run.present}

    def read(self, name: str, row: int) -> layout.AnyArray | None:
        """A row of a small array; None where the run has nothing there.

        Raises:
            DamagedError: it cannot be read, or is not there though the run has it.
        """
        place = self._places.get(row)
        if self._store is None or place is None:
            return None
        try:
            if name in ("framewise_displacement", "censored", "non_steady_state"):
                return self._store.frame_values(name, place)
            read = {"brain": self._store.brain, "voxel_mean": self._store.voxel_mean, "voxel_std": self._store.voxel_std}
            return read[name](place)
        except DamagedError as error:
            raise DamagedError(
                f"store {self._store.path}: row {row} of {name} cannot be read or is lost: restore {name} from a copy, then "
                "append again; `swiftv2 store verify` lists all that is damaged"
            ) from error


def _clear(job: Job, candidates: tuple[Candidate, ...]) -> None:
    """Remove this rank's share of what the runs left."""
    for candidate in candidates:
        for suffix in ("json", "npz"):
            with contextlib.suppress(FileNotFoundError):
                (job.rows / f"{candidate.row}.{suffix}").unlink()
