"""Trackers with their real libraries: they hold what metrics.jsonl holds, and nothing of them stops, slows or names anybody."""

import json
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from swiftv2.config.load import presets_root, read_yaml
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.config.tracking import TrackingConfig
from swiftv2.engine.launch import World
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.trackers import clerk
from swiftv2.engine.trackers.courier import Courier
from swiftv2.engine.trackers.desk import Trackers
from swiftv2.engine.trackers.tracker import Order, check
from swiftv2.engine.trackers.wandb import read_lines as read_wandb
from swiftv2.errors import UsageError
from swiftv2.files import read_json
from swiftv2.records import read_lines
from swiftv2.report.tracked import missing, read_neptune

pytestmark = pytest.mark.slow

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SECRET, SUBJECT = "t0ken-9f8e7d6c", "sub-NDAR12345"
PROMPT = 0.5
"""Seconds within which a line is taken, whatever its tracker does: a busy machine's hiccup, far below any server's limit."""


def _config(folder: Path, **tracking: Any) -> PretrainConfig:
    tree = read_yaml(presets_root() / "model" / "tiny.yaml")
    values = {
        "run": {"dir": folder / "run", "seed": 7},
        "data": {"store": folder / f"{SUBJECT}.zarr"},
        "clip": {"frames": 4},
        "model": tree,
        "mask": {"patch_size": tree["patch_size"]},
        "train": {"max_steps": 8, "global_batch": 2},
        "tracking": tracking,
    }
    return PretrainConfig.model_validate(values)


def _attempt(folder: Path, config: PretrainConfig, steps: range, scale: float = 1.0) -> float:
    """Log so many steps as a run does; the longest that one of them took."""
    longest = 0.0
    with RunDirectory.open(folder / "run", "run: {}\n", ALONE, ("run",)) as run, Trackers(config.tracking, config, run, ALONE):
        for step in steps:
            began = time.perf_counter()
            run.metrics(step, {"loss": scale / step, "skipped": step == 2, "heldout/all/r2/model": None, "note": SUBJECT})
            longest = max(longest, time.perf_counter() - began)
    return longest


def _written(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in (folder / "run").rglob("*"):
        if path.is_file() and path.parent.name != "run":
            yield path, path.read_bytes()


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEPTUNE_API_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)


