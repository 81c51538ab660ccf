"""A worker: takes trials of a study one after the other, runs each as a process, and hands signals on to it."""

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from swiftv2.config.tune import TuneConfig
from swiftv2.engine.lease import Lease, is_alive, last_attempt, this_process
from swiftv2.errors import SwiftError, UsageError
from swiftv2.records import LEASE, STALE_SECONDS, read_holder
from swiftv2.tuning.child import STOPPED_EARLY, Child, Ended
from swiftv2.tuning.desk import Desk, Direct, Letters, Service, Stopped, open_server
from swiftv2.tuning.folder import StudyFolder, finetune_config, settle, steps_of
from swiftv2.tuning.keeper import Asker, Keeper, Task
from swiftv2.tuning.space import words

_POLL_SECONDS = 0.5
_MOST_FAILURES = 3
"""Trials that may fail one after the other before a worker takes the study, not its settings, for wrong."""
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


class Worker:
    """Runs trials until there are none left.

    Args:
        config: the search.
        name: of this worker; a Slurm task of the same array and index has the same name when it is requeued.
        tell: told in one line what happens.
        command: words that start a trial before its configuration; `swiftv2 finetune` when None.
        poll_seconds: between looks at a trial.

    Raises:
        UsageError: the study began with other settings, or its test subjects were predicted already.
        SwiftError: its folder or storage cannot be used.
    """

    def __init__(
        self,
        config: TuneConfig,
        name: str,
        tell: Callable[[str], None],
        command: Sequence[str] | None = None,
        poll_seconds: float = _POLL_SECONDS,
    ) -> None:
        self.config, self.name, self.tell, self.command, self.poll = config, safe(name), tell, command, poll_seconds
        self.folder = StudyFolder(config.folder)
        self.folder.refuse_growth()
        self.base = settle(config)
        self.stopped = False
        self._failures = 0

    def run(self) -> int:
        """Take trials until the study has all of them; 0 then, 75 where it was told to stop.

        Raises:
            SwiftError: the keeper failed, or trial after trial.
        """
        service: Service | None = None
        keeper: Keeper | None = None
        max_steps = steps_of(self.base)
        with self._hearing():
            try:
                if self.config.storage is None:
                    service = Service(self.config, max_steps)
                    service.start()
                    return self._work(Letters(self.folder, self.name, lambda: self._check(service)))
                keeper = open_server(self.config, max_steps, lambda: self._check(None))
                return self._work(Direct(keeper))
            except Stopped:
                return STOPPED_EARLY
            finally:
                if service is not None:
                    service.stop()
                if keeper is not None:
                    keeper.close()

    def _work(self, desk: Desk) -> int:
        while not self.stopped:
            asker = Asker(self.name, this_process(0), self.config.trials)
            task = desk.ask(asker)
            if task.kind == "done":
                return 0
            if task.kind == "wait":
                self._pause()
                continue
            folder = self.folder.claim(task.number)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                claim = Lease.acquire(folder, 1 + last_attempt(folder), stale_seconds=self.config.stale_seconds)
            except SwiftError:
                self._pause()  # Another worker was faster.
                continue
            with claim:
                self._try(desk, task, claim)
        return STOPPED_EARLY

    def _try(self, desk: Desk, task: Task, claim: Lease) -> None:
        """Run a trial and tell how it ended; not where the worker was told to stop, or lost the trial to another."""
        number, run = task.number, self.folder.trial(task.number)
        said = words({**task.values, "run.dir": str(run), "evaluate.test": False})
        try:
            settings = finetune_config(self.base, said, f"trial {number}")
        except UsageError as error:
            self._conclude(desk, number, Ended("failed", reason=str(error)))
            return
        self._wait_for_the_former(number)
        self.tell(f"trial {number}: {' '.join(words(task.values))}")
        child = Child(run, settings, self.folder.logs / f"trial_{number:04d}.log", self.config.ranks, self.command)
        pruned = False

        def each(child: Child) -> None:
            nonlocal pruned
            if self.stopped or claim.lost is not None:
                child.tell_to_stop()
                return
            if (rows := child.fresh()) and desk.report(number, rows):
                pruned = True
                child.tell_to_stop()

        try:
            ended = child.follow(each, self.poll)
        except Stopped:
            ended = child.judge()
        if claim.lost is not None:
            self.tell(f"trial {number}: taken over by {claim.lost}")
        elif ended.state != "stopped":
            self._conclude(desk, number, ended)
        elif pruned:
            self._conclude(desk, number, Ended("pruned"))
        else:
            self.stopped = True  # Maybe by the clock of the job, which the run itself has heard.

    def _conclude(self, desk: Desk, number: int, ended: Ended) -> None:
        state = ended.state
        desk.tell(number, state, ended.value, ended.reason)
        if state in {"complete", "pruned"} and not self.config.keep_checkpoints:
            for name in ("checkpoints", "weights"):
                shutil.rmtree(self.folder.trial(number) / name, ignore_errors=True)
        told = f" {ended.value:.6g}" if ended.value is not None else ""
        self.tell(f"trial {number}: {state}{told}{f': {ended.reason}' if ended.reason else ''}")
        self._failures = self._failures + 1 if state == "failed" else 0
        if self._failures >= _MOST_FAILURES:
            raise SwiftError(
                f"the last {self._failures} trials of this worker failed, trial {number} with: {ended.reason}; if the study is "
                "wrong, and not these settings, mend it in a new folder; given again, it goes on"
            )

    def _wait_for_the_former(self, number: int) -> None:
        """Let a run that its worker has left behind save its state and end: one run, one writer."""
        path = self.folder.trial(number) / LEASE
        while (former := read_holder(path)) is not None and not self.stopped:
            age = time.time() - path.stat().st_mtime
            if not is_alive(former, this_process(0), age, STALE_SECONDS):
                return
            time.sleep(self.poll)
        if self.stopped:
            raise Stopped

    def _pause(self) -> None:
        end = time.monotonic() + 2 * self.poll
        while time.monotonic() < end and not self.stopped:
            time.sleep(min(self.poll, 0.2))

    def _check(self, service: Service | None) -> None:
        if self.stopped:
            raise Stopped
        if service is not None and service.problem is not None:
            raise SwiftError(f"{self.config.folder}: the study cannot be kept: {service.problem}")

    @contextmanager
    def _hearing(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            del number, frame
            self.stopped = True

        heard = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
        former = [signal.signal(number, note) for number in heard]
        try:
            yield
        finally:
            for number, handler in zip(heard, former, strict=True):
                signal.signal(number, handler)


def default_name(environment: dict[str, str] | Any) -> str:
    """Name of a worker: of its task in a Slurm array, or of host and process."""
    array, index = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{index}" if array and index else environment.get("SLURM_JOB_ID")
    node = environment.get("SLURM_NODEID", "0")
    return f"job-{job}-{node}" if job else f"{socket.gethostname()}-{os.getpid()}"


def safe(name: str) -> str:
    """A name that can be part of a file's.

    Raises:
        UsageError: nothing of it can.
    """
    kept = _UNSAFE.sub("-", name).strip("-.")
    if not kept:
        raise UsageError(f"--worker {name!r}: give letters, digits and ._-")
    return kept
