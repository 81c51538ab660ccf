"""Charts that can be zoomed: plotly.js, once in the page, given plain traces whose colours are names of the page's own."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from swiftv2.report.markup import element

Trace = Mapping[str, Any]
Series = tuple[Sequence[float], Sequence[float]]

MOST_POINTS = 5000
"""Of a curve; a longer one is drawn by the lowest and the highest value of each of half as many stretches."""
COLOURS = tuple(f"var(--c{index})" for index in range(8))
"""Of runs or cohorts, in this order, in either scheme."""
INK, QUIET, ALARM = "var(--ink)", "var(--quiet)", "var(--alarm)"

STYLE = """
:root { --c0: #0b62b8; --c1: #c2500a; --c2: #157f5b; --c3: #8a3ab0; --c4: #b3263e; --c5: #6b6b00; --c6: #00798c; --c7: #7a5230;
  --grid: #e6e6eb; }
@media (prefers-color-scheme: dark) { :root { --c0: #6cb6ff; --c1: #ff9d5c; --c2: #4fd1a1; --c3: #d3a4f5; --c4: #ff8a96;
  --c5: #d6d45a; --c6: #58d3e4; --c7: #d3ab85; --grid: #2c2c34; } }
.chart { margin: 1rem 0 1.8rem; } .chart .plot { width: 100%; height: 19rem; } .chart.low .plot { height: 13rem; }
.chart .bar { display: flex; flex-wrap: wrap; gap: .3rem .8rem; align-items: baseline; justify-content: space-between; }
.chart .bar h3 { margin: 0; } .chart .tools { display: flex; gap: .4rem; }
button.tool { font: inherit; font-size: .8rem; color: var(--ink); background: var(--paper); border: 1px solid var(--rule);
  border-radius: .4rem; padding: .15rem .55rem; cursor: pointer; } button.tool[aria-pressed=true] { background: var(--ink);
  color: var(--paper); } button.tool:hover { border-color: var(--quiet); }
.chart:not(.zoomed) [data-tool=all] { display: none; }
.chart figcaption { font-size: .88rem; margin-top: .4rem; max-width: 46rem; }
@media print { .tools { display: none !important; } }
"""

SCRIPT = r"""
(() => {
  const root = document.documentElement, drawn = new Map(), ranges = {};
  const named = name => getComputedStyle(root).getPropertyValue(name).trim();
  const themed = value => {
    if (typeof value === "string") return value.replace(/var\((--[a-z0-9]+)\)/g, (_, name) => named(name));
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(themed);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v)]));
    return value;
  };
  const axis = own => ({ gridcolor: named("--grid"), linecolor: named("--rule"), zerolinecolor: named("--rule"),
    automargin: true, exponentformat: "power", ...own });
  const coarse = matchMedia("(pointer: coarse)");
  const partsOf = plot => {
    const own = themed(JSON.parse(plot.closest("figure").querySelector("script").textContent)), given = own.layout;
    const layout = { font: { family: "system-ui, sans-serif", size: 13, color: named("--ink") }, paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 12, t: 8, b: 8 }, hovermode: "x unified", uirevision: "kept",
      hoverlabel: { bgcolor: named("--paper"), bordercolor: named("--rule"), font: { color: named("--ink") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: named("--quiet"), activecolor: named("--ink") },
      dragmode: coarse.matches ? false : "zoom", showlegend: own.data.length > 1, ...given };
    layout.legend = { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 12 }, ...given.legend };
    for (const name of Object.keys({ xaxis: 0, yaxis: 0, ...given })) if (/^[xy]axis\d*$/.test(name))
      layout[name] = axis(given[name]);
    const curves = layout.showlegend ? own.data.filter(trace => trace.showlegend !== false).length : 0;
    plot.dataset.height ??= given.height ?? plot.clientHeight;
    // A legend of one column takes a line for each curve.
    const extra = plot.clientWidth < 520 && curves > 2 ? 19 * curves : 0;
    layout.height = Number(plot.dataset.height) + extra;
    plot.style.height = layout.height + "px";
    if (plot.dataset.log === "true") layout.yaxis.type = "log";
    const range = ranges[plot.dataset.steps];
    if (range) { layout.xaxis.range = range.slice(); layout.xaxis.autorange = false; }
    return [own.data, layout];
  };
  const config = { responsive: true, displaylogo: false, displayModeBar: "hover", doubleClick: "reset",
    modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d"], ["toImage"]] };
  const zoomed = plot => !plot.layout.xaxis.autorange || plot.dataset.ranged !== "true" && !plot.layout.yaxis.autorange;
  const together = (plot, range) => {
    const group = plot.dataset.steps;
    if (!group || JSON.stringify(ranges[group] ?? null) === JSON.stringify(range)) return;
    ranges[group] = range;
    for (const other of drawn.keys()) if (other !== plot && other.dataset.steps === group)
      Plotly.relayout(other, range ? { "xaxis.range": range.slice(), "xaxis.autorange": false } : { "xaxis.autorange": true });
  };
  const draw = plot => {
    if (!drawn.has(plot)) drawn.set(plot, Plotly.newPlot(plot, ...partsOf(plot), config).then(() => {
      plot.dataset.drawn = "true";
      plot.dataset.ranged = !plot.layout.yaxis.autorange;
      plot.on("plotly_relayout", change => {
        plot.closest("figure").classList.toggle("zoomed", zoomed(plot));
        if (change["xaxis.autorange"]) together(plot, null);
        else if (change["xaxis.range"]) together(plot, change["xaxis.range"].slice());
        else if ("xaxis.range[0]" in change) together(plot, [change["xaxis.range[0]"], change["xaxis.range[1]"]]);
      });
    }));
    return drawn.get(plot);
  };
  const plots = [...document.querySelectorAll("[data-chart]")];
  const seen = new IntersectionObserver(entries => {
    for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "600px 0px" });
  for (const plot of plots) {
    seen.observe(plot);
    const figure = plot.closest("figure"), log = figure.querySelector("[data-tool=log]");
    if (log) log.onclick = () => {
      const on = plot.dataset.log !== "true";
      plot.dataset.log = on;
      log.setAttribute("aria-pressed", on);
      draw(plot).then(() => Plotly.relayout(plot, { "yaxis.type": on ? "log" : "linear", "yaxis.autorange": true }));
    };
    figure.querySelector("[data-tool=all]").onclick = () => draw(plot).then(() => Plotly.relayout(plot,
      { "xaxis.autorange": true, ...(plot.dataset.ranged === "true" ? {} : { "yaxis.autorange": true }) }));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const plot of drawn.keys()) Plotly.react(plot, ...partsOf(plot), config);
  });
  addEventListener("beforeprint", () => plots.forEach(draw));
  for (const button of document.querySelectorAll("[data-copies]")) button.onclick = async () => {
    const source = document.getElementById(button.dataset.copies);
    try { await navigator.clipboard.writeText(source.textContent); } catch {
      getSelection().selectAllChildren(source);
      document.execCommand("copy");
    }
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 2000);
  };
})();
"""


def scripts() -> tuple[str, str]:
    """What draws charts: the library, which is 4.8 MB, and how the page uses it."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()), SCRIPT


