"""The run's side of one tracker: a bounded queue, a thread that empties it into the tracker's process, and counts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from swiftv2.config.tracking import TrackingConfig
from swiftv2.engine.trackers.clerk import ordered
from swiftv2.engine.trackers.tracker import TOKENS, Order

_START_SECONDS = 60.0
"""Beyond `connect_seconds`, for imports on a slow file system."""
_KILLED_SECONDS = 2.0
"""How long a killed process is waited for."""


class Courier:
    """Hands the numbers of a run on to one tracker; `put` never waits.

    Args:
        order: what the tracker is opened with.
        config: bounds.
        tell: told in one line, from another thread, when the tracker is lost.
    """

    def __init__(self, order: Order, config: TrackingConfig, tell: Callable[[str], None]) -> None:
        self.order, self._config, self._tell = order, config, tell
        self.given = self.sent = self.dropped = self.errors = 0
        self.problem: str | None = None
        self.opened = False
        self._waiting: deque[tuple[int, Mapping[str, float]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._lost = False
        self._closed = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "swiftv2.engine.trackers.clerk"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(order),
            start_new_session=True,
            text=True,
            encoding="utf-8",
        )
        self._began = time.monotonic()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._pump, self._listen, self._mind)]
        for thread in self._threads:
            thread.start()

    def put(self, step: int, values: Mapping[str, float]) -> None:
        """Take a line of numbers; where too many wait, the oldest is dropped."""
        with self._changed:
            self.given += 1
            if self._lost:
                self.dropped += 1
                return
            if len(self._waiting) >= self._config.queue:
                self._waiting.popleft()
                self.dropped += 1
            self._waiting.append((step, values))
            self._changed.notify()

    def end(self) -> None:
        """Take no more; what waits is still handed on."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def wait(self, until: float) -> None:
        """Wait until it has all, at most until that moment of the monotonic clock; then it is ended."""
        self._closed.wait(max(until - time.monotonic(), 0.0))
        with self._changed:
            # What was handed on and never confirmed may be there or not: it counts as dropped.
            unsent = self.given - self.sent - self.dropped
            self.dropped += unsent
            self._waiting.clear()
            late = not self._closed.is_set() and not self._lost
            self._lost = True
            self._changed.notify()
        if late:
            self.problem = f"did not end within tracking.close_seconds={self._config.close_seconds:g}"
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # A file system that is away holds even a killed process.
            self._process.wait(_KILLED_SECONDS)
        if late:
            self._tell(f"{self.order.name} {self.problem}; {unsent} lines were not sent")

    def _pump(self) -> None:
        stream = self._process.stdin
        if stream is None:
            return
        try:
            stream.write(ordered(self.order, self._config.close_seconds))
            stream.flush()
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._closing or self._lost)
                    if self._lost or not self._waiting:
                        break
                    step, values = self._waiting.popleft()
                stream.write(json.dumps({"step": step, "values": values}) + "\n")
                stream.flush()
        except (OSError, ValueError):
            pass  # Its process is gone: the other thread tells.
        finally:
            with contextlib.suppress(OSError, ValueError):
                stream.close()

    def _listen(self) -> None:
        closed = False
        for line in self._process.stdout or ():
            said: dict[str, Any] = json.loads(line)
            with self._changed:
                self.opened = self.opened or bool(said.get("opened"))
                taken = int(said.get("taken", 0))
                if "error" in said:
                    self.errors += 1
                    self.dropped += taken
                    self.problem = str(said["error"])
                else:
                    self.sent += taken
                closed = closed or bool(said.get("closed"))
            if self.errors == 1 and "error" in said and not said.get("fatal"):
                self._tell(f"{self.order.name}: {self.problem}")
        self._gone(closed=closed)

    def _gone(self, *, closed: bool) -> None:
        with self._changed:
            told = not closed and not self._lost
            if told:
                self.problem = self.problem or "its process ended"
                self._lost = True
                self.dropped = self.given - self.sent
                self._waiting.clear()
            self._changed.notify()
        self._closed.set()
        if told:
            self._tell(f"{self.order.name} is not told any more: {self.problem}; the run goes on, and metrics.jsonl has all")

    def _mind(self) -> None:
        """End a tracker that does not come to its beginning."""
        limit = self._config.connect_seconds + (_START_SECONDS if self.order.mode == "offline" else 0.0)
        if self._closed.wait(limit) or self.opened:
            return
        self.problem = f"it did not begin within tracking.connect_seconds={self._config.connect_seconds:g}"
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _environment(order: Order) -> dict[str, str]:
    """Variables for a tracker's process: no other tracker's token, and none at all where nothing is sent."""
    hidden = {name for service, name in TOKENS.items() if order.mode != "online" or service != order.name}
    return {name: value for name, value in os.environ.items() if name not in hidden} | {"PYTHONUNBUFFERED": "1"}
