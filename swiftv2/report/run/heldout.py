"""Held-out loss and R2 on the fluctuation, by cohort, beside what copying achieves."""

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from swiftv2.report.markup import Cell, Number, element, number, tabled
from swiftv2.report.run.charts import COLOURS, QUIET, chart, plain
from swiftv2.report.run.reading import Run
from swiftv2.report.run.verdict import better_baseline
from swiftv2.report.run.words import METHODS, method, section

_SYMBOLS = {
    "model": "circle",
    "visible_mean": "square-open",
    "time_interpolation": "diamond-open",
    "run_mean": "triangle-up-open",
}
_READ = (
    "Each row is a cohort; bars are 95 % intervals over its subjects. R2 is the share of the fluctuation of hidden voxels that "
    "is explained, measured from each voxel's own mean: at 0 nothing of it is, and copying the mean of the visible frames can "
    "at best reach 0. The model must lie to the right of 0 and of all open signs."
)


def heldout_section(run: Run) -> Element | None:
    """The last evaluation; None before the first."""
    evaluation = run.evaluation
    if evaluation is None or not isinstance(evaluation.get("groups"), Mapping):
        return None
    groups = {name: group for name, group in evaluation["groups"].items() if _is_group(group)}
    if not groups:
        return None
    # With one cohort, the rows of all and of it are the same.
    names = [name for name in groups if name != "all" or len(groups) != 2]
    names.sort(key=lambda name: (name != "all", name))
    step, split = evaluation.get("step"), evaluation.get("split", "held-out")
    loss = evaluation.get("loss")
    kind = evaluation.get("loss_kind", "")
    intro = f"Step {step}, split {split}. Loss ({kind}) {number(loss)}." if isinstance(loss, float) else f"Step {step}."
    parts = [element("p", intro, kind="quiet"), *_chart(groups, names), _table(groups, names)]
    return section("heldout", "Held-out subjects, by cohort", *parts)


def _is_group(group: Any) -> bool:
    return isinstance(group, Mapping) and isinstance(group.get("methods"), Mapping)


def _label(name: str) -> str:
    return "all cohorts" if name == "all" else name


def _chart(groups: Mapping[str, Any], names: Sequence[str]) -> list[Element]:
    methods = [name for name in METHODS if any(_known(groups[g]["methods"].get(name)) for g in names)]
    methods += sorted({m for g in names for m in groups[g]["methods"] if m not in METHODS})
    traces = []
    rows = len(names)
    for place, name in enumerate(methods):
        points = [
            (row, groups[g]["methods"][name]["r2"]) for row, g in enumerate(names) if _known(groups[g]["methods"].get(name))
        ]
        shift = 0.11 * ((len(methods) - 1) / 2 - place)
        colour = COLOURS[0] if name == "model" else QUIET
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": method(name),
                "x": [r2["mean"] for _, r2 in points],
                "y": [rows - 1 - row + shift for row, _ in points],
                "customdata": [_label(names[row]) for row, _ in points],
                "hovertemplate": "%{customdata}: %{x:.3f}<extra>" + method(name) + "</extra>",
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [_end(r2, "high") for _, r2 in points],
                    "arrayminus": [_end(r2, "low") for _, r2 in points],
                    "color": colour,
                    "thickness": 1.5,
                    "width": 4,
                },
                "marker": {"color": colour, "size": 10, "symbol": _SYMBOLS.get(name, "x-open"), "line": {"width": 1.5}},
            }
        )
    if not traces:
        return []
    layout = {
        "hovermode": "closest",
        "xaxis": {"title": {"text": "R2 on the fluctuation"}, "zeroline": True, "zerolinewidth": 2},
        "yaxis": {
            "tickvals": list(range(rows)),
            "ticktext": [plain(_label(name)) for name in reversed(names)],
            "range": [-0.6, rows - 0.4],
            "showgrid": False,
            "zeroline": False,
        },
        "height": 170 + 62 * rows,
    }
    best = ", ".join(
        f"{_label(g)} {groups[g]['methods']['model']['r2']['mean']:.3f}"
        for g in names
        if _known(groups[g]["methods"].get("model"))
    )
    return [
        chart(
            "How much of the fluctuation is explained",
            traces,
            layout,
            label=f"R2 of the model: {best}",
            read=_READ,
        )
    ]


def _known(score: Any) -> bool:
    return isinstance(score, Mapping) and isinstance(score.get("r2"), Mapping) and score["r2"].get("mean") is not None


def _end(r2: Mapping[str, Any], end: str) -> float:
    return 0.0 if r2.get(end) is None else abs(float(r2[end]) - float(r2["mean"]))


def _table(groups: Mapping[str, Any], names: Sequence[str]) -> Element:
    rows: list[list[Cell]] = []
    for name in names:
        group = groups[name]
        best = better_baseline(group)
        for key in sorted(group["methods"], key=lambda m: (list(METHODS).index(m) if m in METHODS else 9, m)):
            score = group["methods"][key]
            gain = group.get("r2_gain", {}).get(key)
            rows.append(
                [
                    _label(name),
                    element("strong", method(key))
                    if key == "model"
                    else method(key) + (" (better one)" if key == best else ""),
                    _number(group.get("subjects"), 0),
                    _number(group.get("clips"), 0),
                    _number(score.get("l2")),
                    _number(score.get("l1")),
                    _estimate(score.get("r2")),
                    _estimate(gain) if key != "model" else "",
                ]
            )
    titles = ("cohort", "prediction", "subjects", "clips", "L2", "L1", "R2 (95 % interval)", "gain of the model over it")
    return tabled(titles, rows, label="held-out losses and R2 by cohort and method", sortable=True)


def _number(value: Any, digits: int = 4) -> Cell:
    if not isinstance(value, int | float):
        return "\u2013"
    return Number(float(value), f"{value:,.0f}" if digits == 0 else f"{value:.{digits}f}")


def _estimate(estimate: Any) -> Cell:
    if not isinstance(estimate, Mapping) or estimate.get("mean") is None:
        return "\u2013"
    ends = "" if estimate.get("low") is None else f" ({estimate['low']:.3f} to {estimate['high']:.3f})"
    return Number(float(estimate["mean"]), f"{estimate['mean']:.3f}{ends}")
