"""Requests to stop, by signal or by the clock, heard at once even while the main thread sits in a collective."""

import contextlib
import math
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Self

from swiftv2.errors import SwiftError

STOPPED_EARLY = 75  # EX_TEMPFAIL: state is saved, run me again

TIME_LIMIT = signal.NSIG
"""Code of a stop by the clock, above the numbers of all signals."""

_HEARD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_INTERRUPTS_BEFORE_GIVING_UP = 3
_GIVING_UP_SECONDS = 5.0
_INTERRUPTED = 130
_LONGEST_WAIT = 60.0  # so that a clock that was set anew is heeded


def describe(code: int) -> str:
    """What asked to stop: "SIGUSR1", "time limit"."""
    return "time limit" if code == TIME_LIMIT else signal.Signals(code).name


def end_time(limit_minutes: float | None, environment: Mapping[str, str], began: float) -> float | None:
    """Unix time at which the run must have ended, None where nothing limits it.

    Args:
        limit_minutes: wall-clock minutes that the run may take.
        environment: variables of this process; Slurm puts its job's end there as `SLURM_JOB_END_TIME`, in unix time.
        began: unix time at which the run began.

    Raises:
        SwiftError: Slurm's variable is no number.
    """
    ends = [] if limit_minutes is None else [began + 60 * limit_minutes]
    told = environment.get("SLURM_JOB_END_TIME")
    if told is not None:
        try:
            ends.append(float(told))
        except ValueError:
            ends.append(math.nan)
        if not math.isfinite(ends[-1]):
            raise SwiftError(f"SLURM_JOB_END_TIME={told!r} is not a unix time: set it right, or unset it")
    return min(ends, default=None)


def _tell_nobody(reason: str) -> None:
    del reason


class StopRequest:
    """Notes SIGTERM, SIGUSR1, SIGUSR2, SIGINT and the end of the time while it is entered (main thread).

    Python runs its own handlers only between two instructions of the main thread: not while that one waits in a collective
    or computes in a library. What Python does at once, in whichever thread the signal comes, is to write its number to a
    file descriptor, and a thread of its own reads there.

    A launcher passes an interrupt from the keyboard on to ranks that have got it already, so only a third one
    breaks off at once.
    """

    def __init__(self, end: float | None = None, heard: Callable[[str], None] = _tell_nobody) -> None:
        """Nothing is caught before the request is entered.

        Args:
            end: unix time at which the run must have ended.
            heard: called once, with what asked ("SIGTERM", "time limit"), from the thread that hears it.
        """
        self._end = end
        self._heard = heard
        self._code = 0
        self._interrupts = 0
        self._cleanup = contextlib.ExitStack()

    @property
    def code(self) -> int:
        """What asked to stop: a signal's number or TIME_LIMIT; 0 while nobody has. Ranks agree on the largest."""
        return self._code

    def ask(self, code: int) -> None:
        """Adopt what another rank was asked; 0 changes nothing."""
        self._code = max(self._code, code)

    def check_time(self, needed_seconds: float) -> None:
        """Ask to stop where less time is left than what is to be done still needs."""
        if self._end is not None and self._end - time.time() < needed_seconds:
            self._note(TIME_LIMIT)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as cleanup:
            told, telling = socket.socketpair()
            cleanup.enter_context(told)
            cleanup.enter_context(telling)
            telling.setblocking(False)
            reader = threading.Thread(target=self._listen, args=(told,), name="stop request", daemon=True)
            reader.start()
            cleanup.callback(reader.join)
            cleanup.callback(telling.shutdown, socket.SHUT_WR)  # The reader finds the end, and ends.
            former = signal.set_wakeup_fd(telling.fileno(), warn_on_full_buffer=False)
            cleanup.callback(signal.set_wakeup_fd, former)
            for number in _HEARD:
                # One set by other than Python (None) cannot be put back: what the system does by itself comes nearest.
                cleanup.callback(signal.signal, number, signal.getsignal(number) or signal.SIG_DFL)
                signal.signal(number, self._handle)
                signal.siginterrupt(number, False)  # Libraries must not see their calls broken off.
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._cleanup.close()

    def _listen(self, told: socket.socket) -> None:
        """Note what is read until the other end is closed, and the end of the time."""
        silent, interrupts = True, 0
        while True:
            left = self._end - time.time() if self._end is not None and silent else _LONGEST_WAIT
            if select.select([told], [], [], min(max(left, 0.0), _LONGEST_WAIT))[0]:
                numbers = told.recv(64)
                if not numbers:
                    return
                codes = [number for number in numbers if number in _HEARD]
                interrupts += codes.count(signal.SIGINT)
                if interrupts >= _INTERRUPTS_BEFORE_GIVING_UP:
                    self._give_up()
            else:
                codes = [TIME_LIMIT] if self._end is not None and time.time() >= self._end else []
            for code in codes:
                self._note(code)
            if codes and silent:
                silent = False
                self._heard(describe(self._code))

    def _give_up(self) -> None:
        """End at once where the main thread does not come to its own handler: it may sit in a collective."""
        last = threading.Timer(_GIVING_UP_SECONDS, os._exit, [_INTERRUPTED])
        last.daemon = True
        last.start()
        self._cleanup.callback(last.join)
        self._cleanup.callback(last.cancel)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """What Python runs in the main thread: a request counts at once where nothing holds that thread up."""
        del frame
        self._note(number)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts >= _INTERRUPTS_BEFORE_GIVING_UP:
                raise KeyboardInterrupt

    def _note(self, code: int) -> None:
        self._code = self._code or code
