"""How good predictions are: scikit-learn's metrics of gathered subjects, with bootstrap intervals over subjects.

A metric that is not defined (one class, a constant prediction) is null with its reason, never NaN and never a default.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr
from sklearn import metrics as scores

from swiftv2.config.task import TargetKind
from swiftv2.downstream import calibration, weighted
from swiftv2.downstream.intervals import FEWEST, percentiles, resample
from swiftv2.downstream.predictions import Predictions
from swiftv2.errors import SwiftError

Floats = NDArray[np.float64]
Found = dict[str, float | str]
"""By metric its value, or the reason why there is none."""

CLASSIFICATION = ("accuracy", "balanced_accuracy", "auroc", "auprc", "f1", "loss")
REGRESSION = ("mae", "mse", "r2", "pearson_r", "loss")


def judge(
    predictions: Predictions,
    kind: TargetKind,
    classes: Sequence[str] = (),
    threshold: float | None = None,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    groups: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Judge predictions of subjects (`predictions.by_subject`), one row a unit.

    Of two classes the second is the positive one, predicted from the threshold on; of more, the likeliest is predicted, and
    auroc, auprc and f1 are means over classes, each against the rest. Numbers are judged in the label's units; their loss
    is the mse.

    Args:
        predictions: (n) units, each once.
        kind: classification or regression.
        classes: names in order (classification).
        threshold: probability from which on the positive of two classes is predicted; one half when None.
        bootstrap: draws of units for the intervals; 0 for none.
        seed: of the draws.
        level: share of the draws within an interval.
        groups: by unit what is drawn as a whole, such as its family, or the subject of a clip.

    Returns:
        n; groups: how many are drawn; metrics: by name value, low, high, undefined (draws without a value) and, where there
        is no value or interval, reason; threshold; calibration; confusion (rows are truths, columns what was predicted) or
        None.

    Raises:
        SwiftError: there is no unit with a truth, or the scores do not fit the classes.
    """
    p = ready(predictions, kind, classes)
    threshold = (0.5 if threshold is None else threshold) if len(classes) == 2 else None
    units = [str(unit) for unit in p.unit]
    drawn = len({(groups or {}).get(unit, f"unit {unit}") for unit in units})
    draws = resampled(p, kind, threshold, bootstrap, seed, groups) if drawn >= FEWEST else {}
    without = f"fewer than {FEWEST} units or groups" if drawn < FEWEST else "no draws were asked for"
    judged = {name: _entry(value, draws.get(name), level, without) for name, value in measure(p, kind, threshold).items()}
    return {
        "n": len(p),
        "groups": drawn,
        "metrics": judged,
        "threshold": threshold,
        "calibration": calibration.of_numbers(p.truth, p.score[:, 0])
        if kind == "regression"
        else calibration.of_classes(p.truth, p.score, level),
        "confusion": None
        if kind == "regression"
        else scores.confusion_matrix(p.truth, decide(p.score, threshold), labels=range(len(classes))).tolist(),
    }


def ready(p: Predictions, kind: TargetKind, classes: Sequence[str]) -> Predictions:
    """What is judged: units in the order of their keys, without those of no truth.

    Raises:
        SwiftError: nothing is left, or the scores do not fit the classes.
    """
    p = p.rows(np.argsort(p.unit, kind="stable"))
    p = p.rows(~np.isnan(p.truth))
    if not len(p):
        raise SwiftError("no subject with a known label is left to be judged")
    if len(set(p.unit)) != len(p):
        raise ValueError("a unit comes twice: take by_subject first")
    width = 1 if kind == "regression" else len(classes)
    if p.score.shape[1] != width or not np.isfinite(p.score).all():
        raise SwiftError(
            f"predictions have {p.score.shape[1]} finite or other scores a subject, where {width} finite ones belong"
        )
    if kind == "classification" and (p.score.min() < 0 or np.abs(p.score.sum(1) - 1).max() > 1e-4):
        raise SwiftError("predicted probabilities are below 0 or do not sum to 1")
    return p


def choose_threshold(predictions: Predictions) -> float:
    """Probability of the positive class that splits validation subjects with the best balanced accuracy.

    Halfway between two scores that come, or 0 where nothing is better than saying positive of all; of equally good ones, that
    nearest to one half.

    Args:
        predictions: of validation subjects, one row each, of two classes.

    Raises:
        SwiftError: they are all of one class.
    """
    p = ready(predictions, "classification", ("negative", "positive"))
    said, positive = p.score[:, 1], p.truth == 1
    if positive.all() or not positive.any():
        raise SwiftError(
            f"all {len(p)} validation subjects are of one class, so that no threshold can be chosen: "
            "validate on more, or say threshold=half"
        )
    values = np.unique(said)
    candidates = np.unique([0.0, 0.5, *((values[1:] + values[:-1]) / 2)])
    # Rounding may put the middle of two neighbouring floats onto the lower one; >= then moves it to the other side.
    above = np.array([(np.mean(said[positive] >= c) + np.mean(said[~positive] < c)) / 2 for c in candidates])
    best = candidates[above >= above.max() - 1e-12]
    return float(min(best, key=lambda c: (abs(c - 0.5), c)))


