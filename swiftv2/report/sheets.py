"""Quality sheets to leaf through: what cohorts and runs look like, drawn from arrays into one PDF."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
_Box = tuple[float, float, float, float]
"""Left, bottom, width, height in shares of the page."""

PLANES = ("sagittal", "coronal", "axial")
SIDES = {"sagittal": ("P", "A"), "coronal": ("L", "R"), "axial": ("L", "R")}
"""What lies at the left and at the right edge of a picture."""
CONVENTION = "neurological: the subject's left is on the left"
SPIKE_MM = 0.5
"""Framewise displacement that counts as a spike."""
_PAGE_INCHES = (11.7, 8.3)
_LISTED = 24
_STYLE: Any = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
_INK, _ALARM = "#4c72b0", "#c1440e"


@dataclass(frozen=True)
class Slices:
    """Three planes of a map.

    Attributes:
        pictures: by plane, (columns, rows); columns run to the right (sagittal: forward), rows upward (axial: forward);
            NaN where nothing is known.
        places: by plane, where it cuts, in mm of its axis.
    """

    pictures: Mapping[str, Floats]
    places: Mapping[str, float]


@dataclass(frozen=True)
class CohortSheet:
    """Two pages of a cohort.

    Attributes:
        title: name of the cohort.
        facts: (what, value) lines.
        mean: group mean image, in shares of each run's mean; None where it may not be drawn or is not defined.
        tsnr: group temporal SNR; None likewise.
        remark: why a map is missing, or what else is to be known.
        measures: by name with unit, one number a run; NaN where not known.
        outliers: lines that name runs.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    mean: Slices | None
    tsnr: Slices | None
    remark: str
    measures: Mapping[str, Floats]
    outliers: tuple[str, ...]


