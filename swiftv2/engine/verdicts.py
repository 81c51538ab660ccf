"""What the figures of all ranks mean: which are as they should be, which are odd, and what to do; pure functions."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from swiftv2.engine.checkup import Answer, Opinion, Remark, Verdict, compare
from swiftv2.engine.probes import SLOW

GB = 1e9
CLOCK_WARNING, CLOCK_SICK = 1.0, 30.0
FEW_FILES = 1024
LITTLE_SHARED_MEMORY = 256e6
FEW_INODES = 10_000
TAKEN = 0.1
"""Share of a GPU's memory that may be taken before training begins."""
FULL = 0.95
SLOW_LINK = 0.5
LONG_SAVE_SECONDS = 120.0


def ranks(answers: Sequence[Answer]) -> Opinion:
    """Who is there."""
    hosts = {answer.host for answer in answers}
    launcher = answers[0].figures["launcher"]
    return Opinion(f"{_count(len(answers), 'rank')} on {_count(len(hosts), 'host')}, started {_LAUNCHERS[launcher]}")


_LAUNCHERS = {"alone": "alone", "torchrun": "by torchrun", "mpirun": "by mpirun", "srun": "by srun"}


def versions(answers: Sequence[Answer]) -> Opinion:
    """Versions must be equal; the commit is compared between hosts."""
    remarks: dict[int, Remark] = {}
    usual: dict[str, Any] = {}
    for name in dict.fromkeys(name for answer in answers for name in answer.figures):
        values = {a.rank: a.figures.get(name) for a in answers if name != "git" or "git" in a.figures}
        # Of equally many the first rank's counts.
        usual[name] = Counter(map(repr, values.values())).most_common(1)[0][0]
        for rank, value in values.items():
            if repr(value) != usual[name]:
                said = f"{name} is {_git(value) if name == 'git' else value}, elsewhere {_plain(name, values, usual[name])}"
                remarks[rank] = ("sick", f"{remarks[rank][1]}, {said}" if rank in remarks else said)
    first = answers[0].figures
    shown = ("python", "torch", "deepspeed", "zarr", "numpy", "cuda", "nccl")
    told = ", ".join(f"{name} {first[name]}" for name in shown if first.get(name))
    return Opinion(f"swiftv2 {first['swiftv2']} ({_git(first.get('git'))}), {told}", remarks)


def _plain(name: str, values: Mapping[int, Any], text: str) -> str:
    value = next(value for value in values.values() if repr(value) == text)
    return _git(value) if name == "git" else str(value)


def _git(state: Mapping[str, Any] | None) -> str:
    if not state:
        return "no git checkout"
    return f"commit {str(state['commit'])[:12]}{', changed' if state['changed'] else ''}"


def devices(answers: Sequence[Answer]) -> Opinion:
    """One device a rank, of one kind, free and in good health."""
    remarks: dict[int, Remark] = {}
    on_cuda = [a.figures for a in answers if a.figures["kind"] == "cuda"]
    usual = Counter(a.figures["name"] for a in answers).most_common(1)[0][0]
    taken = Counter((a.host, a.figures["id"]) for a in answers if a.figures["id"] is not None)
    for answer in answers:
        told = answer.figures
        remark = _device(told, shared=taken[(answer.host, told["id"])] > 1)
        if on_cuda and told["kind"] != "cuda":
            remark = ("sick", "has no GPU, where others have one")
        elif remark is None and told["name"] != usual:
            remark = ("warning", f"has {told['name']}, others {usual}: the slowest sets the pace")
        if remark is not None:
            remarks[answer.rank] = remark
    what = str(usual)
    if on_cuda:
        what += f", {min(told['memory_bytes'] for told in on_cuda) / GB:.1f} GB each"
        what += "" if all(told["health"] for told in on_cuda) else "; memory errors not known, since there is no pynvml"
    return Opinion(what, remarks)


def _device(told: Mapping[str, Any], *, shared: bool) -> Remark | None:
    health = told.get("health") or {}
    if shared:
        return "sick", f"shares {told['name']} {told['id']} with another rank: start one rank a GPU"
    if health.get("rows_failed") or health.get("uncorrected_errors"):
        return "sick", f"{told['name']} {told['id']} has uncorrected memory errors: have it reset"
    if health.get("rows_pending"):
        return "warning", f"{told['name']} {told['id']} waits for a reset to put spare memory in place"
    if "free_bytes" in told and told["free_bytes"] < (1 - TAKEN) * told["memory_bytes"]:
        used = (told["memory_bytes"] - told["free_bytes"]) / GB
        return "warning", f"{used:.1f} GB of {told['name']} {told['id']} are taken: does another process run there?"
    return None


