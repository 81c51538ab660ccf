"""Which steps are refused: numbers that are not finite, or far above those of the last accepted steps."""

import math
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from swiftv2.config.engine import FaultsConfig

Pair = tuple[float, float]
_ROUNDING = 1e-6
"""Share of the mean by which a number may always differ: where all were equal, rounding is no spike."""


class SpikeGuard:
    """Judges a step's loss and gradient norm by those of the last accepted steps.

    All ranks see the same numbers, which were reduced over all of them, so all judge alike without a word.
    """

    def __init__(self, config: FaultsConfig, history: Iterable[Sequence[float]] = ()) -> None:
        self.sigma = config.spike_sigma
        self._window: deque[Pair] = deque(((loss, norm) for loss, norm in history), maxlen=config.spike_window)

    @property
    def history(self) -> list[Pair]:
        """Loss and gradient norm of the accepted steps that count, the oldest first."""
        return list(self._window)

    def judge(self, loss: float, norm: float) -> str | None:
        """Why a step is refused, or None where it is accepted.

        Args:
            loss: mean over the global batch.
            norm: of the global gradient, before clipping.
        """
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"its {name} is not finite"
        if len(self._window) < (self._window.maxlen or 0):
            return None
        for name, value, former in zip(("loss", "gradient norm"), (loss, norm), zip(*self._window, strict=True), strict=True):
            limit = self.limit(former)
            if value > limit:
                return f"its {name} {value:.4g} is above {limit:.4g}, mean + {self.sigma:g} sigma of {len(former)} steps"
        return None

    def limit(self, former: Sequence[float]) -> float:
        """Largest value that is accepted after these."""
        values = np.asarray(former)
        mean = float(values.mean())
        return mean + max(self.sigma * float(values.std()), _ROUNDING * abs(mean))

    def accept(self, loss: float, norm: float) -> None:
        """Count a step that was accepted."""
        self._window.append((loss, norm))
