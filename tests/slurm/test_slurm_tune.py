"""A study on a real Slurm: an array of workers, one of which is killed; the study ends complete, and grows the next day."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster
from launched import ROOT, environment

from swiftv2.records import EVENTS, read_lines

pytestmark = pytest.mark.slow

FINETUNE = """
run: {dir: unused}
task:
  name: generated
  targets: [{column: coupling_strong, kind: classification}]
  data: {store: STORE, normalisation: {kind: per_voxel}}
  clip: {frames: 4}
  clips_per_run: 2
  split: {kind: kfold, count: 3}
encoder:
  regime: scratch
  model:
    name: tiny
    image_size: [32, 32, 32]
    frames: 4
    embed_dim: 12
    depths: [1, 1]
    num_heads: [2, 4]
    patch_size: [8, 8, 8, 2]
schedule: {warmup_steps: 0}
engine: {precision: fp32, device: cpu, backend: plain}
train: {max_steps: 8, global_batch: 4, save_every: 2, evaluate_every: 2, save_minutes: 0, deepspeed_files: false}
evaluate: {bootstrap: 20}
"""
STUDY: dict[str, Any] = {
    "name": "slurm",
    "folder": "study",
    "finetune": "finetune.yaml",
    "space": {
        "optimizer.lr": {"kind": "float", "low": 1e-5, "high": 3.0, "log": True},
        "head.kind": {"kind": "categorical", "choices": ["linear", "mlp"]},
        "head.hidden": {"kind": "categorical", "choices": [8, 16], "when": {"head.kind": "mlp"}},
    },
    "trials": 12,
    "sampler": {"startup_trials": 4},
    "pruner": {"kind": "median", "startup_trials": 3},
}
OPTIONS = ("--gpus-per-node=1", "--cpus-per-task=1", "--time=1:00:00")


class Study:
    """A study in a folder, and the arrays that work on it."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def submit(self, *words: str, array: str) -> str:
        script = ROOT / "slurm" / "tune.sh"
        options = (*OPTIONS, f"--array={array}")
        return self.cluster.submit(script, "study.yaml", *words, env=environment(), options=options, folder=self.folder)

    def trials(self) -> list[dict[str, Any]]:
        path = self.folder / "study" / "status.json"
        return json.loads(path.read_text())["trials"] if path.exists() else []

    def until(self, holds: Callable[[list[dict[str, Any]]], bool], seconds: float) -> list[dict[str, Any]]:
        """The first trials of which something holds."""
        end = time.monotonic() + seconds
        while not holds(found := self.trials()):
            assert time.monotonic() < end, (found, self.logs())
            time.sleep(0.2)
        return found

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.folder.glob("*.out")))

    def workers(self) -> dict[str, int]:
        """Processes of the workers by name."""
        found = {}
        for pid in self.cluster.processes():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].decode() == sys.executable and words[3:5] == [b"tune", b"run"]:
                (index,) = (one.partition(b"=")[2] for one in variables if one.startswith(b"SLURM_ARRAY_TASK_ID="))
                found[index.decode()] = pid
        return found

    def starts(self, number: int) -> list[dict[str, Any]]:
        events = read_lines(self.folder / "study" / "trials" / f"trial_{number:04d}" / EVENTS)
        return [row for row in events if row["event"] in {"start", "resumed"}]


@pytest.fixture
def study(cluster: Cluster, generated_store: Path, tmp_path: Path) -> Study:
    (tmp_path / "finetune.yaml").write_text(FINETUNE.replace("STORE", str(generated_store)))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return Study(cluster, tmp_path)


def test_three_workers_share_twelve_trials_one_is_killed_and_the_study_ends_complete_and_grows(study: Study) -> None:
    job = study.submit(array="0-2")
    # The first trials are not ended early: of one that has saved, the worker is lost.
    study.until(lambda rows: any(row["state"] == "running" and (row["steps"] or 0) >= 2 for row in rows), 240)
    victim = next(row for row in study.trials() if row["state"] == "running" and (row["steps"] or 0) >= 2)
    index = victim["worker"].rpartition("_")[2].partition("-")[0]
    os.kill(study.workers()[index], signal.SIGKILL)

    rows = study.until(lambda rows: len(rows) == 12 and all(row["state"] != "running" for row in rows), 600)
    states = {state: [row["number"] for row in rows if row["state"] == state] for state in ("complete", "pruned", "failed")}
    assert not states["failed"], [row["reason"] for row in rows]
    assert len(states["complete"]) >= 3
    assert states["pruned"], "nothing was ended early"
    # By the one that came back, or by another that had nothing to do: gone on with, not begun again.
    assert rows[victim["number"]]["losses"] <= 1
    told = study.starts(victim["number"])
    assert [row["event"] for row in told].count("start") >= 2
    assert [row["step"] for row in told if row["event"] == "resumed"][-1] >= 2
    assert len({row["worker"] for row in rows}) == 3
    for row in rows:
        settings = yaml.safe_load((study.folder / "study" / "trials" / f"trial_{row['number']:04d}.yaml").read_text())
        assert settings["optimizer"]["lr"] == row["settings"]["optimizer.lr"]
        assert settings["evaluate"]["test"] is False
    for element in range(3):
        study.cluster.wait(f"{job}_{element}", "COMPLETED", 120)

    job = study.submit("trials=15", array="0-1")
    for element in range(2):
        study.cluster.wait(f"{job}_{element}", "COMPLETED", 300)
    grown = study.trials()
    assert len(grown) == 15
    assert grown[:12] == rows
    assert {row["state"] for row in grown} <= {"complete", "pruned"}


def test_a_worker_that_is_told_to_stop_goes_on_with_its_trial(study: Study) -> None:
    job = study.submit("trials=1", array="0-0")
    study.until(lambda rows: bool(rows) and (rows[0]["steps"] or 0) >= 2, 120)
    study.cluster.cancel(f"{job}_0", "USR1")
    study.cluster.wait(f"{job}_0", "RUNNING", 90, restarts=1)
    study.cluster.wait(f"{job}_0", "COMPLETED", 180)
    (row,) = study.trials()
    assert (row["state"], row["losses"]) == ("complete", 0)
    assert any(one["event"] == "resumed" for one in study.starts(0))


def test_a_wrong_word_ends_the_job_before_its_worker(study: Study) -> None:
    job = study.submit("trails=3", array="0-0")
    study.cluster.wait(f"{job}_0", "FAILED", 60)
    assert "did you mean trials" in study.logs()
    assert not (study.folder / "study").exists()
