"""Labels as numbers: classes or quantities, their scale and the weights of classes, all of the training subjects alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swiftv2.config.task import TargetConfig
from swiftv2.errors import UsageError

Floats = NDArray[np.float64]

_SHOWN = 6
"""Class names in a message at most."""


@dataclass(frozen=True)
class Encoded:
    """Values of one target.

    Attributes:
        classes: names in order; empty for a number.
        numbers: (n,) number of the class, or the label in its own units; NaN where it is missing.
    """

    classes: tuple[str, ...]
    numbers: Floats


def encode(config: TargetConfig, values: Sequence[str | None]) -> Encoded:
    """Turn the cells of a label's column into numbers.

    Classes without configured order are sorted: as numbers where all are, else as text.

    Args:
        config: the target.
        values: (n,) cells, None where missing. With configured classes, cells that name another class count as missing.

    Raises:
        UsageError: a cell is no number (regression), a configured class never comes, or fewer than two classes do.
    """
    if config.kind == "regression":
        return Encoded((), np.array([_number(config.column, value) for value in values], dtype=np.float64))
    present = {value for value in values if value is not None}
    classes = config.classes or tuple(sorted(present, key=_in_order))
    absent = [name for name in classes if name not in present]
    if absent:
        there = _listed(sorted(present, key=_in_order)) or "no values"
        raise UsageError(f"target {config.column}: no subject has {_listed(absent)}; the column has {there}: correct classes")
    if len(classes) < 2:
        raise UsageError(f"target {config.column}: {_listed(classes) or 'no value'} in all subjects; two classes are needed")
    places = {name: float(place) for place, name in enumerate(classes)}
    numbers = [math.nan if value is None else places.get(value, math.nan) for value in values]
    return Encoded(tuple(classes), np.array(numbers, dtype=np.float64))


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation that are taken out of a number while it is learned."""

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def fit(cls, numbers: Floats, column: str = "") -> "Scale":
        """Of the training units.

        Args:
            numbers: (n,) of training units, NaN where missing.
            column: name for messages.

        Raises:
            UsageError: all known numbers are the same, or fewer than two are known.
        """
        known = numbers[~np.isnan(numbers)]
        std = float(known.std()) if len(known) > 1 else 0.0
        # A spread below rounding of the mean is none.
        if len(known) < 2 or std <= 1e-12 * float(np.abs(known).max()):
            raise UsageError(
                f"target {column}: {len(known)} training subjects have {'one and the same' if len(known) else 'no'} value: "
                "nothing can be learned from them"
            )
        return cls(float(known.mean()), std)

    def apply(self, numbers: Floats) -> Floats:
        """From the label's units to those that are learned."""
        return (numbers - self.mean) / self.std

    def undo(self, numbers: Floats) -> Floats:
        """From what is learned to the label's units."""
        return numbers * self.std + self.mean


def class_weights(numbers: Floats, classes: Sequence[str], column: str = "") -> Floats:
    """Weight of each class, n / (K n_k) of the training units (scikit-learn's `balanced`): their mean over units is 1.

    Args:
        numbers: (n,) class numbers of training units, NaN where missing.
        classes: names.
        column: name for messages.

    Returns:
        (K,) weights.

    Raises:
        UsageError: a class has no training unit.
    """
    known = numbers[~np.isnan(numbers)].astype(np.int64)
    counts = np.bincount(known, minlength=len(classes))
    absent = [name for name, count in zip(classes, counts, strict=True) if not count]
    if absent:
        raise UsageError(f"target {column}: no training subject has {_listed(absent)}: leave it out of classes, or split anew")
    return np.asarray(len(known) / (len(classes) * counts), dtype=np.float64)


def _number(column: str, value: str | None) -> float:
    if value is None:
        return math.nan
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"target {column}: a value is no number; say kind=classification, or mend the label table")
    return number


def _in_order(name: str) -> tuple[float, str]:
    try:
        return float(name), name
    except ValueError:
        return math.inf, name


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
