"""Drawing what evaluations left below `figures/reconstructions`: slices in three planes, time courses, means of cohorts."""

import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import patheffects
from numpy.typing import NDArray

from swiftv2.errors import SwiftError
from swiftv2.files import read_json

Arrays = Mapping[str, NDArray[Any]]

FOLDER, INDEX = Path("figures", "reconstructions"), "index.json"
HIDDEN, OUTLINE = "#8fa3c2", "#2a8c4f"
MODEL, INTERPOLATED = "#c1440e", "#4c72b0"
PLANES = ("sagittal", "coronal", "axial")
KINDS = ("original", "masked", "reconstructed", "error")
_SIDES = {"sagittal": ("P", "A"), "coronal": ("L", "R"), "axial": ("L", "R")}


def folder_of(run_dir: Path) -> Path:
    """Where evaluations leave what is drawn."""
    return run_dir / FOLDER


def file_of(run_dir: Path, step: int) -> Path:
    """Arrays of one evaluation."""
    return folder_of(run_dir) / f"step_{step:09d}.npz"


def read_index(run_dir: Path) -> dict[str, Any] | None:
    """What evaluations of a run left to be drawn; None where none has.

    Returns:
        `steps` (step, loss and file of each evaluation that is kept, ascending), `drawn` (kind, name, cohort and caption of
        what the last one shows), `maps` and `notes`, as `recipes/pictures.py` writes them.

    Raises:
        SwiftError: it is damaged.
    """
    path = folder_of(run_dir) / INDEX
    if not path.is_file():
        return None
    index = read_json(path)
    if not all(isinstance(index.get(name), list) for name in ("steps", "drawn", "maps", "notes")):
        raise SwiftError(f"{path}: holds no lists of steps, drawn, maps and notes: the file is damaged")
    return index


def read_arrays(run_dir: Path, step: int) -> dict[str, NDArray[Any]]:
    """Arrays of one evaluation by `<name>/<array>`.

    Raises:
        SwiftError: they are missing or damaged.
    """
    path = file_of(run_dir, step)
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError as error:
        raise SwiftError(f"{path}: {error.strerror}; the next evaluation writes the index anew") from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise SwiftError(f"{path}: cannot be read as arrays: the file is damaged") from error


def of_clip(arrays: Arrays, name: str) -> dict[str, NDArray[Any]]:
    """Arrays of one drawn thing, a clip or the mean of a cohort, by their own names."""
    return {key.removeprefix(f"{name}/"): values for key, values in arrays.items() if key.startswith(f"{name}/")}


def pictures_of(clip: Arrays, plane: str) -> dict[str, NDArray[Any]]:
    """Slices (columns, rows) of one plane of a clip by `volume` or `fluctuation` and one of `KINDS`, in source units.

    Infinity stands for hidden, NaN for no brain, and in errors for what was visible too.
    """
    measured, mean, made, hidden = (clip[f"{name}_{plane}"] for name in ("original", "mean", "reconstructed", "hidden"))
    hidden = hidden & np.isfinite(measured)
    volumes = {
        "original": measured,
        "masked": np.where(hidden, np.inf, measured),
        "reconstructed": np.where(hidden, made, measured),
    }
    error = np.where(hidden, made - measured, np.nan)
    found = {f"volume {kind}": values for kind, values in volumes.items()}
    found |= {f"fluctuation {kind}": values - mean for kind, values in volumes.items()}
    return {**found, "volume error": error, "fluctuation error": error}


def _named(arrays: Arrays, plane: str) -> str:
    place = PLANES.index(plane)
    return f"{plane}\n{'xyz'[place]} = {arrays['cut_mm'][place]:.0f} mm".replace("-", "\u2212")


