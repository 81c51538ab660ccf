"""Cross-checks of the law: loss against one variable alone, isoFLOP parabolas, and the envelope of all runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from swiftv2.scaling.diagnosis import groups
from swiftv2.scaling.intervals import fit_robust, profile
from swiftv2.scaling.law import Floats, Runs, fit_law
from swiftv2.scaling.table import Table

Tree = dict[str, Any]

FORM = "E + A x^-alpha"
BUDGET = 0.15
"""Runs whose FLOPs are within this of one another, in the logarithm, may make one budget."""
_CROWD = 2
_FEWEST = 3


def loss_curve(table: Table, indices: Sequence[int], variable: Floats, note: str, level: float, delta: float) -> Tree:
    """L = E + A x^-alpha through some runs.

    Args:
        table: the runs used.
        indices: which of them.
        variable: x of all runs: (n,).
        note: which runs they are.
        level: of the intervals.
        delta: of Huber's loss, in log L.

    Returns:
        `form`, `constants`, `intervals`, `points` (rows), `note`; or `refused` with the reason.
    """
    chosen = list(indices)
    rows = [table.rows[i] for i in chosen]
    different = len(groups(variable[chosen])) if chosen else 0
    if different < 4:
        return {"refused": f"{note}: {different} different values, and three constants need at least 4", "points": rows}
    runs = Runs.make(table.loss[chosen], variable[chosen])
    fit = fit_law(runs, delta)
    robust = fit_robust(runs, fit.coordinates)
    constants = runs.to_constants(fit.coordinates)
    names = ("E", "A", "alpha")
    return {
        "form": FORM,
        "constants": dict(zip(names, map(float, constants), strict=True)),
        "intervals": {
            name: [min(one.low, float(value)), max(one.high, float(value))]
            for name, one, value in zip(names, profile(runs, robust, level), constants, strict=True)
        },
        "noise": robust.noise,
        "points": rows,
        "range": [float(variable[chosen].min()), float(variable[chosen].max())],
        "note": note + (f"; {len(chosen)} runs leave {robust.freedom} degrees of freedom" if robust.freedom < 3 else ""),
    }


def envelope(table: Table, level: float) -> Tree:
    """Runs that no run of as many FLOPs or fewer beats, and how their sizes grow: N ~ C^a by least squares of logarithms.

    Returns:
        `rows`, `flops`, `parameters`, `tokens`, `loss` of those, and `exponent` with `interval` where there are three or
        more, else `exponent_refused`; or `refused`.
    """
    indices = envelope_indices(table)
    if len(indices) < 2:
        return {"refused": "one run beats all others: it is the whole envelope"}
    tree: Tree = {
        "rows": [table.rows[i] for i in indices],
        "flops": [float(table.flops[i]) for i in indices],
        "parameters": [float(table.parameters[i]) for i in indices],
        "tokens": [float(table.tokens[i]) for i in indices],
        "loss": [float(table.loss[i]) for i in indices],
    }
    return tree | _power(table.flops[indices], table.parameters[indices], level)


def envelope_indices(table: Table) -> list[int]:
    """Indices of the runs on the envelope, by rising FLOPs."""
    order = sorted(range(len(table.rows)), key=lambda i: (table.flops[i], table.loss[i]))
    found: list[int] = []
    for index in order:
        if not found or table.loss[index] < table.loss[found[-1]]:
            found.append(index)
    return found


def budgets(flops: Floats) -> list[NDArray[np.int64]]:
    """Groups of runs of nearly equal FLOPs, ascending; runs between them are in none.

    A group is where runs crowd: at least three (and a thirtieth of all) within `BUDGET`, and twice as many as in as much
    room on either side.
    """
    logs, fewest = np.log(flops), max(_FEWEST, flops.size / 30.0)
    left, found = np.ones(flops.size, dtype=bool), []
    while True:
        inside = (logs[None] >= logs[:, None] - 1e-9) & (logs[None] <= logs[:, None] + BUDGET) & left
        first = int(np.argmax(inside.sum(axis=1) * left))
        group = np.flatnonzero(inside[first])
        if not left[first] or group.size < fewest:
            break
        left[group] = False
        low, high = logs[group].min(), logs[group].max()
        beside = max(np.sum((logs >= low - BUDGET) & (logs < low)), np.sum((logs > high) & (logs <= high + BUDGET)))
        if group.size >= _CROWD * beside:
            found.append(group)
    return sorted(found, key=lambda group: float(logs[group].mean()))


def isoflop(table: Table, level: float) -> Tree:
    """Parabolas of loss over log N in each budget, their minima, and N_opt ~ C^a over budgets (approach 2 of Hoffmann et al.).

    Returns:
        `budgets`: each with `flops`, `rows`, `coefficients` of loss = c0 + c1 x + c2 x^2 in x = ln N, `parameters` at the
        minimum with `interval` (null where the runs do not bound it), `loss` there, and `why` where there is no minimum;
        `exponent` with `interval`; or `refused`.
    """
    found = budgets(table.flops)
    usable = [group for group in found if len(groups(table.parameters[group])) >= _FEWEST]
    if not found:
        return {"refused": "runs do not group into budgets of nearly equal FLOPs"}
    if not usable:
        return {"refused": f"no budget of FLOPs holds {_FEWEST} sizes or more"}
    made = [_parabola(table, group, level) for group in usable]
    minima = [one for one in made if one["parameters"] is not None]
    flops = np.array([one["flops"] for one in minima])
    return {"budgets": made} | _power(flops, np.array([one["parameters"] for one in minima]), level)


def _parabola(table: Table, group: NDArray[np.int64], level: float) -> Tree:
    x, y = np.log(table.parameters[group]), table.loss[group]
    middle = float(x.mean())
    design = np.vander(x - middle, 3, increasing=True)
    constants = np.linalg.lstsq(design, y, rcond=None)[0]
    freedom = x.size - 3
    residuals = y - design @ constants
    best, interval, why = None, None, None
    slope, bend = float(constants[1]), float(constants[2])
    if bend <= 0.0:
        why = "loss does not curve upwards over the sizes of this budget: no minimum"
    else:
        lowest = -slope / (2.0 * bend)
        if not x.min() <= middle + lowest <= x.max():
            why = "the minimum lies beyond the sizes of this budget: add sizes there"
        else:
            best = float(np.exp(middle + lowest))
    if best is not None and freedom > 0:
        covariance = np.linalg.inv(design.T @ design) * float(residuals @ residuals) / freedom
        interval = _fieller(slope, bend, covariance[1:, 1:], float(t.ppf(0.5 + level / 2.0, freedom)), middle)
        why = "the runs do not bound the minimum at this level" if interval is None else None
    elif best is not None:
        why = "three runs give a minimum without an interval"
    c0 = float(constants[0]) - slope * middle + bend * middle**2
    return {
        "flops": float(np.exp(np.log(table.flops[group]).mean())),
        "rows": [table.rows[i] for i in group],
        "coefficients": [c0, slope - 2.0 * bend * middle, bend],
        "parameters": best,
        "interval": interval,
        "loss": None if best is None else float(constants[0] - slope**2 / (4.0 * bend)),
        "why": why,
    }


def _fieller(slope: float, bend: float, covariance: Floats, quantile: float, middle: float) -> list[float] | None:
    """Sizes at which the parabola's slope may be zero (Fieller 1954); None where they go on without end."""
    square = 4.0 * (bend**2 - quantile**2 * covariance[1, 1])
    linear = 4.0 * (slope * bend - quantile**2 * covariance[0, 1])
    rest = slope**2 - quantile**2 * covariance[0, 0]
    inside = linear**2 - 4.0 * square * rest
    if square <= 0.0 or inside < 0.0:
        return None
    low, high = sorted((-linear + sign * np.sqrt(inside)) / (2.0 * square) for sign in (-1.0, 1.0))
    if high - low > 2.0 * np.log(1e6):
        return None
    return [float(np.exp(middle + low)), float(np.exp(middle + high))]


def _power(flops: Floats, parameters: Floats, level: float) -> Tree:
    """N = k C^a through points, by least squares of the logarithms."""
    if flops.size < 2:
        return {"exponent": None, "interval": None, "coefficient": None, "why": "one point alone tells no exponent"}
    x, y = np.log(flops), np.log(parameters)
    spread = float(np.sum((x - x.mean()) ** 2))
    if spread == 0.0:
        return {"exponent": None, "interval": None, "coefficient": None, "why": "all points are at one budget"}
    exponent = float(np.sum((x - x.mean()) * (y - y.mean())) / spread)
    interval: list[float] | None = None
    why: str | None = "two points give an exponent without an interval"
    if flops.size > 2:
        residuals = y - y.mean() - exponent * (x - x.mean())
        half = t.ppf(0.5 + level / 2.0, flops.size - 2) * np.sqrt(float(residuals @ residuals) / (flops.size - 2) / spread)
        interval, why = [exponent - float(half), exponent + float(half)], None
    coefficient = float(np.exp(y.mean() - exponent * x.mean()))
    return {"exponent": exponent, "interval": interval, "coefficient": coefficient, "why": why}
