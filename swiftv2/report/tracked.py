"""What trackers have of a run, read back from their files: Neptune's offline ones, whose service is gone, above all."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftv2.records import METRICS, read_lines

Series = dict[str, dict[int, float]]
_METRICS = "metrics"
_ID = ["run", "id"]


@dataclass(frozen=True)
class Offline:
    """Numbers of Neptune's offline runs.

    Attributes:
        series: by key, the value of each step; where a step was done again, the last one.
        lines: operations that were read.
        damaged: files and lines that cannot be read.
        ids: of the runs to which they say that they belong: one, however many attempts there were.
    """

    series: Series
    lines: int
    damaged: tuple[str, ...]
    ids: frozenset[str] = frozenset()


def read_neptune(folder: Path) -> Offline:
    """Read all offline runs below a folder, one for each attempt, in the order in which they were written.

    Args:
        folder: that holds `.neptune/offline/run__*/data-*.log`, one JSON object a line.

    Returns:
        What they hold. A line that is torn or no operation is named in `damaged`; the rest is read.
    """
    series: Series = {}
    damaged: list[str] = []
    rows: list[tuple[float, Mapping[str, Any]]] = []
    for path in sorted((folder / ".neptune" / "offline").glob("run__*/data-*.log")):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            try:
                row = json.loads(line)
                rows.append((float(row["at"]), dict(row["obj"])))
            except (ValueError, KeyError, TypeError):
                damaged.append(f"{path}: line {number} is damaged")
    for _, operation in sorted(rows, key=lambda one: one[0]):
        if operation.get("type") == "LogFloats" and operation.get("path", [None])[0] == _METRICS:
            values = series.setdefault("/".join(operation["path"][1:]), {})
            values.update({int(one["step"]): float(one["value"]) for one in operation["values"]})
    ids = frozenset(str(operation.get("value")) for _, operation in rows if operation.get("path") == _ID)
    return Offline(series, len(rows), tuple(damaged), ids)


def missing(offline: Offline, run_dir: Path) -> dict[str, int]:
    """How many values of `metrics.jsonl` are not in Neptune's files, or differ there, by key; empty where all agree."""
    wanted: Series = {}
    for row in read_lines(run_dir / METRICS):
        for key, value in row.items():
            if key not in {"step", "attempt", "time"} and isinstance(value, bool | int | float):
                wanted.setdefault(key, {})[int(row["step"])] = float(value)
    found = {key: _differing(values, offline.series.get(key, {})) for key, values in wanted.items()}
    return {key: number for key, number in found.items() if number}


def _differing(wanted: Mapping[int, float], there: Mapping[int, float]) -> int:
    return sum(step not in there or not math.isclose(value, there[step], rel_tol=1e-9) for step, value in wanted.items())
