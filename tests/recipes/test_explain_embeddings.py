"""`swiftv2 explain embeddings`: each run's clips in the order of time, stage by stage, whatever shard they lie in."""

import json
from pathlib import Path

import numpy as np
import pytest

from swiftv2.cli import main
from swiftv2.recipes.embeddings import CARD, Shard, write_json, write_shard

CLIPS, SPACING, TR = 400, 5, 2.0


def folder_of(path: Path, clips: int = CLIPS) -> Path:
    """Two shards of two runs: stage 1 keeps 0.8 of itself from clip to clip, stage 2 is white and of two directions."""
    path.mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        rows = np.zeros((2, clips, 6))
        for clip in range(1, clips):
            rows[:, clip] = 0.8 * rows[:, clip - 1] + rng.standard_normal((2, 6))
        flat = rng.standard_normal((2 * clips, 2)) @ np.eye(2, 4)
        shuffled = rng.permutation(2 * clips)
        keys = {
            "subject": [f"s{number}"] * (2 * clips),
            "run": [f"r{number}{i // clips}" for i in shuffled],
            "cohort": ["made"] * (2 * clips),
        }
        start = (np.tile(np.arange(clips), 2) * SPACING)[shuffled]
        stages = {1: rows.reshape(-1, 6)[shuffled].astype(np.float32), 2: flat.astype(np.float32)}
        write_shard(path, number, Shard(keys, start, np.full(2 * clips, TR, dtype=np.float32), stages, unusable=0))
    write_json(path / CARD, {"format": "parquet", "stages": [{"stage": 1, "width": 6}, {"stage": 2, "width": 4}]})
    return path


def test_each_stage_is_described_over_the_time_of_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "embeddings", str(folder_of(tmp_path / "made")), str(tmp_path / "out"), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    slow, white = stages["stage 1"], stages["stage 2"]
    assert slow["runs"] == 4
    assert slow["lag_seconds"][:2] == [0.0, SPACING * TR]
    assert slow["autocorrelation"][1:4] == pytest.approx([0.8, 0.64, 0.51], abs=0.06)
    assert white["autocorrelation"][1] == pytest.approx(0.0, abs=0.06)
    assert white["power_slope"]["mean"] == pytest.approx(0.0, abs=0.15)
    assert slow["power_slope"]["mean"] > 0.7
    assert white["effective_rank"] == pytest.approx(2.0, abs=0.01)
    assert slow["effective_rank"] == pytest.approx(6.0, abs=0.1)
    assert json.loads((tmp_path / "out" / "embeddings.json").read_text(encoding="utf-8")) == stages
    assert (tmp_path / "out" / "embeddings.png").stat().st_size > 10_000


def test_runs_too_short_are_refused_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "embeddings", str(folder_of(tmp_path / "made", clips=4)), str(tmp_path / "out")]) == 2
    assert "no run has 8 clips" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
