"""Repeated data: the effective tokens of the paper, and its constant found where runs repeat."""

import numpy as np
import pytest
from known_laws import grid, losses, make_table, noisy

from swiftv2.scaling.law import Runs, fit_law
from swiftv2.scaling.repeated import effective_tokens, repeated_law

HALF_LIFE = 15.0


def test_effective_tokens_are_those_of_the_paper() -> None:
    seen = np.array([1e9, 2e9, 16e9, 1e15])
    worth = effective_tokens(seen, np.full(4, 1e9), HALF_LIFE)
    assert worth[0] == 1e9
    assert worth[2] == pytest.approx(1e9 + 1e9 * HALF_LIFE * (1.0 - np.exp(-1.0)))
    assert worth[3] == pytest.approx(1e9 * (1.0 + HALF_LIFE))
    assert np.all(worth <= seen)


def test_its_constant_is_found_with_an_interval() -> None:
    n, d = grid(5, 5)
    unique = np.minimum(d, np.tile([1e9, 1e9, 2e9, 1e9, 2e9], 5))
    clean = losses(n, effective_tokens(d, unique, HALF_LIFE))
    held = 0
    for seed in range(5):
        table = make_table(n, d, noisy(clean, 0.003, seed), unique)
        tree = repeated_law(table, fit_law(Runs.make(table.loss, n, d)), 0.9)
        assert tree["R_star"] == pytest.approx(HALF_LIFE, rel=0.5)
        assert tree["objective"] < tree["objective_without"]
        assert tree["most_epochs"] == pytest.approx(50.0)
        low, high = tree["interval"]
        held += low is not None and high is not None and low <= HALF_LIFE <= high
    assert held >= 3


def test_it_is_refused_without_a_column_and_without_repetition() -> None:
    n, d = grid(4, 4)
    fit = fit_law(Runs.make(losses(n, d), n, d))
    assert "--unique" in repeated_law(make_table(n, d, losses(n, d)), fit, 0.9)["refused"]
    assert "nothing is repeated" in repeated_law(make_table(n, d, losses(n, d), d), fit, 0.9)["refused"]
    assert "nothing is repeated" in repeated_law(make_table(n, d, losses(n, d), 2.0 * d), fit, 0.9)["refused"]
