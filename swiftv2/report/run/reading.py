"""A run directory as the page needs it: read once, whole, whatever the run is doing meanwhile."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import read_json
from swiftv2.records import EVENTS, METRICS, read_lines, read_metrics

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run has left.

    Attributes:
        path: its directory.
        name: by which the page calls it; unique on a page.
        settings: the resolved configuration.
        environment: versions, host, command; empty where there is none.
        metrics: by step, of the last attempt that made it (see `records.read_metrics`).
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
                if isinstance(value, int | float) and math.isfinite(value):
                    steps, values = found.setdefault(key, ([], []))
                    steps.append(step)
                    values.append(float(value))
        return found

    def last(self, key: str) -> Any:
        """The last value of a key of the metrics; None where there is none."""
        return next((row[key] for row in reversed(self.metrics) if row.get(key) is not None), None)

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
    if not (path / "config.yaml").is_file():
        what = "is no run directory: it has no config.yaml" if path.exists() else "does not exist"
        raise UsageError(f"{path} {what}; give what `swiftv2 pretrain` has as run.dir")
    damaged: list[str] = []

    def document(file: str) -> dict[str, Any] | None:
        try:
            return read_json(path / file) if (path / file).is_file() else None
        except SwiftError as error:
            damaged.append(str(error))
            return None

    def rows(file: str, read: Any) -> tuple[Row, ...]:
        try:
            return tuple(read(path / file))
        except SwiftError as error:
            damaged.append(str(error))
        except (KeyError, TypeError, ValueError, AttributeError):
            damaged.append(f"{path / file} holds lines that are none of a run: it is damaged")
        except OSError as error:
            damaged.append(f"{path / file}: {error.strerror}")
        return ()

    try:
        settings = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        settings = None
    if not isinstance(settings, dict):
        damaged.append(f"{path / 'config.yaml'} is not valid YAML: it is damaged")
        settings = {}
    return Run(
        path=path,
        name=name or path.resolve().name,
        settings=settings,
        environment=document("environment.json") or {},
        metrics=rows(METRICS, read_metrics),
        events=rows(EVENTS, read_lines),
        evaluation=document("evaluation.json"),
        damaged=tuple(damaged),
        standing=standing or {},
    )
