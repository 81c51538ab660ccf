"""Methods beside each other: paired on the same subjects, with intervals that hold, and refusals where they are not paired."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from made import binary, subjects
from scipy.stats import t, ttest_rel

from swiftv2.config.task import TargetKind
from swiftv2.downstream.compare import compare, corrected_t
from swiftv2.downstream.metrics import judge
from swiftv2.downstream.predictions import Parts, Predictions, by_subject
from swiftv2.errors import UsageError

Run = tuple[dict[str, Any], Parts]


def _run(name: str, index: int, p: Predictions, kind: TargetKind = "regression", *, seed: int = 0, **split: Any) -> Run:
    """`result.json` and predictions of a run that predicted p on a fold."""
    classes = ["a", "b"] if kind == "classification" else []
    threshold = 0.5 if classes else None
    judged = judge(by_subject(p), kind, classes, threshold, bootstrap=0)
    target = {"kind": kind, "classes": classes, "threshold": threshold, "test": judged}
    result = {
        "task": "made",
        "name": name,
        "split": {"kind": "kfold", "index": index, "count": 5, "seed": 0, "unit": "subject"} | split,
        "subjects": {"train": 70, "val": 10, "test": 20},
        "targets": {"trait": target},
        "seed": seed,
    }
    return result, {"test": {"trait": p}}


def _compared(runs: list[Run], reference: str = "plain", **options: Any) -> dict[str, Any]:
    return compare([result for result, _ in runs], [parts for _, parts in runs], reference, **options)


def _folds(rng: np.random.Generator, noise: Mapping[str, float], size: int = 20) -> list[Run]:
    """Five folds of `size` subjects; each method sees the truth through noise of its own deviation."""
    runs = []
    for index in range(5):
        truth = rng.normal(size=size)
        for name, spread in noise.items():
            runs.append(_run(name, index, subjects(truth, truth + spread * rng.normal(size=size), first=size * index)))
    return runs


def test_the_table_and_paired_differences_are_those_of_the_results() -> None:
    runs = _folds(np.random.default_rng(0), {"plain": 1.0, "good": 0.5})
    found = _compared(runs, ceilings={"trait": {"metric": "pearson_r", "oracle": 0.9}})
    json.dumps(found, allow_nan=False)
    value = {(r["name"], r["split"]["index"]): r["targets"]["trait"]["test"]["metrics"]["mae"]["value"] for r, _ in runs}
    good, plain = ([value[name, i] for i in range(5)] for name in ("good", "plain"))
    of = found["targets"]["trait"]["metrics"]["mae"]
    assert of["better"] == "lower"
    assert of["methods"]["good"]["values"] == good
    assert of["methods"]["good"]["mean"] == pytest.approx(np.mean(good))
    assert of["methods"]["plain"]["difference"] is None
    difference = of["methods"]["good"]["difference"]
    assert difference["mean"] == pytest.approx(np.mean(good) - np.mean(plain))
    # Without shared training subjects it is the paired t interval; with them, wider by the ratio 20 / 70.
    paired = ttest_rel(good, plain).confidence_interval(0.95)
    widening = np.sqrt((1 / 5 + 20 / 70) / (1 / 5))
    half = (paired.high - paired.low) / 2 * widening
    assert difference["corrected_t"] == pytest.approx({"low": difference["mean"] - half, "high": difference["mean"] + half})
    assert difference["bootstrap"]["low"] < difference["mean"] < difference["bootstrap"]["high"] < 0
    assert found["targets"]["trait"]["subjects"] == {"train": [70] * 5, "test": [20] * 5, "tested": 100, "groups": 100}
    assert found["targets"]["trait"]["ceiling"]["oracle"] == 0.9
    assert found["methods"] == ["plain", "good"]


def test_errors_that_methods_share_leave_their_difference_certain() -> None:
    rng = np.random.default_rng(1)
    runs = []
    for index in range(5):
        truth, shared = rng.normal(size=20), rng.normal(size=20)
        for name, own in (("plain", 1.0), ("good", 0.9)):
            runs.append(_run(name, index, subjects(truth, truth + own * shared, first=20 * index)))
    of = _compared(runs)["targets"]["trait"]["metrics"]["mae"]["methods"]
    widths = [ends["high"] - ends["low"] for ends in (of["good"]["bootstrap"], of["good"]["difference"]["bootstrap"])]
    assert widths[1] == pytest.approx(widths[0] / 9, rel=0.05)


def test_a_method_that_knows_nothing_seems_to_rank_nobody() -> None:
    """Means of training subjects differ between folds: thrown together they would rank against the truth."""
    rng = np.random.default_rng(2)
    truth = rng.permutation(np.repeat([0.0, 1.0], 50)).reshape(5, 20)
    runs = [
        _run("plain", i, binary(truth[i], np.full(20, np.delete(truth, i, 0).mean()), first=20 * i), "classification")
        for i in range(5)
    ]
    of = _compared(runs)["targets"]["trait"]["metrics"]["auroc"]["methods"]["plain"]
    assert of["mean"] == 0.5
    assert of["bootstrap"] == {"low": 0.5, "high": 0.5, "undefined": 0}


def test_what_one_method_lacks_is_null_with_its_reason() -> None:
    rng = np.random.default_rng(3)
    runs = _folds(rng, {"good": 0.5})
    runs += [_run("plain", i, subjects(p["test"]["trait"].truth, np.zeros(20), first=20 * i)) for i, (_, p) in enumerate(runs)]
    of = _compared(runs)["targets"]["trait"]["metrics"]["pearson_r"]["methods"]
    assert of["plain"]["mean"] is None
    assert of["plain"]["reason"] == of["good"]["difference"]["reason"] == "not defined on 5 of 5 splits"
    assert of["good"]["difference"]["bootstrap"] is None
    assert of["good"]["mean"] > 0.8
    one = _compared(runs[:1], "good")["targets"]["trait"]["metrics"]["mae"]["methods"]["good"]
    assert one["corrected_t"] is None
    assert "one split tells nothing of other training subjects" in one["reason"]
    assert one["bootstrap"]["low"] < one["mean"] < one["bootstrap"]["high"]


def test_subjects_who_test_again_leave_the_corrected_interval_alone() -> None:
    rng = np.random.default_rng(4)
    truth = rng.normal(size=20)
    runs = [_run("plain", i, subjects(truth, rng.normal(size=20))) for i in range(5)]
    of = _compared(runs)["targets"]["trait"]["metrics"]["mae"]["methods"]["plain"]
    assert of["bootstrap"] is None
    assert of["reason"] == "bootstrap: subjects test on several splits"
    assert of["corrected_t"] is not None


def test_training_seeds_are_averaged_and_their_spread_is_told() -> None:
    rng = np.random.default_rng(5)
    truth = rng.normal(size=20)
    runs = [_run("plain", 0, subjects(truth, truth + rng.normal(size=20)), seed=s) for s in range(3)]
    values = [r["targets"]["trait"]["test"]["metrics"]["mae"]["value"] for r, _ in runs]
    of = _compared(runs)["targets"]["trait"]["metrics"]["mae"]["methods"]["plain"]
    assert of["mean"] == pytest.approx(np.mean(values))
    assert (of["seeds"], of["seed_spread"]) == (3, pytest.approx(np.std(values, ddof=1)))
    with pytest.raises(UsageError, match="two results of seed 1"):
        _compared([*runs, runs[1]])


def test_clips_of_a_run_are_drawn_together() -> None:
    """12 runs of 30 clips, all of a run alike: the interval is that of 12, not of 360."""
    rng = np.random.default_rng(6)
    runs = []
    for index in range(12):
        p = subjects(rng.normal(size=30), np.zeros(30), first=30 * index)
        error = np.full((30, 1), rng.normal())
        p = Predictions(p.unit, np.full(30, f"run{index}"), np.arange(30), p.truth, p.truth[:, None] + error)
        runs.append(_run("plain", index, p, count=12, unit="run"))
    found = _compared(runs)["targets"]["trait"]
    assert (found["subjects"]["tested"], found["subjects"]["groups"]) == (360, 12)
    values = np.array(found["metrics"]["mse"]["methods"]["plain"]["values"])
    ends = found["metrics"]["mse"]["methods"]["plain"]["bootstrap"]
    assert ends["high"] - ends["low"] == pytest.approx(2 * 1.96 * values.std() / np.sqrt(12), rel=0.1)
    few = _compared(runs[:4])["targets"]["trait"]["metrics"]["mse"]["methods"]["plain"]
    assert few["bootstrap"] is None
    assert "fewer than 5 test" in few["reason"]


def test_what_is_not_paired_is_refused_by_name() -> None:
    rng = np.random.default_rng(7)
    runs = _folds(rng, {"plain": 1.0, "good": 0.5})
    lacking = [run for run in runs if (run[0]["name"], run[0]["split"]["index"]) not in {("good", 1), ("good", 3)}]
    with pytest.raises(UsageError, match="good has no result of split seed 0, 1; seed 0, 3, which others have"):
        _compared(lacking)
    other = _run("good", 0, subjects(rng.normal(size=20), rng.normal(size=20), first=1))
    with pytest.raises(UsageError, match="good and plain differ in 2 test subjects"):
        _compared([runs[0], other])
    with pytest.raises(UsageError, match=r"no result is of the reference 'best'; there are plain, good"):
        _compared(runs, "best")
    with pytest.raises(UsageError, match=r"several split\.kind: kfold, seed"):
        _compared([runs[0], (runs[1][0] | {"split": runs[1][0]["split"] | {"kind": "seed"}}, runs[1][1])])
    with pytest.raises(UsageError, match="several tasks: made, other"):
        _compared([runs[0], (runs[1][0] | {"task": "other"}, runs[1][1])])
    untested = json.loads(json.dumps(runs[1][0]))
    untested["targets"]["trait"]["test"] = None
    with pytest.raises(UsageError, match=r"good on split seed 0, 0, target trait: test subjects were not predicted"):
        _compared([runs[0], (untested, runs[1][1])])


def test_without_predictions_there_is_the_corrected_interval() -> None:
    runs = _folds(np.random.default_rng(8), {"plain": 1.0, "good": 0.5})
    found = compare([result for result, _ in runs], [None] * len(runs), "plain")
    of = found["targets"]["trait"]["metrics"]["mae"]["methods"]["good"]["difference"]
    assert of["corrected_t"] is not None
    assert of["bootstrap"] is None
    assert of["reason"] == "bootstrap: predictions of some results are not known"


@pytest.mark.slow
def test_differences_of_equals_hold_nought_as_often_as_they_say() -> None:
    """120 cohorts in which two methods are equally good: 95 % bootstrap intervals of their difference hold 0."""
    rng = np.random.default_rng(9)
    held = 0
    for cohort in range(120):
        of = _compared(_folds(rng, {"plain": 1.0, "good": 1.0}), bootstrap=300, seed=cohort)["targets"]["trait"]["metrics"]
        ends = of["pearson_r"]["methods"]["good"]["difference"]["bootstrap"]
        held += ends["low"] <= 0 <= ends["high"]
    assert 0.88 <= held / 120 <= 0.99


def test_the_corrected_interval_holds_where_the_plain_one_does_not() -> None:
    """Two equally good features, a line fitted on each, 10 random splits of 100 subjects: is the difference of errors 0?"""
    rng = np.random.default_rng(10)
    corrected = plain = 0
    for _ in range(300):
        features = rng.normal(size=(2, 100))
        truth = features.sum(0) + rng.normal(size=100)
        differences = []
        for _ in range(10):
            order = rng.permutation(100)
            train, test = order[:80], order[80:]
            errors = []
            for feature in features:
                slope, start = np.polyfit(feature[train], truth[train], 1)
                errors.append(np.mean((slope * feature[test] + start - truth[test]) ** 2))
            differences.append(errors[0] - errors[1])
        low, high = corrected_t(differences, 20 / 80)
        corrected += low <= 0 <= high
        half = t.ppf(0.975, 9) * np.std(differences, ddof=1) / np.sqrt(10)
        plain += abs(np.mean(differences)) <= half
    assert corrected / 300 >= 0.9
    assert plain / 300 < 0.8
