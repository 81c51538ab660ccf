"""How fast a run is, where the time of its steps goes, and what it has cost."""

from collections.abc import Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from swiftv2.report.markup import Cell, Content, Number, element, number, tabled
from swiftv2.report.run.charts import COLOURS, averaged, chart
from swiftv2.report.run.curves import Curve, curve_chart
from swiftv2.report.run.reading import Run
from swiftv2.report.run.words import counted, duration, facts, section, short

PHASES = {
    "forward": "forward pass",
    "backward": "backward pass",
    "communication": "communication",
    "optimizer": "optimizer",
    "data": "waiting for data",
    "copy": "copies to the device",
    "checkpoint": "checkpoints",
    "other": "other",
}
_MOST_STRETCHES = 300
_SPEED = Curve(
    "clips_per_second",
    "Clips per second",
    "clips/s",
    "Over all ranks, outages of the store left out. Dips are waits for data or for a slow rank.",
    True,
)
_AVERAGES = (
    ("clips_per_second", "clips per second", "", 1.0),
    ("brain_tokens_per_second", "brain tokens per second", "", 1.0),
    ("step_seconds", "seconds a step", "s", 1.0),
    ("data_wait", "share of the time waiting for data", "%", 100.0),
    ("tflops", "TFLOP/s of the model, all ranks", "", 1.0),
    ("mfu", "MFU: share of the devices' peak", "%", 100.0),
    ("gpu/utilisation", "GPU in use", "%", 100.0),
    ("spread/step_seconds", "slowest rank against the median", "times", 1.0),
    ("memory/peak_gb", "peak memory of a device", "GB", 1.0),
    ("memory/host_gb", "memory of the process of rank 0", "GB", 1.0),
)


def throughput_section(runs: Sequence[Run]) -> Element | None:
    """Speed, phases and totals; None where no step was measured."""
    parts: list[Content] = []
    totals = [_totals(run) for run in runs]
    if len(runs) == 1 and totals[0]:
        parts.append(facts(totals[0]))
    speed = curve_chart(runs, _SPEED)
    parts += [speed] if speed is not None else []
    if len(runs) == 1:
        phases = _phases(runs[0])
        averages = _averages(runs[0])
        parts += [part for part in (phases, averages) if part is not None]
    if not parts:
        return None
    return section("throughput", "Throughput", *parts)


def _totals(run: Run) -> list[tuple[str, Content]]:
    shown: list[tuple[str, Content]] = []
    for key, name in (("total/gpu_hours", "GPU-hours"), ("total/cpu_hours", "CPU-hours")):
        hours = run.last(key)
        if hours is not None:
            shown.append((name, f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}"))
    for key, name, unit in (
        ("total/flops", "FLOPs of the model", ""),
        ("total/brain_tokens", "brain tokens", ""),
        ("total/energy_kwh", "energy", " kWh"),
    ):
        value = run.last(key)
        if value is not None:
            shown.append((name, (number(value, 3) if key == "total/flops" else short(value)) + unit))
    times = [float(row["time"]) for row in run.metrics if isinstance(row.get("time"), int | float)]
    if len(times) > 1:
        shown.append(("first to last step", duration(max(times) - min(times))))
    left = run.last("seconds_left")
    if left and run.standing.get("state") == "running":
        shown.append(("left", duration(left)))
    return shown


def averages_of(run: Run, key: str) -> tuple[float, float] | None:
    """Median over all steps, and over the last tenth of them; None where the key is not measured."""
    _, values = run.series(key)
    if not values:
        return None
    return float(np.median(values)), float(np.median(values[-max(1, len(values) // 10) :]))


def _averages(run: Run) -> Element | None:
    rows: list[list[Cell]] = []
    for key, name, unit, times in _AVERAGES:
        found = averages_of(run, key)
        if found is not None:
            rows.append([name, *(Number(v * times, f"{short(v * times)} {unit}".strip()) for v in found)])
    mean, lately = _means(run), _means(run, last=True)
    whole = sum(mean.values())
    for phase, seconds in mean.items():
        share = f" ({seconds / whole:.0%})" if whole else ""
        rows.append(
            [
                f"{PHASES[phase]}, a step",
                Number(seconds, f"{1000 * seconds:,.1f} ms{share}"),
                Number(lately[phase], f"{1000 * lately[phase]:,.1f} ms"),
            ]
        )
    if not rows:
        return None
    note = "Medians; times of phases are means, so that they add up to the mean step."
    return element(
        "div",
        tabled(("what", "all steps", "last tenth"), rows, label="averages of speed and phases"),
        element("p", note, kind="quiet"),
    )


def _means(run: Run, *, last: bool = False) -> dict[str, float]:
    found = {}
    for phase in PHASES:
        _, values = run.series(f"seconds/{phase}")
        if values:
            found[phase] = float(np.mean(values[-max(1, len(values) // 10) :] if last else values))
    return found


def _phases(run: Run) -> Element | None:
    traces: list[dict[str, Any]] = []
    each = 1
    for place, (phase, name) in enumerate(PHASES.items()):
        series = run.series(f"seconds/{phase}")
        if len(series[0]) < 2 or not any(series[1]):
            continue
        x, y, each = averaged(series, _MOST_STRETCHES)
        colour = COLOURS[place]
        line = {"color": colour, "width": 0.8}
        area = {"type": "scatter", "mode": "lines", "x": x, "y": y, "name": name, "line": line, "stackgroup": "step"}
        traces.append({**area, "fillcolor": colour, "hovertemplate": "%{y:.3~g} s"})
    if not traces:
        return None
    means = _means(run)
    whole = sum(means.values())
    label = ", ".join(f"{PHASES[phase]} {seconds / whole:.0%}" for phase, seconds in means.items()) if whole else ""
    layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": "seconds a step"}, "rangemode": "tozero"}}
    stretch = f" Each point is the mean of {counted(each, 'logged step')}." if each > 1 else ""
    read = (
        "Seconds of a step on rank 0, stacked up to the whole step. Much \u201cwaiting for data\u201d asks for more "
        f"reader threads, much communication for larger micro-batches or fewer nodes.{stretch}"
    )
    return chart("Where the time of a step goes", traces, layout, label=label, read=read, steps="steps")
