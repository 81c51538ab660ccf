"""Linear models: equal to scikit-learn's own, blind to held-out rows, and at chance where there is nothing to learn."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from swiftv2.config.task import TargetConfig
from swiftv2.downstream.linear import MOST_COMPONENTS, STRENGTHS, fit_predict, prepare, prior
from swiftv2.downstream.residuals import residualise
from swiftv2.errors import SwiftError

Floats = NDArray[np.float64]
SEX = TargetConfig(column="sex", kind="classification")
AGE = TargetConfig(column="age", kind="regression")


def _alone(count: int) -> NDArray[np.str_]:
    return np.array([f"unit {i}" for i in range(count)])


def _auroc(labels: Floats, score: Floats, rows: NDArray[np.bool_]) -> float:
    return float(roc_auc_score(labels[rows], score[rows, 1]))


@pytest.mark.parametrize("features", [7, 400])
def test_fewer_and_more_features_than_rows_are_scikit_learns_models_of_standardised_features(features: int) -> None:
    rng = np.random.default_rng(features)
    x = rng.normal(3.0, 2.0, (90, features)) * rng.uniform(0.1, 10.0, features)
    train = np.arange(90) < 60
    numbers = x[:, 0] / x[:, 0].std() + rng.normal(size=90)
    labels = (numbers > np.median(numbers)).astype(np.float64)
    scaled = StandardScaler().fit(x[train]).transform(x) / np.sqrt(features)

    ridge = Ridge(alpha=0.3).fit(scaled[train], numbers[train]).predict(scaled)
    found = fit_predict(prepare(x, train), numbers, train, AGE, (), _alone(90), strengths=(0.3,)).score
    np.testing.assert_allclose(found[:, 0], ridge, atol=1e-8)

    logistic = LogisticRegression(C=1 / 0.3, class_weight="balanced", tol=1e-10, max_iter=10000).fit(
        scaled[train], labels[train]
    )
    found = fit_predict(prepare(x, train), labels, train, SEX, ("0", "1"), _alone(90), strengths=(0.3,)).score
    np.testing.assert_allclose(found, logistic.predict_proba(scaled), atol=2e-4)


def test_predictions_of_a_row_do_not_depend_on_other_held_out_rows_nor_on_held_out_labels() -> None:
    rng = np.random.default_rng(1)
    x, train = rng.normal(size=(80, 200)), np.arange(80) < 60
    covariates = rng.normal(size=(80, 2))
    labels = rng.integers(0, 2, 80).astype(np.float64)
    x[rng.random(x.shape) < 0.05] = np.nan
    before = fit_predict(prepare(x, train, covariates), labels, train, SEX, ("0", "1"), _alone(80))
    changed, other, known = x.copy(), covariates.copy(), labels.copy()
    changed[61:], other[61:], known[60:] = 1000.0, -50.0, 1.0 - labels[60:]
    after = fit_predict(prepare(changed, train, other), known, train, SEX, ("0", "1"), _alone(80))
    assert after.strength == before.strength
    np.testing.assert_allclose(after.score[:61], before.score[:61], atol=1e-9)


def test_a_label_of_nothing_scores_one_half_and_a_planted_leak_does_not() -> None:
    """Choosing features by all labels is the classic leak: it makes noise predictable, and this scheme must not."""
    nested, leaked = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x, labels = rng.normal(size=(120, 2000)), np.repeat([0.0, 1.0], 60)
        train = rng.permutation(120) < 80
        honest = fit_predict(prepare(x, train), labels, train, SEX, ("0", "1"), _alone(120), seed=seed)
        nested.append(_auroc(labels, honest.score, ~train))
        best = np.argsort(-np.abs(x[labels == 1].mean(0) - x[labels == 0].mean(0)))[:30]
        cheat = fit_predict(prepare(x[:, best], train), labels, train, SEX, ("0", "1"), _alone(120), seed=seed)
        leaked.append(_auroc(labels, cheat.score, ~train))
    # Standard error of a mean of 12 AUROCs over 40 subjects: 0.09 / sqrt(12) = 0.027.
    assert abs(np.mean(nested) - 0.5) < 0.08
    assert np.mean(leaked) > 0.75


def test_planted_signal_is_found_nearly_as_well_as_can_be() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 2400).astype(np.float64)
    x = rng.normal(size=(2400, 50))
    x[:, 0] += labels * 1.5
    train = np.arange(2400) < 400
    found = fit_predict(prepare(x, train), labels, train, SEX, ("0", "1"), _alone(2400))
    best = float(roc_auc_score(labels[~train], x[~train, 0]))
    assert best - 0.04 < _auroc(labels, found.score, ~train) <= best + 0.005
    numbers = x[:, 0] * 5 + 40 + rng.normal(size=2400)
    numbers[::10] = np.nan
    predicted = fit_predict(prepare(x, train), numbers, train, AGE, (), _alone(2400)).score[:, 0]
    held = ~train & ~np.isnan(numbers)
    assert np.mean(np.abs(predicted[held] - numbers[held])) < 1.0  # Of noise alone: sqrt(2 / pi) = 0.80.


def test_three_classes_have_probabilities_that_sum_to_one() -> None:
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 3, 150).astype(np.float64)
    x = rng.normal(size=(150, 5)) + labels[:, None]
    train = np.arange(150) < 100
    score = fit_predict(prepare(x, train), labels, train, SEX, ("a", "b", "c"), _alone(150)).score
    np.testing.assert_allclose(score.sum(1), 1.0)
    assert np.mean(score.argmax(1)[~train] == labels[~train]) > 0.6


def test_relatives_are_in_one_inner_fold_so_that_their_likeness_is_not_taken_for_skill() -> None:
    """Copies of a subject in two inner folds make the weakest penalty look best; together they cannot."""
    rng = np.random.default_rng(5)
    x = np.repeat(rng.normal(size=(40, 300)), 3, axis=0)
    labels = np.repeat(rng.integers(0, 2, 40), 3).astype(np.float64)
    train = np.ones(120, dtype=np.bool_)
    families = np.array([f"family {i // 3}" for i in range(120)])
    together = fit_predict(prepare(x, train), labels, train, SEX, ("0", "1"), families)
    apart = fit_predict(prepare(x, train), labels, train, SEX, ("0", "1"), _alone(120))
    assert apart.strength == min(STRENGTHS)
    assert together.strength > 100 * apart.strength


def test_covariates_are_taken_out_by_the_training_rows_alone() -> None:
    rng = np.random.default_rng(6)
    motion = rng.normal(size=(300, 1))
    labels = (motion[:, 0] + 0.5 * rng.normal(size=300) > 0).astype(np.float64)
    x = motion @ rng.normal(size=(1, 20)) + 0.3 * rng.normal(size=(300, 20))
    train = np.arange(300) < 200
    with_motion = fit_predict(prepare(x, train), labels, train, SEX, ("0", "1"), _alone(300))
    without = fit_predict(prepare(x, train, motion), labels, train, SEX, ("0", "1"), _alone(300))
    assert _auroc(labels, with_motion.score, ~train) > 0.9
    assert abs(_auroc(labels, without.score, ~train) - 0.5) < 0.15

    numbers = 40 + 7 * motion[:, 0] + rng.normal(size=300)
    numbers[3] = np.nan
    clean = residualise(numbers, motion, train)
    known = train & ~np.isnan(numbers)
    assert abs(np.corrcoef(clean[known], motion[known, 0])[0, 1]) < 1e-10
    assert clean[known].mean() == pytest.approx(numbers[known].mean())
    assert np.isnan(clean[3])
    shifted = numbers.copy()
    shifted[~train] += 100
    np.testing.assert_allclose(residualise(shifted, motion, train)[train], clean[train])


def test_collinear_and_constant_covariates_and_features_do_no_harm() -> None:
    rng = np.random.default_rng(7)
    train = np.arange(60) < 40
    site = rng.integers(0, 2, 60).astype(np.float64)
    covariates = np.stack([site, 1 - site, np.full(60, 3.0)], axis=1)
    x = np.stack([rng.normal(size=60), np.full(60, 1e6), np.full(60, np.nan)], axis=1)
    prepared = prepare(x, train, covariates)
    assert prepared.shape == (60, 1)
    assert abs(prepared[train][site[train] == 1].mean()) < 1e-9


def test_no_feature_at_all_predicts_by_shares() -> None:
    labels = np.array([0.0, 0, 0, 1, 1, np.nan])
    train = np.array([True, True, True, True, False, True])
    np.testing.assert_allclose(prior(labels, train, ("0", "1")), np.tile([0.75, 0.25], (6, 1)))
    np.testing.assert_allclose(prior(labels, train, ()), np.full((6, 1), 0.25))
    constant = prepare(np.ones((6, 4)), train)
    np.testing.assert_allclose(fit_predict(constant, labels, train, SEX, ("0", "1"), _alone(6)).score, 0.5, atol=1e-6)


def test_more_dimensions_than_can_be_held_become_principal_components(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_COMPONENTS >= 1000
    monkeypatch.setattr("swiftv2.downstream.linear.MOST_COMPONENTS", 20)
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 2, 200).astype(np.float64)
    x = rng.normal(size=(200, 3)) @ rng.normal(size=(3, 500)) + 0.1 * rng.normal(size=(200, 500))
    x += labels[:, None] * rng.normal(size=500)
    train = np.arange(200) < 150
    prepared = prepare(x, train)
    assert prepared.shape == (200, 20)
    found = fit_predict(prepared, labels, train, SEX, ("0", "1"), _alone(200))
    assert _auroc(labels, found.score, ~train) > 0.95


def test_too_little_to_learn_from_is_refused_in_one_line() -> None:
    x, train = np.random.default_rng(9).normal(size=(20, 3)), np.ones(20, dtype=np.bool_)
    labels = np.zeros(20)
    with pytest.raises(SwiftError, match="target sex: no training row has male"):
        fit_predict(x, labels, train, SEX, ("female", "male"), _alone(20))
    labels[0] = 1
    with pytest.raises(SwiftError, match="cannot be divided into inner folds"):
        fit_predict(x, labels, train, SEX, ("female", "male"), _alone(20))
    with pytest.raises(SwiftError, match="cannot be divided into inner folds"):
        fit_predict(x, np.arange(20.0), train, AGE, (), np.full(20, "family 1"))
