"""The data-constrained law of Muennighoff et al. 2023 (arXiv 2305.16264): tokens seen again are worth less than new ones.

In L = E + A N^-alpha + B D'^-beta the tokens are D' = U + U R* (1 - exp(-R / R*)): U those that differ, R = D / U - 1 how
often they were repeated, and R* the number of repetitions after which a token has given about 63 % of what it ever gives.
"""

from typing import Any

import numpy as np
from scipy.stats import t

from swiftv2.scaling.diagnosis import NEAR
from swiftv2.scaling.intervals import fit_robust
from swiftv2.scaling.law import Floats, LawFit, Runs, huber, log_loss, refine
from swiftv2.scaling.table import Table

Tree = dict[str, Any]

_GRID = np.geomspace(0.05, 5000.0, 61)
_ROUNDS = 5


def effective_tokens(tokens: Floats, unique: Floats, half_life: Floats | float) -> Floats:
    """D' of tokens seen D, tokens that differ U, and R*: all of one shape, or such that broadcast."""
    repeats = np.maximum(tokens / unique - 1.0, 0.0)
    worth: Floats = unique * (1.0 - half_life * np.expm1(-repeats / half_life))
    return worth


def repeated_law(table: Table, fit: LawFit, level: float) -> Tree:
    """Fit R* with all constants of the law.

    Args:
        table: the runs used.
        fit: the law without repetition, to begin at.
        level: of the interval of R*.

    Returns:
        `R_star`, its `interval` (by profile; an end on the search's own limit is null), `constants`, `objective` and
        `objective_without` (the law in which every token counts as new), `most_epochs`; or `refused`.
    """
    if table.unique is None:
        return {"refused": "no column of unique tokens was named (--unique COL)"}
    above = np.flatnonzero(table.unique > table.tokens * np.exp(NEAR))
    unique = np.minimum(table.unique, table.tokens)
    epochs = table.tokens / unique
    repeating = int(np.sum(epochs > 1.0 + NEAR))
    most = float(epochs.max())
    if not repeating:
        why = "no run saw a token twice" + (", and unique tokens exceed those seen" if above.size else "")
        return {"refused": f"nothing is repeated: {why}", "most_epochs": most}
    if len(table.rows) < 8 or repeating < 2:
        return {"refused": f"{len(table.rows)} runs, {repeating} of which repeat data: at least 8 and 2 are needed"}
    return _search(table, unique, fit, level) | {"most_epochs": most, "repeating": repeating}


def _search(table: Table, unique: Floats, fit: LawFit, level: float) -> Tree:
    plain = Runs.make(table.loss, table.parameters, table.tokens)
    robust = fit_robust(plain, fit.coordinates)
    start = np.repeat(fit.coordinates[None], _GRID.size, axis=0)

    def logs(half_lives: Floats) -> Floats:
        worth = np.log(effective_tokens(table.tokens, unique, half_lives[:, None])) - plain.means[1]
        return np.stack([np.broadcast_to(plain.logs[0], worth.shape), worth], axis=1)

    def best(delta: float) -> tuple[float, Floats, float, Floats]:
        points, around = _GRID, start
        for _ in range(_ROUNDS):
            ends, values = refine(around, logs(points), plain.target, delta)
            index = int(np.argmin(values))
            low, high = points[max(index - 1, 0)], points[min(index + 1, points.size - 1)]
            found = float(points[index]), ends[index], float(values[index]), values
            points = np.geomspace(low, high, 17)
            around = np.repeat(ends[index][None], points.size, axis=0)
        return found

    half_life, coordinates, objective, _ = best(fit.delta)
    # Noise belongs to the law with repetition: without it, repetition itself would count as noise.
    noise = robust
    for _ in range(2):
        value, ends, _, _ = best(noise.delta)
        moved = Runs(logs(np.array([value]))[0], plain.means, plain.target)
        noise = fit_robust(moved, ends)
    freedom = max(noise.freedom - 1, 1)
    lowest = best(noise.delta)[2]
    _, values = refine(np.repeat(noise.coordinates[None], _GRID.size, axis=0), logs(_GRID), plain.target, noise.delta)
    heights = np.sqrt(np.maximum(values - lowest, 0.0) * noise.deviance * freedom / noise.freedom)
    return {
        "R_star": half_life,
        "interval": _ends(heights, float(t.ppf(0.5 + level / 2.0, freedom)), value),
        "constants": dict(zip(("E", "A", "alpha", "B", "beta"), map(float, plain.to_constants(coordinates)), strict=True)),
        "objective": objective,
        "objective_without": float(huber(plain.target - log_loss(fit.coordinates[None], plain.logs)[0], fit.delta).sum()),
        "noise": noise.noise,
    }


def _ends(heights: Floats, quantile: float, best: float) -> list[float | None]:
    """Where the profile over the grid of R* crosses the quantile, on either side of the best."""
    places, ends = np.log(_GRID), []
    for side in (places <= np.log(best), places >= np.log(best)):
        crossing = None
        order = np.flatnonzero(side)[::-1] if side[0] else np.flatnonzero(side)
        before_place, before = float(np.log(best)), 0.0
        for index in order:
            if heights[index] >= quantile:
                part = (quantile - before) / (heights[index] - before)
                crossing = float(np.exp(before_place + part * (places[index] - before_place)))
                break
            before_place, before = places[index], heights[index]
        ends.append(crossing)
    return ends
