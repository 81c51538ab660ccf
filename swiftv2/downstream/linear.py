"""Logistic and ridge regression on features of units, the strength of their penalty chosen on inner folds.

What is learned is learned from training rows: what stands for missing features, the covariates' share, mean and deviation
of each feature, and the coefficients. The features that come of it are the same for all targets (`prepare`); the labels
come in afterwards (`fit_predict`). Since both penalties are of coefficients' squares alone, a rotation of the features
changes no prediction: where there are more features than training rows they are rotated into the span of these rows, and
tens of thousands of features cost no more than there are subjects.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from swiftv2.config.task import TargetConfig
from swiftv2.downstream.residuals import residualise
from swiftv2.errors import SwiftError

Floats = NDArray[np.float64]
Rows = NDArray[np.bool_]

STRENGTHS = tuple(float(one) for one in np.logspace(-3, 3, 7))
"""Strengths of the penalty to choose from, for features whose mean square over a training row is 1: ridge's alpha, and
one over logistic regression's C."""
FOLDS = 5
"""Inner folds at most."""
MOST_COMPONENTS = 2000
"""Dimensions above which features are brought to so many principal components of the training rows."""


@dataclass(frozen=True)
class Prediction:
    """What a linear model says.

    Attributes:
        score: (n, K) probabilities of the classes, or (n, 1) in the label's units; of all rows, trained on or not.
        strength: of the penalty that was chosen.
    """

    score: Floats
    strength: float


def prepare(features: Floats, train: Rows, covariates: Floats | None = None, seed: int = 0) -> Floats:
    """Features as the models take them, by what the training rows tell; labels have no part in it.

    Args:
        features: (n, D), NaN where unknown: the training rows' mean then, 0 where none of them knows it.
        train: (n,) training rows.
        covariates: (n, C) whose linear share is taken out; None for none.
        seed: of the principal components, where there are more than `MOST_COMPONENTS` dimensions.

    Returns:
        (n, d) of mean 0 over the training rows. Where no feature varies over them, d is 0.
    """
    values = np.asarray(features, dtype=np.float64)
    if not values.shape[1]:
        return values
    values = SimpleImputer(keep_empty_features=True).fit(values[train]).transform(values)
    if covariates is not None and covariates.shape[1]:
        values = residualise(values, covariates, train)
    scaler = StandardScaler().fit(values[train])
    varies = scaler.var_ > 1e-12 * np.maximum(scaler.mean_**2, np.finfo(np.float64).tiny)
    values = scaler.transform(values)[:, varies] / np.sqrt(max(int(varies.sum()), 1))
    rank = min(int(train.sum()), values.shape[1])
    if rank > MOST_COMPONENTS:
        solver = PCA(MOST_COMPONENTS, svd_solver="randomized", random_state=seed).fit(values[train])
        return np.asarray(solver.transform(values), dtype=np.float64)
    return _into_span(values, train) if values.shape[1] > rank else values


def fit_predict(
    prepared: Floats,
    numbers: Floats,
    train: Rows,
    target: TargetConfig,
    classes: Sequence[str],
    groups: NDArray[np.str_],
    *,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
) -> Prediction:
    """Choose the strength of the penalty on inner folds of the training rows, refit on all of them, predict every row.

    The chosen strength has the smallest log loss (of classes weighted as in training) or square error over the inner
    folds; of equal ones it is the greater. A single strength is taken as it is.

    Args:
        prepared: (n, d) of `prepare`; d = 0 predicts by the labels' mean alone.
        numbers: (n,) class numbers or values, NaN where missing; those of rows outside `train` are not looked at.
        train: (n,) training rows.
        target: kind and class weights.
        classes: names in order; empty for numbers.
        groups: (n,) who stays together in the inner folds, such as a family.
        seed: of the inner folds.
        strengths: to choose from.

    Raises:
        SwiftError: a class has no training row, or training rows are of too few groups for inner folds.
    """
    known = train & ~np.isnan(numbers)
    missing = [name for number, name in enumerate(classes) if not (numbers[known] == number).any()]
    if missing or not known.any():
        raise SwiftError(
            f"target {target.column}: no training row has {missing[0] if missing else 'a value'}; take another split or classes"
        )
    x, y = prepared[known], numbers[known]
    if not x.shape[1]:
        x, prepared, strengths = np.zeros((len(x), 1)), np.zeros((len(prepared), 1)), strengths[:1]
    ordered = sorted(strengths, reverse=True)
    if len(ordered) == 1:
        return Prediction(_fit(x, y, ordered, target, prepared)[0], ordered[0])
    weights = _weights(y, target)
    loss, used = np.zeros(len(ordered)), 0
    for fit, held in _folds(y, groups[known], target, len(classes), seed):
        scores = _fit(x[fit], y[fit], ordered, target, x[held])
        loss += [float(np.sum(weights[held] * _losses(score, y[held], target))) for score in scores]
        used += 1
    if not used:
        raise SwiftError(
            f"target {target.column}: {len(y)} training rows of {len(set(groups[known]))} subjects or families cannot be "
            "divided into inner folds that all hold every class: take more training subjects"
        )
    chosen = ordered[int(np.argmin(loss))]
    return Prediction(_fit(x, y, [chosen], target, prepared)[0], chosen)


