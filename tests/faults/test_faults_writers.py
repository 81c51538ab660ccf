"""Two jobs on one run directory: the second is refused by name and the first is not disturbed."""

import signal
from pathlib import Path

import pytest
from crew import complete, events, job, once, options
from endings import assert_same_end

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

STEPS = 60


def test_a_second_job_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with job(run, options(steps=STEPS, seconds=0.1, train={"save_every": 5})) as first:
        first.until_step(6)
        for ranks, steps in ((2, STEPS), (1, STEPS), (2, 2 * STEPS)):
            second = complete(run, options(steps=steps), ranks, status=1)
            for rank in range(ranks):
                line = once(second.lines(rank))
                assert f"{run} is being written by process {first.ranks[0].pid}" in line
                assert "stop that one first" in line
        assert len(events(run, "start")) == 1
        assert first.wait() == [0, 0], first.said()
    complete(tmp_path / "undisturbed", options(steps=STEPS))
    assert_same_end(run, tmp_path / "undisturbed", STEPS)


def test_of_jobs_started_at_once_one_goes_on(tmp_path: Path) -> None:
    """After a kill, so that there is a dead one to take over from."""
    run = tmp_path / "run"
    asked = options(steps=STEPS, train={"save_every": 5}, seconds=0.03)
    with job(run, asked) as killed:
        killed.until_step(8)
        killed.send(signal.SIGKILL)
        killed.wait()
    with job(run, asked) as one, job(run, asked) as two, job(run, asked) as three:
        ends = [each.wait() for each in (one, two, three)]
    assert sorted(ends) == [[0, 0], [1, 1], [1, 1]]
    assert len(events(run, "start")) == 2
    complete(tmp_path / "undisturbed", options(steps=STEPS))
    assert_same_end(run, tmp_path / "undisturbed", STEPS)
