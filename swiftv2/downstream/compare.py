"""Methods beside each other on the same subjects: paired differences over splits, with intervals.

Two intervals answer two questions, and both are told:

- `corrected_t`: another training and test set of these sizes. Splits share training subjects, so that their spread is too
  small; the corrected resampled t adds the ratio of test to training subjects to 1 / splits (Nadeau and Bengio 2003, Machine
  Learning 52:239, equation 9), with splits - 1 degrees of freedom. Where few train and many test it is wide.
- `bootstrap`: other test subjects, for the models as they are. It is there where no subject tests twice (k folds, sites, one
  split). Metrics are of each split's own subjects, never of scores of several models thrown together: those differ in
  level, and even a predictor that knows nothing then seems to rank.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from swiftv2.config.task import LOWER_IS_BETTER, TargetKind
from swiftv2.downstream import weighted
from swiftv2.downstream.intervals import FEWEST, percentiles, resample
from swiftv2.downstream.metrics import CLASSIFICATION, REGRESSION, decide, ready
from swiftv2.downstream.predictions import Parts, Predictions, by_subject, whole_runs
from swiftv2.errors import UsageError

Floats = NDArray[np.float64]
Split = tuple[int, int]
"""Seed and index of a split."""


@dataclass(frozen=True)
class _Cell:
    """What one method came to on one split of one target, one entry a training seed."""

    values: list[Mapping[str, Any]] = field(default_factory=list)
    """Metrics of the test subjects."""
    judged: list[tuple[Predictions, float | None]] = field(default_factory=list)
    """Test subjects, in order, and the threshold; fewer than `values` where predictions are not known."""
    groups: dict[str, str] = field(default_factory=dict)

    def mean(self, metric: str) -> float | None:
        """Over training seeds; None where one has no value."""
        found = [entry[metric]["value"] for entry in self.values]
        return None if None in found else float(np.mean(found))

    def spread(self, metric: str) -> float | None:
        """Standard deviation over training seeds."""
        found = [entry[metric]["value"] for entry in self.values]
        return None if len(found) < 2 or None in found else float(np.std(found, ddof=1))


def compare(
    results: Sequence[Mapping[str, Any]],
    predictions: Sequence[Parts | None],
    reference: str,
    *,
    ceilings: Mapping[str, Mapping[str, Any]] | None = None,
    groups: Mapping[str, str] | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """Compare methods by what `result.json` and `predictions.csv` of their runs say of the test subjects.

    Results of one method on one split that differ in `seed` are averaged.

    Args:
        results: trees of `result.json`.
        predictions: of the same runs; None where they are not known, which leaves no bootstrap.
        reference: name of the method from which the others differ.
        ceilings: by target, what a perfect reader scores (metric, oracle, standard_error, chance), handed on.
        groups: by unit what is drawn as a whole, such as its family; by run, where units are clips, when None.
        bootstrap: draws of test subjects.
        seed: of the draws.
        level: of the intervals.

    Returns:
        task, reference, level, split (kind, count, unit), splits, methods, and by target its kind, classes, subjects
        (train and test on each split, and tested: how many differ), ceiling and, by metric, better (`higher` or `lower`)
        and methods: by name values (one a split), seeds, seed_spread, mean with its intervals, and difference (the
        method less the reference) with its intervals; None for the reference and where a value is missing.

    Raises:
        UsageError: results are of different tasks or kinds of split, one comes twice, has no test subjects, lacks splits
            that another has (they are named), or is of other subjects.
    """
    if len(results) != len(predictions) or not results:
        raise ValueError("give one or more results, and as many predictions")
    design = _design(results)
    cells: dict[str, dict[str, dict[Split, _Cell]]] = defaultdict(lambda: defaultdict(dict))
    _collect(results, predictions, cells)
    methods = list(dict.fromkeys(str(result["name"]) for result in results))
    if reference not in methods:
        raise UsageError(f"no result is of the reference {reference!r}; there are {', '.join(methods)}")
    facts = {column: next(result["targets"][column] for result in results if column in result["targets"]) for column in cells}
    targets = {}
    for column, of_methods in cells.items():
        splits = _paired(column, of_methods)
        sizes = _sizes(results, column, splits)
        if reference not in of_methods:
            raise UsageError(f"target {column}: the reference {reference!r} has no result of it; compare other targets apart")
        kind = facts[column]["kind"]
        drawn = _Drawn(kind, of_methods, splits, groups, bootstrap, seed)
        names = CLASSIFICATION if kind == "classification" else REGRESSION
        targets[column] = {
            "kind": kind,
            "classes": facts[column]["classes"],
            "splits": [_label(split) for split in splits],
            "subjects": sizes | {"tested": drawn.units, "groups": drawn.groups},
            "ceiling": (ceilings or {}).get(column),
            "metrics": {
                metric: {
                    "better": "lower" if metric in LOWER_IS_BETTER else "higher",
                    "methods": _of_metric(metric, of_methods, splits, reference, drawn, sizes, level),
                }
                for metric in names
            },
        }
    return {"task": results[0]["task"], "reference": reference, "level": level, "split": design, "methods": methods} | {
        "targets": targets
    }


def corrected_t(values: Sequence[float], ratio: float, level: float = 0.95) -> tuple[float, float]:
    """Interval of a mean over splits that share training subjects (see the module's head).

    Args:
        values: a metric, or a paired difference, of each of two or more splits.
        ratio: test over training subjects.
        level: of the interval.
    """
    count = len(values)
    half = t.ppf((1 + level) / 2, count - 1) * np.sqrt((1 / count + ratio) * np.var(values, ddof=1))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def _label(split: Split) -> str:
    return f"seed {split[0]}, {split[1]}"


def _design(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all splits must have in common."""
    for what, found in (
        ("tasks", {str(result["task"]) for result in results}),
        *((f"split.{name}", {str(result["split"][name]) for result in results}) for name in ("kind", "count", "unit")),
    ):
        if len(found) > 1:
            raise UsageError(f"results are of several {what}: {', '.join(sorted(found))}; compare those of one")
    return {name: results[0]["split"][name] for name in ("kind", "count", "unit")}


def _collect(
    results: Sequence[Mapping[str, Any]],
    predictions: Sequence[Parts | None],
    cells: dict[str, dict[str, dict[Split, _Cell]]],
) -> None:
    seen = set()
    for result, known in zip(results, predictions, strict=True):
        name, split = str(result["name"]), (int(result["split"]["seed"]), int(result["split"]["index"]))
        for column, target in result["targets"].items():
            where = f"{name} on split {_label(split)}, target {column}"
            if target["test"] is None:
                raise UsageError(f"{where}: test subjects were not predicted; give results of runs with evaluate.test=true")
            if (name, split, column, result["seed"]) in seen:
                raise UsageError(f"{where}: two results of seed {result['seed']}; leave one out, or give it another name")
            seen.add((name, split, column, result["seed"]))
            cell = cells[column][name].setdefault(split, _Cell())
            cell.values.append(target["test"]["metrics"])
            if known is not None:
                clips = known["test"][column]
                found = ready(by_subject(clips), target["kind"], target["classes"])
                cell.judged.append((found, target["threshold"]))
                cell.groups.update(whole_runs(clips))


def _paired(column: str, of_methods: Mapping[str, Mapping[Split, _Cell]]) -> list[Split]:
    """Splits that all methods have, with the same test subjects."""
    splits = sorted({split for found in of_methods.values() for split in found})
    for name, found in of_methods.items():
        missing = [_label(split) for split in splits if split not in found]
        if missing:
            raise UsageError(
                f"target {column}: {name} has no result of split {'; '.join(missing)}, which others have: "
                "differences are of the same splits; finish these runs, or leave the splits out"
            )
    for split in splits:
        known = {name: set(found[split].judged[0][0].unit) for name, found in of_methods.items() if found[split].judged}
        for name, found in of_methods.items():
            for judged, _ in found[split].judged:
                other, units = next(iter(known.items()))
                differ = len(units ^ set(judged.unit))
                if differ:
                    raise UsageError(
                        f"target {column}, split {_label(split)}: {name} and {other} differ in {differ} test subjects: "
                        "differences are of the same subjects; judge both on one store and split"
                    )
    return splits


def _sizes(results: Sequence[Mapping[str, Any]], column: str, splits: Sequence[Split]) -> dict[str, list[int]]:
    """Subjects that train and test on each split; where methods train on different numbers, the smallest."""
    found: dict[Split, tuple[int, int]] = {}
    for result in results:
        if column in result["targets"]:
            split = (int(result["split"]["seed"]), int(result["split"]["index"]))
            train, test = int(result["subjects"]["train"]), int(result["subjects"]["test"])
            known_train, known_test = found.setdefault(split, (train, test))
            if known_test != test:
                raise UsageError(
                    f"split {_label(split)}: {result['name']} has {test} test subjects and another method {known_test}: "
                    "differences are of the same subjects; judge both on one store and split"
                )
            found[split] = min(train, known_train), test
    return {"train": [found[split][0] for split in splits], "test": [found[split][1] for split in splits]}


class _Drawn:
    """Metrics of all methods in the same draws of test subjects.

    Attributes:
        units: how many test; None where they are not known.
        groups: how many are drawn; None where they are not known.
        reason: why there are no draws, or None.
        values: by method and metric (splits, draws), NaN where it is not defined.
        share: (splits, draws) how much of each split comes in a draw: 1 on average.
    """

    def __init__(
        self,
        kind: TargetKind,
        of_methods: Mapping[str, Mapping[Split, _Cell]],
        splits: Sequence[Split],
        groups: Mapping[str, str] | None,
        draws: int,
        seed: int,
    ) -> None:
        self.values: dict[str, dict[str, Floats]] = {}
        self.units: int | None = None
        self.groups: int | None = None
        every = [cell for found in of_methods.values() for cell in found.values()]
        if any(len(cell.judged) < len(cell.values) for cell in every):
            self.reason: str | None = "predictions of some results are not known"
            return
        first = next(iter(of_methods.values()))
        tested = [[str(unit) for unit in first[split].judged[0][0].unit] for split in splits]
        units = sorted({unit for found in tested for unit in found})
        together = groups if groups is not None else {unit: run for cell in every for unit, run in cell.groups.items()}
        self.units = len(units)
        self.groups = len({together.get(unit, f"unit {unit}") for unit in units})
        self.reason = None
        if sum(map(len, tested)) > len(units):
            self.reason = "subjects test on several splits"
        elif self.groups < FEWEST:
            self.reason = f"fewer than {FEWEST} test"
        if self.reason or not draws:
            return
        place = {unit: i for i, unit in enumerate(units)}
        members = [np.array([place[unit] for unit in found]) for found in tested]
        weights = np.concatenate(list(resample(units, draws, seed, together)))
        self.share = np.stack([weights[:, one].mean(1) for one in members])
        names = CLASSIFICATION if kind == "classification" else REGRESSION
        for name, found in of_methods.items():
            drawn = [_in_draws(kind, found[split], weights[:, one]) for split, one in zip(splits, members, strict=True)]
            self.values[name] = {metric: np.stack([one[metric] for one in drawn]) for metric in names}

    def mean(self, metric: str, method: str, reference: str | None = None) -> Floats:
        """(draws,) mean over splits of a method, or of its difference from another; a split counts as often as it comes."""
        values = self.values[method][metric] - (0 if reference is None else self.values[reference][metric])
        share = np.where(np.isnan(values), 0.0, self.share)
        total = share.sum(0)
        return np.asarray(np.nansum(share * np.nan_to_num(values), axis=0) / np.where(total > 0, total, np.nan))


def _in_draws(kind: TargetKind, cell: _Cell, weights: Floats) -> dict[str, Floats]:
    """Metrics of one method on one split in each draw, the mean over training seeds."""
    found = []
    # Of a split that does not come in a draw nothing is defined.
    with np.errstate(invalid="ignore", divide="ignore"):
        for p, threshold in cell.judged:
            if kind == "regression":
                found.append(weighted.regression(p.truth, p.score[:, 0], weights))
            else:
                found.append(weighted.classification(p.truth, p.score, decide(p.score, threshold), weights))
    return {metric: np.mean([one[metric] for one in found], axis=0) for metric in found[0]}


def _of_metric(
    metric: str,
    of_methods: Mapping[str, Mapping[Split, _Cell]],
    splits: Sequence[Split],
    reference: str,
    drawn: _Drawn,
    sizes: Mapping[str, Sequence[int]],
    level: float,
) -> dict[str, Any]:
    ratio = float(np.mean(np.array(sizes["test"]) / np.array(sizes["train"])))
    values = {name: [found[split].mean(metric) for split in splits] for name, found in of_methods.items()}
    made = {}
    for name, found in of_methods.items():
        spreads = [found[split].spread(metric) for split in splits]
        known = [spread for spread in spreads if spread is not None]
        pairs = zip(values[name], values[reference], strict=True)
        differences = [None if one is None or other is None else one - other for one, other in pairs]
        own = drawn.mean(metric, name) if name in drawn.values else None
        apart = drawn.mean(metric, name, reference) if name in drawn.values else None
        made[name] = {
            "values": values[name],
            "seeds": max(len(found[split].values) for split in splits),
            "seed_spread": float(np.mean(known)) if known else None,
            **_estimate(values[name], own, drawn.reason, ratio, level),
            "difference": None if name == reference else _estimate(differences, apart, drawn.reason, ratio, level),
        }
    return made


def _estimate(
    values: Sequence[float | None], draws: Floats | None, reason: str | None, ratio: float, level: float
) -> dict[str, Any]:
    """Mean over splits and its two intervals, each None with the reason why it is not there."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        why = f"not defined on {len(values) - len(known)} of {len(values)} splits"
        return {"mean": None, "splits": len(values), "corrected_t": None, "bootstrap": None, "reason": why}
    entry: dict[str, Any] = {"mean": float(np.mean(known)), "splits": len(known), "corrected_t": None, "bootstrap": None}
    reasons = []
    if len(known) > 1:
        low, high = corrected_t(known, ratio, level)
        entry["corrected_t"] = {"low": low, "high": high}
    else:
        reasons.append("corrected_t: one split tells nothing of other training subjects")
    if draws is None:
        reasons.append(f"bootstrap: {reason or 'no draws were asked for'}")
    else:
        entry["bootstrap"] = percentiles(draws, level)
    return entry | ({"reason": "; ".join(reasons)} if reasons else {})
