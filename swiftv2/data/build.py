"""Building a store from NIfTI files: by one process or by many ranks, killed and started again at will.

Every run has its own shards, written once by the rank that reads the run. What the runs share (small arrays, index) is
left in a staging folder and put together at the end, each shared shard by one rank. The group's metadata come last.
"""

import contextlib
import errno
import fcntl
import hashlib
import heapq
import hmac
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from swiftv2 import __version__
from swiftv2.config.clean import CleanConfig
from swiftv2.config.data import GridConfig
from swiftv2.data import layout
from swiftv2.data.discover import discover
from swiftv2.data.ingest import Candidate, Taken, stage, stage_refusal, take_run
from swiftv2.data.keys import salt_id, subject_key
from swiftv2.data.nifti import RefusedError
from swiftv2.data.plan_build import Options, Plan, Refused, choose_salt, inspect, make_plan, reasons, source_digest
from swiftv2.data.ranks import Alone, Communicator
from swiftv2.data.store import Run, Store
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import write_file

Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """How far all ranks together are: runs done, runs in all, runs refused, source bytes read and in all."""

    done: int
    total: int
    refused: int
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        taken: runs in the store.
        refused: pseudonymous key and reason of every run that was not taken.
        frames: volumes of all runs.
        bytes: of the bold shards.
        report: the file that names every source file with its key and reason; mode 0600, since names tell subjects.
        nothing_to_do: whether the store was there already, from the same files and options.
    """

    taken: int
    refused: tuple[tuple[str, str], ...]
    frames: int
    bytes: int
    report: Path
    nothing_to_do: bool = False


def build(
    source: str | Path,
    store: Path,
    grid: GridConfig,
    cohort: str,
    *,
    labels: Path | None = None,
    comm: Communicator | None = None,
    progress: Callable[[Progress], None] | None = None,
    expect_tr: float | None = None,
    keep_float: bool = False,
    salt: str | None = None,
    strict: bool = False,
    compression: layout.Compression = "lz4",
    clean: CleanConfig = CleanConfig(),
) -> BuildReport:
    """Build a store, or go on with a build that was interrupted; the result does not depend on ranks or interruptions.

    Args:
        source: a BIDS-derivatives folder or a glob of NIfTI files.
        store: folder of the store; new, unfinished, or complete from the same source (then nothing is done).
        grid: the window in world coordinates.
        cohort: name of the cohort.
        labels: TSV or CSV label table; a folder's participants.tsv when None.
        comm: the ranks that build together; this process alone when None.
        progress: called on rank 0 after each of its runs.
        expect_tr: repetition time in seconds that every run must have.
        keep_float: whether runs that are no integers stay float32 rather than being scaled to 16 bits.
        salt: salt of the pseudonymous keys; random when None. One salt makes the keys of several stores comparable.
        strict: whether any refusal is an error (the finished runs are kept for the next attempt).
        compression: codec of the arrays.
        clean: how time courses are cleaned; untouched by default.

    Raises:
        UsageError: nothing found, mixed spaces, or a destination that holds something else.
        SwiftError: no run can be taken, a refusal under `strict`, or a failure to write.
    """
    ranks = comm or Alone()
    options = Options(grid, cohort, expect_tr, keep_float, compression, clean)
    discovery = _on_first(ranks, lambda: discover(source, labels))
    chosen = _on_first(ranks, lambda: choose_salt(store, salt))
    digest = source_digest(discovery.sources, options, chosen)
    known = _on_first(ranks, lambda: _already_built(store, digest))
    if known is not None:
        return known
    mine = _together(ranks, lambda: [inspect(one, options) for one in discovery.sources[ranks.rank :: ranks.size]])
    parts = ranks.gather(mine)
    writing = _writing(store)
    with contextlib.ExitStack() as held:
        plan = _on_first(ranks, lambda: make_plan(discovery, _interleave(parts or []), options, chosen))
        _on_first(ranks, writing(lambda: _begin(store, plan, options, held)))
        _together(ranks, lambda: _work(store, plan, options, ranks, progress))
        runs, refused = _on_first(ranks, writing(lambda: _collect(store, plan, options, strict=strict)))
        _together(ranks, writing(lambda: _assemble(store, runs, len(plan.candidates), ranks)))
        return _on_first(ranks, writing(lambda: _finish(store, plan, runs, refused)))


def _together(ranks: Communicator, action: Callable[[], Result]) -> Result:
    """Do something on every rank; where one fails, all raise, so that none is left waiting."""
    result: Result | None = None
    failure: tuple[type[SwiftError], str] | None = None
    try:
        result = action()
    except SwiftError as error:
        failure = type(error), str(error)
    except Exception as error:
        if ranks.size == 1:
            raise
        failure = SwiftError, f"rank {ranks.rank} failed: {type(error).__name__}: {error}"
    failures = ranks.gather(failure)
    first = ranks.bcast(next((one for one in failures or [] if one is not None), None))
    if first is not None:
        kind, message = first
        raise kind(message)
    return result  # type: ignore[return-value]  # No failure means that the action returned.


@contextlib.contextmanager
def _writing(store: Path) -> Iterator[None]:
    """Make a failure to write an error that names the place (a context, or what wraps an action)."""
    try:
        yield
    except OSError as error:
        place = error.filename or f"store {store} cannot be written"
        reason = error.strerror or type(error).__name__
        raise SwiftError(f"{place}: {reason}; mend that and build again, it goes on") from error


def _on_first(ranks: Communicator, action: Callable[[], Result]) -> Result:
    """Do something on rank 0 and hand its result to all."""
    result: Result = ranks.bcast(_together(ranks, lambda: action() if ranks.rank == 0 else None))
    return result


def _interleave(parts: list[list[Any]]) -> list[Any]:
    """Undo `sources[rank::size]`."""
    merged = [None] * sum(len(part) for part in parts)
    for rank, part in enumerate(parts):
        merged[rank :: len(parts)] = part
    return merged


def _already_built(store: Path, digest: str) -> BuildReport | None:
    if not layout.is_complete(store):
        return None
    if layout.read_attributes(store).get("sources") != digest:
        raise UsageError(f"{store} holds a store of other files or options: give another folder, or remove it first")
    shutil.rmtree(store / layout.STAGING, ignore_errors=True)
    report = store / layout.REPORT_FILE  # The owner may have removed it, since it names subjects.
    lines = report.read_text(encoding="utf-8").splitlines() if report.is_file() else []
    entries = [json.loads(line) for line in lines]
    refused = tuple((entry["run"], entry["reason"]) for entry in entries if entry["status"] == "refused")
    return _report(store, Store.open(store).runs, refused, nothing_to_do=True)


def _report(
    store: Path, runs: tuple[Run, ...], refused: tuple[tuple[str, str], ...], *, nothing_to_do: bool = False
) -> BuildReport:
    frames, size = sum(run.frames for run in runs), sum(run.bytes for run in runs)
    return BuildReport(len(runs), refused, frames, size, store / layout.REPORT_FILE, nothing_to_do)


def _rows_folder(store: Path) -> Path:
    return store / layout.STAGING / "rows"


def _begin(store: Path, plan: Plan, options: Options, held: contextlib.ExitStack) -> None:
    """Make the folder with its staging folder and empty arrays, or check that the unfinished build there is the same."""
    times = [candidate.source.path.stat().st_mtime_ns for candidate in plan.candidates]
    state = {"salt": plan.salt, "digest": plan.digest, "times": hashlib.sha256(json.dumps(times).encode()).hexdigest()}
    kept = store / layout.STAGING / "plan.json"
    if not kept.is_file():
        _claim(store)
    held.enter_context(_alone_in(store))
    if not kept.is_file():
        write_file(kept, json.dumps(state).encode(), layout.PRIVATE)
    elif json.loads(kept.read_text(encoding="utf-8")) != state:
        raise UsageError(f"{store} is an unfinished store of other files or options: remove it or give another folder")
    for stale in store.rglob("*.partial"):
        stale.unlink()
    voxels = len(plan.voxels)
    zarr_made = store / layout.STAGING / "arrays"
    if not zarr_made.is_file():
        layout.create_folder(store, "bold")
        for dtype in layout.BOLD_TYPES:
            layout.create_bold(store, dtype, len(plan.candidates), plan.longest, voxels, options.compression)
        layout.create_voxels(store, plan.voxels, options.compression)
        write_file(zarr_made, b"")


@contextlib.contextmanager
def _alone_in(store: Path) -> Iterator[None]:
    """Keep other builds out of the folder; file systems without locks leave that to the user."""
    descriptor = os.open(store / layout.STAGING / "lock", os.O_RDWR | os.O_CREAT, layout.PRIVATE)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SwiftError(f"{store} is being built by another process: let it end, or stop it first") from error
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
                raise
        yield
    finally:
        os.close(descriptor)


def _claim(store: Path) -> None:
    started = store / layout.STAGING
    if store.exists() and (not store.is_dir() or any(path != started for path in store.iterdir())):
        raise UsageError(f"{store} exists and is no store: give a new folder")
    try:
        _rows_folder(store).mkdir(parents=True, exist_ok=True)
        started.chmod(0o700)
    except OSError as error:
        raise SwiftError(f"{store} cannot be made ({error.strerror}): choose a folder you may write to") from error


def _work(store: Path, plan: Plan, options: Options, ranks: Communicator, progress: Callable[[Progress], None] | None) -> None:
    """Take this rank's share of the runs that are not done: dealt largest first to the rank with the least so far."""
    staged = _rows_folder(store)
    for candidate in _share(_on_first(ranks, lambda: _left(staged, plan)), ranks):
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
            with _writing(store):
                stage_refusal(staged, candidate.row, str(refusal))
        else:
            _write(store, taken)
        if progress is not None and ranks.rank == 0:
            progress(_progress(staged, plan))


