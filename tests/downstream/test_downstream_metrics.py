"""Metrics are scikit-learn's, their intervals those of resampled subjects; what is not defined is null with a reason."""

import json
import warnings
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import binary, clips, subjects
from scipy.stats import norm, pearsonr
from sklearn import metrics as scores

from swiftv2.config.task import TargetKind
from swiftv2.downstream.intervals import percentiles, resample
from swiftv2.downstream.metrics import choose_threshold, judge, ready, resampled
from swiftv2.downstream.predictions import Predictions, by_subject, gather
from swiftv2.errors import SwiftError


def _values(judged: dict[str, Any]) -> dict[str, Any]:
    return {name: entry["value"] for name, entry in judged["metrics"].items()}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_two_classes_are_scikit_learns_on_subjects(ranks: int) -> None:
    p = clips(0, 60, 2)
    rng = np.random.default_rng(ranks)
    owner = np.minimum(rng.integers(0, 2 * ranks, 60), ranks - 1)[np.unique(p.unit, return_inverse=True)[1]]
    people = by_subject(gather([p.rows(owner == rank) for rank in range(ranks)]))
    judged = judge(people, "classification", ("a", "b"), threshold=0.4)
    truth, said = people.truth, people.score[:, 1]
    decided = said >= 0.4
    assert _values(judged) == pytest.approx(
        {
            "accuracy": scores.accuracy_score(truth, decided),
            "balanced_accuracy": scores.balanced_accuracy_score(truth, decided),
            "auroc": scores.roc_auc_score(truth, said),
            "auprc": scores.average_precision_score(truth, said),
            "f1": scores.f1_score(truth, decided),
            "loss": scores.log_loss(truth, people.score),
        },
        rel=1e-12,
    )
    assert judged["confusion"] == scores.confusion_matrix(truth, decided).tolist()
    assert judged["calibration"]["brier"] == pytest.approx(scores.brier_score_loss(truth, said), rel=1e-12)
    assert judged == judge(by_subject(p), "classification", ("a", "b"), threshold=0.4)
    assert (judged["n"], judged["threshold"]) == (60, 0.4)


def test_many_classes_are_scikit_learns_means_over_classes() -> None:
    people = by_subject(clips(1, 90, 4))
    judged = judge(people, "classification", "abcd", bootstrap=50)
    truth, decided = people.truth, people.score.argmax(1)
    assert _values(judged) == pytest.approx(
        {
            "accuracy": scores.accuracy_score(truth, decided),
            "balanced_accuracy": scores.balanced_accuracy_score(truth, decided),
            "auroc": scores.roc_auc_score(truth, people.score, multi_class="ovr", average="macro"),
            "auprc": scores.average_precision_score(np.eye(4)[truth.astype(int)], people.score, average="macro"),
            "f1": scores.f1_score(truth, decided, average="macro"),
            "loss": scores.log_loss(truth, people.score),
        },
        rel=1e-12,
    )
    assert judged["threshold"] is None


def test_numbers_are_scikit_learns_in_the_labels_units() -> None:
    people = by_subject(clips(2, 50, 1))
    judged = judge(people, "regression")
    truth, said = people.truth, people.score[:, 0]
    assert _values(judged) == pytest.approx(
        {
            "mae": scores.mean_absolute_error(truth, said),
            "mse": scores.mean_squared_error(truth, said),
            "r2": scores.r2_score(truth, said),
            "pearson_r": pearsonr(truth, said).statistic,
            "loss": scores.mean_squared_error(truth, said),
        },
        rel=1e-12,
    )
    slope, intercept = np.polyfit(said, truth, 1)
    assert judged["calibration"] == pytest.approx({"slope": slope, "intercept": intercept})
    # Predictions of a line of the truth mean what they say once they are undone.
    assert judge(subjects(truth, 3 * truth - 2), "regression")["calibration"]["slope"] == pytest.approx(1 / 3)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3]))
