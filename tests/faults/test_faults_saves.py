"""Ranks killed at every stage of a save: a checkpoint is whole or does not count, and nothing of it stays behind."""

import signal
from pathlib import Path
from typing import NamedTuple

import pytest
from crew import PLAIN, ZERO2, complete, events, job, leftovers, options
from endings import assert_readable, assert_same_end

from swiftv2.engine.checkpoint import latest, list_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Stage(NamedTuple):
    """Where a rank dies in a save."""

    name: str
    rank: int
    counts: bool
    """Whether the checkpoint is there afterwards."""


STAGES = (
    Stage("before the shard", 0, counts=False),
    Stage("before the shard", 1, counts=False),
    Stage("in the shard", 0, counts=False),
    Stage("in the shard", 1, counts=False),
    Stage("after the shards", 0, counts=False),
    Stage("before the manifest", 0, counts=False),
    Stage("after the manifest", 0, counts=False),
    Stage("after the rename", 0, counts=True),
    Stage("in a removal", 0, counts=True),
)
EVERY = 4


@pytest.mark.parametrize("engine", [PLAIN, ZERO2], ids=["plain", "zero2"])
def test_killed_at_each_stage_of_a_save(engine: dict[str, object], tmp_path: Path) -> None:
    """Chained in one run, which is killed in one save after the other."""
    run, steps = tmp_path / "run", EVERY * (len(STAGES) + 3)
    asked = options(engine, steps, train={"save_every": EVERY})
    newest = 0
    for index, stage in enumerate(STAGES):
        at = EVERY * (index + 3)
        with job(run, asked | {"die": {"stage": stage.name, "rank": stage.rank, "step": at}}) as one:
            wanted = [75, 75]
            wanted[stage.rank] = -signal.SIGKILL
            assert one.wait() == wanted, f"{stage}\n{one.said()[-3000:]}"
        assert [event["step"] for event in events(run, "resumed")][-1:] >= ([newest] if index else []), stage
        found = latest(run)
        assert found is not None
        newest = found.step
        assert newest == (at if stage.counts else at - EVERY), stage
        assert leftovers(run) or stage.name in ("before the shard", "after the rename"), f"{stage}: it came to the stage"
        assert_readable(run)
        assert all(one.problem is None for one in list_checkpoints(run)), stage
    complete(run, asked)
    assert leftovers(run) == []
    assert events(run, "checkpoint_damaged") == []
    complete(tmp_path / "undisturbed", options(engine, steps))
    assert_same_end(run, tmp_path / "undisturbed", steps)


def test_killed_between_a_former_checkpoint_of_the_step_and_its_successor(tmp_path: Path) -> None:
    """A stop in an evaluation saves the step; the run goes on, evaluates it and saves it again: the former one makes way."""
    run, steps = tmp_path / "run", 16
    asked = options(steps=steps, train={"save_every": 4, "evaluate_every": 8}, evaluate={"parts": 3, "seconds": 0.0})
    with job(run, asked | {"evaluate": {"parts": 100, "seconds": 0.05}}) as one:
        one.until_mark("evaluating-0")
        one.send(signal.SIGTERM, 1)
        assert one.wait() == [75, 75]
    with job(run, asked | {"die": {"stage": "former one aside", "rank": 0, "step": 8}}) as one:
        assert one.wait() == [-signal.SIGKILL, 75], one.said()
    assert_readable(run)
    complete(run, asked)
    assert [event["step"] for event in events(run, "resumed")] == [8, 8], "what was saved of the step is not lost"
    assert leftovers(run) == []
    complete(tmp_path / "undisturbed", asked)
    assert_same_end(run, tmp_path / "undisturbed", steps)
