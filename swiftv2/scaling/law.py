"""The law L = E + A N^-alpha + B D^-beta: its logarithm, and fits of it to many tables at once.

With one variable instead of two the same code fits L = E + A x^-alpha. In the logarithms of constants and variables the
law is a log-sum-exp, and a fit minimises the sum over runs of Huber's loss of the residual in log L (Hoffmann et al. 2022,
arXiv 2203.15556, approach 3; Besiroglu et al. 2024, arXiv 2404.10102, who show that the mean instead of the sum stops
optimizers early).

Coordinates of a law with m variables: (log E, log A_1, alpha_1, ..., log A_m, alpha_m), and the variables' logarithms are
taken from their means, so that constants and exponents are hardly correlated.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Floats = NDArray[np.float64]

FLOOR = 14.0
"""log E goes no lower than this below the lowest log loss: there, E is nothing to any loss."""
EXPONENT = 12.0
"""Exponents stay within this, either way."""
_STARTS_E = (0.02, 0.4, 0.75, 0.95)
_STARTS_EXPONENT = (0.15, 0.4, 1.0)
_STARTS_SHARE = (0.1, 0.5, 0.9)
_TOLERANCE, _ROUGH = 1e-9, 1e-6
_BASIN = 1e-3
_FINE = 1e-11


@dataclass(frozen=True)
class Runs:
    """Runs that a law is fitted to.

    Attributes:
        logs: (m, n) logarithms of the m variables, less their means.
        means: (m,) those means.
        target: (n,) logarithms of the losses.
    """

    logs: Floats
    means: Floats
    target: Floats

    @classmethod
    def make(cls, loss: Floats, *variables: Floats) -> "Runs":
        """Runs of losses (n,) and variables (n,) each, all above zero."""
        logs = np.log(np.stack(variables))
        means = logs.mean(axis=1)
        return cls(logs=logs - means[:, None], means=means, target=np.log(loss))

    @property
    def count(self) -> int:
        """Runs."""
        return self.target.size

    @property
    def constants(self) -> int:
        """Constants of the law: 3 with one variable, 5 with two."""
        return 1 + 2 * self.means.size

    @property
    def lowest(self) -> float:
        """The log E that stands for E = 0."""
        return float(self.target.min()) - FLOOR

    def without(self, *rows: int) -> "Runs":
        """The same without some runs; means stay, so that coordinates mean the same."""
        keep = np.setdiff1d(np.arange(self.count), rows)
        return Runs(logs=self.logs[:, keep], means=self.means, target=self.target[keep])

    def to_constants(self, coordinates: Floats) -> Floats:
        """Coordinates (..., P) to (E, A_1, alpha_1, ...); an E at its floor is 0."""
        constants = coordinates.copy()
        constants[..., 1::2] += coordinates[..., 2::2] * self.means
        with np.errstate(over="ignore"):
            constants[..., 1::2] = np.exp(constants[..., 1::2])
        constants[..., 0] = np.where(coordinates[..., 0] <= self.lowest, 0.0, np.exp(coordinates[..., 0]))
        return constants

    def to_coordinates(self, constants: Floats) -> Floats:
        """The inverse of `to_constants`."""
        coordinates = constants.astype(np.float64)
        with np.errstate(divide="ignore"):
            coordinates[..., 0] = np.maximum(np.log(constants[..., 0]), self.lowest)
        coordinates[..., 1::2] = np.log(constants[..., 1::2]) - constants[..., 2::2] * self.means
        return coordinates


@dataclass(frozen=True)
class LawFit:
    """The best fit to runs.

    Attributes:
        coordinates: (P,) see the module.
        objective: sum over runs of Huber's loss of the residual in log L.
        delta: where Huber's loss turns from square to straight, in log L.
        starts: fits that were begun.
        starts_in_best_basin: those that ended within 0.1 % of the best objective.
    """

    coordinates: Floats
    objective: float
    delta: float
    starts: int
    starts_in_best_basin: int


def log_loss(coordinates: Floats, logs: Floats) -> Floats:
    """Log of the law: coordinates (S, P), centred logs (m, n) or (S, m, n) -> (S, n)."""
    return _evaluate(coordinates, logs)[0]


def jacobian(coordinates: Floats, logs: Floats) -> Floats:
    """Derivatives of `log_loss` by coordinates: (S, n, P)."""
    return _evaluate(coordinates, logs)[1]


def _evaluate(coordinates: Floats, logs: Floats) -> tuple[Floats, Floats]:
    every = np.broadcast_to(logs, (coordinates.shape[0], *logs.shape[-2:]))
    terms = coordinates[:, 1::2, None] - coordinates[:, 2::2, None] * every
    top = np.maximum(terms.max(axis=1), coordinates[:, :1])
    parts = np.exp(terms - top[:, None])
    rest = np.exp(coordinates[:, :1] - top)
    total = parts.sum(axis=1) + rest
    shares = parts / total[:, None]
    slopes = np.empty((*total.shape, coordinates.shape[1]))
    slopes[..., 0] = rest / total
    slopes[..., 1::2] = shares.transpose(0, 2, 1)
    slopes[..., 2::2] = (-shares * every).transpose(0, 2, 1)
    return top + np.log(total), slopes


def huber(residuals: Floats, delta: Floats | float) -> Floats:
    """Huber's loss: r^2 / 2 within delta, delta (|r| - delta / 2) beyond."""
    size = np.abs(residuals)
    loss: Floats = np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
    return loss


