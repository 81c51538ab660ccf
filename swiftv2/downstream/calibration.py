"""Whether predictions mean what they say: reliability of probabilities, and truth against predicted numbers."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, linregress

Floats = NDArray[np.float64]

BINS = 10
PER_BIN = 5
"""Units in a bin at least, on average: of fewer units there are fewer bins."""


def of_classes(truth: Floats, score: Floats, level: float = 0.95) -> dict[str, Any]:
    """Reliability of probabilities: of the positive one of two classes, else of the class that is thought likeliest.

    Bins hold equally many units, but for ties. The expected calibration error is the mean over units of the distance
    between their bin's predicted and observed share (Naeini et al. 2015); the Brier score is the mean squared distance of
    the probability from what came, summed over classes where there are more than two.

    Args:
        truth: (n,) class numbers.
        score: (n, K) probabilities.
        level: of the intervals (Wilson's) of observed shares.

    Returns:
        of: `positive` or `likeliest`; bins: n, predicted, observed, low, high; ece; brier.
    """
    if score.shape[1] == 2:
        said, came = score[:, 1], truth == 1
        brier = float(np.mean((said - came) ** 2))
    else:
        said, came = score.max(1), score.argmax(1) == truth
        brier = float(np.mean(np.sum((score - np.eye(score.shape[1])[truth.astype(np.int64)]) ** 2, axis=1)))
    number = int(np.clip(len(said) // PER_BIN, 1, BINS))
    edges = np.quantile(said, np.arange(1, number) / number)
    place = np.searchsorted(edges, said, "left")
    bins = []
    for members in (place == b for b in np.unique(place)):
        n = int(members.sum())
        hits = int(came[members].sum())
        ends = binomtest(hits, n).proportion_ci(level, method="wilson")
        bins.append(
            {
                "n": n,
                "predicted": float(said[members].mean()),
                "observed": hits / n,
                "low": float(ends.low),
                "high": float(ends.high),
            }
        )
    ece = sum(b["n"] * abs(b["predicted"] - b["observed"]) for b in bins) / len(said)
    return {"of": "positive" if score.shape[1] == 2 else "likeliest", "bins": bins, "ece": float(ece), "brier": brier}


def of_numbers(truth: Floats, predicted: Floats) -> dict[str, Any]:
    """Line of truth on prediction by least squares: slope 1 and intercept 0 where predictions mean what they say.

    A slope below 1 is of predictions that are too far apart.

    Args:
        truth: (n,).
        predicted: (n,).

    Returns:
        slope and intercept; None, with the reason, where predictions are all the same.
    """
    if len(predicted) < 2 or np.ptp(predicted) <= 1e-12 * np.max(np.abs(predicted)):
        return {"slope": None, "intercept": None, "reason": "all predictions are the same"}
    line = linregress(predicted, truth)
    return {"slope": float(line.slope), "intercept": float(line.intercept)}
