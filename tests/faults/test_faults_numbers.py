"""Poisoned clips and gradients, and spikes: the end is that of a clean run told to pass over the same, also when killed."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from crew import PLAIN, ZERO2, complete, events, job, leftovers, once, options
from endings import assert_readable, assert_same_end

from swiftv2.engine.checkpoint import list_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

BATCH = 8
NAN = float("nan")
ENGINES = pytest.mark.parametrize("engine", [PLAIN, ZERO2], ids=["plain", "zero2"])


def _clips(*steps: int) -> list[int]:
    """All that these steps are made of, of both ranks."""
    return [clip for step in steps for clip in range(BATCH * (step - 1), BATCH * step)]


@ENGINES
def test_refused_steps_are_as_if_they_had_been_passed_over(engine: dict[str, Any], tmp_path: Path) -> None:
    """Targets that are not finite on one rank, a gradient on the other, a spike on both; killed in between."""
    run, told = tmp_path / "run", tmp_path / "told"
    steps, refused = 30, {6: "its loss is not finite", 11: "its gradient norm is not finite", 24: "mean + 6 sigma of 12 steps"}
    first, second = (_clips(step) for step in (6, 11))
    poison = {first[1]: NAN} | dict.fromkeys(_clips(24), 1e4)
    common: dict[str, Any] = {"faults": {"spike_window": 12}, "train": {"save_every": 4}}
    asked = options(engine, steps, poison=poison, gradient=[second[-1]], seconds=0.01, **common)
    with job(run, asked) as one:
        one.until_step(14)
        one.send(signal.SIGKILL)
        one.wait()
    complete(run, asked)
    last = {event["step"]: event for event in events(run, "skipped")}
    assert list(last) == list(refused)
    for step, reason in refused.items():
        assert reason in last[step]["reason"]
        assert last[step]["samples"] == BATCH
    assert f"r{first[1]}" in [sample["run"] for sample in last[6]["worst"]], "the clip at fault is written down"
    common["train"] |= {"skip_steps": list(refused)}
    complete(told, options(engine, steps, **common))
    assert_same_end(run, told, steps, refused)


@ENGINES
@pytest.mark.parametrize(
    ("stage", "at"),
    [
        (None, 0),
        ("before the rewind", 10),
        ("former one aside", 7),
        ("after the manifest", 7),
        ("after the rewind's save", 7),
    ],
    ids=lambda value: str(value or "undisturbed"),
)
def test_a_rewind_is_as_if_its_samples_had_been_left_out(
    stage: str | None, at: int, engine: dict[str, Any], tmp_path: Path
) -> None:
    """Killed at each stage of going back: every step is saved, so that checkpoints lie ahead of the one gone back to."""
    run, told = tmp_path / "run", tmp_path / "told"
    steps, bad = 16, _clips(8, 9, 10)
    train = {"save_every": 1, "keep_last": 6}
    # All clips of three steps: half by their targets, half by their gradients.
    asked = options(engine, steps, poison=dict.fromkeys(bad[::2], NAN), gradient=bad[1::2], train=train)
    if stage is not None:
        die = {"stage": stage, "rank": 0, "step": at}
        if stage in ("former one aside", "after the manifest"):
            complete(run, asked | {"train": asked["train"] | {"max_steps": 9}})  # Of step 7 it is the second save that counts.
        with job(run, asked | {"die": die}) as one:
            assert one.wait() == [-signal.SIGKILL, 75], one.said()
        assert_readable(run)
    complete(run, asked)
    assert leftovers(run) == []
    newest = list_checkpoints(run)[0].trainer()
    assert newest.rewinds == 1
    assert [one.clip for one in newest.exclusions] == bad
    assert {one.cause for one in newest.exclusions} == {"rewound"}
    complete(told, options(engine, steps, exclude=[[clip, clip] for clip in bad]))
    assert_same_end(run, told, steps)


def test_what_does_not_recover_ends_with_one_line_and_a_diagnosis(tmp_path: Path) -> None:
    run = tmp_path / "run"
    poison = dict.fromkeys([*range(40, 200), *range(100_000, 100_200)], NAN)
    asked = options(steps=16, poison=poison, train={"save_every": 4}, faults={"most_rewinds": 1})
    one = complete(run, asked, status=1)
    for rank in range(2):
        line = once(one.lines(rank))
        assert "went back 1 times" in line
        assert "diagnosis.json" in line
    assert json.loads((run / "diagnosis.json").read_text())["rewinds"] == 1
    assert_readable(run)
