"""The picture at the end of a run: reconstructions in three planes, time courses, and the loss beside its baselines."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from swiftv2.errors import SwiftError
from swiftv2.records import read_metrics

Arrays = dict[str, NDArray[Any]]

HIDDEN = "#7d92b3"
PLANES = ("sagittal", "coronal", "axial")
PREDICTORS = {
    "model": ("Swin4D", "#c1440e"),
    "time_interpolation": ("interpolation in time", "#4c72b0"),
    "visible_mean": ("mean of visible frames", "#8c8c8c"),
    "run_mean": ("mean of the whole run", "#55a868"),
}


def draw_run(run_dir: Path) -> Path:
    """Draw `figures/pretraining.png` (and `.svg`) of a run directory.

    Args:
        run_dir: a run directory with `metrics.jsonl`, `evaluation.json` and, where pictures may be shown,
            `figures/reconstruction.npz`.

    Returns:
        Path of the PNG.

    Raises:
        SwiftError: the run has not been evaluated yet.
    """
    evaluation_path = run_dir / "evaluation.json"
    if not evaluation_path.is_file():
        raise SwiftError(f"{run_dir}: no evaluation.json; the figure is drawn when a run has been evaluated")
    evaluation = json.loads(evaluation_path.read_text(encoding="utf-8"))
    metrics = read_metrics(run_dir / "metrics.jsonl")
    pictures = run_dir / "figures" / "reconstruction.npz"
    arrays: Arrays | None = None
    if pictures.is_file():
        with np.load(pictures, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "swiftv2"}):
        figure = plt.figure(figsize=(13, 8.2), layout="constrained")
        if arrays is None:
            _draw_numbers(figure, metrics, evaluation)
        else:
            rows = figure.subfigures(2, 1, height_ratios=(1.75, 1.0), squeeze=False)[:, 0]
            _draw_slices(rows[0], arrays)
            halves = rows[1].subfigures(1, 2, width_ratios=(1.0, 1.15), squeeze=False)[0]
            _draw_courses(halves[0], arrays)
            _draw_numbers(halves[1], metrics, evaluation)
        path = run_dir / "figures" / "pretraining.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=130)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        plt.close(figure)
    return path


def _draw_slices(figure: Any, arrays: Arrays) -> None:
    """Six columns (original, masked, reconstructed; of the volume, then of its fluctuation) by three planes."""
    axes = figure.subplots(3, 6)
    kinds = ("original", "masked", "reconstructed")
    for block, signal in enumerate(("volume", "fluctuation")):
        shown = [arrays[f"{signal}_original_{plane}"] for plane in PLANES]
        values = np.concatenate([a[np.isfinite(a)] for a in shown])
        if signal == "volume":
            low, high, colours = 0.0, float(np.quantile(values, 0.995)), "gray"
        else:
            high = float(np.quantile(np.abs(values), 0.99))
            low, colours = -high, "RdBu_r"
        cmap = mpl.colormaps[colours].with_extremes(bad="white", over=HIDDEN)
        image = None
        for column, kind in enumerate(kinds):
            for row, plane in enumerate(PLANES):
                axis = axes[row, 3 * block + column]
                values = arrays[f"{signal}_{kind}_{plane}"]
                picture = np.ma.masked_where(
                    np.isnan(values), np.where(np.isinf(values), high + abs(high), values.clip(low, high))
                )
                image = axis.imshow(picture.T, origin="lower", cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                axis.spines[:].set_visible(False)
                if row == 0:
                    axis.set_title(f"{kind}\n{signal}" if column == 1 else f"{kind}\n")
                if column == 0 and block == 0:
                    axis.set_ylabel(plane)
                if plane != "sagittal":
                    for side, place in (("L", 0.03), ("R", 0.9)):
                        axis.text(place, 0.03, side, transform=axis.transAxes, fontsize=7)
        label = "BOLD, source units" if signal == "volume" else "BOLD - voxel mean, source units"
        figure.colorbar(image, ax=axes[:, 3 * block : 3 * block + 3], location="bottom", shrink=0.5, aspect=40, label=label)


def _draw_courses(figure: Any, arrays: Arrays) -> None:
    axes = figure.subplots(3, 1, sharex=True)
    seconds = arrays["seconds"]
    for index, axis in enumerate(axes):
        true, made, hidden = (arrays[f"course_{name}"][index] for name in ("true", "reconstructed", "masked"))
        axis.plot(seconds, true, color="black", lw=1.2, label="measured")
        axis.plot(seconds[hidden], made[hidden], "o", ms=3.5, color=PREDICTORS["model"][1], label="reconstructed, hidden")
        guess = arrays["course_interpolated"][index]
        axis.plot(seconds[hidden], guess[hidden], "x", ms=3.5, color=PREDICTORS["time_interpolation"][1], label="interpolated")
        place = ", ".join(f"{x:.0f}" for x in arrays["course_mm"][index])
        axis.set_title(f"voxel at ({place}) mm", loc="left", fontsize=7)
        axis.margins(x=0.02)
    axes[1].set_ylabel("BOLD, source units")
    axes[-1].set_xlabel("time in the clip (s)")
    axes[0].legend(fontsize=6, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _draw_numbers(figure: Any, metrics: list[dict[str, Any]], evaluation: dict[str, Any]) -> None:
    loss, score = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
    everyone = evaluation["groups"]["all"]
    training = np.array([(row["step"], row["loss"]) for row in metrics if row.get("loss") is not None])
    distance = evaluation["distance"]
    key, shown = f"heldout/all/{distance}/model", f"held-out {distance.upper()}"
    curve = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
    if len(training):
        loss.plot(*training.T, color="#e0b7a3", lw=0.8, label=f"training, {evaluation['loss_kind']}")
    if curve:
        loss.plot(*np.array(curve).T, "o-", ms=3, color=PREDICTORS["model"][1], label=f"Swin4D, {shown}")
    for name in (n for n in PREDICTORS if n != "model" and n in everyone["methods"]):
        label, colour = PREDICTORS[name]
        loss.axhline(everyone["methods"][name][distance], color=colour, ls="--", lw=1, label=f"{label}, {shown}")
    known = [m[distance] for m in everyone["methods"].values() if m[distance] is not None]
    values = np.array(known + [value for _, value in curve])
    loss.set_ylim(0.95 * values.min(), 1.15 * values.max())
    loss.set(xlabel="step", ylabel="on hidden brain voxels, normalised units")
    loss.legend(fontsize=6, frameon=False)

    scored = {name: method["r2"] for name, method in everyone["methods"].items() if method["r2"]}
    names = [name for name in PREDICTORS if scored.get(name, {}).get("mean") is not None]
    for place, name in enumerate(reversed(names)):
        label, colour = PREDICTORS[name]
        r2 = scored[name]
        if r2["low"] is not None:
            score.plot((r2["low"], r2["high"]), (place, place), color=colour, lw=3, solid_capstyle="butt")
        score.plot(r2["mean"], place, "o", color=colour, ms=6)
        score.text(r2["mean"], place + 0.18, f"{label}: {r2['mean']:.3f}", ha="center", fontsize=7)
    score.axvline(0.0, color="black", lw=0.6)
    score.set_ylim(-0.5, len(names) - 0.3)
    score.margins(x=0.25)
    score.set_yticks([])
    score.spines["left"].set_visible(False)
    score.set_xlabel(f"R² on the fluctuation\n(95 % over {everyone['subjects']} held-out subjects)")
