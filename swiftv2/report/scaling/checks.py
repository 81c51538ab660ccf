"""Cross-checks of a law as figures: parabolas of equal compute, and what the law leaves unexplained."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from swiftv2.errors import SwiftError
from swiftv2.report.scaling.law import law_of
from swiftv2.report.scaling.points import draw_points, explain_groups
from swiftv2.report.scaling.style import (
    COLUMN_INCHES,
    INK,
    MARKERS,
    PAGE_INCHES,
    QUIET,
    SECOND,
    logarithmic,
    plain,
    powers,
    shades,
    styled,
)

Tree = Mapping[str, Any]
_NAMED = 12
"""So many runs that are off are named in the figure; more would hide one another, and the table of points has them all."""


@styled
def isoflop(fit: Tree) -> Figure:
    """Draw a parabola of loss over size for each budget (left), and the best size over compute, beside the law's (right).

    Args:
        fit: a fit tree with `isoflop`.

    Returns:
        A figure of two columns.

    Raises:
        SwiftError: the runs do not group into budgets.
    """
    told = fit["isoflop"]
    if "refused" in told:
        raise SwiftError(f"no figure of isoFLOP parabolas: {told['refused']}")
    figure = Figure(figsize=(PAGE_INCHES, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
    colours = shades(sorted(float(budget["flops"]) for budget in told["budgets"]))
    _draw_parabolas(left, fit, colours)
    _draw_optima(right, fit, colours)
    return figure


def _draw_parabolas(axes: Axes, fit: Tree, colours: Mapping[float, Any]) -> None:
    budgets, points = fit["isoflop"]["budgets"], {point["row"]: point for point in fit["points"]}
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="held-out loss", title="loss at equal compute")
    losses = []
    for place, budget in enumerate(budgets):
        own, colour = [points[row] for row in budget["rows"]], colours[float(budget["flops"])]
        sizes = np.array([float(point["parameters"]) for point in own])
        line = np.geomspace(sizes.min() / 1.2, sizes.max() * 1.2, 80)
        x = np.log(line)
        axes.plot(line, np.polynomial.polynomial.polyval(x, budget["coefficients"]), color=colour, lw=0.9)
        marker = MARKERS[place % len(MARKERS)]
        found = [float(point["loss"]) for point in own]
        axes.plot(sizes, found, marker, color=colour, mec="white", mew=0.3, label=f"{budget['flops']:.2g}")
        losses += found
        if budget["parameters"] is not None:
            if budget["interval"] is not None:
                axes.plot(budget["interval"], [budget["loss"]] * 2, color=SECOND, lw=1.4, zorder=3, solid_capstyle="butt")
            axes.plot(budget["parameters"], budget["loss"], "*", ms=7, color=SECOND, mec="white", mew=0.4, zorder=4)
    sizes = np.array([float(points[row]["parameters"]) for budget in budgets for row in budget["rows"]])
    axes.set_xlim(sizes.min() / 1.5, sizes.max() * 1.5)
    axes.set_ylim(min(losses) / 1.03, max(losses) * 1.03)
    logarithmic(axes)
    axes.legend(title="FLOPs", title_fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=1 + len(budgets) // 16)


def _draw_optima(axes: Axes, fit: Tree, colours: Mapping[float, Any]) -> None:
    told, law = fit["isoflop"], law_of(fit)
    axes.set(xscale="log", yscale="log", xlabel="compute (FLOPs)", ylabel="best parameters", title="best size")
    flops = np.array(sorted(colours))
    line = np.geomspace(flops[0] / 2, flops[-1] * 5, 100)
    best, band = law.best_size(line)
    axes.plot(line, best, color=INK, label=f"law: C$^{{{fit['a']:.3g}}}$")
    axes.fill_between(line, *band, color=INK, alpha=0.18, lw=0)
    if told["exponent"] is not None:
        words = f"minima: C$^{{{told['exponent']:.3g}}}$"
        axes.plot(line, told["coefficient"] * line ** told["exponent"], color=SECOND, ls=(0, (4, 1.2, 1, 1.2)), label=words)
    for budget in told["budgets"]:
        if budget["parameters"] is None:
            continue
        x, middle = float(budget["flops"]), float(budget["parameters"])
        if budget["interval"] is not None:
            axes.plot([x, x], budget["interval"], color=SECOND, lw=1.1, zorder=3)
        axes.plot(x, middle, "*", ms=7, color=SECOND, mec="white", mew=0.4, zorder=4)
    axes.set_xlim(line[0], line[-1])
    minima = [float(budget["parameters"]) for budget in told["budgets"] if budget["parameters"] is not None]
    axes.set_ylim(min([*minima, best[0]]) / 2.0, max([*minima, best[-1]]) * 2.0)
    powers(axes.xaxis)
    powers(axes.yaxis)
    axes.legend(loc="upper left")


@styled
def residuals(fit: Tree) -> Figure:
    """Draw how far runs lie from the law, in percent of the loss, over what the law says; runs that are off are named.

    Args:
        fit: a fit tree.

    Returns:
        A figure of one column. The grey belt is +-1.645 standard deviations of the noise: nine runs of ten.
    """
    figure = Figure(figsize=(COLUMN_INCHES, 2.7), layout="constrained")
    axes = figure.subplots()
    points = [{**point, "percent": 100 * float(point["residual"])} for point in fit["points"]]
    belt = 100 * 1.645 * float(fit["noise"])
    axes.set(xscale="log", xlabel="loss by the law", ylabel="measured above the law (%)")
    axes.axhspan(-belt, belt, color=QUIET, alpha=0.15, lw=0)
    axes.axhline(0.0, color=QUIET, lw=0.7)
    draw_points(axes, points, "fitted", "percent", "parameters")
    axes.margins(x=0.08, y=0.12)
    off = sorted((point for point in points if point["off"]), key=lambda point: -abs(point["percent"]))
    middle = np.sqrt(np.prod(axes.get_xlim()))
    for point in off[:_NAMED]:
        left = point["fitted"] > middle
        axes.annotate(
            f"row {point['row']}",
            (point["fitted"], point["percent"]),
            (-5 if left else 5, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=6.5,
        )
    plain(axes.xaxis)
    explain_groups(figure, axes, points, "parameters", line=False)
    return figure