def draw_planes(figure: Any, clip: Arrays) -> None:
    """Three planes by original, masked, reconstructed and error, of the volume at left and of its fluctuation at right."""
    shown = {plane: pictures_of(clip, plane) for plane in PLANES}
    heights = [shown[plane]["volume original"].shape[1] for plane in PLANES]
    left, right = figure.subfigures(1, 2, wspace=0.02)
    for part, signal in ((left, "volume"), (right, "fluctuation")):
        axes = part.subplots(3, 4, height_ratios=heights)
        scales = _scales(shown, signal)
        images = {}
        for row, plane in enumerate(PLANES):
            for column, kind in enumerate(KINDS):
                axis = axes[row, column]
                images[kind] = draw_slice(axis, shown[plane][f"{signal} {kind}"], scales[kind], plane)
                if kind == "reconstructed":
                    _outline(axis, np.isinf(shown[plane]["volume masked"]))
                if row == 0:
                    axis.set_title(kind, fontsize=9)
                if column == 0:
                    axis.set_ylabel(_named(clip, plane), fontsize=8)
        title = "volume" if signal == "volume" else "fluctuation: volume less each voxel's mean over the clip"
        part.suptitle(title, fontsize=10, fontweight="bold")
        bar = {"location": "bottom", "aspect": 28, "pad": 0.02}
        part.colorbar(images["original"], ax=axes[:, :3], shrink=0.55, label="BOLD (source units)", **bar)
        part.colorbar(images["error"], ax=axes[:, 3:], shrink=0.95, label="error (source units)", **{**bar, "aspect": 14})


def _scales(shown: Mapping[str, Mapping[str, NDArray[Any]]], signal: str) -> dict[str, tuple[float, float, str]]:
    """Lowest and highest value and colours of each column."""

    def values(kind: str) -> NDArray[Any]:
        every = np.concatenate([shown[plane][f"{signal} {kind}"].ravel() for plane in PLANES])
        finite = every[np.isfinite(every)]
        return finite if len(finite) else np.zeros(1)

    original = values("original")
    if signal == "volume":
        low, high = (float(np.quantile(original, q)) for q in (0.005, 0.998))
        plain = (low, high if high > low else low + 1.0, "gray")
        error = _around_zero(values("error"), "PuOr_r")
    else:
        plain = _around_zero(original, "RdBu_r")
        error = (plain[0], plain[1], "PuOr_r")
    return {"original": plain, "masked": plain, "reconstructed": plain, "error": error}


def _around_zero(values: NDArray[Any], colours: str) -> tuple[float, float, str]:
    high = float(np.quantile(np.abs(values), 0.99)) or 1.0
    return -high, high, colours


