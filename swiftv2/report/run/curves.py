"""Values over steps, of one run or of several on top of each other."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

from swiftv2.report.markup import element, number
from swiftv2.report.run.charts import COLOURS, QUIET, chart, plain, smoothed, thinned
from swiftv2.report.run.reading import Run
from swiftv2.report.run.words import counted, method, section

_SMOOTH_FROM = 60
"""Steps from which a noisy curve gets a mean beside it."""
_SMOOTH_SHARE = 50
"""Means hold one of so many parts of the curve."""


class Curve(NamedTuple):
    """What one chart shows.

    Attributes:
        key: of the metrics.
        title: above the chart.
        unit: of the y axis.
        read: how to read it.
        noisy: whether a mean of neighbours is drawn over it.
        log: whether there is a button for a logarithmic axis.
    """

    key: str
    title: str
    unit: str
    read: str
    noisy: bool = False
    log: bool = False


LEARNING = (
    Curve(
        "loss",
        "Training loss",
        "loss",
        "Each step sees other clips, which makes it noisy.",
        True,
        True,
    ),
    Curve(
        "loss_ratio",
        "Training loss against copying",
        "loss / loss of the better copy",
        "The loss over that of the better copying baseline on the same batch: below 1 the model does better than copying.",
        True,
        True,
    ),
    Curve(
        "gradient_norm",
        "Gradient norm",
        "norm before clipping",
        "Spikes go before refused steps; a norm that grows for long says that the learning rate is too high.",
        True,
        True,
    ),
    Curve("learning_rate", "Learning rate", "rate", "As the schedule gives it."),
)


def curves_section(runs: Sequence[Run]) -> Element | None:
    """Loss, its ratio to copying, held-out loss and R2, rate, gradient norm; None where there is no step yet."""
    loss, *others = (curve_chart(runs, one) for one in LEARNING)
    shown = (loss, _heldout(runs), _r2(runs) or _validation(runs), *others)
    figures = [figure for figure in shown if figure is not None]
    if not figures:
        return None
    told = "Drag to zoom into steps, in all curves at once; double-click or \u201cshow all\u201d to come back."
    return section("curves", "Curves", element("p", told, kind="quiet"), *figures)


def curve_chart(runs: Sequence[Run], curve: Curve, steps: str = "steps") -> Element | None:
    """A key of the metrics over steps; None where no run has it."""
    traces: list[dict[str, Any]] = []
    notes, told = [], []
    for run, colour in zip(runs, _colours(runs), strict=True):
        series = run.series(curve.key)
        if not series[0]:
            continue
        x, y, less = thinned(series)
        smooth = curve.noisy and len(series[0]) >= _SMOOTH_FROM
        name = _name(run, runs, curve.title)
        line = {"color": colour, "width": 1 if smooth else 1.8}
        mode = "lines" if len(x) > 1 else "markers"
        thin: dict[str, Any] = {
            "type": "scatter",
            "mode": mode,
            "x": x,
            "y": y,
            "line": line,
            "marker": {"color": colour},
            "name": name,
        }
        if smooth:
            thin |= {
                "opacity": 0.35,
                "showlegend": False,
                "name": f"{name}, each step",
                "hoverinfo": "skip" if len(runs) > 1 else "all",
            }
        traces.append(thin)
        if smooth:
            window = max(5, len(series[0]) // _SMOOTH_SHARE) | 1
            mx, my, _ = thinned((series[0], smoothed(series[1], window)), 1500)
            mean = {"color": colour, "width": 2.4}
            traces.append({"type": "scatter", "mode": "lines", "x": mx, "y": my, "line": mean, "name": name})
            if len(runs) == 1:
                notes.append(f"Thick: the mean of {window} steps.")
        if less:
            notes.append(f"{counted(len(series[0]), 'step')}, drawn by the lowest and highest of each stretch.")
        told.append(
            f"{name}: {number(series[1][0], 3)} at step {series[0][0]}, {number(series[1][-1], 3)} at step {series[0][-1]}"
        )
    if not traces:
        return None
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": curve.unit}},
        "showlegend": len(runs) > 1,
    }
    if curve.key == "loss_ratio":
        layout["shapes"] = [_level(1.0)]
    read = " ".join([curve.read, *dict.fromkeys(notes)])
    return chart(curve.title, traces, layout, label="; ".join(told), read=read, steps=steps, log=curve.log)


def _level(y: float) -> dict[str, Any]:
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": y,
        "y1": y,
        "line": {"color": QUIET, "width": 1, "dash": "dash"},
    }


def _colours(runs: Sequence[Run]) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(len(runs))]


def _name(run: Run, runs: Sequence[Run], title: str) -> str:
    return plain(run.name) if len(runs) > 1 else title.lower()


def _heldout(runs: Sequence[Run]) -> Element | None:
    return _points(
        runs,
        {"heldout/loss": "held-out loss", "val/loss": "validation loss"},
        "Held-out loss",
        "loss",
        "The loss on subjects that training never sees. Where it rises while the training loss falls, the model learns "
        "subjects by heart.",
    )


def _r2(runs: Sequence[Run]) -> Element | None:
    keys = ("model",) if len(runs) > 1 else ("model", "visible_mean", "time_interpolation", "run_mean")
    return _points(
        runs,
        {f"heldout/all/r2/{key}": method(key) for key in keys},
        "Held-out R2 on the fluctuation",
        "R2",
        "The share of the fluctuation of hidden voxels that is explained; above 0 and above the dashed lines of copying the "
        "model has learned dynamics.",
        level=0.0,
    )


def _validation(runs: Sequence[Run]) -> Element | None:
    keys = dict.fromkeys(
        key
        for run in runs
        for row in run.metrics
        for key in row
        if key.startswith("val/") and key not in {"val/loss", "val/select"} and not key.endswith("/loss")
    )
    if not keys:
        return None
    return _points(
        runs,
        {key: key.removeprefix("val/") for key in list(keys)[:8]},
        "Metrics on validation subjects",
        "value",
        "As the task asks for them.",
    )


def _points(
    runs: Sequence[Run], keys: Mapping[str, str], title: str, unit: str, read: str, level: float | None = None
) -> Element | None:
    traces, told = [], []
    for run, colour in zip(runs, _colours(runs), strict=True):
        there = [(key, name) for key, name in keys.items() if run.series(key)[0]]
        for place, (key, name) in enumerate(there):
            series = run.series(key)
            x, y, _ = thinned(series)
            # Baselines stand back; metrics of a task are equals.
            shown = QUIET if place and level is not None else COLOURS[place % len(COLOURS)] if len(runs) == 1 else colour
            label = plain(run.name) + (f", {name}" if len(keys) > 1 and place else "") if len(runs) > 1 else name
            dash = "solid" if place == 0 else ("dash", "dot", "dashdot")[(place - 1) % 3]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if len(x) < 200 else "lines",
                    "x": x,
                    "y": y,
                    "name": label,
                    "line": {"color": shown, "width": 2.2 if place == 0 else 1.5, "dash": dash},
                    "marker": {"color": shown, "size": 6},
                }
            )
            told.append(f"{label}: {number(series[1][-1], 3)} at step {series[0][-1]}")
    if not traces:
        return None
    layout: dict[str, Any] = {"xaxis": {"title": {"text": "step"}, "rangemode": "tozero"}, "yaxis": {"title": {"text": unit}}}
    if level is not None:
        layout["shapes"] = [_level(level)]
    return chart(title, traces, layout, label="; ".join(told), read=read, steps="steps", log=level is None)