def _write(store: Path, taken: Taken) -> None:
    with _writing(store):
        written = layout.write_bold(store, taken.run.dtype, taken.run.row, taken.bold)
        stage(_rows_folder(store), taken, written)


def _left(staged: Path, plan: Plan) -> list[Candidate]:
    done = _done(staged)
    return [candidate for candidate in plan.candidates if candidate.row not in done]


def _share(left: list[Candidate], ranks: Communicator) -> list[Candidate]:
    loads = [(0, rank) for rank in range(ranks.size)]
    mine = []
    for candidate in sorted(left, key=lambda one: (-one.source.size, one.row)):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + candidate.source.size, rank))
        if rank == ranks.rank:
            mine.append(candidate)
    return mine


def _done(staged: Path) -> set[int]:
    return {int(path.stem) for path in staged.glob("*.json")}


def _progress(staged: Path, plan: Plan) -> Progress:
    done = _done(staged)
    taken = {int(path.stem) for path in staged.glob("*.npz")}
    sizes = [candidate.source.size for candidate in plan.candidates]
    early = len(plan.refused)
    return Progress(
        done=len(done) + early,
        total=len(sizes) + early,
        refused=len(done - taken) + early,
        bytes_done=sum(sizes[row] for row in done),
        bytes_total=sum(sizes),
    )


