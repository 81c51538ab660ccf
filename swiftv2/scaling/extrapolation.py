"""How well the law foretells the largest run, fitted without it."""

from collections.abc import Collection
from typing import Any

import numpy as np

from swiftv2.errors import UsageError
from swiftv2.scaling.diagnosis import find_off, refuse_degenerate
from swiftv2.scaling.intervals import draw_laws, fit_robust
from swiftv2.scaling.law import Runs, fit_law
from swiftv2.scaling.table import Table

Tree = dict[str, Any]

SAME = 0.1
"""Runs whose FLOPs come this near to the largest, in the logarithm, are left out with it."""


def leave_largest_out(table: Table, off: Collection[int], delta: float, level: float, count: int, seed: int) -> Tree:
    """Fit the law without the runs of the largest budget, and predict the largest of them.

    Args:
        table: the runs used.
        off: indices of runs that are off the law: none of them is the one predicted, or the largest seen.
        delta: of Huber's loss, in log L.
        level: of the interval.
        count: draws that it is made from.
        seed: of random draws.

    Returns:
        `left_out` (rows), `row`, `parameters`, `tokens`, `flops`, `measured`, `predicted`, `interval` (of one more run, its
        noise with it), `error` (relative), `last_seen` (loss of the largest run that was seen), `last_seen_error`, `factor`
        (FLOPs over the largest seen); or `refused`.
    """
    sound = [i for i in range(len(table.rows)) if i not in off]
    target = max(sound, key=lambda i: (table.flops[i], table.parameters[i]))
    seen = [i for i in range(len(table.rows)) if np.log(table.flops[i]) < np.log(table.flops[target]) - SAME]
    if not any(i in sound for i in seen):
        return {"refused": "all runs are of one budget: nothing smaller is left to predict the largest from"}
    rest = table.take(seen)
    try:
        refuse_degenerate(rest)
    except UsageError as error:
        reason = str(error).removeprefix(f"{table.path}: ")
        return {"refused": f"without the largest budget (rows {_rows(table, seen)}): {reason}"}
    runs = Runs.make(rest.loss, rest.parameters, rest.tokens)
    fit = fit_law(runs, delta)
    removed, robust = find_off(runs, fit_robust(runs, fit.coordinates))
    kept = runs.without(*removed)
    generator = np.random.default_rng([seed, 1])
    laws = runs.to_constants(draw_laws(kept, robust, count, generator))
    noise = robust.noise * generator.standard_t(robust.freedom, size=count)
    size, tokens = float(table.parameters[target]), float(table.tokens[target])
    losses = laws[:, 0] + laws[:, 1] * size ** -laws[:, 2] + laws[:, 3] * tokens ** -laws[:, 4]
    low, high = np.quantile(losses * np.exp(noise), [0.5 - level / 2.0, 0.5 + level / 2.0])
    e, a, alpha, b, beta = runs.to_constants(fit.coordinates)
    predicted = float(e + a * size**-alpha + b * tokens**-beta)
    last = max((i for i in seen if i not in off), key=lambda i: (table.flops[i], table.parameters[i]))
    measured = float(table.loss[target])
    return {
        "left_out": [table.rows[i] for i in range(len(table.rows)) if i not in set(seen)],
        "row": table.rows[target],
        "parameters": size,
        "tokens": tokens,
        "flops": float(table.flops[target]),
        "factor": float(table.flops[target] / rest.flops.max()),
        "measured": measured,
        "predicted": predicted,
        "interval": [min(float(low), predicted), max(float(high), predicted)],
        "error": predicted / measured - 1.0,
        "last_seen": float(table.loss[last]),
        "last_seen_error": float(table.loss[last]) / measured - 1.0,
    }


def _rows(table: Table, seen: Collection[int]) -> str:
    left = [str(table.rows[i]) for i in range(len(table.rows)) if i not in set(seen)]
    return ", ".join(left[:6]) + (", ..." if len(left) > 6 else "")
