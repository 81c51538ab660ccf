"""Into the numbers of a store: integers stay what they are, floats become integers with a stated error, or stay float32."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

INTEGER_TYPES = ("uint8", "int16", "uint16")
_FRAMES = 16
"""Volumes that are widened to float64 at a time."""


@dataclass(frozen=True)
class Stored:
    """A run in the numbers of the store.

    Attributes:
        bold: (frames, V), one of uint8, int16, uint16, float32; value = bold x slope + intercept.
        slope, intercept: the scale.
        values: `exact` (every source number kept), `scaled` (rounded to 65,535 steps) or `float32`.
        max_error: largest |stored - source| in source units; 0 where exact.
    """

    bold: npt.NDArray[Any]
    slope: float
    intercept: float
    values: str
    max_error: float


def to_stored(numbers: npt.NDArray[Any], slope: float, intercept: float, *, keep_float: bool = False) -> Stored:
    """Choose how a run is stored.

    Args:
        numbers: (frames, V) finite numbers as the file holds them.
        slope: scale of the file.
        intercept: offset of the file.
        keep_float: whether numbers that are no integers stay float32 rather than being scaled to int16.
    """
    if numbers.dtype.name in INTEGER_TYPES:
        return Stored(numbers, slope, intercept, "exact", 0.0)
    integers = _as_integers(numbers)
    if integers is not None:
        bold, offset = integers
        return Stored(bold, slope, intercept + slope * offset, "exact", 0.0)
    return _as_float32(numbers, slope, intercept) if keep_float else _scaled(numbers, slope, intercept)


def _as_integers(numbers: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], int] | None:
    """The same whole numbers less an offset, where 16 bits hold them."""
    low, high = float(numbers.min()), float(numbers.max())
    if high - low > 65_535 or max(abs(low), abs(high)) >= 2**53:
        return None
    if numbers.dtype.kind == "f" and not all(bool((volume == np.rint(volume)).all()) for volume in numbers):
        return None
    if low >= -32_768 and high <= 32_767:
        return numbers.astype(np.int16), 0
    if low >= 0 and high <= 65_535:
        return numbers.astype(np.uint16), 0
    bold = np.empty(numbers.shape, dtype=np.uint16)
    for target, volume in zip(bold, numbers, strict=True):
        target[:] = (volume.astype(np.int64) - int(low)).astype(np.uint16)
    return bold, int(low)


def _as_float32(numbers: npt.NDArray[Any], slope: float, intercept: float) -> Stored:
    bold = np.empty(numbers.shape, dtype=np.float32)
    error = 0.0
    for first in range(0, len(numbers), _FRAMES):
        values = numbers[first : first + _FRAMES].astype(np.float64) * slope + intercept
        bold[first : first + _FRAMES] = values
        error = max(error, float(np.abs(bold[first : first + _FRAMES] - values).max()))
    return Stored(bold, 1.0, 0.0, "float32", error)


def _scaled(numbers: npt.NDArray[Any], slope: float, intercept: float) -> Stored:
    ends = sorted(float(end) * slope + intercept for end in (numbers.min(), numbers.max()))
    step = (ends[1] - ends[0]) / 65_534 or 1.0
    middle = (ends[1] + ends[0]) / 2
    bold = np.empty(numbers.shape, dtype=np.int16)
    error = 0.0
    for first in range(0, len(numbers), _FRAMES):
        values = numbers[first : first + _FRAMES].astype(np.float64) * slope + intercept
        steps = np.clip(np.rint((values - middle) / step), -32_767, 32_767)
        bold[first : first + _FRAMES] = steps
        error = max(error, float(np.abs(steps * step + middle - values).max()))
    return Stored(bold, step, middle, "scaled", error)
