"""Reading the same random clips from several formats in turn, and what that costs."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from formats import Reader
from machine import cpu_seconds, disk_bytes, drop, resident

from swiftv2.data import keyed
from swiftv2.data.store.reader import Run

Clip = tuple[int, int]
"""Run and first frame."""


@dataclass
class Cost:
    """What clips cost in one format, round by round."""

    clips: int
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    disk: list[float] = field(default_factory=list)
    resident: float = 0.0
    """Largest share of a run's pages that was in the page cache just before a clip of it was read."""

    @property
    def rate(self) -> float:
        """Clips a second, median over the rounds."""
        return float(np.median(self.clips / np.array(self.seconds)))

    def times(self, other: "Cost") -> tuple[float, float, float]:
        """How many times another format's clips a second: median, least and most over the rounds."""
        ratios = np.array(other.seconds) / np.array(self.seconds)
        return float(np.median(ratios)), float(ratios.min()), float(ratios.max())

    @property
    def cpu_per_clip(self) -> float:
        """Processor seconds of a clip, median over the rounds."""
        return float(np.median(self.cpu)) / self.clips

    @property
    def disk_per_clip(self) -> float:
        """Bytes that the disk delivered for a clip, median over the rounds."""
        return float(np.median(self.disk)) / self.clips


def random_clips(runs: Sequence[Run], frames: int, count: int, purpose: str) -> list[Clip]:
    """Clips of uniformly random run and start; the same ones for the same purpose."""
    rng = keyed.generator(0, f"benchmark {purpose}")
    chosen = rng.integers(len(runs), size=count)
    return [(int(run), int(rng.integers(runs[run].frames - frames + 1))) for run in chosen]


def read_in_turn(
    readers: Mapping[str, Reader], runs: Sequence[Run], frames: int, clips: int, rounds: int, *, cold: bool
) -> dict[str, Cost]:
    """Read random clips, each by every reader before the next one comes, in a sequence that turns with every clip.

    Cold means that the files of a clip's run are taken out of the page cache just before it is read (outside the time).
    """
    costs = {name: Cost(clips) for name in readers}
    names = list(readers)
    for number in range(rounds):
        spent = {name: [0.0, 0.0, 0.0] for name in names}
        for place, (run, start) in enumerate(random_clips(runs, frames, clips, f"round {number}")):
            turn = (place + number) % len(names)
            for name in names[turn:] + names[:turn]:
                reader = readers[name]
                reader.renew()
                if cold:
                    drop(reader.files(run))
                    if not number:
                        costs[name].resident = max(costs[name].resident, resident(reader.files(run)))
                for which, amount in enumerate(_measured(partial(reader.read, run, start, frames))):
                    spent[name][which] += amount
        for name, (seconds, cpu, disk) in spent.items():
            costs[name].seconds.append(seconds)
            costs[name].cpu.append(cpu)
            costs[name].disk.append(disk)
    return costs


def _measured(action: Callable[[], object]) -> tuple[float, float, float]:
    disk, cpu, begun = disk_bytes(), cpu_seconds(), time.perf_counter()
    result = action()
    seconds = time.perf_counter() - begun
    used = seconds, cpu_seconds() - cpu, float(disk_bytes() - disk)
    del result
    return used


def ratio(value: tuple[float, float, float], *, percent: bool = False) -> str:
    """A ratio with its spread over the rounds."""
    if percent:
        return f"{100 * value[0]:.0f} % ({100 * value[1]:.0f} to {100 * value[2]:.0f})"
    return f"{value[0]:.1f} ({value[1]:.1f} to {value[2]:.1f})"
