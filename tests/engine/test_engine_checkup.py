"""A checkup: what figures mean, who is blamed, and that a rank that fails or hangs is an answer like any other."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not in __all__

from swiftv2.engine import probes, verdicts
from swiftv2.engine.checkup import Answer, Check, Examination, Opinion, Remark, Verdict, make_check
from swiftv2.engine.lease import Lease
from swiftv2.engine.place import Place
from swiftv2.errors import SwiftError, UsageError


def answers(*figures: dict[str, Any], hosts: str | None = None) -> list[Answer]:
    return [Answer(rank, (hosts or "abcdefgh")[rank], one) for rank, one in enumerate(figures)]


def judged(opinion: Opinion) -> dict[int, Verdict]:
    return {rank: verdict for rank, (verdict, _) in opinion.remarks.items()}


def test_a_rank_slower_than_the_others_is_sick() -> None:
    def speeds(*values: float) -> list[Answer]:
        return answers(*({"flops_per_second": value * 1e9, "dtype": "bfloat16"} for value in values))

    assert judged(verdicts.product(speeds(100, 69, 100, 101))) == {1: "sick"}
    assert "0.69 of what the other ranks do" in verdicts.product(speeds(100, 69, 100, 101)).remarks[1][1]
    assert judged(verdicts.product(speeds(100, 72, 100, 101))) == {}
    assert judged(verdicts.product(speeds(100, 60))) == {1: "sick"}
    assert judged(verdicts.product(speeds(1))) == {}, "one rank is compared to nobody"


@pytest.mark.parametrize(
    ("ahead", "trip", "expected"),
    [
        (0.9, 0.0, None),
        (1.2, 0.0, "warning"),
        (-1.2, 0.0, "warning"),
        (1.2, 0.5, None),
        (31.0, 0.1, "sick"),
        (-400.0, 0.1, "sick"),
    ],
)
def test_clocks_are_judged_by_what_the_exchange_can_tell(ahead: float, trip: float, expected: Verdict | None) -> None:
    opinion = verdicts.clock(answers(*({"ahead_seconds": s, "round_trip_seconds": trip} for s in (0.0, ahead))))
    assert judged(opinion) == ({1: expected} if expected else {})


def test_a_host_whose_links_are_all_slow_is_told_from_one_slow_link() -> None:
    ring = {("a", "b"): 10.0, ("b", "c"): 10.0, ("c", "d"): 10.0, ("d", "a"): 10.0}
    assert verdicts.slow_links(ring) == (set(), set())
    assert verdicts.slow_links(ring | {("a", "b"): 2.0, ("b", "c"): 3.0}) == ({"b"}, set())
    assert verdicts.slow_links(ring | {("a", "b"): 2.0}) == (set(), {("a", "b")})
    assert verdicts.slow_links({("a", "b"): 0.1}) == (set(), set()), "one link is compared to nothing"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_every_host_meets_both_its_neighbours_and_never_two_at_once(count: int) -> None:
    hosts = list("abcdefg"[:count])
    turns = probes.neighbours(hosts)
    met = [pair for turn in turns for pair in turn]
    assert len(met) == len(set(map(frozenset, met))) == {1: 0, 2: 1}.get(count, count)
    assert all(len({host for pair in turn for host in pair}) == 2 * len(turn) for turn in turns)


def test_versions_that_differ_are_named_with_the_ranks_that_have_them() -> None:
    usual = {"swiftv2": "0.1.0", "python": "3.11.7", "torch": "2.6.0"}
    git = {"commit": "0123456789abcdef", "changed": False}
    given = answers(
        usual | {"git": git}, usual, usual | {"torch": "2.5.1", "git": git}, usual | {"git": git | {"changed": True}}
    )
    opinion = verdicts.versions(given)
    assert judged(opinion) == {2: "sick", 3: "sick"}
    assert opinion.remarks[2][1] == "torch is 2.5.1, elsewhere 2.6.0"
    assert "changed" in opinion.remarks[3][1]
    assert "torch 2.6.0" in opinion.what


def test_devices_must_be_one_a_rank_healthy_and_free() -> None:
    def gpu(identity: str, free: float = 80e9, name: str = "A100", **health: int) -> dict[str, Any]:
        return {
            "kind": "cuda",
            "name": name,
            "id": identity,
            "memory_bytes": 80e9,
            "free_bytes": free,
            "health": health or None,
        }

    cpu = {"kind": "cpu", "name": "Xeon", "id": None}
    assert judged(verdicts.devices(answers(cpu, cpu))) == {}
    assert judged(verdicts.devices(answers(gpu("0"), gpu("0"), gpu("1"), hosts="aaa"))) == {0: "sick", 1: "sick"}
    assert judged(verdicts.devices(answers(gpu("0"), gpu("0"), hosts="ab"))) == {}, "numbers are a host's own"
    assert judged(verdicts.devices(answers(gpu("0"), gpu("1"), cpu))) == {2: "sick"}
    assert judged(verdicts.devices(answers(gpu("0"), gpu("1", uncorrected_errors=3)))) == {1: "sick"}
    assert judged(verdicts.devices(answers(gpu("0"), gpu("1", rows_pending=1)))) == {1: "warning"}
    assert judged(verdicts.devices(answers(gpu("0"), gpu("1", free=40e9)))) == {1: "warning"}
    assert judged(verdicts.devices(answers(gpu("0"), gpu("1"), gpu("2", name="H100")))) == {2: "warning"}


def test_more_threads_than_cores_is_a_warning_with_the_number_that_fits() -> None:
    def rank(threads: int, *cores: int) -> dict[str, Any]:
        return {"cores": 8, "affinity": list(cores), "threads": threads}

    assert judged(verdicts.processors(answers(rank(4, *range(8)), rank(4, *range(8)), hosts="aa"))) == {}
    opinion = verdicts.processors(answers(rank(8, *range(8)), rank(8, *range(8)), rank(8, *range(8)), hosts="aab"))
    assert judged(opinion) == {0: "warning", 1: "warning"}
    assert "OMP_NUM_THREADS=4" in opinion.remarks[0][1]
    assert judged(verdicts.processors(answers(rank(2, 0), rank(1, 1, 2), hosts="aa"))) == {0: "warning"}, "bound to one core"


def test_too_little_disk_is_sick_and_what_is_there_already_counts() -> None:
    def free(size: float, inodes: int | None = 10**6, inode: int = 7, speed: float = 1e9) -> dict[str, Any]:
        return {"free_bytes": size, "free_inodes": inodes, "inode": inode, "folder": "/runs", "bytes_per_second": speed}

    def judge(*figures: dict[str, Any], there: int = 0) -> Opinion:
        return verdicts.disk(one=int(10e9), kept=int(40e9), there=there, archived=int(100e9))(answers(*figures))

    assert judged(judge(free(200e9), free(200e9))) == {}
    opinion = judge(free(200e9), free(49e9))
    assert judged(opinion) == {1: "sick"}
    assert "49.0 GB free where 50.0 GB are wanted" in opinion.remarks[1][1]
    assert judged(judge(free(49e9), there=int(38e9))) == {0: "warning"}, "enough but for what is kept for ever"
    assert judged(judge(free(200e9, inodes=100))) == {0: "sick"}
    assert judged(judge(free(200e9, inodes=None))) == {}, "file systems without a count of their own have no limit"
    assert judged(judge(free(200e9), free(200e9), free(200e9, inode=9))) == {2: "warning"}, "another folder there"
    assert judged(judge(free(200e9, speed=50e6))) == {0: "warning"}


def test_a_host_is_blamed_only_for_what_others_do_not_have() -> None:
    def check(verdict: list[Verdict], hosts: str, *, shared: bool) -> Check:
        remarks: dict[int, Remark] = {rank: (one, "bad") for rank, one in enumerate(verdict) if one != "well"}
        return make_check("x", dict(enumerate(hosts)), [], Opinion("", remarks), shared=shared)

    assert check(["well", "sick"], "ab", shared=True).sick_hosts() == {"b"}
    assert check(["sick", "sick"], "ab", shared=True).sick_hosts() == set()
    assert check(["sick", "sick"], "ab", shared=False).sick_hosts() == set(), "all alike is no matter of a host"
    assert check(["sick", "sick"], "aa", shared=False).sick_hosts() == {"a"}, "a dead node of a job of one node"
    assert check(["sick", "sick"], "aa", shared=True).sick_hosts() == set()
    assert check(["warning", "well"], "ab", shared=False).sick_hosts() == set()


def test_ranks_that_say_the_same_are_told_in_one_breath_and_the_worst_first() -> None:
    remarks: dict[int, Remark] = dict.fromkeys(range(12), ("warning", "is warm")) | {12: ("sick", "is dead")}
    hosts = {rank: f"n{rank // 4}" for rank in range(13)}
    made = make_check("x", hosts, [Answer(0, "n0", {"value": 1})], Opinion("all else is well", remarks))
    assert made.verdict == "sick"
    expected = "rank 12 on n3: is dead; ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more on n0, n1, n2: is warm; all else is well"
    assert made.what == expected
    assert made.ranks[0] == {"rank": 0, "host": "n0", "verdict": "warning", "what": "is warm", "figures": {"value": 1}}


def test_what_fails_or_hangs_is_an_answer() -> None:
    told: list[str] = []
    gate = threading.Event()

    def fail() -> dict[str, Any]:
        raise OSError(5, "Input/output error", "/lustre/x")

    def lack() -> dict[str, Any]:
        raise SwiftError("no GPU")

    def hang() -> dict[str, Any]:
        gate.wait()
        return {}

    examination = Examination(Place("alone"), HashStore(), told.append)
    assert examination.ask("good", lambda: {"value": 1}, lambda all_: Opinion(f"{len(all_)} answer")) == "well"
    assert examination.ask("bad", fail, lambda _: Opinion("")) == "sick"
    assert examination.ask("lacking", lack, lambda _: Opinion("")) == "sick"
    assert not examination.stuck
    began = time.monotonic()
    assert examination.ask("hanging", hang, lambda _: Opinion(""), seconds=1.5) == "sick"
    assert time.monotonic() - began < 10
    assert examination.stuck
    assert not examination.close()
    gate.set()
    words = [check.what for check in examination.checks]
    assert words[0] == "1 answer"
    assert [word.partition(": ")[2] for word in words[1:]] == ["/lustre/x: Input/output error", "no GPU", "no end after 2 s"]
    assert told == ["hanging"], "what takes a second is told"


def test_a_wrong_configuration_is_not_a_sickness() -> None:
    def refuse() -> dict[str, Any]:
        raise UsageError("model.image_size is wrong")

    examination = Examination(Place("alone"), HashStore(), lambda _: None)
    with pytest.raises(UsageError, match="image_size"):
        examination.ask("store", refuse, lambda _: Opinion(""))


def test_measurements_of_this_host_are_plausible_and_leave_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "not" / "there" / "yet"
    disk = probes.disk(run_dir)
    assert disk["folder"] == str(tmp_path)
    assert disk["free_bytes"] > 0
    assert disk["bytes_per_second"] > 0
    assert list(tmp_path.iterdir()) == []
    memory = probes.host_memory()
    assert 0 < memory["free_bytes"] <= memory["total_bytes"]
    assert probes.shared_memory()["total_bytes"] > 0
    assert probes.processors(0)["threads"] == torch.get_num_threads()
    assert probes.versions(0)["torch"] == torch.__version__
    assert probes.product(torch.device("cpu"), None)["flops_per_second"] > 1e8
    probes.begin_peak(torch.device("cpu"))
    held = torch.ones(50_000_000)
    assert probes.peak(torch.device("cpu")) > held.numel() * 4


def test_a_lease_is_read_and_left_alone(tmp_path: Path) -> None:
    assert probes.lease(tmp_path) == {"holder": None, "alive": False}
    with Lease.acquire(tmp_path, attempt=1) as held:
        content = held.path.read_bytes()
        found = probes.lease(tmp_path)
        assert found["alive"]
        assert judged(verdicts.lease(answers(found, {}))) == {0: "sick"}
        assert held.path.read_bytes() == content
    assert not probes.lease(tmp_path)["alive"]
    assert [path.name for path in tmp_path.iterdir()] == ["lease.json"]
