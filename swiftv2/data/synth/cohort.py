"""Generate a cohort: subjects in parallel, the same files whatever the number of workers."""

import fcntl
import glob
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

from swiftv2 import __version__
from swiftv2.config.synth import SynthConfig
from swiftv2.data.synth.anatomy import Atlas, load_atlas
from swiftv2.data.synth.files import FAULTS, write_person, write_table
from swiftv2.data.synth.oracle import ceilings
from swiftv2.data.synth.people import Person, draw_people, table, withdrawn
from swiftv2.errors import SwiftError, UsageError

CONFIG_FILE = "synth.json"
VERSION = 3
"""Raised when the same configuration gives other files: results on a cohort name it."""


@dataclass(frozen=True)
class SynthReport:
    """What was generated, and how fast."""

    subjects: int
    runs: int
    frames: int
    bad_files: int
    seconds: float
    nothing_to_do: bool = False

    def __str__(self) -> str:
        if self.nothing_to_do:
            return "is there already: nothing to do"
        rate = f"{self.frames / self.seconds:.0f} frames/s" if self.seconds else ""
        bad = f", {self.bad_files} bad files" if self.bad_files else ""
        return f"{self.subjects} subjects, {self.runs} runs, {self.frames} frames{bad} in {self.seconds:.1f} s ({rate})"


def generate(
    config: SynthConfig, folder: Path, workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> SynthReport:
    """Write a cohort as a BIDS-derivatives tree; it appears whole or not at all.

    Args:
        config: what is generated; the files depend on it alone.
        folder: new, or holding the cohort of the same configuration (then nothing is done).
        workers: processes.
        progress: called with subjects done and subjects in all.

    Raises:
        UsageError: the folder holds something else.
        SwiftError: it cannot be written.
    """
    wanted = {"version": VERSION, "config": config.model_dump(mode="json")}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return _already_there(folder, wanted)
    begun = time.perf_counter()
    people = draw_people(config, config.subjects + config.bad_files)
    faults = [None] * config.subjects + [FAULTS[i % len(FAULTS)] for i in range(config.bad_files)]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        partial.mkdir()
        lock = _lock(partial)
    except OSError as error:
        raise SwiftError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        jobs = [(config, person, partial, fault) for person, fault in zip(people, faults, strict=True)]
        runs = frames = 0
        with _mapped(jobs, workers) as results:
            for done, (new_runs, new_frames) in enumerate(results, start=1):
                runs, frames = runs + new_runs, frames + new_frames
                if progress is not None:
                    progress(done, len(jobs))
        _write_tables(config, people, partial, wanted)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise SwiftError(f"{folder}: cannot be written ({error.strerror or error}); nothing was left there") from error
    except BrokenProcessPool as error:
        raise SwiftError(f"{folder}: a worker was killed (no memory?); nothing was left there, try fewer workers") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)
    return SynthReport(config.subjects, runs, frames, config.bad_files, time.perf_counter() - begun)


def _lock(partial: Path) -> int | None:
    """Hold a folder until the descriptor is closed or this process ends; None where it is held or cannot be."""
    try:
        descriptor = os.open(partial, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of the same cohort: the folders that nobody holds."""
    for stale in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        lock = _lock(stale)
        if lock is not None:
            shutil.rmtree(stale, ignore_errors=True)
            os.close(lock)


def _already_there(folder: Path, wanted: dict[str, object]) -> SynthReport:
    try:
        found = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != wanted:
        what = "a cohort of another configuration" if found else "something else"
        raise UsageError(f"{folder} holds {what}: give another folder, or remove it")
    return SynthReport(0, 0, 0, 0, 0.0, nothing_to_do=True)


def _write_tables(config: SynthConfig, people: list[Person], root: Path, wanted: dict[str, object]) -> None:
    write_table(root / "participants.tsv", table(config, people))
    (root / "withdrawn.txt").write_text("".join(f"{name}\n" for name in withdrawn(config, people)), encoding="utf-8")
    description = {
        "Name": "Generated cohort",
        "BIDSVersion": "1.9.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "swiftv2 synth", "Version": __version__}],
    }
    for name, content in (
        ("dataset_description.json", description),
        ("traits.json", ceilings(config)),
        (CONFIG_FILE, wanted),
    ):
        (root / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


Job = tuple[SynthConfig, Person, Path, str | None]
_maps: dict[float, Atlas] = {}
"""The last atlas that this process used, by voxel size: making it takes seconds."""


@contextmanager
def _mapped(jobs: list[Job], workers: int) -> Iterator[Iterator[tuple[int, int]]]:
    """Results of the jobs in their order, from this process or from several spawned ones."""
    if workers <= 1:
        yield map(_write, jobs)
        return
    voxel_mm = jobs[0][0].voxel_mm
    context, handed = multiprocessing.get_context("spawn"), (voxel_mm, _atlas(voxel_mm))
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_begin_worker, initargs=handed) as pool:
        try:
            yield pool.map(_write, jobs)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin_worker(voxel_mm: float, atlas: Atlas) -> None:
    """Keep the maps, and end when the process that started this worker is killed: it would wait for work for ever.

    Ctrl-C reaches all: the parent answers it, the workers end what they are at.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _maps[voxel_mm] = atlas
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_after, args=(parent.sentinel,), daemon=True).start()


def _leave_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _write(job: Job) -> tuple[int, int]:
    config, person, root, fault = job
    return write_person(config, person, _atlas(config.voxel_mm), root, fault)


def _atlas(voxel_mm: float) -> Atlas:
    if voxel_mm not in _maps:
        _maps.clear()
        _maps[voxel_mm] = load_atlas(voxel_mm)
    return _maps[voxel_mm]
