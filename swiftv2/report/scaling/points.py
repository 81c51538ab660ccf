"""Runs as points, coloured by their size or tokens, and the legend or colour bar that says so."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from swiftv2.report.scaling.style import ALARM, MARKERS, RAMP, shades, shown

MOST_GROUPS = 7
"""With more distinct sizes than these, a colour bar tells them and lines are drawn for some of them only."""

Point = Mapping[str, Any]


def colours_of(points: Sequence[Point], group: str) -> dict[float, Any]:
    """A colour for each value of `group`, ascending."""
    return shades(sorted({float(point[group]) for point in points}))


def draw_points(axes: Axes, points: Sequence[Point], x: str, y: str, group: str) -> list[Line2D]:
    """Runs as points coloured by `group`; those that are off are hollow and vermilion, for which a legend entry is returned."""
    colours = colours_of(points, group)
    few = len(colours) <= MOST_GROUPS
    for place, (value, colour) in enumerate(colours.items()):
        for off in (False, True):
            own = [point for point in points if point[group] == value and bool(point["off"]) is off]
            face, edge, width = ("none", ALARM, 1.0) if off else (colour, "white", 0.3 if few else 0.15)
            axes.plot(
                [point[x] for point in own],
                [point[y] for point in own],
                MARKERS[place] if few else "o",
                ms=4.2 if few else 2.8,
                mfc=face,
                mec=edge,
                mew=width,
                zorder=3,
            )
    off_ones = any(point["off"] for point in points)
    return [Line2D([], [], marker="o", mfc="none", mec=ALARM, ls="none", label="run that is off")] if off_ones else []


def explain_groups(figure: Figure, axes: Axes, points: Sequence[Point], group: str, *, line: bool) -> None:
    """A legend below the axes, where it can hide nothing; with many groups a colour bar."""
    colours = colours_of(points, group)
    if len(colours) > MOST_GROUPS:
        bar = figure.colorbar(ScalarMappable(LogNorm(min(colours), max(colours)), RAMP), ax=axes, pad=0.01, aspect=30)
        bar.set_label(group)
        bar.outline.set_linewidth(0.4)
        return
    style: Any = {"mec": "white", "mew": 0.3, "ls": "-" if line else "none"}
    handles = [
        Line2D([], [], color=colour, marker=marker, label=shown(value), **style)
        for (value, colour), marker in zip(colours.items(), MARKERS, strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, title=group, title_fontsize=6.5)
