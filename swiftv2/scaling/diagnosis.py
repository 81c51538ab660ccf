"""What is wrong with a table of runs, or doubtful: no law can be told, points off the law, ladders that do not fall."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from swiftv2.errors import UsageError
from swiftv2.scaling.intervals import RobustFit, fit_robust
from swiftv2.scaling.law import Floats, Runs, jacobian, log_loss
from swiftv2.scaling.table import Table

CONSTANTS = 5
FEW = 8
NEAR = 0.02
"""Variables nearer than this to one another, in their logarithm, count as equal."""
_LINE = 0.02
"""Runs whose log N and log D stray no further from a line than this tell no two exponents apart."""
_ONE_BUDGET = 0.25
"""FLOPs that differ by less than this, in their logarithm, are one budget: there sizes and tokens trade for one another."""
_SAME = 1e-9
_NEVER_OFF = 2.5
_OFF_LEVEL = 0.002
_OFF_SHARE, _OFF_MOST = 6, 12
_RISE_LEVEL = 0.05
_CROSSED = 400


@dataclass(frozen=True)
class Rise:
    """At equal other variable, a larger value whose loss is higher than that of a smaller."""

    smaller: int
    larger: int
    excess: float


def groups(values: Floats, near: float = NEAR) -> list[NDArray[np.int64]]:
    """Indices of values within `near` of the lowest of their group in the logarithm, groups ascending."""
    order = np.argsort(values, kind="stable")
    logs, cuts, first = np.log(values[order]), [], 0
    for place in range(1, values.size):
        if logs[place] - logs[first] > near:
            cuts.append(place)
            first = place
    return list(np.split(order, cuts))


def refuse_degenerate(table: Table) -> None:
    """Refuse what no law in two variables can be fitted to.

    Raises:
        UsageError: too few runs, sizes or budgets, or sizes and tokens that go together.
    """
    count, problem = len(table.rows), ""
    sizes, tokens = len(groups(table.parameters)), len(groups(table.tokens))
    if np.ptp(np.log(table.loss)) < _SAME:
        problem = f"all losses are {_short(table.loss[0])}: nothing depends on size or tokens"
    elif count <= CONSTANTS:
        problem = f"{count} run{'s' * (count != 1)}; a law of {CONSTANTS} constants needs at least {CONSTANTS + 1}"
    elif sizes == 1:
        problem = f"all runs are of one size ({_short(table.parameters[0])} parameters): how loss depends on it cannot be told"
    elif tokens == 1:
        problem = f"all runs saw equally many tokens ({_short(table.tokens[0])}): how loss depends on them cannot be told"
    elif np.ptp(np.log(table.flops)) < _ONE_BUDGET:
        problem = f"all runs have one budget of FLOPs ({_short(table.flops[0])}): add runs at others"
    elif sizes == 2 or tokens == 2:
        which = "sizes" if sizes == 2 else "token counts"
        problem = f"only two {which}: two tell neither the exponent nor what is left at infinity; add a third"
    else:
        logs = np.log(np.stack([table.parameters, table.tokens]))
        stray = np.linalg.svd(logs - logs.mean(axis=1, keepdims=True), compute_uv=False)[1] / np.sqrt(count)
        if stray < _LINE:
            problem = (
                "sizes and tokens go together (all runs lie on one line of log N and log D): which of them lowers the loss "
                "cannot be told; add runs with other tokens at the same size"
            )
        else:
            places = np.unique(np.round(logs / NEAR), axis=1).shape[1]
            if places <= CONSTANTS:
                problem = f"only {places} different pairs of size and tokens; a law of {CONSTANTS} constants needs more"
    if problem:
        rises = find_rises(table.parameters, table.tokens, table.loss, 0.0)
        said = f"; not monotone either: {_told(table, rises, 'model', 'tokens')}" if rises else ""
        raise UsageError(f"{table.path}: cannot fit a law: {problem}{said}")


def _short(number: float) -> str:
    return f"{number:.4g}"


def find_off(runs: Runs, robust: RobustFit) -> tuple[dict[int, float], RobustFit]:
    """Runs that lie off the law, and the robust fit of the others.

    The generalised test of Rosner (1983): the run furthest off is taken out, again and again; then as many count as off as
    the last that lies further from the law of the others than Student's t allows for the worst of all runs at the 0.2 % level.

    Args:
        runs: all.
        robust: the robust fit of them.

    Returns:
        By index of the run, how many standard deviations it lies above (or, negative, below) the law of the others.
    """
    if np.max(np.abs(_distances(runs, robust, range(runs.count)))) < _NEVER_OFF:
        return {}, robust
    most = min(runs.count // _OFF_SHARE, robust.freedom - 2, _OFF_MOST)
    left, fit = list(range(runs.count)), robust
    out: list[tuple[int, float]] = []
    kept, kept_fit = 0, robust
    for _ in range(max(most, 0)):
        distances = _distances(runs, fit, left)
        index = left.pop(int(np.argmax(np.abs(distances))))
        others = Runs(runs.logs[:, left], runs.means, runs.target[left])
        fit = fit_robust(others, fit.coordinates)
        distance = _deleted(runs, others, fit, index)
        out.append((index, distance))
        if abs(distance) > t.isf(_OFF_LEVEL / (2.0 * (len(left) + 1)), fit.freedom):
            kept, kept_fit = len(out), fit
    return dict(out[:kept]), kept_fit


def _distances(runs: Runs, fit: RobustFit, rows: Sequence[int]) -> Floats:
    """Residuals (rows,) in standard deviations, each for the share of the fit that its own run makes."""
    logs = runs.logs[:, rows]
    slopes = jacobian(fit.coordinates[None], logs)[0]
    residuals = runs.target[list(rows)] - log_loss(fit.coordinates[None], logs)[0]
    orthogonal = np.linalg.svd(slopes, full_matrices=False)[0]
    share = np.clip(np.sum(orthogonal**2, axis=1), 0.0, 0.99)
    distances: Floats = residuals / (fit.noise * np.sqrt(1.0 - share))
    return distances


def _deleted(runs: Runs, others: Runs, fit: RobustFit, index: int) -> float:
    """How far a run lies from a fit made without it, in standard deviations of such a difference."""
    slopes = jacobian(fit.coordinates[None], others.logs)[0]
    own = jacobian(fit.coordinates[None], runs.logs[:, [index]])[0, 0]
    spread = np.linalg.pinv(slopes.T @ slopes, rcond=1e-12, hermitian=True)
    residual = runs.target[index] - log_loss(fit.coordinates[None], runs.logs[:, [index]])[0, 0]
    return float(residual / (fit.noise * np.sqrt(1.0 + max(float(own @ spread @ own), 0.0))))


def why_off(residual: float, distance: float) -> str:
    """What is said of a run that is off: its residual in log L, and how far off in standard deviations."""
    side = "above" if residual > 0 else "below"
    how = f"{abs(np.expm1(residual)):.2%} {side} the law, {abs(distance):.1f} standard deviations"
    if residual > 0:
        return f"{how}: diverged, ended before its schedule did, or trained otherwise?"
    return f"{how}: measured on other data, or trained otherwise?"


def find_rises(varied: Floats, equal: Floats, loss: Floats, tolerance: float) -> list[Rise]:
    """Where loss rises with one variable while the other is equal: by more than a tolerance in log L, the worst first."""
    rises = []
    for group in groups(equal):
        for larger in group:
            below = [i for i in group if np.log(varied[larger] / varied[i]) > NEAR]
            if below:
                best = min(below, key=lambda i: float(loss[i]))
                excess = float(np.log(loss[larger] / loss[best]))
                if excess > tolerance:
                    rises.append(Rise(int(best), int(larger), excess))
    return sorted(rises, key=lambda one: -one.excess)


def judge_monotone(
    table: Table, noise: float, freedom: int, exponents: Mapping[str, tuple[float, float]]
) -> dict[str, dict[str, Any]]:
    """Whether loss falls with size at equal tokens, and with tokens at equal size.

    Args:
        table: the runs used.
        noise: standard deviation of log L about the law.
        freedom: degrees of freedom that it was estimated with.
        exponents: intervals of alpha and beta, by which it is judged where no two runs are equal in the other variable.
    """
    made = {}
    noise, freedom = min((noise, freedom), _additive_noise(table))
    for varied, equal, what, other, exponent in (
        ("parameters", "tokens", "model", "tokens", "alpha"),
        ("tokens", "parameters", "training", "size", "beta"),
    ):
        values, same = getattr(table, varied), getattr(table, equal)
        pairs = sum(len(groups(values[group])) > 1 for group in groups(same))
        # The difference of two runs, and as many differences as there are runs.
        tolerance = noise * np.sqrt(2.0) * float(t.isf(_RISE_LEVEL / len(table.rows), freedom))
        rises = find_rises(values, same, table.loss, tolerance)
        low, high = exponents[exponent]
        if rises:
            holds, why = False, f"not monotone: {_told(table, rises, what, other)}"
        elif pairs:
            holds, why = True, f"loss falls with {varied} in all {pairs} groups of runs of equal {other}, within the noise"
        else:
            holds = low > 0.0
            told = f"the interval of {exponent} is {low:.3g} to {high:.3g}"
            why = f"no two runs of equal {other} differ in {varied}; {told}"
        made[varied] = {"holds": holds, "why": why}
    return made


def _additive_noise(table: Table) -> tuple[float, int]:
    """Noise (relative) about L = f(N) + g(D) with any f and g, and its degrees of freedom.

    A law that cannot rise calls it noise when larger models are worse; where sizes and tokens were crossed, this does not.
    """
    found = [*groups(table.parameters), *groups(table.tokens)]
    if len(found) > _CROSSED:
        return np.inf, 1
    design = np.zeros((table.loss.size, len(found)))
    for column, group in enumerate(found):
        design[group, column] = 1.0
    freedom = table.loss.size - int(np.linalg.matrix_rank(design))
    if freedom < 2:
        return np.inf, 1
    scaled = design / table.loss[:, None]
    fitted = scaled @ np.linalg.lstsq(scaled, np.ones(table.loss.size), rcond=None)[0]
    return max(float(np.sqrt(np.sum((1.0 - fitted) ** 2) / freedom)), _SAME), freedom


def _told(table: Table, rises: Sequence[Rise], what: str, other: str) -> str:
    worst = rises[0]
    values = table.parameters if what == "model" else table.tokens
    more = f" (and {len(rises) - 1} more)" if len(rises) > 1 else ""
    subject = "larger models are worse" if what == "model" else "longer training is worse"
    return (
        f"at equal {other} {subject}: {_short(values[worst.larger])} has loss {_short(table.loss[worst.larger])}, "
        f"{_short(values[worst.smaller])} has {_short(table.loss[worst.smaller])}{more}"
    )
