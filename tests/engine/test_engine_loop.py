"""The loop and its checkpoints in one process: damage, best, stops, ends; many ranks are in test_engine_resume."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftv2.config.engine import EngineConfig, ScheduleConfig, TrainConfig
from swiftv2.config.model import OptimizerConfig
from swiftv2.engine.backend import Backend, build_backend
from swiftv2.engine.checkpoint import latest, list_checkpoints, load_newest, verify_checkpoint
from swiftv2.engine.launch import World
from swiftv2.engine.loop import FitResult, fit
from swiftv2.engine.rundir import RunDirectory, read_lines, read_metrics
from swiftv2.engine.stream import Exclusion, Stream
from swiftv2.errors import SwiftError

sys.path.insert(0, str(Path(__file__).parent / "workers"))
from toy import DECAY, Batches, Micro, Toy, batches

Micros = Generator[Micro, None, None]
ALONE = World(0, 1, 0, 1, torch.device("cpu"))
ENGINE = EngineConfig(backend="plain", device="cpu")


def _backend() -> Backend:
    return build_backend(ENGINE, OptimizerConfig(lr=1e-2), Toy(), DECAY, ALONE, 8, 1)


def _stream(samples: int, exclusions: list[Exclusion]) -> Batches:
    assert not exclusions
    return batches(samples, ALONE, 1)


def _fit(path: Path, max_steps: int, stream: Callable[[int, list[Exclusion]], Stream] = _stream, **options: Any) -> FitResult:
    steps = {"save_every": 4, "evaluate_every": 2} | options.pop("train", {})
    with RunDirectory.open(path, f"train: {{max_steps: {max_steps}}}\n", ALONE) as run:
        return fit(
            backend=_backend(),
            world=ALONE,
            run=run,
            batches=stream,
            train=TrainConfig(max_steps=max_steps, global_batch=8, **steps),
            schedule=ScheduleConfig(warmup_steps=2),
            peak_lr=1e-2,
            seed=0,
            **options,
        )


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (lambda c: _flip(c / "optimizer.safetensors"), "optimizer.safetensors does not match its hash"),
    "truncated": (lambda c: _truncate(c / "weights.safetensors"), "weights.safetensors has .* bytes, not"),
    "missing": (lambda c: (c / "trainer.json").unlink(), "trainer.json is missing"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing"),
    "torn manifest": (lambda c: _truncate(c / "manifest.json"), "manifest.json: not valid JSON"),
    "other manifest": (lambda c: (c / "manifest.json").write_text("{}"), "not a manifest of format 1"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with checkpoints at 4 and 8."""
    path = tmp_path_factory.mktemp("loop") / "run"
    result = _fit(path, 8)
    assert (result.step, result.samples, result.stopped_early, result.exit_status) == (8, 64, False, 0)
    return path


