"""Workers of a study as real processes: they share trials, lose and find them again, stop and go on, and end the study once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import swiftv2
from swiftv2.cli import main
from swiftv2.config.load import build
from swiftv2.config.tune import TuneConfig, load_study
from swiftv2.errors import SwiftError, UsageError
from swiftv2.records import read_lines
from swiftv2.terminal import warn
from swiftv2.tuning.child import environment
from swiftv2.tuning.finish import finish
from swiftv2.tuning.worker import Worker

WORKERS = Path(__file__).parent / "workers"
PRETENDED = [sys.executable, str(WORKERS / "pretend_finetune.py")]
STUDY: dict[str, Any] = {
    "name": "pretended",
    "folder": "study",
    "finetune": "scratch",
    "set": ["encoder.model=tiny", "task.data.store=cohort.zarr", "task={preset: generated}"],
    "space": {"optimizer.lr": {"kind": "float", "low": 1e-5, "high": 1e-1, "log": True}},
    "trials": 6,
    "sampler": {"startup_trials": 3},
    "pruner": {"kind": "none"},
    "seeds": 3,
}


class Study:
    """A study of pretended runs, its workers, and what they have left."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder / "study", folder / "study.yaml"
        self.running: list[subprocess.Popen[bytes]] = []

    def say(self, **values: Any) -> None:
        self.path.write_text(yaml.safe_dump({**STUDY, "folder": str(self.folder), **values}, sort_keys=False))

    def config(self, *words: str) -> TuneConfig:
        return load_study(str(self.path), words)

    def pace(self, seconds: float) -> None:
        (self.folder.parent / "pace").write_text(str(seconds))

    def start(self, name: str, *words: str, verb: str = "run") -> subprocess.Popen[bytes]:
        root = str(Path(swiftv2.__file__).parents[1])
        variables = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        log = (self.folder.parent / f"{name}.log").open("ab")
        started = [sys.executable, str(WORKERS / "pretend_worker.py"), verb, str(self.path), name, *words]
        with log:
            self.running.append(subprocess.Popen(started, env=variables, stderr=log))
        return self.running[-1]

    def log(self, name: str) -> str:
        return (self.folder.parent / f"{name}.log").read_text()

    def trials(self) -> list[dict[str, Any]]:
        path = self.folder / "status.json"
        return json.loads(path.read_text())["trials"] if path.exists() else []

    def until(self, holds: Callable[[Sequence[Mapping[str, Any]]], bool], seconds: float = 60) -> list[dict[str, Any]]:
        end = time.monotonic() + seconds
        while not holds(found := self.trials()):
            assert time.monotonic() < end, found
            time.sleep(0.05)
        return found

    def events(self, number: int, kind: str) -> list[dict[str, Any]]:
        rows = read_lines(self.folder / "trials" / f"trial_{number:04d}" / "events.jsonl")
        return [row for row in rows if row["event"] == kind]


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    made = Study(tmp_path)
    made.say()
    yield made
    for process in made.running:
        process.kill()
        process.wait()


def saved(rows: Sequence[Mapping[str, Any]], count: int = 1) -> bool:
    return len([row for row in rows if row["state"] == "running" and (row["steps"] or 0) >= 2]) >= count


@pytest.mark.slow
def test_the_worker_that_keeps_the_study_is_killed_and_the_others_lose_nothing(study: Study) -> None:
    study.pace(0.2)
    workers = {name: study.start(name) for name in ("a", "b", "c")}
    study.until(lambda rows: saved(rows, 3))
    holder = json.loads((study.folder / "keeper" / "lease.json").read_text())
    name = next(name for name, process in workers.items() if process.pid == holder["pid"])
    lost = next(row["number"] for row in study.trials() if row["worker"] == name)
    workers[name].kill()
    assert workers.pop(name).wait() == -signal.SIGKILL
    study.pace(0.02)
    assert [process.wait(60) for process in workers.values()] == [0, 0]
    rows = study.trials()
    assert [row["state"] for row in rows] == ["complete"] * 6
    assert Counter(row["losses"] for row in rows) == {0: 5, 1: 1}
    assert rows[lost]["losses"] == 1
    first, second = study.events(lost, "start")
    assert first["resumed"] == 0
    assert second["resumed"] >= 2, "it went on from what its killed worker's run had saved"
    # Two runs of one trial never wrote at the same time: the first was told to save and to end.
    assert len(study.events(lost, "stopped")) == 1


@pytest.mark.slow
def test_a_worker_that_is_told_to_stop_leaves_with_75_and_the_same_command_goes_on(study: Study) -> None:
    study.say(trials=2)
    study.pace(0.2)
    worker = study.start("a")
    study.until(saved)
    worker.send_signal(signal.SIGUSR1)
    assert worker.wait(30) == 75
    assert len(study.events(0, "stopped")) == 1
    study.pace(0.0)
    assert study.start("a").wait(60) == 0
    rows = study.trials()
    assert [(row["state"], row["losses"]) for row in rows] == [("complete", 0), ("complete", 0)]
    assert study.events(0, "start")[1]["resumed"] >= 2
    # The next day.
    assert study.start("a", "trials=3").wait(60) == 0
    assert study.trials()[:2] == rows
    assert len(study.trials()) == 3


