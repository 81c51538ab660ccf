"""A run that goes on with another number of ranks each time it is started."""

import functools
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import PLAIN, ZERO2, complete, events, job, options
from endings import assert_readable, rows, state

from swiftv2.engine.checkpoint import latest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RANKS = (1, 2, 4, 2, 1)
LEG = 8
STEPS = LEG * len(RANKS)


def _has_come(run: Path, step: int) -> bool:
    newest = latest(run)
    return newest is not None and newest.step >= step


def _losses(run: Path, steps: int) -> list[float]:
    found = rows(run, steps)
    assert [row["step"] for row in found] == list(range(1, steps + 1))
    return [row["loss"] for row in found]


@pytest.mark.parametrize("engines", [[PLAIN], [ZERO2], [PLAIN, ZERO2]], ids=["plain", "zero2", "in turn"])
def test_a_run_on_one_two_four_two_and_one_ranks_is_the_same_run(engines: list[dict[str, Any]], tmp_path: Path) -> None:
    """Losses equal to 1e-6 in fp32, as sums over a batch are taken in another order; each time it is killed, not stopped."""
    run, reference = tmp_path / "run", tmp_path / "reference"
    for leg, ranks in enumerate(RANKS, start=1):
        engine = engines[leg % len(engines)]
        asked = options(engine, STEPS, seconds=0.02, train={"save_every": 2})
        if leg < len(RANKS):
            with job(run, asked, ranks) as one:
                one.until(functools.partial(_has_come, run, leg * LEG), f"leg {leg}")
                one.send(signal.SIGKILL)
                one.wait()
        else:
            complete(run, asked, ranks)
    assert [event["world_size"] for event in events(run, "start")] == list(RANKS)
    assert [event["world_size"] for event in events(run, "resumed")] == list(RANKS[:-1]), "of the ranks that saved"
    assert_readable(run)
    complete(reference, options(PLAIN, STEPS), ranks=1)
    assert _losses(run, STEPS) == pytest.approx(_losses(reference, STEPS), rel=1e-6)
    found, wanted = state(run, STEPS), state(reference, STEPS)
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-5, msg=key)


def test_a_number_of_ranks_that_does_not_divide_the_batch_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    complete(run, options(steps=4))
    one = complete(run, options(steps=8), ranks=3, status=2)
    for rank in range(3):
        (line,) = one.lines(rank)
        assert "train.global_batch=8 cannot be split over 3 ranks; world sizes that work: 1, 2, 4, 8" in line
    complete(run, options(steps=8), ranks=4)
