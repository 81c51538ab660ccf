"""What happened when: starts, stops, faults, saves, evaluations, on one line of time and in a table."""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from swiftv2.report.markup import Cell, Number, element, tabled
from swiftv2.report.run.charts import ALARM, COLOURS, INK, chart, plain
from swiftv2.report.run.reading import Row, Run
from swiftv2.report.run.words import counted, duration, moment, section

_LANES: Mapping[str, tuple[str, str, frozenset[str]]] = {
    "start, stop": (
        INK,
        "triangle-right",
        frozenset(
            {"start", "resumed", "branched", "stopped", "finished", "requeued", "job", "judged", "adopted", "initialised"}
        ),
    ),
    "fault": (
        ALARM,
        "x",
        frozenset(
            {
                "failed",
                "hang",
                "grace",
                "lost",
                "skipped",
                "rewound",
                "quarantined",
                "save_failed",
                "checkpoint_damaged",
                "not_removed",
                "slow",
            }
        ),
    ),
    "save": (COLOURS[2], "circle", frozenset({"saved"})),
    "evaluation": (COLOURS[0], "diamond", frozenset({"evaluation"})),
}
_HIDDEN = {"step", "attempt", "time", "event", "totals"}
_MOST_ROWS = 2000
"""Of the table; saves go first where there are more."""
_MOST_CHARACTERS = 240


def timeline_section(run: Run) -> Element | None:
    """Chart and table; None where nothing is written down."""
    events = [*run.events, *_evaluations(run)]
    events = sorted((row for row in events if isinstance(row.get("time"), int | float)), key=lambda row: row["time"])
    # A report of ranks that finds none slow is no fault.
    events = [row for row in events if row.get("event") != "slow" or row.get("slow")]
    if not events:
        return None
    rows = events
    cut = ""
    if len(rows) > _MOST_ROWS:
        rows = [row for row in rows if row.get("event") not in {"saved", "epoch"}][-_MOST_ROWS:]
        cut = (
            f" The table leaves out {counted(len(events) - len(rows), 'event')}, saves and epochs first; events.jsonl has all."
        )
    parts = [_chart(events), element("p", f"Times are UTC.{cut}", kind="quiet"), _table(rows)]
    return section("timeline", "Time line", *parts)


def _evaluations(run: Run) -> list[Row]:
    keys = ("heldout/loss", "val/loss")
    found: list[Row] = []
    for row in run.metrics:
        value = next((row[key] for key in keys if row.get(key) is not None), None)
        if value is not None:
            found.append(
                {
                    "event": "evaluation",
                    "time": row.get("time"),
                    "step": row["step"],
                    "attempt": row.get("attempt"),
                    "loss": value,
                }
            )
    return found


def _chart(events: Sequence[Row]) -> Element:
    traces: list[dict[str, Any]] = []
    names = list(_LANES)
    told = []
    for place, (lane, (colour, symbol, kinds)) in enumerate(_LANES.items()):
        rows = [row for row in events if row.get("event") in kinds]
        told.append(f"{lane} {len(rows)}")
        if not rows:
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [moment(row["time"]) for row in rows],
                "y": [len(names) - 1 - place] * len(rows),
                "name": lane,
                "text": [plain(_hover(row)) for row in rows],
                "hovertemplate": "%{text}<extra></extra>",
                "marker": {"color": colour, "symbol": symbol, "size": 9 if len(rows) < 200 else 6},
            }
        )
    layout = {
        "hovermode": "closest",
        "showlegend": False,
        "xaxis": {"type": "date"},
        "yaxis": {
            "tickvals": list(range(len(names))),
            "ticktext": names[::-1],
            "range": [-0.6, len(names) - 0.4],
            "zeroline": False,
            "fixedrange": True,
        },
    }
    whole = duration(events[-1]["time"] - events[0]["time"])
    return chart("What happened when", traces, layout, label=f"{', '.join(told)} over {whole}", low=True)


def _hover(row: Row) -> str:
    step = "" if row.get("step") is None else f", step {row['step']}"
    detail = _detail(row)
    return f"{row.get('event')}{step}" + (f": {detail[:100]}" if detail else "")


def _table(rows: Sequence[Row]) -> Element:
    cells: list[list[Cell]] = []
    for row in rows:
        step = row.get("step")
        cells.append(
            [
                Number(float(row["time"]), moment(row["time"])),
                str(row.get("event")).replace("_", " "),
                Number(float(step), f"{step:,}") if isinstance(step, int) else "",
                Number(float(row["attempt"]), str(row["attempt"])) if isinstance(row.get("attempt"), int) else "",
                _detail(row),
            ]
        )
    return tabled(("time", "event", "step", "attempt", "what"), cells, label="events of the run", sortable=True)


def _detail(row: Row) -> str:
    """What an event says, in a line; common ones in words."""
    kind, get = row.get("event"), row.get
    try:
        if kind == "saved":
            size, took, waited = get("bytes", 0) / 1e6, duration(get("seconds", 0.0)), duration(get("blocking_seconds", 0.0))
            return f"{get('kind')}, {size:,.1f} MB in {took}, training waited {waited}"
        if kind == "evaluation":
            return f"held-out loss {row['loss']:.4g}"
        if kind == "start":
            return f"{counted(int(get('world_size', 1)), 'rank')}, {get('launcher')}, host {get('host')}"
        if kind == "skipped":
            return f"refused: {get('reason')}"
        if kind == "slow":
            return ", ".join(f"rank {one['rank']} on {one['host']}: {one['what']} {one['share']:+.0%}" for one in row["slow"])[
                :_MOST_CHARACTERS
            ]
        if kind == "epoch":
            return f"epoch {row['epoch']}: " + ", ".join(f"{name} {count:,} clips" for name, count in row["samples"].items())
        if kind == "data":
            return f"trains on {counted(int(get('runs', 0)), 'run')} of store version {get('store_version')}"
    except (TypeError, KeyError, ValueError, AttributeError):
        pass
    rest = {key: value for key, value in row.items() if key not in _HIDDEN and value not in (None, [], {}, "")}
    text = "; ".join(
        f"{key.replace('_', ' ')} {value if isinstance(value, str) else json.dumps(value)}" for key, value in rest.items()
    )
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}\u2026"
