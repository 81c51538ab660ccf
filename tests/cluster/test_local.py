"""Elements run on this machine by `swiftv2 sweep submit --local`: in order, side by side, stopped, failed and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import environment, kill

from swiftv2 import cli

CONFIG = """
run: {dir: unused}
data: {normalisation: {kind: per_voxel}, split: {fractions: [0.5, 0.5, 0.0]}}
clip: {frames: 8}
model:
  name: tiny
  image_size: [10, 18, 10]
  frames: 8
  embed_dim: 8
  depths: [2, 2]
  num_heads: [2, 4]
  patch_size: [2, 3, 2, 2]
mask: {patch_size: [2, 3, 2, 2]}
engine: {backend: plain, precision: fp32, device: cpu}
train: {max_steps: 1, global_batch: 2, save_every: 100000, evaluate_every: 100000, save_minutes: 0}
"""
LADDER: dict[str, Any] = {
    "config": "tiny.yaml",
    "folder": "runs/tiny",
    "sizes": [{"name": "w8", "set": ["model.embed_dim=8"]}, {"name": "w16", "set": ["model.embed_dim=16"], "nodes": 2}],
    "budgets": {"tokens": [4800], "least_steps": 2},
    "learning_rate": {"rule": "fixed", "rate": 1e-3},
    "schedule": {"kind": "trunk", "warmup": 0.0, "cooldown": 0.5},
    "tasks_per_node": 1,
}


@pytest.fixture
def place(tmp_path: Path, real_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a ladder, where commands are given; Slurm is not on the path."""
    monkeypatch.chdir(tmp_path)
    for name in ("PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, environment()[name])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SWIFTV2_ROOT", raising=False)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    write(tmp_path, common=[f"data.store={real_store}"])
    return tmp_path


def write(place: Path, **changes: Any) -> None:
    (place / "ladder.yaml").write_text(yaml.safe_dump(LADDER | changes, sort_keys=False))


