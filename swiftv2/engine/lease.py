"""One run, one writer: `lease.json` lets one process in, and lets a successor take over from a dead one."""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from swiftv2.errors import SwiftError
from swiftv2.files import write_file
from swiftv2.records import STALE_SECONDS, Holder, lives, process_start, read_holder

HEARTBEAT_SECONDS = 15.0
FENCE_SECONDS = HEARTBEAT_SECONDS + 25.0
"""How long a holder that lives on may take to find out that it has lost its lease, and to stop."""


class Lease:
    """A held lease; a thread renews its heartbeat until it is released or lost."""

    def __init__(self, path: Path, holder: Holder, heartbeat_seconds: float) -> None:
        self.path = path
        self.holder = holder
        self._lost: str | None = None
        self._done = threading.Event()
        self._interval = heartbeat_seconds
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        run_dir: Path,
        attempt: int,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> Self:
        """Take the lease of a run directory.

        It is free where nobody holds it, the holder released it, the holder's process is gone (same host), the holder is
        the same Slurm job before it was requeued, or its heartbeat is older than `stale_seconds` by the file system's clock.
        Slurm requeues a job, too, when it has lost sight of a node whose processes live on: the job's former start, where it is
        not known to be gone, is given the time to find out before anything is written.

        Raises:
            SwiftError: a living process holds it; the message names it.
        """
        path = run_dir / "lease.json"
        mine, fenced = this_process(attempt), False
        temporary = path.with_name(f".lease.{mine.token}")
        _write(temporary, mine)
        try:
            age = temporary.stat().st_mtime - path.stat().st_mtime if path.exists() else 0.0
            try:
                former = read_holder(path)
            except SwiftError:
                # Torn by a node that died; one that is being written is no older than this.
                if age < stale_seconds:
                    raise
                former = None
                path.rename(path.with_name(f".lease.torn.{mine.token}"))
            if former is not None:
                if is_alive(former, mine, age, stale_seconds):
                    raise SwiftError(
                        f"{run_dir} is being written by {former}, last heartbeat {max(age, 0):.0f} s ago: stop that one "
                        "first, or wait until it has ended"
                    )
                fenced = may_live_on(former, mine)
                _retire(path, former)
            # A hard link fails where another newcomer was faster; a rename would overwrite it.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        winner = read_holder(path)
        if winner is None or winner.token != mine.token:
            raise SwiftError(f"{run_dir} has just been taken by {winner or 'another process'}: one run has one writer")
        held = cls(path, mine, heartbeat_seconds)
        if fenced:
            time.sleep(FENCE_SECONDS / HEARTBEAT_SECONDS * heartbeat_seconds)
        return held

    @property
    def lost(self) -> str | None:
        """Who took the lease away from this process, where somebody did: it must stop writing."""
        return self._lost

    def taker(self) -> str | None:
        """The same, by the file as it is now: a process that was stopped for a while has missed it.

        A file that cannot be read just now tells nothing.
        """
        with contextlib.suppress(OSError, SwiftError):
            self._still_mine()
        return self._lost

    def release(self) -> None:
        """Give the lease back; its file stays and says so."""
        self._done.set()
        self._thread.join()
        if self._still_mine():
            temporary = self.path.with_name(f".lease.{self.holder.token}")
            _write(temporary, replace(self.holder, released=True))
            temporary.replace(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._done.wait(self._interval) and self._lost is None:
            # A file system that is away for a while, or a file that is being written: the next beat tries again.
            with contextlib.suppress(OSError, SwiftError):
                if self._still_mine():
                    os.utime(self.path)

    def _still_mine(self) -> bool:
        current = read_holder(self.path)
        if current is None or current.token != self.holder.token:
            self._lost = str(current) if current else "somebody who removed lease.json"
        return self._lost is None


def last_attempt(run_dir: Path) -> int:
    """Attempt of the last holder; 0 where there was none."""
    holder = read_holder(run_dir / "lease.json")
    return holder.attempt if holder else 0


def this_process(attempt: int) -> Holder:
    """This process as a holder of an attempt."""
    job = os.environ.get("SLURM_JOB_ID")
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    pid = os.getpid()
    return Holder(socket.gethostname(), pid, process_start(pid) or "", job, restart, attempt, secrets.token_hex(8), _now())


def is_alive(former: Holder, mine: Holder, age: float, stale_seconds: float) -> bool:
    """Whether a former holder still counts; `age` is that of its heartbeat in seconds, by the file system's clock."""
    if former.released:
        return False
    if _same_job_before(former, mine):
        return False  # Dead, or on a node that Slurm has given up: its place is this one's.
    return lives(former) is not False and age < stale_seconds


def may_live_on(former: Holder, mine: Holder) -> bool:
    """Whether the former start of the same Slurm job, whose place this one takes, may still be writing.

    A silent heart tells nothing: the file system may have been away for both.
    """
    return not former.released and lives(former) is not False and _same_job_before(former, mine)


def _same_job_before(former: Holder, mine: Holder) -> bool:
    return former.job is not None and former.job == mine.job and former.restart < mine.restart


def _retire(path: Path, former: Holder) -> None:
    """Take a dead holder's file away, and give it back where it turns out to be a newcomer's."""
    taken = path.with_name(f".lease.retired.{secrets.token_hex(8)}")
    try:
        path.rename(taken)
    except FileNotFoundError:
        return
    current = read_holder(taken)
    if current is not None and current.token != former.token:
        with contextlib.suppress(FileExistsError):
            os.link(taken, path)
    taken.unlink()


def _write(path: Path, holder: Holder) -> None:
    write_file(path, json.dumps(asdict(holder), indent=1) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
