"""What a run directory tells, read without torch: events, metrics, checkpoints, who holds its lease."""

import json
import os
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftv2.errors import SwiftError
from swiftv2.files import read_json

EVENTS, METRICS, LEASE = "events.jsonl", "metrics.jsonl", "lease.json"
STALE_SECONDS = 120.0
"""Age of a heartbeat from which its holder counts as dead."""
NO_FAULT = frozenset({"InterruptedRunError", "KeyboardInterrupt"})
"""Errors of `failed` events after which the same command goes on."""
FOLDERS = ("checkpoints", "logs", "figures")


@dataclass(frozen=True)
class Holder:
    """Who holds a lease; `started` (boot id and start time in clock ticks) guards against a process id used again.

    The heartbeat is the file's modification time, which a holder moves without writing: a late beat cannot overwrite a
    successor's lease.
    """

    host: str
    pid: int
    started: str
    job: str | None
    restart: int
    attempt: int
    token: str
    since: str
    released: bool = False

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job} (attempt {self.attempt}, since {self.since})"


def read_holder(path: Path) -> Holder | None:
    """Who holds a lease; None where there is no such file.

    Raises:
        SwiftError: it is no lease.
    """
    if not path.exists():
        return None
    try:
        return Holder(**read_json(path))
    except TypeError as error:
        raise SwiftError(f"{path}: not a lease: remove it if no process writes to this run") from error


def process_start(pid: int) -> str | None:
    """What tells a living process of this host from all others, as a lease notes it; None where there is none.

    Boot id, namespace of process ids (each container may have its own, in which others' numbers mean nothing) and start time.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 (not a path)
        # The name in brackets may hold blanks; the start time is the 22nd field, the 20th after it.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else f"{boot} {space}/{fields[19]}"


def lives(holder: Holder) -> bool | None:
    """Whether a holder's process lives; None where that cannot be told: on another host, boot or namespace of process ids."""
    mine = process_start(os.getpid())
    if holder.host != socket.gethostname() or mine is None or mine.partition("/")[0] != holder.started.partition("/")[0]:
        return None
    return process_start(holder.pid) == holder.started


def read_lines(path: Path, damaged: list[int] | None = None) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; a last line that a kill has torn is left out.

    Args:
        path: the file; one that is not there has no lines.
        damaged: takes the numbers of other lines that are no JSON object, which then are left out; None: they are refused.

    Raises:
        SwiftError: a line is no JSON object; the message names it.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif damaged is None:
            raise SwiftError(f"{path}: line {number} is damaged")
        else:
            damaged.append(number)
    return rows


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Values of `metrics.jsonl` by step: where a step was done again, after a kill or a rewind, the last of each.

    An evaluation that was made up for stands in a line of its own.
    """
    return by_step(read_lines(path))


def by_step(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics by step, see `read_metrics`."""
    last: dict[int, dict[str, Any]] = {}
    for row in rows:
        former = last.get(row["step"], row)
        if row["attempt"] >= former["attempt"]:
            last[row["step"]] = former | row
    return [last[step] for step in sorted(last)]


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append one JSON object as a line, in one write: lines of several processes, or of a kill, are never mixed.

    Raises:
        SwiftError: it cannot be written whole.
    """
    data = (json.dumps({key: _finite(value) for key, value in values.items()}, allow_nan=False) + "\n").encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SwiftError(f"{path}: cannot be written ({error.strerror})") from error
    if written != len(data):
        raise SwiftError(f"{path}: only part of a line could be written: is the disk full?")


def cut_torn_line(path: Path) -> None:
    """Cut off what a kill has left of a last line, so that the next one begins on its own."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        with path.open("r+b") as file:
            file.truncate(whole)


def only_ours(path: Path) -> bool:
    """Whether a folder without configuration holds only what an earlier start left before it wrote one."""
    return {p.name for p in path.iterdir() if not p.name.startswith(".lease")} <= {*FOLDERS, "lease.json", "events.jsonl"}


def is_foreign(path: Path) -> bool:
    """Whether a folder holds other things than a run: nothing of a run may be put there."""
    return path.is_dir() and any(path.iterdir()) and not (path / "config.yaml").exists() and not only_ours(path)


def newest_step(run_dir: Path) -> int | None:
    """Step of the newest checkpoint that was finished; None where there is none. Its files are not looked at."""
    steps = [
        int(path.parent.name.removeprefix("step_"))
        for path in (run_dir / "checkpoints").glob("step_*/manifest.json")
        if re.fullmatch(r"step_\d+", path.parent.name)
    ]
    return max(steps, default=None)


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null stands for both."""
    unknown = isinstance(value, float) and (value != value or value in (float("inf"), float("-inf")))
    return None if unknown else value