def test_a_finished_run_has_lines_and_checkpoints(finished: Path) -> None:
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"learning_rate", "gradient_norm", "clips_per_second", "data_wait", "seconds_left"} <= rows[0].keys()
    assert rows[-1]["seconds_left"] == 0
    assert [c.step for c in list_checkpoints(finished)] == [8, 4]
    newest = latest(finished)
    assert newest is not None
    verify_checkpoint(newest.path)
    state = newest.trainer()
    assert (state.step, state.samples, state.world_size, state.micro_batch, state.exclusions) == (8, 64, 1, 8, [])


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(finished: Path, tmp_path: Path, kind: str) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    act, message = DAMAGE[kind]
    act(run / "checkpoints" / "step_8")
    with pytest.raises(SwiftError, match=message):
        verify_checkpoint(run / "checkpoints" / "step_8")
    result = _fit(run, 8)
    assert result.step == 8
    damaged, resumed = (
        next(e for e in read_lines(run / "events.jsonl") if e["event"] == kind) for kind in ("checkpoint_damaged", "resumed")
    )
    assert resumed["step"] == 4
    assert str(run / "checkpoints" / "step_8") in damaged["problem"]
    verify_checkpoint(run / "checkpoints" / "step_8")
    losses = [[row["loss"] for row in read_metrics(path / "metrics.jsonl")] for path in (finished, run)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_damaged_checkpoint_takes_no_good_ones_place(finished: Path, tmp_path: Path, keep_last: int) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    _flip(run / "checkpoints" / "step_8" / "weights.safetensors")
    _fit(run, 7, train={"save_every": 1, "keep_last": keep_last})
    assert [c.step for c in list_checkpoints(run)] == [7, 6][:keep_last]
    for checkpoint in list_checkpoints(run):
        verify_checkpoint(checkpoint.path)
    assert (run / "checkpoints" / "damaged_step_8").is_dir()


def test_with_all_checkpoints_damaged_nothing_begins_afresh(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("step_4", "step_8"):
        _flip(run / "checkpoints" / name / "weights.safetensors")
    with pytest.raises(SwiftError, match=r"no checkpoint is whole .*step_8.*step_4") as caught:
        _fit(run, 8)
    assert "\n" not in str(caught.value)


def test_a_manifest_cannot_point_outside(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "checkpoints" / "step_8" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../config.yaml"] = {"size": 1, "sha256": "0"}
    path.write_text(json.dumps(manifest))
    with pytest.raises(SwiftError, match=r"the entry of '\.\./\.\./config\.yaml' is damaged"):
        verify_checkpoint(path.parent)


def test_another_model_is_refused(finished: Path) -> None:
    module = Toy()
    module.second = torch.nn.Linear(31, 9)
    other = build_backend(ENGINE, OptimizerConfig(), module, DECAY, ALONE, 8, 1)
    with pytest.raises(SwiftError, match=r"second.bias has shape \(7,\) there and \(9,\) in the model"):
        load_newest(finished, other, ALONE)


def test_a_failed_save_leaves_the_former_ones(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = shutil.copytree(finished, tmp_path / "run")

    def full(_: Backend, folder: Path) -> None:
        (folder / "weights.safetensors").write_bytes(b"half")
        raise SwiftError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Backend, "save", full)
        with pytest.raises(SwiftError, match="no space left"):
            _fit(run, 12)
    assert [c.step for c in list_checkpoints(run)] == [8, 4]
    assert _fit(run, 12).step == 12
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []


def test_the_best_is_kept_beside_the_last(tmp_path: Path) -> None:
    scores = {2: 5.0, 4: 1.0, 6: 3.0, 8: 2.0, 10: 2.0, 12: 2.0}
    result = _fit(
        tmp_path,
        12,
        evaluate=lambda step: {"heldout/loss": scores[step]},
        best_metric="heldout/loss",
        train={"keep_last": 1, "save_every": 3},
    )
    assert result.values["heldout/loss"] == 2.0
    assert [c.step for c in list_checkpoints(tmp_path)] == [12, 4]
    assert list_checkpoints(tmp_path)[0].trainer().best_value == 1.0
    assert [e["removed"] for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "saved"] == [
        [],
        [],
        [2],
        [3],
        [6],
        [9],
    ]
    rows = {row["step"]: row for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert {s: row["heldout/loss"] for s, row in rows.items() if "heldout/loss" in row} == scores


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_the_run_goes_on(finished: Path, tmp_path: Path, number: signal.Signals) -> None:
    def interrupted(samples: int, exclusions: list[Exclusion]) -> Batches:
        def some() -> Micros:
            for index, batch in enumerate(_stream(samples, exclusions)):
                if index == 2:
                    os.kill(os.getpid(), number)
                yield batch

        return Batches(some())

    former = signal.getsignal(number)
    result = _fit(tmp_path, 8, interrupted)
    assert (result.step, result.stopped_early, result.exit_status) == (3, True, 75)
    assert signal.getsignal(number) is former
    assert [c.step for c in list_checkpoints(tmp_path)] == [3]
    assert _fit(tmp_path, 8).exit_status == 0
    losses = [[row["loss"] for row in read_metrics(path / "metrics.jsonl")] for path in (finished, tmp_path)]
    assert losses[0] == losses[1]


def test_a_poisoned_batch_is_skipped_and_written_down(tmp_path: Path) -> None:
    def poisoned(samples: int, exclusions: list[Exclusion]) -> Batches:
        def some() -> Micros:
            for index, (inputs, targets) in enumerate(_stream(samples, exclusions)):
                yield inputs, targets * float("nan") if index == 3 else targets

        return Batches(some())

    _fit(tmp_path, 6, poisoned)
    rows = {row["step"]: row for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert [step for step, row in rows.items() if row["skipped"]] == [4]
    assert rows[4]["loss"] is None
    assert rows[6]["loss"] is not None
    assert [e["step"] for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "skipped"] == [4]


def test_batches_that_end_are_an_error_and_are_closed(tmp_path: Path) -> None:
    closed = []

    def short(samples: int, exclusions: list[Exclusion]) -> Batches:
        def some() -> Micros:
            stream = _stream(samples, exclusions)
            try:
                yield next(stream)
                yield next(stream)
            finally:
                closed.append(True)

        return Batches(some())

    with pytest.raises(SwiftError, match="the batches ended before"):
        _fit(tmp_path, 5, short)
    assert closed == [True]


class Leaky(Batches):
    """Finds the sample 5 of no use in the step that ends at position 24; takes what is agreed."""

    def __init__(self, micro_batches: Micros, exclusions: list[Exclusion]) -> None:
        super().__init__(micro_batches)
        self.exclusions = [(clip, position) for clip, position in exclusions]
        self._handed = 0

    def __next__(self) -> Micro:
        self._handed += 1
        return super().__next__()

    def faulty(self) -> bool:
        return self._handed == 3

    def faults(self) -> list[dict[str, Any]]:
        return [{"clip": 5, "position": 16, "run": "r05", "reason": "the checksum fails"}] if self.faulty() else []

    def exclude(self, exclusions: Sequence[Exclusion]) -> None:
        self.exclusions += exclusions


def test_what_is_of_no_use_is_written_down_counted_and_kept_by_checkpoints(tmp_path: Path) -> None:
    begun: list[list[Exclusion]] = []

    def leaky(samples: int, exclusions: list[Exclusion]) -> Batches:
        begun.append(exclusions)
        return Leaky(batches(samples, ALONE, 1)._micro_batches, exclusions)

    _fit(tmp_path, 5, leaky)
    told = [e for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "quarantined"]
    assert [(e["step"], e["clip"], e["position"], e["run"]) for e in told] == [(3, 5, 16, "r05")]
    counts = {row["step"]: row["clips_left_out"] for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert counts == {1: 0, 2: 0, 3: 0, 4: 1, 5: 1}
    _fit(tmp_path, 6, leaky)
    assert begun == [[], [(5, 16)]]


def test_another_seed_is_another_run(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "checkpoints" / "step_8" / "trainer.json"
    assert json.loads(path.read_text())["seed"] == 0
    with (
        RunDirectory.open(run, "train: {max_steps: 9}\n", ALONE) as directory,
        pytest.raises(SwiftError, match="seed=0"),
    ):
        fit(
            backend=_backend(),
            world=ALONE,
            run=directory,
            batches=_stream,
            train=TrainConfig(max_steps=9, global_batch=8),
            schedule=ScheduleConfig(),
            peak_lr=1e-2,
            seed=1,
        )
