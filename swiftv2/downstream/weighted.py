"""Metrics of many draws of subjects at once, each draw told by how often every subject comes in it.

With whole weights they are scikit-learn's metrics of the repeated rows; NaN where a metric is not defined.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_SPREAD = 1e-12
"""Variance, as a share of the largest squared deviation, below which values are one and the same but for rounding."""


def classification(truth: Floats, score: Floats, decided: NDArray[np.int64], weights: Floats) -> dict[str, Floats]:
    """Metrics of classes.

    Args:
        truth: (n,) class numbers.
        score: (n, K) probabilities, summing to 1 within rounding.
        decided: (n,) predicted class numbers.
        weights: (B, n) how often each unit comes.

    Returns:
        (B,) by metric: loss, accuracy, balanced_accuracy, auroc, auprc, f1. Of more than two classes, auroc, auprc and f1
        are means over classes (each against the rest).
    """
    classes = score.shape[1]
    actual = np.stack([truth == k for k in range(classes)])
    chosen = np.stack([decided == k for k in range(classes)])
    total = weights.sum(1)
    eps = np.finfo(np.float64).eps
    own = score[np.arange(len(truth)), truth.astype(np.int64)] / score.sum(1)
    hit = (weights @ (actual & chosen).T.astype(np.float64)).T
    have = (weights @ actual.T.astype(np.float64)).T
    said = (weights @ chosen.T.astype(np.float64)).T
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = hit / have
        f1 = 2 * hit / (have + said)
        several = (have > 0).sum(0) > 1
        recall_mean = np.nansum(recall, axis=0) / (have > 0).sum(0)
        f1_mean = np.nansum(f1, axis=0) / (have + said > 0).sum(0)
    positives = [1] if classes == 2 else range(classes)
    return {
        "loss": weights @ -np.log(np.clip(own, eps, 1 - eps)) / total,
        "accuracy": hit.sum(0) / total,
        "balanced_accuracy": np.where(several, recall_mean, np.nan),
        "auroc": np.mean([roc_area(actual[k], score[:, k], weights) for k in positives], axis=0),
        "auprc": np.mean([average_precision(actual[k], score[:, k], weights) for k in positives], axis=0),
        "f1": f1[1] if classes == 2 else f1_mean,
    }


def regression(truth: Floats, predicted: Floats, weights: Floats) -> dict[str, Floats]:
    """Metrics of numbers: loss (which is mse), mae, mse, r2, pearson_r, each (B,).

    Args:
        truth: (n,).
        predicted: (n,).
        weights: (B, n) how often each unit comes.
    """
    total = weights.sum(1)
    error = predicted - truth
    squared = weights @ error**2 / total
    spread, centred = _variance(truth, weights)
    other, centred_other = _variance(predicted, weights)
    shared = weights @ (centred * centred_other) / total - (weights @ centred) * (weights @ centred_other) / total**2
    return {
        "loss": squared,
        "mae": weights @ np.abs(error) / total,
        "mse": squared,
        "r2": 1 - squared / spread,
        "pearson_r": np.clip(shared / np.sqrt(spread * other), -1, 1),
    }


def roc_area(actual: NDArray[np.bool_], score: Floats, weights: Floats) -> Floats:
    """Area under the ROC curve, ties half; (B,), NaN in draws of one class.

    Args:
        actual: (n,) whether positive.
        score: (n,) higher for positive.
        weights: (B, n) how often each unit comes.
    """
    positive, negative = _by_score(actual, score, weights)
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    return np.asarray((positive * below).sum(1) / np.where(pairs > 0, pairs, np.nan))


def average_precision(actual: NDArray[np.bool_], score: Floats, weights: Floats) -> Floats:
    """Mean of the precision over the positives, from the highest score down; (B,), NaN in draws of one class.

    Args:
        actual: (n,) whether positive.
        score: (n,) higher for positive.
        weights: (B, n) how often each unit comes.
    """
    positive, negative = (found[:, ::-1] for found in _by_score(actual, score, weights))
    right = np.cumsum(positive, axis=1)
    taken = right + np.cumsum(negative, axis=1)
    precision = right / np.where(taken > 0, taken, 1.0)
    total = np.where(negative.sum(1) > 0, positive.sum(1), 0.0)
    return np.asarray((positive * precision).sum(1) / np.where(total > 0, total, np.nan))


def _by_score(actual: NDArray[np.bool_], score: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Weight of positives and of negatives at each score that comes, ascending: each (B, scores)."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf) > 0)
    ordered = weights[:, order]
    positive = np.add.reduceat(ordered * actual[order], starts, axis=1)
    negative = np.add.reduceat(ordered * ~actual[order], starts, axis=1)
    return positive, negative


def _variance(values: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """(B,) variance, NaN where there is none, and (n,) values less their mean."""
    centred = values - values.mean()
    total = weights.sum(1)
    variance = weights @ centred**2 / total - (weights @ centred / total) ** 2
    largest = max(float(np.max(centred**2)), (_SPREAD * float(np.max(np.abs(values)))) ** 2)
    return np.where(variance > _SPREAD * largest, variance, np.nan), centred
