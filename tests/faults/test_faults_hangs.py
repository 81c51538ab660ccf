"""Ranks that no longer go on: named by the others, stacks written, the job over within the set time, nothing lost."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from crew import PLAIN, ZERO2, complete, events, job, once, options
from endings import assert_readable, assert_same_end

from swiftv2.engine.checkpoint import latest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

STEPS = 30
HANG = 6.0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("hangs") / "undisturbed"
    complete(run, options(steps=STEPS))
    return run


def _options(engine: dict[str, Any] = PLAIN, hang_seconds: float = HANG, **rest: Any) -> dict[str, Any]:
    faults = {"hang_seconds": hang_seconds}
    return options(engine, STEPS, train={"save_every": 5}, faults=faults, **rest)


@pytest.mark.parametrize(("stopped", "engine"), [(1, PLAIN), (0, PLAIN), (1, ZERO2)], ids=["rank 1", "rank 0", "zero2"])
def test_a_stopped_rank_is_named_and_the_job_ends(
    stopped: int, engine: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    """Rank 0 holds the store by which ranks hear of one another: stopped, it too is named."""
    run, other = tmp_path / "run", 1 - stopped
    with job(run, _options(engine, seconds=0.05)) as one:
        one.until_step(8)
        one.send(signal.SIGSTOP, stopped)
        since = time.monotonic()
        one.until(lambda: one.ranks[other].poll() is not None, "the end of the other rank", 40)
        assert one.ranks[other].poll() == 75
        assert HANG - 2 < time.monotonic() - since < HANG + 20
        line = once(one.lines(other))
        assert f"most likely at fault: rank {stopped}" in line
        assert "silent" in line
        assert "victim.py" in (run / "logs" / f"stacks-rank-{other}-attempt-1.txt").read_text()
        told = once(events(run, "hang"))
        assert [silent["rank"] for silent in told["silent"]] == [stopped] == told["suspects"]
        if stopped == 0:
            refused = complete(run, _options(), status=1)
            assert f"is being written by process {one.ranks[0].pid}" in once(refused.lines(0)), "it may come back"
        one.send(signal.SIGCONT, stopped)
        assert one.wait(30)[stopped] == 75, one.said()
    assert_readable(run)
    newest = latest(run)
    assert newest is not None
    complete(run, _options(engine))
    assert once(events(run, "resumed"))["step"] == newest.step >= 5
    if engine is PLAIN:
        assert_same_end(run, undisturbed, STEPS)
    else:
        complete(tmp_path / "zero2", _options(engine))
        assert_same_end(run, tmp_path / "zero2", STEPS)


@pytest.mark.parametrize("stopped", [(0,), (1,), (0, 1)], ids=str)
def test_ranks_that_go_on_in_time_do_no_harm(stopped: tuple[int, ...], undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with job(run, _options(seconds=0.03)) as one:
        one.until_step(8)
        one.send(signal.SIGSTOP, *stopped)
        time.sleep(HANG / 2)
        one.send(signal.SIGCONT, *stopped)
        assert one.wait() == [0, 0], one.said()
    assert events(run, "hang", "lost") == []
    assert not list((run / "logs").glob("stacks-*"))
    assert_same_end(run, undisturbed, STEPS)


def test_all_stopped_for_longer_than_that_do_no_harm_either(undisturbed: Path, tmp_path: Path) -> None:
    """A suspended job, a laptop that slept: no rank has waited for another."""
    run = tmp_path / "run"
    with job(run, _options(hang_seconds=3.0, seconds=0.03)) as one:
        one.until_step(8)
        one.send(signal.SIGSTOP)
        time.sleep(5)
        one.send(signal.SIGCONT)
        assert one.wait() == [0, 0], one.said()
    assert_same_end(run, undisturbed, STEPS)


def test_a_rank_that_waits_for_data_for_ever_is_named(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    one = complete(run, _options(slow={"rank": 1, "step": 13, "seconds": 1000}), status=75)
    told = once(events(run, "hang"))
    assert told["suspects"] == [1]
    assert told["silent"] == []
    for rank in range(2):
        assert "most likely at fault: rank 1" in once(one.lines(rank))
        assert "in data of step 13" in once(one.lines(rank))
        assert "victim.py" in (run / "logs" / f"stacks-rank-{rank}-attempt-1.txt").read_text()
    complete(run, _options())
    assert once(events(run, "resumed"))["step"] == 10
    assert_same_end(run, undisturbed, STEPS)
