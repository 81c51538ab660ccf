"""Requests to stop, wherever the ranks are: all end with status 75 and the run goes on as if nothing had been."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from crew import PLAIN, ZERO2, Job, complete, events, job, once, options
from endings import assert_readable, assert_same_end

from swiftv2.engine.checkpoint import latest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STEPS = 240
ONE, ALL = (1,), ()
REQUESTS = (
    ("in a step", signal.SIGTERM, ONE),
    ("in a step", signal.SIGUSR1, ALL),
    ("in an evaluation", signal.SIGUSR1, ONE),
    ("in an evaluation", signal.SIGUSR2, ALL),
    ("in the first batch", signal.SIGUSR2, ONE),
    ("in the first batch", signal.SIGTERM, ALL),
)
MARGIN = 10.0
"""Seconds that a run leaves over at its time limit."""


def _options(engine: dict[str, Any], **rest: Any) -> dict[str, Any]:
    train = {"save_every": 50, "evaluate_every": 20} | rest.pop("train", {})
    return options(engine, STEPS, **({"seconds": 0.01, "evaluate": {"parts": 2, "seconds": 0.0}} | rest), train=train)


def _newest(run: Path) -> int:
    found = latest(run)
    return found.step if found else 0


def _ask(one: Job, where: str, number: signal.Signals, ranks: tuple[int, ...]) -> None:
    if where == "in a step":
        one.until_step(_newest(one.run) + 3)
    else:
        one.until_mark("evaluating-0" if where == "in an evaluation" else "waiting")
    one.send(number, *ranks)


@pytest.mark.parametrize("engine", [PLAIN, ZERO2], ids=["plain", "zero2"])
def test_stopped_again_and_again_it_is_the_run_that_was_not(engine: dict[str, Any], tmp_path: Path) -> None:
    """Chained in one run: signals to one rank and to all, in steps, evaluations and first batches; the clock."""
    run = tmp_path / "run"
    complete(run, _options(engine, ask=int(signal.SIGUSR1)), status=75)
    assert _newest(run) == 0, "stopped before the first step"
    names = ["SIGUSR1"]
    for where, number, ranks in REQUESTS:
        slow = {"rank": 0, "step": _newest(run) + 1, "seconds": 1.5}
        place = {
            "in a step": {},
            "in an evaluation": {"evaluate": {"parts": 10_000, "seconds": 0.02}},
            "in the first batch": {"slow": slow},
        }
        with job(run, _options(engine, **place[where])) as one:
            _ask(one, where, number, ranks)
            assert one.wait(20) == [75, 75], f"{where}, {number.name}\n{one.said()}"
        names.append(number.name)
        stopped = events(run, "stopped")
        assert [event["signal"] for event in stopped] == names, where
        assert _newest(run) == stopped[-1]["step"], where
    for limit in ("train.time_limit_minutes", "SLURM_JOB_END_TIME"):
        _stop_by_the_clock(run, engine, limit)
    complete(run, _options(engine, seconds=0.0))
    complete(tmp_path / "undisturbed", _options(engine, seconds=0.0))
    assert_same_end(run, tmp_path / "undisturbed", STEPS)


def _stop_by_the_clock(run: Path, engine: dict[str, Any], limit: str) -> None:
    """It ends, with its last step saved, before the time is over."""
    before, began = _newest(run), time.time()
    end = began + MARGIN + 5
    mine = limit.startswith("train")
    # Steps that no machine, however fast, gets through before the time is over.
    asked = _options(engine, seconds=0.1, train={"time_limit_minutes": (MARGIN + 2) / 60} if mine else {})
    one = complete(run, asked, status=75, variables={} if mine else {limit: str(int(end))})
    assert time.time() < end, one.said()
    assert events(run, "stopped")[-1]["signal"] == "time limit"
    assert before <= _newest(run) == events(run, "stopped")[-1]["step"] < STEPS


@pytest.mark.parametrize("engine", [PLAIN, ZERO2], ids=["plain", "zero2"])
def test_asked_while_a_rank_does_not_come_to_the_collective(engine: dict[str, Any], tmp_path: Path) -> None:
    """No boundary is reached in the grace time: it ends on its last checkpoint, and that rank is named."""
    run = tmp_path / "run"
    asked = options(engine, 20, train={"save_every": 5})
    late = {"rank": 1, "step": 13, "seconds": 1000}
    with job(run, asked | {"slow": late, "faults": {"grace_seconds": 4.0, "hang_seconds": 12.0}}) as one:
        one.until_mark("waiting")
        one.until(lambda: _newest(run) == 10, "the checkpoint of step 10")
        asked_at = time.monotonic()
        one.send(signal.SIGTERM, 0)
        assert one.wait(30) == [75, 75], one.said()
    assert 2.5 < time.monotonic() - asked_at < 20
    told = once(events(run, "grace"))
    assert told["suspects"] == [1]
    assert {one["rank"]: one["phase"] for one in told["behind"]}[1] == "data"
    for rank in range(2):
        assert "most likely at fault: rank 1" in once(one.lines(rank))
    assert "victim.py" in (run / "logs" / "stacks-rank-1-attempt-1.txt").read_text(), "where it waits"
    assert_readable(run)
    complete(run, asked)
    assert once(events(run, "resumed"))["step"] == 10
    complete(tmp_path / "undisturbed", options(engine, 20))
    assert_same_end(run, tmp_path / "undisturbed", 20)
