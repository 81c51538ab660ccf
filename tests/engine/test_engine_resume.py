"""Runs that are killed, damaged, stopped and resumed, against runs that were not."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import environment, family, kill, started, worker

from swiftv2.engine.checkpoint import latest, list_checkpoints
from swiftv2.engine.shards import SavedState, shard_name
from swiftv2.records import read_lines, read_metrics

ZERO2 = {"precision": "fp32"}
PLAIN = {"precision": "fp32", "backend": "plain"}


def _options(engine: dict[str, Any], seconds: float = 0.0, **train: Any) -> str:
    return json.dumps({"engine": engine, "train": train, "seconds": seconds})


def _run(ranks: int, run_dir: Path, options: str) -> str:
    words = worker(ranks, "run.py", str(run_dir), options)
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def _losses(run_dir: Path) -> list[float]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def _events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_lines(run_dir / "events.jsonl") if row["event"] == kind]


def _wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if any(row["step"] >= step for row in read_lines(run_dir / "metrics.jsonl")):
            return
        if process.poll() is not None:
            break
        time.sleep(0.01)
    output = process.communicate()[0] if process.poll() is not None else "(still running)"
    raise AssertionError(f"step {step} was not reached:\n{output[-3000:]}")


def state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds, whole."""
    with SavedState(run_dir / "checkpoints" / f"step_{step}") as saved:
        return {key: saved.whole(key) for key in saved.shapes}


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_damaged_and_resumed_equals_undisturbed(tmp_path: Path) -> None:
    """Two ranks under ZeRO-2, SIGKILL at a random step, the newest checkpoint damaged: the same run to the last bit."""
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    steps = {"max_steps": 24, "save_every": 4, "keep_last": 3}
    _run(2, undisturbed, _options(ZERO2, **steps))
    step = random.randint(9, 20)  # noqa: S311 (any step will do; it is shown on failure)
    with started(worker(2, "run.py", str(disturbed), _options(ZERO2, 0.05, **steps))) as process:
        _wait_for_step(disturbed, step, process)
        kill(process.pid)
        process.wait(timeout=30)
    newest = latest(disturbed)
    assert newest is not None, f"killed at step {step}"
    damaged = newest.path / shard_name(1, 2)
    _flip_a_bit(damaged)

    script = str(disturbed / "resume.sh")
    done = subprocess.run([script], env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    assert str(damaged) in _events(disturbed, "checkpoint_damaged")[0]["problem"]
    assert _events(disturbed, "resumed")[0]["step"] < newest.step
    assert _losses(disturbed) == _losses(undisturbed), f"killed at step {step}"
    ends = [state(folder, 24) for folder in (undisturbed, disturbed)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0]), f"killed at step {step}"

    _another_world_size(undisturbed, tmp_path / "plain", steps)


def _another_world_size(two_ranks: Path, reference: Path, steps: dict[str, int]) -> None:
    """What two ranks saved goes on on one, whose losses equal those of a plain run on one rank from the beginning."""
    longer = steps | {"max_steps": 30}
    _run(1, two_ranks, _options(ZERO2, **longer))
    _run(1, reference, _options(PLAIN, **longer))
    generated = json.loads((two_ranks / "deepspeed.json").read_text())
    assert (generated["zero_optimization"]["stage"], generated["data_types"]["grad_accum_dtype"]) == (2, "fp32")
    assert generated["train_micro_batch_size_per_gpu"] == 8
    assert _events(two_ranks, "config_changed")[0]["key"] == "train.max_steps"
    assert _losses(two_ranks) == pytest.approx(_losses(reference), rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    steps = {"max_steps": 20, "save_every": 100}
    with started(worker(2, "run.py", str(stopped), _options(PLAIN, 0.1, **steps))) as process:
        _wait_for_step(stopped, 4, process)
        os.kill(family(process.pid)[-1], signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert "exitcode  : 75" in output
    (event,) = _events(stopped, "stopped")
    assert event["signal"] == "SIGTERM", "whichever rank got it"
    assert list_checkpoints(stopped)[0].step == event["step"]
    assert 4 <= event["step"] < 20
    said = _run(1, stopped, _options(PLAIN, **steps))
    assert f"resumed after step {event['step']}, attempt 2" in said
    assert len(_losses(stopped)) == 20


LOW_MEMORY = {
    "precision": "bf16",
    "gradient_accumulation_dtype": "bf16",
    "communication_dtype": "bf16",
    "optimizer_dtype": "bf16",
}


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_states_in_bf16_resume_to_the_last_bit_and_on_another_number_of_ranks(tmp_path: Path) -> None:
    """With saves written from where the state lies."""
    whole, parts, fewer = (tmp_path / name for name in ("whole", "parts", "fewer"))
    saves: dict[str, Any] = {"save_every": 4, "save_in_background": False}
    _run(2, whole, _options(ZERO2 | LOW_MEMORY, max_steps=8, **saves))
    _run(2, parts, _options(ZERO2 | LOW_MEMORY, max_steps=4, **saves))
    shutil.copytree(parts, fewer)
    _run(2, parts, _options(ZERO2 | LOW_MEMORY, max_steps=8, **saves))
    ends = [state(folder, 8) for folder in (whole, parts)]
    kept = ("weight/", "exp_avg/", "exp_avg_sq/")
    assert {tensor.dtype for key, tensor in ends[0].items() if key.startswith(kept)} == {torch.bfloat16}
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert _losses(parts) == _losses(whole)
    _run(1, fewer, _options(ZERO2 | LOW_MEMORY, max_steps=8, **saves))
    # Eight bits of mantissa: losses of other sums of gradients agree to some parts in a hundred.
    assert _losses(fewer) == pytest.approx(_losses(whole), rel=0.05)
