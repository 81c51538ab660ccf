"""What muP is for: learning rates that carry over to other widths, and activations that keep their size."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from swiftv2.report.scaling.style import ALARM, INK, MARKERS, PAGE_INCHES, RAMP, plain, powers, shades, styled

Tree = Mapping[str, Any]
_FORMS = {"standard": "standard", "mup": "muP"}
_SHOWN = 1.6
"""Losses beyond this multiple of the spread of a curve's lower half are cut off, as those of runs that all but diverged."""
_ROW_OF_TWO = 4
"""With more quantities than these, two stand side by side."""


@styled
def transfer(curves: Tree) -> Figure:
    """Draw loss against learning rate, a line a width, with the best rate and its interval; one panel a parametrisation.

    Args:
        curves: `widths`, each with `parametrisation`, `embed_dim`, `lr`, `loss` (null where the run diverged), `diverged`,
            `best_lr` and `best_lr_interval` (null where the best rate is at an end of the grid).

    Returns:
        A figure of two columns; one where there is only one parametrisation.
    """
    forms = [form for form in _FORMS if any(one["parametrisation"] == form for one in curves["widths"])]
    figure = Figure(figsize=(PAGE_INCHES * (1.0 if len(forms) > 1 else 0.5), 3.0), layout="constrained")
    panels = figure.subplots(1, len(forms), sharex=True, sharey=True, squeeze=False)[0]
    colours = shades(sorted({float(one["embed_dim"]) for one in curves["widths"]}))
    low, high = _limits(curves)
    for axes, form in zip(panels, forms, strict=True):
        axes.set(xscale="log", yscale="log", ylim=(low, high), xlabel="learning rate", title=_FORMS[form])
        own = sorted((one for one in curves["widths"] if one["parametrisation"] == form), key=lambda one: int(one["embed_dim"]))
        for one in own:
            place = list(colours).index(float(one["embed_dim"]))
            _draw_width(axes, one, colours[float(one["embed_dim"])], MARKERS[place % len(MARKERS)])
        powers(axes.xaxis)
        plain(axes.yaxis)
    panels[0].set_ylabel("held-out loss")
    handles: list[Any] = [
        Line2D([], [], color=colour, marker=MARKERS[place % len(MARKERS)], mec="white", mew=0.3, label=f"width {width:g}")
        for place, (width, colour) in enumerate(colours.items())
    ]
    handles.append(Line2D([], [], color=INK, marker="*", ms=7, lw=2.0, mec="white", mew=0.4, label="best rate, its interval"))
    if any(any(one["diverged"]) for one in curves["widths"]):
        handles.append(Line2D([], [], color=ALARM, marker="x", ls="none", label="diverged"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6 if len(forms) > 1 else 3))
    return figure


def _limits(curves: Tree) -> tuple[float, float]:
    """Limits of the losses: all best ones, and as much of what lies above as does not press them together."""
    every = [np.array([loss for loss in one["loss"] if loss is not None], dtype=float) for one in curves["widths"]]
    lowest, highest = min(own.min() for own in every), max(own.max() for own in every)
    usual = max(float(np.median(own)) for own in every)
    top = min(highest, lowest + _SHOWN * max(usual - lowest, 0.02 * lowest))
    room = 0.06 * (top - lowest)
    return lowest - room, top + 2 * room


def _draw_width(axes: Axes, one: Tree, colour: Any, marker: str) -> None:
    rates = np.array(one["lr"], dtype=float)
    losses = np.array([np.nan if loss is None else loss for loss in one["loss"]], dtype=float)
    axes.plot(rates, losses, marker=marker, color=colour, mec="white", mew=0.3)
    gone = np.array(one["diverged"], dtype=bool)
    # Of a run that diverged no loss is known: it stands at the upper edge.
    axes.plot(rates[gone], np.full(int(gone.sum()), 0.97), "x", color=ALARM, transform=axes.get_xaxis_transform(), zorder=4)
    height = float(np.nanmin(losses))
    if one["best_lr_interval"] is not None:
        axes.plot(one["best_lr_interval"], [height, height], color=colour, lw=2.0, alpha=0.5, zorder=2.5)
    axes.plot(float(one["best_lr"]), height, "*", ms=8, color=colour, mec="white", mew=0.4, zorder=5)


@styled
def coordinates(check: Tree) -> Figure:
    """Draw the size of activations against width, a line a step, a row a quantity; left standard, right muP.

    Args:
        check: `widths`, `steps`, `quantities` (by name the sizes of `standard` and `mup`, a list a step of one number a
            width) and `slopes` (of log size against log width after the last step).

    Returns:
        A figure of two columns.
    """
    names = list(check["quantities"])
    beside = 1 if len(names) <= _ROW_OF_TWO else 2
    rows = -(-len(names) // beside)
    figure = Figure(figsize=(PAGE_INCHES, 0.6 + (1.5 if beside == 1 else 1.45) * rows), layout="constrained")
    panels = figure.subplots(rows, 2 * beside, sharex=True, squeeze=False)
    for place, name in enumerate(names):
        row, column = divmod(place, beside)
        pair = panels[row, 2 * column : 2 * column + 2]
        pair[1].sharey(pair[0])
        for axes, form in zip(pair, _FORMS, strict=True):
            _draw_sizes(axes, check, name, form)
        pair[0].set_title(name, loc="left", fontsize=7, parse_math=False)
        pair[1].tick_params(labelleft=False)
        plain(pair[0].yaxis)
    for empty in panels.ravel()[2 * len(names) :]:
        empty.set_axis_off()
    figure.supxlabel("width of the first stage", fontsize=8)
    figure.supylabel("mean absolute activation", fontsize=8)
    steps = range(int(check["steps"]) + 1)
    told = steps if len(steps) <= 8 else [0, steps[-1] // 2, steps[-1]]
    handles = [Line2D([], [], color=_step_colour(step, len(steps)), label=f"step {step}") for step in told]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def _draw_sizes(axes: Axes, check: Tree, name: str, form: str) -> None:
    widths, lines = check["widths"], check["quantities"][name][form]
    axes.set(xscale="log", yscale="log")
    for step, sizes in enumerate(lines):
        # A readout that starts from zero has no size on a logarithmic axis.
        drawn = [size if size > 0 else np.nan for size in sizes]
        axes.plot(widths, drawn, "o-", ms=2.5, color=_step_colour(step, len(lines)))
    slope = float(check["slopes"][name][form])
    axes.text(0.97, 0.05, f"{_FORMS[form]}: slope {slope:+.2f}", transform=axes.transAxes, ha="right", fontsize=6.5)
    axes.margins(x=0.08, y=0.25)
    axes.set_xticks(widths, [f"{width:g}" for width in widths], minor=False)
    axes.set_xticks([], minor=True)


def _step_colour(step: int, count: int) -> Any:
    return RAMP(step / max(count - 1, 1))