@pytest.mark.slow
def test_trials_that_are_worse_end_early_and_failures_say_why(study: Study) -> None:
    study.say(
        trials=8,
        sampler={"kind": "grid"},
        pruner={"kind": "median", "startup_trials": 2},
        space={
            "optimizer.lr": {"kind": "categorical", "choices": [1e-3, 2e-3, 0.05, 0.1]},
            "optimizer.weight_decay": {"kind": "categorical", "choices": [0.0, 0.25]},
        },
    )
    study.pace(0.05)
    assert study.start("a").wait(90) in {0, 1}
    if len(study.trials()) < 8:
        assert "the last 3 trials of this worker failed" in study.log("a")
        assert study.start("a").wait(90) == 0
    rows = study.trials()
    failed = [row for row in rows if row["settings"]["optimizer.weight_decay"] == 0.25]
    assert [row["state"] for row in failed] == ["failed"] * 4
    assert {row["reason"] for row in failed} == {"the loss is not finite"}
    others = [row for row in rows if row["settings"]["optimizer.weight_decay"] == 0.0]
    assert {row["settings"]["optimizer.lr"] for row in others if row["state"] == "complete"} >= {1e-3}
    for row in others:
        if row["state"] == "pruned":
            assert row["settings"]["optimizer.lr"] > 1e-3
            assert row["steps"] < 10
        assert not (study.folder / "trials" / f"trial_{row['number']:04d}" / "checkpoints").exists()


@pytest.mark.slow
def test_the_test_subjects_are_read_once_by_what_validation_chose(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    reads = study.folder / "test_reads.jsonl"
    with pytest.raises(UsageError, match="holds no study"):
        finish(study.config(), warn, PRETENDED)
    assert study.start("a", "trials=4").wait(90) == 0
    with pytest.raises(UsageError, match="has 4 of 6 trials"):
        finish(study.config(), warn, PRETENDED)
    assert not reads.exists()

    # Broken off after the first seed, it goes on with the same configuration, whatever else is said.
    config = study.config("trials=4")
    study.pace(0.1)
    ending = study.start("end", "trials=4", verb="finish")
    end = time.monotonic() + 60
    while not reads.exists():
        assert time.monotonic() < end, study.log("end")
        time.sleep(0.02)
    ending.send_signal(signal.SIGTERM)
    assert ending.wait(30) == 75
    assert "the same command goes on, with the same configuration" in study.log("end")
    study.pace(0.0)
    assert [row["seed"] for row in read_lines(reads)] == [1]
    with pytest.raises(UsageError, match="grows no more"):
        Worker(study.config(), "b", warn, PRETENDED)

    found = finish(config, warn, PRETENDED)
    rows = study.trials()
    best = min(rows, key=lambda row: row["value"])
    assert found["best"]["trial"] == best["number"]
    assert found["best"]["settings"] == best["settings"]
    assert found["tried"] == {"configurations": 4, "complete": 4, "pruned": 0, "failed": 0}
    assert sorted(row["seed"] for row in read_lines(reads)) == [1, 2, 3]
    auroc = found["test"]["sex"]["auroc"]
    assert auroc["values"] == pytest.approx([0.89, 0.88, 0.87])
    assert auroc["mean"] == pytest.approx(0.88)
    assert auroc["std"] == pytest.approx(0.01)
    assert found["importance"] == {"optimizer.lr": pytest.approx(1.0)}
    page = (study.folder / "report.html").read_text()
    assert "4 configurations were tried" in page
    assert page.count("data:image/png;base64,") >= 5
    assert "http" not in page.replace("http-equiv", ""), "it needs no network"

    # Once more, and with other seeds: what is stored.
    assert finish(study.config("trials=4", "seeds=9"), warn, PRETENDED) == found
    assert main(["tune", "finish", str(study.path), "trials=4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["tune", "status", str(study.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["complete"] == 4
    assert len(read_lines(reads)) == 3


@pytest.mark.slow
def test_a_study_whose_trials_still_run_cannot_be_finished(study: Study) -> None:
    study.pace(0.2)
    worker = study.start("a", "trials=1")
    study.until(saved)
    with pytest.raises(SwiftError, match="workers are still at the study"):
        finish(study.config("trials=1"), warn, PRETENDED)
    worker.kill()
    worker.wait()
    with pytest.raises(UsageError, match="not at their end"):
        finish(study.config("trials=1"), warn, PRETENDED)
    assert not (study.folder / "finish.json").exists()


def test_a_study_that_has_begun_takes_no_other_settings(study: Study) -> None:
    Worker(study.config(), "a", warn, PRETENDED)
    Worker(study.config("trials=99", "retries=0", "seeds=1"), "a", warn, PRETENDED)
    for words, said in [
        (("seed=7",), "began with another seed"),
        (("space={optimizer.lr: {kind: float, low: 0.1, high: 0.2}}",), "began with another space"),
        (("finetune=full", "set=[encoder.weights=weights]"), "began with another fine-tuning configuration"),
    ]:
        with pytest.raises(UsageError, match=said):
            Worker(study.config(*words), "a", warn, PRETENDED)
    other = study.folder.parent / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(SwiftError, match="is not empty and no study"):
        Worker(build(TuneConfig, {**STUDY, "folder": str(other)}, "study"), "a", warn, PRETENDED)


def test_a_trial_is_no_rank_of_its_workers_launcher() -> None:
    given = {"SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "RANK": "3", "SLURM_JOB_ID": "7", "HOME": "/root"}
    assert environment(given) == {"SLURM_JOB_ID": "7", "HOME": "/root"}