def draw_slice(axis: Any, values: NDArray[Any], scale: tuple[float, float, str], plane: str) -> Any:
    """One slice (columns, rows), its sides marked; hidden places (infinite) in a colour of their own, NaN left blank."""
    low, high, colours = scale
    cmap = mpl.colormaps[colours].with_extremes(bad=(1, 1, 1, 0))
    picture = np.ma.masked_where(~np.isfinite(values), values)
    image = axis.imshow(picture.T, origin="lower", cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
    if np.isinf(values).any():
        cover = np.ma.masked_where(~np.isinf(values), np.ones(values.shape))
        axis.imshow(cover.T, origin="lower", cmap=mpl.colors.ListedColormap([HIDDEN]), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    halo = [patheffects.withStroke(linewidth=2, foreground="white")]
    for side, place in zip(_SIDES[plane], (0.0, 1.0), strict=True):
        align = "left" if place == 0.0 else "right"
        axis.text(
            place, 0.0, side, transform=axis.transAxes, fontsize=8, ha=align, va="bottom", color="#333", path_effects=halo
        )
    return image


def _outline(axis: Any, hidden: NDArray[np.bool_]) -> None:
    """Mark the edges of what was hidden, along the voxels' own."""
    if not hidden.any() or hidden.all():
        return
    fine = 8
    large = np.kron(hidden.T.astype(np.float32), np.ones((fine, fine), dtype=np.float32))
    x, y = (np.arange(size) / fine - 0.5 + 0.5 / fine for size in (large.shape[1], large.shape[0]))
    axis.contour(x, y, large, levels=[0.5], colors=[OUTLINE], linewidths=0.7)


def draw_courses(figure: Any, clip: Arrays) -> None:
    """Time courses of three voxels: what was measured, and at hidden frames what model and interpolation make of it."""
    axes = figure.subplots(3, 1, sharex=True)
    seconds = clip["seconds"]
    step = float(seconds[1] - seconds[0]) if len(seconds) > 1 else 1.0
    for index, axis in enumerate(axes):
        true, made, guess = (clip[f"course_{name}"][index] for name in ("true", "reconstructed", "interpolated"))
        hidden = clip["course_hidden"][index].astype(bool)
        for place in seconds[hidden]:
            axis.axvspan(place - step / 2, place + step / 2, color=HIDDEN, alpha=0.22, lw=0)
        axis.plot(seconds, true, color="black", lw=1.3, marker=".", ms=4, label="measured")
        axis.plot(seconds[hidden], guess[hidden], "x", ms=4.5, color=INTERPOLATED, label="interpolated in time")
        axis.plot(seconds[hidden], made[hidden], "o", ms=4.5, color=MODEL, label="reconstructed")
        place = ", ".join(f"{x:.0f}" for x in clip["course_mm"][index])
        axis.set_title(f"voxel at ({place}) mm", loc="left", fontsize=8)
        axis.margins(x=0.01)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_ylabel("BOLD (source units)", fontsize=8)
    axes[-1].set_xlabel("time in the clip (s); shaded: hidden from the model", fontsize=8)
    axes[0].legend(fontsize=7.5, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, borderpad=0.1)


_MEANS = (
    ("measured", "measured mean", "image"),
    ("reconstructed", "reconstructed mean", "image"),
    ("error", "root-mean-square error", "size"),
    ("fluctuation", "SD of fluctuation,\nmeasured", "size"),
    ("moved", "SD of fluctuation,\nreconstructed", "size"),
)


def draw_mean(figure: Any, mean: Arrays) -> None:
    """Three planes by what a cohort's hidden voxels are on average, how far reconstruction is off, and how much they move."""
    heights = [mean[f"measured_{plane}"].shape[1] for plane in PLANES]
    axes = figure.subplots(3, len(_MEANS), height_ratios=heights)
    scales = {}
    for group, colours in (("image", "gray"), ("size", "magma")):
        names = [name for name, _, kind in _MEANS if kind == group]
        every = np.concatenate([mean[f"{name}_{plane}"].ravel() for plane in PLANES for name in names])
        every = every[np.isfinite(every)]
        high = float(np.quantile(every, 0.995)) if len(every) else 1.0
        low = float(np.quantile(every, 0.005)) if len(every) and group == "image" else 0.0
        scales[group] = (low, high if high > low else low + 1.0, colours)
    images = {}
    for row, plane in enumerate(PLANES):
        for column, (name, title, group) in enumerate(_MEANS):
            axis = axes[row, column]
            images[group] = draw_slice(axis, mean[f"{name}_{plane}"], scales[group], plane)
            if row == 0:
                axis.set_title(title, fontsize=8.5)
            if column == 0:
                axis.set_ylabel(_named(mean, plane), fontsize=8)
    bar = {"location": "bottom", "shrink": 0.6, "aspect": 30, "pad": 0.02, "label": "BOLD (source units)"}
    figure.colorbar(images["image"], ax=axes[:, :2], **bar)
    figure.colorbar(images["size"], ax=axes[:, 2:], **bar)


def draw_learning(figure: Any, entries: Sequence[Mapping[str, Any]], clips: Sequence[Arrays]) -> None:
    """An axial slice of one clip as it was reconstructed at several evaluations, beside what was measured.

    Args:
        figure: to draw on.
        entries: steps of the index, ascending.
        clips: the same clip in each of them.
    """
    plane = "axial"
    shown = [pictures_of(clip, plane) for clip in clips]
    axes = figure.subplots(2, len(clips) + 1, squeeze=False)
    for row, signal in enumerate(("volume", "fluctuation")):
        scale = _scales({one: pictures_of(clips[-1], one) for one in PLANES}, signal)["original"]
        image = None
        for column in range(len(clips) + 1):
            axis = axes[row, column]
            values = shown[0][f"{signal} original"] if column == 0 else shown[column - 1][f"{signal} reconstructed"]
            image = draw_slice(axis, values, scale, plane)
            if column:
                _outline(axis, np.isinf(shown[column - 1]["volume masked"]))
            if row == 0:
                axis.set_title("measured" if column == 0 else _said(entries, column - 1), fontsize=8.5)
        axes[row, 0].set_ylabel(signal, fontsize=9)
        figure.colorbar(image, ax=axes[row], shrink=0.85, aspect=16, pad=0.01, label="source units")


def best_of(entries: Sequence[Mapping[str, Any]]) -> int:
    """Which of some evaluations has the lowest held-out loss."""
    return min(range(len(entries)), key=lambda i: math.inf if entries[i].get("loss") is None else float(entries[i]["loss"]))


def _said(entries: Sequence[Mapping[str, Any]], place: int) -> str:
    names = [name for name, at in (("best", best_of(entries)), ("last", len(entries) - 1)) if at == place]
    loss = entries[place].get("loss")
    title = f"step {entries[place]['step']:,}" + (f" ({', '.join(names)})" if names else "")
    return title + ("" if loss is None else f"\nheld-out loss {loss:.3f}")
