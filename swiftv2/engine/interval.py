"""How often a run should save: what saves cost it, against what a failure costs (Young 1974, Daly 2006)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from swiftv2.config.engine import TrainConfig
from swiftv2.errors import SwiftError

MOST_BLOCKING = 0.01
MOST_LOST_SECONDS = 300.0
_RECENT = 100
_DAY = 86400.0
LLAMA3_GPU_SECONDS = 16384 * 54 * _DAY / 419
"""Seconds of one GPU between failures: Llama 3 had 419 unexpected interruptions in 54 days on 16,384 GPUs."""


class Failures(NamedTuple):
    """Mean time between failures in seconds, and where the number is from."""

    seconds: float
    source: str


class Expected(NamedTuple):
    """What an interval costs.

    Attributes:
        interval: seconds from the beginning of a save to that of the next.
        blocking: share of the time in which training waits for saves.
        failures: share of the time in which steps are done again, or the run starts.
        lost_mean, lost_most: seconds that a failure costs: steps done again, and the start.
    """

    interval: float
    blocking: float
    failures: float
    lost_mean: float
    lost_most: float

    @property
    def share(self) -> float:
        """Share of the time that is lost."""
        return self.blocking + self.failures

    @property
    def keeps_blocking(self) -> bool:
        """Whether at most 1 % of the time is spent on saves."""
        return self.blocking <= MOST_BLOCKING

    @property
    def keeps_lost(self) -> bool:
        """Whether no failure costs more than five minutes."""
        return self.lost_most <= MOST_LOST_SECONDS


@dataclass(frozen=True)
class Costs:
    """What was measured, in seconds.

    Attributes:
        blocking: that a save by the clock keeps training waiting.
        seconds: from the beginning of a save until it counts.
        restart: from the start of an attempt to its first step.
        permanent: that a save by the step keeps training waiting.
        permanent_every: between two of those.
        step: of a step.
    """

    blocking: float
    seconds: float
    restart: float
    permanent: float
    permanent_every: float
    step: float

    @property
    def beside(self) -> float:
        """Share of the time in which permanent saves block for longer than others would."""
        return max(self.permanent - self.blocking, 0.0) / self.permanent_every

    @property
    def longest(self) -> float:
        """Seconds from save to save at which a failure costs five minutes; below 0 where every one costs more."""
        return MOST_LOST_SECONDS - self.seconds - self.restart

    def expect(self, interval: float, failures: float) -> Expected:
        """What an interval costs, with failures that come at any time alike.

        A save counts `seconds` after it began: so old is at least what a failure throws the run back to.

        Args:
            interval: seconds from the beginning of a save by the clock to that of the next, above `blocking`.
            failures: mean seconds between failures.
        """
        behind = self.seconds + self.restart
        useful = useful_share(interval, self.blocking, behind, failures)
        blocking = self.blocking / interval
        return Expected(
            interval=interval,
            blocking=blocking + self.beside,
            failures=max(1.0 - blocking - useful, 0.0),
            lost_mean=behind + interval / 2,
            lost_most=behind + interval,
        )


@dataclass(frozen=True)
class Suggestion:
    """An interval for a run, beside the one that it has.

    Attributes:
        costs: measured.
        failures: expected.
        saves: how many the costs are medians of, by kind.
        bytes: of a save by the clock.
        optimum: seconds from save to save at which the least time is lost.
        configured: what the run's own settings cost.
        suggested: the optimum, or the nearest to it that keeps to five minutes a failure, where saves allow that.
        save_minutes: the setting that gives it.
        notes: what is to be known about it.
    """

    costs: Costs
    failures: Failures
    saves: dict[str, int]
    bytes: float
    optimum: float
    configured: Expected
    suggested: Expected
    save_minutes: float
    notes: list[str]


def useful_share(interval: float, blocking: float, behind: float, failures: float) -> float:
    """Share of the time that goes into steps that count, where failures come as a Poisson process.

    Args:
        interval: seconds from save to save.
        blocking: seconds of it in which training waits.
        behind: seconds that a failure costs beside what was done since the last save.
        failures: mean seconds between failures.
    """
    exponent = (behind + interval) / failures
    if exponent > 500:  # so unlikely is an interval without a failure that nothing gets done
        return 0.0
    return (interval - blocking) / (failures * math.exp(behind / failures) * math.expm1(interval / failures))


def optimal_interval(blocking: float, failures: float) -> float:
    """Seconds from save to save at which the least time is lost: sqrt(2 x blocking x failures) where failures are rare.

    Daly's higher-order form (2006), which is Young's (1974) in its first term; what is lost beside it does not depend on it.
    """
    half = blocking / (2.0 * failures)
    if half >= 1.0:
        return failures + blocking
    return math.sqrt(2.0 * blocking * failures) * (1.0 + math.sqrt(half) / 3.0 + half / 9.0)


def llama3(gpus: int) -> Failures:
    """Failures of so many GPUs, as often as Llama 3's."""
    rate = "Llama 3: 419 interruptions in 54 days on 16,384 GPUs"
    return Failures(LLAMA3_GPU_SECONDS / gpus, f"{rate}, scaled to {gpus}")


