"""Loss against compute, tokens and parameters: runs as points, the fitted law as lines with bands."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from swiftv2.report.scaling.law import Band, Floats, Law, law_of
from swiftv2.report.scaling.points import MOST_GROUPS, Point, colours_of, draw_points, explain_groups
from swiftv2.report.scaling.style import ALARM, COLUMN_INCHES, INK, QUIET, SECOND, logarithmic, styled

_LINES_OF_MANY = 4
_BEYOND = 10.0
"""How far beyond the largest run lines go on, as a factor of FLOPs; its square root for tokens and parameters."""
_DASHES = (0, (3, 2))

Tree = Mapping[str, Any]


@dataclass(frozen=True)
class _View:
    """One of the three figures.

    Attributes:
        x: key of a point along x.
        label: of x.
        group: key of a point that sets its colour.
        limit: what the black line is.
        curve: key of the fit of some runs alone.
        beyond: factor by which lines go on beyond the runs.
    """

    x: str
    label: str
    group: str
    limit: str
    curve: str
    beyond: float


_COMPUTE = _View("flops", "compute (FLOPs)", "parameters", "law, best size", "compute", _BEYOND)
_TOKENS = _View("tokens", "tokens", "parameters", "law, endless parameters", "data", math.sqrt(_BEYOND))
_PARAMETERS = _View("parameters", "parameters", "tokens", "law, endless tokens", "parameters", math.sqrt(_BEYOND))


def loss_against_compute(fit: Tree) -> Figure:
    """Draw loss against FLOPs: runs by size, the law of each size and of the best size (black), the envelope of the runs.

    Args:
        fit: a fit tree, as `swiftv2 sweep fit` writes it.

    Returns:
        A figure of one column, both axes logarithmic.
    """
    return _draw(fit, _COMPUTE)


def loss_against_tokens(fit: Tree) -> Figure:
    """Draw loss against training tokens: runs by size, the law of each size and of endless parameters (black)."""
    return _draw(fit, _TOKENS)


def loss_against_parameters(fit: Tree) -> Figure:
    """Draw loss against parameters: runs by tokens, the law of each number of tokens and of endless tokens (black)."""
    return _draw(fit, _PARAMETERS)


@styled
def _draw(fit: Tree, view: _View) -> Figure:
    law, points = law_of(fit), fit["points"]
    figure = Figure(figsize=(COLUMN_INCHES, 4.1), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel=view.label, ylabel="held-out loss")
    colours = colours_of(points, view.group)
    xs = np.array([float(point[view.x]) for point in points])
    end = float(xs.max()) * view.beyond
    _draw_groups(axes, law, points, view, colours)
    handles = _draw_limit(axes, law, view, float(xs.min()), float(xs.max()))
    handles += _draw_curve(axes, fit["curves"][view.curve])
    handles += _draw_envelope(axes, fit["envelope"]) if view.x == "flops" else []
    handles += draw_points(axes, points, view.x, "loss", view.group)
    held_out, losses = _draw_held_out(axes, fit["extrapolation"], view)
    axes.set_xlim(float(xs.min()) / 1.3, end)
    _set_losses(axes, fit, [float(point["loss"]) for point in points] + losses)
    logarithmic(axes)
    explain_groups(figure, axes, points, view.group, line=True)
    figure.legend(handles=handles + held_out, loc="outside upper center", ncols=2, fontsize=6)
    return figure


def _draw_groups(axes: Axes, law: Law, points: Sequence[Point], view: _View, colours: Mapping[float, Any]) -> None:
    groups, few = list(colours), len(colours) <= MOST_GROUPS
    if not few:
        places = np.linspace(0, len(groups) - 1, _LINES_OF_MANY).round().astype(int)
        groups = [groups[place] for place in places]
    highest = max(float(point[view.x]) for point in points)
    for group in groups:
        # Of many groups most hold a run or two: their lines go through all runs instead.
        own = np.array([float(point[view.x]) for point in points if not few or point[view.group] == group])
        line = np.geomspace(own.min(), highest * view.beyond, 120)
        same = np.full_like(line, group)
        tokens = law.tokens(same, line) if view.x == "flops" else line
        along: tuple[Floats, Floats] = (line, same) if view.x == "parameters" else (same, tokens)
        _draw_line(axes, line, law.loss(*along), own.max(), colours[group], 0.9 if few else 0.7)
        if few:
            _fill(axes, line, law.band(*along), colours[group], 0.13)


def _draw_limit(axes: Axes, law: Law, view: _View, low: float, high: float) -> list[Any]:
    line = np.geomspace(low / 1.3, high * view.beyond, 120)
    if view.x == "flops":
        middle, band, noisy = law.best(line), law.best_band(line), law.best_band(line, noisy=True)
    else:
        endless = np.full_like(line, np.inf)
        places = (endless, line) if view.x == "tokens" else (line, endless)
        middle, band, noisy = law.loss(*places), law.band(*places), law.band(*places, noisy=True)
    _draw_line(axes, line, middle, high, INK, 1.3)
    _fill(axes, line, noisy, INK, 0.10)
    _fill(axes, line, band, INK, 0.20)
    level = f"{100 * law.level:.0f} %"
    return [
        Line2D([], [], color=INK, lw=1.3, label=view.limit),
        Line2D([], [], color=INK, lw=1.3, ls=_DASHES, label="beyond the runs"),
        Patch(color=INK, alpha=0.28, lw=0, label=f"{level} of laws drawn"),
        Patch(color=INK, alpha=0.10, lw=0, label=f"{level}, a run's noise added"),
    ]


def _draw_line(axes: Axes, xs: Floats, ys: Floats, last: float, colour: Any, width: float) -> None:
    """Solid as far as runs are, dashed beyond them."""
    count = int(np.count_nonzero(xs <= last * (1 + 1e-9)))
    axes.plot(xs[:count], ys[:count], color=colour, lw=width, zorder=2)
    # Both parts share a point, so that no gap is left between them.
    axes.plot(xs[max(count - 1, 0) :], ys[max(count - 1, 0) :], color=colour, lw=width, ls=_DASHES, zorder=2)


def _fill(axes: Axes, xs: Floats, band: Band, colour: Any, alpha: float) -> None:
    axes.fill_between(xs, *band, color=colour, alpha=alpha, lw=0, zorder=1)


def _draw_curve(axes: Axes, curve: Tree) -> list[Line2D]:
    """E + A x^-alpha of some runs alone, where it could be fitted."""
    if "refused" in curve:
        return []
    (low, high), constants = curve["range"], curve["constants"]
    line = np.geomspace(low, high, 80)
    losses = constants["E"] + constants["A"] * line ** -constants["alpha"]
    style: Any = {"color": SECOND, "lw": 1.4, "ls": (0, (4, 1.2, 1, 1.2)), "zorder": 2.5}
    axes.plot(line, losses, **style)
    return [Line2D([], [], label=f"E + A x$^{{-\\alpha}}$ of {len(curve['points'])} runs alone", **style)]


def _draw_envelope(axes: Axes, envelope: Tree) -> list[Line2D]:
    """The lowest loss that any run had reached with so many FLOPs."""
    if "refused" in envelope:
        return []
    axes.step(envelope["flops"], envelope["loss"], where="post", color=QUIET, lw=0.7, zorder=1.5)
    return [Line2D([], [], color=QUIET, lw=0.7, label="envelope of the runs")]


def _draw_held_out(axes: Axes, told: Tree, view: _View) -> tuple[list[Any], list[float]]:
    """The largest run, left out and predicted; returns entries of a legend, and the losses that must be within the axes."""
    if "refused" in told:
        return [], []
    low, high = map(float, told["interval"])
    x, predicted, measured = float(told[view.x]), float(told["predicted"]), float(told["measured"])
    style: Any = {"fmt": "_", "ms": 7, "color": ALARM, "lw": 1.1, "capsize": 2.5, "zorder": 4}
    bar = axes.errorbar(x, predicted, yerr=[[predicted - low], [high - predicted]], **style)
    axes.plot(x, measured, "*", ms=7, mfc=ALARM, mec="white", mew=0.4, zorder=5)
    bar.set_label("largest left out: predicted")
    star = Line2D([], [], marker="*", ms=7, mfc=ALARM, mec="white", mew=0.4, ls="none", label="largest left out: measured")
    return [star, bar], [low, high, predicted, measured]


def _set_losses(axes: Axes, fit: Tree, losses: Sequence[float]) -> None:
    """Limits of the axis of losses, with the irreducible loss and its interval where it is not far below the runs."""
    low, high = min(losses), max(losses)
    span = max(math.log(high / low), 0.02)
    floor, (floor_low, floor_high) = float(fit["E"]), fit["intervals"]["E"]
    near = floor > 0 and math.log(low / floor) <= max(1.5 * span, 0.1)
    bottom = min(low, floor) if near else low
    axes.set_ylim(bottom * math.exp(-0.15 * span), high * math.exp(0.08 * span))
    words = f"E = {floor:.4g} [{floor_low:.4g}, {floor_high:.4g}]"
    style: Any = {"fontsize": 6.5, "bbox": {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.3}, "zorder": 6}
    if near:
        axes.axhline(floor, color=QUIET, lw=0.9, ls=(0, (1, 1.5)), zorder=1)
        axes.axhspan(max(floor_low, bottom * 1e-3), floor_high, color=QUIET, alpha=0.12, lw=0, zorder=0)
        place = (0.02, floor)
        axes.annotate(words, place, (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", **style)
    else:
        axes.annotate(f"{words}: below this axis", (0.02, 0.02), xycoords="axes fraction", **style)
