"""What a person sees of a real run: a bar on a terminal, few lines in a log, and that something goes on while it takes long."""

import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path

import pytest
import torch
from ranks import environment, worker

from swiftv2.engine import progress
from swiftv2.engine.launch import World

pytestmark = pytest.mark.slow

STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")


def _seen_on_a_terminal(words: list[str], seconds: float) -> tuple[int, str]:
    """Exit status of a command whose standard error is a terminal, and what came there."""
    ours, its = pty.openpty()
    shown = b""
    with subprocess.Popen(words, env=environment() | {"TERM": "xterm", "COLUMNS": "160"}, stderr=its) as process:
        os.close(its)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    shown += os.read(ours, 1 << 16)
                except OSError:  # the other end was closed
                    break
            elif process.poll() is not None:
                break
        process.kill() if process.poll() is None and time.monotonic() >= ends else None
    os.close(ours)
    return process.returncode, shown.decode(errors="replace")


def test_on_a_terminal_a_bar_moves_and_says_what_takes_long(tmp_path: Path) -> None:
    status, shown = _seen_on_a_terminal(worker(1, "shown.py", str(tmp_path / "run")), 60)
    assert status == 0, shown
    assert "\x1b[" in shown, "it is drawn in place"
    counted = {int(found) for found in re.findall(r"(\d+)/30", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown))}
    assert {15, 30} <= counted
    assert len(counted) >= 8, "steps go by as they are done"
    assert re.search(r"clips/s.*evaluating for 0:00:02", shown)
    assert "saving a checkpoint for 0:00:02" in shown


def test_in_a_log_one_rank_writes_plain_lines_with_time_stamps(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    launcher = worker(2, "shown.py", str(tmp_path / "run"))
    words = [*launcher[:3], f"--log-dir={logs}", "--redirects=3", *launcher[3:]]
    subprocess.run(words, env=environment(), check=True, timeout=100, capture_output=True)
    texts = {int(path.parent.name): path.read_text() for path in logs.rglob("stderr.log")}
    assert set(texts) == {0, 1}
    assert not STAMP.search(texts[1]), "other ranks are silent"
    assert "clips/s" not in texts[1]
    lines = [line for line in texts[0].splitlines() if STAMP.match(line)]
    assert "\x1b" not in texts[0], "no colours and no cursors in a file"
    steps = [int(found[1]) for line in lines if (found := re.search(r" step (\d+)/30 ", line))]
    assert steps == sorted(set(steps)), "at most one line a step"
    assert 3 <= len(steps) < 15, "and by far not all: every second, where a step takes a tenth of one"
    assert steps[-1] == 30
    told = [line for line in lines if "evaluating for" in line]
    assert 2 <= len(told) <= 4, "after one second, then ever more rarely, in both evaluations"
    assert sum("saving a checkpoint for" in line for line in lines) >= 2, "the first and the last"


def test_a_step_that_had_a_line_gets_no_second_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    values = {
        "loss": 1.0,
        "learning_rate": 1e-3,
        "gradient_norm": 1.0,
        "clips_per_second": 1.0,
        "data_wait": 0.0,
        "seconds_left": 1.0,
    }
    shown = progress.ProgressLine(World(0, 1, 0, 1, torch.device("cpu")), 0, 4)
    for step in range(1, 5):
        if step in {2, 4}:
            shown.note(f"step {step} refused")
        shown.update(step, values)
    told = [line.split(" ", 2)[2].split("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == ["step 1/4", "step 2 refused", "step 3/4", "step 4 refused", "step 4/4"]
