"""What a run has left in its directory, as far as it tells how the run stands: read from the ends of files, without torch."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from swiftv2.cluster.book import read_book
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import read_json
from swiftv2.records import EVENTS, LEASE, METRICS, Holder, lives, read_holder

HELDOUT = "heldout/loss"
_TAILS = (1 << 16, 1 << 20, 1 << 22)
"""Bytes of metrics that are read from the end: the last values stand in the first, an evaluation may lie further back."""
_COMMON = tuple(f'"event": "{kind}"'.encode() for kind in ("saved", "epoch"))
"""What stands in lines that are many and tell nothing of how a run stands: those are not even taken apart."""
_STEP_FOLDER = re.compile(r"step_(\d+)")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Checkpoint(NamedTuple):
    """The newest checkpoint, by its manifest and the sizes of its files; `problem`: what is visibly wrong, in one line."""

    step: int
    time: float
    kind: str | None
    size: int
    problem: str | None


@dataclass(frozen=True)
class Traces:
    """What was found.

    Attributes:
        path: the run directory.
        settings: `config.yaml`, by section; empty before the first start.
        events: those that tell how the run stands, oldest first, without its many saves.
        rows: last lines of metrics, oldest first.
        evaluations: lines with a held-out loss, oldest first, as far back as they were looked for.
        best: value and step of the best held-out loss.
        holder, heartbeat: the lease, and the unix time at which it was last renewed.
        alive: whether the holder's process lives; None where that cannot be told, as it is on another host.
        checkpoint: the newest.
        largest: bytes of the largest of the last checkpoints.
        free: bytes left on the disk.
        damaged: a line for each file that cannot be read as it should be.
        queued: the job as which it was last queued as an element of a sweep, and the unix time of that.
    """

    path: Path
    settings: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    rows: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    best: tuple[float, int] | None
    holder: Holder | None
    heartbeat: float | None
    alive: bool | None
    checkpoint: Checkpoint | None
    largest: int
    free: int
    damaged: Sequence[str] = field(default=())
    queued: tuple[float, str] | None = None

    @cached_property
    def job(self) -> str | None:
        """The Slurm job that last had to do with the run: of the sweep, the batch script or the lease, whichever is latest."""
        known = [self.queued] if self.queued is not None else []
        known += [(row["time"], str(row["job"])) for row in self.events if row["event"] == "job" and row.get("job")]
        if self.holder is not None:
            known.append((datetime.fromisoformat(self.holder.since).timestamp(), self.holder.job or ""))
        return max(known)[1] or None if known else None

    def setting(self, section: str, key: str, otherwise: Any = None) -> Any:
        """A value of the configuration; runs of other recipes may not have it."""
        values = self.settings.get(section)
        found = values.get(key) if isinstance(values, dict) else None
        return otherwise if found is None else found

    def value(self, key: str) -> Any:
        """Of the last line of metrics that has the key; None where none has, or where it is not finite."""
        return next((row[key] for row in reversed(self.rows) if key in row), None)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run directories that paths stand for: themselves, or those in a folder of runs; each once.

    A sweep's folder stands for all elements that were queued, also where they have not begun and have no folder yet.

    Raises:
        UsageError: a path is neither; it is named.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        here = [path] if _is_run(path) or _is_queued(path) else sorted(_runs_below(path), key=_natural)
        if not here:
            what = "does not exist" if not path.exists() else "is no run directory, and no folder of any"
            raise UsageError(f"{path} {what}: give what `swiftv2 pretrain` has as run.dir")
        for one in here:
            found.setdefault(one.resolve(), one)
    return list(found.values())


def read_traces(path: Path) -> Traces:
    """Read what a run directory tells.

    What is damaged is told in `damaged`, and the rest is read all the same.

    Raises:
        OSError: a file cannot be read.
    """
    damaged: list[str] = []
    settings = _read_settings(path / "config.yaml", damaged)
    events = _read_events(path / EVENTS, damaged)
    holder, heartbeat = _read_lease(path / LEASE, damaged)
    checkpoints = list(_checkpoints(path))
    trainer = _read_trainer(path, checkpoints, damaged)
    rows = _tail(path / METRICS)
    evaluations = _evaluations(path / METRICS, rows, wanted=not checkpoints or bool(trainer.get("evaluated")))
    return Traces(
        path=path,
        settings=settings,
        events=events,
        rows=rows,
        evaluations=evaluations,
        best=_best(trainer, evaluations),
        holder=holder,
        heartbeat=heartbeat,
        alive=None if holder is None else lives(holder),
        checkpoint=checkpoints[0] if checkpoints else None,
        largest=max((one.size for one in checkpoints), default=0),
        free=shutil.disk_usage(path if path.exists() else path.parent).free,
        damaged=damaged,
        queued=_read_queued(path.absolute(), damaged),
    )


def _is_run(path: Path) -> bool:
    left = any((path / name).is_file() for name in (EVENTS, LEASE))
    return left or ((path / "checkpoints").is_dir() and any((path / name).exists() for name in ("config.yaml", "logs")))


def _runs_below(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return [below for below in path.iterdir() if below.is_dir() and _is_run(below)] + _not_begun(path)


def _not_begun(folder: Path) -> list[Path]:
    """Elements of a sweep that were queued and have no run directory yet."""
    return [folder / name for name in read_book(folder) if not _is_run(folder / name)]


def _is_queued(path: Path) -> bool:
    return not path.exists() and path.parent.is_dir() and path in _not_begun(path.parent)


def _natural(path: Path) -> list[tuple[int, str]]:
    """run_9 before run_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _read_settings(path: Path, damaged: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        settings = yaml.load(path.read_bytes(), Loader=_LOADER)  # noqa: S506 (a safe loader, in C where there is one)
    except yaml.YAMLError:
        settings = None
    if not isinstance(settings, dict):
        damaged.append(f"{path} is not valid YAML: it is damaged")
        return {}
    return settings


def _read_events(path: Path, damaged: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line or _COMMON[0] in line or _COMMON[1] in line:
            continue
        row = _parse(line)
        if row is not None and {"event", "time", "attempt"} <= row.keys():
            rows.append(row)
        elif number < len(lines):  # What a kill has torn off stands last, and is no damage.
            damaged.append(f"{path}: line {number} is damaged")
    return rows


def _read_lease(path: Path, damaged: list[str]) -> tuple[Holder | None, float | None]:
    try:
        holder = read_holder(path)
        return holder, None if holder is None else path.stat().st_mtime
    except FileNotFoundError:  # Handed over just now.
        return None, None
    except SwiftError as error:
        damaged.append(str(error))
        return None, None


def _read_queued(path: Path, damaged: list[str]) -> tuple[float, str] | None:
    try:
        entry = read_book(path.parent).get(path.name)
    except SwiftError as error:
        damaged.append(str(error))
        return None
    return None if entry is None else (datetime.fromisoformat(entry.when).timestamp(), entry.job)


def _checkpoints(path: Path) -> Iterator[Checkpoint]:
    """The newest, up to the first whole one of each kind, and no more than four of them."""
    named = [(int(match.group(1)), one) for one in (path / "checkpoints").glob("step_*") if (match := _step_of(one))]
    kinds: set[str | None] = set()
    for _, folder in sorted(named, reverse=True)[:4]:
        found = _look_at(folder)
        if found is None:
            continue  # Removed meanwhile.
        yield found
        if found.problem is None:
            kinds.add(found.kind)
        if {"permanent", "ephemeral"} <= kinds:
            return


def _step_of(path: Path) -> re.Match[str] | None:
    return _STEP_FOLDER.fullmatch(path.name)


def _look_at(folder: Path) -> Checkpoint | None:
    """A checkpoint by its manifest and the sizes of its files."""
    step, manifest = int(folder.name.removeprefix("step_")), folder / "manifest.json"
    try:
        when = manifest.stat().st_mtime
        content = read_json(manifest)
        sizes = {str(name): int(entry["size"]) for name, entry in content["files"].items()}
        kind = str(content["kind"])
    except FileNotFoundError:
        return Checkpoint(step, folder.stat().st_mtime, None, 0, f"{manifest} is missing") if folder.exists() else None
    except (SwiftError, KeyError, TypeError, ValueError, AttributeError):
        return Checkpoint(step, when, None, 0, f"{manifest} is damaged") if folder.exists() else None
    for name, size in sizes.items():
        try:
            found = (folder / name).stat().st_size
        except FileNotFoundError:
            if not manifest.exists():
                return None
            return Checkpoint(step, when, kind, sum(sizes.values()), f"{folder / name} is missing")
        if found != size:
            problem = f"{folder / name} has {found} bytes, not {size}"
            return Checkpoint(step, when, kind, sum(sizes.values()), problem)
    return Checkpoint(step, when, kind, sum(sizes.values()), None)


def _read_trainer(path: Path, checkpoints: Sequence[Checkpoint], damaged: list[str]) -> dict[str, Any]:
    """Of the newest whole checkpoint: it knows the best evaluation, which would else stand anywhere in the metrics."""
    whole = next((one for one in checkpoints if one.problem is None), None)
    if whole is None:
        return {}
    file = path / "checkpoints" / f"step_{whole.step}" / "trainer.json"
    try:
        return read_json(file)
    except SwiftError as error:
        if file.exists():
            damaged.append(str(error))
        return {}


def _tail(path: Path) -> list[dict[str, Any]]:
    """Lines at the end of a file of metrics; torn and damaged ones are left out."""
    lines = _last_bytes(path, _TAILS[0])[0].split(b"\n")
    return [row for row in map(_parse, lines) if row is not None and {"step", "attempt", "time"} <= row.keys()]


def _last_bytes(path: Path, size: int) -> tuple[bytes, bool]:
    """The end of a file, whose first line is cut as a rule and so cannot be read; and whether that is all of it."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            data = file.read(size)
    except FileNotFoundError:
        return b"", True
    return data, end <= size


def _evaluations(path: Path, rows: Sequence[dict[str, Any]], *, wanted: bool) -> list[dict[str, Any]]:
    """Lines with a held-out loss, from as few bytes of the end as hold one."""
    found = [row for row in rows if row.get(HELDOUT) is not None]
    if found or not wanted:
        return found
    key = json.dumps(HELDOUT).encode()
    for size in _TAILS[1:]:
        data, whole = _last_bytes(path, size)
        lines = [line for line in data.split(b"\n") if key in line] if key in data else []
        found = [row for row in map(_parse, lines) if row is not None and row.get(HELDOUT) is not None]
        if found or whole:
            break
    return found


def _best(trainer: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> tuple[float, int] | None:
    """The best that the newest checkpoint knows, or one since."""
    known = [(row[HELDOUT], row["step"]) for row in evaluations]
    if trainer.get("best_metric") == HELDOUT and trainer.get("best_value") is not None:
        known.append((trainer["best_value"], trainer["best_step"]))
    return min(known, default=None)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
