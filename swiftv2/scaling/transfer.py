"""Whether the best learning rate stays put over widths: losses of a sweep of rates, one curve a width and parametrisation."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from swiftv2.errors import UsageError

FEWEST_RATES = 3
EQUAL = ("tokens", "global_batch", "schedule", "mask_ratio", "patch", "data_fraction")
"""Columns, where runs have them, in which all must agree: only width, parametrisation, rate and seed may differ."""


def transfer(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The best rate of each width.

    It is the lowest point of the parabola, in log rate, through the lowest loss and its two neighbours; the interval is that
    of those neighbours, between which the optimum of a curve with one valley lies. Where the lowest loss is at an end of the
    grid, the optimum is that end and has no interval; a rate that diverged is a neighbour, but no loss that a parabola takes.

    Args:
        rows: runs with `parametrisation`, `embed_dim`, `lr` and `loss`; a loss that is not finite is a run that diverged.
            Several seeds of a rate are averaged.

    Returns:
        `widths`: a mapping a curve with `parametrisation`, `embed_dim`, `lr`, `loss` (null where it diverged), `diverged`,
        `best_lr`, `best_lr_interval`; `moved`: for each parametrisation of two widths or more the best rate at the largest
        over that at the smallest, which tells nothing where either has no interval; `step`: ratio of neighbouring rates, at
        most.

    Raises:
        UsageError: a curve has fewer than three rates, there is only one width, or runs differ in more than they may.
    """
    curves: dict[tuple[str, int], dict[float, list[float]]] = {}
    runs = list(rows)
    _check_equal(runs)
    for row in runs:
        key = (str(row["parametrisation"]), int(row["embed_dim"]))
        curves.setdefault(key, {}).setdefault(float(row["lr"]), []).append(_number(row["loss"]))
    forms = sorted({form for form, _ in curves})
    if all(len([width for own, width in curves if own == form]) < 2 for form in forms):
        raise UsageError("transfer over widths needs runs of two widths or more: collect a ladder with several sizes")
    found: list[dict[str, Any]] = []
    for (form, width), losses in sorted(curves.items()):
        rates = sorted(losses)
        means = [float(np.mean(losses[rate])) for rate in rates]
        finite = [place for place, loss in enumerate(means) if math.isfinite(loss)]
        if len(finite) < FEWEST_RATES:
            raise UsageError(
                f"{form}, width {width}: {len(finite)} rates with a finite loss; {FEWEST_RATES} are needed to find the best one"
            )
        best, interval = _lowest(rates, means)
        found.append(
            {
                "parametrisation": form,
                "embed_dim": width,
                "lr": rates,
                "loss": [loss if math.isfinite(loss) else None for loss in means],
                "diverged": [not math.isfinite(loss) for loss in means],
                "best_lr": best,
                "best_lr_interval": interval,
            }
        )
    moved = {}
    for form in forms:
        own = [one for one in found if one["parametrisation"] == form]
        if len(own) > 1:
            moved[form] = own[-1]["best_lr"] / own[0]["best_lr"]
    ratios = [high / low for one in found for low, high in zip(one["lr"], one["lr"][1:], strict=False)]
    return {"widths": found, "moved": moved, "step": max(ratios)}


def _number(value: Any) -> float:
    loss = math.nan if value is None or value == "" else float(value)
    return loss if math.isfinite(loss) else math.nan


def _check_equal(runs: list[Mapping[str, Any]]) -> None:
    for column in EQUAL:
        values = sorted({str(row.get(column)) for row in runs})
        if len(values) > 1:
            raise UsageError(
                f"runs differ in {column} ({', '.join(values)}), so that their losses tell no best rate together: "
                f"take one of them (swiftv2 sweep collect LADDER --where {column}={values[0]})"
            )


def _lowest(rates: list[float], losses: list[float]) -> tuple[float, list[float] | None]:
    """Best rate, and the neighbours between which it lies."""
    place = int(np.nanargmin(losses))
    if place in (0, len(rates) - 1):
        return rates[place], None
    around, best = slice(place - 1, place + 2), rates[place]
    if np.isfinite(losses[around]).all():
        square, slope, _ = np.polyfit(np.log(rates[around]), losses[around], 2)
        best = rates[place] if square <= 0 else math.exp(-slope / (2 * square))
    return float(np.clip(best, rates[place - 1], rates[place + 1])), [rates[place - 1], rates[place + 1]]