@dataclass(frozen=True)
class RunSheet:
    """One page of a run.

    Attributes:
        title: pseudonymous key.
        facts: (what, value) lines.
        mean: voxel means in source units.
        tsnr: voxel means over voxel standard deviations; None for data whose means were removed.
        displacement: (frames,) framewise displacement in mm, NaN where not known; None without confounds.
        censored: (frames,) bool; None without confounds.
        global_signal: (frames,) mean over the brain, source units.
        histogram: counts (bins,) of the brain's values in some frames.
        edges: (bins + 1,) source units.
        seconds: (frames,) times of the frames.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    mean: Slices
    tsnr: Slices | None
    displacement: Floats | None
    censored: NDArray[np.bool_] | None
    global_signal: Floats
    histogram: NDArray[np.int64]
    edges: Floats
    seconds: Floats


def draw(stream: IO[bytes], sheets: Iterable[CohortSheet | RunSheet]) -> int:
    """Draw the sheets into a PDF, one after another, so that no two are held at a time; returns the number of pages."""
    pages = 0
    # Without a date the same store gives the same bytes.
    with mpl.rc_context(_STYLE), PdfPages(stream, metadata={"Title": "swiftv2 quality sheets", "CreationDate": None}) as pdf:
        for sheet in sheets:
            for figure in _cohort_figures(sheet) if isinstance(sheet, CohortSheet) else [_run_figure(sheet)]:
                pdf.savefig(figure)
                pages += 1
    return pages


def _cohort_figures(sheet: CohortSheet) -> list[Any]:
    return [_cohort_maps(sheet), _cohort_distributions(sheet)]


def _cohort_maps(sheet: CohortSheet) -> Any:
    figure = _page(f"cohort {sheet.title}")
    title = "group mean image (share of each run's mean)"
    _draw_slices(figure, (0.03, 0.50, 0.68, 0.42), sheet.mean, title, "gray", sheet.remark)
    title = "group temporal SNR (voxel mean / voxel deviation)"
    _draw_slices(figure, (0.03, 0.03, 0.68, 0.42), sheet.tsnr, title, "viridis", sheet.remark)
    notes = [("note", sheet.remark)] if sheet.remark else []
    _draw_facts(figure, (0.75, 0.90), [*sheet.facts, ("pictures", CONVENTION), *notes])
    return figure


def _page(title: str) -> Any:
    # Places are fixed: fitting them anew for each of thousands of pages would take most of the time.
    figure: Any = Figure(figsize=_PAGE_INCHES)
    figure.text(0.5, 0.965, title, ha="center", fontsize=12)
    return figure


def _cohort_distributions(sheet: CohortSheet) -> Any:
    figure = _page(f"cohort {sheet.title}: one number a run")
    columns = 4
    rows = math.ceil((len(sheet.measures) + 1) / columns)
    axes = np.atleast_2d(figure.subplots(rows, columns)).ravel()
    figure.subplots_adjust(left=0.05, right=0.97, bottom=0.08, top=0.9, wspace=0.25, hspace=0.35)
    for axis, (name, values) in zip(axes, sheet.measures.items(), strict=False):
        known = values[np.isfinite(values)]
        axis.set_xlabel(name)
        if len(known):
            axis.hist(known, bins=min(40, max(5, len(known) // 4)), color=_INK)
            axis.axvline(float(np.median(known)), color="black", lw=0.8)
            axis.set_title(f"{len(known)} runs, median {np.median(known):.4g}", fontsize=7)
        else:
            axis.text(0.5, 0.5, "not known", ha="center", transform=axis.transAxes)
    for axis in axes[len(sheet.measures) :]:
        axis.set_axis_off()
    axes[0].set_ylabel("runs")
    shown = list(sheet.outliers[:_LISTED])
    shown += [f"and {len(sheet.outliers) - _LISTED} more: see the table"] if len(sheet.outliers) > _LISTED else []
    text = "\n".join(["outliers (robust z beyond 4):", *(shown or ["none"])])
    axes[len(sheet.measures)].text(0.0, 1.0, text, va="top", fontsize=6, family="monospace")
    return figure


def _run_figure(sheet: RunSheet) -> Any:
    figure = _page(f"run {sheet.title}")
    _draw_slices(figure, (0.03, 0.50, 0.46, 0.42), sheet.mean, "mean image (source units)", "gray", "")
    why = "not defined: the voxels' means were removed"
    _draw_slices(figure, (0.51, 0.50, 0.46, 0.42), sheet.tsnr, "temporal SNR", "viridis", why)
    motion = figure.add_axes((0.08, 0.27, 0.5, 0.17))
    _draw_motion(motion, sheet)
    whole = figure.add_axes((0.08, 0.07, 0.5, 0.15), sharex=motion)
    whole.plot(sheet.seconds, sheet.global_signal, color=_INK, lw=0.7)
    whole.set(xlabel="time (s)", ylabel="global signal\n(source units)")
    _draw_facts(figure, (0.61, 0.44), [*sheet.facts, ("pictures", CONVENTION)])
    axis = figure.add_axes((0.82, 0.07, 0.15, 0.37))
    axis.stairs(sheet.histogram, sheet.edges, fill=True, color=_INK)
    axis.set(xlabel="brain values (source units)", yticks=[])
    return figure


def _draw_motion(axis: Any, sheet: RunSheet) -> None:
    axis.set_ylabel("framewise\ndisplacement (mm)")
    if sheet.displacement is None or not np.isfinite(sheet.displacement).any():
        axis.text(0.5, 0.5, "not known: no confounds", ha="center", transform=axis.transAxes)
        return
    axis.plot(sheet.seconds, sheet.displacement, color=_INK, lw=0.7)
    spikes = np.nan_to_num(sheet.displacement) > SPIKE_MM
    axis.plot(sheet.seconds[spikes], sheet.displacement[spikes], "v", ms=4, color=_ALARM)
    axis.axhline(SPIKE_MM, color=_ALARM, lw=0.6, ls="--")
    title = f"{int(spikes.sum())} spikes above {SPIKE_MM:g} mm"
    if sheet.censored is not None:
        axis.plot(sheet.seconds[sheet.censored], np.zeros(int(sheet.censored.sum())), "|", color="black", ms=6)
        title += f"; {int(sheet.censored.sum())} frames censored (ticks)"
    axis.set_title(title, fontsize=7, loc="left")


def _draw_slices(figure: Any, box: _Box, slices: Slices | None, title: str, colours: str, why_not: str) -> None:
    left, bottom, width, height = box
    figure.text(left + width / 2, bottom + height, title, ha="center", va="top", fontsize=9)
    if slices is None:
        figure.text(left + width / 2, bottom + height / 2, _wrapped(why_not), ha="center")
        return
    values = np.concatenate([slices.pictures[plane].ravel() for plane in PLANES])
    values = values[np.isfinite(values)]
    low, high = (float(q) for q in np.quantile(values, (0.01, 0.99))) if len(values) else (0.0, 1.0)
    image = None
    for place, plane in enumerate(PLANES):
        axis = figure.add_axes((left + place * width / 3, bottom + 0.07, width / 3 - 0.01, height - 0.14))
        picture = np.ma.masked_invalid(slices.pictures[plane])
        image = axis.imshow(picture.T, origin="lower", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(f"{plane}, {'xyz'[place]} = {slices.places[plane]:.0f} mm", fontsize=7)
        for side, x, align in zip(SIDES[plane], (0.02, 0.98), ("left", "right"), strict=True):
            axis.text(x, 0.02, side, transform=axis.transAxes, fontsize=9, weight="bold", ha=align, color=_ALARM)
    scale = figure.add_axes((left + width / 4, bottom + 0.04, width / 2, 0.012))
    figure.colorbar(image, cax=scale, orientation="horizontal")


def _draw_facts(figure: Any, corner: tuple[float, float], facts: Iterable[tuple[str, str]]) -> None:
    lines = [f"{what}: {value if len(value) <= 30 else _wrapped(value)}" for what, value in facts]
    figure.text(*corner, "\n".join(lines), va="top", fontsize=7)


def _wrapped(text: str) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) > 34:
            lines.append("   ")
        lines[-1] += (" " if lines[-1].strip() else "") + word
    return "\n   ".join(line.strip() for line in lines)
