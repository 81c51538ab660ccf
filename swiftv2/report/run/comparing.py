"""Several runs side by side: how each stands, and in which settings they differ."""

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from swiftv2.report.markup import Cell, Number, element, tabled
from swiftv2.report.run.provenance import flat, json_like
from swiftv2.report.run.reading import Run
from swiftv2.report.run.throughput import averages_of
from swiftv2.report.run.verdict import verdicts
from swiftv2.report.run.words import section, short

_MOST_SETTINGS = 60
_ABSENT = "\u2013"
"""Of a setting that a run does not have."""


def comparing_section(runs: Sequence[Run]) -> Element:
    """A table of results, and one of settings that differ."""
    rows: list[list[Cell]] = []
    for run in runs:
        answers = verdicts(run)
        step, last = run.last("step"), run.setting("train.max_steps")
        r2 = own_r2(run)
        ends = f" ({r2['low']:.3f} to {r2['high']:.3f})" if r2.get("low") is not None else ""
        speed = averages_of(run, "clips_per_second")
        cost = run.last("total/gpu_hours") or run.last("total/cpu_hours")
        rows.append(
            [
                element("strong", run.name),
                Number(float(step or 0), f"{step or 0:,}" + (f" of {last:,}" if isinstance(last, int) else "")),
                _number(run.last("loss"), ".4f"),
                _number(run.last("heldout/loss") if run.last("heldout/loss") is not None else run.last("val/loss"), ".4f"),
                Number(float(r2["mean"]), f"{r2['mean']:.3f}{ends}") if r2.get("mean") is not None else "\u2013",
                answers[0].word,
                answers[1].word,
                Number(speed[0], short(speed[0])) if speed else "\u2013",
                _number(cost, ",.2f"),
            ]
        )
    titles = (
        "run",
        "step",
        "training loss",
        "held-out loss",
        "R2 (95 % interval)",
        "learned",
        "healthy",
        "clips/s",
        "device-hours",
    )
    parts = [
        tabled(titles, rows, label="runs side by side", sortable=True),
        element("h3", "Settings that differ"),
        *_settings(runs),
    ]
    return section("comparing", "Side by side", *parts)


def own_r2(run: Run) -> Mapping[str, Any]:
    """Held-out R2 of the model with its interval; empty where there is none."""
    found: Any = run.evaluation
    for key in ("groups", "all", "methods", "model", "r2"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _number(value: Any, how: str) -> Cell:
    return Number(float(value), f"{value:{how}}") if isinstance(value, int | float) else "\u2013"


def _settings(runs: Sequence[Run]) -> list[Element]:
    trees = [flat(run.settings) for run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for tree in trees for key in tree)
        if len({json_like(tree.get(key, _ABSENT)) for tree in trees}) > 1
    ]
    if not keys:
        return [element("p", "None.")]
    shown = keys[:_MOST_SETTINGS]
    rows: list[list[Cell]] = [
        [element("code", key, kind="key"), *(element("code", json_like(tree.get(key, _ABSENT))) for tree in trees)]
        for key in shown
    ]
    table = tabled(("setting", *(run.name for run in runs)), rows, label="settings that differ between runs")
    more = len(keys) - len(shown)
    return [table, *([element("p", f"And {more} more.", kind="quiet")] if more else [])]
