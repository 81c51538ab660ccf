"""The law of a fit, L(N, D) = E + A N^-alpha + B D^-beta, as figures need it: lines, and bands from its draws."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Band = tuple[Floats, Floats]
NAMES = ("E", "A", "alpha", "B", "beta")
_SEARCHED = np.log(1e4)
"""How far beyond the fitted sizes the best one is looked for, in the logarithm."""
_ROUNDS = 40


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        constants: (5,) E, A, alpha, B, beta.
        draws: (draws, 5) the same, of the bootstrap.
        noise: standard deviation of the logarithm of a run's loss about the law.
        level: share of the draws within a band.
        sizes: (sizes,) logarithms of the fitted numbers of parameters, ascending.
        costs: (sizes,) logarithms of their FLOPs a parameter and token: those of hierarchical models depend on the size.
    """

    constants: Floats
    draws: Floats
    noise: float
    level: float
    sizes: Floats
    costs: Floats

    def loss(self, parameters: Floats, tokens: Floats) -> Floats:
        """Losses (points,) of models of `parameters` after `tokens`; both (points,), infinite ones too."""
        return _loss(self.constants, parameters, tokens)

    def band(self, parameters: Floats, tokens: Floats, *, noisy: bool = False) -> Band:
        """Ends (points,) of the band of the law at each point, or of a run's loss there where `noisy`."""
        return self._band(_loss(self._drawn, parameters, tokens), noisy=noisy)

    def best(self, flops: Floats) -> Floats:
        """Lowest losses (points,) at each number of FLOPs, over all sizes."""
        return self._best(self.constants, flops)[1]

    def best_band(self, flops: Floats, *, noisy: bool = False) -> Band:
        """Ends of the band of `best`, each draw at its own best size."""
        return self._band(self._best(self._drawn, flops)[1], noisy=noisy)

    def best_size(self, flops: Floats) -> tuple[Floats, Band]:
        """Best numbers of parameters (points,) at each number of FLOPs, and the ends of their band."""
        return self._best(self.constants, flops)[0], self._band(self._best(self._drawn, flops)[0], noisy=False)

    def tokens(self, parameters: Floats, flops: Floats) -> Floats:
        """Tokens that so many FLOPs pay for; between the fitted sizes the cost is interpolated, beyond them it stays."""
        cost = np.exp(np.interp(np.log(parameters), self.sizes, self.costs))
        paid: Floats = flops / (cost * parameters)
        return paid

    @property
    def _drawn(self) -> Floats:
        """(5, draws, 1), which goes with (points,)."""
        return self.draws.T[:, :, None]

    def _best(self, constants: Floats, flops: Floats) -> tuple[Floats, Floats]:
        """Best sizes and their losses by trisection: with costs of stages there is no closed form."""
        shape = np.broadcast_shapes(constants.shape[1:], flops.shape)
        low, high = np.full(shape, self.sizes[0] - _SEARCHED), np.full(shape, self.sizes[-1] + _SEARCHED)

        def loss(logs: Floats) -> Floats:
            return _loss(constants, np.exp(logs), self.tokens(np.exp(logs), flops))

        for _ in range(_ROUNDS):
            third = (high - low) / 3.0
            falling = loss(low + third) > loss(high - third)
            low, high = np.where(falling, low + third, low), np.where(falling, high, high - third)
        middle = (low + high) / 2.0
        return np.exp(middle), loss(middle)

    def _band(self, drawn: Floats, *, noisy: bool) -> Band:
        if noisy:
            # Fixed numbers: a figure must come out the same each time.
            normal = np.random.default_rng(0).standard_normal((8, len(drawn), 1))
            drawn = np.concatenate(drawn * np.exp(self.noise * normal))
        tail = (1.0 - self.level) / 2.0
        low, high = np.quantile(drawn, (tail, 1.0 - tail), axis=0)
        return low, high


def law_of(fit: Mapping[str, Any]) -> Law:
    """The law of a fit tree."""
    constants = np.array([fit[name] for name in NAMES], dtype=float)
    draws = np.array(fit["draws"], dtype=float).reshape(-1, 5)
    points = fit["points"]
    sizes = sorted({float(point["parameters"]) for point in points})
    costs = [_cost([point for point in points if point["parameters"] == size]) for size in sizes]
    return Law(constants, draws, float(fit["noise"]), float(fit["intervals"]["level"]), np.log(sizes), np.log(costs))


def _cost(points: list[Mapping[str, Any]]) -> float:
    """Median FLOPs a parameter and token."""
    return float(np.median([point["flops"] / (point["parameters"] * point["tokens"]) for point in points]))


def _loss(constants: Floats, parameters: Floats, tokens: Floats) -> Floats:
    floor, size, alpha, data, beta = constants
    made: Floats = floor + size * parameters**-alpha + data * tokens**-beta
    return made
