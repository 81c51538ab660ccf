"""Between workers and the keeper of a study: directly to a database server, or by letters in the study's folder.

Of a study in a SQLite file one process is the keeper: it holds the lease of the folder `keeper` and alone opens the file.
Letters are whole files, renamed into place: no ports, and nothing that a parallel file system could mix up. Every request may
be answered twice, by a keeper that was lost and by the next, and does no harm.
"""

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from swiftv2.config.tune import TuneConfig
from swiftv2.engine.lease import HEARTBEAT_SECONDS, Lease, last_attempt
from swiftv2.errors import SwiftError
from swiftv2.files import read_json, write_file
from swiftv2.records import Holder
from swiftv2.tuning.folder import STATUS, StudyFolder
from swiftv2.tuning.keeper import Asker, Keeper, Task

_SERVE_SECONDS, _TAKE_OVER_SECONDS = 0.1, 1.0
_OLD_SECONDS = 3600.0
_LONGEST_WAIT = 0.5
_GRACE_SECONDS = 3.0
"""How long an answer is waited for in any case: what has ended shall be told by a worker that was told to stop."""


class Desk(Protocol):
    """What a worker asks."""

    def ask(self, asker: Asker) -> Task:
        """The next thing to do."""

    def report(self, number: int, rows: Sequence[tuple[int, float]]) -> bool:
        """Values by step; whether the trial is to be ended early."""

    def tell(self, number: int, state: str, value: float | None, reason: str | None) -> None:
        """How a trial has ended."""


class Stopped(Exception):  # noqa: N818 (no error: what was asked for)
    """The worker was told to stop while it waited for an answer."""


