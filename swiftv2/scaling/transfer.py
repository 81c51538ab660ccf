"""Whether the best learning rate stays put over widths: losses of a sweep of rates, one curve a width and parametrisation."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from swiftv2.errors import UsageError

FEWEST_RATES = 3


def transfer(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The best rate of each width.

    It is the lowest point of the parabola, in log rate, through the lowest loss and its two neighbours; the interval is that
    of those neighbours, between which the optimum of a curve with one valley lies. Where the lowest loss is at an end of the
    grid, the optimum is that end and has no interval.

    Args:
        rows: runs with `parametrisation`, `embed_dim`, `lr` and `loss`; a loss that is not finite is a run that diverged.
            Several seeds of a rate are averaged.

    Returns:
        `widths`: a mapping a curve with `parametrisation`, `embed_dim`, `lr`, `loss` (null where it diverged), `diverged`,
        `best_lr`, `best_lr_interval`; `moved`: for each parametrisation the best rate at the largest width over that at the
        smallest; `step`: ratio of neighbouring rates of the grid, at most.

    Raises:
        UsageError: a curve has fewer than three rates, or there is only one width.
    """
    curves: dict[tuple[str, int], dict[float, list[float]]] = {}
    for row in rows:
        key = (str(row["parametrisation"]), int(row["embed_dim"]))
        curves.setdefault(key, {}).setdefault(float(row["lr"]), []).append(_number(row["loss"]))
    if len({width for _, width in curves}) < 2:
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
        best, interval = _lowest([rates[i] for i in finite], [means[i] for i in finite])
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
    for form in sorted({form for form, _ in curves}):
        own = [one for one in found if one["parametrisation"] == form]
        moved[form] = own[-1]["best_lr"] / own[0]["best_lr"]
    ratios = [high / low for one in found for low, high in zip(one["lr"], one["lr"][1:], strict=False)]
    return {"widths": found, "moved": moved, "step": max(ratios)}


def _number(value: Any) -> float:
    return math.nan if value is None or value == "" else float(value)


def _lowest(rates: list[float], losses: list[float]) -> tuple[float, list[float] | None]:
    """Best rate, and the neighbours between which it lies."""
    place = int(np.argmin(losses))
    if place in (0, len(rates) - 1):
        return rates[place], None
    around = slice(place - 1, place + 2)
    square, slope, _ = np.polyfit(np.log(rates[around]), losses[around], 2)
    best = rates[place] if square <= 0 else math.exp(-slope / (2 * square))
    return float(np.clip(best, rates[place - 1], rates[place + 1])), [rates[place - 1], rates[place + 1]]
