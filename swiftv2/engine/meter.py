"""How fast a run goes and where its time goes: over the last steps, and since the last logged line."""

import math
import os
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from swiftv2.engine.clock import Clock
from swiftv2.engine.energy import DeviceReadings

T = TypeVar("T")
WINDOW = 50
OUTAGE_RATIO = 10.0
"""Times the median of the last steps that a step must take to count as held up from outside,"""
OUTAGE_SECONDS = 5.0
"""and seconds: it tells nothing of the speed of those to come."""
_STATM = Path("/proc/self/statm")


class _Step(NamedTuple):
    seconds: float
    waited: float
    tokens: float | None
    flops: float | None


class Meter:
    """Wall-clock figures over the last steps; saves and evaluations count for the time left, not for the speed."""

    def __init__(
        self,
        clips_per_step: int,
        max_steps: int,
        clock: Clock,
        readings: DeviceReadings,
        device: torch.device,
        peak_flops: float | None = None,
    ) -> None:
        """Nothing is measured yet.

        Args:
            clips_per_step: of all ranks.
            max_steps: of the whole run.
            clock: of the backend that computes the steps.
            readings: of this rank's devices.
            device: of this rank.
            peak_flops: FLOP/s of all ranks' devices together at their peak; None where that is not known.
        """
        self.clips_per_step = clips_per_step
        self.max_steps = max_steps
        self.peak_flops = peak_flops
        self._clock, self._readings, self._device = clock, readings, device
        self._steps: deque[_Step] = deque(maxlen=WINDOW)
        self._between: deque[float] = deque(maxlen=WINDOW)
        self._last_end: float | None = None
        self._began = 0.0
        self._waited = 0.0
        self._parts: Counter[str] = Counter()
        self._measured = 0
        self._spread: dict[str, float] = {}
        clock.take()  # what came before is no step's

    def begin(self) -> None:
        """A step begins."""
        self._began, self._waited = time.perf_counter(), 0.0

    def waited(self, seconds: float) -> None:
        """The step has waited for a batch."""
        self._waited += seconds

    def end(self, counts: Mapping[str, float]) -> float:
        """The step is done; its seconds.

        Args:
            counts: `brain_tokens` and `flops` of the global batch, where they are known.
        """
        now = time.perf_counter()
        self._steps.append(_Step(now - self._began, self._waited, counts.get("brain_tokens"), counts.get("flops")))
        if self._last_end is not None:
            self._between.append(now - self._last_end)
        self._last_end = now
        taken = self._clock.take()
        if any(taken.values()):
            self._parts.update(taken)
            self._measured += 1
        return self._steps[-1].seconds

    def compared(self, report: Mapping[str, Mapping[str, float]]) -> None:
        """Ranks were compared over the last steps, see `swiftv2.engine.pace.compare`: told in the lines up to the next time."""
        for name in ("step_seconds", "data_seconds", "compute_seconds"):
            spread = report[name]
            self._spread[f"spread/{name}"] = spread["most"] / spread["median"] if spread["median"] > 0 else 1.0

    @property
    def longest(self) -> float:
        """Seconds of the longest of the last steps; 0 before the first."""
        return max((one.seconds for one in self._steps), default=0.0)

    def values(self, step: int) -> dict[str, float]:
        """Figures after a step; those that cannot be known are not there.

        Over the last steps: `clips_per_second`, `brain_tokens_per_second`, `tflops` (of all ranks), `mfu`, the share of the
        devices' peak that the model's own products make; `data_wait` (share of the time that the host waited for batches),
        `step_seconds`, `seconds_left`. Of this step: `data_wait_seconds`. Means over the steps since `told`: `seconds/<part>`
        and `seconds/step`, the sum of all of them but `seconds/evaluation`; `memory/peak_gb`, the most that tensors held,
        `gpu/utilisation`. Now: `memory/host_gb` (resident). Since ranks were last compared: `spread/...`, most over median.
        """
        steps = _undisturbed(self._steps, [one.seconds for one in self._steps])
        total = sum(one.seconds for one in steps)
        mean = total / len(steps)
        between = _undisturbed(self._between, list(self._between))
        pace = sum(between) / len(between) if between else mean
        values = {
            "clips_per_second": self.clips_per_step / mean,
            "data_wait": sum(one.waited for one in steps) / total,
            "data_wait_seconds": self._steps[-1].waited,
            "step_seconds": mean,
            "seconds_left": pace * (self.max_steps - step),
        }
        counted = [one for one in steps if one.tokens is not None and one.flops is not None]
        if counted:
            seconds = sum(one.seconds for one in counted)
            flops = sum(one.flops or 0.0 for one in counted) / seconds
            values["brain_tokens_per_second"] = sum(one.tokens or 0.0 for one in counted) / seconds
            values["tflops"] = flops / 1e12
            if self.peak_flops is not None:
                values["mfu"] = flops / self.peak_flops
        return values | self._parts_of_a_step() | self._memory() | self._spread

    def told(self) -> None:
        """A line was logged: what is averaged between lines begins anew."""
        self._parts.clear()
        self._measured = 0
        self._readings.begin()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def _parts_of_a_step(self) -> dict[str, float]:
        if not self._measured:
            return {}
        parts = {f"seconds/{name}": seconds / self._measured for name, seconds in self._parts.items()}
        evaluation = parts.pop("seconds/evaluation", 0.0)
        parts["seconds/step"] = math.fsum(parts.values())
        return parts | ({"seconds/evaluation": evaluation} if evaluation else {})

    def _memory(self) -> dict[str, float]:
        values = {}
        if _STATM.exists():
            values["memory/host_gb"] = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
        if self._device.type == "cuda":
            values["memory/peak_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        used = self._readings.utilisation()
        return values | ({} if used is None else {"gpu/utilisation": used})


def _undisturbed(steps: Iterable[T], seconds: Sequence[float]) -> list[T]:
    """Those that were not held up from outside: an outage of the store says nothing of the pace before and after it."""
    limit = max(OUTAGE_RATIO * statistics.median(seconds), OUTAGE_SECONDS) if seconds else 0.0
    return [one for one, own in zip(steps, seconds, strict=True) if own <= limit]
