"""Pictures of downstream results: what a run's predictions look like, and methods beside each other."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from swiftv2.report.scaling.style import ALARM, COLUMN_INCHES, INK, PAGE_INCHES, QUIET, RAMP, SECOND, save_figure, styled

SHOWN = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "loss": "loss",
    "mae": "mean absolute error",
    "mse": "mean squared error",
    "r2": "R²",
    "pearson_r": "Pearson r",
}
"""Metrics as axes call them."""
METRICS = {"classification": "auroc", "regression": "pearson_r"}
"""Metric of a kind of target that a forest plot shows."""
CHANCE = {"auroc": 0.5, "pearson_r": 0.0, "r2": 0.0}
_ROW_INCHES = 0.2


def draw_result(
    tree: Mapping[str, Any], subjects: Mapping[str, Mapping[str, Any]], folder: Path, part: str = "test"
) -> list[Path]:
    """Draw what a run predicted of each target: `NAME.svg` and `NAME.png`, NAME being the part and the target.

    Of two classes: ROC, precision against recall, reliability. Of more: ROC of each class against the rest, confusion,
    reliability of the likeliest. Of numbers: truth against prediction.

    Args:
        tree: of `result.json`.
        subjects: by target, `truth` (n,) and `score` (n, K) of the part's subjects.
        folder: where pictures go; made where it is not there.
        part: val or test; targets that were not judged on it are left out.

    Returns:
        Paths of the pictures.
    """
    paths: list[Path] = []
    for column, target in tree["targets"].items():
        judged = target.get(part)
        if judged is None or column not in subjects:
            continue
        truth = np.asarray(subjects[column]["truth"], dtype=np.float64)
        score = np.asarray(subjects[column]["score"], dtype=np.float64)
        if target["kind"] == "regression":
            figure = _numbers(column, judged, truth, score[:, 0])
        else:
            figure = _classes(column, judged, truth, score, target["classes"])
        paths += save_figure(figure, folder, f"{part}_{re.sub(r'[^A-Za-z0-9]+', '_', column)}")
    return paths


def draw_forest(comparison: Mapping[str, Any], path: Path, metrics: Mapping[str, str] | None = None) -> tuple[Path, Path]:
    """Draw methods beside each other: the metric of each with its ceiling, and its difference from the reference.

    Thick lines are intervals over test subjects (bootstrap), thin ones over training and test subjects (corrected t).

    Args:
        comparison: tree of `downstream.compare.compare`.
        path: of the picture; its ending is replaced by `.svg` and `.png`.
        metrics: by kind of target, which to show; `METRICS` when None.

    Returns:
        Paths of the SVG and the PNG.
    """
    return save_figure(_forest(comparison, metrics or METRICS), path.parent, path.stem)


@styled
def _classes(
    column: str, judged: Mapping[str, Any], truth: NDArray[np.float64], score: NDArray[np.float64], classes: Sequence[str]
) -> Figure:
    figure = Figure(figsize=(PAGE_INCHES, 2.6), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    figure.suptitle(f"{column}, n = {judged['n']}", fontsize=8)
    first.plot((0, 1), (0, 1), color=QUIET, lw=0.6, ls="--")
    first.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    first.set_title(_told("auroc", judged["metrics"]["auroc"]))
    if len(classes) == 2:
        if len(np.unique(truth)) == 2:
            first.plot(*roc_curve(truth, score[:, 1])[:2], color=INK)
            precision, recall, _ = precision_recall_curve(truth, score[:, 1])
            second.step(recall, precision, where="post", color=INK)
        share = float(np.mean(truth == 1))
        second.axhline(share, color=QUIET, lw=0.6, ls="--")
        second.set(xlabel="recall", ylabel="precision", xlim=(-0.02, 1.02), ylim=(-0.02, 1.05))
        second.set_title(_told("auprc", judged["metrics"]["auprc"]))
    else:
        for k, name in enumerate(classes):
            if 0 < np.sum(truth == k) < len(truth):
                colour = RAMP(k / (len(classes) - 1))
                first.plot(*roc_curve(truth == k, score[:, k])[:2], color=colour, lw=0.9, label=name)
        first.legend(fontsize=5, loc="lower right")
        _confusion(second, np.array(judged["confusion"], dtype=np.float64), classes)
        second.set_title(_told("balanced_accuracy", judged["metrics"]["balanced_accuracy"]))
    _reliability(third, judged["calibration"], classes)
    return figure


def _confusion(axes: Axes, counts: NDArray[np.float64], classes: Sequence[str]) -> None:
    total = counts.sum(1, keepdims=True)
    shares = counts / np.where(total > 0, total, 1.0)
    axes.imshow(shares, cmap="Greys", vmin=0.0, vmax=1.0)
    size = 6 if len(classes) <= 5 else 4
    for row, column in np.ndindex(*counts.shape):
        ink = "white" if shares[row, column] > 0.6 else INK
        axes.text(column, row, f"{int(counts[row, column])}", ha="center", va="center", fontsize=size, color=ink)
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=size)
    axes.set_yticks(range(len(classes)), classes, fontsize=size)
    axes.set(xlabel="predicted", ylabel="true")


def _reliability(axes: Axes, calibration: Mapping[str, Any], classes: Sequence[str]) -> None:
    bins = calibration["bins"]
    said, came = ([b[name] for b in bins] for name in ("predicted", "observed"))
    axes.plot((0, 1), (0, 1), color=QUIET, lw=0.6, ls="--")
    axes.vlines(said, [b["low"] for b in bins], [b["high"] for b in bins], color=INK, lw=0.8)
    axes.plot(said, came, "o", color=INK, ms=3.5, clip_on=False)
    whom = classes[1] if calibration["of"] == "positive" else "the likeliest"
    axes.set(xlabel=f"predicted probability of {whom}", ylabel="share that is", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_title(f"calibration error {calibration['ece']:.3f}, Brier {calibration['brier']:.3f}")


@styled
def _numbers(column: str, judged: Mapping[str, Any], truth: NDArray[np.float64], predicted: NDArray[np.float64]) -> Figure:
    figure = Figure(figsize=(COLUMN_INCHES, COLUMN_INCHES), layout="constrained")
    axes = figure.subplots()
    axes.plot(predicted, truth, "o", color=INK, ms=2.5, alpha=0.6, mew=0)
    ends = np.array([min(truth.min(), predicted.min()), max(truth.max(), predicted.max())])
    axes.plot(ends, ends, color=QUIET, lw=0.6, ls="--", label="as predicted")
    line = judged["calibration"]
    if line["slope"] is not None:
        reach = np.array([predicted.min(), predicted.max()])
        label = f"fitted: slope {line['slope']:.2f}"
        axes.plot(reach, line["slope"] * reach + line["intercept"], color=ALARM, lw=1.0, label=label)
    axes.set(xlabel=f"predicted {column}", ylabel=f"true {column}")
    names = ("pearson_r", "r2", "mae")
    axes.set_title(f"n = {judged['n']}\n" + "\n".join(_told(name, judged["metrics"][name]) for name in names))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _told(name: str, entry: Mapping[str, Any]) -> str:
    """A metric with its interval, in words."""
    if entry["value"] is None:
        return f"{SHOWN[name]}: {entry['reason']}"
    ends = "" if entry["low"] is None else f" [{entry['low']:.3g}, {entry['high']:.3g}]"
    return f"{SHOWN[name]} {entry['value']:.3g}{ends}"


@styled
def _forest(comparison: Mapping[str, Any], metrics: Mapping[str, str]) -> Figure:
    targets = comparison["targets"]
    chosen = {column: metrics[target["kind"]] for column, target in targets.items()}
    methods = {column: list(targets[column]["metrics"][metric]["methods"].items()) for column, metric in chosen.items()}
    heights = [len(found) + 2.5 for found in methods.values()]
    figure = Figure(figsize=(PAGE_INCHES, 0.4 + _ROW_INCHES * sum(heights)), layout="constrained")
    rows = figure.subplots(len(targets), 2, squeeze=False, height_ratios=heights)
    reference = comparison["reference"]
    for (left, right), column in zip(rows, targets, strict=True):
        target, metric = targets[column], chosen[column]
        for place, (name, entry) in enumerate(methods[column]):
            colour = SECOND if name == reference else INK
            _estimate(left, place, entry, colour)
            if entry["difference"] is not None:
                _estimate(right, place, entry["difference"], colour)
        if metric in CHANCE:
            left.axvline(CHANCE[metric], color=QUIET, lw=0.6, ls="--")
        _ceiling(left, target["ceiling"], metric)
        right.axvline(0.0, color=QUIET, lw=0.6, ls="--")
        left.set_yticks(range(len(methods[column])), [name for name, _ in methods[column]])
        right.set_yticks([])
        right.spines["left"].set_visible(False)
        for axes in (left, right):
            axes.set_ylim(len(methods[column]) - 0.4, -0.6)
        count = len(target["splits"])
        left.set_title(f"{column} ({count} split{'s' * (count > 1)})", loc="left")
        better = "right" if target["metrics"][metric]["better"] == "higher" else "left"
        left.set_xlabel(SHOWN[metric])
        right.set_xlabel(f"{SHOWN[metric]} less that of {reference}\n(better to the {better})")
    figure.supxlabel(
        f"{100 * comparison['level']:g} % intervals: thick over other test subjects, thin over other training subjects too",
        fontsize=6,
    )
    return figure


def _estimate(axes: Axes, place: int, entry: Mapping[str, Any], colour: str) -> None:
    if entry["mean"] is None:
        axes.text(0.02, place, entry["reason"], transform=axes.get_yaxis_transform(), va="center", fontsize=6, color=QUIET)
        return
    for kind, width in (("corrected_t", 0.7), ("bootstrap", 2.4)):
        ends = entry[kind]
        if ends is not None and ends["low"] is not None:
            axes.hlines(place, ends["low"], ends["high"], color=colour, lw=width, alpha=1.0 if width < 1 else 0.6)
    axes.plot(entry["mean"], place, "o", color=colour, ms=4)


def _ceiling(axes: Axes, ceiling: Mapping[str, Any] | None, metric: str) -> None:
    if ceiling is None or ceiling["metric"] != metric:
        return
    axes.axvline(ceiling["oracle"], color=ALARM, lw=1.0, label="perfect reader")
    error = ceiling.get("standard_error")
    if error is not None:
        low, high = ceiling["oracle"] - 1.96 * error, ceiling["oracle"] + 1.96 * error
        axes.axvspan(low, high, color=ALARM, alpha=0.15, lw=0)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1)
