"""From a table of runs to the law with intervals, its cross-checks, and all that is doubtful, as one plain tree."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from swiftv2.errors import UsageError
from swiftv2.scaling.curves import envelope, envelope_indices, isoflop, loss_curve
from swiftv2.scaling.diagnosis import CONSTANTS, FEW, find_off, groups, judge_monotone, refuse_degenerate, why_off
from swiftv2.scaling.extrapolation import leave_largest_out
from swiftv2.scaling.intervals import Interval, RobustFit, draw_laws, fit_robust, profile, resample_runs
from swiftv2.scaling.law import Floats, LawFit, Runs, fit_law, log_loss
from swiftv2.scaling.repeated import repeated_law
from swiftv2.scaling.table import Table

Tree = dict[str, Any]

NAMES = ("E", "A", "alpha", "B", "beta")
MANY = 50
"""Runs from which on the bootstrap draws runs instead of residuals: ten a constant."""
PROFILE = (
    "profile of a robust fit (Huber at 1.345 sd of the noise, Student's t), widened where noise is uneven; always holds the fit"
)
_WIDE = 1.0
_EPOCHS = 4.0


@dataclass(frozen=True)
class Options:
    """How a law is fitted.

    Attributes:
        drop_highest: so many of the highest losses are left out.
        delta: of Huber's loss, in log L.
        bootstraps: draws.
        level: share of tables whose interval shall hold the truth.
        seed: of random draws.
    """

    drop_highest: int = 0
    delta: float = 1e-3
    bootstraps: int = 500
    level: float = 0.9
    seed: int = 0

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: a value is out of range.
        """
        if self.drop_highest < 0:
            raise UsageError(f"--drop-highest-losses {self.drop_highest}: give 0 or more")
        if not 0.0 < self.delta < np.inf:
            raise UsageError(f"--delta {self.delta}: give a number above zero, such as 1e-3")
        if not 20 <= self.bootstraps <= 100_000:
            raise UsageError(f"--bootstraps {self.bootstraps}: give 20 to 100000")
        if not 0.5 <= self.level <= 0.999:
            raise UsageError(f"--level {self.level}: give 0.5 to 0.999")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: give 0 or more")


@dataclass(frozen=True)
class Estimate:
    """A law with what is known of its constants.

    Attributes:
        runs: all that it is fitted to.
        fit: the published fit.
        robust: the fit that intervals stand on; of few runs without those that are off.
        off: by index, how many standard deviations a run lies above the law of the others.
        intervals: of E, A, alpha, B, beta and a.
        laws: (draws, 5) constants that the runs could have given.
        many: whether runs were enough to be drawn with replacement.
    """

    runs: Runs
    fit: LawFit
    robust: RobustFit
    off: Mapping[int, float]
    intervals: list[Interval]
    laws: Floats
    many: bool

    @property
    def constants(self) -> Floats:
        """E, A, alpha, B, beta of the published fit."""
        return self.runs.to_constants(self.fit.coordinates)


def estimate(runs: Runs, options: Options) -> Estimate:
    """Fit the law to runs of which it can be told, with intervals and draws.

    Args:
        runs: at least six, of several sizes and tokens.
        options: how; what is dropped is so already.
    """
    fit = fit_law(runs, options.delta)
    everything = fit_robust(runs, fit.coordinates)
    off, others = find_off(runs, everything)
    many = runs.count >= MANY
    robust, kept = (everything, runs) if many else (others, runs.without(*off))
    constants = runs.to_constants(fit.coordinates)
    intervals = _hold(profile(kept, robust, options.level, uneven=many), [*constants, _ratio(constants)])
    generator = np.random.default_rng(options.seed)
    if many:
        draws = resample_runs(runs, fit, options.bootstraps, generator)
    else:
        draws = draw_laws(kept, robust, options.bootstraps, generator)
    return Estimate(runs, fit, robust, off, intervals, runs.to_constants(draws), many)


