"""What a run has cost so far, all its attempts together."""

import math
import time
from collections.abc import Mapping
from typing import Any

from swiftv2.engine.launch import World
from swiftv2.engine.rundir import RunDirectory
from swiftv2.records import read_lines

PREFIX = "total/"
_SUMS = {
    "flops": (f"{PREFIX}flops", 1.0),
    "brain_tokens": (f"{PREFIX}brain_tokens", 1.0),
    "joules": (f"{PREFIX}energy_kwh", 3.6e6),
}
"""Counts of steps, and what they are summed up to."""


class Totals:
    """Device-hours, FLOPs, brain tokens and energy, carried on from the last that a former attempt has written.

    They stand in lines of metrics and in the events `stopped` and `finished`. Steps that are done again after a kill are paid
    twice and count twice. What a killed attempt did after its last line is lost. Hours run from the attempt's `start` event on:
    data, evaluations and saves are part of them.
    """

    def __init__(self, run: RunDirectory, world: World) -> None:
        self._hours = f"{PREFIX}{'gpu' if world.device.type == 'cuda' else 'cpu'}_hours"
        self._devices = world.size
        self._sums: dict[str, float] = {}
        rows = read_lines(run.path / "metrics.jsonl") if world.rank == 0 else []
        events = read_lines(run.path / "events.jsonl") if world.rank == 0 else []
        written = [row | row.get("totals", {}) for row in (*rows, *events)]
        known = [row for row in written if any(key.startswith(PREFIX) for key in row)]
        last: dict[str, Any] = max(known, key=lambda row: (row["attempt"], row["time"]), default={})
        self._before = {k: float(v) for k, v in last.items() if k.startswith(PREFIX) and v is not None}
        starts = [row["time"] for row in events if row["event"] == "start" and row["attempt"] == run.attempt]
        self._began = time.monotonic() - max(0.0, time.time() - starts[-1] if starts else 0.0)
        # Where a former attempt did not know a sum, the whole does not become known by this one.
        hours = self._before.keys() & {f"{PREFIX}gpu_hours", f"{PREFIX}cpu_hours"}
        sums = {key for key, _ in _SUMS.values()} | (set() if hours else {self._hours})
        self._unknown = sums - self._before.keys() if rows else set()

    def add(self, counts: Mapping[str, float]) -> None:
        """Count a step: `flops`, `brain_tokens` and `joules`, where they are known."""
        for name, (key, unit) in _SUMS.items():
            if name in counts:
                self._sums[key] = self._sums.get(key, 0.0) + counts[name] / unit

    def values(self) -> dict[str, float]:
        """`total/gpu_hours` (on CPUs `total/cpu_hours`), `total/flops`, `total/brain_tokens`, `total/energy_kwh`."""
        hours = (time.monotonic() - self._began) * self._devices / 3600
        sums = {self._hours: hours} | self._sums
        kept = {k: v for k, v in self._before.items() if k not in sums}  # a run that went over to another device
        sums = kept | {key: self._before.get(key, 0.0) + value for key, value in sums.items()}
        return {key: value for key, value in sums.items() if key not in self._unknown and math.isfinite(value)}
