"""A disk that is full, a small tmpfs: in saves, in the last save, in logging, at the start."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from crew import Job, complete, events, job, leftovers, once, options
from endings import assert_readable, assert_same_end

from swiftv2.engine.checkpoint import list_checkpoints, verify_checkpoint
from swiftv2.records import read_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

PAGE = 4096
STEPS = 60


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A file system of a megabyte there."""
    folder.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = subprocess.run(words, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, pages_left: int = 0) -> Path:
    """Take all room but some pages; the file that does so."""
    ballast = folder / ".ballast"
    with ballast.open("ab", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(b"x" * PAGE)
        file.truncate(file.tell() - pages_left * PAGE)
    return ballast


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("disk") / "undisturbed"
    complete(run, options(steps=STEPS))
    return run


def _number(one: Job, kind: str) -> int:
    return len(events(one.run, kind))


@pytest.mark.parametrize("pages", [0, 1, 3], ids=["nothing", "half a shard", "one rank's shard"])
def test_training_goes_on_where_a_save_fails_and_saves_again_once_there_is_room(
    pages: int, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    asked = options(steps=STEPS, seconds=0.03, train={"save_minutes": 0.001}, faults={"failed_saves": 1000})
    with disk(run / "checkpoints") as folder:
        with job(run, asked) as one:
            one.until(lambda: _number(one, "saved") >= 2, "two checkpoints")
            ballast = fill(folder, pages)
            one.until(lambda: _number(one, "save_failed") >= 2, "failed saves")
            for checkpoint in list_checkpoints(run):
                verify_checkpoint(checkpoint.path)
            assert len(list_checkpoints(run)) >= 2
            ballast.unlink()
            saved = _number(one, "saved")
            one.until(lambda: _number(one, "saved") > saved, "a checkpoint once there is room again")
            assert one.wait() == [0, 0], one.said()
        assert "No space left on device" in events(run, "save_failed")[0]["problem"]
        assert leftovers(run) == []
        assert_same_end(run, undisturbed, STEPS)


@pytest.mark.parametrize("at_most", [1000, 2], ids=["the last save", "failed_saves in a row"])
def test_where_saving_fails_for_good_the_run_ends_with_one_line(at_most: int, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = options(steps=STEPS, seconds=0.01, train={"save_every": 10}, faults={"failed_saves": at_most})
    with disk(run / "checkpoints") as folder:
        with job(run, asked) as one:
            one.until(lambda: _number(one, "saved") >= 1, "a checkpoint")
            ballast = fill(folder)
            assert one.wait() == [1, 1], one.said()
        for rank in range(2):
            line = once(one.lines(rank))
            assert "could not be saved" in line
            assert "No space left on device" in line
            assert "former ones are whole" in line
        last = events(run, "save_failed")[-1]["step"]
        assert (last == STEPS) is (at_most == 1000)
        whole = [one.step for one in list_checkpoints(run)]
        assert whole
        assert_readable(run)
        ballast.unlink()
        complete(run, asked)
        assert once(events(run, "resumed"))["step"] == whole[0]
        assert leftovers(run) == []
        assert_same_end(run, undisturbed, STEPS)


def test_a_run_that_cannot_be_logged_ends_and_can_be_read_and_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = options(steps=STEPS, seconds=0.01, train={"save_every": 5})
    with disk(run) as folder:
        with job(run, asked) as one:
            one.until(lambda: _number(one, "saved") >= 1, "a checkpoint")
            ballast = fill(folder)
            statuses = one.wait()
        assert statuses[0] == 1, one.said()
        assert statuses[1] in (1, 75), "it may learn no more than that the first rank has left"
        line = once(one.lines(0))
        assert str(run) in line
        assert "could be written" in line or "No space left on device" in line
        assert_readable(run)
        refused = complete(run, asked, status=1)
        assert "No space left on device" in once(refused.lines(0)), "a start without room is refused"
        assert_readable(run)
        ballast.unlink()
        complete(run, asked)
        assert len(events(run, "resumed")) == 1
        assert_same_end(run, undisturbed, STEPS)
        assert max(row["step"] for row in read_lines(run / "metrics.jsonl")) == STEPS
