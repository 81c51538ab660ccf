"""All trackers of a run: opened for an attempt, told each line of metrics, closed within a limit."""

import contextlib
import time
import uuid
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel

from swiftv2.config.tracking import TrackingConfig, public
from swiftv2.engine.launch import World
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.trackers.courier import Courier
from swiftv2.engine.trackers.tracker import Order, finite
from swiftv2.errors import SwiftError
from swiftv2.files import read_json
from swiftv2.records import newest_step

DOCUMENT = "trackers.json"
FOLDERS = {"tensorboard": "tensorboard", "neptune": "neptune", "wandb": "wandb"}


class Trackers:
    """A context in which the lines of a run's metrics go to its trackers too (rank 0; elsewhere it does nothing).

    Args:
        config: which trackers, and bounds.
        settings: the whole configuration, of which they see what `config.tracking.public` lets out.
        run: the opened run directory.
        world: this process among the ranks.
    """

    def __init__(
        self,
        config: TrackingConfig,
        settings: BaseModel,
        run: RunDirectory,
        world: World,
    ) -> None:
        self._run, self._config = run, config
        self._couriers: list[Courier] = []
        self._note = partial(run.warn, "tracker")
        if world.rank != 0 or not config.wanted:
            return
        run.tracker_id = _identity(run)
        seen = public(settings)
        for name, mode in config.wanted.items():
            folder = str((run.path / FOLDERS[name]).absolute())
            order = Order(name, mode, folder, run.tracker_id, config.project_of(name), seen, run.attempt)
            try:
                self._couriers.append(Courier(order, config, self._note))
            except OSError as error:  # No memory or no more processes: the run does without.
                self._note(f"{name} is not told: its process cannot be started: {error}")
        with contextlib.suppress(SwiftError, OSError):  # A full disk is for the run's own files to tell.
            self._document()
        run.listeners.append(self._line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let them take what waits, for a limited time; then say what became of each in `trackers.json`."""
        if not self._couriers:
            return
        until = time.monotonic() + self._config.close_seconds
        for courier in self._couriers:
            courier.end()
        for courier in self._couriers:
            courier.wait(until)
        with contextlib.suppress(SwiftError, OSError):
            self._document()
        self._couriers.clear()

    def counts(self) -> dict[str, dict[str, Any]]:
        """By tracker: lines sent and dropped, errors, and what the last problem was."""
        return {
            one.order.name: {
                "mode": one.order.mode,
                "sent": one.sent,
                "dropped": one.dropped,
                "errors": one.errors,
                "problem": one.problem,
            }
            for one in self._couriers
        }

    def _line(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = finite(values)
        for courier in self._couriers:
            courier.put(step, numbers)

    def _document(self) -> None:
        values = {"id": self._run.tracker_id, "attempt": self._run.attempt, "trackers": self.counts()}
        self._run.document(DOCUMENT, values)


def _identity(run: RunDirectory) -> str:
    """The run's id at all trackers: of a former attempt, by its document or its checkpoint, else a new one."""
    with contextlib.suppress(SwiftError):
        if (run.path / DOCUMENT).is_file() and (known := read_json(run.path / DOCUMENT).get("id")):
            return str(known)
    with contextlib.suppress(SwiftError):
        step = newest_step(run.path)
        if step is not None and (
            known := read_json(run.path / "checkpoints" / f"step_{step}" / "trainer.json").get("tracker_id")
        ):
            return str(known)
    return uuid.uuid4().hex[:12]
