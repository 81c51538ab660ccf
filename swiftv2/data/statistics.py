"""Statistics of a run over its brain voxels, in source units, computed in float64."""

from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_FRAMES = 16
"""Volumes that are widened to float64 at a time."""
_CLEANED_SHARE = 0.3
"""Voxel means below this share of the voxels' standard deviation are those of data that were cleaned already.

Raw BOLD has means of 20 to 200 deviations. Cleaned data have none over the frames that were cleaned together, and some once a
few loud volumes at the start are left out: ten of 20 deviations in 1,000 frames leave 0.2.
"""


@dataclass(frozen=True)
class RunStatistics:
    """Over all frames and brain voxels of a run, in source units (after slope and intercept)."""

    mean: float
    std: float
    min: float
    max: float
    median: float
    iqr: float

    def as_tuple(self) -> tuple[float, ...]:
        """Mean, standard deviation, minimum, maximum, median, interquartile range."""
        return astuple(self)


def run_statistics(bold: npt.NDArray[Any], brain: npt.NDArray[np.bool_], slope: float, intercept: float) -> RunStatistics:
    """Global and robust statistics of a run; standard deviation of the population, quantiles by linear interpolation.

    Args:
        bold: (frames, V) stored numbers.
        brain: (V,) brain voxels, at least one.
        slope: value = stored x slope + intercept.
        intercept: see slope.
    """
    numbers, counts = _distinct(bold, brain)
    values = numbers.astype(np.float64) * slope + intercept
    if slope < 0:
        values, counts = values[::-1], counts[::-1]
    total = int(counts.sum())
    mean = float((values * counts).sum() / total)
    std = float(np.sqrt(((values - mean) ** 2 * counts).sum() / total))
    quarter, median, three_quarters = (_quantile(values, counts, total, share) for share in (0.25, 0.5, 0.75))
    return RunStatistics(mean, std, float(values[0]), float(values[-1]), median, three_quarters - quarter)


def _distinct(bold: npt.NDArray[Any], brain: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Distinct numbers, ascending, and how often each stands in the brain: exact, and small for 16-bit integers."""
    where = np.flatnonzero(brain)
    if bold.dtype.kind == "f":
        numbers, counts = np.unique(bold[:, where], return_counts=True)
        return numbers, counts.astype(np.int64)
    low = int(np.iinfo(bold.dtype).min)
    span = int(np.iinfo(bold.dtype).max) - low + 1
    histogram = np.zeros(span, dtype=np.int64)
    for volume in bold:
        histogram += np.bincount(volume[where].astype(np.int64) - low, minlength=span)
    present = np.flatnonzero(histogram)
    return present + low, histogram[present]


def _quantile(values: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], total: int, share: float) -> float:
    position = share * (total - 1)
    below = int(np.floor(position))
    ends = np.cumsum(counts)
    first = values[np.searchsorted(ends, below, side="right")]
    second = values[np.searchsorted(ends, min(below + 1, total - 1), side="right")]
    return float(first + (second - first) * (position - below))


def voxel_statistics(
    bold: npt.NDArray[Any], brain: npt.NDArray[np.bool_], slope: float, intercept: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Mean and population standard deviation of every brain voxel over the run, (V,) float32 each; 0 outside the brain."""
    frames, voxels = bold.shape
    total = np.zeros(voxels, dtype=np.float64)
    for first in range(0, frames, _FRAMES):
        total += bold[first : first + _FRAMES].sum(axis=0, dtype=np.float64)
    mean = total / frames
    squares = np.zeros(voxels, dtype=np.float64)
    for first in range(0, frames, _FRAMES):
        squares += ((bold[first : first + _FRAMES] - mean) ** 2).sum(axis=0)
    std = np.sqrt(squares / frames) * abs(slope)
    return (
        np.where(brain, mean * slope + intercept, 0.0).astype(np.float32),
        np.where(brain, std, 0.0).astype(np.float32),
    )


def is_cleaned(voxel_mean: npt.NDArray[np.float32], voxel_std: npt.NDArray[np.float32], brain: npt.NDArray[np.bool_]) -> bool:
    """Whether the run's voxels have a mean of zero, as detrending, filtering or regression leave them."""
    level = float(np.median(np.abs(voxel_mean[brain])))
    return level < _CLEANED_SHARE * float(np.median(voxel_std[brain]))
