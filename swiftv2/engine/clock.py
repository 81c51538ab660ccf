"""Where the time of a step goes, in parts that add up to it."""

import time
from types import TracebackType
from typing import Literal, Protocol, get_args

import torch

Part = Literal["data", "copy", "forward", "backward", "communication", "optimizer", "checkpoint", "evaluation", "other"]
PARTS: tuple[Part, ...] = get_args(Part)


_MOST_MARKS = 10_000
"""Where nobody takes what was measured."""


class Ranges(Protocol):
    """Who is told what part is entered, such as a profile that marks it in its trace."""

    def enter(self, name: str) -> None:
        """A part begins."""

    def leave(self) -> None:
        """The part that began last ends."""


class Clock:
    """Divides all time between parts: each moment belongs to the innermost part that is entered, or to `other`.

    On a GPU the time line is that of the stream on which the model computes: a part lasts from the end of what was queued
    before it to the end of what was queued in it. What the host does meanwhile counts only where the device stands still for
    it. Such marks are read once the step's own look at loss and norm has waited for them, so nothing waits for the clock; the
    update that follows that look counts for the next step.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        # Collectives may be begun on a stream of their own: what is measured is how long the computing waits for them.
        self._stream = torch.cuda.current_stream(device) if self._on_gpu else None
        self._entered: list[Part] = ["other"]
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._last = time.perf_counter()
        self._marks: list[tuple[Part, torch.cuda.Event]] = []
        self._spare: list[torch.cuda.Event] = []
        self._passed = 0
        self.ranges: Ranges | None = None

    def part(self, name: Part) -> "_Entered":
        """A context within which time belongs to a part."""
        return _Entered(self, name)

    def lap(self) -> None:
        """The time since the last mark belongs to the part that is entered now."""
        if self._on_gpu:
            event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)
            self._marks.append((self._entered[-1], event))
            return
        now = time.perf_counter()
        self._seconds[self._entered[-1]] += now - self._last
        self._last = now

    def waited(self) -> None:
        """The device has been waited for since the last mark: what was marked can be read."""
        self._passed = len(self._marks)
        if self._passed > _MOST_MARKS:
            self._read()

    def take(self) -> dict[Part, float]:
        """Seconds of each part since this was last asked; on a GPU as far as they can be read without waiting."""
        if self._on_gpu:
            self._read()
        else:
            self.lap()
        taken, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return taken

    def _read(self) -> None:
        if self._passed < 2:
            return
        for (_, before), (part, event) in zip(self._marks[: self._passed - 1], self._marks[1 : self._passed], strict=True):
            self._seconds[part] += before.elapsed_time(event) / 1000
            self._spare.append(before)
        # The last of them is where the next interval begins.
        self._marks = self._marks[self._passed - 1 :]
        self._passed = 1

    def enter(self, name: Part) -> None:
        """A part begins."""
        self.lap()
        self._entered.append(name)
        if self.ranges is not None:
            self.ranges.enter(name)

    def leave(self) -> None:
        """The part that began last ends."""
        if self.ranges is not None:
            self.ranges.leave()
        self.lap()
        self._entered.pop()


class _Entered:
    """A part that is entered; cheaper than a generator, as it stands in every micro-batch."""

    def __init__(self, clock: Clock, name: Part) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._clock.enter(self._name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._clock.leave()
