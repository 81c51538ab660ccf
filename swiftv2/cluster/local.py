"""Elements of a sweep run on this machine, some at a time, in the order of their dependencies, without Slurm."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from swiftv2.cluster.book import alone_in, read_book
from swiftv2.cluster.elements import AskSlurm, complaint, element_states
from swiftv2.cluster.sweep import Request, choose, element, resolve
from swiftv2.config.sweep import SweepConfig
from swiftv2.errors import InterruptedRunError, UsageError

STOPPED_EARLY = InterruptedRunError.exit_status
_POLL_SECONDS = 0.2
_PATIENT_REQUESTS = 2
"""Requests to stop that are handed on; one more kills what still runs."""
_THREADS = "OMP_NUM_THREADS"


@dataclass
class Outcome:
    """How the elements ended, by name."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """With the reason."""
    stopped: dict[str, str] = field(default_factory=dict)
    """With their state saved, or not started since a stop was asked for."""
    passed_over: dict[str, str] = field(default_factory=dict)

    @property
    def exit_status(self) -> int:
        """0 where all is done, 75 where something was stopped and can go on, 1 where something failed."""
        return STOPPED_EARLY if self.stopped else 1 if self.failed else 0


def local_commands(sweep: SweepConfig, request: Request, ask: AskSlurm) -> tuple[dict[str, list[str]], dict[str, str]]:
    """What would be run here, in order.

    Args:
        sweep: the sweep.
        request: which elements, and with what.
        ask: asks Slurm how elements stand that were queued there.

    Returns:
        (the command of each element by name, those passed over with the reason).

    Raises:
        UsageError: a configuration, a name or a word is wrong, or a run wants more than one rank.
    """
    unknown = sorted(set(request.only) - set(sweep.names()))
    if unknown:
        raise UsageError(f"--only {unknown[0]}: the sweep has no element of that name; it has {', '.join(sweep.names())}")
    if request.after is not None:
        raise UsageError("--after waits for a Slurm job: leave it out beside --local")
    resolve(sweep, request.words)
    chosen, passed_over = choose(element_states(sweep, read_book(sweep.folder), ask), request)
    commands = {}
    for index, name in enumerate(sweep.names()):
        if name in chosen:
            path, words = element(sweep, index, request.words)
            commands[name] = [sys.executable, "-m", "swiftv2", "pretrain", str(path), *words]
    return commands, passed_over


def run_here(sweep: SweepConfig, request: Request, at_a_time: int, ask: AskSlurm, tell: Callable[[str], None]) -> Outcome:
    """Run elements on this machine, each a process of its own, and wait for them.

    What is finished, queued or running is passed over; what failed goes on from its last checkpoint. On SIGINT, SIGTERM,
    SIGUSR1 or SIGUSR2 the elements that run are told to stop with their state saved, and no other is started.

    Args:
        sweep: the sweep.
        request: which elements, and with what.
        at_a_time: elements that run side by side; they share the cores where OMP_NUM_THREADS does not say otherwise.
        ask: asks Slurm how elements stand that were queued there.
        tell: is given a line whenever an element begins or ends.

    Raises:
        UsageError: a configuration, a name or a word is wrong; nothing is run then.
        SwiftError: somebody else queues or runs elements of this folder.
    """
    if at_a_time < 1:
        raise UsageError(f"--local {at_a_time}: give how many elements run at a time, from 1 on")
    # Checked before the folder is made.
    local_commands(sweep, request, ask)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    with alone_in(sweep.folder):
        commands, passed_over = local_commands(sweep, request, ask)
        return _Crew(sweep, commands, passed_over, at_a_time, tell).work()


class _Crew:
    """Processes of elements, some at a time."""

    def __init__(
        self,
        sweep: SweepConfig,
        commands: Mapping[str, Sequence[str]],
        passed_over: dict[str, str],
        at_a_time: int,
        tell: Callable[[str], None],
    ) -> None:
        self.sweep, self.commands, self.at_a_time, self.tell = sweep, commands, at_a_time, tell
        self.outcome = Outcome(passed_over=passed_over)
        self.waiting = list(commands)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.requests = self.heeded = 0
        cores = len(os.sched_getaffinity(0))
        self.environment = {_THREADS: str(max(1, cores // at_a_time)), **os.environ}

    def work(self) -> Outcome:
        """Until nothing runs and nothing can be started."""
        with self._hearing():
            while True:
                self._hand_on()
                self._settle()
                if not self.requests:
                    self._start()
                if not self.running:
                    break
                time.sleep(_POLL_SECONDS)
        for name in self.waiting:
            self.outcome.stopped[name] = "it was not started any more"
        return self.outcome

    def _start(self) -> None:
        """Begin what may begin; what waits in vain fails."""
        after = {run.name: run.after for run in self.sweep.runs()}
        for name in list(self.waiting):
            lost = [parent for parent in after[name] if parent in self.outcome.failed or parent in self.outcome.stopped]
            absent = [parent for parent in after[name] if not self._is_done(parent) and parent not in self.commands]
            if lost or absent:
                self.waiting.remove(name)
                word = "has failed" if lost and lost[0] in self.outcome.failed else "has not finished"
                self.outcome.failed[name] = f"{(lost or absent)[0]}, for which it waits, {word}"
                self.tell(f"{name}: not started: {self.outcome.failed[name]}")
            elif len(self.running) < self.at_a_time and all(map(self._is_done, after[name])):
                self.waiting.remove(name)
                self.running[name] = self._spawn(name)

    def _is_done(self, name: str) -> bool:
        return name in self.outcome.done or self.outcome.passed_over.get(name) == "finished"

    def _spawn(self, name: str) -> "subprocess.Popen[bytes]":
        log = self._log(name)
        self.tell(f"{name}: started, output in {log}")
        with log.open("ab") as output:
            output.write(f"$ {shlex.join(self.commands[name])}\n".encode())
            output.flush()
            # A group of its own: an interrupt from the keyboard goes to this process alone, which hands it on once.
            return subprocess.Popen(  # noqa: S603 (our own command line, no shell)
                self.commands[name],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                process_group=0,
            )

    def _settle(self) -> None:
        """Note what has ended."""
        for name, process in list(self.running.items()):
            status = process.poll()
            if status is None:
                continue
            del self.running[name]
            if status == 0:
                self.outcome.done.append(name)
                self.tell(f"{name}: done")
            elif status == STOPPED_EARLY or (self.requests and status < 0):
                self.outcome.stopped[name] = (
                    "stopped with its state saved" if status > 0 else "killed; its last checkpoint counts"
                )
                self.tell(f"{name}: {self.outcome.stopped[name]}")
            else:
                log = self._log(name)
                told = f"killed by signal {-status}" if status < 0 else complaint(log) or f"exit status {status}"
                self.outcome.failed[name] = f"{told} (see {log})"
                self.tell(f"{name}: failed: {self.outcome.failed[name]}")

    def _log(self, name: str) -> Path:
        return self.sweep.folder / f"local-{self.sweep.names().index(name)}.out"

    def _hand_on(self) -> None:
        """Tell what runs to stop, once for each request."""
        while self.heeded < self.requests:
            self.heeded += 1
            ends = self.heeded > _PATIENT_REQUESTS
            self.tell(f"told to stop: what runs {'is killed' if ends else 'ends with its state saved'}")
            for process in self.running.values():
                if ends:
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.send_signal(signal.SIGTERM)

    @contextmanager
    def _hearing(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            del number, frame
            self.requests += 1

        heard = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
        former = [signal.signal(number, note) for number in heard]
        try:
            yield
        finally:
            for number, handler in zip(heard, former, strict=True):
                signal.signal(number, handler)
