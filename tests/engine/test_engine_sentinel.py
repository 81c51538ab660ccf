"""Ranks that hang, stop, or are asked to stop where they cannot: named, written down, ended with 75."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
from hypothesis import given
from hypothesis import strategies as st

from swiftv2.engine.beats import Beat
from swiftv2.engine.diagnosis import describe_fault, find_suspects

Processes = list[subprocess.Popen[str]]
CALM = {"hang": 60.0, "grace": 60.0, "lost": 60.0, "steps": 10_000}
HELD_UP = {"at": (1, 5, "compute"), "fault": "sleep"}


@contextlib.contextmanager
def watched(folder: Path, size: int, **options: Any) -> Iterator[Processes]:
    """Ranks started one by one, so that each one's exit status is seen and rank 0 keeps the store."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [sys.executable, str(ranks.WORKERS / "watched.py"), str(folder), json.dumps(CALM | options)]
    recorder = {"TORCH_FR_BUFFER_SIZE": "100"}
    processes = []
    try:
        for rank in range(size):
            own = {name: str(value) for name, value in {"RANK": rank, "LOCAL_RANK": rank, **common}.items()} if size > 1 else {}
            environment = ranks.environment() | own | recorder
            processes.append(subprocess.Popen(words, env=environment, text=True, stderr=subprocess.PIPE))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def when(told: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not told():
        assert time.monotonic() < until
        time.sleep(0.02)


def step(folder: Path, rank: int) -> int:
    """Step that a rank is in; 0 before the first, and while its file is written anew."""
    path = folder / f"step-{rank}"
    return int(path.read_text() or "0") if path.exists() else 0


def told(folder: Path) -> list[dict[str, Any]]:
    path = folder / "told.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ended(process: subprocess.Popen[str], seconds: float = 40.0) -> tuple[int, str]:
    """Exit status and the last line of a process."""
    text = process.communicate(timeout=seconds)[1]
    return process.returncode, (text.splitlines() or [""])[-1]


def logs(folder: Path) -> set[str]:
    return {path.name for path in (folder / "logs").iterdir()}


@pytest.mark.slow
def test_a_rank_that_hangs_while_it_still_beats_is_named(tmp_path: Path) -> None:
    with watched(tmp_path, 3, hang=3.0, at=(2, 4, "data"), fault="sleep") as processes:
        ends = [ended(process) for process in processes]
    (event,) = told(tmp_path)
    assert (event["kind"], event["suspects"], event["silent"], event["told_by"]) == ("hang", [2], [], 0)
    places = [(one["rank"], one["step"], one["phase"]) for one in event["behind"]]
    assert places == [(0, 4, "compute"), (1, 4, "compute"), (2, 4, "data")]
    for rank, (status, line) in enumerate(ends):
        assert status == 75
        assert line.startswith(f"swiftv2 (rank {rank}): rank ")
        assert "rank 2 on" in line
        assert "in data of step 4" in line
        assert line.endswith("the same command goes on from the last checkpoint")
    everywhere = {f"stacks-rank-{rank}-attempt-1.txt" for rank in range(3)}
    assert everywhere | {f"collectives-rank-{rank}-attempt-1.json" for rank in range(3)} == logs(tmp_path)
    stacks = (tmp_path / "logs" / "stacks-rank-2-attempt-1.txt").read_text()
    assert "in befall" in stacks
    assert "in train" in stacks
    last = json.loads((tmp_path / "logs" / "collectives-rank-0-attempt-1.json").read_text())["entries"][-1]
    assert last["profiling_name"] == "gloo:all_reduce"


@pytest.mark.slow
@pytest.mark.parametrize(("stopped", "seconds", "kind"), [(1, {"hang": 3.0}, "hang"), (0, {"lost": 2.0}, "lost")])
def test_a_stopped_rank_is_named_by_its_peer(tmp_path: Path, stopped: int, seconds: dict[str, float], kind: str) -> None:
    """Rank 0 keeps the store: with it, that falls silent."""
    left = 1 - stopped
    with watched(tmp_path, 2, **seconds) as processes:
        when(lambda: step(tmp_path, stopped) > 50)  # Each has heard of the other by then.
        processes[stopped].send_signal(signal.SIGSTOP)
        status, line = ended(processes[left])
        processes[stopped].send_signal(signal.SIGCONT)
        assert ended(processes[stopped])[0] != 0, "it cannot go on alone"
    event = told(tmp_path)[0]
    assert (event["kind"], event["told_by"], event["suspects"]) == (kind, left, [stopped])
    assert [(one["rank"], one["host"]) for one in event["silent"]] == [(stopped, socket.gethostname())]
    assert status == 75
    assert f"rank {stopped} on {socket.gethostname()}" in line
    assert f"stacks-rank-{left}-attempt-1.txt" in logs(tmp_path)


@pytest.mark.slow
def test_a_rank_whose_interpreter_is_held_leaves_its_stacks_too(tmp_path: Path) -> None:
    with watched(tmp_path, 2, hang=3.0, at=(1, 5, "compute"), fault="lock") as processes:
        assert ended(processes[0])[0] == 75
        assert processes[1].poll() is None
    (event,) = told(tmp_path)
    assert (event["suspects"], [one["rank"] for one in event["silent"]]) == ([1], [1])
    assert "in befall" in (tmp_path / "logs" / "stacks-rank-1-attempt-1.txt").read_text()


@pytest.mark.slow
def test_neither_a_short_pause_nor_who_is_done_is_taken_for_lost(tmp_path: Path) -> None:
    """Each rank is stopped for a while; then rank 0 has left and rank 1 has still to do, for longer than the pause."""
    with watched(tmp_path, 2, lost=3.0, hang=30.0, steps=250, stay=[0.0, 4.5], after=1.0) as processes:
        for rank in (1, 0):
            former = step(tmp_path, rank)
            when(lambda rank=rank, former=former: step(tmp_path, rank) > former + 5)  # type: ignore[misc]
            processes[rank].send_signal(signal.SIGSTOP)
            time.sleep(1.2)
            processes[rank].send_signal(signal.SIGCONT)
        assert [ended(process)[0] for process in processes] == [0, 0]
    assert told(tmp_path) == []
    assert logs(tmp_path) == set()


@pytest.mark.slow
def test_a_signal_is_heard_in_a_collective_that_nobody_joins(tmp_path: Path) -> None:
    """Rank 0 waits in an all_reduce for rank 1, which waits for something else; rank 0 alone is asked."""
    with watched(tmp_path, 2, grace=1.5, **HELD_UP) as processes:
        when(lambda: step(tmp_path, 0) == 5 and step(tmp_path, 1) == 5)
        time.sleep(0.5)
        asked = time.monotonic()
        processes[0].send_signal(signal.SIGUSR1)
        ends = [ended(process) for process in processes]
        assert 1.0 < time.monotonic() - asked < 20
    assert [status for status, _ in ends] == [75, 75]
    assert all("asked to stop (SIGUSR1), but not done within 2 s" in line for _, line in ends)
    (event,) = told(tmp_path)
    assert (event["kind"], event["told_by"]) == ("grace", 0)


@pytest.mark.slow
def test_neither_a_full_disk_nor_one_that_hangs_keeps_the_process(tmp_path: Path) -> None:
    for tell, limit in (("hangs", "unlimited"), ("", "0")):
        folder = tmp_path / f"limit-{limit}"
        folder.mkdir()
        with watched(folder, 1, hang=2.0, at=(0, 3, "data"), fault="sleep", tell=tell) as processes:
            when(lambda folder=folder: step(folder, 0) == 3)  # type: ignore[misc]
            subprocess.run(["prlimit", f"--pid={processes[0].pid}", f"--fsize={limit}"], check=True)
            status, line = ended(processes[0])
        assert status == 75
        assert ("File too large" in line) == (limit == "0")
    assert "in befall" in (tmp_path / "limit-unlimited" / "logs" / "stacks-rank-0-attempt-1.txt").read_text()


def beat(rank: int, step: int = 5, phase: str = "compute", seconds: float = 9.0, state: str = "runs") -> Beat:
    return Beat(rank, f"node{rank}", step, phase, seconds, state)


@pytest.mark.parametrize(
    ("beats", "silent", "suspects", "words"),
    [
        ([beat(0), beat(1), beat(2)], [], [], "all ranks stand at the same place"),
        ([beat(0), beat(1), beat(2, phase="data")], [], [2], "rank 2 on node2, in data of step 5 for 9 s"),
        ([beat(0), beat(1, phase="data"), beat(2, phase="data")], [], [1, 2], "rank 1 on node1 and 1 more, in data"),
        ([beat(0), beat(1, phase="data")], [1], [1], "rank 1 on node1, which is silent"),
        ([beat(0)], [3], [3], "rank 3, which is silent"),
        ([beat(0), beat(1), beat(2, phase="save")], [], [2], "rank 2 on node2, in save"),
        ([beat(0, seconds=9.0), beat(1, phase="save", seconds=8.0)], [], [0], "rank 0 on node0, in compute"),
        ([beat(0), beat(1, state="failed")], [1], [1], "rank 1 on node1, which left by an error"),
        ([beat(0), beat(1, state="failed")], [], [1], "rank 1 on node1, which left by an error"),
    ],
)
def test_the_rank_that_others_wait_for(beats: list[Beat], silent: list[int], suspects: list[int], words: str) -> None:
    found = find_suspects(beats, silent)
    assert found == suspects
    assert words in describe_fault(beats, silent, found)


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["data", "compute", "save"])), min_size=1, max_size=9), st.data())
def test_suspects_are_ranks_and_never_all_that_answer(places: list[tuple[int, str]], data: st.DataObject) -> None:
    beats = [beat(rank, step, phase, seconds=float(rank)) for rank, (step, phase) in enumerate(places)]
    suspects = find_suspects(beats, [])
    assert set(suspects) < set(range(len(beats)))
    shuffled = data.draw(st.permutations(beats))
    assert find_suspects(shuffled, []) == suspects
    assert (len(set(places)) == 1) == (not suspects)
