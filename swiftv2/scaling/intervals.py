"""Intervals of a law's constants, and draws of the law for what follows from it.

The published fit (Huber's delta of 1e-3, below the noise of runs) is nearly a fit of least absolute differences: of normal
noise it takes 1.25 times the interval that the runs allow, and with few runs it passes through several of them exactly, so
that resampling its residuals tells little. Intervals therefore stand on a robust fit with Huber's delta at 1.345 standard
deviations of the noise, which is estimated with it (Huber's proposal 2, with the degrees of freedom taken off), and are
found by profile: an end is where the best law with that value held fits worse by what Student's t allows (Bates and Watts
1988, chapter 6; the ratio test of robust regression, Hampel et al. 1986, chapter 7). They follow the curvature that a
standard error leaves out, and end at E = 0 where the runs allow it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm, t

from swiftv2.scaling.law import EXPONENT, Floats, LawFit, Runs, huber, jacobian, log_loss, refine

BEND = 1.345
"""Huber's delta of the robust fit, in standard deviations: 95 % as efficient as least squares where noise is normal."""
_EXACT = 1e-9
"""Noise in log L below which runs lie on the law but for rounding."""
_LOG_LIMIT = 600.0
_CLIPPED = 1.03
"""Intervals of few runs are as much wider than Student's t says: clipping residuals costs that (measured: 1 to 2 points)."""
_UNEVEN = 1.1
"""Uneven noise widens an interval by at least this much, or is not told from even noise."""
_SEARCHES = 60
_THROW = 2.0


@dataclass(frozen=True)
class RobustFit:
    """The fit that intervals stand on.

    Attributes:
        coordinates: (P,) of the law.
        noise: standard deviation of log L about the law.
        freedom: runs less constants.
        deviance: factor from a rise of the sum of Huber's losses to squared units of Student's t.
    """

    coordinates: Floats
    noise: float
    freedom: int
    deviance: float

    @property
    def delta(self) -> float:
        """Huber's delta, in log L."""
        return BEND * self.noise


def fit_robust(runs: Runs, start: Floats) -> RobustFit:
    """The robust fit and the noise, in turn until both stand still.

    Args:
        runs: at least one more than the law has constants.
        start: coordinates (P,) to begin at, such as those of the published fit.
    """
    freedom = runs.count - runs.constants
    here, noise = start, _noise(runs.target - log_loss(start[None], runs.logs)[0], freedom)
    for _ in range(50):
        here = refine(here[None], runs.logs, runs.target, BEND * noise)[0][0]
        residuals = runs.target - log_loss(here[None], runs.logs)[0]
        before, noise = noise, _noise(residuals, freedom)
        if abs(noise - before) <= 1e-4 * noise:
            break
    if noise <= _EXACT:
        return RobustFit(here, noise, freedom, 2.0 / noise**2)
    scaled = residuals / noise
    inside = np.mean(np.abs(scaled) <= BEND)
    pull = np.sum(np.clip(scaled, -BEND, BEND) ** 2) / freedom
    return RobustFit(here, noise, freedom, float(2.0 * inside / (pull * noise**2)))


def _noise(residuals: Floats, freedom: int) -> float:
    """Huber's proposal 2: the scale at which clipped residuals have the variance that clipped normal noise has."""
    normal = float(2.0 * (norm.cdf(BEND) - 0.5 - BEND * norm.pdf(BEND) + BEND**2 * norm.sf(BEND)))

    def excess(log_scale: float) -> float:
        return float(np.sum(np.clip(residuals / np.exp(log_scale), -BEND, BEND) ** 2)) - freedom * normal

    top = float(np.sqrt(np.sum(residuals**2) / (freedom * normal)))
    if top <= _EXACT or excess(np.log(_EXACT)) <= 0.0:
        return _EXACT
    return float(np.exp(brentq(excess, np.log(_EXACT), np.log(top) + 1e-9)))


@dataclass(frozen=True)
class _Held:
    """A quantity that a profile holds at a value.

    Attributes:
        value: at the robust fit.
        step: where to look first, as a distance from it.
        limits: it goes no further.
        uneven: how many times as wide as even noise makes it the interval is for noise that is uneven over the runs.
        hold: from coordinates (P,) and a value: coordinates that have it, and a basis (P, P - 1) of the moves that keep it.
    """

    value: float
    step: float
    limits: tuple[float, float]
    uneven: float
    hold: Callable[[Floats, float], tuple[Floats, Floats]]


