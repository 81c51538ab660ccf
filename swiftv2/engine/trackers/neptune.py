"""Neptune: offline files in the run directory, or a server where one is asked for."""

import os
from collections.abc import Mapping

from swiftv2.engine.trackers.tracker import TOKENS, Order, Tracker


class _Neptune:
    def __init__(self, order: Order) -> None:
        # Neptune writes below the working directory, which is this process's own.
        os.chdir(order.folder)
        import neptune

        online = order.mode == "online"
        self._run = neptune.init_run(
            mode="async" if online else "offline",
            project=order.project,
            api_token=os.environ.get(TOKENS["neptune"]) if online else None,
            # The same in every attempt, by which a server goes on with one run; offline files do not keep it.
            custom_run_id=order.identity,
            name=order.identity,
            source_files=[],
            git_ref=False,
            capture_hardware_metrics=False,
            capture_stdout=False,
            capture_stderr=False,
            capture_traceback=False,
        )
        # Offline, each attempt has files of its own, which must say for themselves whose they are.
        self._run["run"] = {"id": order.identity, "attempt": order.attempt}
        self._run["settings"] = dict(order.settings)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._run[f"metrics/{key}"].append(value, step=step)

    def close(self) -> None:
        self._run.stop()


def begin(order: Order) -> Tracker:
    """Open a run; offline it is a folder `.neptune/offline/run__<uuid>` of this attempt."""
    return _Neptune(order)
