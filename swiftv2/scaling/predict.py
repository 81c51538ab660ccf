"""What a fitted law says of runs that were not done: size, tokens and loss for a budget, with intervals, and how far that is.

The law is L(N, D) = E + A N^-alpha + B D^-beta (Hoffmann et al. 2022, arXiv 2203.15556). N are parameters and D tokens as
the fitted table counts them, budgets are FLOPs of a whole training, losses those of the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError
from scipy.stats import t

from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import read_json
from swiftv2.scaling.repeated import effective_tokens

Numbers = NDArray[np.float64]
Cost = Callable[[Numbers], Numbers]
"""FLOPs of training on one token, by parameters: of any shape, and of the same shape."""
CONSTANTS = ("E", "A", "alpha", "B", "beta")
NEAR = 10.0
"""Times the largest fitted budget up to which a prediction is near."""
FARTHEST = 1000.0
"""Times the largest fitted budget beyond which a prediction is refused."""
WIDEST_DECADES = 2.0
"""Decades of parameters that the interval of the optimum may span."""
FEW_POINTS = 8
FEWEST_POINTS = 6
"""One more than the law's constants: with fewer points nothing is left to judge the fit by."""
_SEARCHED = (1e3, 1e15)
_GRID, _ZOOMS, _ZOOM_GRID = 481, 5, 33
_NOISE_SHARES = (np.arange(101) + 0.5) / 101


class Estimate(NamedTuple):
    """A number with its interval, of the fit's level."""

    value: float
    low: float
    high: float


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class _Columns(_Part):
    parameters: str
    tokens: str | None


class _Point(_Part):
    parameters: PositiveFloat
    tokens: PositiveFloat
    flops: PositiveFloat
    off: bool


class _Intervals(_Part):
    level: Annotated[float, Field(gt=0, lt=1)]
    alpha: tuple[float, float]
    beta: tuple[float, float]


class _Factor(_Part):
    value: PositiveFloat


class _Trend(_Part):
    holds: bool
    why: str


class _Monotone(_Part):
    parameters: _Trend
    tokens: _Trend


class _Constants(_Part):
    E: float = Field(ge=0)
    A: PositiveFloat
    alpha: float
    B: PositiveFloat
    beta: float

    @property
    def constants(self) -> Numbers:
        """(5,): in the order of CONSTANTS."""
        return np.array([getattr(self, name) for name in CONSTANTS], dtype=np.float64)


class _Repeated(_Part):
    R_star: PositiveFloat
    constants: _Constants


class _Refused(_Part):
    refused: str


class Fit(_Constants):
    """What a prediction needs of the tree that `sweep fit` writes; docs/scaling.md tells what each of it is."""

    columns: _Columns
    points: Annotated[tuple[_Point, ...], Field(min_length=1)]
    intervals: _Intervals
    draws: Annotated[tuple[tuple[float, float, float, float, float], ...], Field(min_length=2)]
    noise: float = Field(ge=0)
    flops_per_parameter_token: _Factor
    monotone: _Monotone
    repeated: _Repeated | _Refused

    @property
    def level(self) -> float:
        """Probability that intervals claim."""
        return self.intervals.level

    @property
    def derived(self) -> bool:
        """Whether tokens are FLOPs / (k N) rather than counted."""
        return self.columns.tokens is None

    @property
    def k(self) -> float:
        """FLOPs of a token and parameter."""
        return self.flops_per_parameter_token.value

    @property
    def refits(self) -> Numbers:
        """(draws, 5)."""
        return np.array(self.draws, dtype=np.float64)

    @property
    def sound(self) -> list[_Point]:
        """Runs that are not off the law."""
        return [point for point in self.points if not point.off]


@dataclass(frozen=True)
class Optimum:
    """The size and the tokens that make most of a budget."""

    flops: float
    parameters: Estimate
    tokens: Estimate
    loss: Estimate
    """Of one run of this size and so many tokens; the interval holds run-to-run noise too."""


@dataclass(frozen=True)
class Reach:
    """How far beyond the fitted runs a prediction is."""

    factor: float
    """Budget over that of the largest run fitted."""
    verdict: Literal["within", "near", "far"]