def _collect(store: Path, plan: Plan, options: Options, *, strict: bool) -> tuple[tuple[Run, ...], tuple[Refused, ...]]:
    """Read what all ranks left, write the report, and make the small arrays empty."""
    runs, refused = [], list(plan.refused)
    for candidate in plan.candidates:
        content = json.loads((_rows_folder(store) / f"{candidate.row}.json").read_text(encoding="utf-8"))
        if "taken" in content:
            runs.append(Run.from_json(content["taken"]))
        else:
            refused.append(Refused(candidate.key, candidate.source.relative, content["refused"]))
    refused.sort(key=lambda one: (one.file, one.key))
    if not runs:
        shutil.rmtree(store)
        raise SwiftError(f"no run can be taken: {reasons([one.reason for one in refused])}")
    names = {candidate.key: candidate.source.relative for candidate in plan.candidates}
    lines = [{"file": names[run.key], "run": run.key, "status": "taken", "reason": ""} for run in runs]
    lines += [{"file": one.file, "run": one.key, "status": "refused", "reason": one.reason} for one in refused]
    lines.sort(key=lambda line: line["file"])
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_file(store / layout.REPORT_FILE, text.encode(), layout.PRIVATE)
    if strict and refused:
        raise SwiftError(
            f"{len(refused)} of {len(lines)} runs are refused: {reasons([one.reason for one in refused])}; "
            f"{store / layout.REPORT_FILE} names the files; remove {store} after mending them, or build without strict"
        )
    for small in layout.SMALL_ARRAYS:
        shutil.rmtree(store / small.name, ignore_errors=True)
        rows = len(plan.candidates)
        layout.create_small(store, small, rows, plan.longest, len(plan.voxels), options.compression)
    for dtype in set(layout.BOLD_TYPES) - {run.dtype for run in runs}:
        shutil.rmtree(store / "bold" / dtype, ignore_errors=True)
    return tuple(runs), tuple(refused)