def fit_table(table: Table, options: Options | None = None) -> Tree:
    """Fit L = E + A N^-alpha + B D^-beta, with all that belongs to it.

    Args:
        table: finished runs.
        options: how; the defaults when None.

    Returns:
        The tree that docs/scaling.md describes, of plain JSON values, all finite.

    Raises:
        UsageError: no law can be fitted to the table.
    """
    options = options or Options()
    options.check()
    used, dropped = _drop(table, options.drop_highest)
    refuse_degenerate(used)
    found = estimate(Runs.make(used.loss, used.parameters, used.tokens), options)
    intervals, off, level = found.intervals, found.off, options.level
    exponents = {"alpha": (intervals[2].low, intervals[2].high), "beta": (intervals[4].low, intervals[4].high)}
    sound = used.take([i for i in range(found.runs.count) if i not in off])
    tree: Tree = {
        "table": str(table.path),
        "columns": vars(table.columns),
        "rows": len(table.rows),
        "used": found.runs.count,
        "dropped": dropped,
        "points": _points(used, found),
        **dict(zip(NAMES, map(float, found.constants), strict=True)),
        "objective": found.fit.objective,
        "delta": options.delta,
        "starts": found.fit.starts,
        "starts_in_best_basin": found.fit.starts_in_best_basin,
        "a": _ratio(found.constants),
        "b": 1.0 - _ratio(found.constants),
        "standard_errors": _errors(found.laws),
        "intervals": _interval_tree(found, options),
        "draws": found.laws.tolist(),
        "noise": found.robust.noise,
        "flops_per_parameter_token": _flops_per(used),
        "curves": _curves(sound, options),
        "isoflop": isoflop(sound, level),
        "envelope": envelope(sound, level),
        "repeated": repeated_law(used, found.fit, level),
        "extrapolation": leave_largest_out(used, off, options.delta, level, options.bootstraps, options.seed),
        "monotone": judge_monotone(sound, found.robust.noise, found.robust.freedom, exponents),
    }
    tree["warnings"] = _warnings(tree, intervals)
    return tree


def _drop(table: Table, count: int) -> tuple[Table, list[Tree]]:
    if count >= len(table.rows):
        raise UsageError(f"{table.path}: {len(table.rows)} runs, and --drop-highest-losses {count} would leave none")
    order = np.argsort(-table.loss, kind="stable")
    highest = sorted(int(i) for i in order[:count])
    dropped = [{"row": table.rows[i], "why": f"among the {count} highest losses (--drop-highest-losses)"} for i in highest]
    return table.take([i for i in range(len(table.rows)) if i not in set(highest)]), dropped


def _ratio(constants: Floats) -> float:
    alpha, beta = float(constants[2]), float(constants[4])
    return float(np.clip(beta / (alpha + beta), 0.0, 1.0)) if alpha + beta else 0.5


def _hold(intervals: list[Interval], values: list[float]) -> list[Interval]:
    """An interval about the robust fit is stretched to the published fit where that lies beyond it."""
    return [
        Interval(min(one.low, float(value)), max(one.high, float(value)), one.open_low, one.open_high)
        for one, value in zip(intervals, values, strict=True)
    ]


def _interval_tree(found: Estimate, options: Options) -> Tree:
    named = dict(zip((*NAMES, "a"), found.intervals, strict=True))
    tree: Tree = {
        "level": options.level,
        "method": PROFILE,
        "bootstrap": "runs drawn with replacement" if found.many else "residuals of the robust fit drawn anew, their scale too",
        "draws": options.bootstraps,
        **{name: [one.low, one.high] for name, one in named.items()},
        "b": [1.0 - named["a"].high, 1.0 - named["a"].low],
    }
    sides = [(name, side) for name in named for side in ("low", "high")]
    return tree | {"open": [f"{name} {side}" for name, side in sides if getattr(named[name], f"open_{side}")]}


def _errors(laws: Floats) -> Tree:
    total = laws[:, 2] + laws[:, 4]
    ratio = np.clip(np.divide(laws[:, 4], total, out=np.full(total.shape, 0.5), where=np.abs(total) > 1e-12), 0.0, 1.0)
    spread = np.std(laws, axis=0, ddof=1)
    errors = dict(zip(NAMES, map(float, spread), strict=True))
    return errors | {"a": float(np.std(ratio, ddof=1)), "b": float(np.std(ratio, ddof=1))}