def read_fit(path: Path) -> Fit:
    """Read what `sweep fit` wrote.

    Raises:
        UsageError: it is not there, damaged, or no fit of this version; one line says what it lacks.
    """
    again = "give the fit.json that `swiftv2 sweep fit` of this version writes"
    try:
        fit = Fit.model_validate(read_json(path))
    except SwiftError as error:
        raise UsageError(f"{error}; {again}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(f"{path}: no fit of this version ({place}: {first['msg']}); {again}") from error
    if not fit.sound:
        raise UsageError(f"{path}: every run is marked as off the law, so nothing tells what the law holds for; {again}")
    return fit


def law(constants: Numbers, parameters: Numbers | float, tokens: Numbers | float) -> Numbers:
    """Losses of a law, or of many.

    Args:
        constants: (..., 5), in the order of CONSTANTS; the leading axes broadcast with the others.
        parameters: of the model.
        tokens: trained on.
    """
    e, a, alpha, b, beta = np.moveaxis(constants, -1, 0)
    # In logarithms, since a steep law has an A or a B that no float holds well.
    terms = (np.log(a) - alpha * np.log(parameters), np.log(b) - beta * np.log(tokens))
    return np.asarray(e + np.exp(terms[0]) + np.exp(terms[1]), dtype=np.float64)


def loss_of(fit: Fit, parameters: float, tokens: float) -> Estimate:
    """The loss of one run of that size on so many tokens; the interval holds run-to-run noise too."""
    logs = np.log(law(fit.refits, parameters, tokens))
    noise = fit.noise * t.ppf(_NOISE_SHARES, max(1, len(fit.sound) - len(CONSTANTS)))
    value = float(law(fit.constants, parameters, tokens))
    low, high = _quantiles(np.add.outer(logs, noise).ravel(), fit.level)
    return Estimate(value, min(value, float(np.exp(low))), max(value, float(np.exp(high))))


def repeated_loss(fit: Fit, parameters: float, tokens: float, unique: float) -> float | None:
    """The same by the law of repeated data, in which tokens seen again count for less; None where none was fitted."""
    if isinstance(fit.repeated, _Refused):
        return None
    worth = effective_tokens(np.array(tokens), np.array(min(unique, tokens)), fit.repeated.R_star)
    return float(law(fit.repeated.constants.constants, parameters, worth))


def optimum(fit: Fit, flops: float, cost: Cost | None = None, between: tuple[float, float] = _SEARCHED) -> Optimum:
    """The compute-optimal size and tokens of a budget.

    Args:
        fit: the law.
        flops: FLOPs of the whole training.
        cost: FLOPs of a token by parameters, for models whose FLOPs are not k N; None: C = k N D, in closed form.
        between: the smallest and the largest size to look at, in parameters (for a cost alone).

    Raises:
        UsageError: the budget is no positive number.
    """
    if not 0 < flops < np.inf:
        raise UsageError(f"a budget of {flops:g} FLOPs: give a positive number, such as 1e21")
    every = np.vstack([fit.constants, fit.refits])
    parameters = _closed_form(every, flops / fit.k) if cost is None else _least(every, flops, cost, between)
    tokens = flops / (fit.k * parameters if cost is None else cost(parameters))
    return Optimum(
        flops,
        _estimate(parameters, fit.level),
        _estimate(tokens, fit.level),
        loss_of(fit, float(parameters[0]), float(tokens[0])),
    )


def given(fit: Fit, parameters: float, tokens: float, cost: Cost | None = None) -> Optimum:
    """The same of a size and tokens that are given: their FLOPs and their loss.

    Raises:
        UsageError: one of them is no positive number.
    """
    for name, value in (("parameters", parameters), ("tokens", tokens)):
        if not 0 < value < np.inf:
            raise UsageError(f"--{name} {value:g}: give a positive number")
    flops = tokens * float(fit.k * parameters if cost is None else cost(np.array(parameters)))
    size, seen = Estimate(parameters, parameters, parameters), Estimate(tokens, tokens, tokens)
    return Optimum(flops, size, seen, loss_of(fit, parameters, tokens))


def reach(fit: Fit, flops: float, cost: Cost | None = None) -> Reach:
    """How far a budget is beyond the largest run fitted, both counted alike.

    Args:
        fit: the law.
        flops: FLOPs of the whole training.
        cost: FLOPs of a token by parameters, as `optimum` takes it.
    """
    parameters, tokens, counted = (
        np.array([getattr(point, name) for point in fit.sound]) for name in ("parameters", "tokens", "flops")
    )
    factor = flops / float(np.max(counted if cost is None else cost(parameters) * tokens))
    return Reach(factor, "within" if factor <= 1 else "near" if factor <= NEAR else "far")


def judge(fit: Fit, found: Optimum, far: Reach) -> tuple[list[str], list[str]]:
    """What speaks against a prediction.

    Returns:
        (warnings, refusals): reasons to be careful, and reasons not to say it unless asked to.
    """
    warnings, refusals = [], []
    if far.factor > FARTHEST:
        refusals.append(f"the budget is {far.factor:,.0f} times that of the largest run fitted, more than {FARTHEST:,.0f}")
    elif far.verdict == "far":
        warnings.append(f"the budget is {far.factor:,.0f} times that of the largest run fitted: the law may bend on the way")
    decades = float(np.log10(found.parameters.high / found.parameters.low))
    if decades > WIDEST_DECADES:
        refusals.append(
            f"the {fit.level:.0%} interval of the optimal size spans {decades:.1f} decades "
            f"({found.parameters.low:.2g} to {found.parameters.high:.2g})"
        )
    for name, axis in (("alpha", "parameters"), ("beta", "tokens")):
        low, high = getattr(fit.intervals, name)
        if low <= 0 or getattr(fit, name) <= 0:
            refusals.append(
                f"the {fit.level:.0%} interval of {name} ({low:.3g} to {high:.3g}) holds 0: that more {axis} help is not shown"
            )
    for axis, trend in (("parameters", fit.monotone.parameters), ("tokens", fit.monotone.tokens)):
        if not trend.holds:
            said = f"the fitted losses do not fall with {axis} ({trend.why})"
            (warnings if far.verdict == "within" else refusals).append(said)
    used = len(fit.sound)
    if used < FEWEST_POINTS:
        refusals.append(f"the law's 5 constants were fitted to {used} points, which leaves nothing to judge them by")
    elif used < FEW_POINTS:
        warnings.append(f"the law's 5 constants were fitted to {used} points alone")
    return warnings, refusals


def _closed_form(constants: Numbers, product: float) -> Numbers:
    """(draws,): parameters at which the loss is least where N D is given."""
    _, a, alpha, b, beta = constants.T
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        logs = (np.log(alpha * a / (beta * b)) + beta * np.log(product)) / (alpha + beta)
    # A refit that no size helps has no optimum: it takes the end to which it leans.
    logs = np.where(alpha <= 0, -np.inf, np.where(beta <= 0, np.inf, logs))
    return np.asarray(np.exp(np.clip(logs, *np.log(_SEARCHED))), dtype=np.float64)


def _least(constants: Numbers, flops: float, cost: Cost, between: tuple[float, float]) -> Numbers:
    """(draws,): parameters at which the loss is least under a cost, by a grid that is made finer around its least point."""
    first, last = np.log(between)
    grid = np.broadcast_to(np.linspace(first, last, _GRID), (len(constants), _GRID))
    for _ in range(_ZOOMS):
        sizes = np.exp(grid)
        losses = law(constants[:, None, :], sizes, flops / cost(sizes))
        best = np.take_along_axis(grid, losses.argmin(axis=1)[:, None], axis=1)
        width = grid[:, 1:2] - grid[:, :1]
        grid = np.clip(best + width * np.linspace(-1, 1, _ZOOM_GRID), first, last)
    return np.asarray(np.exp(best[:, 0]), dtype=np.float64)


def _estimate(values: Numbers, level: float) -> Estimate:
    """The first of the values, between quantiles of the others, which are stretched to hold it."""
    value = float(values[0])
    low, high = _quantiles(values[1:], level)
    return Estimate(value, min(value, low), max(value, high))


def _quantiles(values: Numbers, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