@dataclass(frozen=True)
class Interval:
    """An interval; `open_low`, `open_high`: the runs bound it no more on this side than the search's own limit does."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False


def profile(runs: Runs, robust: RobustFit, level: float = 0.9, *, uneven: bool = False) -> list[Interval]:
    """Profile intervals of E, A_1, alpha_1, ... and, with two variables, of alpha_2 / (alpha_1 + alpha_2).

    The last is the a of N_opt ~ C^a where C ~ N D; it stays within 0 and 1.

    Args:
        runs: what the fit was made from.
        robust: the fit.
        level: share of tables whose interval shall hold the truth.
        uneven: whether intervals widen where noise is uneven over the runs; that takes many runs to be seen.
    """
    spread, white = _spreads(runs, robust)
    if not uneven:
        white = spread
    quantile = (1.0 if uneven else _CLIPPED) * float(t.ppf(0.5 + level / 2.0, robust.freedom))
    held = [_linear(row, robust, spread, white, limits) for row, limits in _rows(runs)]
    if runs.means.size == 2:
        held.append(_ratio(robust, spread, white))
    ends, open_ends = _march(runs, robust, held, quantile)
    made = []
    for index, ((low, high), (open_low, open_high)) in enumerate(zip(ends, open_ends, strict=True)):
        if index == 0:  # An E that may be 0 is bounded by 0 itself.
            made.append(Interval(0.0 if open_low else float(np.exp(low)), float(np.exp(high)), open_high=open_high))
        elif index % 2 and index < runs.constants:
            made.append(Interval(float(np.exp(low)), float(np.exp(high)), open_low, open_high))
        else:
            bounded = index == runs.constants
            made.append(Interval(low, high, open_low and not bounded, open_high and not bounded))
    return made


def _spreads(runs: Runs, robust: RobustFit) -> tuple[Floats, Floats]:
    """Covariances (P, P) of the coordinates were the law straight: of even noise, and White's, of noise as it is."""
    slopes = jacobian(robust.coordinates[None], runs.logs)[0]
    residuals = runs.target - log_loss(robust.coordinates[None], runs.logs)[0]
    units = np.maximum(np.sqrt(np.sum(slopes**2, axis=0)), 1e-12)
    scaled = slopes / units
    within = np.abs(residuals) <= robust.delta
    even = np.linalg.pinv(scaled.T @ scaled, rcond=1e-12, hermitian=True) * (2.0 / (robust.deviance * np.mean(within)))
    bent = np.linalg.pinv(scaled[within].T @ scaled[within], rcond=1e-12, hermitian=True)
    pulled = scaled * np.clip(residuals, -robust.delta, robust.delta)[:, None]
    white = bent @ (pulled.T @ pulled) @ bent * (runs.count / robust.freedom)
    return even / np.outer(units, units), white / np.outer(units, units)


