"""What a rank measures of itself and its host for a checkup, and what ranks measure together."""

import contextlib
import importlib.util
import itertools
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import swiftv2
from swiftv2.engine.checkup import Figures, compare
from swiftv2.engine.collective import gather
from swiftv2.engine.launch import World
from swiftv2.engine.lease import is_alive, this_process
from swiftv2.engine.rundir import PACKAGES, git_state
from swiftv2.errors import SwiftError
from swiftv2.records import STALE_SECONDS, read_holder

MB = 1_000_000
TEST_BYTES = 8 * MB
SLOW = 0.7
"""Share of the others' median below which a rank's matrix product counts as slow."""
PINGS = 7


def versions(local_rank: int) -> Figures:
    """Versions of all that ranks must have in common; the commit on the first rank of a host."""
    found: dict[str, Any] = {"swiftv2": swiftv2.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    found["cuda"] = torch.version.cuda
    has_nccl = torch.version.cuda is not None and dist.is_nccl_available()
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None  # type: ignore[no-untyped-call]
    # One question to git a host: it looks at every file of the checkout, which may lie on a shared file system.
    return found | ({"git": git_state()} if local_rank == 0 else {})


def device(chosen: torch.device) -> Figures:
    """Which device this rank has, its memory, and its health where NVML can be asked."""
    if chosen.type != "cuda":
        return {"kind": "cpu", "name": _cpu_name(), "id": None}
    facts = torch.cuda.get_device_properties(chosen)
    free, total = torch.cuda.mem_get_info(chosen)
    identity = str(getattr(facts, "uuid", "")) or str(getattr(facts, "pci_bus_id", chosen.index))
    known = {"kind": "cuda", "name": facts.name, "id": identity, "memory_bytes": total, "free_bytes": free}
    return known | {"health": _health(identity)}


def _health(identity: str) -> dict[str, int] | None:
    """Uncorrected memory errors since the last boot, and memory rows that wait for a reset; None where nobody can tell."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    nvml: Any = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity.removeprefix('GPU-')}".encode())
        kinds = (nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
        found = {"uncorrected_errors": int(nvml.nvmlDeviceGetTotalEccErrors(handle, *kinds))}
        with contextlib.suppress(nvml.NVMLError):
            _, _, pending, failed = nvml.nvmlDeviceGetRemappedRows(handle)
            found |= {"rows_pending": int(pending), "rows_failed": int(failed)}
    except nvml.NVMLError:
        return None
    return found


def processors(local_rank: int) -> Figures:
    """Cores of the host, those that this process may use, and how many threads PyTorch takes."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    threads = {"threads": torch.get_num_threads(), "omp_num_threads": os.environ.get("OMP_NUM_THREADS")}
    return {"cores": os.cpu_count() or 1, "affinity": cores, "local_rank": local_rank, **threads}


def host_memory() -> Figures:
    """Bytes of the host's memory, and of this process's control group where that has less."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kilobytes = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    found = {"total_bytes": kilobytes["MemTotal"] << 10, "free_bytes": kilobytes["MemAvailable"] << 10}
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        found = {"total_bytes": min(found["total_bytes"], limit), "free_bytes": min(found["free_bytes"], limit - used)}
    return found


def shared_memory() -> Figures:
    """Free bytes of /dev/shm, through which ranks of a host exchange data."""
    told = os.statvfs("/dev/shm")  # noqa: S108 (asked for its size; nothing is written)
    return {"free_bytes": told.f_bavail * told.f_frsize, "total_bytes": told.f_blocks * told.f_frsize}


def open_files() -> Figures:
    """How many files this process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {"soft": soft if soft != resource.RLIM_INFINITY else None, "hard": hard if hard != resource.RLIM_INFINITY else None}


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    absolute = path.absolute()
    return next(one for one in (absolute, *absolute.parents) if one.is_dir())


def disk(run_dir: Path) -> Figures:
    """Room and speed where a run directory lies or will lie; a test file is written, brought to the disk, and gone again.

    `quota_bytes` is None: a quota shows in the free bytes where the file system counts it in, and nowhere else.

    Raises:
        OSError, SwiftError: it cannot be written there.
    """
    folder = nearest_folder(run_dir)
    told = os.statvfs(folder)
    path = folder / f".doctor-{os.getpid()}-{time.time_ns()}"
    block = os.urandom(MB)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        path.unlink()  # Without a name nothing is left, whatever happens to this process.
        began = time.perf_counter()
        for _ in range(TEST_BYTES // MB):
            left = memoryview(block)
            while left:  # Of a disk that is nearly full only the next write fails.
                left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
        seconds = time.perf_counter() - began
    except OSError as error:
        raise SwiftError(f"{folder}: cannot be written ({error.strerror}): make room, or take another run.dir") from error
    finally:
        os.close(descriptor)
    return {
        "folder": str(folder),
        "inode": folder.stat().st_ino,
        "free_bytes": told.f_bavail * told.f_frsize,
        "free_inodes": told.f_favail if told.f_files else None,
        "quota_bytes": None,
        "bytes_per_second": TEST_BYTES / seconds,
    }


def lease(run_dir: Path) -> Figures:
    """Who holds the lease of a run directory, and whether that process lives; the lease is left alone."""
    path = run_dir / "lease.json"
    former = read_holder(path)
    if former is None or former.released:
        return {"holder": None, "alive": False}
    # Both by the clock of the file system, as a newcomer would compare them.
    beside = path.parent / f".doctor-{os.getpid()}-{time.time_ns()}"
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        beside.unlink()
        os.write(descriptor, b".")
        age = os.fstat(descriptor).st_mtime - path.stat().st_mtime
    finally:
        os.close(descriptor)
    alive = is_alive(former, this_process(0), age, STALE_SECONDS)
    return {"holder": str(former), "alive": alive, "heartbeat_seconds": max(age, 0.0)}


def clock(world: World) -> Figures:
    """Seconds by which this rank's clock is ahead of rank 0's, by the quickest of a few exchanges (collective)."""
    best = (0.0, 0.0) if world.rank == 0 else (float("inf"), 0.0)
    reply = torch.zeros(1, dtype=torch.float64)
    for other in range(1, world.size):
        for _ in range(PINGS):
            if world.rank == 0:
                dist.recv(reply, other, world.control)
                reply.fill_(time.time())
                dist.send(reply, other, world.control)
            elif world.rank == other:
                sent = time.time()
                dist.send(reply, 0, world.control)
                dist.recv(reply, 0, world.control)
                taken = time.time() - sent
                best = min(best, (taken, sent + taken / 2 - float(reply)))
    return {"ahead_seconds": best[1], "round_trip_seconds": best[0]}


def product(chosen: torch.device, world: World | None) -> Figures:
    """Speed of a matrix product on every rank at the same time; a rank that seems slow is measured once more (collective).

    Of a GPU the median counts, of a CPU the fastest round: what else runs on a host makes rounds slower, and is no sickness.
    """
    rounds = 9 if chosen.type == "cuda" else 40
    found = _product(chosen, world, rounds)
    if world is None or world.size == 1:
        return found
    speeds = dict(enumerate(gather(found["flops_per_second"], world)))
    if min(compare(speeds).values()) < SLOW:
        again = _product(chosen, world, 2 * rounds)
        found = max(found, again, key=lambda one: float(one["flops_per_second"]))
    return found


def _product(chosen: torch.device, world: World | None, rounds: int) -> Figures:
    size, dtype = (8192, torch.bfloat16) if chosen.type == "cuda" else (384, torch.float32)
    left, right = (torch.full((size, size), 0.5, dtype=dtype, device=chosen) for _ in range(2))
    seconds = []
    for turn in range(rounds + 2):
        if world is not None and world.size > 1:
            dist.barrier(group=world.control)
        _wait_for(chosen)
        began = time.perf_counter()
        torch.mm(left, right)
        _wait_for(chosen)
        if turn >= 2:
            seconds.append(time.perf_counter() - began)
    quick = statistics.quantiles(seconds, n=4)[0]
    return {
        "flops_per_second": 2 * size**3 / quick,
        "seconds": seconds,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
    }


def bandwidth(world: World, hosts: list[str]) -> Figures:
    """Seconds of all-reduces by size, and bytes per second between the first ranks of neighbouring hosts (collective).

    Args:
        world: this process among the ranks.
        hosts: of every rank.
    """
    cuda = world.device.type == "cuda"
    sizes = (4_096, MB, 64 * MB, 256 * MB) if cuda else (4_096, MB, 16 * MB)
    reduced = {str(size): _repeat(dist.all_reduce, size, world) for size in sizes}
    first: dict[str, int] = {}
    for rank, host in enumerate(hosts):
        first.setdefault(host, rank)
    pairs = {}
    size = (64 if cuda else 8) * MB
    for turn in neighbours(list(first)):
        for one, other in turn:
            ends = (first[one], first[other])
            if world.rank in ends:
                seconds = _repeat(partial(_there_and_back, ends=ends, rank=world.rank), size, world, alone=True)
                pairs[f"{one} {other}"] = 2 * size / seconds
        dist.barrier(group=world.control)
    return {"all_reduce_seconds": reduced, "pair_bytes_per_second": pairs}


def neighbours(hosts: list[str]) -> list[list[tuple[str, str]]]:
    """Pairs of neighbouring hosts in a ring, in turns in which no host stands twice; nothing for one host."""
    line = list(itertools.pairwise(hosts))
    closing = [(hosts[-1], hosts[0])] if len(hosts) > 2 else []
    return [turn for turn in (line[::2], line[1::2], closing) if turn]


def _there_and_back(data: torch.Tensor, ends: tuple[int, int], rank: int) -> None:
    if rank == ends[0]:
        dist.send(data, ends[1])
        dist.recv(data, ends[1])
    else:
        dist.recv(data, ends[0])
        dist.send(data, ends[0])


def _repeat(exchange: Callable[[torch.Tensor], Any], size: int, world: World, *, alone: bool = False, times: int = 5) -> float:
    """Median of the seconds that an exchange of so many bytes takes, after one that does not count."""
    data = torch.zeros(size // 4, dtype=torch.float32, device=world.device)
    seconds = []
    for _ in range(times + 1):
        if world.size > 1 and not alone:
            dist.barrier(group=world.control)
        _wait_for(world.device)
        began = time.perf_counter()
        exchange(data)
        _wait_for(world.device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def begin_peak(chosen: torch.device) -> None:
    """Forget the most memory that was held up to now, where that can be forgotten."""
    if chosen.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(chosen)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak(chosen: torch.device) -> int:
    """Most bytes held since `begin_peak`: what PyTorch reserved on a GPU, resident memory of this process on a CPU."""
    if chosen.type == "cuda":
        return int(torch.cuda.max_memory_reserved(chosen))
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _wait_for(chosen: torch.device) -> None:
    if chosen.type == "cuda":
        torch.cuda.synchronize(chosen)


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.machine()
