"""`swiftv2 doctor` on real ranks and a real store: well, and with something wrong on one rank, which is named."""

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import environment, swiftv2_run, worker
from test_pretrain import CONFIG

from swiftv2.cli import main
from swiftv2.engine.lease import Lease

ALL = [
    "ranks",
    "store",
    "versions",
    "devices",
    "processors",
    "host memory",
    "shared memory",
    "open files",
    "disk",
    "lease",
    "reading",
    "links",
    "clock",
    "matrix product",
    "bandwidth",
    "dry run",
]


@pytest.fixture
def words(real_store: Path, tmp_path: Path) -> list[str]:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return [str(path), f"data.store={real_store}", f"run.dir={tmp_path / 'runs' / 'first'}"]


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def visit(ranks: int, what: str, *words: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A checkup with something wrong on the last rank: the whole answer, and its checks by name."""
    script = worker(ranks, "visit.py", what, *words, "--json")
    done = subprocess.run(script, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert not answer["ok"]
    return answer, {check["name"]: check for check in answer["checks"]}


@pytest.mark.slow
def test_two_healthy_ranks_are_well_and_nothing_is_left(words: list[str], real_store: Path, tmp_path: Path) -> None:
    before = contents(tmp_path), contents(real_store)
    done = swiftv2_run(["doctor", *words, "--json"], ranks=2)
    answer = json.loads(done.stdout)
    assert done.returncode == 0, [check for check in answer["checks"] if check["verdict"] == "sick"]
    assert set(answer) == {"ok", "checks", "sick_hosts", "environment"}
    assert answer["ok"]
    assert answer["sick_hosts"] == []
    assert [check["name"] for check in answer["checks"]] == ALL
    for check in answer["checks"]:
        assert set(check) == {"name", "verdict", "what", "ranks"}
        # Others may use this machine: a warning is no failure.
        assert check["verdict"] in ("well", "warning"), check
        assert [one["rank"] for one in check["ranks"]] == [0, 1]
        assert all(set(one) == {"rank", "host", "verdict", "what", "figures"} for one in check["ranks"])
    assert answer["environment"]["world_size"] == 2
    assert answer["environment"]["launcher"] == "torchrun"
    assert answer["environment"]["torch"] == torch.__version__
    figures = {check["name"]: check["ranks"][1]["figures"] for check in answer["checks"]}
    assert figures["reading"]["finite"]
    assert figures["dry run"]["micro_batch"] == 2
    assert figures["dry run"]["peak_bytes"] > 1e6
    assert figures["bandwidth"]["all_reduce_seconds"]
    assert "doctor: dry run" in done.stderr, "what takes long is told"
    assert (contents(tmp_path), contents(real_store)) == before
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_rank_without_the_store_is_named_and_hangs_nobody(words: list[str]) -> None:
    answer, checks = visit(3, "store", *words, "train.global_batch=3")
    assert checks["store"]["verdict"] == "sick"
    assert [one["verdict"] for one in checks["store"]["ranks"]] == ["well", "well", "sick"]
    host = checks["store"]["ranks"][2]["host"]
    assert answer["sick_hosts"] == [host]
    assert f"rank 2 on {host}: none.zarr" in checks["store"]["what"]
    assert checks["reading"]["verdict"] == checks["dry run"]["verdict"] == "not known"
    assert checks["matrix product"]["verdict"] != "not known", "what needs no store is looked at"
    if host != socket.gethostname():  # Ranks may have host names of their own here: three hosts, three links.
        links = [one["figures"]["pair_bytes_per_second"] for one in checks["bandwidth"]["ranks"]]
        assert [set(one) for one in links] == [
            {"host0 host1", "host2 host0"},
            {"host0 host1", "host1 host2"},
            {"host1 host2", "host2 host0"},
        ]


@pytest.mark.slow
def test_a_rank_that_dies_is_named(words: list[str]) -> None:
    answer, checks = visit(2, "SIGKILL", *words, "--quick")
    silent = [
        one for check in checks.values() for one in check["ranks"] if one["verdict"] == "sick" and "is silent" in one["what"]
    ]
    assert [one["rank"] for one in silent] == [1]
    assert answer["sick_hosts"] == [socket.gethostname()]


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_says_what_to_change(words: list[str]) -> None:
    answer, checks = visit(2, "memory", *words, "train.global_batch=1024")
    ranks = checks["dry run"]["ranks"]
    assert [one["verdict"] for one in ranks] == ["not known", "sick"]
    assert "out of memory with 512 clips" in ranks[1]["what"]
    assert "train.micro_batch=256 or model.checkpoint_stages=[0,1]" in ranks[1]["what"]
    assert answer["sick_hosts"] == [socket.gethostname()]


@pytest.mark.slow
def test_it_runs_under_mpiexec_and_prints_a_table(words: list[str]) -> None:
    done = swiftv2_run(["doctor", *words, "--quick"], ranks=2, launcher="mpiexec")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"ranks +well +2 ranks on 1 host, started by mpirun", done.stdout)
    assert re.search(r"dry run +not known +not looked at: --quick", done.stdout)
    assert re.search(r"^well", done.stdout.splitlines()[-1])


def test_a_run_that_another_process_writes_is_sick_and_left_alone(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    with Lease.acquire(run, attempt=1) as held:
        content = held.path.read_bytes()
        assert main(["doctor", *words, "--quick", "--json"]) == 1
        assert held.path.read_bytes() == content
        assert held.lost is None
    answer = json.loads(capsys.readouterr().out)
    (lease,) = [check for check in answer["checks"] if check["verdict"] == "sick"]
    assert lease["name"] == "lease"
    assert "is being written by process" in lease["what"]
    assert answer["sick_hosts"] == [], "a run in use is no fault of a host"
    assert main(["doctor", *words, "--quick"]) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_too_small_for_the_checkpoints_is_sick(
    words: list[str], small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def disk() -> str:
        assert main(["doctor", *words, "--quick", "--json", f"run.dir={small_disk / 'run'}"]) == 1
        answer = json.loads(capsys.readouterr().out)
        (sick,) = [check for check in answer["checks"] if check["verdict"] == "sick"]
        assert sick["name"] == "disk"
        return str(sick["what"])

    assert re.search(r"rank 0 on .*: 2\d\.\d MB free where \d+\.\d MB are wanted for checkpoints", disk())
    (small_disk / "fill").write_bytes(bytes(15_000_000))
    assert "No space left on device" in disk()
    assert [path.name for path in small_disk.iterdir()] == ["fill"]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.global_batch=0", "train.global_batch takes"),
        ("model.image_size=[20, 18, 10]", "is not the grid of"),
        ("data.cohorts=[abcd]", "the store has no cohort 'abcd'"),
        ("data.exclude=none.json", "none.json: cannot be read"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_status_2(
    word: str, says: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *words, word]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert says in line
    assert out == ""


def test_a_device_that_is_not_there_is_sick(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["doctor", *words, "engine.device=cuda", "--json"]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["devices"]["verdict"] == "sick"
    assert "finds no GPU" in checks["devices"]["what"]
    assert checks["dry run"]["verdict"] == "not known"
