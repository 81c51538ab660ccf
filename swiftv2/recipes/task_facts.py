"""What a task comes to in its store, in numbers: who has labels, and how its splits fall. No keys, no ids."""

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np

from swiftv2.config.task import TargetConfig, TaskConfig
from swiftv2.data.samples.splits import PARTS
from swiftv2.recipes.feature_sets import split_count, with_split
from swiftv2.recipes.task import TaskData, open_task


def describe_task(config: TaskConfig) -> dict[str, Any]:
    """Open all splits of a task and count; that opens them also checks that nobody, and no family, is in two parts.

    Returns:
        task, store, unit, units, runs, clips of a run's length, targets (by column: kind, known, missing, and counts of
        classes or mean, deviation and range), families (how many have several members), sites, and splits: one a split,
        with subjects of each part and, by target, counts of classes or means in each part.

    Raises:
        SwiftError: the store cannot be read.
        UsageError: labels or splits do not fit the task; the message says how.
    """
    data = open_task(with_split(config, 0))
    runs = [run for owned in data.runs_of.values() for run in owned]
    families = Counter(unit.family for unit in data.units if unit.family)
    tree: dict[str, Any] = {
        "task": config.name,
        "store": str(data.store.path),
        "store_version": data.version,
        "unit": config.split.unit,
        "units": len(data.units),
        "subjects": len({unit.subject for unit in data.units}),
        "runs": len(runs),
        "minutes_per_run": float(np.median([data.store.runs[run].frames * data.store.runs[run].tr for run in runs]) / 60),
        "families_of_several": sum(count > 1 for count in families.values()),
        "sites": dict(sorted(Counter(unit.site for unit in data.units if unit.site).items())),
        "targets": {target.column: _target(data, target) for target in config.targets},
        "splits": [],
    }
    for index in range(split_count(data)):
        tree["splits"].append(_split(open_task(with_split(config, index)), index))
    return tree


def _target(data: TaskData, target: TargetConfig) -> dict[str, Any]:
    if data.config.events is not None:
        counts = Counter(label for labels in data.states.values() for label in labels if label is not None)
        volumes = sum(map(len, data.states.values()))
        known = sum(counts[name] for name in data.classes(target))
        return {"kind": target.kind, "of": "volumes", "known": known, "missing": volumes - known} | {
            "classes": {name: counts[name] for name in data.classes(target)}
        }
    numbers = data.encoded[target.column].numbers
    known = int((~np.isnan(numbers)).sum())
    return {
        "kind": target.kind,
        "of": f"{data.config.split.unit}s",
        "known": known,
        "missing": len(numbers) - known,
    } | _counted(data, target, numbers)


def _split(data: TaskData, index: int) -> dict[str, Any]:
    keys = asdict(data.splits)
    tree: dict[str, Any] = {"index": index} | {part: len(keys[part]) for part in (*PARTS, "unassigned")}
    tree["targets"] = {}
    for target in data.config.targets:
        found: dict[str, Any] = {}
        for part in PARTS:
            if data.config.events is None:
                numbers = data.encoded[target.column].numbers[[data.place[key] for key in keys[part]]]
            else:
                numbers = data.cut(part).truth[:, 0]
            found[part] = _counted(data, target, numbers)
        tree["targets"][target.column] = found
    return tree


def _counted(data: TaskData, target: TargetConfig, numbers: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    known = numbers[~np.isnan(numbers)]
    classes = data.classes(target)
    if classes:
        counts = np.bincount(known.astype(np.int64), minlength=len(classes)).tolist()
        return {"classes": dict(zip(classes, counts, strict=True))}
    if not len(known):
        return {"mean": None, "std": None, "low": None, "high": None}
    low, high = np.quantile(known, [0.05, 0.95])
    # No extremes: the oldest of a cohort is one person.
    return {"mean": float(known.mean()), "std": float(known.std()), "low": float(low), "high": float(high)}
