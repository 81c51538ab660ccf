"""Numbers, durations and names as the page of a run words them."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

METHODS = {
    "model": ("the model", 0),
    "time_interpolation": ("interpolation in time", 1),
    "visible_mean": ("mean of visible frames", 2),
    "run_mean": ("mean of the whole run", 3),
}
"""Who predicts hidden voxels, in words, with the number of its colour."""


def plural(number: int, one: str, many: str | None = None) -> str:
    """1 step, 2 steps, 1,200 clips."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def interval(estimate: Mapping[str, Any], digits: int = 3) -> str:
    """0.064 (0.029 to 0.099); without an interval where there is none."""
    value = estimate.get("mean", estimate.get("value"))
    if value is None:
        return "not finite"
    low, high = estimate.get("low"), estimate.get("high")
    text = f"{value:.{digits}f}"
    return text if low is None or high is None else f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def lasted(seconds: float) -> str:
    """12 ms, 3.4 s, 5 min 20 s, 3 h 12 min, 2 d 4 h."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    for unit, size, smaller, below in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = (whole % size) // below
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def moment(time: float) -> str:
    """A time in UTC to the second, as people write it."""
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S} UTC"


def amount(value: float) -> str:
    """1.23e15 as 1.23 P: for FLOPs and tokens."""
    for size, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "
