"""One run that is killed again and again, at moments drawn from a seed, and started again each time."""

import random
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crew import Job, complete, events, job, leftovers, options

from swiftv2.engine.checkpoint import latest
from swiftv2.records import read_lines

Who = Literal["the last rank", "rank 0", "all ranks"]
When = Literal["a step", "a save", "an evaluation", "the start"]
WHO: tuple[Who, ...] = ("the last rank", "rank 0", "all ranks")
WHEN: tuple[When, ...] = ("a step", "a save", "an evaluation", "the start")
SAVE_MINUTES = (0.0, 0.0005, 0.002)
"""Between ephemeral checkpoints: none, or one every 30 or 120 ms, which is every few steps of a toy."""
STEPS_A_KILL = 12
"""Steps of a run for each kill of it: more than come between two kills."""


@dataclass(frozen=True)
class Kill:
    """What is to be killed, and when."""

    who: Who
    when: When


@dataclass(frozen=True)
class Killed:
    """What a kill cost."""

    kill: Kill
    attempt: int
    step: int
    """The last that was written down."""
    at: float
    """Unix time."""
    ending: float
    """Seconds until the ranks that were left had ended by themselves."""


def plan(count: int, draw: random.Random) -> list[Kill]:
    """So many kills, all kinds about equally often, in an order that is drawn."""
    kills = [Kill(WHO[index % len(WHO)], WHEN[index % len(WHEN)]) for index in range(count)]
    draw.shuffle(kills)
    return kills


def settings(engine: Mapping[str, Any], steps: int, save_minutes: float = 0.0) -> dict[str, Any]:
    """Options of a run whose steps take some milliseconds."""
    train = {"save_every": 25, "evaluate_every": 10, "keep_last": 2, "save_minutes": save_minutes}
    train["deepspeed_files"] = engine.get("backend") != "plain"
    evaluate = {"parts": 3, "seconds": 0.02}
    return options(engine, steps, train=train, seconds=0.01, evaluate=evaluate)


def run_chain(
    run: Path, engine: Mapping[str, Any], steps: int, kills: Iterable[Kill], draw: random.Random, ranks: int = 2
) -> Iterator[Killed]:
    """Start a run once for every kill, and once more to its end; tells each kill when the ranks are gone.

    Raises:
        AssertionError: ranks that were not killed hung, or ended in another way than by the status for "run me again".
    """
    for kill in kills:
        with job(run, settings(engine, steps, draw.choice(SAVE_MINUTES[1:] if kill.when == "a save" else SAVE_MINUTES))) as one:
            _until(one, kill.when, steps, draw)
            yield _strike(one, kill, ranks)
    complete(run, settings(engine, steps), ranks)
    assert leftovers(run) == []
    assert events(run, "checkpoint_damaged") == []


def _until(one: Job, when: When, steps: int, draw: random.Random) -> None:
    if when == "the start":
        one.until(lambda: any((one.run / "logs").glob(f"stacks-rank-*-attempt-{one.attempt()}.txt")), when)
        time.sleep(draw.uniform(0, 0.1))
        return
    begin = latest(one.run)
    first = begin.step if begin else 0
    one.until_step(min(first + draw.randint(2, STEPS_A_KILL - 2), steps - 1))
    if when == "a save":
        one.until(lambda: any((one.run / "checkpoints").glob(".step_*.partial/state")), when)
    elif when == "an evaluation":
        one.until_mark("evaluating-0")
    else:
        time.sleep(draw.uniform(0, 0.03))


def _strike(one: Job, kill: Kill, ranks: int) -> Killed:
    victims = {"the last rank": [ranks - 1], "rank 0": [0], "all ranks": list(range(ranks))}[kill.who]
    at = time.time()
    one.send(signal.SIGKILL, *victims)
    statuses = one.wait()
    ending = time.time() - at
    wanted = [-signal.SIGKILL if rank in victims else 75 for rank in range(ranks)]
    assert statuses == wanted, f"{kill}: {statuses}\n{one.said()[-3000:]}"
    rows = read_lines(one.run / "metrics.jsonl")
    return Killed(kill, events(one.run, "start")[-1]["attempt"], rows[-1]["step"] if rows else 0, at, ending)


@dataclass(frozen=True)
class Cost:
    """What was lost by a kill."""

    redone: int
    """Steps that were written down and were done again."""
    seconds: float
    """From the kill until the run stood where it had stood."""


def cost(run: Path, killed: Killed) -> Cost:
    """What a kill of a finished run has cost it."""
    rows = read_lines(run / "metrics.jsonl")
    back = next(row for row in rows if row["attempt"] > killed.attempt and row["step"] >= killed.step)
    redone = sum(row["attempt"] == killed.attempt + 1 and row["step"] <= killed.step for row in rows)
    return Cost(redone, back["time"] - killed.at)
