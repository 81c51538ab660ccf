"""A run directory as the page needs it: read once, whole, whatever the run is doing meanwhile."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import read_json
from swiftv2.records import EVENTS, METRICS, by_step, read_lines
from swiftv2.report.run.words import counted

Row = Mapping[str, Any]
UNREADABLE = (SwiftError, OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What making a part of the page may raise where a file is damaged, or another user's."""


@dataclass(frozen=True)
class Run:
    """What a run has left.

    Attributes:
        path: its directory.
        name: by which the page calls it; unique on a page.
        settings: the resolved configuration.
        environment: versions, host, command; empty where there is none.
        metrics: by step, of the last attempt that made it (see `records.read_metrics`), without steps from which a later
            attempt or a rewind went back and to which it has not come again.
        events: in the order in which they were written.
        evaluation: the last held-out evaluation; None before the first.
        damaged: lines that say what cannot be read.
        standing: how it stands, as `swiftv2 status` tells it; empty where nobody looked.
    """

    path: Path
    name: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: tuple[Row, ...]
    events: tuple[Row, ...]
    evaluation: Mapping[str, Any] | None
    damaged: tuple[str, ...] = ()
    standing: Mapping[str, Any] = field(default_factory=dict)

    def setting(self, dotted: str, otherwise: Any = None) -> Any:
        """A value of the configuration by its dotted key."""
        value: Any = self.settings
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return otherwise if value is None else value

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and finite values of a key of the metrics."""
        return self._columns.get(key, ([], []))

    @cached_property
    def _columns(self) -> dict[str, tuple[list[int], list[float]]]:
        """All keys in one pass: a page asks for dozens, of a hundred thousand rows."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for row in self.metrics:
            step = int(row["step"])
            for key, value in row.items():
                if _finite(value):
                    steps, values = found.setdefault(key, ([], []))
                    steps.append(step)
                    values.append(float(value))
        return found

    def last(self, key: str) -> Any:
        """The last finite value of a key of the metrics; None where there is none."""
        return next((row[key] for row in reversed(self.metrics) if _finite(row.get(key))), None)

    def told(self, kind: str) -> list[Row]:
        """Events of a kind."""
        return [event for event in self.events if event.get("event") == kind]

    def document(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run directory; None where there is none.

        Raises:
            SwiftError: it is damaged.
        """
        path = self.path / name
        return read_json(path) if path.is_file() else None


def read_run(path: Path, name: str | None = None, standing: Mapping[str, Any] | None = None) -> Run:
    """Read a run directory.

    Args:
        path: of the run.
        name: by which the page calls it; the folder's own when None.
        standing: how it stands, where somebody has looked.

    Returns:
        What is there. A file that is damaged counts as missing and is named in `damaged`.

    Raises:
        UsageError: there is no run directory.
    """
    try:
        there = (path / "config.yaml").is_file()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    if not there:
        what = "is no run directory: it has no config.yaml" if path.exists() else "does not exist"
        raise UsageError(f"{path} {what}; give what `swiftv2 pretrain` has as run.dir")
    damaged: list[str] = []

    def document(file: str) -> dict[str, Any] | None:
        try:
            return read_json(path / file) if (path / file).is_file() else None
        except SwiftError as error:
            damaged.append(str(error))
        except OSError as error:
            damaged.append(f"{path / file}: {error.strerror}")
        return None

    def rows(file: str, sound: Callable[[Row], bool]) -> list[dict[str, Any]]:
        bad: list[int] = []
        try:
            found = read_lines(path / file, bad)
        except OSError as error:
            damaged.append(f"{path / file}: {error.strerror}")
            return []
        kept = [row for row in found if sound(row)]
        count = len(bad) + len(found) - len(kept)
        first = f", the first of them line {bad[0]}" if bad else ""
        damaged.extend([f"{path / file}: {counted(count, 'line')} left out, which cannot be read{first}"] if count else [])
        return kept

    try:
        settings = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        settings = None
    if not isinstance(settings, dict):
        damaged.append(f"{path / 'config.yaml'} is not valid YAML: it is damaged")
        settings = {}
    events = rows(EVENTS, _is_event)
    return Run(
        path=path,
        name=name or path.resolve().name,
        settings=settings,
        environment=document("environment.json") or {},
        metrics=tuple(_still_made(by_step(rows(METRICS, _is_step)), events)),
        events=tuple(events),
        evaluation=document("evaluation.json"),
        damaged=tuple(damaged),
        standing=standing or {},
    )


def why_not(name: str, error: Exception, where: Path | str) -> str:
    """Why a part of the page cannot be made, in a line."""
    if isinstance(error, SwiftError):
        return str(error)
    if isinstance(error, OSError):
        return f"{name}: {error.filename or where}: {error.strerror}"
    return f"{name}: a file in {where} does not hold what it should ({type(error).__name__}: {error})"


_LAST_TIME = 2**33
"""Unix time beyond which none is told: the year 2242."""


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_step(row: Row) -> bool:
    return all(isinstance(row.get(key), int) and row[key] >= 0 for key in ("step", "attempt")) and _has_time(row)


def _is_event(row: Row) -> bool:
    step = row.get("step")
    return isinstance(row.get("event"), str) and _has_time(row) and (step is None or isinstance(step, int))


def _has_time(row: Row) -> bool:
    return _finite(row.get("time")) and 0 <= row["time"] < _LAST_TIME


def _still_made(rows: Iterable[dict[str, Any]], events: Iterable[Row]) -> list[dict[str, Any]]:
    """Steps without those from which training went back and to which it has not come again."""
    returns = [
        (row["time"], row["step"]) for row in events if row["event"] in {"resumed", "rewound"} and row.get("step") is not None
    ]
    return [row for row in rows if not any(row["time"] < when and row["step"] > step for when, step in returns)]
