"""Start a program that is told to stop when the process that started it is gone: `python -m swiftv2.tuning.bound PARENT WORDS`.

A worker that is killed leaves no trial behind that goes on without it. It is done in the new process before its program is
loaded, since nothing but that is safe in a process with threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, words: list[str]) -> None:
    """Become the program; `parent` is the process that must live."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # It was gone before it could be watched.
            raise SystemExit(75)
    os.execvp(words[0], words)  # noqa: S606 (the words are those of the worker)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
