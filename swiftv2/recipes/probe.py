"""Linear models on named features over the splits of a task, each leaving what a fine-tuning run leaves."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftv2.config.task import LOWER_IS_BETTER, TargetConfig, TaskConfig
from swiftv2.data.samples.splits import PARTS
from swiftv2.downstream.linear import Prediction, fit_predict, prepare, prior
from swiftv2.downstream.metrics import choose_threshold, judge
from swiftv2.downstream.permute import STRENGTH, Exchange, Part, permute
from swiftv2.downstream.predictions import Predictions, write
from swiftv2.downstream.targets import Scale
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import read_json, write_file
from swiftv2.recipes.feature_sets import (
    COVARIATES,
    MAJORITY,
    FeatureOptions,
    FeatureSet,
    Tell,
    feature_sets,
    split_count,
    with_split,
)
from swiftv2.recipes.task import TaskData, open_task

Floats = NDArray[np.float64]
RESULT, PREDICTIONS, PERMUTATIONS = "result.json", "predictions.csv", "permutations.json"


@dataclass(frozen=True)
class ProbeOptions:
    """How linear models are judged.

    Attributes:
        features: which feature sets.
        splits: numbers of the splits; all when None.
        bootstrap: draws of subjects for intervals.
        seed: of inner folds, draws and permutations.
    """

    features: FeatureOptions = field(default_factory=FeatureOptions)
    splits: tuple[int, ...] | None = None
    bootstrap: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Probed:
    """What was done.

    Attributes:
        results: folders of results, one a feature set and split.
        left_out: feature sets that the task cannot have, and why.
        about: what is to be known of the others.
    """

    results: tuple[Path, ...]
    left_out: dict[str, str]
    about: dict[str, str]


@dataclass(frozen=True, eq=False)
class Rows:
    """What linear models learn from and are judged on, in one split: units, or clips where these have labels.

    Attributes:
        key: (n,) whom a row is about.
        run: (n,) key of the run of a clip; empty for units.
        clip: (n,) first frame of a clip; -1 for units.
        part: (n,) train, val, test, or nothing for those that the split leaves out.
        group: (n,) who stays together in inner folds.
        together: by key, what intervals draw as a whole.
        numbers: (n,) truth of each target, NaN where missing.
        covariates: (n, C).
    """

    key: NDArray[np.str_]
    run: NDArray[np.str_]
    clip: NDArray[np.int64]
    part: NDArray[np.str_]
    group: NDArray[np.str_]
    together: dict[str, str]
    numbers: dict[str, Floats]
    covariates: Floats


def probe(config: TaskConfig, out: Path, options: ProbeOptions, tell: Tell | None = None) -> Probed:
    """Fit and judge linear models on each feature set, in each split: `OUT/NAME/split_INDEX/result.json`.

    The penalty is chosen on inner folds of the training subjects, the threshold on the validation subjects; test subjects
    are predicted once. What is done already, for the same task, store and features, is left as it is.

    Args:
        config: the task; `split.index` is looked at only where `options.splits` names none and there is a file.
        out: folder of the results.
        options: feature sets, splits, draws.
        tell: called with what is measured, runs done, and runs in all.

    Raises:
        SwiftError: the folder holds results of something else, or data cannot be read.
        UsageError: the task, a feature set or a split cannot be had.
    """
    data = open_task(with_split(config, 0))
    sets, left_out = feature_sets(data, options.features, tell)
    results = []
    for index in _indices(data, options.splits):
        data = open_task(with_split(config, index))
        rows = rows_of(data)
        for features in sets:
            folder = out / features.name / f"split_{index}"
            inputs = _digest(data, features, options)
            if not _is_done(folder, inputs):
                _leave(folder, data, rows, features, options, inputs)
            results.append(folder)
    return Probed(tuple(results), left_out, {one.name: one.about for one in sets if one.about})


def permutations(
    config: TaskConfig,
    out: Path,
    column: str,
    count: int,
    options: ProbeOptions,
    *,
    within_sites: bool = False,
    tell: Tell | None = None,
) -> dict[str, dict[str, Any]]:
    """AUROC of each feature set for permuted labels of a target, over the splits: `OUT/NAME/permutations.json`.

    Args:
        config: the task.
        out: folder of the results.
        column: the target, of classes.
        count: permutations.
        options: feature sets and splits.
        within_sites: whether labels are exchanged within a site only.
        tell: called with what is measured, runs done, and runs in all.

    Returns:
        By feature set what `downstream.permute.permute` gives.

    Raises:
        UsageError: no such target, one of numbers, labels of clips, or sites that nobody names.
    """
    target = next((one for one in config.targets if one.column == column), None)
    if target is None:
        raise UsageError(f"--target {column}: the task's targets are {', '.join(one.column for one in config.targets)}")
    if target.kind != "classification" or config.events is not None:
        raise UsageError(f"--target {column}: permutations are of subjects' classes, not of numbers or of states within a run")
    data = open_task(with_split(config, 0))
    sets, _ = feature_sets(data, options.features, tell)
    every = [rows_of(open_task(with_split(config, index))) for index in _indices(data, options.splits)]
    rows, numbers = every[0], data.encoded[column].numbers
    sites = np.array([unit.site or "" for unit in data.units])
    if within_sites and not any(sites):
        raise UsageError(f"--within-sites: no subject has a value of split.site_column={config.split.site_column!r}")
    exchange = Exchange(~np.isnan(numbers), rows.group, sites if within_sites else None)
    found: dict[str, dict[str, Any]] = {}
    for features in (one for one in sets if one.name != MAJORITY):
        parts = [Part(_prepared(own, features, options), own.part == "train", own.part == "test") for own in every]
        tree = permute(parts, numbers, target, data.classes(target), exchange, rows.group, count, seed=options.seed)
        inputs = _digest(data, features, options)
        found[features.name] = {"task": config.name, "name": features.name, "target": column, "splits": len(parts)} | tree
        found[features.name] |= {"strength": STRENGTH, "within_sites": within_sites, "seed": options.seed, "inputs": inputs}
        folder = out / features.name
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / PERMUTATIONS, json.dumps(found[features.name], indent=1, allow_nan=False) + "\n")
    return found


def rows_of(data: TaskData) -> Rows:
    """Rows of a split: all units, in the order of their keys, or all clips with a label.

    Units of which no run holds a clip are in no part: they are those that fine-tuning does not see either.
    """
    units = {unit.key: unit for unit in data.units}
    families = data.config.split.unit == "subject" and data.config.split.families
    cuts = {name: data.cut(name) for name in PARTS}
    together = {key: group for cut in cuts.values() for key, group in data.together(cut).items()}

    def group(key: str) -> str:
        family = units[key].family if families else None
        return f"family {family}" if family else f"unit {key}"

    if data.config.events is None:
        keys = np.array([unit.key for unit in data.units])
        part_of = {key: name for name, cut in cuts.items() for key in cut.unit.tolist()}
        return Rows(
            key=keys,
            run=np.full(len(keys), ""),
            clip=np.full(len(keys), -1),
            part=np.array([part_of.get(key, "") for key in keys.tolist()]),
            group=np.array([group(key) for key in keys.tolist()]),
            together=together,
            numbers={target.column: data.judged(target) for target in data.config.targets},
            covariates=data.covariates,
        )
    runs = np.concatenate([cut.clips.run for cut in cuts.values()])
    owner = {run: key for key, owned in data.runs_of.items() for run in owned}
    return Rows(
        key=np.concatenate([cut.unit for cut in cuts.values()]),
        run=np.array([data.store.runs[run].key for run in runs.tolist()]),
        clip=np.concatenate([cut.clips.start for cut in cuts.values()]),
        part=np.concatenate([np.full(len(cut.clips), name) for name, cut in cuts.items()]),
        group=np.array([group(owner[run]) for run in runs.tolist()]),
        together=together,
        numbers={data.config.targets[0].column: np.concatenate([cut.truth[:, 0] for cut in cuts.values()])},
        covariates=np.zeros((len(runs), 0)),
    )


def _indices(data: TaskData, wanted: Sequence[int] | None) -> list[int]:
    count = split_count(data)
    beyond = [index for index in wanted or () if not 0 <= index < count]
    if beyond:
        raise UsageError(f"--splits {beyond[0]}: the task has {count} splits, from 0 on")
    return list(range(count) if wanted is None else wanted)


def _prepared(rows: Rows, features: FeatureSet, options: ProbeOptions) -> Floats:
    values = rows.covariates if features.name == COVARIATES else features.of(rows.key.tolist())
    return prepare(values, rows.part == "train", rows.covariates if features.residual else None, options.seed)


def _digest(data: TaskData, features: FeatureSet, options: ProbeOptions) -> str:
    """Of all that a result depends on, but for the number of the split."""
    task = data.config.model_dump(mode="json")
    task["split"].pop("index")
    for name in ("store", "threads", "prefetch", "prefetch_mb", "patience_seconds"):
        task["data"].pop(name)
    store = [data.store.attributes["store_id"], data.store.fingerprint]
    labels = [list(one.classes) + [str(number) for number in one.numbers] for one in data.encoded.values()]
    whole = [task, store, labels, features.kind, options.bootstrap, options.seed]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def _is_done(folder: Path, inputs: str) -> bool:
    path = folder / RESULT
    if not path.exists():
        return False
    if read_json(path).get("inputs") != inputs:
        raise SwiftError(f"{path}: is of another task, store or way to measure features: give another folder, or remove it")
    return True


def _leave(folder: Path, data: TaskData, rows: Rows, features: FeatureSet, options: ProbeOptions, inputs: str) -> None:
    """Fit, judge, write: the result last, so that it stands for all of it."""
    prepared = _prepared(rows, features, options)
    predictions: dict[str, dict[str, Predictions]] = {"val": {}, "test": {}}
    targets, selected, strengths = {}, [], {}
    for target in data.config.targets:
        said = _said(data, rows, prepared, features, target, options.seed)
        strengths[target.column] = said.strength
        for part, found in predictions.items():
            found[target.column] = _predictions(rows, target, said.score, part)
        own = {part: found[target.column] for part, found in predictions.items()}
        targets[target.column] = _judged(data, rows, target, own, features.name, options)
        selected.append(_selected(data, rows, target, targets[target.column]["val"]))
    known = [one for one in selected if one is not None]
    split = data.config.split
    result = {
        "task": data.config.name,
        "name": features.name,
        "split": {name: getattr(split, name) for name in ("kind", "index", "count", "seed", "unit")},
        "subjects": {part: len(keys) for part, keys in asdict(data.splits).items() if part in PARTS},
        "targets": targets,
        "best_step": None,
        "select": {"metric": data.config.select, "value": float(np.mean(known)) if known else None},
        "overlap": features.overlap,
        "seed": options.seed,
        "features": {"kind": features.kind, "about": features.about, "dimensions": prepared.shape[1], "strength": strengths},
        "inputs": inputs,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / PREDICTIONS, predictions)
    write_file(folder / RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")


def _said(data: TaskData, rows: Rows, prepared: Floats, features: FeatureSet, target: TargetConfig, seed: int) -> Prediction:
    numbers, train, classes = rows.numbers[target.column], rows.part == "train", data.classes(target)
    if features.name == MAJORITY:
        return Prediction(prior(numbers, train, classes), 0.0)
    return fit_predict(prepared, numbers, train, target, classes, rows.group, seed=seed)


def _predictions(rows: Rows, target: TargetConfig, score: Floats, part: str) -> Predictions:
    truth = rows.numbers[target.column]
    of = (rows.part == part) & ~np.isnan(truth)
    if not of.any():
        raise SwiftError(f"target {target.column}: nobody of the part {part} has a value: check the split")
    return Predictions(rows.key, rows.run, rows.clip, truth, score).rows(of)


def _judged(
    data: TaskData, rows: Rows, target: TargetConfig, own: Mapping[str, Predictions], name: str, options: ProbeOptions
) -> dict[str, Any]:
    classes = data.classes(target)
    threshold = None
    if len(classes) == 2:
        by_validation = target.threshold == "validation" and name != MAJORITY
        threshold = choose_threshold(own["val"]) if by_validation else 0.5
    judged = {
        part: judge(
            found, target.kind, classes, threshold, bootstrap=options.bootstrap, seed=options.seed, groups=rows.together
        )
        for part, found in own.items()
    }
    return {"kind": target.kind, "classes": list(classes), "threshold": threshold, **judged}


def _selected(data: TaskData, rows: Rows, target: TargetConfig, judged: Mapping[str, Any]) -> float | None:
    """The task's metric of one target on validation subjects, lower better, as fine-tuning tells it."""
    name = data.config.select
    value = judged["metrics"][name]["value"]
    if value is None:
        return None
    if name == "loss" and target.kind == "regression" and target.scale == "standard":
        return float(value) / Scale.fit(rows.numbers[target.column][rows.part == "train"], target.column).std ** 2
    return float(value) if name in LOWER_IS_BETTER else -float(value)


def summary(results: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Mean over splits of the metric that is looked at first: AUROC of classes, r of numbers.

    Args:
        results: folders of results.

    Returns:
        By feature set and target: metric, mean (None where a split has none) and values, one a split.
    """
    found: dict[str, dict[str, Any]] = {}
    for folder in results:
        tree = read_json(folder / RESULT)
        for column, target in tree["targets"].items():
            metric = "pearson_r" if target["kind"] == "regression" else "auroc"
            entry = found.setdefault(tree["name"], {}).setdefault(column, {"metric": metric, "values": []})
            entry["values"].append(target["test"]["metrics"][metric]["value"])
    for of_targets in found.values():
        for entry in of_targets.values():
            values = entry["values"]
            entry["mean"] = None if None in values else float(np.mean(values))
    return found