def _rows(runs: Runs) -> list[tuple[Floats, tuple[float, float]]]:
    """What is profiled as rows of coordinates: log E, log A (not centred) and alpha, each with its limits."""
    rows = []
    for index in range(runs.constants):
        row = np.zeros(runs.constants)
        row[index] = 1.0
        limits = (runs.lowest, float(runs.target.max())) if index == 0 else (-EXPONENT, EXPONENT)
        if index % 2:
            row[index + 1] = runs.means[index // 2]
            limits = (-_LOG_LIMIT, _LOG_LIMIT)
        rows.append((row, limits))
    return rows


def _linear(row: Floats, robust: RobustFit, spread: Floats, uneven: Floats, limits: tuple[float, float]) -> _Held:
    variance = max(float(row @ spread @ row), 1e-24)
    towards = spread @ row / variance if variance > 1e-24 else row / np.sum(row**2)
    basis = np.linalg.svd(row[None])[2][1:].T

    def hold(coordinates: Floats, value: float) -> tuple[Floats, Floats]:
        # A coordinate that means nothing to the losses, such as the log of an E near 0, would be thrown far off.
        moved = coordinates + np.clip(towards * (value - row @ coordinates), -_THROW, _THROW)
        # Rounding and limits aside, the value is exactly there.
        return moved + row * ((value - row @ moved) / (row @ row)), basis

    return _Held(float(row @ robust.coordinates), min(float(np.sqrt(variance)), 2.0), limits, _times(row, spread, uneven), hold)


def _times(slope: Floats, spread: Floats, uneven: Floats) -> float:
    """Only a clearly wider interval is believed: White's covariance is itself known from no more than these runs."""
    times = float(np.sqrt(float(slope @ uneven @ slope) / max(float(slope @ spread @ slope), 1e-300)))
    return times if times > _UNEVEN else 1.0


def _ratio(robust: RobustFit, spread: Floats, uneven: Floats) -> _Held:
    alpha, beta = robust.coordinates[2], robust.coordinates[4]
    total = alpha + beta
    slope = np.zeros(5)
    slope[2], slope[4] = -beta / total**2, alpha / total**2

    def hold(coordinates: Floats, value: float) -> tuple[Floats, Floats]:
        whole = coordinates[2] + coordinates[4]
        moved, basis = coordinates.copy(), np.zeros((5, 4))
        moved[2], moved[4] = (1.0 - value) * whole, value * whole
        basis[[0, 1, 3], [0, 1, 2]] = 1.0
        basis[2, 3], basis[4, 3] = 1.0 - value, value
        return moved, basis

    step = min(float(np.sqrt(slope @ spread @ slope)), 0.2)
    return _Held(float(np.clip(beta / total, 0.0, 1.0)), max(step, 1e-12), (0.0, 1.0), _times(slope, spread, uneven), hold)


@dataclass
class _Search:
    """One end of one profile: where it is known to be inside and outside."""

    held: _Held
    sign: float
    best: Floats
    inside: float
    height: float = 0.0
    outside: float | None = None
    above: float = 0.0
    at: float = 0.0
    done: bool = False
    open: bool = False

    def first(self, quantile: float) -> None:
        self.at = self._limited(self.held.value + self.sign * self.held.step * quantile)

    def _limited(self, value: float) -> float:
        return float(np.clip(value, *self.held.limits))

    def take(self, height: float, coordinates: Floats, quantile: float) -> None:
        """The root of the deviance at `at`, and where to look next."""
        if abs(height - quantile) <= 1e-3 * quantile:
            self.inside, self.done = self.at, True
            return
        if height > quantile:
            self.outside, self.above = self.at, height
        else:
            self.inside, self.height, self.best = self.at, height, coordinates
            if self.outside is None and self.at == self._limited(self.at + self.sign):
                self.done = self.open = True
                return
        if self.outside is None:
            far = abs(self.inside - self.held.value)
            wanted = far * 1.1 * quantile / max(height, 1e-9)
            self.at = self._limited(self.held.value + self.sign * min(max(wanted, 1.1 * far), 2.5 * far))
        else:
            part = np.clip((quantile - self.height) / (self.above - self.height), 0.1, 0.9)
            self.at = float(self.inside + part * (self.outside - self.inside))
            self.done = abs(self.outside - self.inside) <= 1e-9 * max(abs(self.inside), 1e-9)


def _march(
    runs: Runs, robust: RobustFit, held: Sequence[_Held], quantile: float
) -> tuple[list[tuple[float, float]], list[tuple[bool, bool]]]:
    """Both ends of each quantity, all at once: outwards from the fit, each restricted fit begun at the last one inside."""
    searches = [_Search(one, sign, robust.coordinates, one.value) for one in held for sign in (-1.0, 1.0)]
    lowest = huber(runs.target - log_loss(robust.coordinates[None], runs.logs)[0], robust.delta).sum()
    for search in searches:
        search.first(quantile * search.held.uneven)
    for _ in range(_SEARCHES):
        left = [search for search in searches if not search.done]
        if not left:
            break
        places = [search.held.hold(search.best, search.at) for search in left]
        starts, bases = np.stack([place[0] for place in places]), np.stack([place[1] for place in places])
        ends, values = refine(starts, runs.logs, runs.target, robust.delta, basis=bases, iterations=60)
        heights = np.sqrt(np.maximum(values - lowest, 0.0) * robust.deviance)
        for search, end, height in zip(left, ends, heights, strict=True):
            search.take(float(height), end, quantile * search.held.uneven)
    pairs = list(zip(searches[::2], searches[1::2], strict=True))
    ends_of = [(low.inside, high.inside) for low, high in pairs]
    return ends_of, [(low.open or not low.done, high.open or not high.done) for low, high in pairs]


def draw_laws(runs: Runs, robust: RobustFit, count: int, generator: np.random.Generator) -> Floats:
    """Laws that the runs could have given, for intervals of what follows from a law: coordinates (count, P).

    Residuals, widened for the degrees of freedom that the fit took, are drawn anew about the robust fit, their scale as
    uncertain as so few residuals leave it (so that shares of draws follow Student's t), and the law is fitted to each.

    Args:
        runs: what the fit was made from.
        robust: the fit.
        count: draws.
        generator: of random numbers.
    """
    fitted = log_loss(robust.coordinates[None], runs.logs)[0]
    residuals = (runs.target - fitted) * np.sqrt(runs.count / robust.freedom)
    scale = np.sqrt(robust.freedom / generator.chisquare(robust.freedom, size=(count, 1)))
    targets = fitted + scale * generator.choice(residuals, size=(count, runs.count))
    starts = np.repeat(robust.coordinates[None], count, axis=0)
    return refine(starts, runs.logs, targets, robust.delta * scale)[0]


def resample_runs(runs: Runs, fit: LawFit, count: int, generator: np.random.Generator) -> Floats:
    """The bootstrap of the published fit: runs drawn with replacement, the law fitted to each draw: coordinates (count, P)."""
    drawn = generator.multinomial(runs.count, np.full(runs.count, 1.0 / runs.count), size=count).astype(np.float64)
    starts = np.repeat(fit.coordinates[None], count, axis=0)
    return refine(starts, runs.logs, runs.target, fit.delta, weights=drawn)[0]