def chart(
    title: str,
    traces: Sequence[Trace],
    layout: Mapping[str, Any],
    *,
    label: str,
    read: str = "",
    steps: str | None = None,
    log: bool = False,
    low: bool = False,
) -> Element:
    """A chart that is drawn when it comes into view.

    Args:
        title: above it.
        traces: as plotly takes them; a colour is written as `COLOURS` and `INK` are, and follows the scheme.
        layout: what differs from the page's own layout.
        label: what it shows, in one sentence with its main numbers, for those who do not see it.
        read: how to read it.
        steps: charts of the same name are zoomed together along x.
        log: whether it has a button for a logarithmic y axis.
        low: whether it needs less height than others.

    Returns:
        A figure, with its data in a script element that is not run.
    """
    content = json.dumps({"data": list(traces), "layout": dict(layout)}, allow_nan=False, separators=(",", ":"))
    tools = [element("button", "log axis", type="button", kind="tool", data_tool="log", aria_pressed="false")] if log else []
    tools.append(element("button", "show all", type="button", kind="tool", data_tool="all"))
    bar = element("div", element("h3", title), element("div", *tools, kind="tools"), kind="bar")
    plot = element("div", kind="plot", data_chart="", role="img", aria_label=f"{title}. {label}")
    if steps is not None:
        plot.set("data-steps", steps)
    if "height" in layout:
        plot.set("style", f"height: {layout['height']}px")
    # A text with `</script>` in it would end the element.
    data = element("script", content.replace("<", "\\u003c"), type="application/json")
    parts = [bar, plot, *([element("figcaption", read)] if read else []), data]
    return element("figure", *parts, kind="chart low" if low else "chart")


def plain(name: str) -> str:
    """A name as a text of plotly, which takes some tags for its own."""
    return name.replace("&", "&amp;").replace("<", "&lt;")


def thinned(series: Series, most: int = MOST_POINTS) -> tuple[list[float], list[float], bool]:
    """A curve of so many points at most, with all its peaks: the lowest and the highest value of each stretch.

    Args:
        series: x, ascending, and y, finite.
        most: points.

    Returns:
        x, y, and whether points were left out.
    """
    x, y = np.asarray(series[0], dtype=np.float64), np.asarray(series[1], dtype=np.float64)
    if len(y) <= most:
        return _shortened(x), _shortened(y), False
    places = {0, len(y) - 1}
    for part in np.array_split(np.arange(len(y)), most // 2 - 1):
        places |= {int(part[np.argmin(y[part])]), int(part[np.argmax(y[part])])}
    kept = sorted(places)
    return _shortened(x[kept]), _shortened(y[kept]), True


def averaged(series: Series, most: int) -> tuple[list[float], list[float], int]:
    """A curve of means over equal stretches: x at the end of each, y, and how many points one holds."""
    x, y = np.asarray(series[0], dtype=np.float64), np.asarray(series[1], dtype=np.float64)
    each = max(1, math.ceil(len(y) / most))
    starts = np.arange(0, len(y), each)
    if not len(y):
        return [], [], each
    counts = np.diff([*starts, len(y)])
    return _shortened(x[np.minimum(starts + each, len(x)) - 1]), _shortened(np.add.reduceat(y, starts) / counts), each


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of a window about each value; narrower at the ends."""
    y = np.asarray(values, dtype=np.float64)
    total = np.concatenate(([0.0], np.cumsum(y)))
    place = np.arange(len(y))
    low, high = np.maximum(place - window // 2, 0), np.minimum(place + window // 2 + 1, len(y))
    return _shortened((total[high] - total[low]) / (high - low))


def _shortened(values: NDArray[np.float64]) -> list[float]:
    """Six significant digits, which is more than a picture shows."""
    return [int(v) if v.is_integer() and abs(v) < 1e15 else float(f"{v:.6g}") for v in values.tolist()]