def test_a_draw_is_the_metric_of_the_subjects_that_come_in_it(seed: int, classes: int) -> None:
    """The weighted metrics, ties and absent classes among them, are those of the rows repeated as often as they are drawn."""
    kind: TargetKind = "regression" if classes == 1 else "classification"
    rng = np.random.default_rng(seed)
    p = by_subject(clips(seed, int(rng.integers(5, 25)), classes))
    # Sixteenths are exact: they tie, and sum to 1 whatever is done with them.
    score = np.floor(p.score * 16) / 16
    if classes > 1:
        score[:, 0] += 1 - score.sum(1)
    people = ready(Predictions(p.unit, p.run, p.clip, p.truth, score), kind, "abc"[:classes])
    threshold = 0.5 if classes == 2 else None
    drawn = resampled(people, kind, threshold, 8, seed)
    weights = np.concatenate(list(resample([str(u) for u in people.unit], 8, seed)))
    assert np.all(weights.sum(1) == len(people))
    for draw, weight in enumerate(weights):
        rows = people.rows(np.repeat(np.arange(len(people)), weight.astype(int)))
        again = subjects(rows.truth, rows.score)
        for name, value in _values(judge(again, kind, "abc"[:classes], threshold, bootstrap=0)).items():
            found = drawn[name][draw]
            assert (value is None) == bool(np.isnan(found)), name
            if value is not None:
                assert found == pytest.approx(value, rel=1e-9, abs=1e-9), name


