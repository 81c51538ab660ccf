"""Waiting for a source that cannot be reached, and saying so, until it is back, patience is over, or nobody waits any more."""

import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime

from swiftv2.errors import InterruptedRunError

FIRST_DELAY, LONGEST_DELAY = 1.0, 15.0
"""Seconds before reads that failed are tried again: doubled each time, up to the longest."""
LINE_SECONDS = 60.0


class ClosedError(Exception):
    """The reader was closed while a read of it waited."""


class Absence:
    """What a process says of a source that is away: a line when it goes, one a minute, and one when it is back.

    Args:
        name: of the source, and of the rank where there are several.
    """

    def __init__(self, name: str = "the store") -> None:
        self._name = name
        self._lock = threading.Lock()
        self._since: float | None = None
        self._told: float | None = None
        self._tell_end = False

    def goes_on(self, reason: str, patience: float) -> None:
        """A read failed; it is tried again for up to `patience` seconds."""
        with self._lock:
            now = time.monotonic()
            self._since = now if self._since is None else self._since
            if self._told is not None and now - self._told < LINE_SECONDS:
                return
            self._told, self._tell_end = now, True
            waited = now - self._since
            self._say(f"{self._name} cannot be reached ({reason}): waiting for it, {waited:.0f} s of at most {patience:g} s")

    def ends(self) -> None:
        """A read that had failed went well."""
        with self._lock:
            if self._since is not None and self._tell_end:
                self._say(f"{self._name} is back after {time.monotonic() - self._since:.0f} s")
            self._since, self._tell_end = None, False

    def _say(self, text: str) -> None:
        stamp = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S}"
        print(f"{stamp} {text}", file=sys.stderr, flush=True)  # noqa: T201 (where a person reads)


class Patience:
    """How long a reader waits for its source; one for all its threads.

    Args:
        seconds: from the first failure of a read on; 0 never waits.
        absence: told of failures and of their end.
    """

    def __init__(self, seconds: float, absence: Absence) -> None:
        self._seconds, self._absence = seconds, absence
        self._closed = threading.Event()

    def close(self) -> None:
        """End all waiting, now and later."""
        self._closed.set()

    def read(self, attempt: Callable[[], None]) -> None:
        """Read, again and again while the source is away, which it says by an `OSError`.

        Raises:
            InterruptedRunError: it was away for too long; names what was read and how long was waited.
            ClosedError: the reader was closed meanwhile.
        """
        began: float | None = None
        delay = FIRST_DELAY
        while True:
            try:
                attempt()
            except OSError as error:
                now = time.monotonic()
                began = now if began is None else began
                left = began + self._seconds - now
                if left <= 0:
                    waited = f"waited {now - began:.0f} s (data.patience_seconds): " if self._seconds else ""
                    raise InterruptedRunError(f"{waited}{error}") from error
                self._absence.goes_on(error.strerror or str(error), self._seconds)
                if self._closed.wait(min(delay, left)):
                    raise ClosedError from error
                delay = min(2 * delay, LONGEST_DELAY)
            else:
                if began is not None:
                    self._absence.ends()
                return
