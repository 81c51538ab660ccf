"""The run directory and its lease: lines torn by kills, changed configurations, second writers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from swiftv2.engine import lease
from swiftv2.engine.launch import World
from swiftv2.engine.lease import Lease
from swiftv2.engine.rundir import RunDirectory
from swiftv2.errors import SwiftError, UsageError
from swiftv2.records import STALE_SECONDS, read_lines, read_metrics

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
CONFIG = "train:\n  max_steps: 10\n  global_batch: 8\noptimizer:\n  lr: 0.1\n"


def _attempt(path: Path, config: str = CONFIG) -> RunDirectory:
    return RunDirectory.open(path, config, ALONE)


def test_a_run_directory_holds_what_is_needed_to_go_on(tmp_path: Path) -> None:
    with _attempt(tmp_path / "run") as run:
        run.metrics(1, {"loss": 0.5, "gradient_norm": float("nan")})
        run.event("saved", 1, folder="step_1")
    assert (run.path / "config.yaml").read_text() == CONFIG
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["command"] == sys.orig_argv
    script = run.path / "resume.sh"
    assert os.access(script, os.X_OK)
    assert f"cd {Path.cwd()}" in script.read_text()
    (row,) = read_metrics(run.path / "metrics.jsonl")
    assert list(row)[:3] == ["step", "attempt", "time"]
    assert (row["step"], row["attempt"], row["loss"], row["gradient_norm"]) == (1, 1, 0.5, None)
    assert [e["event"] for e in read_lines(run.path / "events.jsonl")] == ["start", "saved"]


def test_a_failure_is_written_down(tmp_path: Path) -> None:
    def fail() -> None:
        with _attempt(tmp_path):
            raise SwiftError("the disk is full\nand so on")

    with pytest.raises(SwiftError):
        fail()
    *_, failed = read_lines(tmp_path / "events.jsonl")
    assert (failed["event"], failed["error"], failed["problem"]) == ("failed", "SwiftError", "the disk is full")
    with _attempt(tmp_path) as run:
        assert run.attempt == 2, "the lease was given back"


def test_attempts_count_up_and_the_last_one_speaks_for_a_step(tmp_path: Path) -> None:
    with _attempt(tmp_path) as run:
        for step in (1, 2, 3):
            run.metrics(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "attempt": 1, "lo')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    with _attempt(tmp_path) as run:
        assert run.attempt == 2
        run.metrics(2, {"loss": 20.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["attempt"], row["loss"]) for row in rows] == [(1, 1, 1.0), (2, 2, 20.0), (3, 1, 3.0)]
    (tmp_path / "lease.json").unlink()
    with _attempt(tmp_path) as run:
        assert run.attempt == 3, "the lines themselves know the attempts"


def test_damage_in_the_middle_is_not_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(SwiftError, match="line 2 is damaged"):
        read_lines(path)


def test_only_stated_keys_may_change(tmp_path: Path) -> None:
    _attempt(tmp_path).close()
    with pytest.raises(UsageError, match=r"optimizer\.lr=0\.1 and cannot go on with optimizer\.lr=0\.2"):
        _attempt(tmp_path, CONFIG.replace("lr: 0.1", "lr: 0.2"))
    assert (tmp_path / "config.yaml").read_text() == CONFIG
    _attempt(tmp_path, CONFIG.replace("max_steps: 10", "max_steps: 20")).close()
    (change,) = [e for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "config_changed"]
    assert (change["key"], change["old"], change["new"]) == ("train.max_steps", 10, 20)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(SwiftError, match="not empty and no run directory"):
        _attempt(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_second_writer_is_refused_by_name(tmp_path: Path) -> None:
    with (
        _attempt(tmp_path),
        pytest.raises(SwiftError, match=f"is being written by process {os.getpid()} on .*attempt 1"),
    ):
        _attempt(tmp_path)
    _attempt(tmp_path).close()


def _lease_of_a_child(run_dir: Path) -> None:
    """What a process that was killed leaves: its lease, never released."""
    code = "import sys,os; from pathlib import Path; from swiftv2.engine.lease import Lease; "
    code += "Lease.acquire(Path(sys.argv[1]), 7); os.kill(os.getpid(), 9)"
    root = str(Path(lease.__file__).parents[2])
    subprocess.run([sys.executable, "-c", code, str(run_dir)], env=os.environ | {"PYTHONPATH": root}, check=False)


def test_a_dead_process_loses_its_lease_at_once(tmp_path: Path) -> None:
    _lease_of_a_child(tmp_path)
    assert lease.last_attempt(tmp_path) == 7
    with Lease.acquire(tmp_path, 8) as held:
        assert held.holder.pid == os.getpid()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lease.json"]


def _forge(run_dir: Path, **changes: object) -> None:
    with Lease.acquire(run_dir, 1):
        pass
    _change(run_dir, **{"released": False, "token": "other"} | changes)


def _change(run_dir: Path, **changes: object) -> None:
    path = run_dir / "lease.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_process_id_used_again_is_not_the_holder(tmp_path: Path) -> None:
    _forge(tmp_path)
    with pytest.raises(SwiftError, match="is being written by"):
        Lease.acquire(tmp_path, 2)
    started = json.loads((tmp_path / "lease.json").read_text())["started"]
    _change(tmp_path, started=started.partition("/")[0] + "/1")
    Lease.acquire(tmp_path, 2).release()


def test_another_host_is_believed_until_its_heartbeat_is_old(tmp_path: Path) -> None:
    _forge(tmp_path, host="elsewhere", started="boot/1")
    with pytest.raises(SwiftError, match="on elsewhere"):
        Lease.acquire(tmp_path, 2)
    old = time.time() - STALE_SECONDS - 5
    os.utime(tmp_path / "lease.json", (old, old))
    Lease.acquire(tmp_path, 2).release()


def test_a_requeued_job_takes_over_from_its_former_self(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _forge(tmp_path, host="elsewhere", started="boot/1", job="77", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with pytest.raises(SwiftError, match="Slurm job 77"):
        Lease.acquire(tmp_path, 2)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    Lease.acquire(tmp_path, 2).release()


def test_a_lease_that_a_dead_node_has_torn_holds_nobody_up_for_long(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    path.write_text("")
    with pytest.raises(SwiftError, match=r"lease\.json"):
        Lease.acquire(tmp_path, 2)
    old = time.time() - STALE_SECONDS - 5
    os.utime(path, (old, old))
    Lease.acquire(tmp_path, 2).release()


def test_a_taker_is_seen_at_once_by_who_asks(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    with Lease.acquire(tmp_path, 1, heartbeat_seconds=60.0) as held:
        assert held.taker() is None
        path.write_text(json.dumps(json.loads(path.read_text()) | {"token": "other", "host": "thief"}))
        assert held.lost is None, "the next beat is far away"
        assert "on thief" in str(held.taker())


def test_the_heartbeat_goes_on_and_a_lost_lease_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    with Lease.acquire(tmp_path, 1, heartbeat_seconds=0.02) as held:
        first = path.stat().st_mtime_ns
        time.sleep(0.2)
        assert path.stat().st_mtime_ns > first
        assert held.lost is None
        path.write_text(json.dumps(json.loads(path.read_text()) | {"token": "other", "host": "thief"}))
        time.sleep(0.2)
        assert held.lost is not None
        assert "on thief" in held.lost
    assert json.loads(path.read_text())["host"] == "thief", "a lease of others is not released"


def test_a_former_start_that_lives_on_has_found_out_before_its_successor_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm requeues a job, too, whose node it has only lost sight of."""
    monkeypatch.setenv("SLURM_JOB_ID", "117")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    former = Lease.acquire(tmp_path, 1, heartbeat_seconds=0.3)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    began = time.monotonic()
    with Lease.acquire(tmp_path, 2, heartbeat_seconds=0.3) as successor:
        assert 0.3 < time.monotonic() - began < 1.5
        assert former.lost is not None
        assert "attempt 2" in former.lost
        assert successor.taker() is None
        lost = RunDirectory(tmp_path, 1, ALONE, former)
        with pytest.raises(SwiftError, match=r"was taken over by .* this process ends without writing"):
            lost.metrics(1, {"loss": 1.0})
        former.release()
        assert successor.taker() is None, "a former holder gives nothing back"


def test_nothing_is_waited_for_where_the_former_start_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import os, sys; from pathlib import Path; from swiftv2.engine.lease import Lease;"
        "Lease.acquire(Path(sys.argv[1]), 1); os._exit(9)"
    )
    gone = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ
        | {"SLURM_JOB_ID": "117", "SLURM_RESTART_COUNT": "0", "PYTHONPATH": str(Path(lease.__file__).parents[2])},
        check=False,
        timeout=60,
    )
    assert gone.returncode == 9
    monkeypatch.setenv("SLURM_JOB_ID", "117")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    began = time.monotonic()
    with Lease.acquire(tmp_path, 2):
        assert time.monotonic() - began < 2
