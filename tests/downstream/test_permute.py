"""Permuted labels: families stay exchangeable, nothing scores one half, something does not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from swiftv2.config.task import TargetConfig
from swiftv2.downstream.linear import prepare
from swiftv2.downstream.permute import Exchange, Part, permute
from swiftv2.errors import SwiftError

LABEL = TargetConfig(column="label", kind="classification")


def _families(sizes: list[int]) -> NDArray[np.str_]:
    return np.array([f"family {i}" for i, size in enumerate(sizes) for _ in range(size)])


@given(st.lists(st.integers(1, 3), min_size=4, max_size=30), st.integers(0, 2**20), st.booleans())
def test_labels_move_as_whole_families_of_one_size_within_a_site(sizes: list[int], seed: int, sited: bool) -> None:
    rng = np.random.default_rng(seed)
    families = _families(sizes)
    known = rng.random(len(families)) < 0.9
    sites = np.array([f"site {int(name.split()[1]) % 2}" for name in families])
    source = Exchange(known, families, sites if sited else None).draw(rng)
    assert sorted(source) == list(range(len(families)))
    assert (source[~known] == np.flatnonzero(~known)).all()
    if sited:
        assert (sites[source] == sites).all()
    for name in np.unique(families):
        rows = np.flatnonzero((families == name) & known)
        if not len(rows):
            continue
        givers = families[source[rows]]
        assert len(set(givers)) == 1, "relatives got labels of different families"
        assert np.sum((families == givers[0]) & known) == len(rows)


def test_every_exchange_that_families_allow_comes() -> None:
    families = _families([2, 2, 1, 1])
    rng = np.random.default_rng(0)
    exchange = Exchange(np.ones(6, dtype=np.bool_), families)
    seen = {tuple(exchange.draw(rng).tolist()) for _ in range(500)}
    assert len(seen) == 2 * 2 * 2 * 2  # Families change places or not, members of each or not, singles or not.
    assert exchange.share_moved == 1.0
    assert Exchange(np.ones(3, dtype=np.bool_), _families([2, 1])).share_moved == 0.0


def _parts(x: NDArray[np.float64], folds: int = 4) -> list[Part]:
    fold = np.arange(len(x)) % folds
    return [Part(prepare(x, fold != k), fold != k, fold == k) for k in range(folds)]


@pytest.mark.slow
def test_permuted_labels_score_one_half_and_true_ones_stand_out() -> None:
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat([0.0, 1.0], 80))
    labels[:10] = np.nan
    x = rng.normal(size=(160, 300))
    x[:, :20] += np.nan_to_num(labels)[:, None]
    groups = np.array([f"unit {i}" for i in range(160)])
    exchange = Exchange(~np.isnan(labels), groups)
    found = permute(_parts(x), labels, LABEL, ("0", "1"), exchange, groups, 50)
    # One AUROC over 4 folds of 38 subjects varies by about 0.05; the mean of 50 by 0.007.
    assert abs(found["mean"] - 0.5) < 0.03
    assert 0.02 < found["std"] < 0.09
    assert found["observed"] > 0.8
    assert found["p"] == pytest.approx(1 / 51)
    assert found["low"] < found["mean"] < found["high"]
    again = permute(_parts(x), labels, LABEL, ("0", "1"), exchange, groups, 50)
    assert again == found


@pytest.mark.slow
def test_p_is_even_where_labels_mean_nothing() -> None:
    """Of 20 labels of nothing, about 4 should have p up to 0.2; more than 10 come once in a thousand times."""
    rng = np.random.default_rng(2)
    x, groups = rng.normal(size=(60, 8)), np.array([f"unit {i}" for i in range(60)])
    parts, exchange = _parts(x, folds=2), Exchange(np.ones(60, dtype=np.bool_), groups)
    found = [
        permute(parts, rng.permutation(np.repeat([0.0, 1.0], 30)), LABEL, ("0", "1"), exchange, groups, 9, seed=seed)["p"]
        for seed in range(20)
    ]
    assert sum(p <= 0.2 for p in found) <= 10
    assert min(found) < 0.5 < max(found)


def test_what_cannot_be_permuted_is_refused() -> None:
    x, labels = np.random.default_rng(3).normal(size=(12, 2)), np.asarray(np.arange(12) % 2, dtype=np.float64)
    one = np.full(12, "family 1")
    with pytest.raises(SwiftError, match="no label can move"):
        permute(_parts(x), labels, LABEL, ("0", "1"), Exchange(labels >= 0, one), one, 5)
    number = TargetConfig(column="age", kind="regression")
    alone = np.array([f"unit {i}" for i in range(12)])
    with pytest.raises(SwiftError, match="age: permutations judge AUROC"):
        permute(_parts(x), labels, number, (), Exchange(labels >= 0, alone), alone, 5)