def refine(
    start: Floats,
    logs: Floats,
    target: Floats,
    delta: Floats | float,
    *,
    weights: Floats | float = 1.0,
    basis: Floats | None = None,
    iterations: int = 200,
    tolerance: float = _TOLERANCE,
) -> tuple[Floats, Floats]:
    """Fit many laws at once, each from its own start: Levenberg-Marquardt steps on reweighted squares (Huber's weights).

    Args:
        start: (S, P) coordinates.
        logs: centred logs, (m, n) or (S, m, n).
        target: log losses, (n,) or (S, n).
        delta: of Huber's loss, in log L: one, or (S, 1).
        weights: of the runs, such as how often a bootstrap drew them: (S, n).
        basis: (S, P, F) directions in which coordinates may move; all when None.
        iterations: at most so many steps.
        tolerance: a fit whose objective falls by less than this part of it, twice, is done.

    Returns:
        Coordinates (S, P) and objectives (S,).
    """
    lowest = float(np.min(target)) - FLOOR
    here = _bounded(start.copy(), lowest)
    residuals, slopes = _residuals(here, logs, target)
    value = np.sum(weights * huber(residuals, delta), axis=-1)
    damping = np.full(here.shape[0], 1e-3)
    still, small = np.ones(here.shape[0], dtype=bool), np.zeros(here.shape[0], dtype=int)

    def of(parts: Floats | float, rows: NDArray[np.int64], whole: int) -> Floats | float:
        return parts[rows] if isinstance(parts, np.ndarray) and parts.ndim == whole else parts

    for _ in range(iterations):
        rows = np.flatnonzero(still)
        if not rows.size:
            break
        limit, many = of(delta, rows, 2), of(weights, rows, 2)
        step = _step(residuals[rows], slopes[rows], limit, many, damping[rows], None if basis is None else basis[rows])
        there = _bounded(here[rows] + step, lowest)
        far, steep = _residuals(there, np.asarray(of(logs, rows, 3)), np.asarray(of(target, rows, 2)))
        found = np.sum(many * huber(far, limit), axis=-1)
        better = found < value[rows]
        gain = value[rows] - found
        won = rows[better]
        here[won], residuals[won], slopes[won] = there[better], far[better], steep[better]
        little = gain <= tolerance * np.maximum(value[rows], 1e-300)
        small[rows] = np.where(better & ~little, 0, small[rows] + np.where(better, 1, 0))
        value[won] = found[better]
        damping[rows] = np.where(better, np.maximum(damping[rows] * 0.2, 1e-12), damping[rows] * 8.0)
        still[rows] = (small[rows] < 2) & (damping[rows] < 1e10)
    return here, value


def _bounded(coordinates: Floats, lowest: float) -> Floats:
    coordinates[:, 0] = np.maximum(coordinates[:, 0], lowest)
    coordinates[:, 1::2] = np.maximum(coordinates[:, 1::2], lowest)
    coordinates[:, 2::2] = np.clip(coordinates[:, 2::2], -EXPONENT, EXPONENT)
    return coordinates


def _residuals(coordinates: Floats, logs: Floats, target: Floats) -> tuple[Floats, Floats]:
    fitted, slopes = _evaluate(coordinates, logs)
    return target - fitted, slopes