def decide(score: Floats, threshold: float | None) -> NDArray[np.int64]:
    """(n,) predicted class numbers of (n, K) probabilities; the threshold is for two classes."""
    if threshold is not None:
        return np.asarray(score[:, 1] >= threshold, dtype=np.int64)
    return np.asarray(score.argmax(1), dtype=np.int64)


def measure(p: Predictions, kind: TargetKind, threshold: float | None) -> Found:
    """Value of each metric, or the reason why it has none.

    Args:
        p: from `ready`.
        kind: classification or regression.
        threshold: for two classes.
    """
    return _numbers(p.truth, p.score[:, 0]) if kind == "regression" else _classes(p.truth, p.score, threshold)


def resampled(
    p: Predictions, kind: TargetKind, threshold: float | None, draws: int, seed: int, groups: Mapping[str, str] | None = None
) -> dict[str, Floats]:
    """Each metric in draws of units: (draws,) by name, NaN where it is not defined.

    Args:
        p: from `ready`; draws of the same units are the same.
        kind: classification or regression.
        threshold: for two classes.
        draws: number of draws.
        seed: of the draws.
        groups: by unit what is drawn as a whole.
    """
    decided = None if kind == "regression" else decide(p.score, threshold)
    blocks = []
    for weights in resample([str(unit) for unit in p.unit], draws, seed, groups):
        if decided is None:
            blocks.append(weighted.regression(p.truth, p.score[:, 0], weights))
        else:
            blocks.append(weighted.classification(p.truth, p.score, decided, weights))
    return {name: np.concatenate([block[name] for block in blocks]) for name in (blocks[0] if blocks else ())}


def _classes(truth: Floats, score: Floats, threshold: float | None) -> Found:
    classes = score.shape[1]
    decided = decide(score, threshold)
    present = [k for k in range(classes) if (truth == k).any()]
    found: Found = {"accuracy": float(scores.accuracy_score(truth, decided))}
    if len(present) < 2:
        found["balanced_accuracy"] = "all units are of one class"
    else:
        # scikit-learn warns of predicted classes that never come; recall is the mean over those that do.
        found["balanced_accuracy"] = float(scores.recall_score(truth, decided, labels=present, average="macro"))
    if len(present) < classes:
        found["auroc"] = found["auprc"] = "all units are of one class" if classes == 2 else "a class has no unit"
    else:
        ranked = [(truth == k, score[:, k]) for k in ([1] if classes == 2 else present)]
        found["auroc"] = float(np.mean([scores.roc_auc_score(actual, said) for actual, said in ranked]))
        found["auprc"] = float(np.mean([scores.average_precision_score(actual, said) for actual, said in ranked]))
    if classes == 2 and not (truth == 1).any() and not decided.any():
        found["f1"] = "no unit is, or is predicted, positive"
    else:
        found["f1"] = float(scores.f1_score(truth, decided, average="binary" if classes == 2 else "macro", zero_division=0.0))
    found["loss"] = float(scores.log_loss(truth, score / score.sum(1, keepdims=True), labels=range(classes)))
    return found


def _numbers(truth: Floats, predicted: Floats) -> Found:
    mse = float(scores.mean_squared_error(truth, predicted))
    found: Found = {"mae": float(scores.mean_absolute_error(truth, predicted)), "mse": mse}
    flat = {name for name, values in (("labels", truth), ("predictions", predicted)) if _constant(values)}
    found["r2"] = "all labels are the same" if "labels" in flat else float(scores.r2_score(truth, predicted))
    found["pearson_r"] = (
        f"all {' and '.join(sorted(flat))} are the same" if flat else float(pearsonr(truth, predicted).statistic)
    )
    found["loss"] = mse
    return found


def _constant(values: Floats) -> bool:
    return bool(np.ptp(values) <= 1e-12 * np.max(np.abs(values)))


def _entry(value: float | str, draws: Floats | None, level: float, without: str) -> dict[str, Any]:
    """A metric with its interval; `without` says why there are no draws."""
    if isinstance(value, str):
        return {"value": None, "low": None, "high": None, "undefined": 0 if draws is None else len(draws), "reason": value}
    if draws is None:
        return {"value": value, "low": None, "high": None, "undefined": 0, "reason": f"no interval: {without}"}
    entry: dict[str, Any] = {"value": value, **percentiles(draws, level)}
    if entry["low"] is None:
        entry["reason"] = "no interval: undefined in more than half of the draws of units"
    return entry
