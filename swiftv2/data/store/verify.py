"""Checking a store byte by byte: by one process, by several on one machine, or by the ranks of MPI."""

import bisect
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.storage import LocalStore

from swiftv2.data.ranks import Alone, Communicator, on_first, share, together
from swiftv2.data.statistics import run_statistics, voxel_statistics
from swiftv2.data.store import layout
from swiftv2.data.store.leftovers import folder_problems, index_problems, private_problems
from swiftv2.data.store.reader import Run, Store
from swiftv2.data.store.shards import ABSENT, ChunkError, read_shard_index
from swiftv2.errors import SwiftError, UsageError

_TOLERANCE = 1e-6
"""Relative difference of statistics computed again: other processors add in another order."""
_BYTES_PER_WORKER = 1 << 28
"""Starting a process costs about as long as checking this much."""
_ROUNDS = 64
"""How often all ranks tell each other how far they are."""

Progress = Callable[[int, int, int, int], None]
"""Takes runs done, runs in all, bytes done, bytes in all, of all workers or ranks together."""
Problem = tuple[str, str]


@dataclass(frozen=True)
class VerifyReport:
    """Outcome of a check.

    Attributes:
        runs: runs in the index, withdrawn ones included.
        bytes: of all bold shards of the runs that are present.
        bad: pseudonymous key of the run, or `store`; and what is wrong. `store` first, then by row.
        notes: what could not be checked by this user, and is no finding.
    """

    runs: int
    bytes: int
    bad: tuple[Problem, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.bad


class _Job(NamedTuple):
    """A piece of work: a run, or the rows of one shared shard that belong to no present run."""

    array: str
    """Empty for a run."""
    number: int
    """Place of the run in the index, or number of the shard."""
    size: int


class _Outcome(NamedTuple):
    job: _Job
    size: int
    problems: list[Problem]


def verify(
    store: str | Path, progress: Progress | None = None, *, workers: int | None = None, comm: Communicator | None = None
) -> VerifyReport:
    """Read every chunk of every array of a store, and its folder.

    Checked: checksums; shards that are missing, of another size than stated, or hold bytes that belong to no chunk; numbers
    that are not finite; statistics that do not fit the data; whatever is left of withdrawn runs; files that do not belong
    to the format; what an interrupted change left; files of ids that are open to others, are damaged, or do not fit the
    index (who may not read them is told so in `notes`, and finds nothing wrong with them). Memory of a worker: one run.

    Args:
        store: folder of the store.
        progress: called with how far all workers or ranks are; on rank 0 only.
        workers: spawned processes on this machine; None: one a core, but no more than pay for their start.
        comm: the ranks that check together, every one calling this; this process alone when None.

    Returns:
        The report, the same on all ranks and for any number of workers.

    Raises:
        SwiftError: no store, an unfinished one, or an index that does not match its checksum.
    """
    ranks = comm or Alone()
    if workers is not None and (workers < 1 or (ranks.size > 1 and workers > 1)):
        raise UsageError("--workers takes a number of processes on one machine, 1 or more; ranks of MPI share by themselves")
    opened = together(ranks, lambda: Store.open(store))
    jobs = together(ranks, lambda: _jobs(opened))
    if ranks.size > 1:
        outcomes = _by_ranks(opened, jobs, ranks, progress)
    else:
        count = min(workers or _worth(jobs), len(jobs))
        outcomes = _by_workers(opened, jobs, count, progress) if count > 1 else _alone(opened, jobs, progress)
    return on_first(ranks, lambda: _report(opened, outcomes))


def _report(store: Store, outcomes: Sequence[_Outcome]) -> VerifyReport:
    bad = [*(("store", problem) for problem in _whole_store(store)), *folder_problems(store)]
    private, notes = private_problems(store)
    bad += private
    bad += [(run.key, problem) for run in store.runs for problem in index_problems(run, store.version)]
    bad += [problem for outcome in outcomes for problem in outcome.problems]
    order = {"store": -1} | {run.key: run.row for run in store.runs}
    unique = sorted(dict.fromkeys(bad), key=lambda problem: (order[problem[0]], *problem))
    return VerifyReport(len(store.runs), sum(outcome.size for outcome in outcomes), tuple(unique), tuple(notes))


def _jobs(store: Store) -> list[_Job]:
    """All pieces of work, the largest first."""
    jobs = [_Job("", index, run.bytes) for index, run in enumerate(store.runs) if run.present]
    for small in layout.SMALL_ARRAYS:
        rows = int(_open(store, small.name).shape[0])
        jobs += [_Job(small.name, shard, 0) for shard in range(-(-rows // layout.rows_of_shard(store.path / small.name)))]
    return sorted(jobs, key=lambda job: (-job.size, job.array, job.number))


def _worth(jobs: Sequence[_Job]) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, sum(job.size for job in jobs) // _BYTES_PER_WORKER))


class _Meter:
    """Adds up what is done for the callback."""

    def __init__(self, jobs: Sequence[_Job], progress: Progress | None) -> None:
        self._runs, self._bytes = sum(not job.array for job in jobs), sum(job.size for job in jobs)
        self._done, self._size, self._progress = 0, 0, progress

    def add(self, outcomes: Sequence[_Outcome]) -> None:
        """Count pieces that were done."""
        self._done += sum(not one.job.array for one in outcomes)
        self._size += sum(one.job.size for one in outcomes)
        if self._progress is not None:
            self._progress(self._done, self._runs, self._size, self._bytes)


def _alone(store: Store, jobs: Sequence[_Job], progress: Progress | None) -> list[_Outcome]:
    meter, outcomes = _Meter(jobs, progress), []
    for job in jobs:
        outcomes.append(_check(store, job))
        meter.add(outcomes[-1:])
    return outcomes


def _by_ranks(store: Store, jobs: Sequence[_Job], ranks: Communicator, progress: Progress | None) -> list[_Outcome]:
    """Outcomes of all ranks, on rank 0: jobs are dealt, largest first, to the rank with the least so far."""
    mine = [jobs[place] for place in share([job.size + 1 for job in jobs], ranks)]
    meter, outcomes = _Meter(jobs, progress), []
    longest: int = ranks.bcast(max(ranks.gather(len(mine)) or [0]))
    step = max(1, -(-longest // _ROUNDS))
    for first in range(0, longest, step):
        gathered = ranks.gather([_check(store, job) for job in mine[first : first + step]])
        if gathered is not None:
            new = [one for part in gathered for one in part]
            meter.add(new)
            outcomes += new
    return outcomes


_opened: dict[str, Store] = {}
"""The store of a worker."""


def _by_workers(store: Store, jobs: Sequence[_Job], workers: int, progress: Progress | None) -> list[_Outcome]:
    meter, outcomes = _Meter(jobs, progress), []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(str(store.path),)) as pool:
        try:
            for future in as_completed([pool.submit(_check_in_worker, job) for job in jobs]):
                outcomes.append(future.result())
                meter.add(outcomes[-1:])
        except BrokenProcessPool as error:
            raise SwiftError(f"store {store.path}: a worker was killed (no memory?): try fewer --workers") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return outcomes


def _begin_worker(path: str) -> None:
    """Open the store, leave Ctrl-C to the parent, and end when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_after, args=(parent.sentinel,), daemon=True).start()
    _opened[path] = Store.open(path)


def _leave_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _check_in_worker(job: _Job) -> _Outcome:
    (store,) = _opened.values()
    return _check(store, job)


def _check(store: Store, job: _Job) -> _Outcome:
    """Do one piece of work; never raises, since the others go on, and other ranks wait."""
    key = f"{job.array} " if job.array else store.runs[job.number].key
    try:
        if job.array:
            return _Outcome(job, 0, _check_shared(store, job))
        run = store.runs[job.number]
        size = sum(path.stat().st_size for path in layout.bold_shards(store.path, run.dtype, run.row))
        return _Outcome(job, size, [(run.key, problem) for problem in _check_run(store, job.number)])
    except Exception as error:  # noqa: BLE001  # Whatever a damaged store provokes is a finding about it.
        what = f"shard {job.number} of {job.array}" if job.array else "it"
        return _Outcome(job, 0, [("store" if job.array else key, f"{what} cannot be checked ({type(error).__name__})")])


def _open(store: Store, name: str) -> Any:
    """An array by zarr-python: what the store's own reader leaves out is read too, and by another reader."""
    return zarr.open_array(LocalStore(store.path / name, read_only=True), mode="r")


def _whole_store(store: Store) -> Iterator[str]:
    rows = [run.row for run in store.runs]
    if rows != sorted(set(rows)):
        yield "rows of the index are not ascending or not unique"
    if len({run.key for run in store.runs}) != len(store.runs):
        yield "run keys are not unique"
    voxels = store.voxels
    if not len(voxels) or (np.diff(voxels) <= 0).any() or voxels[0] < 0 or voxels[-1] >= store.grid.size:
        yield "voxels are not ascending or not in the grid"


def _check_shared(store: Store, job: _Job) -> list[Problem]:
    """One shard of a small array: its bytes, and that rows without a present run are empty."""
    small = next(small for small in layout.SMALL_ARRAYS if small.name == job.array)
    array, width = _open(store, small.name), layout.rows_of_shard(store.path / small.name)
    first, last = job.number * width, min((job.number + 1) * width, int(array.shape[0]))
    begin, end = (bisect.bisect_left(store.runs, row, key=lambda run: run.row) for row in (first, last))
    runs = {run.row: run for run in store.runs[begin:end]}
    paths = sorted((store.path / small.name).glob(f"c.{job.number}.*"))
    if not paths:
        return []
    problems = [("store", f"{small.name}/{path.name} {what}") for path in paths for what in _shard_problems(path, last - first)]
    for row in range(first, last):
        run = runs.get(row)
        if run is not None and run.present:
            continue
        try:
            empty = np.array_equal(
                array[row], np.full(array.shape[1], small.fill, small.dtype), equal_nan=small.dtype != "bool"
            )
        except Exception as error:  # noqa: BLE001  # zarr-python raises what its codecs raise.
            problems.append((run.key if run else "store", f"row {row} of {small.name} cannot be read ({type(error).__name__})"))
            continue
        if not empty and run is not None:
            problems.append((run.key, _withdrawn(f"its row of {small.name}")))
        elif not empty:
            problems.append(("store", f"row {row} of {small.name} belongs to no run and is not empty"))
    return problems


def _shard_problems(path: Path, rows: int) -> Iterator[str]:
    """What one file of a small array, which holds so many rows, shows before its rows are decoded."""
    try:
        places, loose = _places(path, layout.rows_of_shard(path.parent))
    except ChunkError:
        yield "is damaged (its index): restore it from a copy"
        return
    if loose:
        yield "holds bytes that belong to no row"
    if any(offset != ABSENT for offset, _ in places[rows:]):
        yield "holds rows beyond the last one"


def _withdrawn(what: str) -> str:
    return f"withdrawn, but its data are there ({what}): give `swiftv2 store drop` again"


def _check_run(store: Store, index: int) -> list[str]:
    run = store.runs[index]
    try:
        bold = store.read_bold(index, 0, run.frames)
    except SwiftError:
        return _bad_frames(store, index)
    problems = _check_shards(store, run)
    rows: dict[str, Any] = {}
    for small in layout.SMALL_ARRAYS:
        try:
            rows[small.name] = _small_row(store, small.name, index)
        except SwiftError:
            number = run.row // layout.rows_of_shard(store.path / small.name)
            problems.append(f"its row of {small.name} is damaged: restore {small.name}/c.{number}.*")
    if len(rows) < len(layout.SMALL_ARRAYS):
        return problems
    if bold.dtype.kind == "f" and not np.isfinite(bold).all():
        return [*problems, "its frames hold NaN or infinity"]
    return problems + _check_numbers(run, bold, rows)


def _small_row(store: Store, name: str, index: int) -> Any:
    if name == "brain":
        return store.brain(index)
    if name in ("voxel_mean", "voxel_std"):
        return store.voxel_mean(index) if name == "voxel_mean" else store.voxel_std(index)
    return store.frame_values(name, index)


def _check_shards(store: Store, run: Run) -> list[str]:
    """What the files of a run show before they are decoded."""
    array = _open(store, f"bold/{run.dtype}")
    length, chunk = int(array.shards[1]), int(array.chunks[1])
    problems, size = [], 0
    for path in layout.bold_shards(store.path, run.dtype, run.row):
        number = int(path.name.split(".")[2])
        size += path.stat().st_size
        try:
            places, loose = _places(path, length // chunk)
        except ChunkError:
            problems.append("the index of one of its shards is damaged: restore it from a copy")
            continue
        used = max(0, -(-(min(run.frames, (number + 1) * length) - number * length) // chunk))
        if any(offset != ABSENT for offset, _ in places[used:]):
            problems.append("its shards hold chunks beyond its last frame")
        if loose:
            problems.append("its shards hold bytes that belong to no chunk")
    if size != run.bytes:
        problems.append("its shards have another size than the index states")
    return problems


def _places(path: Path, chunks: int) -> tuple[list[tuple[int, int]], bool]:
    """Where the chunks of a shard file lie, and whether it holds other bytes than these, one after another, and its index.

    Raises:
        ChunkError: its index is damaged.
    """
    with path.open("rb") as stream:
        size = path.stat().st_size
        places = read_shard_index(stream.fileno(), size, chunks)
    there = sorted(place for place in places if place[0] != ABSENT)
    ends = [offset + length for offset, length in there]
    return places, [*(offset for offset, _ in there), size - 16 * chunks - 4] != [0, *ends]


def _bad_frames(store: Store, index: int) -> list[str]:
    """Which frames of a damaged run cannot be read; the reader's words are not repeated: they may hold bytes of the file."""
    run = store.runs[index]
    array = _open(store, f"bold/{run.dtype}")
    length, chunk = int(array.shards[1]), int(array.chunks[1])
    spans: dict[str, list[list[int]]] = {"their file is missing": [], "they fail their checksum or are cut off": []}
    for first in range(0, run.frames, chunk):
        last = min(first + chunk, run.frames) - 1
        there = (store.path / "bold" / run.dtype / f"c.{run.row}.{first // length}.0").is_file()
        try:
            store.read_bold(index, first, last + 1 - first)
        except SwiftError:
            found = list(spans.values())[int(there)]
            if found and found[-1][1] == first - 1:
                found[-1][1] = last
            else:
                found.append([first, last])
    if not any(spans.values()):
        return ["reading it whole failed, but no frame of it alone: check again, the file system may be at fault"]
    return [
        f"frames {', '.join(f'{first} to {last}' for first, last in found)} cannot be read, {why}: "
        f"restore bold/{run.dtype}/c.{run.row}.* from a copy, or build again"
        for why, found in spans.items()
        if found
    ]


def _check_numbers(run: Run, bold: Any, rows: dict[str, Any]) -> list[str]:
    brain, problems = rows["brain"], []
    if int(brain.sum()) != run.brain_voxels or not brain.any():
        return ["its brain mask has another size than the index states"]
    statistics = run_statistics(bold[run.steady_from :], brain, run.slope, run.intercept)
    scale = abs(run.slope) + max(abs(value) for value in run.statistics)
    if not np.allclose(statistics.as_tuple(), run.statistics, rtol=_TOLERANCE, atol=_TOLERANCE * scale):
        problems.append("its statistics do not fit its frames")
    again = voxel_statistics(bold[run.steady_from :], brain, run.slope, run.intercept)
    stored = (rows["voxel_mean"], rows["voxel_std"])
    if not all(np.allclose(a, b, rtol=1e-5, atol=_TOLERANCE * scale) for a, b in zip(again, stored, strict=True)):
        problems.append("its voxel statistics do not fit its frames")
    displacement = rows["framewise_displacement"]
    if displacement is not None and (displacement < 0).any():
        problems.append("its framewise displacement is negative")
    # Flags are known for all frames of a run or for none: an unknown one is the trace of a lost file.
    flags = [
        name for name in ("censored", "non_steady_state") if rows[name] is not None and not np.isin(rows[name], (0, 1)).all()
    ]
    return problems + [f"its {name} flags are neither 0 nor 1: restore the files of {name}" for name in flags]
