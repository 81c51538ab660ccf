"""`sweep.json`: under which job each element of a sweep was queued, and a lock that lets one `sweep submit` in at a time."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from swiftv2.errors import SwiftError
from swiftv2.files import read_json, write_file

BOOK, LOCK = "sweep.json", ".sweep.lock"
OTHER_JOB = "--after"
"""Stands for the name of an element where a job of no element is waited for."""
PATIENCE_SECONDS = 60.0
"""How long a `sweep submit` waits for another one on the same folder."""
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Entry:
    """How an element was queued the last time."""

    job: str
    """As Slurm writes it: 117_3."""
    index: int
    """Of the element in the sweep as it was then."""
    words: tuple[str, ...]
    """What all elements were given besides the file."""
    when: str
    """UTC, ISO 8601."""
    sweep: str
    """The copy of the sweep's file that the job reads."""
    after: Mapping[str, str]
    """Jobs that it waits for, by the name of the element (OTHER_JOB for one that is none)."""

    @property
    def array(self) -> str:
        """Number of the array that it belongs to."""
        return self.job.partition("_")[0]


def now() -> str:
    """The time as an entry notes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_book(folder: Path) -> dict[str, Entry]:
    """What was queued, by the names of elements; empty where nothing was.

    Raises:
        SwiftError: the file is damaged.
    """
    path = folder / BOOK
    if not path.exists():
        return {}
    try:
        elements = read_json(path)["elements"]
        return {name: Entry(**{**values, "words": tuple(values["words"])}) for name, values in elements.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise SwiftError(f"{path} is damaged: it tells which jobs were queued; move it away to begin anew") from error


def note(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Add entries, in the place of older ones of the same elements; for the holder of the lock."""
    merged = {**read_book(folder), **entries}
    content = {"elements": {name: asdict(entry) for name, entry in merged.items()}}
    write_file(folder / BOOK, json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def alone_in(folder: Path, patience: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Let nobody else queue elements of this folder meanwhile; the system frees the lock of a process that dies.

    Raises:
        SwiftError: another `sweep submit` holds it for longer than `patience` seconds, or the file system has no locks.
    """
    deadline = time.monotonic() + patience
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not _take(descriptor, folder):
            if time.monotonic() > deadline:
                raise SwiftError(
                    f"another `swiftv2 sweep submit` is at work on {folder} since {patience:g} s: let it end first"
                )
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Without it, two submits at once would queue an element twice: not to be passed over in silence.
        raise SwiftError(
            f"{folder} is on a file system without locks ({error.strerror}): give the sweep a folder on another one"
        ) from error
    return True