def test_families_are_drawn_whole() -> None:
    units = [f"u{i}" for i in range(30)]
    families = {f"u{i}": f"f{i // 3}" for i in range(15)}
    weights = np.concatenate(list(resample(units, 200, 0, families)))
    assert all(np.array_equal(weights[:, i], weights[:, 3 * (i // 3)]) for i in range(15))
    assert not np.array_equal(weights[:, 15], weights[:, 16])
    assert weights.mean() == pytest.approx(1.0, abs=0.05)


def test_intervals_widen_where_families_are_alike() -> None:
    rng = np.random.default_rng(0)
    shared = np.repeat(rng.normal(size=40), 4)
    said = np.repeat(rng.normal(size=40), 4)
    people = subjects(shared, said)
    families = {str(u): f"f{i // 4}" for i, u in enumerate(people.unit)}
    alone, together = judge(people, "regression"), judge(people, "regression", groups=families)
    widths = [j["metrics"]["mse"]["high"] - j["metrics"]["mse"]["low"] for j in (alone, together)]
    assert widths[1] / widths[0] == pytest.approx(2.0, rel=0.2)
    assert (alone["groups"], together["groups"]) == (160, 40)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["auroc", "pearson_r"])
def test_intervals_hold_the_truth_as_often_as_they_say(metric: str) -> None:
    """95 % intervals over 80 subjects: 300 cohorts of a known AUROC, or a known correlation."""
    rng = np.random.default_rng(7)
    held = 0
    for cohort in range(300):
        if metric == "auroc":
            truth = (np.arange(80) < 40).astype(float)
            latent = rng.normal(size=80) + truth
            people, true = binary(truth, norm.cdf(latent - 0.5)), norm.cdf(1 / np.sqrt(2))
        else:
            latent = rng.normal(size=80)
            people, true = subjects(latent, 0.5 * latent + np.sqrt(0.75) * rng.normal(size=80)), 0.5
        drawn = resampled(people, "classification" if metric == "auroc" else "regression", 0.5, 1000, cohort)[metric]
        ends = percentiles(drawn, 0.95)
        held += cast("float", ends["low"]) <= true <= cast("float", ends["high"])
    # Percentiles of few subjects are a little narrow: 0.92 to 0.95, give or take 2.5 standard errors of 300 cohorts.
    assert 0.905 <= held / 300 <= 0.975


def _reason(judged: dict[str, Any], name: str) -> str:
    entry = judged["metrics"][name]
    assert entry["value"] is None
    assert entry["low"] is None
    assert entry["high"] is None
    return str(entry["reason"])


def test_what_is_not_defined_is_null_with_its_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = judge(binary([0, 0, 0], [0.1, 0.2, 0.3]), "classification", "ab")
        flat = judge(subjects([1.0, 2.0, 3.0], [0.1 + 0.2, 0.3, 0.3]), "regression")
        same = judge(subjects([2.0, 2.0], [1.0, 3.0]), "regression")
        alone = judge(subjects([2.0], [1.0]), "regression")
        lacking = judge(subjects([0, 1, 1], np.eye(3)), "classification", "abc")
    assert _reason(one, "auroc") == _reason(one, "balanced_accuracy") == "all units are of one class"
    assert _reason(one, "f1") == "no unit is, or is predicted, positive"
    assert one["metrics"]["accuracy"]["value"] == 1.0
    assert _reason(flat, "pearson_r") == "all predictions are the same"
    assert flat["metrics"]["r2"]["value"] == pytest.approx(scores.r2_score([1, 2, 3], [0.3, 0.3, 0.3]))
    assert flat["calibration"]["slope"] is None
    assert _reason(same, "r2") == _reason(same, "pearson_r") == "all labels are the same"
    assert _reason(alone, "pearson_r") == "all labels and predictions are the same"
    assert _reason(lacking, "auroc") == "a class has no unit"
    for judged in (one, flat, same, alone, lacking):
        json.dumps(judged, allow_nan=False)


def test_draws_without_a_value_are_counted() -> None:
    # One of six is positive: a draw lacks it with probability (5/6)^6.
    people = binary([0, 0, 0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4, 0.9, 0.7])
    entry = judge(people, "classification", "ab", bootstrap=4000)["metrics"]["auroc"]
    assert entry["undefined"] / 4000 == pytest.approx((5 / 6) ** 6, abs=0.03)
    assert entry["low"] < entry["value"] <= entry["high"]
    four = judge(people.rows(np.arange(2, 6)), "classification", "ab")["metrics"]["auroc"]
    assert (four["low"], four["reason"]) == (None, "no interval: fewer than 5 units or groups")
    few = percentiles(np.array([0.5, np.nan, np.nan]), 0.95)
    assert few == {"low": None, "high": None, "undefined": 2}


def test_the_threshold_is_that_of_the_best_balanced_accuracy_on_validation() -> None:
    rng = np.random.default_rng(3)
    truth = (rng.random(70) < 0.2).astype(float)
    said = np.clip(0.15 + 0.1 * truth + 0.05 * rng.normal(size=70), 0, 1)
    chosen = choose_threshold(binary(truth, said))
    best = max(scores.balanced_accuracy_score(truth, said >= t) for t in np.unique(said))
    assert scores.balanced_accuracy_score(truth, said >= chosen) == pytest.approx(best)
    assert scores.balanced_accuracy_score(truth, said >= 0.5) < 0.6 < best
    # Where any threshold between two scores does, the one nearest to one half.
    assert choose_threshold(binary([0, 1], [0.2, 0.9])) == 0.5
    with pytest.raises(SwiftError, match="all 2 validation subjects are of one class"):
        choose_threshold(binary([1, 1], [0.2, 0.9]))


def test_calibration_tells_true_probabilities_from_boasting_ones() -> None:
    rng = np.random.default_rng(5)
    true = rng.random(4000)
    truth = (rng.random(4000) < true).astype(float)
    boast = 1 / (1 + np.exp(-3 * np.log(true / (1 - true))))
    honest, boasting = (judge(binary(truth, p), "classification", "ab", bootstrap=0)["calibration"] for p in (true, boast))
    assert honest["ece"] < 0.03 < 0.1 < boasting["ece"]
    assert {b["n"] for b in honest["bins"]} == {400}
    within = [b["low"] <= b["predicted"] <= b["high"] for b in honest["bins"]]
    assert sum(within) >= 9
    constant = judge(binary(truth, np.full(4000, 0.25)), "classification", "ab", bootstrap=0)["calibration"]
    assert [b["n"] for b in constant["bins"]] == [4000]
    assert constant["ece"] == pytest.approx(abs(truth.mean() - 0.25))
    three = judge(subjects([0, 1, 2], np.eye(3)), "classification", "abc", bootstrap=0)["calibration"]
    assert (three["of"], three["brier"], three["ece"]) == ("likeliest", 0.0, 0.0)


def test_scores_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SwiftError, match="do not sum to 1"):
        judge(subjects([0, 1], [[0.5, 0.6], [0.5, 0.5]]), "classification", "ab")
    with pytest.raises(SwiftError, match="where 3 finite ones belong"):
        judge(binary([0, 1], [0.5, 0.6]), "classification", "abc")
    with pytest.raises(SwiftError, match="no subject with a known label"):
        judge(subjects([np.nan], [1.0]), "regression")
