"""How fast a run goes: clips per second, the share of time spent waiting for data, the time left."""

import time
from collections import deque

WINDOW = 50


class Meter:
    """Wall-clock figures over the last steps; saves and evaluations count for the time left, not for the speed."""

    def __init__(self, clips_per_step: int, max_steps: int, clips_at_peak: float | None = None) -> None:
        """Nothing is measured yet.

        Args:
            clips_per_step: of all ranks.
            max_steps: of the whole run.
            clips_at_peak: clips a second of all ranks together if their devices did nothing but the model's products, at
                their peak; None where that is not known.
        """
        self.clips_per_step = clips_per_step
        self.max_steps = max_steps
        self.clips_at_peak = clips_at_peak
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._between: deque[float] = deque(maxlen=WINDOW)
        self._last_end: float | None = None
        self._began = 0.0
        self._waited = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._began, self._waited = time.perf_counter(), 0.0

    def waited(self, seconds: float) -> None:
        """The step has waited for a batch."""
        self._waited += seconds

    def end(self) -> float:
        """The step is done; its seconds."""
        now = time.perf_counter()
        self._steps.append((now - self._began, self._waited))
        if self._last_end is not None:
            self._between.append(now - self._last_end)
        self._last_end = now
        return self._steps[-1][0]

    @property
    def longest(self) -> float:
        """Seconds of the longest of the last steps; 0 before the first."""
        return max((seconds for seconds, _ in self._steps), default=0.0)

    def values(self, step: int) -> dict[str, float]:
        """Figures after a step.

        `clips_per_second`, `data_wait` (share of the time), `data_wait_seconds` (of this step), `step_seconds`, `seconds_left`,
        and `mfu`, the share of the devices' peak that the model's own products make, where that is known.
        """
        total = sum(seconds for seconds, _ in self._steps)
        mean = total / len(self._steps)
        pace = sum(self._between) / len(self._between) if self._between else mean
        rate = self.clips_per_step / mean
        known = {} if self.clips_at_peak is None else {"mfu": rate / self.clips_at_peak}
        return {
            "clips_per_second": rate,
            "data_wait": sum(waited for _, waited in self._steps) / total,
            "data_wait_seconds": self._steps[-1][1],
            "step_seconds": mean,
            "seconds_left": pace * (self.max_steps - step),
            **known,
        }