def _points(used: Table, found: Estimate) -> list[Tree]:
    runs, off = found.runs, found.off
    fitted = log_loss(found.fit.coordinates[None], runs.logs)[0]
    points = []
    for index, row in enumerate(used.rows):
        residual = float(runs.target[index] - fitted[index])
        points.append(
            {
                "row": row,
                "name": (used.names[index] or None) if used.names is not None else None,
                "parameters": float(used.parameters[index]),
                "tokens": float(used.tokens[index]),
                "flops": float(used.flops[index]),
                "loss": float(used.loss[index]),
                "fitted": float(np.exp(fitted[index])),
                "residual": residual,
                "off": index in off,
                "why": why_off(residual, off[index]) if index in off else None,
            }
        )
    return points


def _flops_per(used: Table) -> Tree:
    """The factor k of C = k N D, and over which values it goes."""
    values = used.flops / (used.parameters * used.tokens)
    low, high = float(values.min()), float(values.max())
    derived = used.columns.tokens is None or used.columns.flops is None
    return {"value": 6.0 if derived else float(np.median(values)), "lowest": low, "highest": high, "assumed": derived}


def _curves(used: Table, options: Options) -> Tree:
    sizes, tokens = groups(used.parameters), groups(used.tokens)
    largest = max(sizes, key=lambda group: (len(groups(used.tokens[group])) >= 4, float(used.parameters[group[0]])))
    longest = max(tokens, key=lambda group: (len(groups(used.parameters[group])) >= 4, float(used.tokens[group[0]])))
    notes = (
        "runs on the envelope, against FLOPs",
        f"runs of {used.parameters[largest[0]]:.4g} parameters, against tokens",
        f"runs of {used.tokens[longest[0]]:.4g} tokens, against parameters",
    )
    level, delta = options.level, options.delta
    return {
        "compute": loss_curve(used, envelope_indices(used), used.flops, notes[0], level, delta),
        "data": loss_curve(used, list(map(int, largest)), used.tokens, notes[1], level, delta),
        "parameters": loss_curve(used, list(map(int, longest)), used.parameters, notes[2], level, delta),
    }


def _warnings(tree: Tree, intervals: list[Interval]) -> list[str]:
    warnings = [judged["why"] for judged in tree["monotone"].values() if not judged["holds"]]
    if tree["used"] < FEW:
        warnings.append(f"few runs: {tree['used']} for {CONSTANTS} constants; the noise is hardly known, intervals are wide")
    off = [point for point in tree["points"] if point["off"]]
    if off:
        shown = "; ".join(f"row {point['row']} {point['why']}" for point in off[:3])
        more = f"; and {len(off) - 3} more" if len(off) > 3 else ""
        warnings.append(f"{len(off)} run{'s' * (len(off) > 1)} off the law: {shown}{more}")
    for index, name in ((2, "alpha"), (4, "beta")):
        one, value, what = intervals[index], tree[name], "size" if name == "alpha" else "tokens"
        shown = f"{one.low:.3g} to {one.high:.3g}"
        if one.low <= 0.0 <= one.high:
            warnings.append(f"the interval of {name} ({shown}) includes 0: the runs do not show that loss depends on {what}")
        elif one.high < 0.0:
            warnings.append(f"{name} is below 0 ({shown}): loss rises with {what}")
        elif one.high - one.low > _WIDE * abs(value):
            warnings.append(f"the interval of {name} ({shown}) is wider than {name} itself: do not extrapolate far")
    if intervals[0].low == 0.0:
        warnings.append("E may be 0: this table does not bound what is left at infinite size and data from below")
    if tree["repeated"].get("most_epochs", 1.0) > _EPOCHS:
        warnings.append(
            f"runs repeat data, up to {tree['repeated']['most_epochs']:.3g} epochs: the law counts every token as new "
            "('repeated' does not)"
        )
    open_ends = tree["intervals"]["open"]
    warnings += [f"the runs do not bound the interval's {side} end: {name}" for name, side in map(str.split, open_ends)]
    spread = tree["flops_per_parameter_token"]
    if spread["highest"] > 1.25 * spread["lowest"]:
        warnings.append(
            f"FLOPs are not in proportion to parameters x tokens: {spread['lowest']:.3g} to {spread['highest']:.3g} a pair; "
            "a and b hold for C ~ N D alone"
        )
    return warnings
