"""One run, one writer: `lease.json` lets one process in, and lets a successor take over from a dead one."""

import contextlib
import json
import os
import secrets
import socket
import threading
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from swiftv2.errors import SwiftError
from swiftv2.files import write_file
from swiftv2.records import Holder, read_holder

HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 120.0


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

        Raises:
            SwiftError: a living process holds it; the message names it.
        """
        path = run_dir / "lease.json"
        mine = this_process(attempt)
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
                _retire(path, former)
            # A hard link fails where another newcomer was faster; a rename would overwrite it.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        winner = read_holder(path)
        if winner is None or winner.token != mine.token:
            raise SwiftError(f"{run_dir} has just been taken by {winner or 'another process'}: one run has one writer")
        return cls(path, mine, heartbeat_seconds)

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
    return Holder(socket.gethostname(), pid, _started(pid) or "", job, restart, attempt, secrets.token_hex(8), _now())


def is_alive(former: Holder, mine: Holder, age: float, stale_seconds: float) -> bool:
    """Whether a former holder still counts; `age` is that of its heartbeat in seconds, by the file system's clock."""
    if former.released:
        return False
    if former.job is not None and former.job == mine.job and former.restart < mine.restart:
        return False  # Slurm requeues a job only when its former run is dead
    if former.host == mine.host:
        started = _started(former.pid)
        same_boot = former.started.partition("/")[0] == mine.started.partition("/")[0]
        if former.started and same_boot and started != former.started:
            return False
    return age < stale_seconds


def _started(pid: int) -> str | None:
    """Boot id and start time of a living process of this host; None where there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # The name in brackets may hold blanks; the start time is the 22nd field, the 20th after it.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else f"{boot}/{fields[19]}"


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