def suggest(
    events: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]],
    train: TrainConfig,
    failures: Failures | None = None,
) -> Suggestion:
    """An interval between saves for a run, from what its saves have cost.

    Args:
        events: lines of `events.jsonl`.
        metrics: lines of `metrics.jsonl`.
        train: the run's settings.
        failures: that are expected; those of Llama 3 for as many ranks when None.

    Raises:
        SwiftError: nothing was saved yet, or no step was logged.
    """
    sizes = {row["attempt"]: int(row["world_size"]) for row in events if row["event"] == "start"}
    saved = [row for row in events if row["event"] == "saved"]
    steps = [row for row in metrics if row.get("step_seconds")]
    if not saved or not steps:
        missing = "a save" if steps else "a step"
        raise SwiftError(
            f"nothing measured yet: {missing} must be in events.jsonl and metrics.jsonl; train for some minutes first"
        )
    gpus = sizes.get(saved[-1]["attempt"], 1)
    alike = {attempt for attempt, size in sizes.items() if size == gpus} | {saved[-1]["attempt"]}
    saved = [row for row in saved if row["attempt"] in alike]
    kinds = {kind: [row for row in saved if row["kind"] == kind][-_RECENT:] for kind in ("ephemeral", "permanent")}
    clock = kinds["ephemeral"] or kinds["permanent"]
    notes = (
        []
        if kinds["ephemeral"]
        else ["no save by the clock was measured: permanent ones, which may block for longer, stand for it"]
    )
    step = median(row["step_seconds"] for row in [row for row in steps if row["attempt"] in alike][-_RECENT:] or steps)
    blocking = median(row["blocking_seconds"] for row in clock)
    costs = Costs(
        blocking=blocking,
        seconds=median(row["seconds"] for row in clock),
        restart=_restart_seconds(events, metrics, step),
        permanent=median(row["blocking_seconds"] for row in kinds["permanent"]) if kinds["permanent"] else blocking,
        permanent_every=train.save_every * step,
        step=step,
    )
    failures = failures or llama3(gpus)
    optimum = optimal_interval(costs.blocking, failures.seconds)
    low, high, told = _bounds(costs)
    # Expected losses only rise away from the optimum: the nearest interval within the bounds is the best of those.
    minutes = _minutes(min(max(optimum, low), high), low, high)
    if 60.0 * minutes > costs.permanent_every:
        told.append(f"train.save_every={train.save_every} saves sooner than that: every {costs.permanent_every:.0f} s")
    return Suggestion(
        costs=costs,
        failures=failures,
        saves={kind: len(rows) for kind, rows in kinds.items()},
        bytes=median(row["bytes"] for row in clock),
        optimum=optimum,
        configured=costs.expect(_configured(train, costs, notes), failures.seconds),
        suggested=costs.expect(min(60.0 * minutes, costs.permanent_every), failures.seconds),
        save_minutes=minutes,
        notes=[*notes, *told],
    )


def _bounds(costs: Costs) -> tuple[float, float, list[str]]:
    """Seconds between which an interval keeps to 1 % and to five minutes; where none does, between which saves can follow."""
    notes: list[str] = []
    shortest = max(costs.seconds, costs.step, 2.0 * costs.blocking)
    low = shortest
    if costs.beside < MOST_BLOCKING:
        low = max(shortest, costs.blocking / (MOST_BLOCKING - costs.beside))
    if costs.permanent > MOST_BLOCKING * costs.permanent_every:
        notes.append(
            "permanent saves alone block for more than 1 %: raise train.save_every, or set train.deepspeed_files=false"
        )
    if low > costs.longest:
        why = "a save and a start take too long" if shortest > costs.longest else "saves block for too long"
        notes.append(f"no interval keeps both to 1 % and to five minutes a failure: {why}")
        return shortest, math.inf, notes
    return low, costs.longest, notes


def _minutes(interval: float, low: float, high: float) -> float:
    """Minutes with two digits, the nearest ones that are still within the bounds in seconds."""
    minutes = interval / 60.0
    scale = 10.0 ** (1 - math.floor(math.log10(minutes)))
    rounded = sorted(
        (math.floor(minutes * scale) / scale, math.ceil(minutes * scale) / scale), key=lambda one: abs(one - minutes)
    )
    return next((one for one in rounded if low <= 60.0 * one <= high), rounded[0])


def _configured(train: TrainConfig, costs: Costs, notes: list[str]) -> float:
    """Seconds from save to save as the settings have it."""
    by_clock = 60.0 * train.save_minutes
    if not by_clock:
        notes.append(f"train.save_minutes=0: only every {train.save_every} steps are saved")
    elif by_clock < costs.seconds:
        notes.append(
            f"train.save_minutes={train.save_minutes:g} is shorter than a save takes ({costs.seconds:.1f} s): the next one "
            "waits until the last one is there"
        )
    interval = min(max(by_clock, costs.seconds, costs.step), costs.permanent_every) if by_clock else costs.permanent_every
    return max(interval, 2.0 * costs.blocking)


def _restart_seconds(events: Iterable[Mapping[str, Any]], metrics: Iterable[Mapping[str, Any]], step: float) -> float:
    """Median time from the start of an attempt to its first step, as far as lines tell."""
    begun = {row["attempt"]: row["time"] for row in events if row["event"] == "start"}
    before = {row["attempt"]: row["step"] for row in events if row["event"] == "resumed"}
    first: dict[int, Mapping[str, Any]] = {}
    for row in metrics:
        first.setdefault(row["attempt"], row)
    taken = [
        first[attempt]["time"] - at - step * (first[attempt]["step"] - before.get(attempt, 0))
        for attempt, at in begun.items()
        if attempt in first
    ]
    return max(median(taken), 0.0) if taken else 0.0
