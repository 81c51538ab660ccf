"""What a run has cost: carried over attempts, with steps that were done again paid twice."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swiftv2.config.engine import EngineConfig, FaultsConfig, ScheduleConfig, TrainConfig
from swiftv2.config.model import OptimizerConfig
from swiftv2.engine.backend import StepResult
from swiftv2.engine.build import build_backend
from swiftv2.engine.checkpoint import list_checkpoints
from swiftv2.engine.launch import World
from swiftv2.engine.loop import fit
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.sentinel import Sentinel
from swiftv2.engine.totals import Totals
from swiftv2.records import read_lines, read_metrics

sys.path.insert(0, str(Path(__file__).parent / "workers"))
from toy import DECAY, Batches, Micro, Toy

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


class Counting(Toy):
    """Counts eight clips of a hundred FLOPs and three tokens a step."""

    counts: dict[str, Tensor | float]

    def forward(self, batch: Micro) -> Tensor:
        loss = super().forward(batch)
        clips = len(batch[0])
        self.counts = {
            "clips": float(clips),
            "flops": 100.0 * clips,
            "brain_tokens": torch.tensor(3 * clips),
            "baseline/a": loss.detach() * 2 * clips,
            "baseline/b": loss.detach() * 4 * clips,
        }
        return loss


def _fit(path: Path, max_steps: int, accumulation: int = 1) -> list[dict[str, Any]]:
    train = TrainConfig(max_steps=max_steps, global_batch=8, save_every=4, keep_last=9, evaluate_every=100)
    engine = EngineConfig(backend="plain", device="cpu")
    backend = build_backend(engine, OptimizerConfig(), Counting(), DECAY, ALONE, 8 // accumulation, accumulation)
    with RunDirectory.open(path, "x: 1\n", ALONE) as run, Sentinel.over(run, ALONE, train, FaultsConfig()) as watch:
        fit(
            backend=backend,
            world=ALONE,
            run=run,
            watch=watch,
            batches=lambda samples, exclusions: Batches(samples, ALONE, accumulation, exclusions=exclusions),
            train=train,
            schedule=ScheduleConfig(warmup_steps=2),
            peak_lr=1e-3,
            seed=0,
        )
    return read_lines(path / "metrics.jsonl")


def test_totals_go_on_over_attempts_and_count_steps_that_are_done_again(tmp_path: Path) -> None:
    rows = _fit(tmp_path, 6)
    assert [row["total/flops"] for row in rows] == [800.0 * n for n in range(1, 7)]
    assert [row["total/brain_tokens"] for row in rows] == [24.0 * n for n in range(1, 7)]
    hours = [row["total/cpu_hours"] for row in rows]
    assert hours == sorted(hours)
    start = next(row["time"] for row in read_lines(tmp_path / "events.jsonl") if row["event"] == "start")
    assert hours[-1] * 3600 == pytest.approx(rows[-1]["time"] - start, abs=0.05)
    # As after a kill: steps 5 and 6 are in the log, and the newest checkpoint is that of step 4.
    newest = list_checkpoints(tmp_path)[0]
    assert newest.step == 6
    newest.path.rename(tmp_path / "lost")
    rows = _fit(tmp_path, 8)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert rows[-1]["total/flops"] == 10 * 800.0
    assert rows[6]["total/cpu_hours"] > hours[-1], "what was paid stays paid"
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["total/brain_tokens"] == 10 * 24.0


def test_what_a_former_attempt_did_not_count_is_not_known(tmp_path: Path) -> None:
    _fit(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    rows = [{k: v for k, v in row.items() if not k.startswith("total/")} for row in read_lines(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = [{k: v for k, v in row.items() if k != "totals"} for row in read_lines(tmp_path / "events.jsonl")]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    assert not [key for key in _fit(tmp_path, 5)[-1] if key.startswith("total/")]


def test_a_line_of_an_evaluation_alone_loses_nothing(tmp_path: Path) -> None:
    _fit(tmp_path, 3)
    with RunDirectory.open(tmp_path, "x: 1\n", ALONE) as run:
        # What an attempt writes that only makes up for the evaluation that a stop cut off.
        run.metrics(3, {"heldout/loss": 0.5})
    assert _fit(tmp_path, 5)[-1]["total/flops"] == 5 * 800.0


def test_hours_hold_what_came_after_the_last_line(tmp_path: Path) -> None:
    row = _fit(tmp_path, 2)[-1]
    event = read_lines(tmp_path / "events.jsonl")[-1]
    assert event["event"] == "finished"
    assert event["totals"]["total/cpu_hours"] > row["total/cpu_hours"], "the last save is paid too"
    with RunDirectory.open(tmp_path, "x: 1\n", ALONE) as run:
        assert Totals(run, ALONE).values()["total/cpu_hours"] >= event["totals"]["total/cpu_hours"]


def test_joules_become_kilowatt_hours_and_unknown_ones_nothing(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, "x: 1\n", ALONE) as run:
        totals = Totals(run, ALONE)
        totals.add({"joules": 1.8e6})
        totals.add({"joules": 1.8e6})
        assert totals.values()["total/energy_kwh"] == 1.0
        totals.add({"joules": math.nan})
        assert "total/energy_kwh" not in totals.values()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_ratio_is_that_to_the_better_baseline(tmp_path: Path, accumulation: int) -> None:
    for row in _fit(tmp_path, 3, accumulation):
        assert row["loss_ratio"] == pytest.approx(0.5, rel=1e-6)


def test_without_baselines_there_is_no_ratio() -> None:
    assert StepResult(1.0, 1.0).loss_ratio is None
    assert StepResult(1.0, 1.0, counts={"clips": 2.0, "baseline/a": 0.0}).loss_ratio is None
