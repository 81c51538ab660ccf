"""TensorBoard: event files in the run directory, written without TensorFlow and without torch."""

import time
from collections.abc import Mapping

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from swiftv2.engine.trackers.tracker import Order, Tracker

_FLUSH_SECONDS = 5.0


class _TensorBoard:
    """An event file of one attempt. Steps that are done again take the place of the former ones."""

    def __init__(self, folder: str, *, first: bool) -> None:
        self._writer = EventFileWriter(folder, flush_secs=_FLUSH_SECONDS)
        self._last: int | None = 0 if first else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._last is None or step < self._last:
            # TensorBoard leaves out what other files have of these steps and later ones.
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=step, session_log=start))
        self._last = step
        summary = Summary(value=[Summary.Value(tag=key, simple_value=value) for key, value in values.items()])
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


def begin(order: Order) -> Tracker:
    """Open an event file."""
    return _TensorBoard(order.folder, first=order.attempt == 1)
