"""How embeddings move in time: slope of their power spectrum, autocorrelation, effective rank."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import signal

from swiftv2.errors import UsageError

Floats = NDArray[np.float64]
FEWEST = 8
"""Clips of a run below which its spectrum tells nothing."""


def power_slope(series: Floats, seconds: float) -> float:
    """Exponent b of a power spectrum f^-b, by a line through log power over log frequency, 0 left out.

    Args:
        series: (n, dimensions), equally spaced; power is averaged over dimensions of equal variance.
        seconds: between neighbours.
    """
    spread = series.std(axis=0)
    standard = (series[:, spread > 0] - series[:, spread > 0].mean(axis=0)) / spread[spread > 0]
    frequency, power = signal.periodogram(standard, fs=1 / seconds, axis=0, detrend="linear")
    mean = power.mean(axis=1)
    # The lowest frequency loses its power to the trend, and at Nyquist's there is half.
    used = slice(1, -1 if len(series) % 2 == 0 else None)
    slope, _ = np.polyfit(np.log(frequency[used]), np.log(mean[used]), 1)
    return float(-slope)


def autocorrelation(series: Floats, lags: int) -> Floats:
    """(lags + 1,) correlation of a series with itself, the mean over dimensions, from lag 0 on.

    Args:
        series: (n, dimensions), equally spaced; dimensions that do not move are left out.
        lags: largest lag.
    """
    centred = series - series.mean(axis=0)
    variance = (centred**2).sum(axis=0)
    moving = variance > 0
    found = [(centred[: len(series) - lag] * centred[lag:]).sum(axis=0)[moving] / variance[moving] for lag in range(lags + 1)]
    return np.array([one.mean() for one in found])


def effective_rank(rows: Floats) -> float:
    """Exponential of the entropy of the singular values' shares (RankMe, Garrido et al. 2023, arXiv 2210.02885).

    Args:
        rows: (n, dimensions); their mean is taken out.
    """
    values = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def describe(runs: Sequence[tuple[Floats, Floats, float]], lags: int = 10) -> dict[str, Any]:
    """What the embeddings of several runs have in common.

    Args:
        runs: of each its clips' embeddings (n, dimensions), their starts in frames (n,), and seconds between frames.
        lags: largest lag of the autocorrelation, in clips.

    Returns:
        `runs`, `seconds` between clips, `power_slope` (mean and deviation over runs), `autocorrelation` over
        `lag_seconds`, `effective_rank` of all clips, `dimensions`.

    Raises:
        UsageError: no run has enough clips, or clips are not equally spaced or as far apart in all runs.
    """
    long = [one for one in runs if len(one[0]) >= FEWEST]
    if not long:
        raise UsageError(f"no run has {FEWEST} clips: embed with a smaller clip.stride_between")
    spacing = set()
    for _, starts, tr in long:
        spacing |= {round(float(step) * tr, 3) for step in np.diff(starts)}
    if len(spacing) != 1:
        raise UsageError(f"clips are not equally spaced ({len(spacing)} distances): embed runs of one TR with clip.gaps=keep")
    seconds = spacing.pop()
    slopes = np.array([power_slope(rows, seconds) for rows, _, _ in long])
    most = min(lags, min(len(rows) for rows, _, _ in long) // 2)
    correlation = np.mean([autocorrelation(rows, most) for rows, _, _ in long], axis=0)
    every = np.concatenate([rows for rows, _, _ in runs])
    return {
        "runs": len(long),
        "seconds": seconds,
        "power_slope": {"mean": float(slopes.mean()), "deviation": float(slopes.std())},
        "lag_seconds": [seconds * lag for lag in range(most + 1)],
        "autocorrelation": correlation.tolist(),
        "effective_rank": effective_rank(every),
        "dimensions": every.shape[1],
    }
