"""The picture at the end of a run: reconstructions in three planes, time courses, and the loss beside its baselines."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from swiftv2.errors import SwiftError
from swiftv2.records import read_metrics
from swiftv2.report.reconstructions import draw_courses, draw_planes, of_clip, read_arrays, read_index

PREDICTORS = {
    "model": ("Swin4D", "#c1440e"),
    "time_interpolation": ("interpolation in time", "#4c72b0"),
    "visible_mean": ("mean of visible frames", "#8c8c8c"),
    "run_mean": ("mean of the whole run", "#55a868"),
}
_ON_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
"""Words that cover what they stand on."""


def draw_run(run_dir: Path) -> Path:
    """Draw `figures/pretraining.png` (and `.svg`) of a run directory.

    Args:
        run_dir: a run directory with `metrics.jsonl`, `evaluation.json` and, where pictures may be shown,
            `figures/reconstructions/`.

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
    clip = _last_clip(run_dir)

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "swiftv2"}):
        figure = plt.figure(figsize=(15, 8.2), layout="constrained")
        if clip is None:
            _draw_numbers(figure, metrics, evaluation)
        else:
            rows = figure.subfigures(2, 1, height_ratios=(1.75, 1.0), squeeze=False)[:, 0]
            draw_planes(rows[0], clip)
            halves = rows[1].subfigures(1, 2, width_ratios=(1.0, 1.15), squeeze=False)[0]
            draw_courses(halves[0], clip)
            _draw_numbers(halves[1], metrics, evaluation)
        path = run_dir / "figures" / "pretraining.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=130)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        plt.close(figure)
    return path


def _last_clip(run_dir: Path) -> dict[str, NDArray[Any]] | None:
    """Arrays of the first clip of the last evaluation; None where none may be drawn."""
    index = read_index(run_dir)
    clips = [] if index is None else [one for one in index["drawn"] if one["kind"] == "clip"]
    if index is None or not index["steps"] or not clips:
        return None
    return of_clip(read_arrays(run_dir, index["steps"][-1]["step"]), clips[0]["name"])


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
    loss.legend(fontsize=6, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0.0, 1.0))

    scored = {name: method["r2"] for name, method in everyone["methods"].items() if method["r2"]}
    names = [name for name in PREDICTORS if scored.get(name, {}).get("mean") is not None]
    for place, name in enumerate(reversed(names)):
        label, colour = PREDICTORS[name]
        r2 = scored[name]
        if r2["low"] is not None:
            score.plot((r2["low"], r2["high"]), (place, place), color=colour, lw=3, solid_capstyle="butt")
        score.plot(r2["mean"], place, "o", color=colour, ms=6)
        score.text(r2["mean"], place + 0.18, f"{label}: {r2['mean']:.3f}", ha="center", fontsize=7, bbox=_ON_PAPER)
    score.axvline(0.0, color="black", lw=0.6, zorder=0)
    score.set_ylim(-0.5, len(names) - 0.3)
    score.margins(x=0.25)
    score.set_yticks([])
    score.spines["left"].set_visible(False)
    score.set_xlabel(f"R² on the fluctuation\n(95 % over {everyone['subjects']} held-out subjects)")