def answered(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> tuple[Any, list[str]]:
    """A command's JSON, and the lines that it said meanwhile."""
    capsys.readouterr()
    assert cli.main(["sweep", *words, "--json"]) == status
    said = capsys.readouterr()
    return json.loads(said.out), said.err.splitlines()


def at(lines: Sequence[str], text: str) -> int:
    return next(place for place, line in enumerate(lines) if text in line)


@pytest.mark.slow
def test_a_ladder_runs_here_in_order_and_what_is_done_is_skipped(
    place: Path, real_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place, common=[f"data.store={real_store}"], sizes=LADDER["sizes"][:1])
    found, said = answered(capsys, "submit", "ladder.yaml", "--local", "2")
    assert found["done"] == ["w8-trunk", "w8-t_4800"]
    assert not found["failed"] | found["stopped"] | found["passed_over"]
    assert at(said, "w8-trunk: started, output in runs/tiny/local-0.out") < at(said, "w8-trunk: done")
    assert at(said, "w8-trunk: done") < at(said, "w8-t_4800: started")
    rows = (place / "runs/tiny/w8-t_4800/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [3, 4], "a branch goes on from its trunk"
    again, _ = answered(capsys, "submit", "ladder.yaml", "--local", "1")
    assert again["passed_over"] == dict.fromkeys(found["done"], "finished")
    assert (again["done"], again["cost"]["left"]) == ([], 0)
    assert answered(capsys, "status", "ladder.yaml")[0]["counts"] == {"finished": 2}
    table, _ = answered(capsys, "collect", "ladder.yaml", "--out", "table")
    assert (table["rows"], set(table["left_out"])) == (1, {"w8-trunk"})
    plan, _ = answered(capsys, "plan", "ladder.yaml")
    assert [one["done"] for one in plan["elements"]] == [True, True]
    assert plan["cost"]["node_hours"] == 0


@pytest.mark.slow
def test_what_waits_for_a_failure_is_not_started_and_others_go_on(
    place: Path, real_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elements = [
        {"name": "broken", "set": ["model.image_size=[12, 18, 10]"]},
        {"name": "child", "after": ["broken"]},
        {"name": "grandchild", "after": ["child"]},
        {"name": "other"},
    ]
    tree = {"config": "tiny.yaml", "folder": "runs/x", "common": [f"data.store={real_store}"], "elements": elements}
    (place / "x.yaml").write_text(yaml.safe_dump(tree))
    found, said = answered(capsys, "submit", "x.yaml", "--local", "2", status=1)
    assert found["done"] == ["other"]
    assert at(said, "other: started") < at(said, "broken: failed"), "two run side by side"
    assert "is not the grid of" in found["failed"]["broken"]
    assert "runs/x/local-0.out" in found["failed"]["broken"]
    assert found["failed"]["child"] == "broken, for which it waits, has failed"
    assert found["failed"]["grandchild"] == "child, for which it waits, has failed"
    assert not (place / "runs/x/child").exists()
    alone, _ = answered(capsys, "submit", "x.yaml", "--local", "1", "--only", "child", status=1)
    assert alone["failed"] == {"child": "broken, for which it waits, has not finished"}


@pytest.mark.slow
def test_an_interrupt_stops_what_runs_with_its_state_saved_and_the_same_command_goes_on(
    place: Path, real_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elements: list[dict[str, Any]] = [{"name": "long", "set": ["train.max_steps=100000"]}, {"name": "next", "after": ["long"]}]
    tree = {"config": "tiny.yaml", "folder": "runs/x", "common": [f"data.store={real_store}"], "elements": elements}
    (place / "x.yaml").write_text(yaml.safe_dump(tree))
    line = [sys.executable, "-m", "swiftv2", "sweep", "submit", "x.yaml", "--local", "1", "--json"]
    started = subprocess.Popen(
        line, cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        metrics, end = place / "runs/x/long/metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size):
            assert time.monotonic() < end
            assert started.poll() is None
            time.sleep(0.1)
        # As the keyboard does: to the whole group of the command, of which its elements are none.
        os.killpg(started.pid, signal.SIGINT)
        out, said = started.communicate(timeout=120)
    finally:
        if started.poll() is None:
            kill(started.pid)
            started.communicate()
    assert started.returncode == 75, out + said
    found = json.loads(out)
    assert found["stopped"] == {"long": "stopped with its state saved", "next": "it was not started any more"}
    assert not found["failed"]
    events = [json.loads(row) for row in (place / "runs/x/long/events.jsonl").read_text().splitlines()]
    stopped = next(row for row in events if row["event"] == "stopped")
    assert (place / f"runs/x/long/checkpoints/step_{stopped['step']}").is_dir()
    assert not (place / "runs/x/next").exists()
    elements[0]["set"] = [f"train.max_steps={stopped['step'] + 1}"]
    (place / "x.yaml").write_text(yaml.safe_dump(tree))
    again, _ = answered(capsys, "submit", "x.yaml", "--local", "1", "--only", "long")
    assert again["done"] == ["long"]
    events = [json.loads(row) for row in (place / "runs/x/long/events.jsonl").read_text().splitlines()]
    assert [row["step"] for row in events if row["event"] == "resumed"] == [stopped["step"]]


# Without running anything


def fails(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> str:
    capsys.readouterr()
    assert cli.main(["sweep", *words]) == status
    return capsys.readouterr().err


def test_a_rehearsal_tells_the_commands_and_leaves_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.rglob("*"))
    commands, _ = answered(capsys, "submit", "ladder.yaml", "--local", "2", "--dry-run", "data.threads=1")
    line = commands["commands"]["w8-t_4800"]
    assert line[1:5] == ["-m", "swiftv2", "pretrain", "tiny.yaml"]
    assert line[-2:] == ["data.threads=1", "run.dir=runs/tiny/w8-t_4800"]
    assert 'run.branch_from="runs/tiny/w8-trunk"' in line
    assert sorted(place.rglob("*")) == before


@pytest.mark.usefixtures("place")
def test_a_ladder_becomes_arrays_by_size_behind_their_trunks(capsys: pytest.CaptureFixture[str]) -> None:
    arrays = answered(capsys, "submit", "ladder.yaml", "--dry-run")[0]["arrays"]
    told = [([one["name"] for one in array["elements"]], array["command"]) for array in arrays]
    assert [names for names, _ in told] == [["w8-trunk"], ["w8-t_4800"], ["w16-trunk"], ["w16-t_4800"]]
    for names, command in told:
        wide = names[0].startswith("w16")
        assert ("--nodes=2" in command) == wide
        assert "--ntasks-per-node=1" in command
        waits = [word for word in command if word.startswith("--dependency")]
        assert bool(waits) == names[0].endswith("t_4800")


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--local", "0"], 2, "--local 0: give how many elements run at a time"),
        (["--local", "1", "--after", "7"], 2, "--after waits for a Slurm job"),
        (["--local", "1", "--only", "w9"], 2, "--only w9: the sweep has no element of that name"),
        (["--local", "1", "optimizer.lr=1"], 2, "optimizer.lr is made by the ladder"),
        (["--at-most-node-hours", "1e-9", "--flops-per-second", "1e9"], 2, "more than the 1e-09 node-hours that it may take"),
        (["--at-most-node-hours", "1"], 2, "cannot be told: give --gpu or --flops-per-second"),
    ],
)
def test_what_is_wrong_or_too_dear_is_refused_before_anything_is_run(
    words: list[str], status: int, says: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in fails(capsys, status, "submit", "ladder.yaml", *words)
    assert not (place / "runs").exists()


def test_a_plain_sweep_has_no_planned_cost(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "x.yaml").write_text("config: tiny.yaml\nfolder: runs/x\ngrid: {run.seed: [0, 1]}\n")
    assert "is a plain sweep: a ladder has sizes" in fails(capsys, 2, "plan", "x.yaml")
    assert "--at-most-node-hours is for ladders" in fails(capsys, 2, "submit", "x.yaml", "--at-most-node-hours", "1")
