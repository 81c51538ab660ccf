"""Runs whose processes are killed, chained: one comparison with a run that nothing disturbed at the end."""

import random
import signal
from pathlib import Path

import pytest
from chain import STEPS_A_KILL, plan, run_chain, settings
from crew import PLAIN, complete, events, job, options
from endings import assert_same_end

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("engine", "kills", "seed"), [(PLAIN, 20, 5), ({}, 5, 6)], ids=["plain", "defaults"])
def test_a_run_killed_again_and_again_is_the_run_that_was_not(
    engine: dict[str, object], kills: int, seed: int, tmp_path: Path
) -> None:
    """One rank, rank 0 or all of them; in steps, saves, evaluations and at the start; survivors end by themselves.

    The engine's defaults are DeepSpeed's ZeRO-2 in bf16, with its own files in permanent checkpoints.
    """
    draw = random.Random(seed)  # noqa: S311 (kills are to be the same every time)
    steps = STEPS_A_KILL * kills
    told = list(run_chain(tmp_path / "killed", engine, steps, plan(kills, draw), draw))
    assert len(told) == kills
    assert len(events(tmp_path / "killed", "start")) == kills + 1
    complete(tmp_path / "undisturbed", settings(engine, steps))
    assert_same_end(tmp_path / "killed", tmp_path / "undisturbed", steps)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_left_alone_ends_by_itself(killed: int, tmp_path: Path) -> None:
    """Whole processes from their first line to their last, no launcher around them: nothing else ends them."""
    run = tmp_path / "run"
    with job(run, options(seconds=0.02), fresh=True) as one:
        one.until_step(5)
        one.send(signal.SIGKILL, killed)
        statuses = one.wait(30)
    assert statuses[killed] == -signal.SIGKILL
    assert statuses[1 - killed] == 75
    (line,) = one.lines(1 - killed)
    # Where rank 0 dies, so does the store by which ranks hear of one another.
    assert "the ranks lost each other" in line or f"rank {killed} on " in line
    assert "the same command goes on from the last checkpoint" in line