def prior(numbers: Floats, train: Rows, classes: Sequence[str]) -> Floats:
    """What is predicted without any features: shares of the classes, or the mean, over the training rows; (n, K) or (n, 1)."""
    known = numbers[train & ~np.isnan(numbers)]
    if not classes:
        return np.full((len(numbers), 1), known.mean())
    shares = np.bincount(known.astype(np.int64), minlength=len(classes)) / len(known)
    return np.tile(shares, (len(numbers), 1))


def _into_span(values: Floats, train: Rows) -> Floats:
    """Coordinates (n, d) of rows in an orthonormal basis of the span of the training rows; d is at most their number."""
    products = values @ values[train].T
    squares, vectors = np.linalg.eigh(products[train])
    kept = squares > squares[-1] * 1e-10
    rotated: Floats = products @ (vectors[:, kept] / np.sqrt(squares[kept]))
    return rotated


def _folds(
    y: Floats, groups: NDArray[np.str_], target: TargetConfig, classes: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Inner folds with whole groups, alike in classes; those whose training rows lack a class are passed over."""
    count = min(FOLDS, len(set(groups)))
    if count < 2:
        return
    if target.kind == "regression":
        yield from GroupKFold(count, shuffle=True, random_state=seed).split(y, y, groups)
        return
    rarest = int(np.bincount(y.astype(np.int64), minlength=classes).min())
    count = max(min(count, rarest), 2)
    if rarest < 2:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        for fit, held in StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(y, y.astype(np.int64), groups):
            if len(set(y[fit])) == classes and len(held):
                yield fit, held


def _fit(x: Floats, y: Floats, strengths: Sequence[float], target: TargetConfig, wanted: Floats) -> list[Floats]:
    """Scores of the wanted rows for each strength, strongest first."""
    if target.kind == "regression":
        # One decomposition serves all strengths: each is the penalty of its own copy of the label.
        model = Ridge(alpha=np.asarray(strengths), solver="svd").fit(x, np.tile(y[:, None], (1, len(strengths))))
        return [column[:, None] for column in model.predict(wanted).reshape(len(wanted), -1).T]
    weight = "balanced" if target.class_weights == "balanced" else None
    # Choosing among strengths that differ tenfold asks for less than what is predicted in the end.
    tolerance = 1e-4 if len(strengths) > 1 else 1e-6
    model = LogisticRegression(class_weight=weight, solver="lbfgs", warm_start=True, max_iter=5000, tol=tolerance)
    scores = []
    for strength in strengths:
        model.set_params(C=1.0 / strength)
        # What goes in is checked by now, hundreds of times over.
        with warnings.catch_warnings(), config_context(assume_finite=True, skip_parameter_validation=True):
            warnings.simplefilter("error", ConvergenceWarning)
            try:
                model.fit(x, y)
            except ConvergenceWarning as error:
                raise SwiftError(
                    f"target {target.column}: logistic regression of penalty {strength:g} does not converge"
                ) from error
        scores.append(np.asarray(model.predict_proba(wanted), dtype=np.float64))
    return scores


def _weights(y: Floats, target: TargetConfig) -> Floats:
    balanced = target.kind == "classification" and target.class_weights == "balanced"
    return np.asarray(compute_sample_weight("balanced", y), dtype=np.float64) if balanced else np.ones(len(y))


def _losses(score: Floats, y: Floats, target: TargetConfig) -> Floats:
    """(n,) log losses or square errors."""
    if target.kind == "regression":
        return np.asarray((score[:, 0] - y) ** 2)
    likely = score[np.arange(len(y)), y.astype(np.int64)]
    return np.asarray(-np.log(np.maximum(likely, 1e-12)))