class Direct:
    """A keeper of this worker's own, over a database server; new trials are drawn one worker at a time."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper

    def ask(self, asker: Asker) -> Task:
        """The next thing to do; `wait` where another worker is being answered."""
        folder = self.keeper.folder.keeper
        try:
            lease = Lease.acquire(folder, 1 + last_attempt(folder), stale_seconds=self.keeper.config.stale_seconds)
        except SwiftError:
            return Task("wait")
        with lease:
            task = self.keeper.ask(asker)
            if task.kind == "trial":
                write_status(self.keeper)
        return task

    def report(self, number: int, rows: Sequence[tuple[int, float]]) -> bool:
        """Values by step; whether the trial is to be ended early."""
        return self.keeper.report(number, rows)

    def tell(self, number: int, state: str, value: float | None, reason: str | None) -> None:
        """How a trial has ended."""
        self.keeper.tell(number, state, value, reason)
        write_status(self.keeper)


def open_server(config: TuneConfig, max_steps: int, check: Callable[[], None]) -> Keeper:
    """A keeper of this worker's own; one worker at a time, for the first makes the server's tables.

    Args:
        config: the search.
        max_steps: length of a trial.
        check: called while another worker is waited for; raises where that makes no sense any more.

    Raises:
        SwiftError: the server cannot be reached.
    """
    folder = StudyFolder(config.folder).keeper
    while True:
        with contextlib.suppress(SwiftError):
            lease = Lease.acquire(folder, 1 + last_attempt(folder), stale_seconds=config.stale_seconds)
            break
        check()
        time.sleep(_TAKE_OVER_SECONDS)
    with lease:
        return Keeper(config, max_steps)


class Letters:
    """Requests to whoever keeps the study.

    Args:
        folder: of the study.
        worker: name of the worker.
        check: called while an answer is waited for; raises where that makes no sense any more.
    """

    def __init__(self, folder: StudyFolder, worker: str, check: Callable[[], None]) -> None:
        self.folder, self.worker, self.check = folder, worker, check

    def ask(self, asker: Asker) -> Task:
        """The next thing to do."""
        found = self._send("ask", worker=asker.worker, holder=asdict(asker.holder), trials=asker.trials)
        return Task(found["kind"], found["number"], found["values"])

    def report(self, number: int, rows: Sequence[tuple[int, float]]) -> bool:
        """Values by step; whether the trial is to be ended early."""
        return bool(self._send("report", number=number, rows=list(rows))["prune"])

    def tell(self, number: int, state: str, value: float | None, reason: str | None) -> None:
        """How a trial has ended."""
        self._send("tell", number=number, state=state, value=value, reason=reason)

    def _send(self, verb: str, **values: Any) -> dict[str, Any]:
        name = f"{time.time_ns()}-{self.worker}-{secrets.token_hex(4)}.json"
        request, answer = self.folder.requests / name, self.folder.answers / name
        write_file(request, json.dumps({"verb": verb, **values}))
        pause, patient = 0.02, time.monotonic() + _GRACE_SECONDS
        try:
            while not answer.exists():
                if time.monotonic() > patient:
                    self.check()
                time.sleep(pause)
                pause = min(pause * 1.5, _LONGEST_WAIT)
        finally:
            request.unlink(missing_ok=True)
        found = read_json(answer)
        answer.unlink()
        if "error" in found:
            raise SwiftError(str(found["error"]))
        return found


class Service(threading.Thread):
    """Keeps the study while nobody else does, beside a worker's own trials.

    Args:
        config: the search.
        max_steps: length of a trial.
        heartbeat_seconds: between heartbeats of the keeper's lease.
    """

    def __init__(self, config: TuneConfig, max_steps: int, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
        super().__init__(name="keeper", daemon=True)
        self.config, self.max_steps, self.heartbeat_seconds = config, max_steps, heartbeat_seconds
        self.folder = StudyFolder(config.folder)
        self.problem: str | None = None
        self.serves = False
        self._end = threading.Event()

    def stop(self) -> None:
        """End, and give the study back."""
        self._end.set()
        self.join()

    def run(self) -> None:
        """Serve whenever the study has no keeper, until `stop`."""
        while not self._end.is_set():
            lease = self._take_over()
            if lease is None:
                self._end.wait(_TAKE_OVER_SECONDS)
                continue
            try:
                with lease:
                    self._serve(lease)
            except Exception as error:  # noqa: BLE001 (the worker, who looks at `problem`, tells it)
                self.problem = str(error).partition("\n")[0] or type(error).__name__
                return

    def _take_over(self) -> Lease | None:
        try:
            attempt = 1 + last_attempt(self.folder.keeper)
            return Lease.acquire(self.folder.keeper, attempt, self.heartbeat_seconds, self.config.stale_seconds)
        except (SwiftError, OSError):
            return None

    def _serve(self, lease: Lease) -> None:
        keeper = Keeper(self.config, self.max_steps)
        self.serves = True
        try:
            self._clear()
            changed = True
            while not self._end.is_set():
                for request in sorted(self.folder.requests.glob("[0-9]*.json")):
                    if lease.taker() is not None:
                        return
                    changed = self._answer(keeper, request) or changed
                if changed:
                    write_status(keeper)
                    changed = False
                self._end.wait(_SERVE_SECONDS)
        finally:
            self.serves = False
            keeper.close()

    def _answer(self, keeper: Keeper, request: Path) -> bool:
        """Answer a letter; whether the study has changed by it."""
        try:
            asked = read_json(request)
        except SwiftError:
            return False  # Its worker has taken it back.
        try:
            answer = _handle(keeper, asked)
        except SwiftError as error:
            answer = {"error": str(error)}
        write_file(self.folder.answers / request.name, json.dumps(answer))
        request.unlink(missing_ok=True)
        return answer.get("kind") != "wait"

    def _clear(self) -> None:
        """Remove answers whose workers are long gone."""
        for path in self.folder.answers.glob("*.json"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _OLD_SECONDS:
                    path.unlink()


def write_status(keeper: Keeper) -> None:
    """Leave what is known of the study for those who may not open its storage."""
    content = {"name": keeper.config.name, "trials": keeper.table()}
    # Workers of a server may write it at the same time, with the same number of process on two hosts.
    beside = keeper.folder.path / f".{STATUS}.{secrets.token_hex(8)}"
    write_file(beside, json.dumps(content, indent=1, allow_nan=False) + "\n")
    beside.replace(keeper.folder.path / STATUS)


def _handle(keeper: Keeper, asked: dict[str, Any]) -> dict[str, Any]:
    verb = asked["verb"]
    if verb == "ask":
        task = keeper.ask(Asker(asked["worker"], Holder(**asked["holder"]), asked["trials"]))
        return {"kind": task.kind, "number": task.number, "values": dict(task.values)}
    if verb == "report":
        return {"prune": keeper.report(asked["number"], [(int(step), float(value)) for step, value in asked["rows"]])}
    keeper.tell(asked["number"], asked["state"], asked["value"], asked["reason"])
    return {}
