"""Intervals by resampling subjects: percentiles of a metric over draws with replacement.

See Efron and Tibshirani 1993, chapter 13. Whoever belongs together (a family, the clips of one subject) is drawn together.
A draw is told by how often each unit comes in it, and all metrics are functions of these weights (`weighted`), so that draws
of two methods are paired by their seed.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FEWEST = 5
"""Groups that are drawn at least: an interval from fewer would be too narrow by far."""
_CELLS = 4_000_000
"""Weights held at a time."""


def resample(units: Sequence[str], draws: int, seed: int, groups: Mapping[str, str] | None = None) -> Iterator[Floats]:
    """How often each unit comes in draws of as many groups as there are, with replacement.

    Args:
        units: (n,) keys, each once; the draws depend on their order.
        draws: number of draws in all.
        seed: of the draws.
        groups: by unit, what is drawn as a whole; units without an entry are drawn on their own.

    Yields:
        (B, n) weights, blocks of the draws.
    """
    known = groups or {}
    names = [f"group {known[unit]}" if unit in known else f"unit {unit}" for unit in units]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    member = np.array([places[name] for name in names], dtype=np.int64)
    rng = np.random.default_rng([seed, len(places)])
    count, width = len(places), max(len(units), 1)
    for start in range(0, draws, max(_CELLS // width, 1)):
        block = min(max(_CELLS // width, 1), draws - start)
        drawn = rng.integers(0, count, size=(block, count)) + count * np.arange(block)[:, None]
        yield np.bincount(drawn.ravel(), minlength=block * count).reshape(block, count)[:, member].astype(np.float64)


def percentiles(values: Floats, level: float) -> dict[str, float | int | None]:
    """Interval of a metric from its draws; those in which it is not defined (NaN) are left out and counted.

    Args:
        values: (B,) the metric in each draw.
        level: share of the draws within the interval.

    Returns:
        low, high (None where fewer than half of the draws have a value) and undefined: draws left out.
    """
    known = values[~np.isnan(values)]
    low = high = None
    if len(known) and 2 * len(known) >= len(values):
        low, high = (float(end) for end in np.quantile(known, [(1 - level) / 2, (1 + level) / 2]))
    return {"low": low, "high": high, "undefined": len(values) - len(known)}
