"""How the figures of scaling laws look, and how they are written: the same input gives the same bytes."""

import functools
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogFormatterMathtext, LogLocator, MaxNLocator, NullFormatter

from swiftv2.files import write_file

P = ParamSpec("P")
R = TypeVar("R")

COLUMN_INCHES = 3.5
"""Width of one column of a paper."""
PAGE_INCHES = 7.2
"""Width of two columns and the gap between them."""
DPI = 300
INK, QUIET, ALARM, SECOND = "#000000", "#6b6b6b", "#d55e00", "#cc79a7"
"""Vermilion and purple of Okabe and Ito: they stay apart from each other and the rest for colour-blind eyes."""
RAMP: Colormap = ListedColormap(mpl.colormaps["viridis"](np.linspace(0.0, 0.85, 256)))
"""Small to large; luminance grows, so that the order also holds in grey. The pale end is cut off: paper is white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")

_STYLE: Any = {
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8,
    "figure.dpi": 100,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 8,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "lines.markersize": 4.0,
    "mathtext.default": "regular",
    "svg.fonttype": "none",
    "svg.hashsalt": "swiftv2",
    "xtick.labelsize": 7,
    "xtick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.labelsize": 7,
    "ytick.major.width": 0.6,
    "ytick.minor.width": 0.4,
}


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw under the style of this module, whatever is set elsewhere."""

    @functools.wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return inner


@styled
def render(figure: Figure) -> dict[str, bytes]:
    """Draw a figure as SVG, with its fonts as text, and as PNG of 300 dpi.

    Returns:
        Bytes by ending, `svg` and `png`: the same for the same figure, since neither holds a date or a drawn number.
    """
    made = {}
    for ending, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": DPI})):
        stream = io.BytesIO()
        figure.savefig(stream, format=ending, facecolor="white", **options)
        made[ending] = stream.getvalue()
    return made


def save_figure(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Write `NAME.svg` and `NAME.png` into a folder, each whole or not at all; returns their paths.

    The folder is made where it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = render(figure)
    paths = folder / f"{name}.svg", folder / f"{name}.png"
    for path, ending in zip(paths, ("svg", "png"), strict=True):
        write_file(path, made[ending])
    return paths


def shades(values: list[float]) -> dict[float, Any]:
    """A colour for each of ascending positive values, by its place on a logarithmic scale."""
    logs = np.log(values)
    width = max(float(logs[-1] - logs[0]), 1e-12)
    return {value: RAMP(float((log - logs[0]) / width)) for value, log in zip(values, logs, strict=True)}


def shown(number: float) -> str:
    """A size for a legend: 7.33M, 202M, 3.22B; small and huge ones in powers of ten."""
    for unit, sign in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if unit <= abs(number) < 1000 * unit:
            return f"{number / unit:.3g}{sign}"
    return f"{number:.3g}"


def powers(axis: Any) -> None:
    """Ticks of a logarithmic axis of sizes, tokens or FLOPs: powers of ten, and 2 and 5 times them where there are few."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    if decades >= 1.5:
        axis.set_major_locator(LogLocator(10.0, numticks=max(3, min(7, math.ceil(decades) + 1))))
        axis.set_major_formatter(LogFormatterMathtext(10.0))
        axis.set_minor_formatter(NullFormatter())
    else:
        _plain(axis, low, high, scientific=True)


def plain(axis: Any) -> None:
    """Ticks of a logarithmic axis of losses: plain numbers, evenly spread, since losses seldom span a decade."""
    low, high = axis.get_view_interval()
    _plain(axis, low, high, scientific=False)


def _plain(axis: Any, low: float, high: float, *, scientific: bool) -> None:
    if high / low < 8.0:
        ticks = np.array(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
        ticks = np.array([step * 10.0**decade for decade in decades for step in steps])
    ticks = ticks[(ticks >= low) & (ticks <= high)]
    axis.set_major_locator(FixedLocator(ticks.tolist()))
    axis.set_minor_locator(FixedLocator([]))
    axis.set_major_formatter(FuncFormatter(_times_ten if scientific and high >= 1e4 else _plain_number))


def _plain_number(value: float, _place: int | None = None) -> str:
    return f"{value:.6g}"


def _times_ten(value: float, _place: int | None = None) -> str:
    exponent = math.floor(math.log10(value) + 1e-9)
    lead = f"{value / 10.0**exponent:.3g}"
    return f"$10^{{{exponent}}}$" if lead == "1" else f"${lead}\\times10^{{{exponent}}}$"


def logarithmic(axes: Axes) -> None:
    """Ticks of axes whose x is a size, tokens or FLOPs and whose y is a loss; call when the limits stand."""
    powers(axes.xaxis)
    plain(axes.yaxis)