@pytest.mark.usefixtures("secrets")
def test_all_hold_what_the_metrics_hold_and_go_on_under_one_id(tmp_path: Path) -> None:
    config = _config(tmp_path, neptune="offline", wandb="offline")
    _attempt(tmp_path, config, range(1, 7))
    first = read_json(tmp_path / "run" / "trackers.json")
    assert {name: (one["sent"], one["dropped"]) for name, one in first["trackers"].items()} == {
        "tensorboard": (6, 0),
        "neptune": (6, 0),
        "wandb": (6, 0),
    }
    # After a kill, steps 5 and 6 are done again with other numbers.
    _attempt(tmp_path, config, range(5, 9), scale=2.0)
    second = read_json(tmp_path / "run" / "trackers.json")
    assert second["id"] == first["id"]
    wanted = {step: (1.0 if step < 5 else 2.0) / step for step in range(1, 9)}

    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    shown = {event.step: event.value for event in board.Scalars("loss")}
    assert shown == pytest.approx(wanted, rel=1e-6)  # TensorBoard keeps float32
    assert [event.step for event in board.Scalars("loss")] == sorted(wanted)

    offline = read_neptune(tmp_path / "run" / "neptune")
    assert offline.series["loss"] == wanted
    assert not offline.damaged
    assert offline.ids == {first["id"]}
    assert missing(offline, tmp_path / "run") == {}

    kept = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(kept) == 2
    assert all(folder.name.endswith(first["id"]) for folder in kept)
    rows = [row for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")) for row in read_wandb(path)]
    assert {int(row["step"]): float(row["loss"]) for row in rows} == wanted
    assert [int(row["step"]) for row in rows] == [*range(1, 7), *range(5, 9)]
    assert all(float(row["skipped"]) == (row["step"] == "2") for row in rows)

    for path, content in _written(tmp_path):
        assert SECRET.encode() not in content, path
        if path.suffix != ".log" or "debug" not in path.name:  # W&B's own log names its folder, and is not sent.
            assert SUBJECT.encode() not in content, path
            assert str(tmp_path).encode() not in content, path
    assert SECRET not in (tmp_path / "run" / "events.jsonl").read_text() + (tmp_path / "run" / "trackers.json").read_text()


def test_the_id_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step_4"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "trainer.json").write_text(json.dumps({"step": 4, "tracker_id": "abc123"}))
    (tmp_path / "run" / "config.yaml").write_text("run: {}\n")
    _attempt(tmp_path, _config(tmp_path), range(5, 6))
    assert read_json(tmp_path / "run" / "trackers.json")["id"] == "abc123"


def _silent() -> tuple[socket.socket, int]:
    """A port that takes connections and never answers."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(8)
    return listening, listening.getsockname()[1]


@pytest.mark.parametrize("answers", [True, False])
def test_a_dead_server_delays_nothing_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, answers: bool) -> None:
    listening, port = _silent()
    if not answers:
        listening.close()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    # Neptune's token holds the address of its server.
    token = "eyJhcGlfYWRkcmVzcyI6Imh0dHA6Ly8xMjcuMC4wLjE6MSIsImFwaV91cmwiOiJodHRwOi8vMTI3LjAuMC4xOjEifQ=="  # noqa: S105 (no secret)
    monkeypatch.setenv("NEPTUNE_API_TOKEN", token)
    modes = {"neptune": "online", "wandb": "online", "neptune_project": "a/b", "wandb_project": "b"}
    config = _config(tmp_path, **modes, connect_seconds=4, close_seconds=6)
    began = time.monotonic()
    assert _attempt(tmp_path, config, range(1, 9)) < PROMPT
    assert time.monotonic() - began < 12
    trackers = read_json(tmp_path / "run" / "trackers.json")["trackers"]
    assert trackers["tensorboard"]["sent"] == 8
    for name in ("neptune", "wandb"):
        assert trackers[name]["sent"] == 0
        assert trackers[name]["problem"]
    told = [row["problem"] for row in read_lines(tmp_path / "run" / "events.jsonl") if row["event"] == "tracker"]
    assert {one.split()[0].rstrip(":") for one in told} >= {"neptune", "wandb"}
    assert token not in (tmp_path / "run" / "events.jsonl").read_text()
    listening.close()


def _order(tmp_path: Path) -> Order:
    return Order("tensorboard", "offline", str(tmp_path / "board"), "x", None, {}, 1)


def test_a_tracker_that_hangs_is_left_behind_with_bounded_lines(tmp_path: Path) -> None:
    told: list[str] = []
    courier = Courier(_order(tmp_path), TrackingConfig(queue=10), told.append)
    courier._process.send_signal(19)
    values = {f"value/{index}": 1.0 for index in range(2000)}
    longest = 0.0
    for step in range(1, 200):
        began = time.perf_counter()
        courier.put(step, values)
        longest = max(longest, time.perf_counter() - began)
    assert longest < PROMPT
    courier.end()
    began = time.monotonic()
    courier.wait(began + 1.0)
    assert time.monotonic() - began < 3
    assert courier.dropped >= 190 - 12
    assert courier.sent == 0
    assert "did not end within" in told[-1]
    assert courier._process.poll() is not None


def test_a_folder_that_cannot_be_written_costs_the_tracker_alone(tmp_path: Path) -> None:
    told: list[str] = []
    (tmp_path / "board").write_text("a file where the folder should be")
    courier = Courier(_order(tmp_path), TrackingConfig(), told.append)
    courier.put(1, {"loss": 1.0})
    deadline = time.monotonic() + 30
    while not told and time.monotonic() < deadline:
        time.sleep(0.05)
    courier.end()
    courier.wait(time.monotonic() + 5)
    assert "FileExistsError" in told[0]
    assert "the run goes on" in told[0]
    assert (courier.sent, courier.dropped) == (0, 1)


def test_a_tracker_that_cannot_be_started_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    _attempt(tmp_path, _config(tmp_path), range(1, 4))
    assert [row["step"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    told = [row["problem"] for row in read_lines(tmp_path / "run" / "events.jsonl") if row["event"] == "tracker"]
    assert "tensorboard is not told: its process cannot be started" in told[0]


def test_a_document_that_cannot_be_written_fails_no_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "trackers.json").mkdir(parents=True)
    (tmp_path / "run" / "trackers.json" / "in the way").write_text("")
    (tmp_path / "run" / "config.yaml").write_text("run: {}\n")
    _attempt(tmp_path, _config(tmp_path), range(1, 4))
    assert not [row for row in read_lines(tmp_path / "run" / "events.jsonl") if row["event"] == "failed"]
    assert not list((tmp_path / "run").glob(".trackers.json*")), "nor does what could not be put there stay"


def test_no_part_of_a_secret_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    told = clerk._told(OSError("x" * (clerk._LONGEST_PROBLEM - len("OSError: ") - len(SECRET) // 2) + SECRET))
    assert SECRET[:4] not in told
    assert len(told) <= clerk._LONGEST_PROBLEM


@pytest.mark.parametrize("name", ["tensorboard", "neptune", "wandb"])
def test_a_full_disk_is_told_and_costs_the_run_nothing(tmp_path: Path, name: str) -> None:
    told: list[str] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file of the tracker's process may grow beyond this: writing fails there as on a disk that is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        order = Order(name, "offline", str(tmp_path / name), "x", None, {}, 1)
        courier = Courier(order, TrackingConfig(), told.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    values = {f"value/{index}": 0.1 * index for index in range(30)}
    longest = 0.0
    for step in range(1, 401):
        began = time.perf_counter()
        courier.put(step, values)
        longest = max(longest, time.perf_counter() - began)
        time.sleep(0.002)
    courier.end()
    courier.wait(time.monotonic() + 20)
    assert longest < PROMPT
    assert courier.errors > 0
    assert "large" in str(courier.problem) or "disk full" in str(courier.problem)
    assert name in told[0]
    assert courier._process.poll() is not None


def test_a_killed_run_leaves_no_process_and_its_last_lines(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from swiftv2.config.tracking import TrackingConfig\n"
        "from swiftv2.engine.trackers.courier import Courier\n"
        "from swiftv2.engine.trackers.tracker import Order\n"
        f"order = Order('tensorboard', 'offline', {str(tmp_path / 'board')!r}, 'x', None, {{}}, 1)\n"
        "courier = Courier(order, TrackingConfig(), print)\n"
        "for step in range(1, 21):\n"
        "    courier.put(step, {'loss': 1.0 / step})\n"
        "while courier.sent < 20:\n"
        "    time.sleep(0.02)\n"
        "print(courier._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    pid = int(done.stdout.split()[-1])
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 21))


def test_a_tracker_that_hangs_does_not_outlive_a_killed_run_for_long(tmp_path: Path) -> None:
    script = tmp_path / "clerk.py"
    script.write_text(
        "import time\n"
        "from swiftv2.engine.trackers import clerk\n"
        "clerk._ORPHAN_SECONDS, clerk._LOOK_SECONDS = 0.5, 0.05\n"
        "clerk.open_tracker = lambda order: time.sleep(600)\n"
        "clerk.main()\n"
    )
    # A shell stands for the run: it ends at once, while its child has the order and an input that stays open.
    order = clerk.ordered(_order(tmp_path), 0.5)
    line = json.dumps(json.loads(order) | {"parent": "PARENT"}).replace('"PARENT"', "$$")
    served = f"{sys.executable} {script} >/dev/null 2>&1"
    words = f"{{ cat <<END; sleep 6; }} 2>/dev/null | {served} & echo $!; sleep 2\n{line}\nEND\n"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60, check=False)
    pid = int(done.stdout.split()[0])
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()


def test_other_ranks_tell_nobody(tmp_path: Path) -> None:
    config = _config(tmp_path)
    before = threading.active_count()
    with RunDirectory.open(tmp_path / "run", "run: {}\n", ALONE, ("run",)) as run:
        trackers = Trackers(config.tracking, config, run, World(1, 2, 1, 2, torch.device("cpu")))
        assert trackers.counts() == {}
        assert run.listeners == []
        assert threading.active_count() <= before + 1  # the lease's heartbeat
    assert not (tmp_path / "run" / "trackers.json").exists()


def test_what_is_missing_is_said_before_anything_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    check({"tensorboard": "offline", "neptune": "offline"}, {})
    with pytest.raises(UsageError, match="NEPTUNE_API_TOKEN"):
        check({"neptune": "online"}, {})
    monkeypatch.setattr("swiftv2.engine.trackers.tracker.find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(UsageError, match=r"pip install 'swiftv2\[wandb\]'"):
        check({"wandb": "offline"}, {})