def processors(answers: Sequence[Answer]) -> Opinion:
    """Threads of all ranks of a host against the cores that they may use."""
    remarks: dict[int, Remark] = {}
    for host in dict.fromkeys(a.host for a in answers):
        own = [a for a in answers if a.host == host]
        cores = len(set().union(*(a.figures["affinity"] for a in own)))
        threads = sum(a.figures["threads"] for a in own)
        for one in own:
            bound = len(one.figures["affinity"])
            if threads > cores:
                fit = max(1, cores // len(own))
                said = f"{threads} threads of {_count(len(own), 'rank')} on {_count(cores, 'core')}: set OMP_NUM_THREADS={fit}"
                remarks[one.rank] = ("warning", said)
            elif one.figures["threads"] > bound:
                said = f"{one.figures['threads']} threads bound to {_count(bound, 'core')}: set OMP_NUM_THREADS={bound}"
                remarks[one.rank] = ("warning", said)
    taken, there = (_between([a.figures[key] for a in answers]) for key in ("threads", "cores"))
    return Opinion(f"threads of a rank: {taken}; cores of a host: {there}", remarks)


def host_memory(needed: int) -> Callable[[Sequence[Answer]], Opinion]:
    """Free memory of each host against bytes that each of its ranks will hold there."""

    def judge(answers: Sequence[Answer]) -> Opinion:
        local = Counter(a.host for a in answers)
        remarks: dict[int, Remark] = {}
        for answer in answers:
            free, wanted = answer.figures["free_bytes"], needed * local[answer.host]
            if free < wanted:
                said = f"{free / GB:.1f} GB free, about {wanted / GB:.1f} GB wanted: lower data.prefetch or data.prefetch_mb"
                remarks[answer.rank] = ("warning", said)
        least = min(a.figures["free_bytes"] for a in answers)
        return Opinion(f"at least {_bytes(least)} free, {_bytes(needed)} wanted by each rank", remarks)

    return judge


def shared_memory(answers: Sequence[Answer]) -> Opinion:
    """Little shared memory makes ranks of a host fail or slow, as in containers with the usual 64 MB."""
    local = Counter(a.host for a in answers)
    little: Remark = ("warning", f"less than {LITTLE_SHARED_MEMORY / 1e6:.0f} MB free in /dev/shm: give the container more")
    remarks = {a.rank: little for a in answers if local[a.host] > 1 and a.figures["free_bytes"] < LITTLE_SHARED_MEMORY}
    return Opinion(f"at least {min(a.figures['free_bytes'] for a in answers) / GB:.2f} GB free in /dev/shm", remarks)


def open_files(answers: Sequence[Answer]) -> Opinion:
    """Shards, sockets and libraries count; below 1024 a run may fail."""
    limits = {a.rank: a.figures["soft"] for a in answers if a.figures["soft"] is not None}
    few = {rank: limit for rank, limit in limits.items() if limit < FEW_FILES}
    remarks: dict[int, Remark] = {
        rank: ("warning", f"may open {limit} files only: raise it by `ulimit -n`") for rank, limit in few.items()
    }
    return Opinion(f"at least {min(limits.values())} files" if limits else "any number of files", remarks)


def disk(one: int, kept: int, there: int, archived: int = 0) -> Callable[[Sequence[Answer]], Opinion]:
    """Room for checkpoints.

    Args:
        one: bytes of the largest checkpoint, which is written before an older one goes.
        kept: bytes of all that are kept at a time, without those kept for ever.
        there: bytes of checkpoints that lie there already.
        archived: bytes of those that are kept for ever.
    """

    def judge(answers: Sequence[Answer]) -> Opinion:
        inodes = Counter(a.figures["inode"] for a in answers).most_common(1)[0][0]
        needed = max(kept - there, 0) + one
        remarks: dict[int, Remark] = {}
        for answer in answers:
            remark = _disk(answer.figures, needed, max(kept + archived - there, 0) + one, one)
            if remark is None and answer.figures["inode"] != inodes:
                said = f"{answer.figures['folder']} is another folder than on other hosts: take one that all share as run.dir"
                remark = ("warning", said)
            if remark is not None:
                remarks[answer.rank] = remark
        free, speeds = (min(a.figures[key] for a in answers) for key in ("free_bytes", "bytes_per_second"))
        return Opinion(
            f"{answers[0].figures['folder']}: {_bytes(free)} free, {_bytes(needed)} wanted ({_bytes(one)} a checkpoint), "
            f"{speeds / 1e6:.0f} MB/s at least; a quota may allow less",
            remarks,
        )

    return judge


def _disk(told: Mapping[str, Any], needed: int, with_archive: int, one: int) -> Remark | None:
    free, inodes = told["free_bytes"], told["free_inodes"]
    advice = "make room, lower train.keep_last, or take another run.dir"
    if free < needed:
        return "sick", f"{_bytes(free)} free where {_bytes(needed)} are wanted for checkpoints: {advice}"
    if inodes is not None and inodes < FEW_INODES:
        return "sick", f"room for {inodes} more files only: remove some, or take another run.dir"
    if free < with_archive:
        return "warning", f"{_bytes(free)} free, {_bytes(with_archive)} with all that train.keep_every keeps"
    if one / told["bytes_per_second"] > LONG_SAVE_SECONDS:
        return (
            "warning",
            f"{told['bytes_per_second'] / 1e6:.1f} MB/s: a checkpoint takes {one / told['bytes_per_second']:.0f} s",
        )
    return None


def lease(answers: Sequence[Answer]) -> Opinion:
    """A living process that writes to the run directory is in the way."""
    told = answers[0].figures
    if not told.get("holder"):
        return Opinion("nobody writes to run.dir")
    if not told["alive"]:
        return Opinion(f"free: its last holder is gone, {told['holder']}")
    seconds = told["heartbeat_seconds"]
    said = f"run.dir is being written by {told['holder']}, last heartbeat {seconds:.0f} s ago: stop that one, or wait"
    return Opinion("", {answers[0].rank: ("sick", said)})


def clock(answers: Sequence[Answer]) -> Opinion:
    """Clocks that go apart spoil time stamps, time limits and leases."""
    remarks: dict[int, Remark] = {}
    for answer in answers:
        ahead, trip = answer.figures["ahead_seconds"], answer.figures["round_trip_seconds"]
        # Half the way there and back is the most by which the exchange itself can be wrong.
        off = max(abs(ahead) - trip / 2, 0.0)
        if off > CLOCK_WARNING:
            verdict: Verdict = "sick" if off > CLOCK_SICK else "warning"
            said = f"its clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} that of rank 0: set it by NTP"
            remarks[answer.rank] = (verdict, said)
    if len(answers) == 1:
        return Opinion("one clock")
    return Opinion(f"within {1e3 * max(abs(a.figures['ahead_seconds']) for a in answers):.2g} ms of rank 0", remarks)


def product(answers: Sequence[Answer]) -> Opinion:
    """Speed of each rank against the median of the others."""
    speeds = {a.rank: float(a.figures["flops_per_second"]) for a in answers}
    shares = compare(speeds)
    remarks: dict[int, Remark] = {
        rank: ("sick", f"{speeds[rank] / 1e9:,.0f} GFLOP/s, {share:.2f} of what the other ranks do")
        for rank, share in shares.items()
        if share < SLOW
    }
    told = f"{_between([round(speed / 1e9) for speed in speeds.values()])} GFLOP/s"
    return Opinion(f"{told} in {answers[0].figures['dtype']}{'' if shares else ', with no other rank to compare'}", remarks)


def bandwidth(answers: Sequence[Answer]) -> Opinion:
    """All-reduce over all ranks, and links between hosts against each other."""
    count = len(answers)
    if count == 1:
        return Opinion("one rank: nothing travels")
    median = {
        int(size): statistics.median(a.figures["all_reduce_seconds"][size] for a in answers)
        for size in answers[0].figures["all_reduce_seconds"]
    }
    large = max(median)
    # What a ring passes on for each byte that is summed.
    bus = 2 * (count - 1) / count * large / median[large]
    told = f"all-reduce {large / 1e6:.0f} MB at {bus / 1e6:,.0f} MB/s (bus), {median[min(median)] * 1e3:.2g} ms at 4 KB"
    pairs: dict[tuple[str, str], list[float]] = {}
    for answer in answers:
        for name, speed in answer.figures["pair_bytes_per_second"].items():
            one, other = name.split(" ")
            pairs.setdefault((one, other), []).append(speed)
    speeds = {pair: min(found) for pair, found in pairs.items()}
    slow_hosts, slow_pairs = slow_links(speeds)
    remarks: dict[int, Remark] = {}
    for answer in answers:
        if answer.host in slow_hosts:
            remarks[answer.rank] = ("sick", f"every link of this host that was measured is slow, {_links(answer.host, speeds)}")
        elif any(answer.host in pair for pair in slow_pairs):
            remarks[answer.rank] = ("warning", f"a link of this host is slow, {_links(answer.host, speeds)}")
    between = f"; between hosts {min(speeds.values()) / 1e6:,.0f} MB/s at least" if speeds else ""
    return Opinion(told + between, remarks)


def slow_links(speeds: Mapping[tuple[str, str], float]) -> tuple[set[str], set[tuple[str, str]]]:
    """Hosts whose every measured link is slow against the median of all others' links, and slow links of no such host.

    Two hosts have one link, with nothing to compare it to.
    """
    hosts = set()
    for host in {host for pair in speeds for host in pair}:
        own = [speed for pair, speed in speeds.items() if host in pair]
        others = [speed for pair, speed in speeds.items() if host not in pair]
        if others and max(own) < SLOW_LINK * statistics.median(others):
            hosts.add(host)
    rest = {pair: speed for pair, speed in speeds.items() if not hosts & set(pair)}
    shares = compare(dict(enumerate(rest.values())))
    return hosts, {pair for index, pair in enumerate(rest) if shares.get(index, 1.0) < SLOW_LINK}


def _links(host: str, speeds: Mapping[tuple[str, str], float]) -> str:
    own = {next(h for h in pair if h != host): speed for pair, speed in speeds.items() if host in pair}
    return ", ".join(f"{speed / 1e6:,.0f} MB/s to {other}" for other, speed in own.items())


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _between(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _bytes(size: float) -> str:
    return f"{size / GB:,.1f} GB" if size >= GB / 10 else f"{size / 1e6:,.1f} MB"
