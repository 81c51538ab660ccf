"""The newest checkpoint damaged: named, set aside, and all ranks together take the one before."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from crew import complete, events, once, options
from endings import assert_same_end

from swiftv2.engine.checkpoint import list_checkpoints
from swiftv2.engine.shards import shard_name

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

STEPS = 12


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {"truncated": _truncate, "bit flipped": _flip_a_bit, "missing": Path.unlink}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 9 of its 12 steps, saved every 3 by two ranks."""
    run = tmp_path_factory.mktemp("damage") / "run"
    complete(run, options(steps=9, train={"save_every": 3, "keep_last": 3}))
    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("damage") / "undisturbed"
    complete(run, options(steps=STEPS))
    return run


@pytest.mark.parametrize("name", [shard_name(1, 2), "trainer.json", "manifest.json"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    name: str, kind: str, interrupted: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(interrupted, tmp_path / "run")
    damaged = run / "checkpoints" / "step_9" / name
    DAMAGES[kind](damaged)
    complete(run, options(steps=STEPS, train={"save_every": 3, "keep_last": 3}))
    assert f"step_9/{name}" in once(events(run, "checkpoint_damaged"))["problem"]
    resumed = once(events(run, "resumed"))
    assert (resumed["step"], resumed["passed_over"]) == (6, 1)
    assert (run / "checkpoints" / "damaged_step_9").is_dir()
    assert [one.step for one in list_checkpoints(run)] == [12, 9, 6]
    assert_same_end(run, undisturbed, STEPS)


def test_a_shard_of_another_save_is_damage_too(interrupted: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Whole by itself, of the right size, but not the one that the manifest lists: and so in the two newest."""
    run = shutil.copytree(interrupted, tmp_path / "run")
    for step in (9, 6):
        shutil.copy(run / "checkpoints" / "step_3" / shard_name(0, 2), run / "checkpoints" / f"step_{step}" / shard_name(0, 2))
    complete(run, options(steps=STEPS))
    assert [event["step"] for event in events(run, "resumed")] == [3]
    assert len(events(run, "checkpoint_damaged")) == 2
    assert_same_end(run, undisturbed, STEPS)


def test_with_none_whole_nothing_begins_afresh(interrupted: Path, tmp_path: Path) -> None:
    run = shutil.copytree(interrupted, tmp_path / "run")
    for step in (3, 6, 9):
        _flip_a_bit(run / "checkpoints" / f"step_{step}" / shard_name(1, 2))
    one = complete(run, options(steps=STEPS), status=1)
    for rank in range(2):
        line = once(one.lines(rank))
        assert "no checkpoint is whole" in line
        assert all(f"step_{step}" in line for step in (3, 6, 9))
    assert len(list_checkpoints(run)) == 3, "they are where they were"
