"""How far all ranks of a build are, told on the first one every few seconds.

Each rank leaves its counts in a small file; the first reads these, as many as there are ranks, never one a run.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from swiftv2.data.ranks import Communicator

SECONDS = 2.0
"""How often the counts are left and told."""


@dataclass(frozen=True)
class Progress:
    """How far all ranks together are: runs done, runs in all, runs refused, source bytes read and in all."""

    done: int
    total: int
    refused: int
    bytes_done: int
    bytes_total: int


class Tally:
    """Counts of this rank, and on rank 0 a thread that tells those of all to a callback."""

    def __init__(
        self, folder: Path, ranks: Communicator, before: Progress, callback: Callable[[Progress], None] | None
    ) -> None:
        """Begin to count.

        Args:
            folder: takes a file of each rank.
            ranks: that share the work.
            before: what was done before they began, and what there is to do.
            callback: takes the state, on rank 0, in a thread of its own.
        """
        self._folder, self._ranks, self._before = folder, ranks, before
        self._callback = callback if ranks.rank == 0 else None
        self._counts = (0, 0, 0)
        self._others = dict.fromkeys(range(1, ranks.size), (0, 0, 0))
        self._left, self._end = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if self._callback is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def add(self, size: int, *, refused: bool) -> None:
        """Count a run of this rank."""
        done, before, total = self._counts
        self._counts = (done + 1, before + int(refused), total + size)
        if self._ranks.rank and time.monotonic() - self._left >= SECONDS:
            self._left = time.monotonic()
            (self._folder / str(self._ranks.rank)).write_text(" ".join(map(str, self._counts)), encoding="ascii")

    def finish(self) -> None:
        """Tell the last state; all ranks call this."""
        counts = self._ranks.gather(self._counts)
        if self._callback is not None and counts is not None:
            self._others = dict(enumerate(counts[1:], start=1))
            self._callback(self._state())

    def _watch(self) -> None:
        while not self._end.wait(SECONDS):
            for rank in self._others:
                # A file that is being written may be read half: then the former counts stand.
                with contextlib.suppress(OSError, ValueError):
                    done, refused, size = map(int, (self._folder / str(rank)).read_text(encoding="ascii").split())
                    self._others[rank] = max(self._others[rank], (done, refused, size))
            if self._callback is not None:
                self._callback(self._state())

    def _state(self) -> Progress:
        done, refused, size = (sum(column) for column in zip(self._counts, *self._others.values(), strict=True))
        before = self._before
        return Progress(
            before.done + done, before.total, before.refused + refused, before.bytes_done + size, before.bytes_total
        )