def _step(
    residuals: Floats,
    slopes: Floats,
    delta: Floats | float,
    weights: Floats | float,
    damping: Floats,
    basis: Floats | None,
) -> Floats:
    """One Levenberg-Marquardt step of each fit (S, P)."""
    if basis is not None:
        slopes = slopes @ basis
    pull = weights * np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300))
    turned = slopes.transpose(0, 2, 1)
    curvature = turned @ (slopes * pull[..., None])
    gradient = turned @ (residuals * pull)[..., None]
    diagonal = np.einsum("spp->sp", curvature)
    scale = diagonal + 1e-9 * diagonal.max(axis=1, keepdims=True) + 1e-30
    size = slopes.shape[-1]
    curvature = curvature + np.eye(size) * (damping[:, None] * scale + 1e-30)[:, None, :]
    # In units of each coordinate's own curvature the matrix is solved without loss of digits.
    unit = 1.0 / np.sqrt(scale)
    step = np.linalg.solve(curvature * unit[:, :, None] * unit[:, None, :], gradient * unit[..., None]) * unit[..., None]
    step = np.clip(step, -4.0, 4.0)
    moved: Floats = (step if basis is None else basis @ step)[..., 0]
    return moved


def fit_law(runs: Runs, delta: float = 1e-3) -> LawFit:
    """The best fit from a grid of starts.

    Every start is refined; L-BFGS goes on from the best ones, in turn with `refine`, until neither finds better.

    Args:
        runs: at least one more than the law has constants.
        delta: of Huber's loss, in log L.
    """
    starts = _starts(runs)
    # Near enough to tell basins apart; the best are polished.
    ends, values = refine(starts, runs.logs, runs.target, delta, tolerance=_ROUGH)
    order = np.argsort(values)
    best = ends[order[0]]
    for index in order[:2]:
        best = min((best, _polish(ends[index], runs, delta)), key=lambda one: _objective(one, runs, delta)[0])
    value = _objective(best, runs, delta)[0]
    basin = values <= value * (1.0 + _BASIN) + 1e-18
    return LawFit(best, float(value), delta, starts.shape[0], int(basin.sum()))


def _starts(runs: Runs) -> Floats:
    """(S, P): E as a part of the lowest loss, and what is left of a middling loss shared among the variables' terms."""
    low, middle = float(np.exp(runs.target.min())), float(np.exp(np.median(runs.target)))
    variables = runs.means.size
    exponents = np.stack(np.meshgrid(*[_STARTS_EXPONENT] * variables, indexing="ij"), axis=-1).reshape(-1, variables)
    shares = np.array([[share, 1.0 - share] for share in _STARTS_SHARE]) if variables > 1 else np.ones((1, 1))
    made = []
    for part in _STARTS_E:
        for share in shares:
            start = np.empty((exponents.shape[0], runs.constants))
            start[:, 0] = np.log(part * low)
            start[:, 1::2] = np.log(share * (middle - part * low))
            start[:, 2::2] = exponents
            made.append(start)
    return np.concatenate(made)


def _objective(coordinates: Floats, runs: Runs, delta: float) -> tuple[float, Floats]:
    """Objective and its gradient (P,)."""
    residuals, slopes = _residuals(coordinates[None], runs.logs, runs.target)
    pull = np.clip(residuals[0], -delta, delta)
    return float(huber(residuals[0], delta).sum()), -(slopes[0].T @ pull)


def _polish(coordinates: Floats, runs: Runs, delta: float) -> Floats:
    """L-BFGS and reweighted squares in turn, until the objective falls no more."""
    best, value = coordinates, _objective(coordinates, runs, delta)[0]
    bounds = [(runs.lowest, None)] + [(runs.lowest, None), (-EXPONENT, EXPONENT)] * runs.means.size
    for _ in range(20):
        scale = max(value, 1e-300)

        def scaled(point: Floats, scale: float = scale) -> tuple[float, Floats]:
            height, slope = _objective(point, runs, delta)
            return height / scale, slope / scale

        options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 20}
        found = minimize(scaled, best, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
        found = refine(found[None], runs.logs, runs.target, delta, tolerance=_FINE)[0][0]
        reached = _objective(found, runs, delta)[0]
        if reached < value:
            best, gain, value = found, value - reached, reached
        if reached >= value or gain < _FINE * value:
            break
    return best
