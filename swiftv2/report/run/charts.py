"""Charts that can be zoomed: plain traces for plotly.js, which stands in the page once and takes its colours from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from swiftv2.report.markup import data, element

MOST_POINTS = 4000
"""Of one curve; beyond it the least and the most of equal stretches stand for all."""
COLOURS = 8
"""Colours of the page's style, --c0 to --c7: Okabe and Ito's, darker on white and lighter on black."""

Trace = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        name: unique on the page, letters, digits and dashes.
        title: what it shows.
        read: one sentence on how to read it.
        x, y: titles of the axes, with units.
        traces: of plotly.js; `colour` (number of a colour) stands for all of a trace's colours.
        log: whether the vertical axis may be switched to logarithmic.
        height: in pixels.
        layout: of plotly.js, beside what all charts share.
    """

    name: str
    title: str
    read: str
    x: str
    y: str
    traces: Sequence[Trace]
    log: bool = False
    height: int = 340
    layout: Mapping[str, Any] = field(default_factory=dict)


def drawn(chart: Chart) -> Element:
    """The place of a chart on the page, with what is drawn there."""
    switch = element("button", "log scale", type="button", kind="switch", aria_pressed="false")
    head = element("div", element("h4", chart.title), *([switch] if chart.log else []), kind="chart-head")
    spec = {"traces": list(chart.traces), "x": chart.x, "y": chart.y, "height": chart.height, "layout": dict(chart.layout)}
    place = element("div", kind="chart", id=chart.name, role="img", aria_label=f"{chart.title}. {chart.read}")
    place.set("style", f"height:{chart.height}px")
    read = element("figcaption", chart.read)
    return element("figure", head, place, data(f"{chart.name}-data", spec), read, kind="charted")


def line(name: str, x: Sequence[float], y: Sequence[float], colour: int, **options: Any) -> Trace:
    """A curve of at most `MOST_POINTS` points; `options` are plotly's.

    Args:
        name: in the legend.
        x: ascending.
        y: as many values.
        colour: 0 to 7.
        options: of the trace, such as `dash`, `width`, `opacity`, `legendgroup`.
    """
    kept = thinned(np.asarray(y, dtype=float))
    shape = {key: options.pop(key) for key in ("dash", "width") if key in options}
    made = {"type": "scatter", "mode": "lines", "name": name, "colour": colour, "line": {"width": 1.6} | shape}
    return made | {"x": [x[i] for i in kept], "y": [_short(y[i]) for i in kept]} | options


def thinned(y: NDArray[np.float64], most: int = MOST_POINTS) -> NDArray[np.int64]:
    """Which points of a curve are drawn: all, or the least and the most of equal stretches, and the ends."""
    number = len(y)
    if number <= most:
        return np.arange(number)
    edges = np.linspace(0, number, most // 2 + 1).astype(np.int64)
    finite = np.where(np.isfinite(y), y, np.inf)
    kept = {0, number - 1}
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        part = finite[first:last]
        kept.add(int(first + part.argmin()))
        kept.add(int(first + np.where(np.isinf(part), -np.inf, part).argmax()))
    return np.array(sorted(kept))


def smoothed(y: Sequence[float], share: float = 0.02) -> list[float]:
    """Running median over a share of the points (5 at least): what a noisy curve does, undisturbed by single spikes."""
    values = np.asarray(y, dtype=float)
    half = max(2, round(len(values) * share / 2))
    if len(values) <= 2 * half:
        return []
    padded = np.pad(values, half, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    return [float(value) for value in np.nanmedian(windows, axis=1)]


def _short(value: float) -> float | None:
    """Six digits are more than a chart shows."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


SCRIPT = """
(() => {
  const root = document.documentElement;
  const value = name => getComputedStyle(root).getPropertyValue(name).trim();
  const spec = place => JSON.parse(document.getElementById(place.id + "-data").textContent);
  const axis = title => ({ title: { text: title, font: { size: 12 } }, gridcolor: value("--rule"), zerolinecolor: value("--rule"),
    linecolor: value("--rule"), automargin: true });
  function layout(place, made) {
    const narrow = place.clientWidth < 520;
    const own = made.layout || {};
    return { ...own, height: made.height, margin: { l: 56, r: 12, t: 8, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)", font: { color: value("--ink"), size: 12, family: "system-ui, sans-serif" },
      hovermode: own.hovermode || "closest",
      hoverlabel: { bgcolor: value("--card"), bordercolor: value("--rule"), font: { color: value("--ink") } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: narrow ? 10 : 12 }, bgcolor: "rgba(0,0,0,0)" },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      xaxis: { ...axis(made.x), ...(own.xaxis || {}) },
      yaxis: { ...axis(made.y), ...(own.yaxis || {}), ...(place.dataset.log ? { type: "log" } : {}) } };
  }
  function coloured(trace) {
    if (trace.colour === undefined) return trace;
    const colour = value("--c" + trace.colour);
    const made = { ...trace, line: { ...trace.line, color: colour }, marker: { ...trace.marker, color: colour } };
    if (trace.error_x) made.error_x = { ...trace.error_x, color: colour };
    if (trace.fill) made.fillcolor = colour + "99";
    return made;
  }
  const config = { responsive: true, displaylogo: false, displayModeBar: "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  function draw(place) {
    if (!place.clientWidth) return;
    const made = spec(place);
    Plotly.react(place, made.traces.map(coloured), layout(place, made), config);
    place.dataset.drawn = "1";
  }
  const places = [...document.querySelectorAll(".chart")];
  const all = () => places.forEach(draw);
  all();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  for (const fold of document.querySelectorAll("details"))
    fold.addEventListener("toggle", () => fold.open && places.filter(p => fold.contains(p) && !p.dataset.drawn).forEach(draw));
  for (const button of document.querySelectorAll("button.switch")) button.onclick = () => {
    const place = button.closest("figure").querySelector(".chart");
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", on);
    if (on) place.dataset.log = "1"; else delete place.dataset.log;
    draw(place);
  };
  for (const button of document.querySelectorAll("button.copy")) button.onclick = async () => {
    const text = button.parentElement.querySelector("pre").textContent;
    try { await navigator.clipboard.writeText(text); } catch {
      const area = document.body.appendChild(document.createElement("textarea"));
      area.value = text; area.select(); document.execCommand("copy"); area.remove();
    }
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  };
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(d => { d.open = true; }));
})();
"""
