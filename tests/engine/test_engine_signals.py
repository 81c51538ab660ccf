"""Requests to stop: heard at once, whatever the main thread does, and forgotten without a trace."""

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from swiftv2.engine.signals import STOPPED_EARLY, TIME_LIMIT, StopRequest, describe, end_time
from swiftv2.errors import SwiftError

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]


@pytest.fixture(autouse=True)
def handlers_come_back() -> Iterator[None]:
    former = [signal.getsignal(number) for number in SIGNALS]
    threads = threading.active_count()
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == former
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


class Heard(list[tuple[str, float]]):
    """What was heard, and when."""

    def __call__(self, reason: str) -> None:
        self.append((reason, time.monotonic()))


def library_call() -> tuple[float, float]:
    """When a call began and ended in which the main thread runs no Python for about a second, and no signal breaks it off."""
    began = time.monotonic()
    hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 1_000_000)
    return began, time.monotonic()


def later(seconds: float, action: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_heard_while_the_main_thread_is_in_a_library(number: signal.Signals) -> None:
    heard, codes = Heard(), []
    with StopRequest(heard=heard) as request:
        assert request.code == 0
        timers = [
            later(0.05, lambda: os.kill(os.getpid(), number)),
            later(0.25, lambda: codes.append(request.code)),
            later(0.3, lambda: os.kill(os.getpid(), signal.SIGUSR1)),
        ]
        _, ended = library_call()
        for timer in timers:
            timer.join()
    ((reason, when),) = heard
    assert reason == number.name
    assert when < ended - 0.1, "not only when the library returned"
    assert codes == [number]
    assert request.code == number, "what asked first"


def test_a_signal_counts_at_once_where_nothing_holds_the_main_thread_up() -> None:
    with StopRequest() as request:
        for number in SIGNALS[:2]:
            os.kill(os.getpid(), number)
            assert request.code == signal.SIGTERM


def test_the_third_interrupt_breaks_off() -> None:
    with StopRequest() as request:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert request.code == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_another_rank_was_asked_is_adopted() -> None:
    with StopRequest() as request:
        request.ask(0)
        assert request.code == 0
        request.ask(signal.SIGUSR2)
        assert describe(request.code) == "SIGUSR2"
        request.ask(0)
        assert request.code == signal.SIGUSR2


def test_the_end_of_the_time_is_asked_for_before_it_comes() -> None:
    with StopRequest(end=time.time() + 100) as request:
        request.check_time(50)
        assert request.code == 0
        request.check_time(101)
        assert (request.code, describe(request.code)) == (TIME_LIMIT, "time limit")
    with StopRequest() as request:
        request.check_time(1e9)
        assert request.code == 0


def test_the_end_of_the_time_is_heard_while_the_main_thread_is_in_a_library() -> None:
    heard = Heard()
    with StopRequest(end=time.time() + 0.1, heard=heard) as request:
        _, ended = library_call()
        assert request.code == TIME_LIMIT
    ((reason, when),) = heard
    assert reason == "time limit"
    assert when < ended


def test_codes_of_all_ranks_have_an_order() -> None:
    assert all(0 < number < TIME_LIMIT for number in signal.valid_signals())
    assert STOPPED_EARLY == 75


@pytest.mark.parametrize(
    ("minutes", "slurm", "end"),
    [(None, None, None), (2.0, None, 1120.0), (None, "1060", 1060.0), (2.0, "1060", 1060.0), (0.5, "1060", 1030.0)],
)
def test_the_sooner_end_counts(minutes: float | None, slurm: str | None, end: float | None) -> None:
    environment = {} if slurm is None else {"SLURM_JOB_END_TIME": slurm}
    assert end_time(minutes, environment, 1000.0) == end


@pytest.mark.parametrize("told", ["tomorrow", "", "nan", "inf"])
def test_an_end_that_is_no_time_is_refused(told: str) -> None:
    with pytest.raises(SwiftError, match=f"SLURM_JOB_END_TIME='{told}' is not a unix time"):
        end_time(None, {"SLURM_JOB_END_TIME": told}, 1000.0)