def _assemble(store: Path, runs: tuple[Run, ...], rows: int, ranks: Communicator) -> None:
    """Write the shared shards of the small arrays, each by one rank, 64 runs at a time."""
    for shard in range(ranks.rank, -(-rows // layout.ROWS_PER_SHARD), ranks.size):
        first = shard * layout.ROWS_PER_SHARD
        last = min(first + layout.ROWS_PER_SHARD, rows)
        loaded = {}
        for run in runs:
            if first <= run.row < last:
                with np.load(_rows_folder(store) / f"{run.row}.npz") as content:
                    loaded[run.row] = dict(content)
        for small in layout.SMALL_ARRAYS:
            layout.write_rows(store, small, first, last, {row: content.get(small.name) for row, content in loaded.items()})


def _finish(store: Path, plan: Plan, runs: tuple[Run, ...], refused: tuple[Refused, ...]) -> BuildReport:
    """Write the index and the file of ids, then the group's metadata."""
    index = "".join(json.dumps(run.to_json()) + "\n" for run in runs).encode()
    write_file(store / layout.RUNS_FILE, index)
    _write_subjects(store, plan, runs)
    attributes = {
        "format": layout.FORMAT,
        "version": 1,
        "store_id": hmac.new(plan.salt.encode(), plan.digest.encode(), hashlib.sha256).hexdigest()[:16],
        "salt_id": salt_id(plan.salt),
        "sources": plan.digest,
        "generated": plan.generated,
        "writer": f"swiftv2 {__version__}",
        "grid": plan.grid.to_json(),
        "runs": len(runs),
        "index": layout.RUNS_FILE,
        "runs_sha256": hashlib.sha256(index).hexdigest(),
    }
    attributes["history"] = [
        {name: attributes[name] for name in ("version", "runs", "runs_sha256", "writer")} | {"change": "build"}
    ]
    layout.commit(store, attributes)
    return _report(store, runs, tuple((one.key, one.reason) for one in refused))


def _write_subjects(store: Path, plan: Plan, runs: tuple[Run, ...]) -> None:
    keys = {run.subject for run in runs}
    cohort = runs[0].cohort
    ids = {candidate.subject: candidate.source.subject for candidate in plan.candidates if candidate.subject in keys}
    labels = []
    for row in plan.labels:
        key = subject_key(plan.salt, cohort, row.subject)
        if key in keys:
            place = {"session": row.session, "task": row.task, "run": row.run}
            labels.append({"subject": key, **place, "values": dict(row.values)})
    content = {
        "salt": plan.salt,
        "subjects": {key: {"cohort": cohort, "id": ids[key]} for key in sorted(ids)},
        "labels": labels,
    }
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    write_file(store / layout.SUBJECTS_FILE, text.encode(), layout.PRIVATE)
