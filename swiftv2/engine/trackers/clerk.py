"""The process of one tracker: takes lines of numbers from the run until that ends, and says how it stands.

Started as `python -m swiftv2.engine.trackers.clerk`. The first line of standard input is the order, each other one a step;
standard output carries one JSON object for each thing that is worth saying. It imports no torch.
"""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from typing import Any, TextIO

from swiftv2.engine.trackers.tracker import Order, Tracker, open_tracker

MOST_ERRORS = 5
"""Errors one after the other after which a tracker is taken for gone."""
_HIDDEN = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIALS")
_SHORTEST_SECRET = 6
_LONGEST_PROBLEM = 300
_ORPHAN_SECONDS = 60.0
"""Beyond `close_seconds`, for what a run that is gone has left: a library may still be at its imports."""
_LOOK_SECONDS = 1.0


def main() -> int:
    """Serve one tracker; exit status 0, or 1 where it could not be opened or was given up."""
    # What ends the run is told by the end of the input: a signal to all of a job must not cut the last numbers off.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    values = json.loads(sys.stdin.readline())
    limit, parent = float(values.pop("close_seconds")), int(values.pop("parent"))
    order = Order(**values)
    threading.Thread(target=_outlive, args=(parent, limit + _ORPHAN_SECONDS), daemon=True).start()
    try:
        tracker = open_tracker(order)
    except BaseException as error:  # noqa: BLE001 (libraries raise what they like, SystemExit too)
        _say(answers, error=_told(error), fatal=True)
        return _end(1)
    _say(answers, opened=True)
    return _end(_serve(tracker, answers, limit))


def _serve(tracker: Tracker, answers: TextIO, limit: float) -> int:
    failed = 0
    for line in sys.stdin:
        row = json.loads(line)
        try:
            tracker.log(row["step"], row["values"])
        except Exception as error:  # noqa: BLE001 (see above)
            failed += 1
            _say(answers, taken=1, error=_told(error), fatal=failed >= MOST_ERRORS)
            if failed >= MOST_ERRORS:
                return 1
            continue
        failed = 0
        _say(answers, taken=1)
    # Whoever started this may have given up: nobody else would end a library that hangs.
    threading.Timer(limit, _end, (1,)).start()
    try:
        tracker.close()
    except BaseException as error:  # noqa: BLE001 (see above)
        _say(answers, error=_told(error), fatal=True)
        return 1
    _say(answers, closed=True)
    return 0


def _outlive(parent: int, seconds: float) -> None:
    """End this process so long after the run's: where a library hangs, nobody else would."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    time.sleep(seconds)
    _end(1)


def _end(status: int) -> int:
    """End with all that the library has started, and without its handlers of the interpreter's end, which may wait."""
    if os.getpgid(0) == os.getpid():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
    os._exit(status)


def _say(answers: TextIO, **values: Any) -> None:
    try:
        answers.write(json.dumps(values) + "\n")
        answers.flush()
    except OSError:  # The run is gone; what came before is written all the same.
        return


def _told(error: BaseException) -> str:
    """An error in one line, without any secret of the environment."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    for name, value in os.environ.items():
        if name.upper().endswith(_HIDDEN) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    return text[:_LONGEST_PROBLEM]


def ordered(order: Order, close_seconds: float) -> str:
    """The first line of the input."""
    return json.dumps({**asdict(order), "close_seconds": close_seconds, "parent": os.getpid()}) + "\n"


if __name__ == "__main__":
    sys.exit(main())
